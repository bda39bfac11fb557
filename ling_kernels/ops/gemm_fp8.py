"""FP8 GEMM: D = A B^T, where the product over each 128 of K is scaled and added in fp32, in the order of K.

FP8 tensor cores of Hopper keep about 14 bits of a sum, hence the promotion to fp32 every 128. One kernel runs this op
and the grouped ones of grouped_gemm_fp8.py.
"""

from collections.abc import Callable
from contextvars import copy_context

import torch
from torch import Tensor
from torch.nn.functional import pad

from ..op import E4M3, expect, multiprocessors, op, rows_aligned, upcast, use_reference
from .quantize import BLOCK, row_scale_layout
from .transpose_fp8 import transpose_fp8
from .triton_fp8 import quantize_along
from .triton_import import tl, triton

ROWS = 16  # of a product of the reference at least


def gemm_fp8(
    a: Tensor,
    a_scale: Tensor,
    b: Tensor,
    b_scale: Tensor,
    out: Tensor | None = None,
    accumulate: bool = False,
    dtype: torch.dtype = torch.bfloat16,
    transposed: bool = False,
) -> Tensor:
    """a [M, K] e4m3, a_scale [M, K/128]; b [N, K] e4m3, b_scale [N/128, K/128] (a weight) or [N, K/128] -> [M, N].

    transposed: b is [K, N] and b_scale [K/128, N/128], and the result is a b: the backward pass with the weight of the
    forward pass. csrc/ transposes tiles after loading; Triton makes a whole copy first (`transpose_fp8`).
    The result is in dtype, or in out [M, N] (bf16 or fp32), to which accumulate adds. Not differentiable. Raises
    ValueError for shapes or dtypes that do not fit, and where K, or for a weight N, is no multiple of 128.
    """
    bt, bt_scale = (b.mT, b_scale.mT) if transposed and b.ndim > 1 and b_scale.ndim > 1 else (b, b_scale)
    expect_fp8(a, a_scale, bt, bt_scale)
    expect(a.ndim == b.ndim == 2, "a [M, K] and b [N, K]", a, b)
    expect(not transposed or bt_scale.shape[0] != len(bt), "b_scale [K/128, N/128] where b is transposed", b, b_scale)
    shape = (len(a), len(bt))
    fits = out is None or (out.shape == shape and out.is_floating_point() and out.dtype != E4M3)
    expect(fits, "out [M, N]", out, shape)
    expect(out is not None or not accumulate, "out where accumulate is given", out)
    if use_reference("gemm_fp8", a, a_scale, b_scale, out, unsupported=no_columns(a)):
        return gemm_fp8_ref(a, a_scale, b, b_scale, out, accumulate, dtype, transposed)
    d = torch.empty(shape, dtype=dtype, device=a.device) if out is None else out
    b_scale = b_scale if block_scales(bt, bt_scale) else column_major(b_scale)
    gemm_fp8_fwd(row_major(a), column_major(a_scale), row_major(b), b_scale, d, accumulate, transposed)
    return d


def gemm_fp8_ref(a, a_scale, b, b_scale, out=None, accumulate=False, dtype=torch.bfloat16, transposed=False):
    if transposed:
        b, b_scale = b.mT, b_scale.mT
    d = scaled_product(a, a_scale, b, b_scale)
    if out is None:
        return d if d.dtype == torch.float64 else d.to(dtype)
    return out.copy_(upcast(out) + d if accumulate else d)


def scaled_product(a: Tensor, a_scale: Tensor, b: Tensor, b_scale: Tensor) -> Tensor:
    """The definition: [..., M, K] times [..., N, K]^T in the scales' precision, fp32 or fp64, not yet rounded.

    Of at least ROWS rows: a CPU has other kernels for few, and a row's bits would depend on the number of rows.
    """
    M, K = a.shape[-2:]
    N = b.shape[-2]
    if b_scale.shape[-2] != N:
        b_scale = b_scale.repeat_interleave(BLOCK, -2)
    dtype = torch.promote_types(a_scale.dtype, b_scale.dtype)
    d = torch.zeros(*a.shape[:-2], M, N, dtype=dtype, device=a.device)
    with torch.autocast(a.device.type, enabled=False):
        for k in range(K // BLOCK):
            block = slice(k * BLOCK, (k + 1) * BLOCK)
            rows = pad(a[..., block].to(dtype), (0, 0, 0, max(ROWS - M, 0)))
            part = (rows @ b[..., block].to(dtype).mT)[..., :M, :]
            d = d + part * (a_scale[..., :, k, None] * b_scale[..., None, :, k])
    return d


def expect_fp8(a: Tensor, a_scale: Tensor, b: Tensor, b_scale: Tensor) -> None:
    """Check the operands of a product of FP8 rows with FP8 weights."""
    expect(a.dtype == b.dtype == E4M3, "e4m3 operands", a, b)
    fits = a.ndim >= 2 and b.ndim >= 2 and a.shape[-1] == b.shape[-1] and a.shape[-1] % BLOCK == 0
    expect(fits, "a [.., M, K] and b [.., N, K], K % 128 == 0", a, b)
    K = a.shape[-1] // BLOCK
    expect(a_scale.shape == (*a.shape[:-1], K), "a_scale [.., M, K/128]", a, a_scale)
    weight = b.shape[-2] % BLOCK == 0 and b_scale.shape == (*b.shape[:-2], b.shape[-2] // BLOCK, K)
    expect(weight or b_scale.shape == (*b.shape[:-1], K), "b_scale [.., N/128 or N, K/128]", b, b_scale)
    scales = all(s.dtype in (torch.float32, torch.float64) for s in (a_scale, b_scale))
    expect(scales, "fp32 scales", a_scale, b_scale)


def block_scales(b: Tensor, b_scale: Tensor) -> bool:
    """Whether b [.., N, K] has one scale for each 128 x 128, and not one for each 1 x 128."""
    return b_scale.shape[-2] * BLOCK == b.shape[-2]


def no_columns(a: Tensor) -> str | None:
    return None if a.shape[-1] else "a product over no columns (K = 0)"


def unsupported(a, a_scale, b, b_scale, d, accumulate, transposed) -> str | None:
    row_scales = transposed or block_scales(b, b_scale)
    return unsupported_operands((a, b), (a_scale,) if row_scales else (a_scale, b_scale)) or unsupported_result(d)


def unsupported_operands(operands, row_scales) -> str | None:
    """row_scales [rows, blocks]: those that TMA loads."""
    if not rows_aligned(*operands):
        return "operands whose rows do not start at multiples of 16 bytes"
    return None if rows_aligned(*[s.mT for s in row_scales]) else "row scales that TMA cannot load"


RESULTS = (torch.bfloat16, torch.float32, E4M3)


def unsupported_result(y: Tensor, groups: int = 1) -> str | None:
    if y.dtype not in RESULTS:
        return f"a result of {y.dtype}"
    if y.shape[-1] % 8 or any([stride % 8 for stride in y.stride()[:-1]]) or not rows_aligned(y):
        return "a result whose rows do not start at multiples of 8 elements and 16 bytes"
    return None if groups <= 512 else f"{groups} groups"


@op("d", cuda=unsupported)
def gemm_fp8_fwd(
    a: Tensor, a_scale: Tensor, b: Tensor, b_scale: Tensor, d: Tensor, accumulate: bool, transposed: bool
) -> None:
    if transposed:
        b, b_scale = transpose_fp8(b, b_scale)
    launch_gemm_fp8(a, a_scale, b[None], b_scale[None], d, accumulate=accumulate)


def launch_gemm_fp8(
    a: Tensor,  # [M, K]; with counts [G, max_m, K]
    a_scale: Tensor,
    b: Tensor,  # [G, N, K]
    b_scale: Tensor,
    y: Tensor,  # [S, N]; with y_scale [S, N/2] e4m3, the quantised SwiGLU of the product
    y_scale: Tensor | None = None,
    offsets: Tensor | None = None,  # [G + 1], or
    counts: Tensor | None = None,  # [G]; without either, all rows are one group
    source: Tensor | None = None,  # [S]: row s of the product takes row source[s] // topk of a
    topk: int = 1,
    accumulate: bool = False,
) -> None:
    if not y.numel():
        return
    G, N, K = b.shape
    max_m = 0
    if counts is not None:
        max_m = a.shape[1]
        a, a_scale, y = a.flatten(0, 1), a_scale.flatten(0, 1), y.flatten(0, 1)
    a, b = tma_operand(a), tma_operand(b.flatten(0, 1))
    tiles = min(G, len(y)) * triton.cdiv(y.shape[1], BLOCK)
    chosen = config(triton.cdiv(len(y), G), K, tiles, y_scale is not None, multiprocessors(a.device))
    block_m = chosen["BLOCK_M"]
    tiles_m = G * triton.cdiv(max_m, block_m) if max_m else len(y) // block_m + min(G, len(y))  # at most
    programs = min(tiles_m * triton.cdiv(y.shape[1], chosen["BLOCK_N"]), chosen.pop("programs"))
    launch_with_scratch(
        gemm_fp8_kernel[(programs,)], a, a_scale, b, b_scale, y, y_scale, offsets, counts, source,
        a.stride(0), *a_scale.stride(), b.stride(0), *b_scale.stride(), *y.stride(),
        0 if y_scale is None else y_scale.stride(1), len(a), N, K, G, max_m, topk,
        ROW_SCALES=b_scale.shape[1] == N, ACCUMULATE=accumulate, BLOCK_G=triton.next_power_of_2(G), **chosen,
    )  # fmt: skip


def config(rows: int, K: int, tiles: int, swiglu: bool, sms: int) -> dict:
    """Tiles for groups with `rows` rows on average, on an H200 (132 SMs) or an H20 (78); not measured.

    With few rows the weight is the MMA's M operand (SWAP): wgmma's M is 64 at least, and a tile may have 16 rows. A
    tile has 64 rows of the weight where tiles of 128 would be too few (`tiles`) to occupy all SMs. csrc/ has another
    kernel for up to 8 rows. An H20 has a quarter of the tensor rate at almost the same bandwidth, so rows of padding
    cost it more than reading twice.
    """
    swap = rows <= 32
    small = sms < 100 or rows <= 64 or K <= 1024
    block_m, warps, stages, per_sm = {
        (True, False): (16 if rows <= 16 else 32, 4, 5, 2),
        (True, True): (16 if rows <= 16 else 32, 4, 3, 2),
        (False, False): (64, 4, 4, 2) if small else (128, 8, 5, 1),
        (False, True): (64, 8, 4, 1),
    }[swap, swiglu]
    block_n = 128
    if swap and tiles < sms and not swiglu:
        block_n, stages = 64, 8
    return dict(
        SWAP=swap, BLOCK_M=block_m, BLOCK_N=block_n, BAND=16, num_warps=warps, num_stages=stages, programs=sms * per_sm
    )


def row_major(x: Tensor) -> Tensor:
    """x [rows, columns], or a copy where TMA cannot load its rows because of their strides, but can load a copy's."""
    fits = x.stride(1) == 1 and x.stride(0) * x.element_size() % 16 == 0 or x.shape[1] * x.element_size() % 16
    return x if fits else x.clone(memory_format=torch.contiguous_format)


def column_major(scale: Tensor) -> Tensor:
    """scale [rows, blocks], or a copy with the strides that TMA can load: rows contiguous, blocks 16 bytes apart."""
    return scale if scale.stride(0) == 1 and scale.stride(1) % 4 == 0 else row_scale_layout(scale)


def tma_compatible(x: Tensor) -> bool:
    """Whether a TMA descriptor can describe x: the last dimension contiguous, all others and the start on 16 bytes."""
    steps = [x.data_ptr(), *(stride * x.element_size() for stride in x.stride()[:-1])]
    return x.stride(-1) == 1 and x.numel() > 0 and all(step % 16 == 0 and step > 0 for step in steps)


def tma_operand(x: Tensor) -> Tensor:
    return x if tma_compatible(x) else x.clone(memory_format=torch.contiguous_format)


def launch_with_scratch(kernel: Callable, x: Tensor, *args, **constants) -> None:
    """kernel(x, *args) for a Triton kernel that makes TMA descriptors: they need scratch memory from an allocator.

    Triton looks for the allocator in the current context. A copy of the context leaves the user's allocator unchanged.
    """

    def launch():
        triton.set_allocator(lambda size, alignment, stream: torch.empty(size, dtype=torch.int8, device=x.device))
        kernel(x, *args, **constants)

    copy_context().run(launch) if x.is_cuda else kernel(x, *args, **constants)


@triton.jit
def find_group(tile, tiles, ends):
    """The group that owns the tile, and the tile's number in the group, for ends = cumsum(tiles of each group)."""
    passed = ends <= tile
    return tl.sum(passed.to(tl.int32)), tile - tl.sum(tl.where(passed, tiles, 0))


@triton.jit
def tile_position(tile, tiles_m, tiles_n, BAND: tl.constexpr):
    """Tile -> (m, n): down the rows of a band of BAND tiles, then to the next columns, so the band stays in L2."""
    band = tile // (BAND * tiles_n)
    height = tl.minimum(tiles_m - band * BAND, BAND)
    rest = tile - band * BAND * tiles_n
    return band * BAND + rest % height, rest // height


@triton.jit
def scaled_part(x, w, xs, ws, ROW_SCALES: tl.constexpr, SWAP: tl.constexpr):
    """x [BLOCK_M, 128] w [BLOCK_N, 128]^T times the scales xs and ws; transposed with SWAP."""
    if SWAP:
        return tl.dot(w, x.T) * (xs[None, :] * ws[:, None] if ROW_SCALES else (xs * ws)[None, :])
    else:
        return tl.dot(x, w.T) * (xs[:, None] * ws[None, :] if ROW_SCALES else (xs * ws)[:, None])


@triton.jit
def gemm_fp8_kernel(
    a, a_scale, b, b_scale, y, y_scale, offsets, counts, source,
    lda, a_scale_m, a_scale_k, ldb, b_scale_g, b_scale_n, b_scale_k, ldy, y_n, y_scale_k, M, N, K, G, max_m, topk,
    ROW_SCALES: tl.constexpr, ACCUMULATE: tl.constexpr, SWAP: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_G: tl.constexpr, BAND: tl.constexpr,
):  # fmt: skip
    SWIGLU: tl.constexpr = y_scale is not None
    GROUPS: tl.constexpr = offsets is not None or counts is not None
    if source is None:
        A = tl.make_tensor_descriptor(a, [M, K], [lda, 1], [BLOCK_M, 128])
    B = tl.make_tensor_descriptor(b, [G * N, K], [ldb, 1], [BLOCK_N, 128])
    width = N // 2 if SWIGLU else N
    tiles_n = tl.cdiv(width, BLOCK_N)
    up_scale = (
        tl.cast(width if ROW_SCALES else width // 128, tl.int64) * b_scale_n
    )  # distance from a gate's scale to its up's

    # Programs share the tiles of all groups evenly: each takes every num_programs-th.
    total = tl.cdiv(M, BLOCK_M) * tiles_n
    if GROUPS:
        g = tl.arange(0, BLOCK_G)
        if counts is not None:
            sizes = tl.load(counts + g, mask=g < G, other=0)
        else:
            sizes = tl.load(offsets + g + 1, mask=g < G, other=0) - tl.load(offsets + g, mask=g < G, other=0)
        tiles = tl.cdiv(sizes, BLOCK_M) * tiles_n
        ends = tl.cumsum(tiles)
        total = tl.sum(tiles)

    for tile in range(tl.program_id(0), total, tl.num_programs(0)):
        group, tile_in_group, m0, m1 = 0, tile, 0, M
        if GROUPS:
            group, tile_in_group = find_group(tile, tiles, ends)
            if counts is not None:
                m0 = group * max_m
                m1 = m0 + tl.load(counts + group)
            else:
                m0, m1 = tl.load(offsets + group), tl.load(offsets + group + 1)
        tile_m, tile_n = tile_position(tile_in_group, tl.cdiv(m1 - m0, BLOCK_M), tiles_n, BAND)
        m, n = m0 + tile_m * BLOCK_M, tile_n * BLOCK_N
        rows, columns = m + tl.arange(0, BLOCK_M), n + tl.arange(0, BLOCK_N)
        valid = rows < m1  # a tile may read rows of the next group; it never writes them
        source_rows = rows.to(tl.int64)
        if source is not None:
            source_rows = (tl.load(source + rows, mask=valid, other=0) // topk).to(tl.int64)
            x_pointers = a + source_rows[:, None] * lda + tl.arange(0, 128)[None, :]

        # Scales are loaded one step ahead to hide their latency.
        xs_pointers = a_scale + source_rows * a_scale_m
        ws_columns = columns if ROW_SCALES else n // 128
        ws_pointers = b_scale + tl.cast(group, tl.int64) * b_scale_g + ws_columns.to(tl.int64) * b_scale_n
        in_width = columns < N if ROW_SCALES else K > 0
        next_xs = tl.load(xs_pointers, mask=valid, other=0.0)
        next_ws = tl.load(ws_pointers, mask=in_width, other=0.0)
        next_us = tl.load(ws_pointers + up_scale, mask=in_width, other=0.0) if SWIGLU else 0.0
        acc = tl.zeros((BLOCK_N, BLOCK_M) if SWAP else (BLOCK_M, BLOCK_N), tl.float32)
        up = acc
        for k in range(0, K // 128):
            xs, ws, us = next_xs, next_ws, next_us
            more = k + 1 < K // 128
            xs_pointers += a_scale_k
            ws_pointers += b_scale_k
            next_xs = tl.load(xs_pointers, mask=valid & more, other=0.0)
            next_ws = tl.load(ws_pointers, mask=in_width & more, other=0.0)
            if source is None:
                x = A.load([m, k * 128])
            else:
                x = tl.load(x_pointers + k * 128, mask=valid[:, None], other=0.0)
            acc += scaled_part(x, B.load([group * N + n, k * 128]), xs, ws, ROW_SCALES, SWAP)
            if SWIGLU:
                next_us = tl.load(ws_pointers + up_scale, mask=in_width & more, other=0.0)
                up += scaled_part(x, B.load([group * N + width + n, k * 128]), xs, us, ROW_SCALES, SWAP)

        if SWAP:
            acc = acc.T
        y_pointers = y + rows.to(tl.int64)[:, None] * ldy + columns.to(tl.int64)[None, :] * y_n
        mask = valid[:, None] & (columns < width)[None, :]
        if SWIGLU:
            if SWAP:
                up = up.T
            q, scale = quantize_along(acc * tl.sigmoid(acc) * up, 1, False)
            tl.store(y_pointers, q, mask=mask)
            tl.store(y_scale + tile_n.to(tl.int64) * y_scale_k + rows, scale, mask=valid)
        else:
            if ACCUMULATE:
                acc += tl.load(y_pointers, mask=mask, other=0.0).to(tl.float32)
            tl.store(y_pointers, acc, mask=mask)
