"""Modules whose results for a row do not depend on the batch, bit for bit: for an engine and a trainer that agree.

What else differs between them on a CPU, and how it is pinned here:

    products     MKL takes other kernels for fewer than 4 rows: every product has at least ROWS rows
    attention    prefill, decoding and training use three algorithms: here one, over keys in tiles of KEYS
    router       torch adds the topk scores of four rows together, and those of the last rows one by one: ROWS again
    experts      `moe_decode` and the composition add in another order: here the composition alone

Only on a CPU and in fp32 or fp64. A test shows it for the libraries and the CPU that it runs on; MKL promises nothing
of the kind. Gradients are those of the same formulas, and their bits may depend on the batch.
"""

import torch
from torch import Tensor, nn
from torch.nn.functional import linear, pad

from ..errors import InputError
from ..ops.attention_decode import KVCache, read
from ..ops.dispatch import Plan
from ..ops.permute import permute
from ..ops.qk_norm_rope import qk_norm_rope
from ..ops.swiglu import swiglu
from ..ops.unpermute import unpermute
from .attention import Attention, BatchLayout
from .experts import Experts
from .linear import FusedLinear
from .norm import RMSNorm
from .router import Router

ROWS = 16  # of a product at least
KEYS = 64  # of a tile of attention


def batch_invariant_(model: nn.Module) -> None:
    """Pin the modules of a model in place; parameters, names and hooks stay. Raises InputError for a model on a GPU or
    in another precision, without QK norm, and for linear layers and experts of other kinds, as FP8's."""
    for name, p in model.named_parameters():
        if p.device.type != "cpu" or p.dtype not in (torch.float32, torch.float64):
            raise InputError(f"batch_invariant is for fp32 on a CPU: {name} is {p.dtype} on {p.device}")
    for name, module in model.named_modules():
        if isinstance(module, Attention) and module.query_layernorm is None:
            raise InputError(f"batch_invariant cannot pin {name}, which has no QK norm")
        if type(module) in PINNED:
            module.__class__ = PINNED[type(module)]
        elif isinstance(module, (*PINNED,)) and type(module) not in PINNED.values():
            raise InputError(f"batch_invariant cannot pin {name}, a {type(module).__name__}")


def enough_rows(x: Tensor) -> Tensor:
    """x [M, K] with rows of 0 behind it, so that it has at least ROWS."""
    return x if len(x) >= ROWS else pad(x, (0, 0, 0, ROWS - len(x)))


class PinnedLinear(FusedLinear):
    def forward(self, x: Tensor, norm: RMSNorm | None = None, dtype: torch.dtype | None = None) -> Tensor:
        x = x if norm is None else norm(x)
        return linear(enough_rows(x), self.weight, self.bias)[: len(x)].to(x.dtype if dtype is None else dtype)

    def takes_fp8_rows(self) -> bool:
        return False


class PinnedRouter(Router):
    def choose(
        self, x: Tensor, z_loss: float | None, experts: Tensor | None, mask: Tensor | None = None
    ) -> tuple[Tensor, ...]:
        """With rows of padding up to a multiple of ROWS, for the product and for the sums over topk."""
        T, more = len(x), -len(x) % ROWS
        if experts is not None:
            experts = pad(experts, (0, 0, 0, more), value=-1)
        mask = torch.arange(T + more, device=x.device) < T
        weights, chosen, *others = super().choose(pad(x, (0, 0, 0, more)), z_loss, experts, mask)
        return weights[:T], chosen[:T], *others


class PinnedExperts(Experts):
    def forward(self, x: Tensor, plan: Plan, weights: Tensor | None) -> Tensor:
        h = grouped_product(permute(x, plan), self.gate_up, plan.offsets)
        folded = None
        if self.fold_weights and weights is not None:
            folded = weights.masked_fill(plan.slot < 0, 0).flatten()[plan.source.long()]
        h = grouped_product(swiglu(h, folded), self.down, plan.offsets)
        return unpermute(h, plan, None if self.fold_weights else weights)

    def decode_weights(self) -> None:
        return None


def grouped_product(x: Tensor, w: Tensor, offsets: Tensor) -> Tensor:
    """x [S, K], w [E, N, K] -> [S, N]: the rows offsets[e] to offsets[e + 1] times w[e]; 0 in the rows of no expert."""
    bounds = offsets.tolist()
    parts = [linear(enough_rows(x[a:b]), w[e])[: b - a]
             for e, (a, b) in enumerate(zip(bounds, bounds[1:], strict=False)) if a < b]  # fmt: skip
    return torch.cat([*parts, x.new_zeros(len(x) - bounds[-1], w.shape[1])])


class PinnedAttention(Attention):
    def forward(
        self, x: Tensor, layout: BatchLayout, cache: KVCache | None = None, norm: RMSNorm | None = None
    ) -> Tensor:  # fmt: skip
        qkv = self.query_key_value(x, norm).unflatten(-1, (-1, self.head_dim))
        if cache is not None and layout.slots is None:
            layout = layout._replace(slots=decode_slots(layout, cache))
        q, k, v = qk_norm_rope(
            qkv, self.query_layernorm, self.key_layernorm, layout.cos, layout.sin, layout.positions, self.num_kv_heads,
            eps=self.eps, cache=cache, slots=layout.slots,
        )  # fmt: skip
        outs, first, size = [], 0, 0 if cache is None else cache.k.shape[1]
        if layout.decoding:
            n = layout.decoding // len(layout.lengths)
            for pages, length in zip(layout.block_table, layout.lengths.tolist(), strict=True):
                at = torch.arange(length, device=x.device)
                cells = pages.long()[at // size] * size + at % size
                outs.append(attend(q[first : first + n], *read(cache, cells, q.dtype)))
                first += n
        bounds = layout.cu_seqlens.tolist()
        bounds_k = bounds if layout.cu_seqlens_k is None else layout.cu_seqlens_k.tolist()
        if layout.context is not None:
            k, v = read(cache, layout.context, q.dtype)
        else:
            k, v = k[first:], v[first:]
        for (a, b), (c, d) in zip(zip(bounds, bounds[1:], strict=False), zip(bounds_k, bounds_k[1:], strict=False),
                                  strict=True):  # fmt: skip
            outs.append(attend(q[first + a : first + b], k[c:d], v[c:d]))
        return self.dense(torch.cat(outs).flatten(1) if outs else q.flatten(1))


def decode_slots(layout: BatchLayout, cache: KVCache) -> Tensor:
    """[T]: the cell of each row of a decode pass."""
    size, positions = cache.k.shape[1], layout.positions.view(len(layout.lengths), -1)
    return (layout.block_table.long().gather(1, positions // size) * size + positions % size).flatten()


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """q [n, Hq, D] of the last n of L tokens, k and v [L, Hkv, D] -> [n, Hq, D], causal.

    The softmax's sums go over tiles of KEYS keys from position 0 on, one after the other, whatever n and L are.
    """
    (n, Hq, D), L = q.shape, len(k)
    if not n:
        return q
    if L < n:  # a lane without a sequence
        return torch.zeros_like(q)
    k, v = (pad(t.repeat_interleave(Hq // t.shape[1], 1), (0, 0, 0, 0, 0, -L % KEYS)).transpose(0, 1) for t in (k, v))
    q = pad(q, (0, 0, 0, 0, 0, max(ROWS - n, 0))).transpose(0, 1) * D**-0.5
    last = torch.arange(L - n, L - n + q.shape[1], device=q.device)  # the last key that each query sees
    hidden = torch.arange(k.shape[1], device=q.device)[None] > last[:, None]
    tiles = [slice(i, i + KEYS) for i in range(0, k.shape[1], KEYS)]
    scores = torch.cat([q @ k[:, t].mT for t in tiles], -1).masked_fill(hidden, -torch.inf)
    p = (scores - scores.amax(-1, keepdim=True)).exp()
    total, out = p.new_zeros(()), p.new_zeros(())
    for t in tiles:
        total, out = total + p[..., t].contiguous().sum(-1, keepdim=True), out + p[..., t].contiguous() @ v[:, t]
    return (out / total).transpose(0, 1)[:n]


PINNED = {nn.Linear: PinnedLinear, Router: PinnedRouter, Experts: PinnedExperts, Attention: PinnedAttention}
