"""SwiGLU: y = silu(gate) * up for x = [gate | up], optionally times one weight per row (the routing probability)."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..backend import backend
from ..op import expect, op, wide
from .dispatch import Plan
from .quantize import BLOCK, empty_fp8, quantize_ref, tiling
from .triton_fp8 import store_columns, store_rows, tile_rows


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
    [S, 2F] with F % 128 == 0. Gradients: of y, to x and weights; FP8 carries none. Raises ValueError for another shape.
    """
    expect(x.ndim >= 1 and x.shape[-1] % 2 == 0 and x.is_floating_point(), "x [..., 2F]", x)
    fits = weights is None or (x.ndim == 2 and weights.shape == x.shape[:1])
    expect(fits and (weights is None or weights.dtype in (torch.float32, torch.float64)),
           "weights [S] fp32 for x [S, 2F]", x, weights)  # fmt: skip
    expect(not quantize or (x.ndim == 2 and x.shape[1] % (2 * BLOCK) == 0), "x [S, 2F], F % 128 == 0, for FP8", x)
    expect(quantize or not (columns or pow2), "quantize=True with columns or pow2", quantize, columns, pow2)
    if backend(x) == "torch" or torch.float64 in (x.dtype, weights is not None and weights.dtype):
        return swiglu_ref(x, weights, quantize, columns, plan, pow2)
    if not quantize:
        return SwiGLU.apply(x.reshape(-1, x.shape[-1]), weights).view(*x.shape[:-1], x.shape[-1] // 2)
    out = empty_fp8(x, len(x), x.shape[1] // 2, True, columns, plan)
    plan = (plan.offsets, plan.padded_offsets) if plan and columns else (None, None)
    weights = weights if weights is None else weights.detach().contiguous()
    swiglu_fwd(x.detach().contiguous(), weights, None, *out, *plan, pow2)
    return tuple(t for t in out if t is not None)


def swiglu_ref(x, weights=None, quantize=False, columns=False, plan=None, pow2=False):
    gate, up = wide(x).chunk(2, -1)
    y = torch.nn.functional.silu(gate) * up
    if weights is not None:
        y = y * weights[:, None]
    return quantize_ref(y, True, columns, plan, pow2) if quantize else y.to(x.dtype)


class SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weights):
        x, weights = x.contiguous(), weights if weights is None else weights.contiguous()
        y = x.new_empty(len(x), x.shape[1] // 2)
        swiglu_fwd(x, weights, y, None, None, None, None, None, None, False)
        ctx.save_for_backward(x, weights)
        return y

    @staticmethod
    def backward(ctx, dy):
        x, weights = ctx.saved_tensors
        dx, dweights = torch.empty_like(x), None if weights is None else torch.empty_like(weights)
        swiglu_bwd(dy.contiguous(), x, weights, dx, dweights)
        return dx, dweights


@op("y", "y_q", "y_scale", "yt_q", "yt_scale")
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
    grid, sizes = tiling(len(x), x.shape[1] // 2, y_scale, yt_q, offsets)
    if grid[0]:
        swiglu_kernel[grid](x, weights, y, y_q, y_scale, yt_q, yt_scale, offsets, padded_offsets, POW2=pow2, **sizes)


def config(F: int) -> dict:
    """Of the backward kernel. Not measured; H200 and H20 have one table, since both wait for memory."""
    BLOCK_F = min(triton.next_power_of_2(F), 512)
    return dict(BLOCK_M=max(1024 // BLOCK_F, 4), BLOCK_F=BLOCK_F, num_warps=4)


@op("dx", "dweights")
def swiglu_bwd(dy: Tensor, x: Tensor, weights: Tensor | None, dx: Tensor, dweights: Tensor | None) -> None:
    M, F = dy.shape
    if dy.numel():
        chosen = config(F)
        swiglu_bwd_kernel[(triton.cdiv(M, chosen["BLOCK_M"]),)](dy, x, weights, dx, dweights, M, F, **chosen)


@triton.jit
def load_gate_up(x, rows, f, own, F):
    at = x + rows.to(tl.int64)[:, None] * (2 * F) + f[None, :]
    return tl.load(at, mask=own, other=0.0).to(tl.float32), tl.load(at + F, mask=own, other=0.0).to(tl.float32)


@triton.jit
def swiglu_kernel(
    x, weights, y, y_q, y_scale, yt_q, yt_scale, offsets, padded_offsets, M, K, E, ld_scale, M_pad,
    POW2: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    # F is K here: what `quantize` makes of y
    tile, k = tl.program_id(0) // tl.cdiv(K, 128), tl.program_id(0) % tl.cdiv(K, 128)
    rows, own, live = tile_rows(tile, M, offsets, padded_offsets, E, BLOCK_M, BLOCK_E)
    if not live:
        return
    f = k * 128 + tl.arange(0, 128)
    fits = own[:, None] & (f < K)[None, :]
    gate, up = load_gate_up(x, rows, f, fits, K)
    ys = gate * tl.sigmoid(gate) * up
    if weights is not None:
        ys *= tl.load(weights + rows, mask=own, other=0.0)[:, None]
    if y is not None:
        tl.store(y + rows.to(tl.int64)[:, None] * K + f[None, :], ys, mask=fits)
    if y_q is not None:
        store_rows(ys, rows, own, k, y_q, y_scale, K, ld_scale, POW2)
    if yt_q is not None:
        store_columns(ys, tile, k, yt_q, yt_scale, K, M_pad, POW2)


@triton.jit
def swiglu_bwd_kernel(dy, x, weights, dx, dweights, M, F, BLOCK_M: tl.constexpr, BLOCK_F: tl.constexpr):
    # With g = dy * weight:  dup = g * silu(gate),  dgate = g * up * sig * (1 + gate * (1 - sig)),
    # dweight = sum over f of dy * silu(gate) * up
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    dw = tl.zeros((BLOCK_M, BLOCK_F), tl.float32)
    for f0 in range(0, F, BLOCK_F):
        f = f0 + tl.arange(0, BLOCK_F)
        own = (rows < M)[:, None] & (f < F)[None, :]
        gate, up = load_gate_up(x, rows, f, own, F)
        g = tl.load(dy + rows.to(tl.int64)[:, None] * F + f[None, :], mask=own, other=0.0).to(tl.float32)
        sig = tl.sigmoid(gate)
        if weights is not None:
            dw += g * gate * sig * up
            g *= tl.load(weights + rows, mask=rows < M, other=0.0)[:, None]
        at = dx + rows.to(tl.int64)[:, None] * (2 * F) + f[None, :]
        tl.store(at, g * up * sig * (1 + gate * (1 - sig)), mask=own)
        tl.store(at + F, g * gate * sig, mask=own)
    if weights is not None:
        tl.store(dweights + rows, tl.sum(dw, 1), mask=rows < M)
