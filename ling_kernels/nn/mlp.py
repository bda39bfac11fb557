"""The dense SwiGLU MLP, also the shared expert: down(silu(gate(x)) * up(x))."""

from torch import Tensor, nn

from ..ops.swiglu import swiglu


class MLP(nn.Module):
    """H -> F -> H; gate_up [2F, H] holds the gate's rows, then up's."""

    def __init__(self, hidden_size: int, intermediate_size: int):
        super().__init__()
        self.gate_up = nn.Linear(hidden_size, 2 * intermediate_size, bias=False)
        self.down = nn.Linear(intermediate_size, hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(swiglu(self.gate_up(x)))
