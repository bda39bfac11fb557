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
    hidden: Tensor  # [B, 1, n G or 1, longest] fp32: 0 for the keys that a query sees, otherwise -inf


def decode_cells(
    cos: Tensor, sin: Tensor, block_table: Tensor, lengths: Tensor, n: int, page_size: int, group: int
) -> DecodeCells:
    """cos and sin [P, R/2], block_table [B, max_blocks] int32, lengths [B] int32 with the n new tokens; group: query
    heads of a KV head. Every length is from n to what the table holds."""
    table, ends = block_table.numpy(), lengths.numpy()[:, None]  # for few numbers, in less time than torch
    longest = int(ends.max())
    first_keys = np.arange(0, longest, page_size)  # of each column
    pages = np.where(first_keys < ends, table[:, : len(first_keys)], table[:, :1]).astype(np.int64)
    positions = ends + np.arange(-n, 0)  # [B, n]
    slots = pages[np.arange(len(table))[:, None], positions // page_size] * page_size + positions % page_size
    unseen = np.arange(longest) > positions[..., None]  # [B, n, keys]
    hidden = np.zeros(unseen.shape, np.float32)
    hidden[unseen] = -np.inf
    rows = torch.from_numpy(positions.ravel())
    return DecodeCells(
        cos.index_select(0, rows)[:, None], sin.index_select(0, rows)[:, None], torch.from_numpy(slots.ravel()),
        torch.from_numpy(pages.ravel()), torch.from_numpy(hidden if n == 1 else hidden.repeat(group, 1))[:, None],
    )  # fmt: skip


def decode_on_cpu(
    qkv: Tensor, q_weight: Tensor, k_weight: Tensor, cells: DecodeCells, cache: KVCache, eps: float
) -> Tensor:
    """qkv [B, n, Hq + 2 Hkv, D] -> [B n, Hq D], as qk_norm_attention_decode; keys and values go into the cache."""
    (B, n, _, D), Hkv = qkv.shape, cache.k.shape[2]
    q, k, v = norm_and_rotate(qkv.flatten(0, 1), q_weight, k_weight, cells.cos, cells.sin, Hkv, eps)
    write(cache, k, v, cells.slots)
    longest = cells.hidden.shape[-1]
    keys, values = (
        x.flatten(1).index_select(0, cells.pages).view(B, -1, Hkv, D)[:, :longest].transpose(1, 2)
        for x in (cache.k, cache.v)
    )
    q = q.reshape(B, n, Hkv, -1, D).transpose(1, 2)  # heads that share keys are rows of one product
    out = scaled_dot_product_attention(q.flatten(2, 3), keys, values, attn_mask=cells.hidden)
    return out.view(q.shape).transpose(1, 2).reshape(B * n, -1)


def clear_pages(caches: Iterable[KVCache], pages: Sequence[int]) -> None:
    """Set the cells of these pages to 0 in every layer's cache, but not in FP8, which only the op itself reads."""
    index = torch.tensor(pages, dtype=torch.int64)
    for k, v, k_scale, _ in caches:
        if k_scale is None:
            k.index_fill_(0, index, 0), v.index_fill_(0, index, 0)
