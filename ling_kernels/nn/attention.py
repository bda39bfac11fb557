"""Grouped-query attention, per-head QK-RMSNorm before half-RoPE, over packed rows; for studies also without norm."""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..errors import InputError
from ..op import few_calls_on_cpu, upcast
from ..ops.attention import attention
from ..ops.attention_decode import KVCache, append, attention_decode, read
from ..ops.attention_decode_cpu import DecodeCells, decode_cells, decode_on_cpu
from ..ops.qk_norm_attention import qk_norm_attention
from ..ops.qk_norm_attention_decode import qk_norm_attention_decode
from ..ops.qk_norm_rope import qk_norm_rope, rotate
from .linear import FusedLinear, norm_linear
from .norm import RMSNorm


class BatchLayout(NamedTuple):
    """The sequences of T packed rows: sequence b owns rows cu_seqlens[b] : cu_seqlens[b + 1].

    With a cache, the first `decoding` rows are 1 to 8 new tokens of each of B sequences, and attend to the cache.
    cu_seqlens then counts the rows after them, which attend to one another, or to the cache slots in `context`.
    """

    cos: Tensor  # [P, R/2] fp32
    sin: Tensor  # [P, R/2] fp32
    positions: Tensor  # [T]
    cu_seqlens: Tensor  # [B + 1] int32
    # with a cache:
    slots: Tensor | None = None  # [T] cache slot of each row's key and value: block * block_size + offset
    decoding: int = 0
    block_table: Tensor | None = None  # [B, max_blocks] int32
    lengths: Tensor | None = None  # [B] int32, new rows included
    context: Tensor | None = None  # [Tk] cache slots of all keys of cu_seqlens' sequences, new rows included
    cu_seqlens_k: Tensor | None = None  # cu_seqlens of context
    cells: DecodeCells | None = None  # on a CPU, of a pass that only decodes: what its layers share
    # of MoE layers, for the whole model with their number M in front:
    experts: Tensor | None = None  # [T, topk] int32: a given choice of experts, as `route` takes it
    record: Tensor | None = None  # [cells, topk] of integers, where each row's choice is written
    record_cells: Tensor | None = None  # [T] int64: the cell of each row

    def of_moe(self, i: int) -> "BatchLayout":
        """The layout for the MoE layer i, of a layout for the whole model."""
        if self.experts is None and self.record is None:
            return self
        experts = None if self.experts is None or i >= len(self.experts) else self.experts[i]
        return self._replace(experts=experts, record=None if self.record is None else self.record[i])

    def with_cells(self, cache: KVCache) -> "BatchLayout":
        """The layout of a pass that only decodes, with `cells` where `decode_on_cpu` runs. cache: any layer's."""
        if not self.decoding or not few_calls_on_cpu(self.cos, cache.k):
            return self
        n = self.decoding // self.lengths.shape[0]
        if int(self.lengths.min()) < n:  # a lane without a sequence
            return self
        return self._replace(cells=decode_cells(self.cos, self.sin, cache, self.block_table, self.lengths, n))


Rows = BatchLayout  # its name up to version 0.1


class Attention(nn.Module):
    """query_key_value [(Hq + 2 Hkv) D, H]: all query heads, all key heads, all value heads; dense [H, Hq D].

    qk_norm=False leaves the norm out: no kernel supports that, so that plain torch applies RoPE.
    """

    pinned = False  # by batch_invariant_

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        eps: float = 1e-6,
        qk_norm: bool = True,
    ):
        super().__init__()
        self.num_kv_heads, self.head_dim, self.eps = num_kv_heads, head_dim, eps
        self.query_key_value = nn.Linear(hidden_size, (num_heads + 2 * num_kv_heads) * head_dim, bias=False)
        self.dense = nn.Linear(num_heads * head_dim, hidden_size, bias=False)
        self.query_layernorm = nn.Parameter(torch.ones(head_dim)) if qk_norm else None
        self.key_layernorm = nn.Parameter(torch.ones(head_dim)) if qk_norm else None

    def forward(
        self, x: Tensor, layout: BatchLayout, cache: KVCache | None = None, norm: RMSNorm | None = None
    ) -> Tensor:  # fmt: skip
        """x [T, H], to which norm is applied first -> [T, H]. With a cache, keys and values are written to it first."""
        qkv = norm_linear(self.query_key_value, x, norm).unflatten(-1, (-1, self.head_dim))
        norms = (self.query_layernorm, self.key_layernorm, layout.cos, layout.sin, layout.positions, self.num_kv_heads)
        if cache is None and self.query_layernorm is not None:
            out, _ = qk_norm_attention(qkv, *norms, layout.cu_seqlens, eps=self.eps)
            return self.dense(out.flatten(1))
        if self.query_layernorm is not None and 0 < layout.decoding == len(qkv):
            return self.decode(qkv.unflatten(0, (len(layout.lengths), -1)), layout, cache)
        if self.query_layernorm is not None:
            q, k, v = qk_norm_rope(qkv, *norms, eps=self.eps, cache=cache, slots=layout.slots)
        else:
            q, k, v = self.rope(qkv, layout)
            if cache is not None:
                append(cache, k, v, layout.slots)
        outs = []
        if layout.decoding:
            batch = q[: layout.decoding].unflatten(0, (len(layout.lengths), -1))
            outs.append(attention_decode(batch, cache, layout.block_table, layout.lengths).flatten(0, 1))
        if layout.decoding < len(q) or not outs:
            q, k, v = (t[layout.decoding :] for t in (q, k, v))
            if layout.context is not None:
                k, v = read(cache, layout.context, q.dtype)
            outs.append(attention(q, k, v, layout.cu_seqlens, layout.cu_seqlens_k)[0])
        out = outs[0] if len(outs) == 1 else torch.cat(outs)
        return self.dense(out.flatten(1))

    def decode(self, qkv: Tensor, layout: BatchLayout, cache: KVCache) -> Tensor:
        """qkv [B, n, Hq + 2 Hkv, D] of n new tokens for each of B sequences -> [B n, H]: norm, rotation, append to the
        cache and attention in one op, which also quantises the rows for an FP8 output layer."""
        fp8 = isinstance(self.dense, FusedLinear) and self.dense.takes_fp8_rows()
        if layout.cells is not None and not fp8 and qkv.dtype == cache.k.dtype:
            out = decode_on_cpu(qkv, self.query_layernorm, self.key_layernorm, layout.cells, cache, self.eps)
            return norm_linear(self.dense, out, None)
        out = qk_norm_attention_decode(
            qkv, self.query_layernorm, self.key_layernorm, layout.cos, layout.sin, cache, layout.block_table,
            layout.lengths, eps=self.eps, quantize=fp8,
        )  # fmt: skip
        if fp8:
            out, *fp8_rows = out
            return self.dense.forward_fp8(fp8_rows, out.dtype)
        return norm_linear(self.dense, out.flatten(0, 1).flatten(1), None)  # type: ignore[union-attr]

    def rope(self, qkv: Tensor, layout: BatchLayout) -> tuple[Tensor, Tensor, Tensor]:
        """qkv [T, Hq + 2 Hkv, D] -> q, k and v as qk_norm_rope returns them, but not normed."""
        kv = self.num_kv_heads
        q, k, v = qkv.split([qkv.shape[1] - 2 * kv, kv, kv], dim=1)
        cos, sin = (table[layout.positions.long()][:, None] for table in (layout.cos, layout.sin))
        q, k = (rotate(upcast(x), cos, sin).to(x.dtype) for x in (q, k))
        return q, k, v.contiguous()


def expect_not_pinned(model: nn.Module, change: str) -> None:
    """Raises InputError for a model that batch_invariant_ has pinned: the change would take its bits away."""
    for name, module in model.named_modules():
        if isinstance(module, Attention) and module.pinned:
            raise InputError(f"{change} would undo batch_invariant_, which has pinned {name}")
