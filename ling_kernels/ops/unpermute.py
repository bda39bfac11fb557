"""Unpermute: each token sums the rows of its choices, in fp32, k ascending.

out[t] = sum over k of weights[t, k] * y[slot[t, k]]
"""

import torch
from torch import Tensor

from ..op import expect, first_derivative_only, multiprocessors, op, upcast, use_reference, values_on_host
from .dispatch import Plan, expect_plan
from .triton_import import tl, triton


def unpermute(y: Tensor, plan: Plan, weights: Tensor | None = None) -> Tensor:
    """y [S, H], a plan of S rows and T tokens, weights [T, topk] fp32 (None: all 1) -> [T, H] in y's dtype.

    A slot of -1 contributes exactly 0, whatever its weight and the undefined rows of y hold. Gradients: to y (0 in rows
    that no token owns) and to weights (0 for a slot of -1). Raises ValueError for shapes that do not fit.
    """
    expect(y.ndim == 2 and y.is_floating_point(), "y [S, H]", y)
    expect_plan(plan, S=len(y))
    fits = weights is None or (weights.shape == plan.slot.shape and weights.dtype in (torch.float32, torch.float64))
    expect(fits, "weights [T, topk] fp32", weights, plan.slot)
    if use_reference("unpermute", y, weights):
        return unpermute_ref(y, plan, weights)
    return Unpermute.apply(y, weights, plan.offsets, plan.slot)


def unpermute_ref(y, plan, weights=None):
    return UnpermuteRef.apply(y, weights, plan.offsets, plan.slot, plan.source)


def sum_choices(y: Tensor, slot: Tensor, weights: Tensor | None = None) -> Tensor:
    """The definition of unpermute, on slot [T, topk]."""
    lost = slots_lost(slot)
    if lost is not None and weights is not None:
        weights = weights.masked_fill(lost, 0)
    total = None
    scales = [None] * slot.shape[1] if weights is None else weights[..., None].unbind(1)
    for of_k, scale in zip(slot.unbind(1), scales, strict=True):
        row = rows_of(y, of_k, lost is not None)
        row = row if scale is None else row.mul_(scale)
        total = row if total is None else total.add_(row)
    return total.to(y.dtype)


def slots_lost(slot: Tensor) -> Tensor | None:
    """Where slots are -1; None where the host sees that there are none, as on one device without padding."""
    lost = slot < 0
    return lost if not values_on_host(slot) or bool(lost.any()) else None


def rows_of(y: Tensor, slot: Tensor, some_lost: bool) -> Tensor:
    """A copy of y[slot] in fp32 (fp64 stays), with zeros for slot -1."""
    if not len(y):
        return upcast(y).new_zeros(len(slot), y.shape[1])
    if not some_lost:
        return upcast(y.index_select(0, slot))
    return clear_rows(upcast(y.index_select(0, slot.clamp(min=0))), slot < 0)


def clear_rows(x: Tensor, rows: Tensor) -> Tensor:
    """Set the rows of x [S, H] where `rows` [S] is true to 0, whatever they hold, in place; x is fp32 or fp64.

    By `and` on the bits: on a CPU masked_fill_ with a mask of whole rows took ten times as long (x86_64, torch 2.13,
    2026-11-30).
    """
    bits = x.view(torch.int64 if x.dtype == torch.float64 else torch.int32)
    bits &= -(~rows)[:, None].to(bits.dtype)
    return x


class UnpermuteRef(torch.autograd.Function):
    """Each row of y is read once, so its gradient is one gather; autograd would make topk scatters."""

    @staticmethod
    def forward(ctx, y, weights, offsets, slot, source):
        ctx.save_for_backward(y, weights, offsets, slot, source)
        return sum_choices(y, slot, weights)

    @staticmethod
    def backward(ctx, dout):
        y, weights, offsets, slot, source = ctx.saved_tensors
        S, topk = len(source), slot.shape[1]
        dy, dweights = upcast(dout.index_select(0, source // topk)), None
        if weights is not None and ctx.needs_input_grad[1]:
            dots = torch.linalg.vecdot(upcast(y), dy)  # an unowned row's may be NaN; no slot names it
            dweights = rows_of(dots[:, None], slot.flatten(), slots_lost(slot) is not None).view(slot.shape)
        if weights is not None:
            dy = dy * weights.flatten().index_select(0, source)[:, None]
        if not values_on_host(offsets) or int(offsets[-1]) < S:
            dy = clear_rows(dy, torch.arange(S, device=y.device) >= offsets[-1])
        return dy.to(y.dtype), dweights, None, None, None


class Unpermute(torch.autograd.Function):
    @staticmethod
    def forward(ctx, y, weights, offsets, slot):
        y, slot = y.contiguous(), slot.contiguous()
        weights = weights if weights is None else weights.contiguous()
        out = y.new_empty(len(slot), y.shape[1])
        gather_sum(y, weights, slot, out)
        ctx.save_for_backward(y if weights is not None else None, weights, offsets, slot)
        ctx.S = len(y)
        return out

    @staticmethod
    @first_derivative_only
    def backward(ctx, dout):
        y, weights, offsets, slot = ctx.saved_tensors
        dy, dweights = dout.new_empty(ctx.S, dout.shape[1]), None
        if weights is not None:  # no kernel runs for H = 0, of which the weights' gradients are sums
            dweights = torch.empty_like(weights) if dout.numel() else torch.zeros_like(weights)
        scatter_rows(dout.contiguous(), weights, y, offsets, slot, dy, dweights)
        return dy, dweights, None, None


def config(H: int, sms: int) -> dict:
    """A program holds a token's whole row; not measured. An SM needs bandwidth x latency / SMs bytes in flight, 1.4
    times as many on an H20 (78 SMs) as on an H200 (132), so its threads hold twice as many elements.
    """
    BLOCK_H = triton.next_power_of_2(H)
    return dict(BLOCK_H=BLOCK_H, num_warps=min(max(BLOCK_H // (512 if sms > 100 else 1024), 1), 8))


def unsupported(rows, *others) -> str | None:
    return None if rows.dtype in (torch.float32, torch.float16, torch.bfloat16) else f"rows of {rows.dtype}"


@op("out", cuda=unsupported)
def gather_sum(y: Tensor, weights: Tensor | None, slot: Tensor, out: Tensor) -> None:
    T, H = out.shape
    """out[t] = sum over k of weights[t, k] * y[slot[t, k]]; also the gradient of `permute`, without weights."""
    if out.numel():  # no fused multiply-add: products and sums are rounded one by one, as in the reference
        chosen = config(H, multiprocessors(y.device))
        gather_sum_kernel[(T,)](y, weights, slot, out, H, TOPK=slot.shape[1], enable_fp_fusion=False, **chosen)


@op("out", "dots", cuda=unsupported)
def scatter_rows(
    x: Tensor,
    weights: Tensor | None,
    y: Tensor | None,
    offsets: Tensor | None,
    slot: Tensor,
    out: Tensor,
    dots: Tensor | None,
) -> None:
    """out[slot[t, k]] = weights[t, k] * x[t], and dots[t, k] = the inner product of y[slot[t, k]] and x[t].

    This is `permute`, and the backward of unpermute for x = dout. With offsets, rows of out past the last expert's
    become 0; otherwise they are left alone.
    """
    T, H = x.shape
    if x.numel():
        E = 0 if offsets is None else len(offsets) - 1
        topk = slot.shape[1]
        scatter_rows_kernel[(T,)](
            x, weights, y, offsets, slot, out, dots, H, E,
            TOPK=topk, BLOCK_K=triton.next_power_of_2(topk), **config(H, multiprocessors(x.device)),
        )  # fmt: skip


@triton.jit
def gather_sum_kernel(y, weights, slot, out, H, TOPK: tl.constexpr, BLOCK_H: tl.constexpr):
    t = tl.program_id(0).to(tl.int64)
    h = tl.arange(0, BLOCK_H)
    total = tl.zeros((BLOCK_H,), tl.float32)
    for k in tl.static_range(TOPK):
        s = tl.load(slot + t * TOPK + k).to(tl.int64)
        row = tl.load(y + s * H + h, mask=(s >= 0) & (h < H), other=0.0).to(tl.float32)
        if weights is not None:
            row *= tl.load(weights + t * TOPK + k, mask=s >= 0, other=0.0)
        total += row
    tl.store(out + t * H + h, total, mask=h < H)


@triton.jit
def scatter_rows_kernel(
    x, weights, y, offsets, slot, out, dots, H, E,
    TOPK: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    t = tl.program_id(0).to(tl.int64)
    h = tl.arange(0, BLOCK_H)
    d = tl.load(x + t * H + h, mask=h < H, other=0.0)

    # All reads come before the first write: the compiler cannot exclude that they alias
    if dots is not None:
        choice = tl.arange(0, BLOCK_K)
        products = tl.zeros((BLOCK_K,), tl.float32)
        for k in tl.static_range(TOPK):
            s = tl.load(slot + t * TOPK + k).to(tl.int64)
            row = tl.load(y + s * H + h, mask=(s >= 0) & (h < H), other=0.0).to(tl.float32)
            products = tl.where((choice == k) & (s >= 0), tl.sum(row * d.to(tl.float32)), products)
        tl.store(dots + t * TOPK + choice, products, mask=choice < TOPK)

    for k in tl.static_range(TOPK):
        s = tl.load(slot + t * TOPK + k).to(tl.int64)
        scaled = d if weights is None else d.to(tl.float32) * tl.load(weights + t * TOPK + k)
        tl.store(out + s * H + h, scaled, mask=(s >= 0) & (h < H))
        if offsets is not None:  # each program checks TOPK of the T * TOPK rows, and zeroes the rows of no expert
            unowned = t * TOPK + k >= tl.load(offsets + E)
            tl.store(out + (t * TOPK + k) * H + h, tl.zeros((BLOCK_H,), out.dtype.element_ty), mask=unowned & (h < H))
