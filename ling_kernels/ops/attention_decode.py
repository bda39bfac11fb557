"""Attention of a few new tokens over a paged cache of keys and values, and writes of tokens into that cache.

Query i of the n new tokens of a sequence with `length` cached tokens (those n included) sees keys 0 .. length - n + i.

The kernels number the tiles of keys of all sequences and give each of W programs (for each KV head) an equal run of
them. Programs find their runs from the lengths on the device: a run may be part of a long sequence or hold many short
ones. Program w stores its result for sequence b in slot w + b of `partial`. w and b both ascend along the runs, so no
two pairs share a slot. The partial results of a sequence are combined in order, by a second kernel or, in csrc/, by the
last of its programs.
"""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..op import E4M3, expect, multiprocessors, op, rows_aligned, upcast, use_reference, values_on_host
from .attention import attend, block_d
from .attention_decode_kernels import attention_decode_combine_kernel, attention_decode_kernel
from .quantize import quantize_blocks
from .triton_import import triton
from .unpermute import clear_rows

TILE = 64  # keys that a program has at least, except with fp32


class KVCache(NamedTuple):
    """Pages of keys and values of one layer; token t of a sequence is in page block_table[t // block_size].

    bf16, fp16 or fp32 without scales, or e4m3 with one scale per token and head (multiply to dequantise).
    """

    k: Tensor  # [num_blocks, block_size, Hkv, D]
    v: Tensor  # as k
    k_scale: Tensor | None = None  # [num_blocks, block_size, Hkv] fp32
    v_scale: Tensor | None = None  # as k_scale


def attention_decode(
    q: Tensor, cache: KVCache, block_table: Tensor, lengths: Tensor, scale: float | None = None
) -> Tensor:
    """q [B, n, Hq, D] (n = 1..8 new tokens), block_table [B, max_blocks] int32, lengths [B] int32 -> out as q.

    The cache already holds the keys and values of the new tokens, and lengths count them. Hkv divides Hq; scale
    defaults to 1 / sqrt(D). Softmax in fp32. Pages and cells past a sequence's length may hold anything; a query that
    sees no key (a row of length 0) gives 0. No gradient. Deterministic; the bits depend on the lengths of the batch,
    which determine where sequences are split. Raises ValueError for another shape or dtype, and on a CPU for a length
    beyond the table or a page outside the cache. On a GPU csrc/ built with LING_DEBUG=1 stops at them; otherwise tokens
    past the table are not seen and pages are clamped into the cache.
    """
    B, n, Hq, D = q.shape if q.ndim == 4 else (-1, 0, 0, 0)
    expect(B >= 0 and 1 <= n <= 8 and D > 0 and q.is_floating_point(), "q [B, n, Hq, D] with n in 1..8 and D > 0", q)
    expect_cache(cache)
    num_blocks, block_size, Hkv, _ = cache.k.shape
    expect(cache.k.shape[3] == D and Hkv > 0 and Hq > 0 and Hq % Hkv == 0, "a cache of q's D whose Hkv divides Hq",
           q, cache.k)  # fmt: skip
    expect_table(block_table, lengths, q, cache)
    scale = D**-0.5 if scale is None else scale
    if use_reference("attention_decode", q, cache.k):
        return attention_decode_ref(q, cache, block_table, lengths, scale)
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    if 0 in (B, num_blocks, block_size, block_table.shape[1]):
        return out.zero_()
    attention_decode_fwd(
        q.detach().contiguous(), *cache, block_table.contiguous(), lengths.contiguous(), out,
        *scratch(out, cache, block_table), scale,
    )  # fmt: skip
    return out


@torch.no_grad()
def attention_decode_ref(q, cache, block_table, lengths, scale):
    B, n, Hq, D = q.shape
    num_blocks, block_size, Hkv, _ = cache.k.shape
    columns = block_table.shape[1]
    if B and values_on_host(lengths):  # pages past the longest sequence need not be read
        columns = min(columns, -(-int(lengths.max()) // block_size))
    if not (B and columns and block_size and num_blocks):
        return torch.zeros_like(q)
    pages, N = block_table[:, :columns].clamp(0, num_blocks - 1), columns * block_size  # those at the end: anything
    k, v = (
        read_cells(cells, scales, pages, upcast(q).dtype)  # [B, columns, block_size, Hkv, D]
        for cells, scales in ((cache.k, cache.k_scale), (cache.v, cache.v_scale))
    )
    ends = lengths[:, None] - torch.arange(n - 1, -1, -1, device=q.device)  # [B, n]: how many keys each token sees
    hidden = torch.arange(N, device=q.device) >= ends[..., None]  # [B, n, N]
    clear_rows(v.view(B * N, -1), hidden[:, -1].flatten())  # what no token sees: P is 0 there, but 0 * NaN is NaN
    # A product with a transposed view would copy it element by element.
    k, v = (x.view(B, N, Hkv, D).transpose(1, 2).contiguous() for x in (k, v))
    if n > 1:
        hidden = hidden.repeat_interleave(Hq // Hkv, 1)
    rows = upcast(q).view(B, n, Hkv, -1, D).transpose(1, 2).flatten(2, 3)  # [B, Hkv, n * G, D]
    with torch.autocast(q.device.type, enabled=False):
        out, _ = attend(rows, k, v, hidden[:, None], scale, q.dtype)
    return out.view(B, Hkv, n, -1, D).transpose(1, 2).reshape(q.shape).to(q.dtype)


def read_cells(cells: Tensor, scale: Tensor | None, index: Tensor, dtype: torch.dtype) -> Tensor:
    """cells[index] in dtype, dequantised if there is a scale."""
    if scale is None:
        return rows_at(cells, index).to(dtype)
    x = rows_at(cells.view(torch.uint8), index).view(E4M3).to(torch.promote_types(dtype, torch.float32))
    return (x * rows_at(scale, index)[..., None]).to(dtype)


def rows_at(x: Tensor, index: Tensor) -> Tensor:
    """x[index]. On a CPU index_select copies whole rows, and indexing element by element."""
    return x.index_select(0, index.flatten()).view(*index.shape, *x.shape[1:])


def append(cache: KVCache, k: Tensor, v: Tensor, slots: Tensor) -> None:
    """Write k and v [T, Hkv, D] into the cache in place, quantised if it is FP8; no gradient.

    slots [T] int64 are distinct: page * block_size + offset of each token. Raises ValueError for another shape or
    dtype, and on a CPU for a slot outside the cache.
    """
    expect(k.ndim == 3 and k.shape == v.shape, "k and v [T, Hkv, D]", k, v)
    expect_slots(cache, slots, *k.shape)
    write(cache, k, v, slots)


def write(cache: KVCache, k: Tensor, v: Tensor, slots: Tensor) -> None:
    """`append` of what has been checked."""
    for x, cells, scales in ((k, cache.k, cache.k_scale), (v, cache.v, cache.v_scale)):
        x = x.detach()
        if scales is None:
            cells.view(-1, *x.shape[1:]).index_copy_(0, slots, x.to(cells.dtype))
            continue
        x_q, x_scale = quantize_blocks(upcast(x), 1, x.shape[-1], pow2=False)
        cells.view(torch.uint8).view(-1, *x.shape[1:]).index_copy_(0, slots, x_q.view(torch.uint8))
        scales.view(-1, x.shape[1]).index_copy_(0, slots, x_scale[..., 0].to(scales.dtype))


def read(cache: KVCache, slots: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """k and v [T, Hkv, D] in dtype from slots [T] int64 of the cache."""
    k, v, *scales = (t if t is None else t.flatten(0, 1) for t in cache)
    return read_cells(k, scales[0], slots, dtype), read_cells(v, scales[1], slots, dtype)


def expect_slots(cache: KVCache, slots: Tensor, T: int, Hkv: int, D: int) -> None:
    """Check a cache with cells [Hkv, D], and slots for T tokens in it."""
    expect_cache(cache)
    expect(cache.k.shape[2:] == (Hkv, D), f"a cache with cells [{Hkv}, {D}]", cache.k)
    expect(slots.shape == (T,) and slots.dtype == torch.int64, f"slots [{T}] int64", slots)
    if T and values_on_host(slots):
        inside = slots.min() >= 0 and slots.max() < cache.k.shape[0] * cache.k.shape[1]
        expect(bool(inside), "slots of the cache", int(slots.min()), int(slots.max()), cache.k)


def expect_cache(cache: KVCache) -> None:
    k, v, k_scale, v_scale = cache
    expect(k.ndim == 4 and v.shape == k.shape and v.dtype == k.dtype and k.is_contiguous() and v.is_contiguous(),
           "contiguous cache.k and cache.v [num_blocks, block_size, Hkv, D]", k, v)  # fmt: skip
    if k.dtype != E4M3:
        expect(k.is_floating_point() and k_scale is None and v_scale is None,
               "a cache in bf16, fp16 or fp32 without scales, or in e4m3 with them", *cache)  # fmt: skip
        return
    expect(k_scale is not None and v_scale is not None and k_scale.shape == v_scale.shape == k.shape[:3]
           and k_scale.is_contiguous() and v_scale.is_contiguous()
           and k_scale.dtype == v_scale.dtype and k_scale.dtype in (torch.float32, torch.float64),
           "contiguous k_scale and v_scale [num_blocks, block_size, Hkv] fp32 with an e4m3 cache", *cache)  # fmt: skip


def expect_table(block_table: Tensor, lengths: Tensor, q: Tensor, cache: KVCache) -> None:
    ints = block_table.dtype == lengths.dtype == torch.int32
    fits = block_table.ndim == 2 and len(block_table) == len(q) and lengths.shape == q.shape[:1]
    expect(ints and fits, "block_table [B, max_blocks] and lengths [B], int32", block_table, lengths, q)
    if not values_on_host(lengths):
        return
    (num_blocks, block_size), columns = cache.k.shape[:2], block_table.shape[1]
    table, ends = block_table.numpy(), lengths.numpy()  # on few numbers numpy takes a fifth of torch's time
    if not table.size:
        return expect(not ends.any(), "lengths that block_table holds", lengths, block_table)
    fits = ends.min() >= 0 and ends.max() <= columns * block_size
    expect(fits, "lengths that block_table holds", ends, block_table, block_size)
    if table.min() < 0 or table.max() >= num_blocks:  # columns past a sequence's end may hold anything
        used = table[np.arange(columns) * block_size < ends[:, None]]
        expect(((0 <= used) & (used < num_blocks)).all(), f"pages in 0..{num_blocks - 1}", used.tolist())


def scratch(out: Tensor, cache: KVCache, block_table: Tensor, appends: bool = False) -> tuple[Tensor, Tensor]:
    """partial [W + B, Hkv, n * G, D] and lse_log2 [W + B, Hkv, n * G], the base-2 log-sum-exp; fp32."""
    (B, n, Hq, D), Hkv = out.shape, cache.k.shape[2]
    rows = n * Hq // Hkv
    tiles = triton.cdiv(rows, config(out.dtype, cache.k.dtype, rows, appends)["BLOCK_M"])
    W = programs(B, block_table.shape[1] * cache.k.shape[1], Hkv * tiles, resident_programs(out.device))
    partial = torch.empty(W + B, Hkv, rows, D, dtype=torch.float32, device=out.device)
    return partial, partial.new_empty(partial.shape[:3])


def programs(B: int, cells: int, tiles: int, resident: int) -> int:
    """How many programs share the keys of each of `tiles` of rows: as many as fit the GPU, with a tile of keys each."""
    return max(min(resident // tiles, B * triton.cdiv(cells, TILE)), 1)


def resident_programs(device: torch.device) -> int:
    return PER_SM * multiprocessors(device)


# As kernels_on in backend.py: torch.compile calls it while it traces, and does not look inside.
resident_programs._dynamo_marked_constant = True  # type: ignore[attr-defined]


def unsupported(q, k, v, k_scale, v_scale, block_table, lengths, out, partial, *others) -> str | None:
    return unsupported_cache(q, k, v, k_scale, v_scale, out, partial)


@op("out", "partial", "lse_log2", cuda=unsupported)
def attention_decode_fwd(
    q: Tensor, k: Tensor, v: Tensor, k_scale: Tensor | None, v_scale: Tensor | None, block_table: Tensor,
    lengths: Tensor, out: Tensor, partial: Tensor, lse_log2: Tensor, scale: float,
) -> None:  # fmt: skip
    """partial and lse_log2 come from `scratch`."""
    launch_decode(q, k, v, k_scale, v_scale, block_table, lengths, out, partial, lse_log2, scale)


def launch_decode(
    q: Tensor, k: Tensor, v: Tensor, k_scale: Tensor | None, v_scale: Tensor | None, block_table: Tensor,
    lengths: Tensor, out: Tensor, partial: Tensor, lse_log2: Tensor, scale: float,
    norm: tuple = (None, None, None, None), eps: float = 0.0,
    out_q: Tensor | None = None, out_scale: Tensor | None = None,
) -> None:  # fmt: skip
    """With norm (q_weight, k_weight, cos, sin) q is qkv, and the kernel also appends its keys and values to the cache.
    With out_q [B n, Hq D] and out_scale the kernel also writes out in FP8.
    """
    (B, n, Hq, D), (num_blocks, page, Hkv, _) = out.shape, k.shape
    W, max_blocks, rows = len(partial) - B, block_table.shape[1], n * Hq // Hkv
    c = config(q.dtype, k.dtype, rows, norm[0] is not None)
    P, half = (0, 0) if norm[2] is None else norm[2].shape
    sizes = dict(D=D, HKV=Hkv, G=Hq // Hkv, BLOCK_B=triton.next_power_of_2(B), BLOCK_D=block_d(D))
    attention_decode_kernel[(W, Hkv * triton.cdiv(rows, c["BLOCK_M"]))](
        q, k, v, k_scale, v_scale, block_table, lengths, partial, lse_log2, *norm, scale, eps, P, B, W, n, max_blocks,
        num_blocks, HALF=half, PAGE=page, **sizes, **c,
    )  # fmt: skip
    attention_decode_combine_kernel[(B, Hkv * rows)](
        partial, lse_log2, lengths, out, out_q, out_scale, 0 if out_q is None else out_scale.stride(1), B, W, n,
        max_blocks * page, BLOCK_N=c["BLOCK_N"], BLOCK_P=32, num_warps=4, **sizes,
    )  # fmt: skip


ROWS = 16  # queries of a KV head that a block of csrc/'s kernel has


def unsupported_cache(q, k, v, k_scale, v_scale, out, partial) -> str | None:
    """What csrc/ does not support, in words: new tokens q (queries, or qkv) and a cache.

    csrc/ reads the cache again for every 16 rows of a KV head. Triton's kernel does so too where the cache is FP8, but
    holds up to 64 rows otherwise.
    """
    if q.dtype not in (torch.bfloat16, torch.float16) or k.dtype not in (q.dtype, E4M3):
        return f"{q.dtype} tokens with a cache in {k.dtype}".replace("torch.", "")
    if k_scale is not None and not k_scale.dtype == v_scale.dtype == torch.float32:
        return "scales of the cache that are not fp32"
    if q.shape[3] != 128 or k.shape[1] % 16:
        return f"heads of {q.shape[3]} in pages of {k.shape[1]}, but heads of 128 in pages of multiples of 16"
    rows = out.shape[1] * out.shape[2] // k.shape[2]
    if k.dtype != E4M3 and rows > ROWS:
        return f"{rows} queries of a KV head, more than {ROWS}, with a cache that is not FP8"
    return None if rows_aligned(q, k, v, out, partial) else "rows that do not start at multiples of 16 bytes"


PER_SM = 2  # resident programs of an SM, Triton's or csrc/'s


def config(dtype: torch.dtype, cache: torch.dtype, rows: int, appends: bool = False) -> dict:
    """Rows (new tokens times heads that share keys) and keys of a program's tile. Not measured.

    Two programs of an SM have at least 64 KB of bf16 in flight, or 32 KB of FP8; bandwidth times latency is about 25 KB
    on an H200 and 36 KB on an H20. So both GPUs use the same tiles, and differ in the number of programs. Larger tiles
    spill registers: with FP8 above 16 rows, because its converted values are the left factor, in registers; in the
    kernel that norms and appends above 32 rows, or above 32 keys of FP8. fp32 has no tensor cores here, and needs 8
    warps to not spill.
    """
    if torch.float32 in (dtype, cache) or dtype != cache != E4M3:
        return dict(BLOCK_M=16, BLOCK_N=16, num_warps=8, num_stages=1)
    most = 16 if cache == E4M3 else 32 if appends else 64
    block_m = min(max(triton.next_power_of_2(rows), 16), most)
    block_n, stages = (32, 8) if appends and cache == E4M3 else (64, 5)
    return dict(BLOCK_M=block_m, BLOCK_N=block_n, num_warps=4, num_stages=stages)
