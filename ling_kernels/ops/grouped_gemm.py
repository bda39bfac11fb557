"""Grouped GEMM: y[s] = b[e] a[s] for every row s of expert e, accumulated in fp32 and rounded once."""

import torch
from torch import Tensor

from ..backend import backend
from ..op import (
    autocast,
    expect,
    first_derivative_only,
    multiprocessors,
    note_choice,
    op,
    upcast,
    use_reference,
)
from .deferred import now_or_later
from .dispatch import expect_offsets
from .gemm_fp8 import find_group, launch_with_scratch, tile_position, tma_compatible
from .grouped_wgrad import grouped_mm_on_cpu, grouped_wgrad
from .triton_import import tl, triton


def grouped_gemm(
    a: Tensor, b: Tensor, offsets: Tensor, dtype: torch.dtype | None = None, batch_invariant: bool = False
) -> Tensor:
    """a [S, K], b [E, N, K] of one dtype, offsets [E + 1] int32 -> y [S, N] in dtype, by default theirs (autocast's
    where it is on).

    Expert e owns rows offsets[e] : offsets[e + 1]; empty experts are legal. Rows of y past offsets[E] are undefined and
    rows of a past it are never read; their gradient is 0. batch_invariant: on a GPU Triton's kernel runs, never
    torch's, so that the bits of a row of bf16 depend on that row and b[e] alone. Gradients: to a and b. Raises
    ValueError for shapes or dtypes that do not fit. Backend torch reads the offsets on the host, as do fp64 operands.
    """
    a, b = autocast(a, b)
    fits = a.ndim == 2 and b.ndim == 3 and a.shape[1] == b.shape[2] and a.dtype == b.dtype and a.is_floating_point()
    expect(fits, "a [S, K] and b [E, N, K] of one dtype", a, b)
    expect_offsets(offsets, len(b), len(a))
    return GroupedGemm.apply(a, b, offsets, dtype, batch_invariant)


def grouped_gemm_ref(a, b, offsets, dtype=None, batch_invariant=False):
    rows = offsets.diff().tolist()
    # split and unbind: the gradient of an index would be a zero tensor as large as b for every expert
    *groups, rest = a.split([*rows, len(a) - sum(rows)])
    with torch.autocast(a.device.type, enabled=False):
        parts = [upcast(x) @ upcast(w).T for x, w in zip(groups, b.unbind(), strict=True)]
    return torch.cat([*parts, upcast(a).new_zeros(len(rest), b.shape[1])]).to(dtype or a.dtype)


class GroupedGemm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, a, b, offsets, dtype=None, batch_invariant=False):
        ctx.save_for_backward(a, b, offsets)
        return grouped_product(a, b, offsets, False, dtype, batch_invariant)

    @staticmethod
    @first_derivative_only
    def backward(ctx, dy):
        a, b, offsets = ctx.saved_tensors
        dy = dy.to(a.dtype).contiguous()
        da = db = None
        if ctx.needs_input_grad[0]:
            da = grouped_product(dy, b.mT, offsets, True)
        if ctx.needs_input_grad[1]:
            db = now_or_later(ctx, 1, lambda: grouped_wgrad(dy, a, offsets, dtype=b.dtype))
        return da, db, None, None, None


def grouped_product(
    a: Tensor, b: Tensor, offsets: Tensor, zero_rest: bool = False, dtype: torch.dtype | None = None,
    batch_invariant: bool = False,
) -> Tensor:  # fmt: skip
    """zero_rest: the rows of no expert become 0; otherwise they may stay as they were in memory."""
    dtype = dtype or a.dtype
    others = dtype == a.dtype and not batch_invariant  # torch's kernels
    if others and grouped_mm_on_cpu(offsets, a, b if b.stride(-1) == 1 else b.mT):
        y = torch.nn.functional.grouped_mm(a, b.mT, offs=offsets[1:])
        if (rows := int(offsets[-1])) < len(y):
            y[rows:] = 0
        return y
    if use_reference("grouped_gemm", a, b):
        y = a.new_empty(len(a), b.shape[1], dtype=dtype)
        grouped_gemm_ref_fwd(a, b, offsets, y)
        return y
    if others and grouped_mm_runs(a, b):
        note_choice("grouped_gemm", "torch.nn.functional.grouped_mm")
        y = torch.nn.functional.grouped_mm(a.contiguous(), b.mT, offs=offsets[1:])
        unowned = torch.arange(len(y), device=y.device) >= offsets[-1]
        return y.masked_fill(unowned[:, None], 0) if zero_rest else y
    y = a.new_empty(len(a), b.shape[1], dtype=dtype)
    grouped_gemm_fwd(a, b, offsets, y, zero_rest)
    return y


def grouped_mm_runs(a: Tensor, b: Tensor) -> bool:
    """Whether torch's grouped_mm runs: bf16 on a GPU, rows of a multiple of 16 bytes, fewer groups than 1024 (torch's
    GroupMM.cu), and Triton not asked for."""
    fits = a.is_cuda and a.dtype == torch.bfloat16 and a.numel() > 0 and b.shape[1] % 8 == b.shape[2] % 8 == 0
    return fits and len(b) < 1024 and backend(a) != "triton"


@op("y", runs="torch")
def grouped_gemm_ref_fwd(a: Tensor, b: Tensor, offsets: Tensor, y: Tensor) -> None:
    """The reference without its copies; the host reads the offsets. Rows of no expert become 0."""
    bounds = offsets.tolist()
    with torch.autocast(a.device.type, enabled=False):
        for e, (lo, hi) in enumerate(zip(bounds, bounds[1:], strict=False)):
            if lo < hi:
                y[lo:hi] = upcast(a[lo:hi]) @ upcast(b[e]).T
    y[bounds[-1] :] = 0


@op("y")
def grouped_gemm_fwd(a: Tensor, b: Tensor, offsets: Tensor, y: Tensor, zero_rest: bool) -> None:
    if not y.numel():
        return
    E, N, K = b.shape
    tma = tma_compatible(a) and (tma_compatible(b) or tma_compatible(b.mT))
    tiles = min(E, len(a)) * triton.cdiv(N, 128)
    chosen = config(a.dtype, triton.cdiv(len(a), E), tiles, tma and tma_compatible(y), multiprocessors(a.device))
    tiles_m = len(a) // chosen["BLOCK_M"] + min(E + 1, len(a))  # at most
    programs = min(tiles_m * triton.cdiv(N, chosen["BLOCK_N"]), chosen.pop("programs"))
    launch_with_scratch(
        grouped_gemm_kernel[(programs,)], a, b, offsets, y, *a.stride(), *b.stride(), *y.stride(), len(a), N, K, E,
        TMA=tma, K_INSIDE=b.stride(2) == 1, ZERO_REST=zero_rest,
        BLOCK_G=triton.next_power_of_2(E + 1), **chosen,
    )  # fmt: skip


def config(dtype: torch.dtype, rows: int, tiles: int, tma: bool, sms: int) -> dict:
    """Tiles for experts with `rows` rows on average, on an H200 (132 SMs) or an H20 (78); see gemm_fp8.py's config.

    Without tma, elements are moved one by one, and their addresses fill the registers. Whatever the tile, an element of
    a bf16 product is one chain of wgmma over K, 16 elements each, from 0 on: batch_invariant relies on it.
    """
    swap = rows <= 32 and tma and dtype != torch.float32
    block_m, block_n, block_k, warps, stages, per_sm = (  # not measured
        (32, 64, 32, 4, 3, 2) if dtype == torch.float32
        else (64, 64, 32, 4, 3, 2) if not tma
        else (16 if rows <= 16 else 32, 64, 64, 4, 8, 2) if swap and tiles < sms
        else (16 if rows <= 16 else 32, 128, 64, 4, 5, 2) if swap
        else (64, 128, 64, 4, 4, 2) if rows <= 64 or sms < 100
        else (128, 256, 64, 8, 4, 1)
    )  # fmt: skip
    return dict(
        SWAP=swap, BLOCK_M=block_m, BLOCK_N=block_n, BLOCK_K=block_k, BAND=16,
        num_warps=warps, num_stages=stages, programs=sms * per_sm,
    )  # fmt: skip


@triton.jit
def grouped_gemm_kernel(
    a, b, offsets, y, a_m, a_k, b_g, b_n, b_k, y_m, y_n, S, N, K, G,
    TMA: tl.constexpr, K_INSIDE: tl.constexpr, ZERO_REST: tl.constexpr, SWAP: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_G: tl.constexpr, BAND: tl.constexpr,
):  # fmt: skip
    if TMA:
        A = tl.make_tensor_descriptor(a, [S, K], [a_m, 1], [BLOCK_M, BLOCK_K])
        if K_INSIDE:
            B = tl.make_tensor_descriptor(b, [G, N, K], [b_g, b_n, 1], [1, BLOCK_N, BLOCK_K])
        else:
            B = tl.make_tensor_descriptor(b, [G, K, N], [b_g, b_k, 1], [1, BLOCK_K, BLOCK_N])

    # Programs share the tiles of all groups evenly. With ZERO_REST the rows of no expert are one more group, whose
    # product is empty.
    g = tl.arange(0, BLOCK_G)
    groups = G + 1 if ZERO_REST else G
    starts = tl.load(offsets + g, mask=g <= G, other=0)
    stops = tl.where(g < G, tl.load(offsets + g + 1, mask=g < G, other=0), S)
    tiles_n = tl.cdiv(N, BLOCK_N)
    tiles = tl.where(g < groups, tl.cdiv(stops - starts, BLOCK_M) * tiles_n, 0)
    ends = tl.cumsum(tiles)
    for tile in range(tl.program_id(0), tl.sum(tiles), tl.num_programs(0)):
        group, tile_in_group = find_group(tile, tiles, ends)
        m0 = tl.load(offsets + group)
        m1 = tl.load(offsets + group + 1, mask=group < G, other=S)
        tile_m, tile_n = tile_position(tile_in_group, tl.cdiv(m1 - m0, BLOCK_M), tiles_n, BAND)
        m, n = m0 + tile_m * BLOCK_M, tile_n * BLOCK_N
        rows, columns = m + tl.arange(0, BLOCK_M), n + tl.arange(0, BLOCK_N)
        valid = rows < m1  # a tile may read rows of the next group; it never writes them

        a_pointers = a + rows.to(tl.int64)[:, None] * a_m
        b_pointers = b + group.to(tl.int64) * b_g + columns.to(tl.int64)[None, :] * b_n
        acc = tl.zeros((BLOCK_N, BLOCK_M) if SWAP else (BLOCK_M, BLOCK_N), tl.float32)
        for k in range(0, tl.where(group < G, K, 0), BLOCK_K):
            if TMA:
                x = A.load([m, k])
                if K_INSIDE:
                    w = B.load([group, n, k]).reshape(BLOCK_N, BLOCK_K).T
                else:
                    w = B.load([group, k, n]).reshape(BLOCK_K, BLOCK_N)
            else:
                ks = (k + tl.arange(0, BLOCK_K)).to(tl.int64)
                x = tl.load(a_pointers + ks[None, :] * a_k, mask=valid[:, None] & (ks < K)[None, :], other=0.0)
                w = tl.load(b_pointers + ks[:, None] * b_k, mask=(ks < K)[:, None] & (columns < N)[None, :], other=0.0)
            if SWAP:
                acc = tl.dot(w.T, x.T, acc)
            else:
                acc = tl.dot(x, w, acc, input_precision="ieee")
        if SWAP:
            acc = acc.T
        y_pointers = y + rows.to(tl.int64)[:, None] * y_m + columns.to(tl.int64)[None, :] * y_n
        tl.store(y_pointers, acc, mask=valid[:, None] & (columns < N)[None, :])
