"""Other libraries' implementations of our ops, each behind an optional import, on the layout that it wants.

An adapter takes the op's arguments by name and returns a call without arguments, which alone is timed; where the peer's
result is laid out differently, it also returns `alike(theirs, ours)`: two tensors that should agree. An argument that a
peer lacks is named in `lacks`: then its default alone is served. The comment above each library says where its
signatures were run, or at which commit of which repository they were read; an adapter without that does not stay.
"""

import functools
import importlib
import importlib.metadata
import inspect
from collections.abc import Callable
from types import SimpleNamespace

import torch
from torch import Tensor
from torch.nn import functional as F

from ling_kernels.backend import force
from ling_kernels.op import E4M3
from ling_kernels.ops.grouped_gemm_fp8 import grouped_gemm_fp8_cutlass
from ling_kernels.ops.moe import linear
from ling_kernels.ops.quantize import dequantize
from ling_kernels.ops.route import route
from ling_kernels.ops.router_gemm import router_gemm
from ling_kernels.ops.swiglu import swiglu
from tests.cases import Case

PEERS: dict[str, dict[str, tuple[Callable, list[str]]]] = {}  # op -> peer -> adapter, arguments that it lacks
MODULES: dict[str, str] = {}  # peer -> module to import
MAX_ERROR = 0.1  # relative: well above what rounding to FP8 does, well below what a wrong layout does


def peer(op: str, name: str, module: str = "torch", lacks: str = ""):
    def register(fn):
        PEERS.setdefault(op, {})[name] = fn, lacks.split()
        MODULES[name] = module
        return fn

    return register


def names() -> list[str]:
    """torch.compile last: it takes seconds for each Case."""
    return [*MODULES, "torch.compile"]


def of(case: Case) -> list[str]:
    return [*PEERS.get(case.op.__name__, {}), "torch.compile"]


def inventory() -> dict[str, str]:
    """{module: its version, or why it cannot be imported}."""
    packages, found = importlib.metadata.packages_distributions(), {}
    for module in sorted({*MODULES.values(), "transformers"}):
        try:
            importlib.import_module(module)
            versions = map(importlib.metadata.version, packages.get(module.split(".")[0], []))
            found[module] = next(versions, "unknown version")
        except Exception as error:  # a package built for another torch may raise anything
            found[module] = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
    return found


def only(condition: bool, feature: str) -> None:
    if not condition:
        raise NotImplementedError(f"it has no {feature}")


def detached(a):
    """Nested tuples of tensors without their autograd."""
    if isinstance(a, Tensor):
        return a.detach()
    if isinstance(a, tuple):
        return type(a)(*map(detached, a)) if hasattr(a, "_fields") else tuple(map(detached, a))
    return a


def checked(name: str, case: Case, args) -> tuple[Callable, float, object]:
    """The peer's call, its error relative to the reference, and our result. Raises whatever the peer raises, and
    ValueError where its result is not the reference's up to rounding."""
    op, reference, kwargs = inspect.unwrap(case.op), inspect.unwrap(case.ref), case.kwargs
    if name == "torch.compile":
        only(reference is not op, "reference but the op itself to compile")
        torch._dynamo.reset()
        call, alike = functools.partial(torch.compile(reference), *args, **kwargs), firsts
    else:
        importlib.import_module(MODULES[name])
        adapter, lacks = PEERS[op.__name__][name]
        bound, parameters = inspect.signature(op).bind(*args, **kwargs), inspect.signature(op).parameters
        bound.apply_defaults()
        for name in {*lacks} & {*parameters}:
            only(bound.arguments[name] is parameters[name].default, name)
        call = adapter(SimpleNamespace(**bound.arguments))
        call, alike = call if isinstance(call, tuple) else (call, firsts)
    theirs, ours = call(), op(*args, **kwargs)
    try:
        with force("torch"):
            want = reference(*args, **kwargs)
    except torch.OutOfMemoryError:  # the reference at the largest shapes
        want = ours
    got, want = alike(theirs, want)
    if got.shape != want.shape:
        raise ValueError(f"its result is {[*got.shape]}, ours {[*want.shape]}")
    error = ((got.double() - want.double()).norm() / want.double().norm().clamp(min=1e-30)).item()
    if not error <= MAX_ERROR:
        raise ValueError(f"its result differs from the reference's by {error:.1e}")
    return call, error, ours


def first(out) -> Tensor:
    return out if isinstance(out, Tensor) else first(out[0])


def firsts(theirs, ours) -> tuple[Tensor, Tensor]:
    return first(theirs), first(ours)


def writes(run: Callable, d: Tensor) -> Callable:
    """A call that returns d, into which run() writes."""

    def call():
        run()
        return d

    return call


def rows_of_experts(offsets):
    """The rows that belong to an expert; the others are undefined."""
    rows = int(offsets[-1])
    return lambda theirs, ours: (first(theirs)[:rows], first(ours)[:rows])


# torch 2.13: run on a CPU, except scaled_mm and cuDNN's attention, which have the signatures of torch's documentation.


@peer("rms_norm", "torch rms_norm", lacks="residual quantize")
def torch_norm(a):
    return lambda: F.rms_norm(a.x, a.w.shape, a.w, a.eps)


@peer("cross_entropy", "torch cross_entropy")
def torch_cross_entropy(a):
    return lambda: F.cross_entropy(a.logits, a.targets, ignore_index=a.ignore_index, reduction=a.reduction)


@peer("grouped_gemm", "torch grouped_mm")
def torch_grouped_mm(a):
    return lambda: F.grouped_mm(a.a, a.b.transpose(1, 2), offs=a.offsets[1:]), rows_of_experts(a.offsets)


@peer("grouped_wgrad", "torch grouped_mm, bf16 out", lacks="accumulate dy_scale")
def torch_grouped_wgrad(a):
    dy = a.dy.T.contiguous()
    return lambda: F.grouped_mm(dy, a.x, offs=a.offsets[1:])


@peer("gemm_fp8", "torch scaled_mm", lacks="out transposed")
def torch_scaled_mm(a):
    kinds = F.ScalingType
    kind = kinds.BlockWise1x128 if len(a.b_scale) == len(a.b) else kinds.BlockWise128x128
    scales = a.a_scale, kinds.BlockWise1x128, a.b_scale.T, kind
    return lambda: F.scaled_mm(a.a, a.b.T, *scales, output_dtype=a.dtype)


def torch_sdpa(backend: str):
    def adapter(a):
        from torch.nn.attention import SDPBackend, sdpa_kernel

        lengths = a.cu_seqlens_q.diff().tolist()
        only(len({*lengths}) == 1, "sequences of several lengths")
        q, k, v = (t.unflatten(0, (-1, lengths[0])).transpose(1, 2).contiguous() for t in (a.q, a.k, a.v))

        def call():
            with sdpa_kernel([getattr(SDPBackend, backend)]):
                return F.scaled_dot_product_attention(q, k, v, is_causal=a.causal, scale=a.scale, enable_gqa=True)

        return call, lambda theirs, ours: (theirs.transpose(1, 2).flatten(0, 1), ours[0])

    return adapter


peer("attention", "torch SDPA cuDNN", lacks="cu_seqlens_k")(torch_sdpa("CUDNN_ATTENTION"))
peer("attention", "torch SDPA flash", lacks="cu_seqlens_k")(torch_sdpa("FLASH_ATTENTION"))


# CUTLASS's grouped product: our optional extension (make cutlass).


def cutlass(pingpong: bool):
    return lambda a: (
        functools.partial(grouped_gemm_fp8_cutlass, a.a, a.a_scale, a.b, a.b_scale, a.offsets, pingpong),
        rows_of_experts(a.offsets),
    )


for kernel in ("cooperative", "pingpong"):
    peer("grouped_gemm_fp8", f"CUTLASS {kernel}", "ling_kernels._cutlass", lacks="gather swiglu dtype transposed")(
        cutlass(kernel == "pingpong")
    )


# DeepGEMM: read at deepseek-ai/DeepGEMM@54e22612, csrc/apis/gemm.hpp. Scales are fp32 of any stride; in the grouped
# products each expert's rows begin at a multiple of 128.


class Padded:
    """Where rows go so that each expert begins at a multiple of 128, and the expert of each padded row."""

    def __init__(self, offsets):
        counts = offsets.diff()
        padded = (counts + 127) // 128 * 128
        rows = torch.arange(int(offsets[-1]), device=offsets.device)
        owner = torch.searchsorted(offsets[1:].contiguous(), rows, right=True)
        self.place = rows - offsets[owner] + (padded.cumsum(0) - padded)[owner]
        self.group = torch.repeat_interleave(torch.arange(len(counts), device=offsets.device), padded).int()

    def spread(self, x):
        bits = x.view(torch.uint8) if x.dtype == E4M3 else x
        out = bits.new_zeros(len(self.group), x.shape[1])
        return out.index_copy_(0, self.place, bits[: len(self.place)].contiguous()).view(x.dtype)

    def alike(self, theirs, ours):
        return theirs[self.place], first(ours)[: len(self.place)]


@peer("gemm_fp8", "DeepGEMM", "deep_gemm", lacks="out dtype transposed")
def deep_gemm(a):
    import deep_gemm

    only(len(a.b_scale) != len(a.b), "scale for each row of b here")
    d = torch.empty(len(a.a), len(a.b), dtype=torch.bfloat16, device=a.a.device)
    return writes(lambda: deep_gemm.fp8_gemm_nt((a.a, a.a_scale), (a.b, a.b_scale), d), d)


@peer("grouped_gemm_fp8", "DeepGEMM, rows padded to 128", "deep_gemm", lacks="gather swiglu dtype transposed")
def deep_gemm_grouped(a):
    import deep_gemm

    padded = Padded(a.offsets)
    x, w = (padded.spread(a.a), padded.spread(a.a_scale).T.contiguous().T), (a.b, a.b_scale)
    d = torch.empty(len(padded.group), a.b.shape[1], dtype=torch.bfloat16, device=a.a.device)
    return writes(lambda: deep_gemm.m_grouped_fp8_gemm_nt_contiguous(x, w, d, padded.group), d), padded.alike


@peer("grouped_gemm_fp8_masked", "DeepGEMM", "deep_gemm", lacks="dtype")
def deep_gemm_masked(a):
    import deep_gemm

    x, w = (a.a, a.a_scale.transpose(1, 2).contiguous().transpose(1, 2)), (a.b, a.b_scale)
    d = torch.empty(*a.a.shape[:2], a.b.shape[1], dtype=torch.bfloat16, device=a.a.device)
    expected = max(1, int(a.counts.float().mean()))
    valid = torch.arange(a.a.shape[1], device=a.a.device) < a.counts[:, None]
    run = functools.partial(deep_gemm.m_grouped_fp8_gemm_nt_masked, x, w, d, a.counts, expected)
    return writes(run, d), lambda theirs, ours: (theirs[valid], ours[valid])


# FlashAttention 3: read at Dao-AILab/flash-attention@01afd16d, hopper/flash_attn_interface.py.


@peer("attention", "FlashAttention 3", "flash_attn_interface")
def flash_attention(a):
    from flash_attn_interface import flash_attn_varlen_func

    starts = a.cu_seqlens_q, a.cu_seqlens_q if a.cu_seqlens_k is None else a.cu_seqlens_k
    longest = (int(s.diff().max()) for s in starts)
    how = dict(softmax_scale=a.scale, causal=a.causal)
    return functools.partial(flash_attn_varlen_func, a.q, a.k, a.v, *starts, *longest, **how)


@peer("attention_decode", "FlashAttention 3", "flash_attn_interface")
def flash_attention_decode(a):
    from flash_attn_interface import flash_attn_with_kvcache

    only(a.cache.k_scale is None, "scale for each token and head of the cache")
    how = dict(cache_seqlens=a.lengths, page_table=a.block_table, softmax_scale=a.scale, causal=True)
    return lambda: flash_attn_with_kvcache(a.q, a.cache.k, a.cache.v, **how)


# FlashInfer: read at flashinfer-ai/flashinfer@002752ae, flashinfer/decode.py.


@peer("attention_decode", "FlashInfer", "flashinfer")
def flashinfer_decode(a):
    import flashinfer

    only(a.q.shape[1] == 1 and a.cache.k_scale is None, "several query tokens, or scales of the cache, here")
    block, table, lengths, (heads, D) = a.cache.k.shape[1], a.block_table, a.lengths, a.q.shape[2:]
    counts = (lengths + block - 1) // block
    pages = table[torch.arange(table.shape[1], device=table.device) < counts[:, None]]
    starts = F.pad(counts.cumsum(0), (1, 0)).int()
    workspace = torch.zeros(128 << 20, dtype=torch.uint8, device=a.q.device)
    wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(workspace, "NHD", use_tensor_cores=True)
    wrapper.plan(starts, pages, (lengths - 1) % block + 1, heads, a.cache.k.shape[2], D, block, sm_scale=a.scale,
                 q_data_type=a.q.dtype, kv_data_type=a.cache.k.dtype)  # fmt: skip
    q = a.q[:, 0].contiguous()
    return lambda: wrapper.run(q, (a.cache.k, a.cache.v)), lambda theirs, ours: (first(theirs), ours[:, 0])


# vLLM: read at vllm-project/vllm@13cb3e44 (fused_moe/fused_moe.py) and @00c1c6a2 (fused_moe/config.py). Router, routing
# and shared expert are ours, and are in the time.


@peer("moe", "vLLM's experts", "vllm", lacks="mask z_loss fold_weights")
def vllm_experts(a):
    from vllm.model_executor.layers.fused_moe.config import fp8_w8a8_moe_quant_config
    from vllm.model_executor.layers.fused_moe.fused_moe import fused_experts

    gate_up, down, how = a.w_gate_up, a.w_down, {}
    if isinstance(gate_up, tuple):
        (gate_up, up_scale), (down, down_scale) = gate_up, down
        how = dict(quant_config=fp8_w8a8_moe_quant_config(up_scale, down_scale, block_shape=[128, 128]))

    def call():
        logits = router_gemm(a.x, a.router_w)
        weights, experts = route(logits, a.bias, None, a.num_groups, a.group_topk, a.topk, a.scale)[:2]
        y = fused_experts(a.x, gate_up, down, weights, experts, **how)
        return y if a.shared is None else y + linear(swiglu(linear(a.x, a.shared[0])), a.shared[1])

    return call


# Liger 0.8.5: run in Triton's interpreter.


@peer("cross_entropy", "Liger", "liger_kernel")
def liger_cross_entropy(a):
    from liger_kernel.ops.cross_entropy import LigerCrossEntropyFunction as Function

    return lambda: Function.apply(a.logits, a.targets, None, a.ignore_index, 0.0, 0.0, a.reduction)


@peer("linear_cross_entropy", "Liger", "liger_kernel")
def liger_linear_cross_entropy(a):
    from liger_kernel.ops.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyFunction as Function

    return lambda: first(Function.apply(a.x, a.w, a.targets, None, None, a.ignore_index, 0.0, 0.0, a.reduction))


# linghe, Ant Group's Triton kernels for Ling: inclusionAI/linghe@02edabd9, run in Triton's interpreter. Its FP8 kernels
# do not mask the ends of rows, and give scales as [K / 128, M].


def transposed_scales(theirs, ours) -> tuple[Tensor, Tensor]:
    return dequantize(theirs[0], theirs[1].T), dequantize(*ours[-2:] if len(ours) % 2 else ours[:2])


@peer("gemm_fp8", "linghe", "linghe", lacks="out transposed")
def linghe_gemm(a):
    from linghe.gemm.blockwise_fp8_gemm import triton_tt_fp8_gemm

    a_scale, b_scale = a.a_scale.contiguous(), a.b_scale.repeat_interleave(len(a.b) // len(a.b_scale), 0).contiguous()
    return lambda: triton_tt_fp8_gemm(a.a, a.b, a_scale, b_scale, out_dtype=a.dtype)


@peer("route", "linghe", "linghe", lacks="mask z_loss")
def linghe_route(a):
    from linghe.facade.topk import group_topk_score

    return (
        lambda: group_topk_score(a.logits, a.topk, a.bias, a.num_groups, a.group_topk, a.scale),
        lambda theirs, ours: (theirs[0], torch.zeros_like(a.logits).scatter(1, ours[1].long(), ours[0])),
    )


@peer("rms_norm", "linghe", "linghe", lacks="residual columns")
def linghe_norm(a):
    from linghe.facade.norm import rms_norm
    from linghe.utils.norm import triton_rms_norm_and_block_quant_forward

    if not a.quantize:
        return lambda: rms_norm(a.x, a.w, a.eps)
    return lambda: triton_rms_norm_and_block_quant_forward(a.x, a.w, eps=a.eps, output_mode=0), transposed_scales


@peer("swiglu", "linghe", "linghe", lacks="plan columns")
def linghe_swiglu(a):
    from linghe.utils import silu

    only(a.x.ndim == 2 and len(a.x) % 32 == 0 and not (a.quantize and a.weights is not None), "such rows")
    if not a.quantize:
        return lambda: silu.triton_weighted_silu_forward(a.x, a.weights)
    return lambda: silu.triton_silu_and_block_quant_forward(a.x, round_scale=a.pow2, output_mode=0), transposed_scales


@peer("quantize", "linghe", "linghe", lacks="rows columns plan")
def linghe_quantize(a):
    from linghe.quant.group import triton_group_quant

    only(a.x.shape[1] % (2048 if a.x.shape[1] > 1024 else 1024) == 0, "such rows")
    run = functools.partial(triton_group_quant, a.x, round_scale=a.pow2)
    return run, lambda theirs, ours: (dequantize(*theirs), dequantize(*ours[:2]))
