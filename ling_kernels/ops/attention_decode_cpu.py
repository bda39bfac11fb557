"""qk_norm_attention_decode on a CPU in fp32, in few calls of torch: what layers of a pass share is computed once."""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from .attention_decode import KVCache
from .qk_norm_rope import norm_and_rotate

PART = 1 << 17  # keys times D at a time: copies of them and of the values stay in a cache of 1 MB


class DecodeCells(NamedTuple):
    """Of the T = B n rows of a decode pass, n new tokens of each of B sequences, of which the longest has L tokens."""

    cos: Tensor  # [T, 1, R/2] fp32, of each row's position
    sin: Tensor  # as cos
    slots: Tensor  # [T] int64: the cell of each row's key and value
    keys: Tensor  # [B, L] int64: the cell of each key; past a sequence's end that of its first token
    hidden: Tensor  # [B, 1, n, L] fp32: 0 for the keys that a query sees, otherwise -inf


def decode_cells(
    cos: Tensor, sin: Tensor, cache: KVCache, block_table: Tensor, lengths: Tensor, n: int
) -> DecodeCells:  # fmt: skip
    """cos and sin [P, R/2]; any layer's cache; block_table [B, max_blocks] and lengths [B] int32 as the op takes them,
    every length from n to what the table holds. Not checked."""
    size = cache.k.shape[1]
    ends = lengths.numpy()[:, None]  # numpy takes less time than torch for few numbers
    longest, positions = int(ends.max()), ends + np.arange(-n, 0)
    pages = block_table.numpy()[:, : -(-longest // size), None].astype(np.int64)
    cells = (pages * size + np.arange(size)).reshape(len(ends), -1)[:, :longest]
    slots = cells[np.arange(len(ends))[:, None], positions]
    keys = np.arange(longest)
    # What a mask hides is multiplied by 0, and must be a number: another sequence's cells may hold NaN.
    cells = np.where(keys < ends, cells, cells[:, :1])
    hidden = np.where(keys > positions[..., None], np.float32(-np.inf), np.float32(0))
    rows = torch.from_numpy(positions.ravel())
    return DecodeCells(
        cos.index_select(0, rows)[:, None], sin.index_select(0, rows)[:, None], torch.from_numpy(slots.ravel()),
        torch.from_numpy(cells), torch.from_numpy(hidden)[:, None],
    )  # fmt: skip


def decode_on_cpu(
    qkv: Tensor, q_weight: Tensor, k_weight: Tensor, cells: DecodeCells, cache: KVCache, eps: float
) -> Tensor:
    """qkv [B, n, Hq + 2 Hkv, D] -> [B n, Hq D], as qk_norm_attention_decode; keys and values go into the cache."""
    (B, n, _, D), Hkv = qkv.shape, cache.k.shape[2]
    q, *new = norm_and_rotate(qkv.flatten(0, 1), q_weight, k_weight, cells.cos, cells.sin, Hkv, eps)
    for x, rows in zip(cache[:2], new, strict=True):
        x.view(-1, Hkv, D).index_copy_(0, cells.slots, rows)
    q = q.reshape(B, n, Hkv, -1, D).transpose(1, 2)  # heads that share keys are rows of one product
    hidden = cells.hidden if n == 1 else cells.hidden.repeat_interleave(q.shape[3], 2)
    number = max(PART // (cells.keys.shape[1] * Hkv * D), 1)
    parts = [
        attend_to_cache(queries, index, mask, cache)
        for queries, index, mask in zip(
            q.flatten(2, 3).split(number), cells.keys.split(number), hidden.split(number), strict=True
        )
    ]
    out = parts[0] if len(parts) == 1 else torch.cat(parts)
    return out.view(q.shape).transpose(1, 2).reshape(B * n, -1)


def attend_to_cache(q: Tensor, index: Tensor, hidden: Tensor, cache: KVCache) -> Tensor:
    """q [b, Hkv, n G, D], index [b, L] and hidden [b, 1, n G or 1, L] of b sequences -> out as q."""
    shape = *index.shape, *cache.k.shape[2:]
    keys, values = (x.flatten(0, 1).index_select(0, index.flatten()).view(shape).transpose(1, 2) for x in cache[:2])
    return scaled_dot_product_attention(q, keys, values, attn_mask=hidden)
