"""Permute: copy every token's row to each of its routed slots, y[s] = x[source[s] // topk], expert by expert.

Its gradient is unpermute without weights: the slots of a token summed in fp32 in the order of k.
"""

import torch
from torch import Tensor

from ..backend import _C, backend
from ..op import expect, op
from .dispatch import Plan
from .quantize import BLOCK, empty_fp8, quantize_fwd, quantize_ref, vectors
from .unpermute import sum_slots, unpermute_bwd, unpermute_fwd


def permute(x: Tensor, plan: Plan) -> Tensor:
    """x [T, H], a plan of S slots -> [S, H] in x's dtype; rows past plan.offsets[E] are undefined.

    The gradient to x is deterministic and needs no atomics. Raises ValueError for a plan of another T.
    """
    fits = x.ndim == 2 and x.is_floating_point() and plan.slot.ndim == 2 and len(plan.slot) == len(x)
    expect(fits, "x [T, H] and a plan of T tokens", x, plan.slot)
    if backend(x) == "torch" or x.dtype == torch.float64:
        return permute_ref(x, plan)
    return Permute.apply(x, plan.slot)


def permute_quantize(x: Tensor, plan: Plan, columns: bool = False, pow2: bool = False) -> tuple[Tensor, ...]:
    """`quantize(permute(x, plan), columns=columns, plan=plan, pow2=pow2)` in one pass, for x [T, H], H % 128 == 0.

    Returns x_q [S, H] and x_scale [S, H/128], then with columns xt_q [H, S_pad] and xt_scale [H, S_pad/128]; rows past
    plan.offsets[E] and columns past plan.padded_offsets[E] are undefined. Not differentiable. Raises ValueError.
    """
    fits = x.ndim == 2 and x.is_floating_point() and plan.slot.ndim == 2 and len(plan.slot) == len(x)
    expect(fits and x.shape[1] % BLOCK == 0, "x [T, H], H % 128 == 0, and a plan of T tokens", x, plan.slot)
    if backend(x) == "torch" or x.dtype == torch.float64:
        return permute_quantize_ref(x, plan, columns, pow2)
    out = empty_fp8(x, len(plan.source), x.shape[1], True, columns, plan)
    if backend(x) == "cuda" and not columns:
        permute_quantize_fwd(x.detach(), plan.slot.contiguous(), *out[:2], pow2)
    else:
        padded_offsets = plan.padded_offsets if columns else None
        quantize_fwd(x.detach(), *out, plan.offsets, padded_offsets, plan.source, plan.slot.shape[1], pow2)
    return tuple(t for t in out if t is not None)


def permute_ref(x, plan):
    return PermuteRef.apply(x, *plan)


def permute_quantize_ref(x, plan, columns=False, pow2=False):
    return quantize_ref(permute_ref(x.detach(), plan), True, columns, plan, pow2)


class PermuteRef(torch.autograd.Function):
    """Autograd's own gradient of an indexing adds the slots of a token in no promised order."""

    @staticmethod
    def forward(ctx, x, offsets, slot, source, padded_offsets):
        ctx.save_for_backward(slot)
        return x[source.long() // slot.shape[1]]

    @staticmethod
    def backward(ctx, dy):
        return sum_slots(dy, *ctx.saved_tensors), None, None, None, None


class Permute(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, slot):
        slot = slot.contiguous()
        y = x.new_empty(slot.numel(), x.shape[1])
        unpermute_bwd(x.contiguous(), None, None, None, slot, y, None)
        ctx.save_for_backward(slot)
        return y

    @staticmethod
    def backward(ctx, dy):
        (slot,) = ctx.saved_tensors
        dx = dy.new_empty(len(slot), dy.shape[1])
        unpermute_fwd(dy.contiguous(), None, slot, dx)
        return dx, None


@op("x_q", "x_scale")
def permute_quantize_fwd(x: Tensor, slot: Tensor, x_q: Tensor, x_scale: Tensor, pow2: bool) -> None:
    """Reads and quantises a token once; quantize_fwd, which also makes columns, does so for each of its slots."""
    x = x if vectors(x) else x.clone(memory_format=torch.contiguous_format)
    _C.permute_quantize_fwd(x, slot, x_q, x_scale, pow2)
