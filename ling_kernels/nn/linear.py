"""The protocol of a linear layer that takes over work of its neighbours: the norm before it, FP8 rows, the loss."""

import torch
from torch import Tensor, nn

from ..backend import backend
from ..ops.linear_cross_entropy import linear_cross_entropy
from ..ops.rms_norm_linear import ROWS, rms_norm_linear
from .norm import RMSNorm


class FusedLinear(nn.Linear):
    """A linear layer that `Attention` may hand a norm to apply, or rows that are FP8 already; Fp8Linear is one."""

    def forward(self, x: Tensor, norm: RMSNorm | None = None, dtype: torch.dtype | None = None) -> Tensor:
        """x [..., K] -> [..., N] of x, or of norm(x), in dtype, by default x's."""
        raise NotImplementedError

    def takes_fp8_rows(self) -> bool:
        """Whether `forward_fp8` can be called now."""
        raise NotImplementedError

    def forward_fp8(self, rows: tuple[Tensor, Tensor], dtype: torch.dtype) -> Tensor:
        """rows (x_q [M, K] e4m3, x_scale [M, K/128]) -> [M, N] in dtype."""
        raise NotImplementedError


class LossLinear(FusedLinear):
    """A head that computes the loss itself, as one whose weight is divided over several devices must."""

    def loss(self, x: Tensor, targets: Tensor) -> Tensor:
        """x [T, H], targets [T] -> the summed cross entropy of its logits, as `head_loss`."""
        raise NotImplementedError


def head_loss(head: nn.Module, x: Tensor, targets: Tensor) -> Tensor:
    """The summed cross entropy of head(x), x [T, H], without all logits in memory; targets [T] int64, -100: ignored."""
    if isinstance(head, LossLinear):
        return head.loss(x, targets)
    return linear_cross_entropy(x, head.weight, targets, reduction="sum")


def norm_linear(linear: nn.Module, x: Tensor, norm: RMSNorm | None, dtype: torch.dtype | None = None) -> Tensor:
    """linear(norm(x)) for x [T, K], in dtype, by default x's.

    A FusedLinear applies the norm itself. Where a decode step has few rows, one kernel of csrc/ does both.
    """
    if isinstance(linear, FusedLinear):
        return linear(x, norm, dtype)
    plain = is_plain(linear, nn.Linear) and linear.bias is None and (norm is None or is_plain(norm, RMSNorm))
    if plain and not torch.is_grad_enabled() and x.shape[0] <= ROWS and backend(x) == "cuda":
        weight, eps = (None, 0.0) if norm is None else (norm.weight, norm.eps)
        return rms_norm_linear(x, weight, linear.weight, eps, dtype)
    y = linear(x if norm is None else norm(x))
    return y if dtype is None else y.to(dtype)


def is_plain(module: nn.Module, kind: type) -> bool:
    """Whether the weight says all that the module computes: a subclass, an adapter or a hook may compute more."""
    hooks = module._forward_hooks or module._forward_pre_hooks
    return type(module) is kind and not hooks
