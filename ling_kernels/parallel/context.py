"""Context parallelism: n ranks share the rows of every batch, and gather keys and values for attention.

The T packed rows are cut into 2 n pieces of c rows; rank r takes the pieces r and 2 n - 1 - r, so that a sequence's
early rows, which see few keys, and its late ones are shared out evenly. Every rank is given the whole batch: ids and
labels are small, and so MTP's shift across a border between ranks costs nothing. A piece attends to the gathered rows
up to its own end; its part of each sequence is aligned with the end of that sequence's keys, as `attention` aligns its
causal mask. Keys and values of a layer are gathered once in the forward and again in the backward: what is kept is each
rank's own. Their gradients are summed over ranks in fp32.
"""

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..errors import InputError
from ..model.packing import Batch
from ..nn import Attention, BatchLayout, RMSNorm
from ..nn.linear import norm_linear
from ..op import autocast, first_derivative_only, upcast, use_reference
from ..ops.attention import KERNELS, REFERENCE, attention, attention_backward, default_scale
from ..ops.attention_decode import KVCache
from ..ops.qk_norm_rope import qk_norm_rope
from .collectives import gather, scatter_sum


def context_parallel_(model: nn.Module, group: dist.ProcessGroup) -> None:
    """Divide the rows of every batch of a Ling model over the ranks of `group`, in place; weights stay as they are.

    All ranks pass the same batches to `model`. Losses are then a rank's share: the sum over the group is the loss of
    one process, and gradients add up to its gradients (`Shares.sum_gradients_`); so do the routers' counts. Logits
    and hidden states are zeros in other ranks' rows. Call it before or after `to_fp8`. The forward raises InputError
    for a number of rows that 2 n does not divide, and for decoding with a cache.
    """
    for module in [*model.modules()]:
        for name, child in module.named_children():
            if isinstance(child, Attention):
                setattr(module, name, ContextAttention.of(child, group))
    model.choose_rows = ChooseRows(group)


class ChooseRows:
    def __init__(self, group: dist.ProcessGroup):
        self.group = group

    def __call__(self, batch: Batch) -> Batch:
        n, rank, T = dist.get_world_size(self.group), dist.get_rank(self.group), len(batch.ids)
        if T % (2 * n):
            raise InputError(f"{n} ranks cannot share {T} rows of a batch equally: it takes a multiple of {2 * n}")
        pieces = torch.arange(T, device=batch.ids.device).view(2 * n, -1)
        return batch._replace(rows=torch.cat([pieces[rank], pieces[2 * n - 1 - rank]]))


class ContextAttention(Attention):
    """Attention over the rows of all ranks, for this rank's; layout.cu_seqlens are those of the whole batch."""

    group: dist.ProcessGroup

    @classmethod
    def of(cls, attention: Attention, group: dist.ProcessGroup) -> "ContextAttention":
        """With the parameters of `attention`."""
        heads = attention.dense.in_features // attention.head_dim
        with torch.device("meta"):
            new = cls(attention.dense.out_features, heads, attention.num_kv_heads, attention.head_dim, attention.eps)
        for name in ("query_key_value", "dense", "query_layernorm", "key_layernorm"):
            setattr(new, name, getattr(attention, name))
        new.group = group
        return new.train(attention.training)

    def forward(
        self, x: Tensor, layout: BatchLayout, cache: KVCache | None = None, norm: RMSNorm | None = None
    ) -> Tensor:
        if cache is not None:
            raise InputError("a model whose rows are divided over ranks (context parallelism) does not decode")
        qkv = norm_linear(self.query_key_value, x, norm).unflatten(-1, (-1, self.head_dim))
        if self.query_layernorm is not None:
            norms = self.query_layernorm, self.key_layernorm, layout.cos, layout.sin, layout.positions
            q, k, v = qk_norm_rope(qkv, *norms, self.num_kv_heads, eps=self.eps)
        else:
            q, k, v = self.rope(qkv, layout)
        return self.dense(SharedAttention.apply(*autocast(q, k, v), layout.cu_seqlens, self.group).flatten(1))


class SharedAttention(torch.autograd.Function):
    """q [T / n, Hq, D], k and v [T / n, Hkv, D] of this rank's two pieces, cu_seqlens of all T rows -> as q."""

    @staticmethod
    def forward(ctx, q, k, v, cu_seqlens, group):
        keys, values = in_order(k, group), in_order(v, group)
        outs, lses = zip(
            *(
                attention(q[rows], keys[:end], values[:end], *bounds)
                for rows, end, bounds in pieces(len(q), cu_seqlens, group)
            ),
            strict=True,
        )
        out = torch.cat(outs)
        ctx.save_for_backward(q, k, v, cu_seqlens, out, *lses)
        ctx.group = group
        return out

    @staticmethod
    @first_derivative_only
    def backward(ctx, dout):
        q, k, v, cu_seqlens, out, *lses = ctx.saved_tensors
        keys, values = in_order(k, ctx.group), in_order(v, ctx.group)
        dq, dkeys, dvalues = torch.empty_like(q), *(torch.zeros_like(upcast(t)) for t in (keys, values))
        how = default_scale(q, None), REFERENCE if use_reference("attention", q) else KERNELS
        for lse, (rows, end, bounds) in zip(lses, pieces(len(q), cu_seqlens, ctx.group), strict=True):
            grads = attention_backward(
                dout[rows], q[rows], keys[:end], values[:end], out[rows], lse, *bounds, True, *how
            )  # fmt: skip
            dq[rows] = grads[0]
            dkeys[:end] += grads[1]
            dvalues[:end] += grads[2]
        dk, dv = (scatter_sum(by_rank(t, ctx.group), ctx.group).to(k.dtype) for t in (dkeys, dvalues))
        return dq, dk, dv, None, None


def pieces(length: int, cu_seqlens: Tensor, group: dist.ProcessGroup):
    """Of each of this rank's two pieces: its rows here, where it ends in the whole batch, and cu_seqlens of its
    queries and of the keys up to its end. Sequences without queries in the piece are empty there, not left out, so
    that the host reads nothing."""
    n, rank, c = dist.get_world_size(group), dist.get_rank(group), length // 2
    for i, piece in enumerate((rank, 2 * n - 1 - rank)):
        first, end = piece * c, (piece + 1) * c
        yield slice(i * c, (i + 1) * c), end, (cu_seqlens.clamp(first, end) - first, cu_seqlens.clamp(max=end))


def in_order(rows: Tensor, group: dist.ProcessGroup) -> Tensor:
    """This rank's rows [T / n, ...] -> all ranks' [T, ...], in the order of the batch."""
    n = dist.get_world_size(group)
    early, late = gather(rows, group).unflatten(0, (n, 2, -1)).unbind(1)
    return torch.cat([early, late.flip(0)]).flatten(0, 1)


def by_rank(rows: Tensor, group: dist.ProcessGroup) -> Tensor:
    """The inverse of `in_order` without its gathering: [T, ...], each rank's two pieces together."""
    n = dist.get_world_size(group)
    early, late = rows.unflatten(0, (2, n, -1))
    return torch.stack([early, late.flip(0)], 1).flatten(0, 2)
