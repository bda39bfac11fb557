"""Others' implementations of our ops, each behind an optional import, on the layout that it wants.

A function of PEERS takes a Case's arguments and returns a call without arguments, which alone is timed, and what of our
result its result is comparable with. Names follow the packages' own documentation; one
that is absent, has another signature or refuses the shape is listed with what it says.
"""

import importlib
import importlib.metadata
import inspect
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

PEERS: dict[str, dict[str, Callable]] = {}  # op -> peer -> function
PACKAGES = {
    "transformers' eager MoE layer": "transformers"
}  # peer -> what is imported for it; that one: bench_model.py
# Known, and without a function here: whole layers with their own routers, or a server's.
UNCALLED = ("sonicmoe", "vllm", "linghe", "megatron")


def peer(op: str, name: str, package: str = "torch"):
    def declare(fn):
        PEERS.setdefault(op, {})[name] = fn
        PACKAGES[name] = package
        return fn

    return declare


def absent(package: str) -> str | None:
    """Why it cannot be imported, or None."""
    try:
        importlib.import_module(package)
    except Exception as error:  # a package built for another torch raises what it likes
        return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
    return None


def inventory() -> dict[str, str]:
    """Every peer's package: its version, or why it is not here."""
    found = {}
    for package in sorted({*PACKAGES.values(), *UNCALLED}):
        reason = absent(package)
        found[package] = reason or version(package) + (", no function here calls it" if package in UNCALLED else "")
    return found


def version(package: str) -> str:
    top = package.split(".")[0]
    names = importlib.metadata.packages_distributions().get(top, [top])
    try:
        return importlib.metadata.version(names[0])
    except importlib.metadata.PackageNotFoundError:
        return "unknown version"


def of(case) -> list[str]:
    """Peers of a Case: those of its op that are not held against a variant that they lack, and torch.compile."""
    return ["torch.compile", *PEERS.get(case.op.__name__, {})]


def prepare(name: str, case, args) -> tuple[Callable, Callable]:
    if name == "torch.compile":
        reference = inspect.unwrap(case.ref)
        only(reference is not inspect.unwrap(case.op), "other reference to compile than the op itself")
        torch._dynamo.reset()
        compiled = torch.compile(reference)
        return lambda: compiled(*args, **case.kwargs), lambda out: out
    if reason := absent(PACKAGES[name]):
        raise ImportError(reason)
    call, *comparable = PEERS[case.op.__name__][name](*args, **case.kwargs)
    return call, comparable[0] if comparable else lambda out: out


def error(got, want, comparable: Callable) -> float | None:
    """Of all elements together, relative to our result's size; None where nothing can be compared."""
    got, want = first(got), first(comparable(want))
    if got.shape != want.shape:
        raise ValueError(f"its result is {[*got.shape]}, ours {[*want.shape]}")
    got, want = got.double(), want.double()
    return ((got - want).norm() / want.norm().clamp(min=1e-30)).item() if want.isfinite().any() else None


def first(out) -> Tensor:
    return out if isinstance(out, Tensor) else first(out[0])


def only(condition, what: str) -> None:
    """A peer that lacks a variant says so."""
    if not condition:
        raise NotImplementedError(f"it has no {what}")


@peer("grouped_gemm", "torch grouped_mm")
def grouped_mm(a, b, offsets):
    ends = offsets[1:]
    return (lambda: F.grouped_mm(a, b.transpose(1, 2), offs=ends),)


@peer("gemm_fp8", "torch scaled_mm")
def scaled_mm(a, a_scale, b, b_scale, out=None, accumulate=False, dtype=torch.bfloat16, transposed=False):
    only(out is None and not transposed, "accumulation and no transposed operand")
    kinds = F.ScalingType
    tall = b_scale.shape[0] == b.shape[0]
    kind = kinds.BlockWise1x128 if tall else kinds.BlockWise128x128
    return (lambda: F.scaled_mm(a, b.T, a_scale, kinds.BlockWise1x128, b_scale.T, kind, output_dtype=dtype),)


@peer("grouped_gemm_fp8", "torch scaled_grouped_mm, one scale a row")
def scaled_grouped_mm(a, a_scale, b, b_scale, offsets, plan=None, **variant):
    only(plan is None and not variant, "gather, SwiGLU or transposed weights")
    ends, rows = offsets[1:], F.ScalingType.RowWise
    a_scale, b_scale = a_scale.amax(1), b_scale.amax(2).repeat_interleave(128, 1)[:, : b.shape[1]].contiguous()
    return (
        lambda: F.scaled_grouped_mm(a, b.transpose(1, 2), a_scale, rows, b_scale, rows, offs=ends),
        lambda out: out.new_full(out.shape, torch.nan),  # other scales, another result: speed only
    )


def sdpa(backend: str):
    def prepare(q, k, v, cu_seqlens_q, cu_seqlens_k=None, causal=True, scale=None):
        from torch.nn.attention import SDPBackend, sdpa_kernel

        lengths = cu_seqlens_q.diff().tolist()
        only(len({*lengths}) == 1 and cu_seqlens_k is None, "sequences of several lengths")
        q, k, v = (t.unflatten(0, (len(lengths), lengths[0])).transpose(1, 2).contiguous() for t in (q, k, v))
        one = [getattr(SDPBackend, backend)]

        def call():
            with sdpa_kernel(one):
                return F.scaled_dot_product_attention(q, k, v, is_causal=causal, scale=scale, enable_gqa=True)

        return call, lambda out: out[0].unflatten(0, (len(lengths), lengths[0])).transpose(1, 2)

    return prepare


peer("attention", "torch SDPA cuDNN")(sdpa("CUDNN_ATTENTION"))
peer("attention", "torch SDPA flash")(sdpa("FLASH_ATTENTION"))


def flash(module: str):
    def prepare(q, k, v, cu_seqlens_q, cu_seqlens_k=None, causal=True, scale=None):
        fn = importlib.import_module(module).flash_attn_varlen_func
        ends = cu_seqlens_q if cu_seqlens_k is None else cu_seqlens_k
        most = [int(c.diff().max()) for c in (cu_seqlens_q, ends)]
        return (lambda: fn(q, k, v, cu_seqlens_q, ends, *most, softmax_scale=scale, causal=causal),)

    return prepare


peer("attention", "FlashAttention 2", "flash_attn")(flash("flash_attn"))
peer("attention", "FlashAttention 3", "flash_attn_interface")(flash("flash_attn_interface"))
peer("attention", "FlashAttention 4", "flash_attn.cute")(flash("flash_attn.cute"))


@peer("attention_decode", "FlashInfer", "flashinfer")
def flashinfer_decode(q, cache, block_table, lengths, scale=None):
    import flashinfer

    only(q.shape[1] == 1 and len(cache) >= 2, "several query tokens here")
    block, (pages, size) = cache.k.shape[1], block_table.shape
    wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(
        torch.empty(128 << 20, dtype=torch.uint8, device=q.device), "NHD"
    )
    starts = torch.arange(0, pages * size + 1, size, dtype=torch.int32, device=q.device)
    wrapper.plan(starts, block_table.flatten(), (lengths - 1) % block + 1, q.shape[2], cache.k.shape[2], q.shape[3],
                 block, q_data_type=q.dtype, kv_data_type=cache.k.dtype, sm_scale=scale)  # fmt: skip
    rows = q[:, 0].contiguous()
    return lambda: wrapper.run(rows, (cache.k, cache.v)), lambda out: first(out)[:, 0]


@peer("gemm_fp8", "DeepGEMM", "deep_gemm")
def deep_gemm(a, a_scale, b, b_scale, out=None, accumulate=False, dtype=torch.bfloat16, transposed=False):
    import deep_gemm

    only(out is None and not transposed and len(b_scale) != len(b), "this operand layout here")
    d = torch.empty(len(a), len(b), dtype=torch.bfloat16, device=a.device)

    def call():
        deep_gemm.fp8_gemm_nt((a, a_scale), (b, b_scale), d)
        return d

    return (call,)


@peer("grouped_gemm_fp8", "DeepGEMM, rows padded to 128", "deep_gemm")
def deep_gemm_grouped(a, a_scale, b, b_scale, offsets, plan=None, **variant):
    import deep_gemm

    only(plan is None and not variant, "gather, SwiGLU or transposed weights")
    counts = offsets.diff()
    padded = (counts + 127) // 128 * 128
    ends = padded.cumsum(0)
    rows = torch.arange(int(offsets[-1]), device=a.device)
    owner = torch.searchsorted(offsets[1:].contiguous(), rows, right=True)
    place = rows - offsets[owner] + (ends - padded)[owner]
    x = torch.zeros(int(ends[-1]), a.shape[1], dtype=torch.uint8, device=a.device)
    x[place] = a[: len(rows)].view(torch.uint8)
    x_scale = torch.ones(a_scale.shape[1], len(x), device=a.device).T
    x_scale[place] = a_scale[: len(rows)]
    group = torch.repeat_interleave(torch.arange(len(counts), device=a.device), padded).int()
    d = torch.empty(len(x), b.shape[1], dtype=torch.bfloat16, device=a.device)
    x = x.view(a.dtype)

    def call():
        deep_gemm.m_grouped_fp8_gemm_nt_contiguous((x, x_scale), (b, b_scale), d, group)
        return d

    return call, lambda out: out.new_zeros(d.shape).index_copy_(0, place, out[: len(rows)])


@peer("rms_norm", "torch rms_norm")
def torch_rms_norm(x, w, residual=None, eps=1e-6, **variant):
    only(residual is None and not variant, "residual or quantisation")
    return (lambda: F.rms_norm(x, w.shape, w, eps),)


@peer("rms_norm", "Liger", "liger_kernel")
def liger_rms_norm(x, w, residual=None, eps=1e-6, **variant):
    from liger_kernel.ops.rms_norm import LigerRMSNormFunction

    only(residual is None and not variant, "residual or quantisation here")
    return (lambda: LigerRMSNormFunction.apply(x, w, eps),)


@peer("rms_norm", "FlashInfer", "flashinfer")
def flashinfer_rms_norm(x, w, residual=None, eps=1e-6, **variant):
    import flashinfer

    only(residual is None and not variant, "quantisation here")
    return (lambda: flashinfer.norm.rmsnorm(x, w, eps),)


@peer("rms_norm", "quack", "quack")
def quack_rms_norm(x, w, residual=None, eps=1e-6, **variant):
    import quack

    only(residual is None and not variant, "quantisation here")
    return (lambda: quack.rmsnorm(x, w, eps=eps),)


@peer("rms_norm", "Transformer Engine", "transformer_engine.pytorch")
def te_rms_norm(x, w, residual=None, eps=1e-6, **variant):
    import transformer_engine.pytorch as te

    only(residual is None and not variant, "quantisation here")
    norm = te.RMSNorm(x.shape[-1], eps=eps, params_dtype=x.dtype, device=x.device)
    norm.weight.data.copy_(w)
    return (lambda: norm(x),)


@peer("swiglu", "Liger", "liger_kernel")
def liger_swiglu(x, weights=None, quantize=False, *variant, **others):
    from liger_kernel.ops.swiglu import LigerSiLUMulFunction

    only(weights is None and not quantize, "weights or quantisation")
    gate, up = (t.contiguous() for t in x.chunk(2, -1))
    return (lambda: LigerSiLUMulFunction.apply(gate, up),)


@peer("cross_entropy", "torch cross_entropy")
def torch_cross_entropy(logits, targets, ignore_index=-100, reduction="mean"):
    return (lambda: F.cross_entropy(logits, targets, ignore_index=ignore_index, reduction=reduction),)


@peer("cross_entropy", "quack", "quack")
def quack_cross_entropy(logits, targets, ignore_index=-100, reduction="mean"):
    import quack

    return (lambda: quack.cross_entropy(logits, targets, ignore_index=ignore_index, reduction=reduction),)


@peer("route", "SGLang", "sgl_kernel")
def sglang_route(logits, bias, mask=None, num_groups=8, group_topk=4, topk=8, scale=2.5, z_loss=None):
    import sgl_kernel

    only(mask is None and z_loss is None, "mask or z-loss")
    return lambda: sgl_kernel.moe_fused_gate(logits, bias, num_groups, group_topk, topk, 0, scale), lambda out: out[0]


@peer("quantize", "SGLang", "sgl_kernel")
def sglang_quantize(x, rows=True, columns=False, plan=None, pow2=False, **variant):
    import sgl_kernel

    only(rows and not columns and not pow2 and not variant, "columns or powers of two here")
    q = torch.empty_like(x, dtype=torch.float8_e4m3fn)
    scale = torch.empty(x.shape[1] // 128, len(x), device=x.device).T

    def call():
        sgl_kernel.sgl_per_token_group_quant_8bit(x, q, scale, 128, 1e-10, -448.0, 448.0)
        return q

    return (call,)


@peer("permute", "Transformer Engine", "transformer_engine.pytorch")
def te_permute(x, plan):
    from transformer_engine.pytorch.permutation import moe_permute

    experts = torch.searchsorted(plan.offsets[1:].contiguous(), plan.slot.flatten(), right=True).view_as(plan.slot)
    return (lambda: moe_permute(x, experts.int(), map_type="index")[0],)
