"""Cross entropy of logits = x w^T without all logits in memory: chunks of rows give loss and gradients in one pass.

With p = softmax(logits) and one-hot targets y: dlogits = (p - y) / tokens, dx = dlogits w, dw = dlogits^T x, where
tokens counts the targets that are not ignored. With reduction none the rows' gradients come in backward, which computes
the logits again; forward saves the logsumexp of each row.
"""

from collections.abc import Callable, Iterator
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from ..op import autocast, expect, first_derivative_only, op, upcast, use_reference, values_on_host
from .cross_entropy import (
    count_targets,
    cross_entropy_bwd,
    cross_entropy_fwd,
    cross_entropy_ref,
    expect_targets,
    without_ignored,
)


def linear_cross_entropy(
    x: Tensor, w: Tensor, targets: Tensor, ignore_index: int = -100, reduction: str = "mean", chunk: int = 1024
) -> Tensor:
    """x [T, H], w [V, H], targets [T] int64 -> fp32: cross_entropy(x @ w.T, targets, ignore_index, reduction).

    reduction is mean (0 where every token is ignored), sum, or none, which gives [T]: minus the log-probabilities of
    the targets. At most chunk rows of logits exist at a time. For mean and sum the forward also computes the gradients
    that are needed, dx in x's dtype and dw in w's (summed over chunks in fp32), and saves them for backward; for none
    backward computes the logits a second time. Products take autocast's dtype where torch.autocast is on. Raises
    ValueError for another shape, dtype or reduction, and on a CPU for a target that is neither in 0..V-1 nor
    ignore_index.
    """
    expect(x.ndim == w.ndim == 2 and x.shape[1] == w.shape[1] and len(w) > 0 and x.is_floating_point()
           and w.is_floating_point(), "x [T, H] and w [V, H]", x, w)  # fmt: skip
    expect((x.dtype == torch.float64) == (w.dtype == torch.float64), "x and w both in fp64 or neither", x, w)
    expect_targets(targets, len(x), len(w), ignore_index)
    fits = reduction in ("mean", "sum", "none") and chunk > 0
    expect(fits, "reduction mean, sum or none and chunk > 0", reduction, chunk)
    x, w = autocast(x, w)
    wanted = [torch.is_grad_enabled() and t.requires_grad for t in (x, w)]
    kernels = not use_reference("linear_cross_entropy", x, w)
    if reduction == "none":
        return LinearCrossEntropyRows.apply(x, w, targets, ignore_index, chunk, kernels)
    return LinearCrossEntropy.apply(x, w, targets, ignore_index, reduction == "mean", chunk, kernels, *wanted)


def linear_cross_entropy_ref(x, w, targets, ignore_index=-100, reduction="mean", chunk=1024):
    x = without_ignored(upcast(x), targets, ignore_index)
    return cross_entropy_ref(x @ upcast(w).T, targets, ignore_index, reduction)


class LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, w, targets, ignore_index, mean, chunk, kernels, wants_dx, wants_dw):
        loss = torch.empty((), dtype=torch.promote_types(x.dtype, torch.float32), device=x.device)
        dx, dw = (torch.empty_like(t) if wanted else t.new_empty(0) for t, wanted in ((x, wants_dx), (w, wants_dw)))
        forward = linear_cross_entropy_fwd if kernels else linear_cross_entropy_ref_fwd
        forward(x, w, targets, loss, dx, dw, ignore_index, mean, chunk)
        ctx.save_for_backward(dx, dw)
        return loss

    @staticmethod
    @first_derivative_only
    def backward(ctx, dloss):
        dx, dw = ctx.saved_tensors
        dx, dw = ((upcast(g) * dloss).to(g.dtype) if g.ndim == 2 else None for g in (dx, dw))
        return dx, dw, *[None] * 7


class LinearCrossEntropyRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, w, targets, ignore_index, chunk, kernels):
        losses, lse = (x.new_empty(len(x), dtype=torch.promote_types(x.dtype, torch.float32)) for _ in range(2))
        forward = linear_cross_entropy_rows_fwd if kernels else linear_cross_entropy_rows_ref_fwd
        forward(x, w, targets, losses, lse, ignore_index, chunk)
        ctx.save_for_backward(x, w, targets, lse)
        ctx.options = ignore_index, chunk, kernels
        return losses

    @staticmethod
    @first_derivative_only
    def backward(ctx, dlosses):
        x, w, targets, lse = ctx.saved_tensors
        ignore_index, chunk, kernels = ctx.options
        dx, dw = (
            torch.empty_like(t) if wanted else t.new_empty(0)
            for t, wanted in zip((x, w), ctx.needs_input_grad, strict=False)
        )
        backward = linear_cross_entropy_rows_bwd if kernels else linear_cross_entropy_rows_ref_bwd
        backward(x, w, targets, lse, dlosses.contiguous(), dx, dw, ignore_index, chunk)
        return *(g if g.ndim == 2 else None for g in (dx, dw)), *[None] * 4


@op("loss", "dx", "dw")
def linear_cross_entropy_fwd(
    x: Tensor, w: Tensor, targets: Tensor, loss: Tensor, dx: Tensor, dw: Tensor,
    ignore_index: int, mean: bool, chunk: int,
) -> None:  # fmt: skip
    """dx and dw are written unless they are 1-D, which stands for a gradient that is not needed."""
    by_chunks(x, w, targets, loss, dx, dw, ignore_index, mean, chunk, True)


@op("loss", "dx", "dw", runs="torch")
def linear_cross_entropy_ref_fwd(
    x: Tensor, w: Tensor, targets: Tensor, loss: Tensor, dx: Tensor, dw: Tensor,
    ignore_index: int, mean: bool, chunk: int,
) -> None:  # fmt: skip
    by_chunks(x, w, targets, loss, dx, dw, ignore_index, mean, chunk, False)


class Products(NamedTuple):
    """Products of rows [T, H] and the weight w [V, H], with fp32 sums and results."""

    mm: Callable[[Tensor, Tensor], Tensor]
    w: Tensor
    narrow: bool  # factors stay bf16, where torch.mm can give fp32 sums of those

    @classmethod
    def of(cls, x: Tensor, w: Tensor, kernels: bool) -> "Products":
        if kernels and x.dtype == w.dtype == torch.bfloat16 and mm_gives_fp32(x):
            return cls(partial(torch.mm, out_dtype=torch.float32), w, True)
        return cls(torch.mm, upcast(w), False)

    def rows(self, x: Tensor, targets: Tensor, ignore_index: int) -> Tensor:
        """x [T, H] as a factor, 0 where the target is ignored."""
        return without_ignored(x if self.narrow else upcast(x), targets, ignore_index)

    def add_(self, total: Tensor, a: Tensor, b: Tensor) -> None:
        """total += a b."""
        if self.narrow:
            total += self.mm(a, b)
        else:
            total.addmm_(a, b)


def by_chunks(x, w, targets, loss, dx, dw, ignore_index, mean, chunk, kernels) -> None:
    products = Products.of(x, w, kernels)
    wants_dx, wants_dw = dx.ndim == 2, dw.ndim == 2
    wide_dw = torch.zeros_like(w, dtype=loss.dtype) if wants_dw else None
    losses = loss.new_empty(len(x))
    tokens = count_targets(targets, ignore_index) if mean else None
    for rows in chunks(len(x), chunk):
        target, lse = targets[rows], torch.empty_like(losses[rows])
        xs = products.rows(x[rows], target, ignore_index)
        with torch.autocast(x.device.type, enabled=False):
            logits = products.mm(xs, products.w.T)
            if kernels:
                dlogits = torch.empty_like(logits, dtype=x.dtype) if products.narrow else logits
                dlogits = dlogits if wants_dx or wants_dw else None
                cross_entropy_fwd(logits, target, tokens, losses[rows], lse, dlogits, ignore_index)
            else:
                losses[rows], dlogits = loss_and_gradient(logits, target, tokens, ignore_index)
            if wants_dx:
                dx[rows] = products.mm(dlogits, products.w)
            if wants_dw:
                products.add_(wide_dw, dlogits.T, xs)
    loss.copy_(losses.sum() if tokens is None else losses.sum() / tokens)
    if wants_dw:
        dw.copy_(wide_dw)


@op("losses", "lse")
def linear_cross_entropy_rows_fwd(
    x: Tensor, w: Tensor, targets: Tensor, losses: Tensor, lse: Tensor, ignore_index: int, chunk: int
) -> None:
    """losses and lse [T]: minus the log-probability of each target, 0 where it is ignored, and the logsumexp."""
    rows_forward(x, w, targets, losses, lse, ignore_index, chunk, True)


@op("losses", "lse", runs="torch")
def linear_cross_entropy_rows_ref_fwd(
    x: Tensor, w: Tensor, targets: Tensor, losses: Tensor, lse: Tensor, ignore_index: int, chunk: int
) -> None:
    rows_forward(x, w, targets, losses, lse, ignore_index, chunk, False)


@op("dx", "dw")
def linear_cross_entropy_rows_bwd(
    x: Tensor, w: Tensor, targets: Tensor, lse: Tensor, dlosses: Tensor, dx: Tensor, dw: Tensor,
    ignore_index: int, chunk: int,
) -> None:  # fmt: skip
    """dx and dw are written unless they are 1-D, which stands for a gradient that is not needed."""
    rows_backward(x, w, targets, lse, dlosses, dx, dw, ignore_index, chunk, True)


@op("dx", "dw", runs="torch")
def linear_cross_entropy_rows_ref_bwd(
    x: Tensor, w: Tensor, targets: Tensor, lse: Tensor, dlosses: Tensor, dx: Tensor, dw: Tensor,
    ignore_index: int, chunk: int,
) -> None:  # fmt: skip
    rows_backward(x, w, targets, lse, dlosses, dx, dw, ignore_index, chunk, False)


def rows_forward(x, w, targets, losses, lse, ignore_index, chunk, kernels) -> None:
    products = Products.of(x, w, kernels)
    for rows in chunks(len(x), chunk):
        target = targets[rows]
        with torch.autocast(x.device.type, enabled=False):
            logits = products.mm(products.rows(x[rows], target, ignore_index), products.w.T)
        if kernels:
            cross_entropy_fwd(logits, target, None, losses[rows], lse[rows], None, ignore_index)
        else:
            lse[rows] = logits.logsumexp(-1)
            ignored = target == ignore_index
            losses[rows] = (lse[rows] - of_targets(logits, target, ignored)).masked_fill(ignored, 0)


def rows_backward(x, w, targets, lse, dlosses, dx, dw, ignore_index, chunk, kernels) -> None:
    products = Products.of(x, w, kernels)
    wide_dw = torch.zeros_like(w, dtype=lse.dtype) if dw.ndim == 2 else None
    for rows in chunks(len(x), chunk):
        target = targets[rows]
        xs = products.rows(x[rows], target, ignore_index)
        with torch.autocast(x.device.type, enabled=False):
            logits = products.mm(xs, products.w.T)
            if kernels:
                dlogits = torch.empty_like(logits, dtype=x.dtype) if products.narrow else logits
                cross_entropy_bwd(logits, target, lse[rows], dlosses[rows], dlogits, ignore_index)
            else:
                dlogits = gradient_of_rows(logits, target, lse[rows], dlosses[rows], ignore_index)
            if dx.ndim == 2:
                dx[rows] = products.mm(dlogits, products.w)
            if wide_dw is not None:
                products.add_(wide_dw, dlogits.T, xs)
    if wide_dw is not None:
        dw.copy_(wide_dw)


def chunks(rows: int, chunk: int) -> Iterator[slice]:
    return map(slice, range(0, rows, chunk), range(chunk, rows + chunk, chunk))


def of_targets(logits: Tensor, targets: Tensor, ignored: Tensor) -> Tensor:
    """logits[t, targets[t]], any where the target is ignored."""
    return logits.gather(1, targets.masked_fill(ignored, 0)[:, None])[:, 0]


def gradient_of_rows(logits: Tensor, targets: Tensor, lse: Tensor, dlosses: Tensor, ignore_index: int) -> Tensor:
    """(softmax(logits) - one-hot of the target) dlosses, in place of the logits."""
    ignored = targets == ignore_index
    p = logits.sub_(lse[:, None]).exp_()
    target = targets.masked_fill(ignored, 0)[:, None]
    p.scatter_add_(1, target, p.new_full(target.shape, -1))
    return zero_ignored_(p.mul_(dlosses.to(p.dtype)[:, None]), ignored)


def mm_gives_fp32(x: Tensor) -> bool:
    """Whether torch.mm can return the fp32 sums of bf16 products: since torch 2.8, and on a GPU only."""
    return x.is_cuda and "dtype" in torch.ops.aten.mm.overloads()


def loss_and_gradient(
    logits: Tensor, targets: Tensor, tokens: Tensor | None, ignore_index: int
) -> tuple[Tensor, Tensor]:
    """Rows' loss, and the gradient of their sum / tokens."""
    ignored = targets == ignore_index
    target = targets.masked_fill(ignored, 0)[:, None]
    log_p = logits.log_softmax(-1)
    losses = -log_p.gather(1, target)[:, 0].masked_fill(ignored, 0)
    dlogits = log_p.exp_().scatter_add_(1, target, log_p.new_full(target.shape, -1))
    return losses, zero_ignored_(dlogits if tokens is None else dlogits.div_(tokens), ignored)


def zero_ignored_(rows: Tensor, ignored: Tensor) -> Tensor:
    """Set the ignored rows to 0, NaN too: their logits are NaN where the weight has one."""
    if not values_on_host(ignored) or ignored.any():  # most batches have none
        rows.masked_fill_(ignored[:, None], 0)
    return rows
