"""Permute: copy every token's row to the row of each of its choices, y[s] = x[source[s] // topk], expert by expert.

Its gradient is unpermute without weights: the rows of a token's choices summed in fp32 in the order of k.
"""

import torch
from torch import Tensor

from ..op import expect, first_derivative_only, op, use_reference
from .dispatch import Plan, expect_plan
from .quantize import BLOCK, dense_rows, empty_fp8, launch_quantize, quantize_fwd, quantize_ref, unsupported_rows
from .unpermute import gather_sum, scatter_rows, sum_choices


def permute(x: Tensor, plan: Plan) -> Tensor:
    """x [T, H], a plan of S rows -> [S, H] in x's dtype; rows past plan.offsets[E] are undefined.

    The gradient to x is deterministic and needs no atomics. Raises ValueError for a plan of another T.
    """
    expect(x.ndim == 2 and x.is_floating_point(), "x [T, H]", x)
    expect_plan(plan, T=len(x))
    if use_reference("permute", x):
        return permute_ref(x, plan)
    return Permute.apply(x, plan.slot)


def permute_quantize(x: Tensor, plan: Plan, columns: bool = False, pow2: bool = False) -> tuple[Tensor, ...]:
    """`quantize(permute(x, plan), columns=columns, plan=plan, pow2=pow2)` in one pass, for x [T, H], H % 128 == 0.

    Returns x_q [S, H] and x_scale [S, H/128], then with columns xt_q [H, S_pad] and xt_scale [H, S_pad/128]; rows past
    plan.offsets[E] and columns past plan.padded_offsets[E] are undefined. Not differentiable. Raises ValueError.
    """
    expect(x.ndim == 2 and x.is_floating_point() and x.shape[1] % BLOCK == 0, "x [T, H], H % 128 == 0", x)
    expect_plan(plan, T=len(x))
    if use_reference("permute_quantize", x):
        return permute_quantize_ref(x, plan, columns, pow2)
    x, topk = dense_rows(x.detach()), plan.slot.shape[1]
    out = empty_fp8(x, len(plan.source), x.shape[1], True, columns, plan)
    if columns:
        quantize_fwd(x, *out, plan.offsets, plan.padded_offsets, plan.source, topk, pow2)
    else:
        permute_quantize_fwd(x, plan.slot.contiguous(), *out[:2], plan.offsets, plan.source, pow2)
    return tuple(t for t in out if t is not None)


def permute_ref(x, plan):
    return PermuteRef.apply(x, *plan)


def permute_quantize_ref(x, plan, columns=False, pow2=False):
    return quantize_ref(permute_ref(x.detach(), plan), True, columns, plan, pow2)


class PermuteRef(torch.autograd.Function):
    """Autograd's gradient of indexing adds the rows of a token in an unspecified order."""

    @staticmethod
    def forward(ctx, x, offsets, slot, source, padded_offsets):
        ctx.save_for_backward(slot)
        return x.index_select(0, source // slot.shape[1])

    @staticmethod
    def backward(ctx, dy):
        return sum_choices(dy, *ctx.saved_tensors), None, None, None, None


class Permute(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, slot):
        slot = slot.contiguous()
        y = x.new_empty(slot.numel(), x.shape[1])
        scatter_rows(x.contiguous(), None, None, None, slot, y, None)
        ctx.save_for_backward(slot)
        return y

    @staticmethod
    @first_derivative_only
    def backward(ctx, dy):
        (slot,) = ctx.saved_tensors
        dx = dy.new_empty(len(slot), dy.shape[1])
        gather_sum(dy.contiguous(), None, slot, dx)
        return dx, None


@op("x_q", "x_scale", cuda=unsupported_rows)
def permute_quantize_fwd(
    x: Tensor, slot: Tensor, x_q: Tensor, x_scale: Tensor, offsets: Tensor, source: Tensor, pow2: bool
) -> None:
    """csrc/ reads and quantises a token once, for all of its choices; Triton, as quantize_fwd, for each choice."""
    launch_quantize(x, x_q, x_scale, None, None, offsets, None, source, slot.shape[1], pow2)
