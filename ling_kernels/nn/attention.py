"""Grouped-query attention with per-head QK-RMSNorm before half-RoPE, over packed rows."""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..ops.attention import attention
from ..ops.attention_decode import KVCache, attention_decode
from ..ops.qk_norm_attention import qk_norm_attention
from ..ops.qk_norm_rope import qk_norm_rope


class Rows(NamedTuple):
    """What attention must know of the T packed rows: sequence b owns rows cu_seqlens[b] : cu_seqlens[b + 1]."""

    cos: Tensor  # [P, R/2] fp32
    sin: Tensor  # [P, R/2] fp32
    positions: Tensor  # [T]
    cu_seqlens: Tensor  # [B + 1] int32
    # with a cache:
    slots: Tensor | None = None  # [T] where each row's key and value go: block * block_size + offset
    block_table: Tensor | None = None  # [B, max_blocks] int32
    lengths: Tensor | None = None  # [B] int32, new rows included; None while the cache is still empty (prefill)


class Attention(nn.Module):
    """query_key_value [(Hq + 2 Hkv) D, H]: all query heads, all key heads, all value heads; dense [H, Hq D]."""

    def __init__(self, hidden_size: int, num_heads: int, num_kv_heads: int, head_dim: int, eps: float = 1e-6):
        super().__init__()
        self.num_kv_heads, self.head_dim, self.eps = num_kv_heads, head_dim, eps
        self.query_key_value = nn.Linear(hidden_size, (num_heads + 2 * num_kv_heads) * head_dim, bias=False)
        self.dense = nn.Linear(num_heads * head_dim, hidden_size, bias=False)
        self.query_layernorm = nn.Parameter(torch.ones(head_dim))
        self.key_layernorm = nn.Parameter(torch.ones(head_dim))

    def forward(self, x: Tensor, rows: Rows, cache: KVCache | None = None) -> Tensor:
        """x [T, H] -> [T, H]. With a cache, keys and values of the rows are written to it first."""
        qkv = self.query_key_value(x).unflatten(-1, (-1, self.head_dim))
        norms = (self.query_layernorm, self.key_layernorm, rows.cos, rows.sin, rows.positions, self.num_kv_heads)
        if cache is None:
            out, _ = qk_norm_attention(qkv, *norms, rows.cu_seqlens, eps=self.eps)
        else:
            q, k, v = qk_norm_rope(qkv, *norms, eps=self.eps, cache=cache, slots=rows.slots)
            if rows.lengths is None:
                out, _ = attention(q, k, v, rows.cu_seqlens)
            else:
                batch = q.unflatten(0, (len(rows.lengths), -1))
                out = attention_decode(batch, cache, rows.block_table, rows.lengths).flatten(0, 1)
        return self.dense(out.flatten(1))
