"""SwiGLU: y = silu(gate) * up for x = [gate | up], optionally times one weight per row (the routing probability)."""

import torch
from torch import Tensor

from ..op import E4M3, expect, first_derivative_only, multiprocessors, op, rows_aligned, upcast, use_reference
from .dispatch import Plan, expect_plan
from .quantize import BLOCK, empty_fp8, quantize_ref, tiling
from .triton_fp8 import store_columns, store_rows, tile_rows
from .triton_import import tl, triton


def swiglu(
    x: Tensor,
    weights: Tensor | None = None,
    quantize: bool = False,
    columns: bool = False,
    plan: Plan | None = None,
    pow2: bool = False,
) -> Tensor | tuple[Tensor, ...]:
    """x [..., 2F] -> y [..., F] in x's dtype, computed in fp32. With weights [S] fp32, x is [S, 2F] and y[s] is scaled.

    quantize returns, instead of y, its FP8 rows and scales, y_q [S, F] and y_scale [S, F/128], and with columns also
    its column-wise copy, as `quantize` lays them out for that plan, all taken from y before it is rounded; x must be
    [S, 2F] with F % 128 == 0. Rows past a plan's last expert are not computed and undefined. Gradients: of y, to x and
    weights; FP8 carries none. Raises ValueError for another shape.
    """
    expect(x.ndim >= 1 and x.shape[-1] % 2 == 0 and x.is_floating_point(), "x [..., 2F]", x)
    fits = weights is None or (x.ndim == 2 and weights.shape == x.shape[:1])
    expect(fits and (weights is None or weights.dtype in (torch.float32, torch.float64)),
           "weights [S] fp32 for x [S, 2F]", x, weights)  # fmt: skip
    expect(not quantize or (x.ndim == 2 and x.shape[1] % (2 * BLOCK) == 0), "x [S, 2F], F % 128 == 0, for FP8", x)
    expect(quantize or not (columns or pow2), "quantize=True with columns or pow2", quantize, columns, pow2)
    if plan is not None:
        expect_plan(plan, S=len(x))
    if use_reference("swiglu", x, weights):
        return swiglu_ref(x, weights, quantize, columns, plan, pow2)
    offsets = plan.offsets if plan else None
    if not quantize:
        rows = x.shape[:-1].numel()  # not -1, which no columns would leave undefined
        return SwiGLU.apply(x.reshape(rows, x.shape[-1]), weights, offsets).view(*x.shape[:-1], x.shape[-1] // 2)
    out = empty_fp8(x, len(x), x.shape[1] // 2, True, columns, plan)
    padded = plan.padded_offsets if plan and columns else None
    weights = weights if weights is None else weights.detach().contiguous()
    swiglu_fwd(x.detach().contiguous(), weights, None, *out, offsets, padded, pow2)
    return tuple(t for t in out if t is not None)


def swiglu_ref(x, weights=None, quantize=False, columns=False, plan=None, pow2=False):
    y = silu_product(upcast(x))
    if weights is not None:
        y = y * weights[:, None]
    return quantize_ref(y, True, columns, plan, pow2) if quantize else y.to(x.dtype)


def silu_product(x: Tensor) -> Tensor:
    gate, up = x.chunk(2, -1)
    return torch.nn.functional.silu(gate) * up


def swiglu_backward(
    dy: Tensor,
    x: Tensor,
    weights: Tensor | None = None,
    quantize: bool = False,
    columns: bool = False,
    plan: Plan | None = None,
    pow2: bool = False,
) -> tuple[Tensor | tuple[Tensor, ...], Tensor | None]:
    """The gradients of y = swiglu(x, weights), x [S, 2F], for dy [S, F]: dx [S, 2F] and dweights [S], or None.

    dx is in x's dtype, or with quantize a tuple, its FP8 rows dx_q [S, 2F] and dx_scale [S, 2F/128] and with columns
    also its column-wise copy, as `quantize` lays them out for that plan, from dx before it is rounded: the operands of
    the FP8 products of the backward pass. With a plan's columns, rows past its last expert stay undefined. Not
    differentiable. Raises ValueError for shapes that do not fit, and for FP8 where F % 128 != 0.
    """
    expect(x.ndim == 2 and dy.ndim == 2 and x.shape == (len(dy), 2 * dy.shape[1]), "dy [S, F] and x [S, 2F]", dy, x)
    expect(weights is None or weights.shape == x.shape[:1], "weights [S]", weights, x)
    expect(not quantize or dy.shape[1] % BLOCK == 0, "F % 128 == 0 for FP8", dy)
    expect(quantize or not (columns or pow2), "quantize=True with columns or pow2", quantize, columns, pow2)
    if plan is not None:
        expect_plan(plan, S=len(x))
    if use_reference("swiglu_backward", x, dy, weights):
        return swiglu_backward_ref(dy, x, weights, quantize, columns, plan, pow2)
    dy, x, weights = (t if t is None else t.detach().contiguous() for t in (dy, x, weights))
    dx, dweights = None if quantize else torch.empty_like(x), None
    if weights is not None:  # no kernel runs for F = 0, of which the weights' gradients are sums
        dweights = torch.empty_like(weights) if dy.numel() else torch.zeros_like(weights)
    out = empty_fp8(x, len(x), x.shape[1], quantize, columns, plan)
    plan = (plan.offsets, plan.padded_offsets) if plan and columns else (None, None)
    swiglu_bwd(dy, x, weights, dx, dweights, *out, *plan, pow2)
    return tuple(t for t in out if t is not None) if quantize else dx, dweights


def swiglu_backward_ref(dy, x, weights=None, quantize=False, columns=False, plan=None, pow2=False):
    (gate, up), g, dweights = upcast(x).chunk(2, -1), upcast(dy), None
    sig = gate.sigmoid()
    if weights is not None:
        dweights = (g * gate * sig * up).sum(-1).to(weights.dtype)
        g = g * weights[:, None]
    dx = torch.cat([g * up * sig * (1 + gate * (1 - sig)), g * gate * sig], -1)
    return quantize_ref(dx, True, columns, plan, pow2) if quantize else dx.to(x.dtype), dweights


class SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weights, offsets):
        x, weights = x.contiguous(), weights if weights is None else weights.contiguous()
        y = x.new_empty(len(x), x.shape[1] // 2)
        swiglu_fwd(x, weights, y, None, None, None, None, offsets, None, False)
        ctx.save_for_backward(x, weights)
        return y

    @staticmethod
    @first_derivative_only
    def backward(ctx, dy):
        return *swiglu_backward(dy, *ctx.saved_tensors), None


def unsupported_fwd(x, weights, y, y_q, y_scale, yt_q, *others) -> str | None:
    if y is not None and yt_q is not None:
        return "a column-wise copy beside y"
    return unsupported_rows(x, weights)


@op("y", "y_q", "y_scale", "yt_q", "yt_scale", cuda=unsupported_fwd)
def swiglu_fwd(
    x: Tensor,
    weights: Tensor | None,
    y: Tensor | None,
    y_q: Tensor | None,
    y_scale: Tensor | None,
    yt_q: Tensor | None,
    yt_scale: Tensor | None,
    offsets: Tensor | None,
    padded_offsets: Tensor | None,
    pow2: bool,
) -> None:
    grid, sizes = tiling(len(x), x.shape[1] // 2, y_scale, yt_q, offsets, multiprocessors(x.device))
    if grid[0]:
        swiglu_kernel[grid](x, weights, y, y_q, y_scale, yt_q, yt_scale, offsets, padded_offsets, POW2=pow2, **sizes)


def unsupported_bwd(dy, x, weights, dx, dweights, dx_q, dx_scale, dxt_q, *others) -> str | None:
    if dxt_q is not None:
        return "a column-wise copy of dx"
    if dy.dtype != x.dtype or not rows_aligned(dy):
        return "a dy of another dtype than x, or whose rows do not start at multiples of 16 bytes"
    return unsupported_rows(x, weights)


@op("dx", "dweights", "dx_q", "dx_scale", "dxt_q", "dxt_scale", cuda=unsupported_bwd)
def swiglu_bwd(
    dy: Tensor,
    x: Tensor,
    weights: Tensor | None,
    dx: Tensor | None,
    dweights: Tensor | None,
    dx_q: Tensor | None,
    dx_scale: Tensor | None,
    dxt_q: Tensor | None,
    dxt_scale: Tensor | None,
    offsets: Tensor | None,
    padded_offsets: Tensor | None,
    pow2: bool,
) -> None:
    M, F = dy.shape
    ld_scale, M_pad = 0 if dx_scale is None else dx_scale.stride(1), 0 if dxt_q is None else dxt_q.shape[1]
    E = 0 if offsets is None else len(offsets) - 1
    if dy.numel():
        chosen = config(F, dx_q is not None, dxt_q is not None, multiprocessors(x.device))
        rows = BLOCK if M_pad else chosen["BLOCK_M"]  # of a program
        swiglu_bwd_kernel[(triton.cdiv(M_pad or M, rows),)](
            dy, x, weights, dx, dweights, dx_q, dx_scale, dxt_q, dxt_scale, offsets, padded_offsets,
            M, F, E, ld_scale, M_pad, POW2=pow2, BLOCK_E=triton.next_power_of_2(max(E, 1)), enable_fp_fusion=False,
            **chosen,
        )  # fmt: skip


def unsupported_rows(x: Tensor, weights: Tensor | None) -> str | None:
    if x.dtype == E4M3:
        return "rows of FP8"
    if x.shape[1] % 16 or not rows_aligned(x):
        return "rows whose halves do not start at multiples of 16 bytes"
    return None if weights is None or weights.dtype == torch.float32 else "weights that are not fp32"


def config(F: int, fp8: bool, columns: bool, sms: int) -> dict:
    """Tiles of the backward kernel, not measured. For FP8 the blocks of 128 fix them.

    An SM of an H20 (78 SMs) needs 1.4 times the bytes in flight of one of an H200 (132).
    """
    if fp8:
        return dict(BLOCK_M=32, BLOCK_F=128, num_warps=16 if columns else 4)
    BLOCK_F = min(triton.next_power_of_2(F), 512)
    rows = max(1024 // BLOCK_F, 4)
    return dict(BLOCK_M=2 * rows if sms < 100 else rows, BLOCK_F=BLOCK_F, num_warps=4)


@triton.jit
def load_gate_up(x, rows, f, valid, F):
    gate = x + rows.to(tl.int64)[:, None] * (2 * F) + f[None, :]
    return tl.load(gate, mask=valid, other=0.0).to(tl.float32), tl.load(gate + F, mask=valid, other=0.0).to(tl.float32)


@triton.jit
def swiglu_kernel(
    x, weights, y, y_q, y_scale, yt_q, yt_scale, offsets, padded_offsets, M, K, E, ld_scale, M_pad,
    POW2: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    # K is F: y is quantised as `quantize` quantises x [M, K]
    tile, k = tl.program_id(0) // tl.cdiv(K, 128), tl.program_id(0) % tl.cdiv(K, 128)
    rows, valid, active = tile_rows(tile, M, offsets, padded_offsets, E, BLOCK_M, BLOCK_E)
    if not active:
        return
    f = k * 128 + tl.arange(0, 128)
    mask = valid[:, None] & (f < K)[None, :]
    gate, up = load_gate_up(x, rows, f, mask, K)
    ys = gate * tl.sigmoid(gate) * up
    if weights is not None:
        ys *= tl.load(weights + rows, mask=valid, other=0.0)[:, None]
    if y is not None:
        tl.store(y + rows.to(tl.int64)[:, None] * K + f[None, :], ys, mask=mask)
    if y_q is not None:
        store_rows(ys, rows, valid, k, y_q, y_scale, K, ld_scale, POW2)
    if yt_q is not None:
        store_columns(ys, tile, k, yt_q, yt_scale, K, M_pad, POW2)


@triton.jit
def gradients(dy, x, weights, rows, valid, f, F):
    # With g = dy * weight:  dup = g * silu(gate),  dgate = g * up * sig * (1 + gate * (1 - sig)),
    # dweight = sum over f of dy * silu(gate) * up
    mask = valid[:, None] & (f < F)[None, :]
    gate, up = load_gate_up(x, rows, f, mask, F)
    g = tl.load(dy + rows.to(tl.int64)[:, None] * F + f[None, :], mask=mask, other=0.0).to(tl.float32)
    sig = tl.sigmoid(gate)
    dw = tl.sum(g * gate * sig * up, 1)
    if weights is not None:
        g *= tl.load(weights + rows, mask=valid, other=0.0)[:, None]
    return g * up * sig * (1 + gate * (1 - sig)), g * gate * sig, dw


@triton.jit
def swiglu_bwd_kernel(
    dy, x, weights, dx, dweights, dx_q, dx_scale, dxt_q, dxt_scale, offsets, padded_offsets, M, F, E, ld_scale, M_pad,
    POW2: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_F: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    # With columns a program has 128 rows, more than registers hold. It takes them in parts for the outputs by rows,
    # then reads them again, from L2, for the outputs by columns.
    PARTS: tl.constexpr = 1 if dxt_q is None else 128 // BLOCK_M
    for part in range(tl.program_id(0) * PARTS, (tl.program_id(0) + 1) * PARTS):
        rows, valid, active = tile_rows(part, M, offsets, padded_offsets, E, BLOCK_M, BLOCK_E)
        dws = tl.zeros((BLOCK_M,), tl.float32)
        for f0 in range(0, tl.where(active, F, 0), BLOCK_F):
            f = f0 + tl.arange(0, BLOCK_F)
            dgate, dup, dw = gradients(dy, x, weights, rows, valid, f, F)
            dws += dw
            if dx is not None:
                to = dx + rows.to(tl.int64)[:, None] * (2 * F) + f[None, :]
                mask = valid[:, None] & (f < F)[None, :]
                tl.store(to, dgate, mask=mask)
                tl.store(to + F, dup, mask=mask)
            if dx_q is not None:
                k = tl.cast(f0 // 128, tl.int32)
                store_rows(dgate, rows, valid, k, dx_q, dx_scale, 2 * F, ld_scale, POW2)
                store_rows(dup, rows, valid, k + F // 128, dx_q, dx_scale, 2 * F, ld_scale, POW2)
        if weights is not None:
            tl.store(dweights + rows, dws, mask=valid)
    if dxt_q is not None:
        tile = tl.program_id(0)
        rows, valid, active = tile_rows(tile, M, offsets, padded_offsets, E, 128, BLOCK_E)
        for k in range(0, tl.where(active, F // 128, 0)):
            f = k * 128 + tl.arange(0, 128)
            dgate, dup, dw = gradients(dy, x, weights, rows, valid, f, F)
            store_columns(dgate, tile, k, dxt_q, dxt_scale, 2 * F, M_pad, POW2)
            dgate, dup, dw = gradients(dy, x, weights, rows, valid, f, F)
            store_columns(dup, tile, k + F // 128, dxt_q, dxt_scale, 2 * F, M_pad, POW2)
