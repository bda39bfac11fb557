"""The protocol of a linear layer that takes over work of its neighbours: the norm before it, and FP8 rows."""

import torch
from torch import Tensor, nn

from .norm import RMSNorm


class FusedLinear(nn.Linear):
    """A linear layer that `Attention` may hand a norm to apply, or rows that are FP8 already; Fp8Linear is one."""

    def forward(self, x: Tensor, norm: RMSNorm | None = None) -> Tensor:
        """x [..., K] -> [..., N] of x, or of norm(x)."""
        raise NotImplementedError

    def takes_fp8_rows(self) -> bool:
        """Whether `forward_fp8` can be called now."""
        raise NotImplementedError

    def forward_fp8(self, rows: tuple[Tensor, Tensor], dtype: torch.dtype) -> Tensor:
        """rows (x_q [M, K] e4m3, x_scale [M, K/128]) -> [M, N] in dtype."""
        raise NotImplementedError


def norm_linear(linear: nn.Module, x: Tensor, norm: RMSNorm | None) -> Tensor:
    """linear(norm(x)); a FusedLinear applies the norm itself."""
    if isinstance(linear, FusedLinear):
        return linear(x, norm)
    return linear(x if norm is None else norm(x))
