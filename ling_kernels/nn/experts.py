"""The routed experts as one module: one [E, N, K] tensor per projection."""

import torch
from torch import Tensor, nn

from ..ops.dispatch import Plan
from ..ops.moe import Weight, expert_mlp


class Experts(nn.Module):
    """gate_up [E, 2F, H] and down [E, H, F].

    fold_weights: where the routing weight is applied. False: after the down projection, in fp32, as the official model
    does at inference; True: in SwiGLU, as its training code does. They differ by rounding.
    """

    def __init__(self, num_experts: int, hidden_size: int, intermediate_size: int, fold_weights: bool = False):
        super().__init__()
        self.fold_weights = fold_weights
        self.gate_up = nn.Parameter(torch.empty(num_experts, 2 * intermediate_size, hidden_size))
        self.down = nn.Parameter(torch.empty(num_experts, hidden_size, intermediate_size))
        for w in (self.gate_up, self.down):
            nn.init.normal_(w, std=0.02)

    def forward(self, x: Tensor, plan: Plan, weights: Tensor | None) -> Tensor:
        """x [T, H], a plan of T tokens, weights [T, topk] fp32 or None (all 1) -> [T, H], summed over the experts."""
        return expert_mlp(x, plan, weights, self.gate_up, self.down, self.fold_weights)

    def decode_weights(self) -> tuple[Weight, Weight] | None:
        """gate_up and down as the op `moe_decode` takes them; None if it cannot run this module."""
        return self.gate_up, self.down
