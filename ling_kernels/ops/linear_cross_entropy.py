"""Cross entropy of logits = x w^T, which never exist whole: chunks of rows give loss and gradients in one pass.

With p = softmax(logits) and one-hot targets y: dlogits = (p - y) / tokens that count, dx = dlogits w, dw = dlogits^T x.
"""

import torch
from torch import Tensor

from ..op import autocast, expect, op, wide
from .cross_entropy import counted, cross_entropy_ref, expect_targets


def linear_cross_entropy(
    x: Tensor, w: Tensor, targets: Tensor, ignore_index: int = -100, reduction: str = "mean", chunk: int = 1024
) -> Tensor:
    """x [T, H], w [V, H], targets [T] int64 -> scalar fp32: cross_entropy(x @ w.T, targets, ignore_index, reduction).

    reduction is mean (0 where every token is ignored) or sum. At most chunk rows of logits exist at a time. Gradients
    dx in x's dtype and dw in w's (summed over chunks in fp32) are computed with the loss, where they are wanted, and
    held until backward. Products take autocast's dtype where torch.autocast is on. Raises ValueError for another
    shape, dtype or reduction, and on a CPU for a target that is neither in 0..V-1 nor ignore_index.
    """
    expect(x.ndim == w.ndim == 2 and x.shape[1] == w.shape[1] and len(w) and x.is_floating_point()
           and w.is_floating_point(), "x [T, H] and w [V, H]", x, w)  # fmt: skip
    expect_targets(targets, len(x), len(w), ignore_index)
    expect(reduction in ("mean", "sum") and chunk > 0, "reduction mean or sum and chunk > 0", reduction, chunk)
    x, w = autocast(x, w)
    wanted = [torch.is_grad_enabled() and t.requires_grad for t in (x, w)]
    return LinearCrossEntropy.apply(x, w, targets, ignore_index, reduction == "mean", chunk, *wanted)


def linear_cross_entropy_ref(x, w, targets, ignore_index=-100, reduction="mean", chunk=1024):
    return cross_entropy_ref(wide(x) @ wide(w).T, targets, ignore_index, reduction)


class LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, w, targets, ignore_index, mean, chunk, wants_dx, wants_dw):
        loss = torch.empty((), dtype=wide(x).dtype, device=x.device)
        dx, dw = (torch.empty_like(t) if wanted else t.new_empty(0) for t, wanted in ((x, wants_dx), (w, wants_dw)))
        linear_cross_entropy_fwd(x, w, targets, loss, dx, dw, ignore_index, mean, chunk)
        ctx.save_for_backward(dx, dw)
        return loss

    @staticmethod
    def backward(ctx, dloss):
        dx, dw = ctx.saved_tensors
        dx, dw = ((wide(g) * dloss).to(g.dtype) if g.ndim == 2 else None for g in (dx, dw))
        return dx, dw, None, None, None, None, None, None


@op("loss", "dx", "dw")
def linear_cross_entropy_fwd(
    x: Tensor, w: Tensor, targets: Tensor, loss: Tensor, dx: Tensor, dw: Tensor,
    ignore_index: int, mean: bool, chunk: int,
) -> None:  # fmt: skip
    """dx and dw are written unless they are 1-D, which stands for a gradient that nobody wants."""
    wide_w, total = wide(w), 0.0
    wide_dw = torch.zeros_like(wide_w) if dw.ndim == 2 else None
    tokens = counted(targets, ignore_index) if mean else 1
    for rows in map(slice, range(0, len(x), chunk), range(chunk, len(x) + chunk, chunk)):
        xs, ignored = wide(x[rows]), (targets[rows] == ignore_index)[:, None]
        target = targets[rows, None].masked_fill(ignored, 0)
        with torch.autocast(x.device.type, enabled=False):
            log_p = (xs @ wide_w.T).log_softmax(-1)
            total = total - log_p.gather(1, target).masked_fill(ignored, 0).sum()
            dlogits = log_p.exp_().scatter_add_(1, target, log_p.new_full(target.shape, -1))
            dlogits = dlogits.div_(tokens).masked_fill_(ignored, 0)
            if dx.ndim == 2:
                dx[rows] = dlogits @ wide_w
            if dw.ndim == 2:
                wide_dw.addmm_(dlogits.T, xs)
    loss.fill_(total).div_(tokens)
    if dw.ndim == 2:
        dw.copy_(wide_dw)
