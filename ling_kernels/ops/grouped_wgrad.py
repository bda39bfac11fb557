"""Grouped weight gradient: dW[e] (+)= sum over the rows s of expert e of dy[s] x[s]^T, in fp32.

With columns the operands are column-wise FP8 copies, and the products over each 128 rows are scaled, then added.
"""

import torch
from torch import Tensor

from ..backend import forced
from ..op import E4M3, expect, op, upcast, use_reference, values_on_host
from .dispatch import expect_offsets
from .gemm_fp8 import (
    BLOCK,
    column_major,
    launch_with_scratch,
    row_major,
    scaled_part,
    scaled_product,
    tile_position,
    tma_compatible,
    tma_operand,
    unsupported_operands,
    unsupported_result,
)
from .quantize import dequantize
from .triton_import import tl, triton


def grouped_wgrad(
    dy: Tensor,
    x: Tensor,
    offsets: Tensor,
    out: Tensor | None = None,
    accumulate: bool = False,
    dy_scale: Tensor | None = None,
    x_scale: Tensor | None = None,
    columns: bool = False,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """dW [E, N, K] in dtype, or in out (fp32 or bf16), from, with offsets [E + 1] int32,

      dy [S, N], x [S, K] of one wide dtype, without scales; or
      dy [S, N], x [S, K] e4m3 with dy_scale [S, N/128], x_scale [S, K/128], dequantised; or, with columns,
      dy [N, S_pad], x [K, S_pad] e4m3 with dy_scale [N, S_pad/128], x_scale [K, S_pad/128], the column-wise copies of
      `quantize(..., plan=plan)`; offsets is then plan.padded_offsets.
    accumulate adds to out; otherwise out is written without being read, zeros for an expert without rows. Rows outside
    every expert are never read. Not differentiable. Raises ValueError for operands that do not fit. Backend torch
    reads the offsets on the host.
    """
    rows = 1 if columns else 0
    fp8 = dy.dtype == x.dtype == E4M3
    expect(dy.ndim == x.ndim == 2 and dy.dtype == x.dtype and dy.shape[rows] == x.shape[rows],
           "dy [S, N] and x [S, K] of one dtype (columns: [N, S_pad] and [K, S_pad])", dy, x)  # fmt: skip
    expect(fp8 if columns or dy_scale is not None or x_scale is not None else x.is_floating_point() and not fp8,
           "e4m3 with scales, or wide operands without", dy, x, dy_scale, x_scale)  # fmt: skip
    for t, scale in ((dy, dy_scale), (x, x_scale)) if fp8 else ():
        fits = scale is not None and scale.shape == (len(t), t.shape[1] // BLOCK)
        fits = fits and scale.dtype in (torch.float32, torch.float64)
        expect(t.shape[1] % BLOCK == 0 and fits, "one fp32 scale per 1 x 128 of dy and of x", t, scale)  # fmt: skip
    expect_offsets(offsets, offsets.numel() - 1, dy.shape[rows])
    shape = (len(offsets) - 1, dy.shape[1 - rows], x.shape[1 - rows])
    expect(out is None or (out.shape == shape and out.is_floating_point()), "out [E, N, K]", out, shape)
    expect(out is not None or not accumulate, "out where accumulate is given", out)
    dy, x = dy.detach(), x.detach()
    if out is None and dtype == dy.dtype and grouped_mm_on_cpu(offsets, dy, x):
        return torch.nn.functional.grouped_mm(dy.T, x, offs=offsets[1:])
    if out is None:
        out = torch.empty(shape, dtype=dtype, device=dy.device)
    if use_reference("grouped_wgrad", dy, x, out, dy_scale, x_scale):
        grouped_wgrad_ref_fwd(dy, x, offsets, out, accumulate, dy_scale, x_scale, columns)
    elif dy.numel() and x.numel():
        if columns or dy.dtype == torch.bfloat16:
            dy, x = row_major(dy), row_major(x)
        if columns:
            dy_scale, x_scale = column_major(dy_scale), column_major(x_scale)
        grouped_wgrad_fwd(dy, x, offsets, out, accumulate, dy_scale, x_scale, columns)
    elif not accumulate:
        out.zero_()
    return out


def grouped_mm_on_cpu(offsets: Tensor, *operands: Tensor) -> bool:
    """Whether torch's grouped_mm runs on a CPU, with the reference's bits in less time: in fp32, for operands with rows
    and start on 16 bytes and experts' rows from 0 on, and not where LING_BACKEND asks for the references."""
    fits = values_on_host(offsets) and not forced() and all(t.dtype == torch.float32 for t in operands)
    return fits and all(map(tma_compatible, operands)) and int(offsets[0]) == 0


def grouped_wgrad_ref(
    dy, x, offsets, out=None, accumulate=False, dy_scale=None, x_scale=None, columns=False, dtype=torch.float32
):
    bounds = offsets.tolist()
    if dy_scale is not None and not columns:
        dy, x = dequantize(dy, dy_scale), dequantize(x, x_scale)

    def of_expert(e: int) -> Tensor:
        lo, hi = bounds[e : e + 2]
        if columns:
            blocks = slice(lo // BLOCK, hi // BLOCK)
            return scaled_product(dy[:, lo:hi], dy_scale[:, blocks], x[:, lo:hi], x_scale[:, blocks])
        with torch.autocast(dy.device.type, enabled=False):
            return upcast(dy[lo:hi]).T @ upcast(x[lo:hi])

    if out is None:
        dw = torch.stack([of_expert(e) for e in range(len(bounds) - 1)])
        return dw if dw.dtype == torch.float64 else dw.to(dtype)
    for e, w in enumerate(out):  # one at a time: all experts' gradients are large
        w.copy_(upcast(w) + of_expert(e) if accumulate else of_expert(e))
    return out


@op("out", runs="torch")
def grouped_wgrad_ref_fwd(
    dy: Tensor,
    x: Tensor,
    offsets: Tensor,
    out: Tensor,
    accumulate: bool,
    dy_scale: Tensor | None,
    x_scale: Tensor | None,
    columns: bool,
) -> None:
    grouped_wgrad_ref(dy, x, offsets, out, accumulate, dy_scale, x_scale, columns)


def unsupported(dy, x, offsets, out, accumulate, dy_scale, x_scale, columns) -> str | None:
    if not columns and (dy.dtype != torch.bfloat16 or dy.shape[1] % 8):
        return "operands by rows that are not bf16, or not of a multiple of 8 columns"
    return unsupported_operands((dy, x), (dy_scale, x_scale) if columns else ()) or unsupported_result(out, len(out))


@op("out", cuda=unsupported)
def grouped_wgrad_fwd(
    dy: Tensor,
    x: Tensor,
    offsets: Tensor,
    out: Tensor,
    accumulate: bool,
    dy_scale: Tensor | None,
    x_scale: Tensor | None,
    columns: bool,
) -> None:
    E, N, K = out.shape
    chosen = config(dy.dtype, columns, accumulate)
    if columns:
        dy, x = tma_operand(dy), tma_operand(x)
    tiles = triton.cdiv(N, chosen["BLOCK_N"]) * triton.cdiv(K, chosen["BLOCK_K"])
    launch_with_scratch(
        grouped_wgrad_kernel[(E * tiles,)], dy, x, offsets, out, dy_scale, x_scale,
        *dy.stride(), *x.stride(), *out.stride(),
        *((0, 0) if dy_scale is None else dy_scale.stride()), *((0, 0) if x_scale is None else x_scale.stride()),
        dy.shape[1], N, K, ACCUMULATE=accumulate, COLUMNS=columns, **chosen,
    )  # fmt: skip


def config(dtype: torch.dtype, columns: bool, accumulate: bool) -> dict:
    """Tiles of dW. An expert has a few hundred rows, so programs are short: with two on an SM, one multiplies while the
    other stores.

    Reading dW to accumulate takes the registers that a larger tile would need. PASSES: an FP8 number times its scales
    does not fit bf16, but a sum of three bf16 numbers gives it to fp32's precision.
    """
    block_n, block_k, block_s, warps, stages = (  # not measured; one choice for H200 and H20
        (64, 128, 128, 4, 3) if columns
        else (64, 64, 16, 4, 3) if dtype == torch.float32
        else (64, 128, 64, 4, 3) if dtype == E4M3 or accumulate
        else (128, 128, 64, 8, 3)
    )  # fmt: skip
    return dict(BLOCK_N=block_n, BLOCK_K=block_k, BLOCK_S=block_s, BAND=8, PASSES=3, num_warps=warps, num_stages=stages)


@triton.jit
def rows_product(
    dy, x, dy_scale, x_scale, s0, s1, n, k, dy_s, dy_n, x_s, x_k, dy_scale_s, dy_scale_n, x_scale_s, x_scale_k, N, K,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_S: tl.constexpr, PASSES: tl.constexpr,
):  # fmt: skip
    """dy[s0:s1, n:]^T x[s0:s1, k:]. Rows after s1 may hold NaN, so those of both operands are zeroed."""
    ns, ks = (n + tl.arange(0, BLOCK_N)).to(tl.int64), (k + tl.arange(0, BLOCK_K)).to(tl.int64)
    acc = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
    for s in range(s0, s1, BLOCK_S):
        rows = s + tl.arange(0, BLOCK_S)
        valid = rows < s1
        rows = rows.to(tl.int64)
        p = tl.load(dy + rows[:, None] * dy_s + ns[None, :] * dy_n, mask=valid[:, None] & (ns < N)[None, :], other=0.0)
        q = tl.load(x + rows[:, None] * x_s + ks[None, :] * x_k, mask=valid[:, None] & (ks < K)[None, :], other=0.0)
        if dy_scale is None:
            acc = tl.dot(p.T, q, acc, input_precision="ieee")
        else:
            scale = tl.load(dy_scale + rows * dy_scale_s + (n // 128).to(tl.int64) * dy_scale_n, mask=valid, other=0.0)
            scale *= tl.load(x_scale + rows * x_scale_s + (k // 128).to(tl.int64) * x_scale_k, mask=valid, other=0.0)
            rest, exact = p.to(tl.float32) * scale[:, None], q.to(tl.bfloat16)
            for _ in tl.static_range(PASSES):
                part = rest.to(tl.bfloat16)
                acc = tl.dot(part.T, exact, acc)
                rest -= part.to(tl.float32)
    return acc


@triton.jit
def columns_product(
    DY, X, dy_scale, x_scale, s0, s1, n, k, dy_scale_n, dy_scale_s, x_scale_k, x_scale_s, N, K,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """dy[n:, s0:s1] x[k:, s0:s1]^T with a scale for each 128 of s; both bounds are multiples of 128."""
    ns, ks = n + tl.arange(0, BLOCK_N), k + tl.arange(0, BLOCK_K)
    dy_scales = dy_scale + ns.to(tl.int64) * dy_scale_n + (s0 // 128).to(tl.int64) * dy_scale_s
    x_scales = x_scale + ks.to(tl.int64) * x_scale_k + (s0 // 128).to(tl.int64) * x_scale_s
    next_ps = tl.load(dy_scales, mask=(ns < N) & (s0 < s1), other=0.0)
    next_qs = tl.load(x_scales, mask=(ks < K) & (s0 < s1), other=0.0)
    acc = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
    for s in range(s0, s1, 128):
        ps, qs = next_ps, next_qs
        dy_scales += dy_scale_s
        x_scales += x_scale_s
        next_ps = tl.load(dy_scales, mask=(ns < N) & (s + 128 < s1), other=0.0)
        next_qs = tl.load(x_scales, mask=(ks < K) & (s + 128 < s1), other=0.0)
        acc += scaled_part(DY.load([n, s]), X.load([k, s]), ps, qs, True, False)
    return acc


@triton.jit
def grouped_wgrad_kernel(
    dy, x, offsets, out, dy_scale, x_scale,
    dy_0, dy_1, x_0, x_1, out_e, out_n, out_k, dy_scale_0, dy_scale_1, x_scale_0, x_scale_1, S, N, K,
    ACCUMULATE: tl.constexpr, COLUMNS: tl.constexpr, PASSES: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_S: tl.constexpr, BAND: tl.constexpr,
):  # fmt: skip
    # One program per tile of an expert's dW. Tiles of one expert run at the same time and share its rows in L2.
    tiles_n, tiles_k = tl.cdiv(N, BLOCK_N), tl.cdiv(K, BLOCK_K)
    e = tl.program_id(0) // (tiles_n * tiles_k)
    tile_n, tile_k = tile_position(tl.program_id(0) % (tiles_n * tiles_k), tiles_n, tiles_k, BAND)
    n, k = tile_n * BLOCK_N, tile_k * BLOCK_K
    s0, s1 = tl.load(offsets + e), tl.load(offsets + e + 1)
    if COLUMNS:
        DY = tl.make_tensor_descriptor(dy, [N, S], [dy_0, 1], [BLOCK_N, BLOCK_S])
        X = tl.make_tensor_descriptor(x, [K, S], [x_0, 1], [BLOCK_K, BLOCK_S])
        acc = columns_product(
            DY, X, dy_scale, x_scale, s0, s1, n, k, dy_scale_0, dy_scale_1, x_scale_0, x_scale_1, N, K, BLOCK_N, BLOCK_K
        )
    else:
        acc = rows_product(
            dy, x, dy_scale, x_scale, s0, s1, n, k, dy_0, dy_1, x_0, x_1,
            dy_scale_0, dy_scale_1, x_scale_0, x_scale_1, N, K, BLOCK_N, BLOCK_K, BLOCK_S, PASSES,
        )  # fmt: skip
    ns, ks = (n + tl.arange(0, BLOCK_N)).to(tl.int64), (k + tl.arange(0, BLOCK_K)).to(tl.int64)
    pointers = out + e.to(tl.int64) * out_e + ns[:, None] * out_n + ks[None, :] * out_k
    mask = (ns < N)[:, None] & (ks < K)[None, :]
    if ACCUMULATE:
        acc += tl.load(pointers, mask=mask, other=0.0).to(tl.float32)
    tl.store(pointers, acc, mask=mask)
