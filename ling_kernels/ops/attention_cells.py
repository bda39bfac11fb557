"""Attention of new tokens over the cells of a paged cache, to the bits of `attention` with batch_invariant.

`attention_decode` divides the keys of all sequences among its programs, so that its sums depend on the batch. Here a
program has all keys of a sequence, and goes through them as attention's kernel does: in the same tiles, from key 0 on.
"""

import torch
from torch import Tensor

from ..op import expect, multiprocessors, op, use_reference
from .attention import block_d
from .attention import config as config_of_attention
from .attention_decode import KVCache, attention_decode_ref, expect_cache, expect_table
from .attention_kernels import attend_keys
from .triton_import import tl, triton


def attention_cells(q: Tensor, cache: KVCache, block_table: Tensor, lengths: Tensor) -> Tensor:
    """q [B, n, Hq, D] of n new tokens of each sequence, which the cache already holds -> out as q.

    Arguments are `attention_decode`'s, n any number, scale 1 / sqrt(D), and the cache has no scales. In bf16 on a GPU a
    row has the bits that `attention(batch_invariant=True)` gives that query with those keys. No gradient. Raises
    ValueError for another shape or dtype.
    """
    B, n, Hq, D = q.shape if q.ndim == 4 else (-1, 0, 0, 0)
    expect(B >= 0 and n > 0 and D > 0, "q [B, n, Hq, D]", q)
    expect_cache(cache)
    num_blocks, _, Hkv, _ = cache.k.shape
    expect(cache.k.shape[3] == D and Hkv > 0 and Hq % Hkv == 0 and cache.k.dtype == q.dtype and cache.k_scale is None,
           "a cache in q's dtype, of its D, whose Hkv divides Hq", q, cache.k)  # fmt: skip
    expect_table(block_table, lengths, q, cache)
    if use_reference("attention_cells", q):
        return attention_cells_ref(q, cache, block_table, lengths)
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    if 0 in (B, num_blocks, cache.k.shape[1], block_table.shape[1]):
        return out.zero_()
    cells = cache.k, cache.v, block_table.contiguous(), lengths.contiguous()
    attention_cells_fwd(q.detach().contiguous(), *cells, out, D**-0.5)
    return out


def attention_cells_ref(q, cache, block_table, lengths):
    return attention_decode_ref(q, cache, block_table, lengths, q.shape[-1] ** -0.5)


@op("out")
def attention_cells_fwd(
    q: Tensor, k: Tensor, v: Tensor, block_table: Tensor, lengths: Tensor, out: Tensor, scale: float
) -> None:  # fmt: skip
    (B, n, Hq, D), (_, page, Hkv, _) = q.shape, k.shape
    c = config(q.dtype, multiprocessors(q.device))
    attention_cells_kernel[(B, Hkv, triton.cdiv(n * Hq // Hkv, c["BLOCK_M"]))](
        q, k, v, block_table, lengths, out, scale, n, block_table.shape[1], Hkv, G=Hq // Hkv, PAGE=page, D=D,
        BLOCK_D=block_d(D), **c,
    )  # fmt: skip


def config(dtype: torch.dtype, sms: int) -> dict:
    """Attention's tiles, since a row's bits depend on how many keys are in one. With three stages the numbers of the
    next tile's cells are there when its keys are loaded. 64 rows and 4 warps spill beside 128 keys. Not measured."""
    c = config_of_attention("fwd", dtype, sms)
    return c if dtype == torch.float32 else c | dict(num_stages=3)


@triton.jit
def attention_cells_kernel(
    q, k, v, block_table, lengths, out, scale, n, columns, Hkv, G: tl.constexpr, PAGE: tl.constexpr, D: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """A program has rows of a KV head: the G heads that share it of each of the n tokens."""
    b, g = tl.program_id(0), tl.program_id(1)
    row, d = tl.program_id(2) * BLOCK_M + tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_D)
    m, first = row // G, tl.program_id(2) * BLOCK_M // G
    inside = (m < n)[:, None] & (d < D)[None, :]
    start = ((b.to(tl.int64) * n + first) * Hkv + g) * G * D  # offsets within a tile fit 32 bits, which saves registers
    offset = ((m - first) * (Hkv * G) + row % G)[:, None] * D + d[None, :]
    qs = tl.load(q + start + offset, mask=inside, other=0.0)

    length = tl.load(lengths + b)
    shift, Lk, table = length - n, tl.minimum(length, columns * PAGE), block_table + b.to(tl.int64) * columns
    unmasked = tl.minimum(Lk, tl.maximum(shift + 1, 0)) // BLOCK_N * BLOCK_N
    largest = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    acc = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    log2_scale = scale * 1.4426950408889634
    largest, total, acc = attend_keys(
        qs, k, v, table, largest, total, acc, 0, unmasked, m, shift, Lk, g, Hkv * D, Hkv * D, log2_scale,
        False, True, False, PAGE, D, BLOCK_N, BLOCK_D,
    )  # fmt: skip
    largest, total, acc = attend_keys(
        qs, k, v, table, largest, total, acc, unmasked, Lk, m, shift, Lk, g, Hkv * D, Hkv * D, log2_scale,
        True, True, False, PAGE, D, BLOCK_N, BLOCK_D,
    )  # fmt: skip
    tl.store(
        out + start + offset, (acc / tl.where(total == 0, 1.0, total)[:, None]).to(out.dtype.element_ty), mask=inside
    )
