"""Cross entropy: loss_t = logsumexp(logits_t) - logits_t[target_t]; tokens with target ignore_index are left out."""

import torch
from torch import Tensor
from torch.nn import functional as F

from ..op import expect, first_derivative_only, multiprocessors, op, upcast, use_reference, values_on_host
from .triton_import import tl, triton


def cross_entropy(logits: Tensor, targets: Tensor, ignore_index: int = -100, reduction: str = "mean") -> Tensor:
    """logits [T, V], targets [T] int64 -> the mean or sum over tokens not ignored, a scalar, or [T] for "none"; fp32.

    The mean is 0, not NaN, where every token is ignored, so that a batch of padding does not end a run. The loss and
    the gradient of an ignored token are 0, whatever its logits. Gradient: to logits, in their dtype. Raises ValueError
    for another shape, dtype or reduction, and on a CPU for a target that is neither in 0..V-1 nor ignore_index.
    """
    expect(logits.ndim == 2 and logits.shape[1] > 0 and logits.is_floating_point(), "logits [T, V]", logits)
    expect_targets(targets, len(logits), logits.shape[1], ignore_index)
    expect(reduction in ("mean", "sum", "none"), "reduction mean, sum or none", reduction)
    if use_reference("cross_entropy", logits):
        return cross_entropy_ref(logits, targets, ignore_index, reduction)
    loss = CrossEntropy.apply(logits, targets, ignore_index)
    if reduction == "none":
        return loss
    return loss.sum() / count_targets(targets, ignore_index) if reduction == "mean" else loss.sum()


def cross_entropy_ref(logits, targets, ignore_index=-100, reduction="mean"):
    logits = without_ignored(upcast(logits), targets, ignore_index)
    if reduction == "none":
        return F.cross_entropy(logits, targets, ignore_index=ignore_index, reduction="none")
    total = F.cross_entropy(logits, targets, ignore_index=ignore_index, reduction="sum")
    return total / count_targets(targets, ignore_index) if reduction == "mean" else total


@torch.no_grad()
def logsumexp(logits: Tensor) -> Tensor:
    """logits [T, V] -> [T] fp32, to the bits that `cross_entropy` subtracts a target's logit from. No gradient."""
    if use_reference("cross_entropy", logits):
        return upcast(logits).logsumexp(-1)
    loss, lse = logits.new_empty(2, len(logits), dtype=torch.float32)
    cross_entropy_fwd(logits, logits.new_zeros(len(logits), dtype=torch.int64), None, loss, lse, None, -100)
    return lse


def without_ignored(rows: Tensor, targets: Tensor, ignore_index: int) -> Tensor:
    """rows [T, n] with 0 where the target is ignored: a NaN there times a gradient of 0 would be NaN."""
    return rows.masked_fill((targets == ignore_index)[:, None], 0)


def count_targets(targets: Tensor, ignore_index: int) -> Tensor:
    """The number of targets that are not ignored, at least 1."""
    return (targets != ignore_index).sum().clamp(min=1)


def expect_targets(targets: Tensor, T: int, V: int, ignore_index: int) -> None:
    expect(targets.shape == (T,) and targets.dtype == torch.int64, f"targets [{T}] int64", targets)
    if not values_on_host(targets):
        return
    wrong = targets[((targets < 0) | (targets >= V)) & (targets != ignore_index)]
    expect(len(wrong) == 0, f"targets in 0..{V - 1} or {ignore_index}", wrong[:4].tolist())


class CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits, targets, ignore_index):
        logits = logits if logits.stride(1) == 1 else logits.contiguous()
        targets = targets.contiguous()
        loss, lse = (logits.new_empty(len(logits), dtype=torch.float32) for _ in range(2))
        cross_entropy_fwd(logits, targets, None, loss, lse, None, ignore_index)
        ctx.save_for_backward(logits, targets, lse)
        ctx.ignore_index = ignore_index
        return loss

    @staticmethod
    @first_derivative_only
    def backward(ctx, dloss):
        logits, targets, lse = ctx.saved_tensors
        dlogits = logits.new_empty(logits.shape)
        cross_entropy_bwd(logits, targets, lse, dloss, dlogits, ctx.ignore_index)
        return dlogits, None, None


@op("loss", "lse", "dlogits")
def cross_entropy_fwd(
    logits: Tensor, targets: Tensor, tokens: Tensor | None, loss: Tensor, lse: Tensor, dlogits: Tensor | None,
    ignore_index: int,
) -> None:  # fmt: skip
    """Rows' loss and logsumexp, [T] fp32; with dlogits (or logits itself) also the gradient of the sum / tokens."""
    T, V = logits.shape
    if T:
        cross_entropy_fwd_kernel[(T,)](
            logits,
            targets,
            tokens,
            loss,
            lse,
            dlogits,
            logits.stride(0),
            V,
            ignore_index,
            **config(V, multiprocessors(logits.device)),
        )


@op("dlogits")
def cross_entropy_bwd(
    logits: Tensor, targets: Tensor, lse: Tensor, dloss: Tensor, dlogits: Tensor, ignore_index: int
) -> None:
    T, V = logits.shape
    if T:
        tile = config(V, multiprocessors(logits.device))
        cross_entropy_bwd_kernel[(T, triton.cdiv(V, tile["BLOCK_V"]))](
            logits, targets, lse, dloss, dlogits, logits.stride(0), dloss.stride(0), V, ignore_index, **tile
        )


def config(V: int, sms: int) -> dict:
    """16 logits for a thread on an H200 (132 SMs), 32 on an H20 (78), where an SM needs 1.4 times the bytes in flight.

    Not measured.
    """
    share = 32 if sms < 100 else 16
    BLOCK_V = min(triton.next_power_of_2(V), share * 256)
    return dict(BLOCK_V=BLOCK_V, num_warps=min(max(BLOCK_V // (32 * share), 1), 8))


@triton.jit
def gradient(x, v, lse, target, scale):
    return (tl.exp(x - lse) - tl.where(v == target, 1.0, 0.0)) * scale


@triton.jit
def cross_entropy_fwd_kernel(
    logits, targets, tokens, loss, lse, dlogits, ld, V, ignore_index, BLOCK_V: tl.constexpr
):  # fmt: skip
    t = tl.program_id(0).to(tl.int64)
    target = tl.load(targets + t)
    counts = target != ignore_index
    row = logits + t * ld
    # Loaded before dlogits are written, which may overwrite the logits. A target out of range gives NaN.
    x_target = tl.load(row + target, mask=counts & (target >= 0) & (target < V), other=float("nan")).to(tl.float32)

    # One pass: each lane keeps its own sum, relative to a common running maximum. Ignored rows are not read.
    top = tl.full((), float("-inf"), tl.float32)
    sums = tl.zeros((BLOCK_V,), tl.float32)
    for first in tl.range(0, tl.where(counts, V, 0), BLOCK_V, num_stages=3):
        v = first + tl.arange(0, BLOCK_V)
        x = tl.load(row + v, mask=v < V, other=float("-inf")).to(tl.float32)
        higher = tl.maximum(top, tl.max(x, 0))
        base = tl.where(higher == float("-inf"), 0.0, higher)  # all -inf so far: -inf - -inf would be NaN
        sums = sums * tl.exp(top - base) + tl.exp(x - base)
        top = higher
    row_lse = top + tl.log(tl.where(counts, tl.sum(sums, 0), 1.0))
    tl.store(loss + t, tl.where(counts, row_lse - x_target, 0.0))
    tl.store(lse + t, row_lse)

    if dlogits is not None:
        scale = 1.0
        if tokens is not None:
            scale = tl.div_rn(1.0, tl.load(tokens).to(tl.float32))
        for first in tl.range(0, V, BLOCK_V, num_stages=3):
            v = first + tl.arange(0, BLOCK_V)
            x = tl.load(row + v, mask=(v < V) & counts, other=0.0).to(tl.float32)
            d = tl.where(counts, gradient(x, v, row_lse, target, scale), 0.0)
            tl.store(dlogits + t * V + v, d, mask=v < V)


@triton.jit
def cross_entropy_bwd_kernel(
    logits, targets, lse, dloss, dlogits, ld, ld_dloss, V, ignore_index, BLOCK_V: tl.constexpr
):  # fmt: skip
    t = tl.program_id(0).to(tl.int64)
    v = tl.program_id(1) * BLOCK_V + tl.arange(0, BLOCK_V)
    target = tl.load(targets + t)
    counts = target != ignore_index
    x = tl.load(logits + t * ld + v, mask=(v < V) & counts, other=0.0).to(tl.float32)
    d = gradient(x, v, tl.load(lse + t), target, tl.load(dloss + t * ld_dloss))
    tl.store(dlogits + t * V + v, tl.where(counts, d, 0.0), mask=v < V)
