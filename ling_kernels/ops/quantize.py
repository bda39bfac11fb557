"""FP8 (e4m3) quantisation: q = round(x / scale) with scale = max(amax / 448, 1e-30) over a block; x ~ q * scale.

Activations and gradients have one scale per 1 x 128 (rows) or 128 x 1 (columns) block, weights one per 128 x 128.
`pow2` rounds the scale up to a power of two. Rounding is to nearest even and saturates at +-448; a NaN or inf in a
block makes its scale NaN or inf and so stays visible in the product.
"""

import torch
from torch import Tensor

from ..op import E4M3, expect, multiprocessors, op, round_up, rows_aligned, upcast, use_reference
from .dispatch import Plan, expect_plan
from .triton_fp8 import fp8_amax, fp8_round, fp8_scale, store_columns, store_rows, tile_rows
from .triton_import import tl, triton

BLOCK = 128
E4M3_MAX = 448.0


def quantize(
    x: Tensor,
    rows: bool = True,
    columns: bool = False,
    plan: Plan | None = None,
    pow2: bool = False,
) -> tuple[Tensor, ...]:
    """Quantise x [M, K], K % 128 == 0, in 1 x 128 blocks, in both directions from one read of x.

    Returns, in this order:
      rows:    x_q [M, K] e4m3 and x_scale [M, K/128] fp32, M contiguous (its other stride is a multiple of 4)
      columns: xt_q [K, M_pad] e4m3 and xt_scale [K, M_pad/128] fp32, K contiguous. Without a plan M_pad is
               round_up(M, 128); with one, x's rows are the plan's, expert e's run starts at column
               plan.padded_offsets[e], a multiple of 128, M_pad is padded_slots(M, E), gaps are zero, and columns
               after the last expert's are undefined
    Not differentiable. Raises ValueError for another shape or dtype.
    """
    expect(x.ndim == 2 and x.shape[1] % BLOCK == 0 and x.is_floating_point(), "x [M, K] with K % 128 == 0", x)
    expect(rows or columns, "rows=True or columns=True", rows, columns)
    if plan is not None:
        expect_plan(plan, S=len(x))
    if use_reference("quantize", x):
        return quantize_ref(x, rows, columns, plan, pow2)
    out = empty_fp8(x, len(x), x.shape[1], rows, columns, plan)
    plan = (plan.offsets, plan.padded_offsets) if plan and columns else (None, None)
    quantize_fwd(dense_rows(x.detach()), *out, *plan, None, 1, pow2)
    return tuple(t for t in out if t is not None)


def quantize_ref(x, rows=True, columns=False, plan=None, pow2=False):
    x = upcast(x.detach())
    out = []
    if rows:
        x_q, x_scale = quantize_blocks(x, 1, BLOCK, pow2)
        out += [x_q, row_scale_layout(x_scale)]
    if columns:
        xt_q, xt_scale = quantize_blocks(pad_columns(x, plan).T, 1, BLOCK, pow2)
        out += [xt_q.contiguous(), row_scale_layout(xt_scale)]
    return tuple(out)


def quantize_weight(w: Tensor, pow2: bool = False, out: tuple[Tensor, Tensor] | None = None) -> tuple[Tensor, Tensor]:
    """Quantise w [N, K] or [E, N, K] in 128 x 128 blocks -> w_q e4m3 as w, w_scale [(E,) N/128, K/128] fp32.

    out: two such contiguous tensors to write into and return. Not differentiable. Raises ValueError where 128 does not
    divide N and K.
    """
    fits = w.ndim in (2, 3) and w.shape[-1] % BLOCK == 0 and w.shape[-2] % BLOCK == 0
    expect(fits and w.is_floating_point(), "w [N, K] or [E, N, K] with N % 128 == K % 128 == 0", w)
    blocks = *w.shape[:-2], w.shape[-2] // BLOCK, w.shape[-1] // BLOCK
    expect(out is None or (out[0].shape == w.shape and out[1].shape == blocks), "out as quantize_weight(w)", w, out)
    expect(out is None or all(t.is_contiguous() for t in out), "out that is contiguous", out)
    if use_reference("quantize_weight", w):
        if out is None:
            return quantize_weight_ref(w, pow2)
        # expert by expert, since the reference needs several temporary tensors of its input's size
        for expert, *expert_out in zip(w, *out, strict=True) if w.ndim == 3 else ((w, *out),):
            for to, t in zip(expert_out, quantize_weight_ref(expert, pow2), strict=True):
                to.copy_(t)
        return out
    w = w.detach().contiguous()
    out = out or (torch.empty_like(w, dtype=E4M3), w.new_empty(blocks, dtype=torch.float32))
    quantize_weight_fwd(w, *out, pow2)
    return out


def quantize_weight_ref(w, pow2=False):
    return quantize_blocks(upcast(w.detach()), BLOCK, BLOCK, pow2)


def quantize_blocks(x: Tensor, block_m: int, block_n: int, pow2: bool) -> tuple[Tensor, Tensor]:
    """The definition: x [..., M, N] in blocks of block_m x block_n -> e4m3 as x, scale [..., M/block_m, N/block_n]."""
    blocks = x.unflatten(-1, (-1, block_n)).unflatten(-3, (-1, block_m))  # [..., M/bm, bm, N/bn, bn]
    amax = blocks.abs().amax((-3, -1), keepdim=True)
    scale = (amax / torch.full_like(amax, E4M3_MAX)).clamp(min=1e-30)  # torch multiplies by 1 / a number on a GPU
    if pow2:
        mantissa = torch.frexp(scale).mantissa  # scale = mantissa * 2^n with 0.5 <= mantissa < 1, so division is exact
        scale = torch.where(scale.isfinite() & (mantissa != 0.5), scale / mantissa, scale)
    q = to_e4m3(blocks / scale).flatten(-4, -3).flatten(-2)
    return q, scale.squeeze((-3, -1)).float()


def to_e4m3(x: Tensor) -> Tensor:
    """Round to nearest even, saturate at +-448; NaN stays NaN."""
    return x.clamp(-E4M3_MAX, E4M3_MAX).to(E4M3)


def dequantize(q: Tensor, scale: Tensor) -> Tensor:
    """q [..., M, N] times its scale [..., M/bm, N/bn]; the block sizes follow from the shapes. fp32, or fp64."""
    for dim in (-2, -1):
        scale = scale.repeat_interleave(q.shape[dim] // max(scale.shape[dim], 1), dim)
    return upcast(q) * upcast(scale)


def row_scale_layout(scale: Tensor) -> Tensor:
    """scale [M, blocks] with M contiguous and the other stride a multiple of 4 elements, as TMA requires."""
    M, blocks = scale.shape
    return scale.new_zeros(blocks, round_up(M, 4)).T[:M].copy_(scale)


def padded_slots(S: int, E: int) -> int:
    """Columns of a column-wise copy: enough for any routing of S choices to E experts, so the host need not ask."""
    return round_up(S + (BLOCK - 1) * min(E, S), BLOCK)


def pad_columns(x: Tensor, plan: Plan | None) -> Tensor:
    """x [M, K] -> [M_pad, K]: each expert's run of rows moved to a multiple of 128, zeros between."""
    M, K = x.shape
    if plan is None:
        return x.new_zeros(round_up(M, BLOCK), K).index_copy(0, torch.arange(M, device=x.device), x)
    M_pad = padded_slots(M, len(plan.offsets) - 1)
    offsets, padded = plan.offsets.long(), plan.padded_offsets.long()
    row = torch.arange(M, device=x.device)
    expert = torch.searchsorted(offsets[1:], row, right=True)  # E for rows past offsets[E], which no expert owns
    padded_row = torch.where(row < offsets[-1], row - offsets[expert] + padded[expert], M_pad)  # M_pad: cut off
    return x.new_zeros(M_pad + 1, K).index_copy(0, padded_row, x)[:M_pad]


def empty_fp8(x: Tensor, M: int, K: int, rows: bool, columns: bool, plan: Plan | None) -> tuple[Tensor | None, ...]:
    """Uninitialised x_q, x_scale (None without rows), xt_q, xt_scale (None without columns) for M rows of K."""
    x_q = x_scale = xt_q = xt_scale = None
    if rows:
        x_q = x.new_empty(M, K, dtype=E4M3)
        x_scale = x.new_empty(K // BLOCK, round_up(M, 4), dtype=torch.float32).T[:M]
    if columns:
        M_pad = padded_slots(M, len(plan.offsets) - 1) if plan else round_up(M, BLOCK)
        xt_q = x.new_empty(K, M_pad, dtype=E4M3)
        xt_scale = x.new_empty(M_pad // BLOCK, K, dtype=torch.float32).T
    return x_q, x_scale, xt_q, xt_scale


def tiling(
    M: int, K: int, x_scale: Tensor | None, xt_q: Tensor | None, offsets: Tensor | None, sms: int = 132
) -> tuple[tuple, dict]:
    """Grid and arguments of a kernel whose programs each own 128 columns and, with xt_q, 128 rows."""
    M_pad = 0 if xt_q is None else xt_q.shape[1]
    E = 0 if offsets is None else len(offsets) - 1
    tile = config(xt_q is not None, sms)
    sizes = dict(
        M=M, K=K, E=E, ld_scale=0 if x_scale is None else x_scale.stride(1), M_pad=M_pad,
        BLOCK_E=triton.next_power_of_2(max(E, 1)), **tile,
    )  # fmt: skip
    return (triton.cdiv(M_pad or M, tile["BLOCK_M"]) * triton.cdiv(K, BLOCK),), sizes


def config(columns: bool, sms: int) -> dict:
    """Tiles, not measured. An SM needs bandwidth x latency / SMs bytes in flight, 1.4 times as many on an H20 (78 SMs)
    as on an H200 (132), so programs have twice the rows there. A column-wise copy fixes them at its block of 128.
    """
    if columns:
        return dict(BLOCK_M=BLOCK, num_warps=16)
    return dict(BLOCK_M=32 if sms > 100 else 64, num_warps=4)


def dense_rows(x: Tensor) -> Tensor:
    """x, or a copy of it where the elements of a row are not next to each other."""
    return x if x.stride(-1) == 1 else x.contiguous()


def unsupported_rows(x, *others) -> str | None:
    if x.dtype == E4M3:
        return "rows of FP8"
    return None if rows_aligned(x) else "rows that do not start at multiples of 16 bytes"


@op("x_q", "x_scale", "xt_q", "xt_scale", cuda=unsupported_rows)
def quantize_fwd(
    x: Tensor,
    x_q: Tensor | None,
    x_scale: Tensor | None,
    xt_q: Tensor | None,
    xt_scale: Tensor | None,
    offsets: Tensor | None,
    padded_offsets: Tensor | None,
    source: Tensor | None,
    topk: int,
    pow2: bool,
) -> None:
    """With source [M], row m is x[source[m] // topk]. With offsets, rows past the last expert's are left alone."""
    launch_quantize(x, x_q, x_scale, xt_q, xt_scale, offsets, padded_offsets, source, topk, pow2)


def launch_quantize(x, x_q, x_scale, xt_q, xt_scale, offsets, padded_offsets, source, topk, pow2) -> None:
    M, K = len(x) if source is None else len(source), x.shape[1]
    grid, sizes = tiling(M, K, x_scale, xt_q, offsets, multiprocessors(x.device))
    if grid[0]:
        quantize_kernel[grid](
            x, x_q, x_scale, xt_q, xt_scale, offsets, padded_offsets, source, topk, x.stride(0), POW2=pow2, **sizes
        )


def unsupported_weight(w, w_q, w_scale, pow2) -> str | None:
    return None if rows_aligned(w, w_q) else "weights that do not start at multiples of 16 bytes"


@op("w_q", "w_scale", cuda=unsupported_weight)
def quantize_weight_fwd(w: Tensor, w_q: Tensor, w_scale: Tensor, pow2: bool) -> None:
    if w.numel():  # a program's tile is 128 x 128 on any GPU
        quantize_weight_kernel[(w_scale.numel(),)](w, w_q, w_scale, w.shape[-1], POW2=pow2, num_warps=8)


@triton.jit
def quantize_kernel(
    x, x_q, x_scale, xt_q, xt_scale, offsets, padded_offsets, source, topk, ldx, M, K, E, ld_scale, M_pad,
    POW2: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    tile, k = tl.program_id(0) // (K // 128), tl.program_id(0) % (K // 128)
    rows, valid, active = tile_rows(tile, M, offsets, padded_offsets, E, BLOCK_M, BLOCK_E)
    if not active:
        return
    x_rows = rows if source is None else tl.load(source + rows, mask=valid, other=0) // topk
    elements = x_rows.to(tl.int64)[:, None] * ldx + k * 128 + tl.arange(0, 128)[None, :]
    xs = tl.load(x + elements, mask=valid[:, None], other=0.0).to(tl.float32)
    if x_q is not None:
        store_rows(xs, rows, valid, k, x_q, x_scale, K, ld_scale, POW2)
    if xt_q is not None:
        store_columns(xs, tile, k, xt_q, xt_scale, K, M_pad, POW2)


@triton.jit
def quantize_weight_kernel(w, w_q, w_scale, K, POW2: tl.constexpr):
    block = tl.program_id(0)
    n, k = block // (K // 128) * 128 + tl.arange(0, 128), block % (K // 128) * 128 + tl.arange(0, 128)
    elements = n.to(tl.int64)[:, None] * K + k[None, :]
    ws = tl.load(w + elements).to(tl.float32)
    scale = fp8_scale(fp8_amax(fp8_amax(ws, 1), 0), POW2)
    tl.store(w_q + elements, fp8_round(ws, scale, POW2))
    tl.store(w_scale + block, scale)
