"""qk_norm_attention_decode on a CPU in fp32, in few calls of torch: what all layers of a pass share is computed once.

It differs from the op in one thing: cells past a sequence's end must hold numbers, since torch's attention multiplies
what a mask hides by 0. So a page must be cleared before a sequence gets it (`clear_pages`), and columns of the block
table past a sequence's end are read as its first page.
"""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from .attention_decode import KVCache, write
from .qk_norm_rope import norm_and_rotate


class DecodeCells(NamedTuple):
    """Of the T = B n rows of a decode pass, n new tokens of each of B sequences whose keys lie in C pages each."""

    cos: Tensor  # [T, 1, R/2] fp32, of each row's position
    sin: Tensor  # as cos
    slots: Tensor  # [T] int64: the cell of each row's key and value
    pages: Tensor  # [B C] int64
    hidden: Tensor  # [B, 1, n G or 1, C page_size] fp32: 0 for the keys that a query sees, otherwise -inf


def decode_cells(
    cos: Tensor, sin: Tensor, block_table: Tensor, lengths: Tensor, n: int, page_size: int, group: int
) -> DecodeCells:
    """cos and sin [P, R/2], block_table [B, max_blocks] int32, lengths [B] int32 with the n new tokens; group: query
    heads of a KV head. Every length is from n to what the table holds."""
    table, ends = block_table.numpy(), lengths.numpy()[:, None]  # for few numbers, in less time than torch
    columns = np.arange(-(-int(ends.max()) // page_size))
    pages = np.where(columns * page_size < ends, table[:, : len(columns)], table[:, :1])
    positions = ends + np.arange(-n, 0)  # [B, n]
    slots = np.take_along_axis(pages, positions // page_size, 1).astype(np.int64) * page_size + positions % page_size
    seen = np.arange(len(columns) * page_size) <= positions[..., None]  # [B, n, keys]
    hidden = np.where(seen if n == 1 else seen.repeat(group, 1), np.float32(0), np.float32(-np.inf))
    rows = torch.from_numpy(positions.ravel())
    return DecodeCells(
        cos.index_select(0, rows)[:, None], sin.index_select(0, rows)[:, None], torch.from_numpy(slots.ravel()),
        torch.from_numpy(pages.ravel()), torch.from_numpy(hidden)[:, None],
    )  # fmt: skip


def decode_on_cpu(
    qkv: Tensor, q_weight: Tensor, k_weight: Tensor, cells: DecodeCells, cache: KVCache, eps: float
) -> Tensor:
    """qkv [B, n, Hq + 2 Hkv, D] -> [B n, Hq D], as qk_norm_attention_decode; keys and values go into the cache."""
    (B, n, _, D), Hkv = qkv.shape, cache.k.shape[2]
    q, k, v = norm_and_rotate(qkv.flatten(0, 1), q_weight, k_weight, cells.cos, cells.sin, Hkv, eps)
    write(cache, k, v, cells.slots)
    keys, values = (
        x.flatten(1).index_select(0, cells.pages).view(B, -1, Hkv, D).transpose(1, 2) for x in (cache.k, cache.v)
    )
    q = q.unflatten(0, (B, n)).unflatten(2, (Hkv, -1)).transpose(1, 2).flatten(2, 3)  # [B, Hkv, n G, D]
    out = scaled_dot_product_attention(q, keys, values, attn_mask=cells.hidden)
    return out.unflatten(2, (n, -1)).transpose(1, 2).reshape(B * n, -1)


def clear_pages(caches: Iterable[KVCache], pages: Sequence[int]) -> None:
    """Set the cells of these pages to 0 in every layer's cache, but not in FP8, which only the op itself reads."""
    index = torch.tensor(pages, dtype=torch.int64)
    for k, v, k_scale, _ in caches:
        if k_scale is None:
            k.index_fill_(0, index, 0), v.index_fill_(0, index, 0)
