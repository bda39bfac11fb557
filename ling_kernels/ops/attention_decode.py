"""Attention of a few new tokens over a paged cache of keys and values, and how tokens enter that cache.

Query i of the n new tokens of a sequence with `length` cached tokens (those n included) sees keys 0 .. length - n + i.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from ..op import E4M3, expect, wide
from .attention import attend
from .quantize import quantize_blocks


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

    The keys and values of the new tokens are in the cache already and counted in lengths. Hkv divides Hq; scale is
    1 / sqrt(D) unless given. Softmax in fp32. Pages and cells past a sequence's length may hold anything; a query that
    sees no key (a row of length 0) gives 0. No gradient. Raises ValueError for another shape or dtype.
    """
    B, n, Hq, D = q.shape if q.ndim == 4 else (-1, 0, 0, 0)
    expect(B >= 0 and 1 <= n <= 8 and q.is_floating_point(), "q [B, n, Hq, D] with n in 1..8", q)
    expect_cache(cache)
    Hkv = cache.k.shape[2]
    expect(cache.k.shape[3] == D and Hq > 0 and Hq % Hkv == 0, "a cache of q's D whose Hkv divides Hq", q, cache.k)
    ints = block_table.dtype == lengths.dtype == torch.int32
    fits = block_table.ndim == 2 and len(block_table) == B and lengths.shape == (B,)
    expect(ints and fits, "block_table [B, max_blocks] and lengths [B], int32", block_table, lengths, q)
    return attention_decode_ref(q, cache, block_table, lengths, D**-0.5 if scale is None else scale)


@torch.no_grad()
def attention_decode_ref(q, cache, block_table, lengths, scale):
    B, n, Hq, D = q.shape
    num_blocks, block_size, Hkv, _ = cache.k.shape
    N = block_table.shape[1] * block_size
    if not (B and N and num_blocks):
        return torch.zeros_like(q)
    pages = block_table.long().clamp(0, num_blocks - 1)  # entries past a sequence's length may be anything
    key = torch.arange(N, device=q.device)
    unused = (key >= lengths[:, None])[:, :, None, None]  # [B, N, 1, 1]; their P is 0, but 0 * NaN is NaN
    k = pages_of(cache.k, cache.k_scale, pages, q)
    v = pages_of(cache.v, cache.v_scale, pages, q).masked_fill(unused, 0)
    token = torch.arange(n, device=q.device).repeat_interleave(Hq // Hkv)
    hidden = key > (lengths[:, None] - n + token)[:, :, None]  # [B, n * G, N]
    rows = wide(q).view(B, n, Hkv, -1, D).transpose(1, 2).flatten(2, 3)  # [B, Hkv, n * G, D]
    with torch.autocast(q.device.type, enabled=False):
        out, _ = attend(rows, k.transpose(1, 2), v.transpose(1, 2), hidden[:, None], scale, q.dtype)
    return out.view(B, Hkv, n, -1, D).transpose(1, 2).reshape(q.shape).to(q.dtype)


def pages_of(cells: Tensor, scale: Tensor | None, pages: Tensor, q: Tensor) -> Tensor:
    """The cells of each sequence one after another, dequantised: [B, max_blocks * block_size, Hkv, D] as wide(q)."""
    x = cells.view(torch.uint8)[pages].view(E4M3) if cells.dtype == E4M3 else cells[pages]
    x = x.to(wide(q).dtype)
    return (x if scale is None else x * scale[pages][..., None]).flatten(1, 2)


def append(cache: KVCache, k: Tensor, v: Tensor, slots: Tensor) -> None:
    """Write k and v [T, Hkv, D] into the cache in place, quantising where it is FP8; no gradient.

    slots [T] int64 are distinct and say where: page * block_size + offset. Raises ValueError for another shape or
    dtype, and on a CPU for a slot that is not in the cache.
    """
    expect_cache(cache)
    fits = k.shape == v.shape == (len(k), *cache.k.shape[2:])
    expect(fits and slots.shape == (len(k),) and slots.dtype == torch.int64,
           "k and v [T, Hkv, D] of the cache's heads, slots [T] int64", k, v, slots, cache.k)  # fmt: skip
    if slots.device.type == "cpu" and not torch.compiler.is_compiling() and len(slots):
        inside = slots.min() >= 0 and slots.max() < cache.k.shape[0] * cache.k.shape[1]
        expect(bool(inside), "slots of the cache", int(slots.min()), int(slots.max()), cache.k)
    for x, cells, scales in ((k, cache.k, cache.k_scale), (v, cache.v, cache.v_scale)):
        x = x.detach()
        if scales is None:
            cells.view(-1, *x.shape[1:]).index_copy_(0, slots, x.to(cells.dtype))
            continue
        x_q, x_scale = quantize_blocks(wide(x), 1, x.shape[-1], pow2=False)
        cells.view(torch.uint8).view(-1, *x.shape[1:]).index_copy_(0, slots, x_q.view(torch.uint8))
        scales.view(-1, x.shape[1]).index_copy_(0, slots, x_scale[..., 0].to(scales.dtype))


def expect_cache(cache: KVCache) -> None:
    k, v, k_scale, v_scale = cache
    expect(k.ndim == 4 and v.shape == k.shape and v.dtype == k.dtype and k.is_contiguous() and v.is_contiguous(),
           "contiguous cache.k and cache.v [num_blocks, block_size, Hkv, D]", k, v)  # fmt: skip
    if k.dtype != E4M3:
        expect(k.is_floating_point() and k_scale is None and v_scale is None,
               "a cache in bf16, fp16 or fp32 without scales, or in e4m3 with them", *cache)  # fmt: skip
        return
    expect(k_scale is not None and v_scale is not None and k_scale.shape == v_scale.shape == k.shape[:3]
           and k_scale.is_contiguous() and v_scale.is_contiguous(),
           "k_scale and v_scale [num_blocks, block_size, Hkv] with an e4m3 cache", *cache)  # fmt: skip
