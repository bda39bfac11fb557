"""Cross entropy: loss_t = logsumexp(logits_t) - logits_t[target_t]; targets equal to ignore_index count for nothing."""

import torch
from torch import Tensor
from torch.nn import functional as F

from ..op import expect, wide


def cross_entropy(logits: Tensor, targets: Tensor, ignore_index: int = -100, reduction: str = "mean") -> Tensor:
    """logits [T, V], targets [T] int64 -> the mean or sum over tokens not ignored, a scalar, or [T] for "none"; fp32.

    The mean is 0, not NaN, where every token is ignored, so that a batch of padding cannot poison a run. The loss of
    an ignored token is 0. Gradient: to logits, in their dtype. Raises ValueError for another shape, dtype or reduction,
    and on a CPU for a target that is neither in 0..V-1 nor ignore_index.
    """
    expect(logits.ndim == 2 and logits.shape[1] > 0 and logits.is_floating_point(), "logits [T, V]", logits)
    expect_targets(targets, *logits.shape, ignore_index)
    expect(reduction in ("mean", "sum", "none"), "reduction mean, sum or none", reduction)
    return cross_entropy_ref(logits, targets, ignore_index, reduction)


def cross_entropy_ref(logits, targets, ignore_index=-100, reduction="mean"):
    if reduction == "none":
        return F.cross_entropy(wide(logits), targets, ignore_index=ignore_index, reduction="none")
    total = F.cross_entropy(wide(logits), targets, ignore_index=ignore_index, reduction="sum")
    return total / counted(targets, ignore_index) if reduction == "mean" else total


def counted(targets: Tensor, ignore_index: int) -> Tensor:
    """How many targets count, at least 1."""
    return (targets != ignore_index).sum().clamp(min=1)


def expect_targets(targets: Tensor, T: int, V: int, ignore_index: int) -> None:
    expect(targets.shape == (T,) and targets.dtype == torch.int64, f"targets [{T}] int64", targets)
    if targets.device.type != "cpu" or torch.compiler.is_compiling():
        return
    wrong = targets[((targets < 0) | (targets >= V)) & (targets != ignore_index)]
    expect(len(wrong) == 0, f"targets in 0..{V - 1} or {ignore_index}", wrong[:4].tolist())
