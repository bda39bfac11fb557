"""Unpermute: each token sums its slots, out[t] = sum over k of weights[t, k] * y[slot[t, k]], k ascending, in fp32."""

import torch
from torch import Tensor

from ..op import expect, wide
from .dispatch import Plan


def unpermute(y: Tensor, plan: Plan, weights: Tensor | None = None) -> Tensor:
    """y [S, H], a plan of S slots and T tokens, weights [T, topk] fp32 (None: all 1) -> [T, H] in y's dtype.

    A slot of -1 contributes exactly 0, whatever the undefined rows of y hold. Gradients: to y (0 in rows that no token
    owns) and to weights. Raises ValueError for shapes that do not fit.
    """
    fits = y.ndim == 2 and y.is_floating_point() and plan.source.shape == y.shape[:1]
    expect(fits, "y [S, H] and a plan of S slots", y, plan.source)
    fits = weights is None or (weights.shape == plan.slot.shape and weights.dtype in (torch.float32, torch.float64))
    expect(fits, "weights [T, topk] fp32", weights, plan.slot)
    return unpermute_ref(y, plan, weights)


def unpermute_ref(y, plan, weights=None):
    return Unpermute.apply(y, weights, plan.offsets, plan.slot, plan.source)


def sum_slots(y: Tensor, slot: Tensor, weights: Tensor | None = None) -> Tensor:
    """The definition."""
    total = wide(y).new_zeros(len(slot), y.shape[1])
    for k in range(slot.shape[1]):
        row = rows_of(y, slot[:, k])
        total = total + (row if weights is None else weights[:, k, None] * row)
    return total.to(y.dtype)


def rows_of(y: Tensor, slot: Tensor) -> Tensor:
    """y[slot] widened, and zeros for slot -1."""
    if not len(y):
        return wide(y).new_zeros(len(slot), y.shape[1])
    return wide(y[slot.clamp(min=0).long()]).masked_fill((slot < 0)[:, None], 0)


class Unpermute(torch.autograd.Function):
    """Every row of y has one reader, so its gradient is a gather, not the topk scatters autograd would make."""

    @staticmethod
    def forward(ctx, y, weights, offsets, slot, source):
        ctx.save_for_backward(y, weights, offsets, slot, source)
        return sum_slots(y, slot, weights)

    @staticmethod
    def backward(ctx, dout):
        y, weights, offsets, slot, source = ctx.saved_tensors
        S, topk = len(source), slot.shape[1]
        dy = dweights = None
        if ctx.needs_input_grad[0]:
            dy = wide(dout[source.long() // topk])
            if weights is not None:
                dy = dy * weights.flatten()[source.long()][:, None]
            unowned = torch.arange(S, device=y.device) >= offsets[-1]
            dy = dy.masked_fill(unowned[:, None], 0).to(y.dtype)
        if weights is not None and ctx.needs_input_grad[1]:
            dots = [(rows_of(y, slot[:, k]) * wide(dout)).sum(-1) for k in range(topk)]
            dweights = torch.stack(dots, 1)
        return dy, dweights, None, None, None
