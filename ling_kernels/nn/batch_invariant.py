"""Modules whose results for a row do not depend on the batch, bit for bit: for an engine and a trainer that agree.

On a GPU in bf16, with kernels whose bits do not depend on the batch (docs/batch-invariant.md, op by op):

    products     Triton's grouped GEMM for all, experts or not: cuBLAS, torch's grouped_mm and the kernels for few rows
                 choose by the number of rows in which order they add
    attention    `qk_norm_rope`, then one kernel's order of keys: `attention`, and `attention_cells` for cached keys
    experts      the composition alone: `moe_decode` adds in another order
    logits       the same GEMM to fp32; log-probabilities by `cross_entropy`
    FP8          at least ROWS rows outside the experts, as gemm_fp8 has another kernel for few; normed rows are
                 rounded before they are quantised, as with gradients. Weights are FP8 alone, or quantised from masters

On a CPU in bf16, fp32 or fp64, with torch's products, of bf16 in fp32:

    products     MKL takes other kernels for fewer than 4 rows: every product has at least ROWS rows
    attention    prefill, decoding and training use three algorithms: here one, over keys in tiles of KEYS
    router       torch adds the topk scores of four rows together, and those of the last rows one by one: ROWS again
    experts      `moe_decode` and the composition add in another order: here the composition alone

A test shows it for the libraries and the CPU that it runs on; MKL promises nothing of the kind. Gradients are those of
the same formulas, and their bits may depend on the batch.
"""

import torch
from torch import Tensor, nn
from torch.nn.functional import linear, pad
from torch.utils.checkpoint import checkpoint

from ..backend import backend
from ..errors import InputError
from ..op import E4M3, upcast
from ..ops.attention import attention
from ..ops.attention_cells import attention_cells
from ..ops.attention_decode import KVCache, read
from ..ops.cross_entropy import cross_entropy
from ..ops.dispatch import Plan
from ..ops.grouped_gemm import grouped_gemm
from ..ops.linear_cross_entropy import linear_cross_entropy
from ..ops.permute import permute
from ..ops.qk_norm_rope import qk_norm_rope, qk_norm_rope_forward
from ..ops.route import route
from ..ops.swiglu import swiglu
from ..ops.unpermute import unpermute
from .attention import Attention, BatchLayout
from .experts import Experts
from .fp8 import Fp8Experts, Fp8Linear, Fp8MLP
from .linear import FusedLinear
from .lora import Adapter
from .norm import RMSNorm
from .router import Router

ROWS = 16  # of a product at least, on a CPU and in FP8
KEYS = 64  # of a tile of attention, on a CPU
CHUNK = 1024  # rows whose logits exist at a time


def batch_invariant_(model: nn.Module, dtype: torch.dtype | None = None) -> None:
    """Pin the modules of a model in place; parameters, names and hooks stay. dtype: that it is computed in, default its
    parameters'. Raises InputError for another dtype than bf16 on a GPU and bf16 or fp32 on a CPU, with FP8 layers or
    without, for a model without QK norm or with adapters, and for linear layers and experts of other kinds; nothing is
    changed then."""
    for name, p in model.named_parameters():
        on_cpu = (torch.bfloat16, torch.float32, torch.float64, E4M3) if p.device.type == "cpu" else ()
        fits = (torch.bfloat16, E4M3) if kernels_run(p) else on_cpu
        if (dtype or p.dtype) not in fits:
            raise InputError(
                f"batch_invariant is for bf16 on a GPU and bf16 or fp32 on a CPU: {name} is {dtype or p.dtype} on"
                f" {p.device}"
            )
    kinds = {}  # all are checked before one is changed
    for name, module in model.named_modules():
        if isinstance(module, Attention) and module.query_layernorm is None:
            raise InputError(f"batch_invariant cannot pin {name}, which has no QK norm")
        if isinstance(module, Adapter):
            raise InputError(f"batch_invariant cannot pin {name}, an adapter")
        if type(module) in PINNED:
            kinds[module] = PINNED[type(module)]
        elif isinstance(module, tuple(PINNED)) and type(module) not in PINNED.values():
            raise InputError(f"batch_invariant cannot pin {name}, a {type(module).__name__}")
    for module, kind in kinds.items():
        module.__class__ = kind


def kernels_run(x: Tensor) -> bool:
    """Whether x is on a GPU that runs kernels, or on a CPU that stands for one."""
    return backend(x) != "torch"


def product(x: Tensor, w: Tensor, dtype: torch.dtype) -> Tensor:
    """x [M, K] w [N, K]^T -> [M, N] in dtype."""
    M = len(x)
    if not kernels_run(x) or M == 0:
        return linear(upcast(enough_rows(x)), upcast(w))[:M].to(dtype)
    bounds = torch.arange(0, 2 * M, M, dtype=torch.int32, device=x.device)
    return grouped_gemm(x, w[None], bounds, dtype, batch_invariant=True)


def target_logp(x: Tensor, w: Tensor, targets: Tensor) -> Tensor:
    """[T] fp32: the log-probabilities of targets [T] by the logits of x [T, H] and a pinned head's w [V, H]. CHUNK rows
    of logits exist at a time; the backward computes them again."""
    if not kernels_run(x):
        more = -len(x) % ROWS  # no chunk of few rows
        x, w = upcast(pad(x, (0, 0, 0, more))), upcast(w)
        losses = linear_cross_entropy(x, w, pad(targets, (0, more), value=-100), reduction="none", chunk=CHUNK)
        return -losses[: len(targets)]

    def losses_of(x: Tensor, targets: Tensor) -> Tensor:
        return cross_entropy(product(x, w, torch.float32), targets, reduction="none")

    parts = zip(x.split(CHUNK), targets.split(CHUNK), strict=True)
    return -torch.cat([checkpoint(losses_of, *part, use_reentrant=False) for part in parts])


def enough_rows(x: Tensor) -> Tensor:
    """x [M, K] with rows of 0 behind it, so that it has at least ROWS."""
    return x if len(x) >= ROWS else pad(x, (0, 0, 0, ROWS - len(x)))


class PinnedLinear(FusedLinear):
    def forward(self, x: Tensor, norm: RMSNorm | None = None, dtype: torch.dtype | None = None) -> Tensor:
        x = x if norm is None else norm(x)
        y = product(x, self.weight, x.dtype if dtype is None else dtype)
        return y if self.bias is None else y + self.bias

    def takes_fp8_rows(self) -> bool:
        return False


class PinnedRouter(Router):
    def choose(
        self, x: Tensor, z_loss: float | None, experts: Tensor | None, mask: Tensor | None = None
    ) -> tuple[Tensor, ...]:
        """On a CPU with rows of padding up to a multiple of ROWS, for the product and for the sums over topk."""
        if kernels_run(x):
            logits = product(x, self.weight, torch.float32)
            return route(logits, self.expert_bias, mask, z_loss=z_loss, experts=experts, **self.limits)
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
    """x [S, K], w [E, N, K] -> [S, N]: the rows offsets[e] to offsets[e + 1] times w[e]; undefined in others."""
    if kernels_run(x):
        return grouped_gemm(x, w, offsets, batch_invariant=True)
    bounds = offsets.tolist()
    parts = [product(x[a:b], w[e], x.dtype) for e, (a, b) in enumerate(zip(bounds, bounds[1:], strict=False)) if a < b]
    return torch.cat([*parts, x.new_zeros(len(x) - bounds[-1], w.shape[1])])


class PinnedFp8Linear(Fp8Linear):
    def forward(self, x: Tensor, norm: RMSNorm | None = None, dtype: torch.dtype | None = None) -> Tensor:
        x = x if norm is None else norm(x)
        return super().forward(enough_rows(x), None, dtype)[: len(x)]


class PinnedFp8MLP(Fp8MLP):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(enough_rows(x))[: len(x)]

    def decode_weights(self) -> None:
        return None


class PinnedFp8Experts(Fp8Experts):
    def decode_weights(self) -> None:
        return None


class PinnedAttention(Attention):
    pinned = True

    def forward(
        self, x: Tensor, layout: BatchLayout, cache: KVCache | None = None, norm: RMSNorm | None = None
    ) -> Tensor:  # fmt: skip
        qkv = self.query_key_value(x, norm).unflatten(-1, (-1, self.head_dim))
        norms = (self.query_layernorm, self.key_layernorm, layout.cos, layout.sin, layout.positions, self.num_kv_heads)
        kernels = kernels_run(x)
        if kernels and cache is not None:  # the kernel takes the slots of lanes without a sequence, which are negative
            q, k, v = qk_norm_rope_forward(qkv, *norms, self.eps, cache.k, cache.v, layout.slots)
        else:
            q, k, v = qk_norm_rope(qkv, *norms, eps=self.eps, cache=cache, slots=layout.slots)
        attend = attend_by_kernels if kernels else attend_by_tiles
        return self.dense(attend(q, k, v, layout, cache).flatten(1))


def attend_by_kernels(q: Tensor, k: Tensor, v: Tensor, layout: BatchLayout, cache: KVCache | None) -> Tensor:
    outs, first = [], layout.decoding
    if first:
        batch = q[:first].unflatten(0, (len(layout.lengths), -1))
        outs.append(attention_cells(batch, cache, layout.block_table, layout.lengths).flatten(0, 1))
    if first < len(q) or not outs:
        k, v = (k[first:], v[first:]) if layout.context is None else read(cache, layout.context, q.dtype)
        outs.append(attention(q[first:], k, v, layout.cu_seqlens, layout.cu_seqlens_k, batch_invariant=True)[0])
    return outs[0] if len(outs) == 1 else torch.cat(outs)


def attend_by_tiles(q: Tensor, k: Tensor, v: Tensor, layout: BatchLayout, cache: KVCache | None) -> Tensor:
    outs, first, size = [], 0, 0 if cache is None else cache.k.shape[1]
    if layout.decoding:
        n = layout.decoding // len(layout.lengths)
        for pages, length in zip(layout.block_table, layout.lengths.tolist(), strict=True):
            at = torch.arange(length, device=q.device)
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
    return torch.cat(outs) if outs else q


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
    dtype, (q, k, v) = q.dtype, map(upcast, (q, k, v))
    q = pad(q, (0, 0, 0, 0, 0, max(ROWS - n, 0))).transpose(0, 1) * D**-0.5
    last = torch.arange(L - n, L - n + q.shape[1], device=q.device)  # the last key that each query sees
    hidden = torch.arange(k.shape[1], device=q.device)[None] > last[:, None]
    tiles = [slice(i, i + KEYS) for i in range(0, k.shape[1], KEYS)]
    scores = torch.cat([q @ k[:, t].mT for t in tiles], -1).masked_fill(hidden, -torch.inf)
    p = (scores - scores.amax(-1, keepdim=True)).exp()
    total, out = p.new_zeros(()), p.new_zeros(())
    for t in tiles:
        total, out = total + p[..., t].contiguous().sum(-1, keepdim=True), out + p[..., t].contiguous() @ v[:, t]
    return (out / total).transpose(0, 1)[:n].to(dtype)


PINNED: dict[type, type] = {
    nn.Linear: PinnedLinear, Router: PinnedRouter, Experts: PinnedExperts, Attention: PinnedAttention,
    Fp8Linear: PinnedFp8Linear, Fp8MLP: PinnedFp8MLP, Fp8Experts: PinnedFp8Experts,
}  # fmt: skip
