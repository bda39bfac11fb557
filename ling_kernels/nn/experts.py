"""The routed experts over rows sorted by expert: one [E, N, K] tensor per projection."""

import torch
from torch import Tensor, nn

from ..ops.grouped_gemm import grouped_gemm
from ..ops.swiglu import swiglu


class Experts(nn.Module):
    """gate_up [E, 2F, H] and down [E, H, F]; rows offsets[e] : offsets[e + 1] of x belong to expert e."""

    def __init__(self, num_experts: int, hidden_size: int, intermediate_size: int):
        super().__init__()
        self.gate_up = nn.Parameter(torch.empty(num_experts, 2 * intermediate_size, hidden_size))
        self.down = nn.Parameter(torch.empty(num_experts, hidden_size, intermediate_size))
        for w in (self.gate_up, self.down):
            nn.init.normal_(w, std=0.02)

    def forward(self, x: Tensor, offsets: Tensor) -> Tensor:
        """x [S, H] -> [S, H]."""
        return grouped_gemm(swiglu(grouped_gemm(x, self.gate_up, offsets)), self.down, offsets)
