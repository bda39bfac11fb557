"""Every op once: how to call it, on what, and what is expected of it. Tests and benchmarks both read this table."""

import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import product

import pytest
import torch
from torch import Tensor

from ling_kernels.backend import _C, force
from ling_kernels.op import E4M3
from ling_kernels.ops.accept_tokens import accept_tokens, accept_tokens_ref
from ling_kernels.ops.adamw_8bit import Moments, adamw_8bit, adamw_8bit_ref, adamw_8bit_state
from ling_kernels.ops.attention import attention, attention_ref
from ling_kernels.ops.attention_cells import attention_cells, attention_cells_ref
from ling_kernels.ops.attention_decode import KVCache, append, attention_decode, attention_decode_ref
from ling_kernels.ops.balance_bias import balance_bias_, balance_bias_ref
from ling_kernels.ops.cross_entropy import cross_entropy, cross_entropy_ref
from ling_kernels.ops.decode_inputs import decode_inputs, decode_inputs_ref
from ling_kernels.ops.dispatch import Plan, dispatch, dispatch_ref
from ling_kernels.ops.gemm_fp8 import gemm_fp8, gemm_fp8_ref
from ling_kernels.ops.grad_norm import grad_norm, grad_norm_ref
from ling_kernels.ops.grouped_gemm import grouped_gemm, grouped_gemm_ref
from ling_kernels.ops.grouped_gemm_fp8 import (
    grouped_gemm_fp8,
    grouped_gemm_fp8_masked,
    grouped_gemm_fp8_masked_ref,
    grouped_gemm_fp8_ref,
)
from ling_kernels.ops.grouped_wgrad import grouped_wgrad, grouped_wgrad_ref
from ling_kernels.ops.linear_cross_entropy import linear_cross_entropy, linear_cross_entropy_ref
from ling_kernels.ops.moe import expert_mlp, moe
from ling_kernels.ops.moe_decode import moe_decode
from ling_kernels.ops.permute import permute, permute_quantize, permute_quantize_ref, permute_ref
from ling_kernels.ops.qk_norm_attention import qk_norm_attention, qk_norm_attention_ref
from ling_kernels.ops.qk_norm_attention_decode import qk_norm_attention_decode, qk_norm_attention_decode_ref
from ling_kernels.ops.qk_norm_rope import qk_norm_rope, qk_norm_rope_ref
from ling_kernels.ops.quantize import (
    dequantize,
    pad_columns,
    quantize,
    quantize_ref,
    quantize_weight,
    quantize_weight_ref,
)
from ling_kernels.ops.rms_norm import rms_norm, rms_norm_ref
from ling_kernels.ops.rms_norm_linear import rms_norm_linear
from ling_kernels.ops.rms_norm_router import rms_norm_router
from ling_kernels.ops.rope_tables import rope_tables
from ling_kernels.ops.route import route, route_ref
from ling_kernels.ops.router_gemm import router_gemm, router_gemm_ref
from ling_kernels.ops.sample import sample, sample_ref
from ling_kernels.ops.swiglu import swiglu, swiglu_backward, swiglu_backward_ref, swiglu_ref
from ling_kernels.ops.transpose_fp8 import transpose_fp8, transpose_fp8_ref
from ling_kernels.ops.unpermute import unpermute, unpermute_ref
from tests.gpu import triton_driver

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BF16, FP32 = torch.bfloat16, torch.float32


BORDER = 64  # elements of NaN before and after every random tensor: reads past an end give NaN


class Rand:
    """Random tensors for one Case in its dtype; what a call returns is a leaf of autograd."""

    def __init__(self, dtype: torch.dtype, seed: int = 0):
        self.dtype, self.g = dtype, torch.Generator(DEVICE).manual_seed(seed)

    def __call__(self, *shape, dtype=None) -> Tensor:
        values = torch.randn(*shape, generator=self.g, device=DEVICE).to(dtype or self.dtype)
        padded = values.new_full((values.numel() + 2 * BORDER,), torch.nan)
        padded[BORDER : BORDER + values.numel()] = values.flatten()
        return padded[BORDER : BORDER + values.numel()].view(shape).detach().requires_grad_()

    def fp32(self, *shape) -> Tensor:
        return self(*shape, dtype=torch.float32)

    def data(self, *shape, dtype=None) -> Tensor:
        """The same without a gradient."""
        return self(*shape, dtype=dtype).detach()

    def ints(self, low: int, high: int, *shape, dtype=torch.int32) -> Tensor:
        return torch.randint(low, high, shape, generator=self.g, device=DEVICE).to(dtype)

    def bools(self, *shape, p=0.5) -> Tensor:
        return torch.rand(*shape, generator=self.g, device=DEVICE) < p


@dataclass(frozen=True)
class Case:
    op: Callable  # the public function
    ref: Callable  # same arguments, same results, plain torch
    make: Callable  # make(rand, **shape) -> arguments; scalars large enough to be missed if dropped
    shapes: list  # the last one is the benchmark shape and no test's
    dtypes: tuple = (BF16, FP32)
    backends: tuple = ("torch",)
    kwargs: dict = field(default_factory=dict)  # further arguments by name; part of the test's id
    truth: Callable = None  # what a quantised result approximates; otherwise ref itself, in fp64
    exact: bool | tuple = False  # outputs that equal the reference's bit for bit: all, or these indices
    defined: Callable = None  # outputs -> outputs with what the contract leaves undefined cut away
    product: bool = False  # a matrix product, linear in either factor: tensor cores may lose a share of |A||B|
    flops: Callable = None  # flops(**shape); None: the op is memory bound
    backward_flops: float = 2.0  # over the forward's
    bytes: Callable = None  # bytes(**shape) of the forward, where arguments are not all read or results not all written
    ling: Callable = None  # ling(p) -> shapes at a point p of POINTS in benchmarks/work.py, for benchmarks
    # Shapes with Ling's real constants to build Triton kernels at; () stands for the tests' shapes, None for an op that
    # has other ops' kernels only
    hopper: list | None = ()

    @property
    def name(self) -> str:
        return "-".join([self.op.__name__, *(k if v is True else f"{k}={v}" for k, v in self.kwargs.items())])


def in_place(fn: Callable, i: int) -> Callable:
    """fn as a function that returns argument i after the call."""

    @functools.wraps(fn)
    def call(*args, **kwargs):
        args = [*args]
        args[i] = args[i].clone()
        fn(*args, **kwargs)
        return args[i]

    call.writes = (i,)
    return call


def by_references(fn: Callable) -> Callable:
    """A composition of ops that is its own definition, with every part's reference for the part."""

    @functools.wraps(fn)
    def call(*args, **kwargs):
        with force("torch"):
            return fn(*args, **kwargs)

    return call


def plan_of(rand: Rand, T: int, E: int, topk: int, routing: str = "") -> Plan:
    """A plan of random experts; routing "masked" drops choices, "one" sends all to one expert, "zipf" is skewed."""
    score = torch.rand(T, E, generator=rand.g, device=DEVICE)
    if routing == "zipf":  # the largest of log p plus Gumbel noise are a sample without replacement
        score = (-score.log()).log() - zipf(E).log()
    experts = score.argsort(1)[:, :topk].int() if routing != "one" else rand.ints(E // 2, E // 2 + 1, T, topk)
    if routing == "masked":
        experts = experts.masked_fill(rand.bools(T, topk), -1)
    return dispatch_ref(experts, counts_of(experts, E))


def counts_of(experts: Tensor, E: int) -> Tensor:
    return (experts.reshape(-1, 1) == torch.arange(E, device=DEVICE)).sum(0, dtype=torch.int32)


def zipf(E: int) -> Tensor:
    """Shares of E experts, the i-th busiest having 1 / i of the busiest's."""
    p = 1 / torch.arange(1, E + 1, device=DEVICE)
    return p / p.sum()


def offsets_of(rand: Rand, S: int, E: int, unused: int = 0, routing: str = "") -> Tensor:
    """E runs of random length, the first one empty where there is another; the last `unused` rows are nobody's.

    routing "balanced", "zipf" or "one" is what a router of that kind would give instead.
    """
    if routing:
        p = zipf(E) if routing == "zipf" else torch.ones(E, device=DEVICE)
        if routing == "one":
            p = torch.eye(E, device=DEVICE)[E // 2]
        owner = torch.multinomial(p, S - unused, True, generator=rand.g) if S > unused else rand.ints(0, E, 0)
        return torch.nn.functional.pad(counts_of(owner, E).cumsum(0), (1, 0)).int()
    cuts = rand.ints(0, S - unused + 1, E - 1).sort().values if E > 1 else rand.ints(0, 1, 0)
    cuts[:1] = 0
    return torch.nn.functional.pad(torch.cat([cuts, cuts.new_tensor([S - unused])]), (1, 0)).int()


def poison(x: Tensor, offsets: Tensor) -> Tensor:
    """x with NaN in the rows past offsets[E], which nothing may read."""
    rows = torch.arange(len(x), device=x.device) >= offsets[-1]
    return x.detach().masked_fill(rows[:, None], torch.nan).requires_grad_(x.requires_grad)


def owned(outs: list[Tensor], args) -> list[Tensor]:
    """Up to two outputs of rows and two of columns, without those past the last expert's, which are undefined."""
    plan = next((a for a in args if isinstance(a, Plan)), None)
    offsets = plan.offsets if plan else next(a for a in args if isinstance(a, Tensor) and a.dtype == torch.int32)
    rows = [o[: int(offsets[-1])] for o in outs[:2]]
    return rows + [o[:, : int(plan.padded_offsets[-1]) // n] for o, n in zip(outs[2:], (1, 128), strict=False)]


def moe_args(rand, T, E, H, F, groups=1, group_topk=1, topk=2, Fs=0, masked=False, fp8=False):
    x, router_w, bias = rand(T, H), rand.fp32(E, H), rand.data(E, dtype=FP32) / 10
    shapes = [(E, 2 * F, H), (E, H, F)] + ([(2 * Fs, H), (H, Fs)] if Fs else [])
    weights = [(rand.data(*shape) / shape[-1] ** 0.5).requires_grad_() for shape in shapes]
    if fp8:
        x, weights = x.detach(), [quantize_weight(w) for w in weights]
    mask = rand.bools(T) if masked else None
    return x, router_w, bias, *weights[:2], tuple(weights[2:]) or None, mask, groups, group_topk, topk, 2.0


def expert_mlp_args(rand, T, E, H, F, topk=2, fp8=False):
    x, _, _, *experts, _, _, _, _, _, _ = moe_args(rand, T, E, H, F, fp8=fp8)
    return x, plan_of(rand, T, E, topk, "masked"), rand.fp32(T, topk).detach().abs().requires_grad_(not fp8), *experts


def moe_decode_args(rand, residual=False, norm=False, **shape):
    x, *args = moe_args(rand, **shape)
    like_x = rand.data(*x.shape) if residual else None
    weight = 1 + rand.data(x.shape[1]) / 4 if norm else None
    return (x.detach(), *args[:5], *args[6:], like_x, weight, 0.1)


def qk_norm_attention_flops(q, Hq, Hkv, D, **others):
    return 2 * sum(n * n for n in q) * Hq * D


def moe_flops(T, E, H, F, topk=2, Fs=0, **others):
    return 2 * T * (3 * H * (topk * F + Fs) + E * H)


def moe_decode_bytes(T, E, H, F, topk=2, Fs=0, fp8=False, **others):
    """Of the experts, as many as T x topk different ones."""
    weights = 3 * H * (min(E, T * topk) * F + Fs)
    return weights * (1 if fp8 else 2) + 4 * E * H + 4 * T * H


def norm_linear_args(rand, M, N, K, plain=False, fp8=False, dtype=FP32):
    """plain: no norm."""
    norm = None if plain else 1 + rand.data(K) / 4
    return rand.data(M, K), norm, quantize_weight(rand.data(N, K)) if fp8 else rand.data(N, K), 0.1, dtype


def norm_router_args(rand, T, E, H, plain=False, fp32=False):
    """plain: no residual; fp32: all but x in fp32."""
    dtype = FP32 if fp32 else None
    x, w, router_w = rand.data(T, H), 1 + rand.data(H, dtype=dtype) / 4, rand.data(E, H, dtype=dtype)
    return (x, w, router_w) if plain else (x, w, router_w, rand.data(T, H, dtype=dtype))


def forced_route_args(rand, T, E, topk, masked=False, z_loss=0.5):
    """Experts that these logits would not choose; masked: one token in three is padding, by its mask or by -1."""
    experts = torch.rand(T, E, generator=rand.g, device=DEVICE).argsort(1)[:, :topk].int()
    mask = rand.bools(T, p=0.8) if masked else None
    experts = experts.masked_fill(rand.bools(T, 1, p=0.2), -1) if masked else experts
    return rand.fp32(T, E), rand.data(E, dtype=FP32), mask, 1, 1, topk, 1.5, z_loss, experts


def router_args(rand, T, E, H, w_offset=0):
    """w_offset: the mean of the rows of w, with alternating sign, so that they cancel in dx."""
    side = w_offset * (-1) ** torch.arange(E, device=DEVICE)[:, None]
    return rand(T, H), (rand.data(E, H, dtype=FP32) + side).requires_grad_()


def gemm_fp8_args(rand, M, N, K, row_scales=False, out=False, accumulate=False):
    """row_scales: one scale per 1 x 128 of b instead of per 128 x 128."""
    b = quantize(rand.data(N, K)) if row_scales else quantize_weight(rand.data(N, K))
    return *quantize(rand.data(M, K)), *b, rand.data(M, N) if out else None, accumulate, rand.dtype


def grouped_fp8_args(rand, S, E, N, K, unused=0, transposed=False, routing=""):
    offsets = offsets_of(rand, S, E, unused, routing)
    w = rand.data(E, K, N) if transposed else rand.data(E, N, K)
    return *quantize(poison(rand.data(S, K), offsets)), *quantize_weight(w), offsets


def gather_args(rand, T, E, N, K, topk=2, routing=""):
    plan = plan_of(rand, T, E, topk, routing)
    return *quantize(rand.data(T, K)), *quantize_weight(rand.data(E, N, K)), plan.offsets, plan


def masked_fp8_args(rand, E, M, N, K):
    a, a_scale = (t.unflatten(0, (E, M)) for t in quantize(rand.data(E * M, K)))
    return a, a_scale, *quantize_weight(rand.data(E, N, K)), rand.ints(0, M + 1, E)


def wgrad_args(rand, S, E, N, K, unused=0, out=False, accumulate=False, fp8=False, routing=""):
    offsets = offsets_of(rand, S, E, unused, routing)
    (dy, *dy_scale), (x, *x_scale) = (
        quantize(t) if fp8 else (t,) for t in (poison(rand.data(S, n), offsets) for n in (N, K))
    )
    dw = rand.data(E, N, K, dtype=FP32) if out else None
    return dy, x, offsets, dw, accumulate, *(dy_scale or (None,)), *(x_scale or (None,))


def wgrad_column_args(rand, T, E, N, K, topk=2, routing=""):
    plan = plan_of(rand, T, E, topk, routing)
    (dy, dy_scale), (x, x_scale) = (
        quantize(poison(rand.data(T * topk, n), plan.offsets), False, True, plan) for n in (N, K)
    )
    return dy, x, plan.padded_offsets, None, False, dy_scale, x_scale, True


def writing(fn: Callable, *written: int) -> Callable:
    """fn as a function that also returns its arguments `written` after the call."""

    def copied(a):
        return a.clone() if isinstance(a, Tensor) else type(a)(*map(copied, a)) if hasattr(a, "_fields") else (
            tuple(map(copied, a)) if isinstance(a, tuple) else a
        )  # fmt: skip

    @functools.wraps(fn)
    def call(*args, **kwargs):
        args = [copied(a) if i in written else a for i, a in enumerate(args)]
        return fn(*args, **kwargs), *(args[i] for i in written)

    call.writes = written
    return call


def adamw_args(rand, sizes, seed=None, clip=None, skip=None, fp8=False, fp32_moments=False):
    """sizes: numbers of elements, or shapes. clip, skip: the scalars grad_scale and found_inf."""
    shapes = [(n,) if isinstance(n, int) else n for n in sizes]
    params, grads, earlier = (tuple(rand.data(*n) for n in shapes) for _ in range(3))
    state = tuple(adamw_8bit_state(params))
    if fp32_moments:
        state = tuple(Moments(s.m.float(), None, s.v.float(), None) for s in state)
    adamw_8bit_ref(params, earlier, state, 0.1, (0.9, 0.95), 0.01, 0.1, 1)
    clip, skip = (None if x is None else torch.tensor(x, device=DEVICE) for x in (clip, skip))
    copies = tuple(quantize_weight(p) for p in params) if fp8 else None
    return params, grads, state, 0.1, (0.9, 0.95), 0.01, 0.1, 2, clip, skip, seed, copies


def dequantized(fn: Callable) -> Callable:
    """fn with its codes times their scales: what can be judged where a last bit may move a value to the next code."""

    @functools.wraps(fn)
    def call(*args, **kwargs):
        out = fn(*args, **kwargs)
        out, *others = out if isinstance(out[0], tuple) else (out,)
        pairs = zip(out[::2], out[1::2], strict=True)
        return *(t for q, scale in pairs for t in (dequantize(q, scale), scale)), *others

    return call


def with_fp8_rows(fn: Callable, exact: bool = False) -> Callable:
    """Returns fn's result and its FP8 copy, dequantised; exact=True: undequantised."""

    @functools.wraps(fn)
    def call(*args, **kwargs):
        out, q, scale = fn(*args, **kwargs, quantize=True)
        return out, out.flatten(2).flatten(0, 1) if exact else dequantize(q, scale)

    return call


def swiglu_unquantized(x, weights, quantize, columns=False, plan=None, pow2=False):
    """What dequantized(swiglu) approximates."""
    y, scales = swiglu_ref(x, weights), swiglu_ref(x, weights, quantize, columns, plan, pow2)[1::2]
    return tuple(t for pair in zip((y, pad_columns(y, plan).T), scales, strict=False) for t in pair)


def grouped_swiglu_unquantized(*args, swiglu):
    """What dequantized(grouped_gemm_fp8) with swiglu approximates."""
    return swiglu_ref(grouped_gemm_fp8_ref(*args, dtype=FP32)), grouped_gemm_fp8_ref(*args, swiglu=swiglu)[1]


def swiglu_backward_args(rand, T, E, F, routing=""):
    plan = plan_of(rand, T, E, 2, routing)
    dy, x, weights = (poison(rand.data(2 * T, n), plan.offsets) for n in (F, 2 * F, 1))
    return dy, x, weights[:, 0].float(), True, True, plan


def swiglu_backward_unquantized(dy, x, weights, quantize, columns=False, plan=None, pow2=False):
    """What dequantized(swiglu_backward) approximates."""
    dx, dweights = swiglu_backward_ref(dy, x, weights)
    scales = swiglu_backward_ref(dy, x, weights, quantize, columns, plan, pow2)[0][1::2]
    return *(t for pair in zip((dx, pad_columns(dx, plan).T), scales, strict=False) for t in pair), dweights


def cu_seqlens(lens) -> Tensor:
    return torch.tensor([0, *lens], device=DEVICE).cumsum(0).int()


def attention_args(rand, q, k=None, Hq=4, Hkv=2, D=32):
    """q, k: the sequences' lengths."""
    Tk = sum(q if k is None else k)
    qkv = rand(sum(q), Hq, D), rand(Tk, Hkv, D), rand(Tk, Hkv, D)
    return *qkv, cu_seqlens(q), None if k is None else cu_seqlens(k)


def cache_of(rand, num_blocks, block_size, Hkv, D, fp8=False) -> KVCache:
    k, v = (rand.data(num_blocks, block_size, Hkv, D) for _ in range(2))
    if not fp8:
        return KVCache(k, v)
    scales = [torch.zeros(k.shape[:3], device=DEVICE) for _ in range(2)]
    cache = KVCache(torch.zeros_like(k, dtype=E4M3), torch.zeros_like(v, dtype=E4M3), *scales)
    append(cache, k.flatten(0, 1), v.flatten(0, 1), torch.arange(num_blocks * block_size, device=DEVICE))
    return cache


def decode_args(rand, lengths, n=1, Hq=4, Hkv=2, D=32, block_size=4, fp8=False):
    B, pages = len(lengths), -(-max(lengths, default=0) // block_size)
    cache = cache_of(rand, max(B * pages, 1), block_size, Hkv, D, fp8)
    table = torch.randperm(B * pages, generator=rand.g, device=DEVICE).view(B, pages).int()
    return rand.data(B, n, Hq, D), cache, table, torch.tensor(lengths, dtype=torch.int32, device=DEVICE), 0.3


DECODE_HOPPER = [
    dict(lengths=(70, 3), n=n, Hq=h, Hkv=g, D=128, block_size=64)
    for h, g, n in ((16, 4, 1), (32, 4, 1), (64, 8, 1), (64, 8, 4), (64, 8, 8))
]

NORM_DECODE_HOPPER = [dict(shape, R=64) for shape in DECODE_HOPPER]


def qk_norm_rope_args(rand, T, Hq=3, Hkv=1, D=20, R=6, P=50, yarn=None, cache=None, fp8=False):
    """cache: its block size."""
    scaling = yarn and {"type": "yarn", "factor": yarn, "original_max_position_embeddings": P // yarn}
    args = (
        rand(T, Hq + 2 * Hkv, D), rand(D), rand(D), *rope_tables(P, R, 1e4, scaling, DEVICE),
        rand.ints(0, P, T, dtype=torch.int64 if T % 2 else torch.int32), Hkv, 0.1,
    )  # fmt: skip
    if cache is None:
        return args
    slots = torch.randperm((T // cache + 2) * cache, generator=rand.g, device=DEVICE)[:T]
    return *args, cache_of(rand, T // cache + 2, cache, Hkv, D, fp8), slots


def norm_decode_args(rand, lengths, n=1, Hq=4, Hkv=2, D=32, R=8, P=200, block_size=4, fp8=False):
    q, *cached, scale = decode_args(rand, lengths, n, Hq, Hkv, D, block_size, fp8)
    qkv, weights = rand.data(len(q), n, Hq + 2 * Hkv, D), (rand.data(D), rand.data(D))
    return qkv, *weights, *rope_tables(P, R, 1e4, None, DEVICE), *cached, scale, 0.1


def norm_decode_bytes(lengths, Hq, Hkv, D, n=1, fp8=False, **others):
    cell = 2 * (D + 4 if fp8 else 2 * D)
    return sum(lengths) * Hkv * cell + 4 * len(lengths) * n * (Hq + Hkv) * D


def decode_inputs_args(rand, lengths, H, n=1, V=50, pages=5, width=5):
    L, P = len(lengths) + 1, max(lengths, default=0) + n
    lanes = torch.randperm(L, generator=rand.g, device=DEVICE)[: len(lengths)]
    token_ids = rand.ints(-1, V, L, P)
    of_lanes = torch.zeros(L, dtype=torch.int64, device=DEVICE)
    of_lanes[lanes] = torch.tensor(lengths, dtype=torch.int64, device=DEVICE)
    return lanes, token_ids, of_lanes, rand.ints(0, 99, L, pages), rand.data(V, H), n, width


def accept_tokens_args(rand, B, n, P, kinds, lookup=False):
    """Sequences of few kinds of tokens, so that lookups find some; of drafts most are right. The last lane is empty."""
    token_ids, lengths = rand.ints(0, kinds, B + 1, P), rand.ints(1, P - 2 * n, B + 1, dtype=torch.int64)
    lengths[B] = 0
    lanes = torch.randperm(B + 1, generator=rand.g, device=DEVICE)[:B]
    positions = (lengths[lanes, None] - 1 + torch.arange(n, device=DEVICE)).clamp(min=0)
    tokens = rand.ints(0, kinds, B, n, dtype=torch.int64)
    tokens = torch.where(rand.bools(B, n, p=0.7), token_ids[lanes[:, None], positions + 1].long(), tokens)
    return tokens, lanes, positions, token_ids, lengths, lookup


def sample_args(rand, B, V, n=1, P=30, mode=(True, True, True), ties=False, **fixed):
    """Lanes of all kinds of parameters; fixed: parameters that are the same in all lanes."""
    L = B + 2

    def pick(*values):
        return torch.tensor(values, device=DEVICE)[rand.ints(0, len(values), L).long()]

    parameters = dict(
        temperature=pick(0.0, 0.3, 1.0, 2.5), top_p=pick(1.0, 0.9, 0.5, 1e-6), min_p=pick(0.0, 0.05, 1.0),
        repetition_penalty=pick(1.0, 1.3, 0.7), top_k=pick(V, V, 1, min(V, 3), min(V, 40)),
    )  # fmt: skip
    parameters |= {name: torch.full_like(parameters[name], value) for name, value in fixed.items()}
    logits = rand.ints(-3, 4, B * n, V).to(rand.dtype) if ties else rand.data(B * n, V) * 3
    lanes = torch.randperm(L, generator=rand.g, device=DEVICE)[:B]
    return (
        logits, tuple(parameters.values()), mode, lanes, rand.ints(0, P, B * n, dtype=torch.int64),
        rand.ints(-1, V, L, P), rand.ints(0, 1 << 62, L, dtype=torch.int64),
    )  # fmt: skip


def targets_of(rand, T, V) -> Tensor:
    return rand.ints(0, V, T, dtype=torch.int64).masked_fill(rand.bools(T, p=0.2), -7)


CASES = [
    Case(
        writing(accept_tokens, 3, 4), writing(accept_tokens_ref, 3, 4), accept_tokens_args,
        [dict(B=0, n=2, P=20, kinds=2), dict(B=1, n=1, P=10, kinds=3), dict(B=5, n=4, P=60, kinds=3, lookup=True),
         dict(B=3, n=8, P=2500, kinds=9, lookup=True), dict(B=8, n=3, P=32768, kinds=157184, lookup=True)],
        dtypes=(FP32,), backends=("torch", "cuda"), hopper=None,
    ),
    Case(
        writing(adamw_8bit, 0, 2, 11), writing(adamw_8bit_ref, 0, 2, 11), adamw_args,
        [dict(sizes=()), dict(sizes=(0, 1, 256, 257)), dict(sizes=(300,), skip=1.0),
         dict(sizes=(33000,), seed=5, clip=1.7, skip=0.0), dict(sizes=(1, 700), seed=8, fp32_moments=True),
         dict(sizes=((2, 128, 512), (128, 384)), seed=6, clip=1.3, fp8=True), dict(sizes=(2048 * 1024,) * 64)],
        exact=True, backends=("torch", "triton"),
        hopper=[dict(sizes=(4096,), clip=1.0, skip=0.0),
                dict(sizes=((2048, 2048),), seed=7, clip=1.0, skip=0.0, fp8=True),
                dict(sizes=(4096,), seed=7, clip=1.0, skip=0.0, fp32_moments=True)],
    ),
    Case(
        attention, attention_ref, attention_args,
        [dict(q=()), dict(q=(0,)), dict(q=(1,), k=(3,)), dict(q=(5, 0, 1, 37)), dict(q=(127, 128, 129), Hkv=1),
         dict(q=(3, 5, 0, 4, 1), k=(9, 2, 4, 0, 1)), dict(q=(130, 7), k=(5, 300), Hq=2, D=24),
         dict(q=(19, 5), Hq=16, Hkv=4, D=128), dict(q=(19, 5), Hq=32, Hkv=4, D=128), dict(q=(17,), Hq=64, Hkv=8, D=128),
         dict(q=(4096,) * 8, Hq=16, Hkv=4, D=128)],
        kwargs=dict(scale=0.3), defined=lambda outs, args: [outs[0], outs[1].nan_to_num(neginf=0)],
        backends=("torch", "triton"),
        hopper=[dict(q=(19, 5), Hq=h, Hkv=g, D=128) for h, g in ((16, 4), (32, 4), (64, 8))],
        flops=lambda q, Hq, Hkv, D: 2 * sum(n * n for n in q) * Hq * D, backward_flops=2.5,
    ),
    Case(
        attention, attention_ref, attention_args,
        [dict(q=(3, 5, 0, 4, 1), k=(9, 2, 4, 0, 1)), dict(q=(130, 7)), dict(q=(4096,) * 8, Hq=16, Hkv=4, D=128)],
        kwargs=dict(causal=False), defined=lambda outs, args: [outs[0], outs[1].nan_to_num(neginf=0)],
        flops=lambda q, Hq, Hkv, D: 4 * sum(n * n for n in q) * Hq * D, backward_flops=2.5,
        backends=("torch", "triton"), hopper=[dict(q=(19, 5), Hq=16, Hkv=4, D=128)],
    ),
    Case(
        attention, attention_ref, attention_args,
        [dict(q=(0, 19, 5), Hq=4, Hkv=2, D=128), dict(q=(130, 7), k=(5, 200), Hq=2, Hkv=1, D=128),
         dict(q=(8192,), Hq=32, Hkv=4, D=128)],
        kwargs=dict(scale=0.2), dtypes=(BF16,), defined=lambda outs, args: [outs[0], outs[1].nan_to_num(neginf=0)],
        backends=("torch", "triton", "cuda"), hopper=None,
        flops=lambda q, Hq, Hkv, D: 2 * sum(n * n for n in q) * Hq * D, backward_flops=2.5,
        ling=lambda p: [dict(q=p.lengths, Hq=p.Hq, Hkv=p.Hkv, D=128)],
    ),
    Case(
        attention_cells, attention_cells_ref, lambda rand, **shape: decode_args(rand, **shape)[:-1],
        [dict(lengths=()), dict(lengths=(0, 0)), dict(lengths=(1,)), dict(lengths=(7, 0, 1, 12, 13), n=3),
         dict(lengths=(9, 40), n=23, Hq=3, Hkv=1, D=24, block_size=16),
         dict(lengths=(70, 3), Hq=16, Hkv=4, D=128, block_size=16),
         dict(lengths=(0, 129, 5), n=2, Hq=16, Hkv=2, D=128, block_size=32),
         dict(lengths=(4096,) * 32, Hq=16, Hkv=4, D=128, block_size=64)],
        backends=("torch", "triton"),
        hopper=[dict(lengths=(70, 3), n=n, Hq=h, Hkv=4, D=128, block_size=64) for h, n in ((16, 1), (32, 3))],
        ling=lambda p: p.T <= 64 and [dict(lengths=(4096,) * p.T, Hq=p.Hq, Hkv=p.Hkv, D=128, block_size=64)],
    ),
    Case(
        attention_decode, attention_decode_ref, decode_args,
        [dict(lengths=()), dict(lengths=(0, 0)), dict(lengths=(1,)), dict(lengths=(7, 0, 1, 12, 13), n=3),
         dict(lengths=(9, 40), n=8, Hq=3, Hkv=1, D=24, block_size=16),
         dict(lengths=(70, 3), Hq=16, Hkv=4, D=128, block_size=16),
         dict(lengths=(0, 129, 5), n=2, Hq=16, Hkv=2, D=128, block_size=32),
         dict(lengths=(33,), n=4, Hq=64, Hkv=8, D=128, block_size=48),
         dict(lengths=(4096,) * 32, Hq=16, Hkv=4, D=128, block_size=64)],
        backends=("torch", "triton", "cuda"), hopper=DECODE_HOPPER,
        ling=lambda p: p.T <= 64 and [dict(lengths=(4096,) * p.T, Hq=p.Hq, Hkv=p.Hkv, D=128, block_size=64)],
    ),
    Case(
        attention_decode, attention_decode_ref, lambda rand, **shape: decode_args(rand, **shape, fp8=True),
        [dict(lengths=()), dict(lengths=(7, 0, 1, 12), n=3), dict(lengths=(70, 3), Hq=16, Hkv=4, D=128, block_size=16),
         dict(lengths=(37, 130), n=3, Hq=16, Hkv=2, D=128, block_size=64),
         dict(lengths=(4096,) * 32, Hq=16, Hkv=4, D=128, block_size=64)],
        backends=("torch", "triton", "cuda"), hopper=DECODE_HOPPER,
    ),
    Case(
        in_place(balance_bias_, 0), in_place(balance_bias_ref, 0),
        lambda rand, E: (rand.data(E, dtype=FP32), rand.ints(0, 9, E), 0.1),
        [dict(E=1), dict(E=3), dict(E=256), dict(E=256)],
        dtypes=(FP32,), exact=True, backends=("torch", "triton", "cuda"),
    ),
    Case(
        cross_entropy, cross_entropy_ref,
        lambda rand, T, V, reduction="mean", x=1: (rand(T, V) * x, targets_of(rand, T, V), -7, reduction),
        [dict(T=0, V=5), dict(T=1, V=1), dict(T=67, V=1000), dict(T=37, V=129, reduction="sum"),
         dict(T=37, V=320, reduction="none", x=1e4), dict(T=3, V=157184), dict(T=8192, V=157184)],
        backends=("torch", "triton"), ling=lambda p: [dict(T=p.T, V=157184)],
        hopper=[dict(T=64, V=v) for v in (320, 1000, 157184)],
    ),
    Case(
        decode_inputs, decode_inputs_ref, decode_inputs_args,
        [dict(lengths=(), H=8), dict(lengths=(3,), H=24), dict(lengths=(7, 0, 1, 20), H=1048, n=3, width=2),
         dict(lengths=(5,), H=2048, n=8, width=0), dict(lengths=(4096,) * 8, H=2048, V=157184, pages=512, width=512)],
        backends=("torch", "cuda"), exact=True, hopper=None,
        bytes=lambda lengths, H, n=1, width=5, **others: len(lengths) * (4 * n * H + 8 * width),
    ),
    Case(
        dispatch, dispatch_ref,
        lambda rand, T, E, topk: (e := rand.ints(-1, E, T, topk), counts_of(e, E)),
        [dict(T=0, E=4, topk=2), dict(T=1, E=1, topk=1), dict(T=67, E=8, topk=3), dict(T=5, E=256, topk=8),
         dict(T=300, E=5, topk=3), dict(T=8200, E=3, topk=4), dict(T=8192, E=256, topk=8)],
        dtypes=(FP32,), exact=True, backends=("torch", "triton", "cuda"),
        ling=lambda p: [dict(T=p.T, E=256, topk=8)],
        hopper=[dict(T=1, E=256, topk=8), dict(T=64, E=256, topk=8)],
    ),
    Case(
        gemm_fp8, gemm_fp8_ref, gemm_fp8_args,
        [dict(M=0, N=128, K=128), dict(M=1, N=128, K=256), dict(M=67, N=256, K=2048), dict(M=5, N=3072, K=128),
         dict(M=5, N=33, K=256, row_scales=True), dict(M=8192, N=3072, K=2048)],
        product=True, backends=("torch", "triton", "cuda"), flops=lambda M, N, K: 2 * M * N * K,
        ling=lambda p: [dict(M=p.T, N=(p.Hq + 2 * p.Hkv) * 128, K=p.H)],
        hopper=[dict(M=8, N=3072, K=2048), dict(M=32, N=2048, K=4096), dict(M=256, N=4096, K=512),
                dict(M=256, N=1024, K=8192)],
    ),
    Case(
        gemm_fp8, gemm_fp8_ref,
        lambda rand, M, N, K: (*quantize(rand.data(M, K)), *quantize_weight(rand.data(K, N)), None, False, rand.dtype),
        [dict(M=37, N=256, K=384), dict(M=100, N=384, K=256), dict(M=8192, N=2048, K=3072)],
        kwargs=dict(transposed=True), product=True, flops=lambda M, N, K: 2 * M * N * K,
        backends=("torch", "triton", "cuda"), hopper=[dict(M=8, N=2048, K=3072)],
    ),
    Case(
        in_place(gemm_fp8, 4), in_place(gemm_fp8_ref, 4), gemm_fp8_args,
        [dict(M=0, N=128, K=128, out=True), dict(M=37, N=256, K=384, row_scales=True, out=True, accumulate=True),
         dict(M=37, N=256, K=384, out=True), dict(M=2048, N=2048, K=8192, row_scales=True, out=True, accumulate=True)],
        product=True, flops=lambda M, N, K, **others: 2 * M * N * K,
        backends=("torch", "triton", "cuda"),
        hopper=[dict(M=512, N=2048, K=2048, row_scales=True, out=True, accumulate=True),
                dict(M=512, N=2048, K=2048, out=True)],
    ),
    Case(
        grad_norm, grad_norm_ref,
        lambda rand, sizes: (tuple(rand.data(n) for n in sizes),),
        [dict(sizes=()), dict(sizes=(0,)), dict(sizes=(1, 0, 1000, 7)), dict(sizes=(2048 * 1024,) * 64)],
    ),
    Case(
        grouped_gemm, grouped_gemm_ref,
        lambda rand, S, E, N, K, unused=0, routing="": (
            poison(rand(S, K), offsets := offsets_of(rand, S, E, unused, routing)), rand(E, N, K), offsets,
        ),
        [dict(S=0, E=3, N=8, K=16), dict(S=1, E=1, N=1, K=1), dict(S=67, E=8, N=33, K=24, unused=5),
         dict(S=9, E=256, N=8, K=8), dict(S=7, E=2, N=1024, K=128), dict(S=7, E=2, N=128, K=2048),
         dict(S=140, E=1, N=264, K=72, unused=5), dict(S=65536, E=256, N=1024, K=2048)],
        defined=owned, flops=lambda S, E, N, K, routing="": 2 * S * N * K, product=True, backends=("torch", "triton"),
        ling=lambda p: [dict(S=p.S, E=p.E, N=n, K=k, routing=p.routing) for n, k in ((2 * p.F, p.H), (p.H, p.F))],
        hopper=[dict(S=16, E=2, N=1024, K=2048), dict(S=64, E=2, N=4096, K=1024), dict(S=128, E=2, N=4096, K=4096),
                dict(S=64, E=10, N=2048, K=512), dict(S=256, E=10, N=2048, K=512),
                dict(S=256, E=1, N=4096, K=8192), dict(S=256, E=2, N=33, K=24)],
    ),
    Case(
        grouped_gemm_fp8, grouped_gemm_fp8_ref, grouped_fp8_args,
        [dict(S=0, E=3, N=128, K=128), dict(S=1, E=1, N=128, K=128), dict(S=67, E=8, N=128, K=256, unused=5),
         dict(S=7, E=2, N=1024, K=128), dict(S=7, E=2, N=128, K=2048), dict(S=150, E=2, N=256, K=1152),
         dict(S=65536, E=256, N=1024, K=2048)],
        dtypes=(BF16,), defined=owned, flops=lambda S, E, N, K, routing="": 2 * S * N * K, product=True,
        backends=("torch", "triton", "cuda"),
        ling=lambda p: [dict(S=p.S, E=p.E, N=n, K=k, routing=p.routing) for n, k in ((2 * p.F, p.H), (p.H, p.F))],
        hopper=[dict(S=16, E=2, N=1024, K=2048), dict(S=64, E=2, N=4096, K=1024), dict(S=512, E=2, N=2048, K=512),
                dict(S=64, E=10, N=2048, K=512), dict(S=256, E=10, N=2048, K=512),
                dict(S=512, E=2, N=2048, K=4096), dict(S=128, E=1, N=4096, K=8192)],
    ),
    Case(
        grouped_gemm_fp8, grouped_gemm_fp8_ref, functools.partial(grouped_fp8_args, transposed=True),
        [dict(S=0, E=3, N=128, K=128), dict(S=67, E=8, N=128, K=256, unused=5), dict(S=170, E=2, N=384, K=640),
         dict(S=65536, E=256, N=2048, K=1024)],
        dtypes=(BF16,), kwargs=dict(transposed=True), defined=owned, product=True,
        flops=lambda S, E, N, K, routing="": 2 * S * N * K, backends=("torch", "triton", "cuda"),
        hopper=[dict(S=16, E=2, N=2048, K=1024)],
    ),
    Case(
        dequantized(grouped_gemm_fp8), dequantized(grouped_gemm_fp8_ref), gather_args,
        [dict(T=0, E=3, N=256, K=128), dict(T=1, E=1, N=256, K=128, topk=1),
         dict(T=37, E=4, N=256, K=128, routing="masked"), dict(T=70, E=2, N=512, K=256),
         dict(T=8192, E=256, N=1024, K=2048, topk=8)],
        dtypes=(BF16,), kwargs=dict(swiglu=True), truth=grouped_swiglu_unquantized, defined=owned,
        flops=lambda T, E, N, K, topk: 2 * T * topk * N * K,
        backends=("torch", "triton", "cuda"),
        hopper=[dict(T=8, E=2, N=1024, K=2048), dict(T=64, E=4, N=1024, K=2048), dict(T=128, E=2, N=2048, K=4096)],
    ),
    Case(
        grouped_gemm_fp8, grouped_gemm_fp8_ref, gather_args,
        [dict(T=37, E=4, N=128, K=256, routing="masked"), dict(T=37, E=4, N=128, K=256, routing="one"),
         dict(T=8192, E=256, N=1024, K=2048, topk=8)],
        dtypes=(BF16,), kwargs=dict(dtype=FP32), defined=owned, product=True,
        flops=lambda T, E, N, K, topk: 2 * T * topk * N * K, backends=("torch", "triton", "cuda"),
        hopper=[dict(T=8, E=2, N=1024, K=2048), dict(T=128, E=2, N=2048, K=512), dict(T=128, E=2, N=1024, K=2048)],
    ),
    Case(
        grouped_gemm_fp8_masked, grouped_gemm_fp8_masked_ref, masked_fp8_args,
        [dict(E=1, M=0, N=128, K=128), dict(E=1, M=1, N=128, K=128), dict(E=5, M=19, N=128, K=256),
         dict(E=2, M=8, N=128, K=2048), dict(E=32, M=128, N=1024, K=2048)],
        dtypes=(BF16,), product=True, backends=("torch", "triton", "cuda"),
        hopper=[dict(E=2, M=16, N=1024, K=2048), dict(E=2, M=64, N=2048, K=4096), dict(E=2, M=128, N=4096, K=8192)],
        defined=lambda outs, args: [torch.cat([y[:m] for y, m in zip(outs[0], args[4], strict=True)])],
    ),
    Case(
        grouped_wgrad, grouped_wgrad_ref, wgrad_args,
        [dict(S=0, E=3, N=128, K=128), dict(S=1, E=1, N=33, K=7), dict(S=300, E=5, N=24, K=40, unused=9),
         dict(S=300, E=5, N=128, K=256, unused=9, fp8=True), dict(S=40, E=2, N=64, K=2048),
         dict(S=65536, E=256, N=1024, K=2048)],
        flops=lambda S, E, N, K, routing="": 2 * S * N * K, product=True, backends=("torch", "triton", "cuda"),
        ling=lambda p: [dict(S=p.S, E=p.E, N=n, K=k, routing=p.routing) for n, k in ((2 * p.F, p.H), (p.H, p.F))],
        hopper=[dict(S=256, E=2, N=1024, K=2048), dict(S=256, E=2, N=1024, K=2048, fp8=True),
                dict(S=64, E=1, N=4096, K=8192)],
    ),
    Case(
        in_place(grouped_wgrad, 3), in_place(grouped_wgrad_ref, 3), wgrad_args,
        [dict(S=0, E=3, N=128, K=128, out=True), dict(S=300, E=5, N=24, K=40, unused=9, out=True),
         dict(S=300, E=5, N=128, K=256, unused=9, out=True, accumulate=True, fp8=True),
         dict(S=65536, E=256, N=1024, K=2048, out=True, accumulate=True)],
        product=True, flops=lambda S, E, N, K, **others: 2 * S * N * K,
        backends=("torch", "triton", "cuda"),
        hopper=[dict(S=256, E=2, N=1024, K=2048, out=True, accumulate=True),
                dict(S=256, E=2, N=1024, K=2048, out=True, accumulate=True, fp8=True)],
    ),
    Case(
        grouped_wgrad, grouped_wgrad_ref, wgrad_column_args,
        [dict(T=0, E=3, N=128, K=128), dict(T=1, E=1, N=128, K=256, topk=1), dict(T=150, E=4, N=256, K=128),
         dict(T=150, E=4, N=128, K=128, routing="masked"), dict(T=150, E=4, N=128, K=128, routing="one"),
         dict(T=8192, E=256, N=1024, K=2048, topk=8)],
        dtypes=(FP32,), product=True, flops=lambda T, E, N, K, topk: 2 * T * topk * N * K,
        backends=("torch", "triton", "cuda"),
        hopper=[dict(T=256, E=2, N=1024, K=2048), dict(T=64, E=2, N=4096, K=8192)],
    ),
    Case(
        linear_cross_entropy, linear_cross_entropy,
        lambda rand, T, H, V, reduction="mean", chunk=1024: (
            rand(T, H) / 4, rand(V, H), targets_of(rand, T, V), -7, reduction, chunk,
        ),
        [dict(T=0, H=4, V=5), dict(T=1, H=1, V=1), dict(T=67, H=24, V=100, chunk=16),
         dict(T=64, H=20, V=129, chunk=32, reduction="sum"), dict(T=67, H=24, V=100, chunk=16, reduction="none"),
         dict(T=3, H=8, V=157184), dict(T=5, H=2048, V=320),
         dict(T=8192, H=2048, V=157184)],
        backends=("torch", "triton"), hopper=[dict(T=8, H=128, V=157184)],
        truth=linear_cross_entropy_ref, flops=lambda T, H, V: 6 * T * H * V, backward_flops=0,
    ),
    Case(
        moe, by_references(moe), moe_args,
        [dict(T=0, E=4, H=16, F=8), dict(T=1, E=1, H=16, F=8, topk=1),
         dict(T=37, E=16, H=24, F=20, groups=4, group_topk=2, topk=4, Fs=12, masked=True),
         dict(T=8192, E=256, H=2048, F=512, groups=8, group_topk=4, topk=8, Fs=512)],
        kwargs=dict(z_loss=0.5), flops=moe_flops,
        ling=lambda p: p.whole and [dict(T=p.T, E=256, H=p.H, F=p.F, groups=8, group_topk=4, topk=8, Fs=p.F)],
        backends=("torch", "triton", "cuda"), hopper=None,
    ),
    Case(
        moe, by_references(moe), moe_args,
        [dict(T=3, E=4, H=2048, F=16, Fs=512),
         dict(T=8192, E=256, H=2048, F=512, groups=8, group_topk=4, topk=8, Fs=512)],
        dtypes=(BF16,), flops=moe_flops, backends=("torch", "triton", "cuda"), hopper=None,
    ),
    Case(
        expert_mlp, by_references(expert_mlp), expert_mlp_args,
        [dict(T=37, E=16, H=24, F=20, topk=4), dict(T=21, E=4, H=128, F=128, fp8=True),
         dict(T=8192, E=256, H=2048, F=512, topk=8)],
        kwargs=dict(fold_weights=True), flops=moe_flops, backends=("torch", "triton", "cuda"), hopper=None,
    ),
    Case(
        moe, by_references(moe), moe_args,
        [dict(T=0, E=4, H=128, F=128, fp8=True),
         dict(T=37, E=8, H=128, F=256, groups=4, group_topk=2, topk=4, Fs=128, masked=True, fp8=True),
         dict(T=8192, E=256, H=2048, F=512, groups=8, group_topk=4, topk=8, Fs=512, fp8=True)],
        dtypes=(BF16,), flops=moe_flops, backward_flops=0, backends=("torch", "triton", "cuda"), hopper=None,
    ),
    Case(
        moe_decode, by_references(moe_decode),
        moe_decode_args,
        [dict(T=1, E=16, H=24, F=20, groups=4, group_topk=2, topk=4, Fs=12, residual=True),
         dict(T=8, E=4, H=128, F=128, Fs=128, fp8=True),
         dict(T=3, E=16, H=128, F=256, groups=4, group_topk=2, topk=4, Fs=128, fp8=True, residual=True, norm=True),
         dict(T=2, E=16, H=128, F=128, groups=4, group_topk=2, topk=4, norm=True),
         dict(T=1, E=256, H=2048, F=512, groups=8, group_topk=4, topk=8, Fs=512, fp8=True)],
        flops=moe_flops, bytes=moe_decode_bytes,
        ling=lambda p: p.whole and p.T <= 8 and [
            dict(T=p.T, E=256, H=p.H, F=p.F, groups=8, group_topk=4, topk=8, Fs=p.F, fp8=True)
        ],
        backends=("torch", "triton", "cuda"), hopper=None,
    ),
    Case(
        permute, permute_ref,
        lambda rand, T, E, topk, H, routing="": (rand(T, H), plan_of(rand, T, E, topk, routing)),
        [dict(T=0, E=4, topk=2, H=8), dict(T=1, E=1, topk=1, H=1), dict(T=37, E=8, topk=3, H=33, routing="masked"),
         dict(T=37, E=8, topk=3, H=24, routing="one"), dict(T=5, E=256, topk=8, H=2048),
         dict(T=8192, E=256, topk=8, H=2048)],
        exact=True, defined=owned, backends=("torch", "triton", "cuda"),
        ling=lambda p: [dict(T=p.T, E=256, topk=8, H=p.H, routing=p.routing)],
        hopper=[dict(T=32, E=8, topk=8, H=h) for h in (2048, 4096, 8192)],
    ),
    Case(
        permute_quantize, permute_quantize_ref,
        lambda rand, T, E, topk, H, routing="": (rand.data(T, H), plan_of(rand, T, E, topk, routing)),
        [dict(T=0, E=4, topk=2, H=128), dict(T=1, E=1, topk=1, H=128), dict(T=67, E=4, topk=3, H=256, routing="masked"),
         dict(T=67, E=4, topk=3, H=128, routing="one"), dict(T=5, E=3, topk=2, H=2048),
         dict(T=8192, E=256, topk=8, H=2048)],
        kwargs=dict(columns=True, pow2=True), exact=True, defined=owned, backends=("torch", "triton", "cuda"),
        hopper=[dict(T=32, E=8, topk=8, H=h) for h in (2048, 8192)],
    ),
    Case(
        permute_quantize, permute_quantize_ref,
        lambda rand, T, E, topk, H, routing="": (rand.data(T, H), plan_of(rand, T, E, topk, routing)),
        [dict(T=37, E=4, topk=3, H=256, routing="masked"), dict(T=8192, E=256, topk=8, H=2048)],
        exact=True, defined=owned, backends=("torch", "triton", "cuda"),
        ling=lambda p: [dict(T=p.T, E=256, topk=8, H=p.H, routing=p.routing)],
        hopper=[dict(T=32, E=8, topk=8, H=2048)],
    ),
    Case(
        qk_norm_attention, qk_norm_attention_ref,
        lambda rand, q, **shape: (*qk_norm_rope_args(rand, sum(q), **shape)[:7], cu_seqlens(q), True, 0.3, 0.1),
        [dict(q=()), dict(q=(5, 0, 30)), dict(q=(9, 4), Hq=16, Hkv=4, D=128, R=64),
         dict(q=(1, 127, 17, 128, 129), Hq=2, Hkv=1, D=16, R=8, P=129, yarn=3),
         dict(q=(4096,) * 8, Hq=16, Hkv=4, D=128, R=64, P=4096)],
        flops=qk_norm_attention_flops, backward_flops=2.5,
        backends=("torch", "triton", "cuda"),
        hopper=[dict(q=(9, 4), Hq=q, Hkv=kv, D=128, R=64) for q, kv in ((16, 4), (64, 8))],
    ),
    Case(
        qk_norm_attention, qk_norm_attention_ref,
        lambda rand, q, **shape: (*qk_norm_rope_args(rand, sum(q), **shape)[:7], cu_seqlens(q)),
        [dict(q=(5, 0, 30)), dict(q=(4096,) * 8, Hq=16, Hkv=4, D=128, R=64, P=4096)],
        kwargs=dict(causal=False, scale=0.3, eps=0.1), flops=qk_norm_attention_flops, backward_flops=2.5,
        backends=("torch", "triton", "cuda"), hopper=[dict(q=(9, 4), Hq=16, Hkv=4, D=128, R=64)],
    ),
    Case(
        writing(qk_norm_attention_decode, 5), writing(qk_norm_attention_decode_ref, 5), norm_decode_args,
        [dict(lengths=()), dict(lengths=(0, 0)), dict(lengths=(1,)), dict(lengths=(7, 0, 1, 12, 13), n=3),
         dict(lengths=(9, 40), n=8, Hq=3, Hkv=1, D=20, R=6, block_size=16),
         dict(lengths=(70, 3), Hq=8, Hkv=2, D=128, R=64, block_size=16),
         dict(lengths=(0, 130, 5), n=3, Hq=5, Hkv=1, D=128, R=64, block_size=32),
         dict(lengths=(4096,) * 32, Hq=16, Hkv=4, D=128, R=64, P=4096, block_size=64)],
        backends=("torch", "triton", "cuda"), hopper=NORM_DECODE_HOPPER, bytes=norm_decode_bytes,
        ling=lambda p: p.T <= 64 and [
            dict(lengths=(4096,) * p.T, Hq=p.Hq, Hkv=p.Hkv, D=128, R=64, P=4096, block_size=64)
        ],
    ),
    Case(
        writing(qk_norm_attention_decode, 5), writing(qk_norm_attention_decode_ref, 5),
        lambda rand, **shape: norm_decode_args(rand, **shape, fp8=True),
        [dict(lengths=(7, 0, 1, 12), n=3), dict(lengths=(70, 3), Hq=8, Hkv=2, D=128, R=64, block_size=16),
         dict(lengths=(37, 66), n=3, Hq=8, Hkv=1, D=128, R=64, block_size=64),
         dict(lengths=(4096,) * 32, Hq=16, Hkv=4, D=128, R=64, P=4096, block_size=64)],
        dtypes=(BF16,), backends=("torch", "triton", "cuda"), hopper=NORM_DECODE_HOPPER,
        bytes=lambda **shape: norm_decode_bytes(**shape, fp8=True),
        defined=lambda outs, args: [outs[0], *(c.to(s.dtype) * s[..., None] for c, s in (outs[1::2], outs[2::2]))],
    ),
    Case(
        writing(with_fp8_rows(qk_norm_attention_decode), 5), writing(with_fp8_rows(qk_norm_attention_decode_ref), 5),
        norm_decode_args,
        [dict(lengths=(5,), Hq=2, Hkv=1, D=128, R=64, block_size=16),
         dict(lengths=(4096,) * 32, Hq=16, Hkv=4, D=128, R=64, P=4096, block_size=64)],
        dtypes=(BF16,), truth=writing(with_fp8_rows(qk_norm_attention_decode_ref, exact=True), 5),
        backends=("torch", "triton", "cuda"), hopper=NORM_DECODE_HOPPER[:1], bytes=norm_decode_bytes,
    ),
    Case(
        qk_norm_rope, qk_norm_rope_ref, qk_norm_rope_args,
        [dict(T=0), dict(T=1), dict(T=37), dict(T=6, R=20), dict(T=6, Hq=4, Hkv=4, D=6, R=2),
         dict(T=5, Hq=16, Hkv=4, D=128, R=64, P=4096), dict(T=5, Hq=32, Hkv=4, D=128, R=64, P=32768, yarn=4),
         dict(T=2, Hq=64, Hkv=8, D=128, R=64), dict(T=8192, Hq=16, Hkv=4, D=128, R=64, P=4096)],
        backends=("torch", "triton", "cuda"),
        ling=lambda p: [dict(T=p.T, Hq=p.Hq, Hkv=p.Hkv, D=128, R=64, P=4096)],
        hopper=[dict(T=64, Hq=q, Hkv=kv, D=128, R=64) for q, kv in ((16, 4), (32, 4), (64, 8))],
    ),
    Case(
        writing(qk_norm_rope, 8), writing(qk_norm_rope_ref, 8), qk_norm_rope_args,
        [dict(T=0, cache=4, fp8=True), dict(T=37, cache=1), dict(T=5, Hq=16, Hkv=4, D=128, R=64, cache=16, fp8=True),
         dict(T=8192, Hq=16, Hkv=4, D=128, R=64, P=4096, cache=64)],
        backends=("torch", "triton", "cuda"), hopper=[dict(T=64, Hq=16, Hkv=4, D=128, R=64, cache=16)],
        bytes=lambda T, Hq, Hkv, D, R, P, cache: 4 * (T * (Hq + 2 * Hkv) * D + P * R) + 8 * T,
    ),
    Case(
        writing(qk_norm_rope, 8), writing(qk_norm_rope_ref, 8),
        lambda rand, **shape: [
            a.detach() if isinstance(a, Tensor) else a for a in qk_norm_rope_args(rand, **shape)
        ],
        [dict(T=0, cache=4), dict(T=37, cache=1), dict(T=5, Hq=16, Hkv=4, D=128, R=64, cache=16),
         dict(T=8192, Hq=16, Hkv=4, D=128, R=64, P=4096, cache=64)],
        backends=("torch", "triton", "cuda"), hopper=[dict(T=64, Hq=16, Hkv=4, D=128, R=64, cache=16)],
        bytes=lambda T, Hq, Hkv, D, R, P, cache: 4 * (T * (Hq + 2 * Hkv) * D + P * R) + 8 * T,
    ),
    Case(
        quantize, quantize_ref,
        lambda rand, M, K: (rand.data(M, K),),
        [dict(M=0, K=128), dict(M=1, K=128), dict(M=67, K=384), dict(M=3, K=8192), dict(M=8192, K=2048)],
        exact=True, backends=("torch", "triton", "cuda"), ling=lambda p: [dict(M=p.T, K=p.H)],
        hopper=[dict(M=64, K=k) for k in (512, 2048, 8192)],
    ),
    Case(
        quantize, quantize_ref,
        lambda rand, M, K: (rand.data(M, K), True, True),
        [dict(M=0, K=128), dict(M=129, K=256), dict(M=3, K=2048), dict(M=8192, K=2048)],
        kwargs=dict(pow2=True), exact=True, backends=("torch", "triton", "cuda"),
        hopper=[dict(M=64, K=k) for k in (512, 2048, 8192)],
    ),
    Case(
        quantize, quantize_ref,
        lambda rand, T, E, K, routing="": (
            poison(rand.data(2 * T, K), (plan := plan_of(rand, T, E, 2, routing)).offsets), False, True, plan,
        ),
        [dict(T=0, E=3, K=128), dict(T=67, E=4, K=128, routing="masked"), dict(T=67, E=4, K=128, routing="one"),
         dict(T=32768, E=256, K=2048)],
        exact=True, backends=("torch", "triton", "cuda"), hopper=[dict(T=32, E=2, K=k) for k in (512, 8192)],
        defined=lambda outs, args: owned([*outs[:0], *[outs[0][:0]] * 2, *outs], args)[2:],
    ),
    Case(
        quantize_weight, quantize_weight_ref,
        lambda rand, *shape, **sizes: (rand.data(*sizes.values()),),
        [dict(E=0, N=128, K=128), dict(N=256, K=384), dict(E=3, N=128, K=256), dict(E=256, N=1024, K=2048)],
        exact=True, backends=("torch", "triton", "cuda"), hopper=[dict(E=2, N=128, K=k) for k in (512, 2048)],
    ),
    Case(
        rms_norm, rms_norm_ref,
        lambda rand, M, N: (rand(M, N), rand(N), None, 0.1),
        [dict(M=0, N=128), dict(M=1, N=128), dict(M=37, N=576), dict(M=64, N=2048), dict(M=1, N=8192), dict(M=5, N=33),
         dict(M=16384, N=2048)],
        backends=("torch", "triton", "cuda"), hopper=[dict(M=64, N=n) for n in (128, 576, 2048, 4096, 8192)],
    ),
    Case(
        rms_norm, rms_norm_ref,
        lambda rand, M, N: (rand(M, N), rand(N), rand(M, N), 0.1),
        [dict(M=0, N=128), dict(M=1, N=1), dict(M=3, N=100), dict(M=37, N=512), dict(M=16384, N=2048)],
        backends=("torch", "triton", "cuda"), ling=lambda p: [dict(M=p.T, N=p.H)],
        hopper=[dict(M=64, N=n) for n in (2048, 4096, 8192)],
    ),
    Case(
        rms_norm, rms_norm_ref,
        lambda rand, M, N: (rand(M, N), rand(N), rand.fp32(M, N)),
        [dict(M=0, N=128), dict(M=37, N=512), dict(M=16384, N=2048)],
        dtypes=(BF16,), kwargs=dict(eps=0.1), backends=("torch", "triton", "cuda"),
        hopper=[dict(M=64, N=n) for n in (2048, 8192)],
    ),
    Case(
        rms_norm, rms_norm_ref,
        lambda rand, M, N: (rand(M, N), rand(N), None, 0.1),
        [dict(M=0, N=128), dict(M=37, N=384), dict(M=5, N=8192), dict(M=16384, N=2048)],
        kwargs=dict(quantize=True), backends=("torch", "triton", "cuda"),
        hopper=[dict(M=64, N=n) for n in (2048, 4096, 8192)],
    ),
    Case(
        rms_norm, rms_norm_ref,
        lambda rand, M, N: (rand(M, N), rand(N), rand(M, N), 0.1),
        [dict(M=0, N=128), dict(M=37, N=512), dict(M=129, N=384), dict(M=16384, N=2048)],
        kwargs=dict(quantize=True, columns=True), backends=("torch", "triton", "cuda"),
        hopper=[dict(M=64, N=n) for n in (2048, 4096, 8192)],
    ),
    Case(
        rms_norm_linear, by_references(rms_norm_linear), norm_linear_args,
        [dict(M=0, N=16, K=64), dict(M=1, N=48, K=192), dict(M=8, N=32, K=2048, plain=True), dict(M=3, N=24, K=24),
         dict(M=9, N=128, K=128, fp8=True), dict(M=2, N=256, K=384, fp8=True),
         dict(M=5, N=128, K=128, fp8=True, plain=True),
         dict(M=1, N=157184, K=2048)],
        dtypes=(BF16,), product=True, flops=lambda M, N, K, **others: 2 * M * N * K,
        ling=lambda p: p.whole and p.T <= 8 and [dict(M=p.T, N=157184, K=p.H)],
        backends=("torch", "triton", "cuda"), hopper=None,
    ),
    Case(
        rms_norm_router, by_references(rms_norm_router), norm_router_args,
        [dict(T=0, E=4, H=16), dict(T=1, E=5, H=136), dict(T=3, E=16, H=40, fp32=True), dict(T=8, E=3, H=2048),
         dict(T=5, E=6, H=520, plain=True), dict(T=2, E=2, H=8192, fp32=True), dict(T=9, E=6, H=64),
         dict(T=8, E=256, H=2048)],
        dtypes=(BF16,), kwargs=dict(eps=0.1), product=True, backends=("torch", "triton", "cuda"),
        hopper=[dict(T=1, E=256, H=2048), dict(T=1, E=256, H=4096, plain=True),
                *(dict(T=t, E=256, H=h, fp32=True) for t in (1, 8) for h in (2048, 8192))],
    ),
    Case(
        route, route_ref,
        lambda rand, T, E, groups=8, masked=False, group_topk=4, topk=8: (
            rand.fp32(T, E), rand.data(E, dtype=FP32) / 10, rand.bools(T) if masked else None, groups, group_topk, topk,
        ),
        [dict(T=0, E=256), dict(T=1, E=256), dict(T=67, E=256), dict(T=67, E=256, masked=True),
         dict(T=5, E=64, groups=4), dict(T=37, E=60, groups=5, group_topk=3, topk=5, masked=True),
         dict(T=3, E=1, groups=1, group_topk=1, topk=1), dict(T=9, E=6, groups=6, group_topk=4, topk=4),
         dict(T=67, E=16, groups=4, group_topk=2, topk=4, masked=True),
         dict(T=8192, E=256)],
        dtypes=(FP32,), kwargs=dict(z_loss=0.5, scale=2.5), backends=("torch", "triton", "cuda"),
        hopper=[dict(T=64, E=256)],
    ),
    Case(
        route, route_ref,
        lambda rand, T, E: (rand.fp32(T, E), rand.data(E, dtype=FP32) / 10, None, 8, 4),
        [dict(T=9, E=256), dict(T=8192, E=256)],
        dtypes=(FP32,), kwargs=dict(scale=1.5), backends=("torch", "triton", "cuda"),
        ling=lambda p: [dict(T=p.T, E=256)],
        hopper=[dict(T=64, E=256)],
    ),
    Case(
        route, route_ref, forced_route_args,
        [dict(T=0, E=8, topk=2), dict(T=9, E=256, topk=8), dict(T=37, E=60, topk=5, masked=True),
         dict(T=5, E=3, topk=1, z_loss=None), dict(T=8192, E=256, topk=8)],
        dtypes=(FP32,), backends=("torch", "triton"), hopper=[dict(T=64, E=256, topk=8)],
    ),
    Case(
        router_gemm, router_gemm_ref,
        router_args,
        [dict(T=0, E=4, H=16), dict(T=1, E=1, H=1), dict(T=37, E=256, H=48), dict(T=3, E=16, H=8192),
         dict(T=37, E=64, H=48, w_offset=64),
         dict(T=530, E=130, H=24), dict(T=8192, E=256, H=2048)],
        flops=lambda T, E, H: 2 * T * E * H, product=True, backends=("torch", "triton"),
        ling=lambda p: [dict(T=p.T, E=256, H=p.H)],
        hopper=[dict(T=t, E=256, H=2048) for t in (1, 64, 600)],
    ),
    Case(
        router_gemm, router_gemm_ref,
        lambda rand, T, E, H: (rand(T, H), rand(E, H)),
        [dict(T=37, E=16, H=128), dict(T=4096, E=256, H=2048)],
        dtypes=(BF16,), flops=lambda T, E, H: 2 * T * E * H, product=True,
        backends=("torch", "triton"), hopper=[dict(T=64, E=256, H=2048)],
    ),
    Case(
        sample, sample_ref, sample_args,
        [dict(B=0, V=9), dict(B=4, V=7, n=2), dict(B=3, V=515, ties=True), dict(B=2, V=3001, n=3),
         dict(B=5, V=4096, mode=(False, False, False)), dict(B=8, V=157184)],
        backends=("torch", "cuda"), hopper=None, bytes=lambda B, V, n=1, **others: 2 * B * n * V,
    ),
    Case(
        swiglu, swiglu_ref,
        lambda rand, F, **rows: (rand(*rows.values(), 2 * F),),
        [dict(F=128, M=0), dict(F=1), dict(F=129, B=2, L=3), dict(F=512, M=7), dict(F=512, M=65536)],
        backends=("torch", "triton", "cuda"), hopper=[dict(F=f, M=64) for f in (512, 2048)],
    ),
    Case(
        swiglu, swiglu_ref,
        lambda rand, S, F: (rand(S, 2 * F), rand.fp32(S)),
        [dict(S=0, F=128), dict(S=1, F=1), dict(S=37, F=640), dict(S=65536, F=512)],
        backends=("torch", "triton", "cuda"), ling=lambda p: [dict(S=p.S, F=p.F)],
        hopper=[dict(F=f, S=64) for f in (512, 2048)],
    ),
    Case(
        dequantized(swiglu), dequantized(swiglu_ref),
        lambda rand, S, F: (rand.data(S, 2 * F), rand.data(S, dtype=FP32), True),
        [dict(S=0, F=128), dict(S=37, F=512), dict(S=65536, F=512)],
        dtypes=(BF16,), kwargs=dict(pow2=True), truth=swiglu_unquantized,
        backends=("torch", "triton", "cuda"), hopper=[dict(S=64, F=f) for f in (512, 2048)],
    ),
    Case(
        dequantized(swiglu), dequantized(swiglu_ref),
        lambda rand, T, E, F, routing="": (
            poison(rand.data(2 * T, 2 * F), (plan := plan_of(rand, T, E, 2, routing)).offsets), None, True, True, plan,
        ),
        [dict(T=0, E=3, F=128), dict(T=67, E=4, F=128, routing="masked"), dict(T=32768, E=256, F=512)],
        dtypes=(BF16,), truth=swiglu_unquantized,
        defined=owned, backends=("torch", "triton", "cuda"), hopper=[dict(T=32, E=2, F=f) for f in (512, 2048)],
    ),
    Case(
        dequantized(swiglu_backward), dequantized(swiglu_backward_ref),
        lambda rand, S, F: (rand.data(S, F), rand.data(S, 2 * F), rand.data(S, dtype=FP32), True),
        [dict(S=0, F=128), dict(S=37, F=384), dict(S=65536, F=512)],
        dtypes=(BF16,), kwargs=dict(pow2=True), truth=swiglu_backward_unquantized,
        backends=("torch", "triton", "cuda"), hopper=[dict(S=64, F=f) for f in (512, 2048)],
    ),
    Case(
        dequantized(swiglu_backward), dequantized(swiglu_backward_ref), swiglu_backward_args,
        [dict(T=0, E=3, F=128), dict(T=67, E=4, F=128, routing="masked"), dict(T=32768, E=256, F=512)],
        dtypes=(BF16,), truth=swiglu_backward_unquantized, backends=("torch", "triton", "cuda"),
        defined=lambda outs, args: [*owned(outs[:4], args), *owned(outs[4:], args)],
        hopper=[dict(T=32, E=2, F=f) for f in (512, 2048)],
    ),
    Case(
        transpose_fp8, transpose_fp8_ref,
        lambda rand, **sizes: quantize_weight(rand.data(*sizes.values())),
        [dict(N=128, K=128), dict(N=256, K=384), dict(E=0, N=128, K=128), dict(E=3, N=128, K=256),
         dict(E=256, N=1024, K=2048)],
        dtypes=(FP32,), backends=("torch", "triton", "cuda"), exact=True,
        ling=lambda p: [dict(E=p.E, N=2 * p.F, K=p.H)],
        hopper=[dict(E=2, N=1024, K=128)],
    ),
    Case(
        unpermute, unpermute_ref,
        lambda rand, T, E, topk, H, routing="": (
            poison(rand(T * topk, H), (plan := plan_of(rand, T, E, topk, routing)).offsets), plan,
            None if routing == "one" else rand.fp32(T, topk),
        ),
        [dict(T=0, E=4, topk=2, H=8), dict(T=1, E=1, topk=1, H=1), dict(T=37, E=8, topk=3, H=33, routing="masked"),
         dict(T=37, E=8, topk=3, H=24, routing="one"), dict(T=5, E=256, topk=8, H=2048),
         dict(T=8192, E=256, topk=8, H=2048)],
        backends=("torch", "triton", "cuda"),
        ling=lambda p: [dict(T=p.T, E=256, topk=8, H=p.H, routing=p.routing)],
        hopper=[dict(T=32, E=8, topk=8, H=h) for h in (2048, 4096, 8192)],
    ),
]  # fmt: skip


def args_of(case, shape, dtype):
    return case.make(Rand(dtype), **shape)


def runs(backend: str) -> bool:
    gpu = torch.cuda.is_available()
    return {"torch": True, "triton": gpu or not triton_driver.missing(), "cuda": _C is not None}[backend]


def sweep(bench: bool = False):
    """pytest parameters (case, shape, dtype, backend) with readable ids; a backend this machine lacks is skipped."""
    return [
        pytest.param(
            c, s, d, b,
            id="-".join([c.name, *(f"{k}{v}" for k, v in s.items()), str(d)[6:], b]),
            marks=() if runs(b) else pytest.mark.skip(f"{b} cannot run here"),
        )
        for c in CASES
        for s, d, b in (
            product(c.shapes[-1:], c.dtypes[:1], dict.fromkeys(["torch", *c.backends])) if bench
            else product(c.shapes[:-1], c.dtypes, c.backends)
        )
    ]  # fmt: skip
