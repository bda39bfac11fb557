"""The dense SwiGLU MLP, also the shared expert: down(silu(gate(x)) * up(x))."""

from torch import Tensor, nn

from ..ops.moe import Weight
from ..ops.swiglu import swiglu


class MLP(nn.Module):
    """H -> F -> H; gate_up [2F, H] holds the gate's rows, then up's."""

    def __init__(self, hidden_size: int, intermediate_size: int):
        super().__init__()
        self.gate_up = nn.Linear(hidden_size, 2 * intermediate_size, bias=False)
        self.down = nn.Linear(intermediate_size, hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(swiglu(self.gate_up(x)))

    def decode_weights(self) -> tuple[Weight, Weight] | None:
        """gate_up and down as the op `moe_decode` takes them; None if it cannot run this module.

        A subclass or an adapter in place of a linear layer computes more than its weight says.
        """
        linears = self.gate_up, self.down
        return tuple(m.weight for m in linears) if all(type(m) is nn.Linear for m in linears) else None
