"""Ops that go over rows once, norms, SwiGLU, quantisation, losses: torch, FlashInfer, Liger, linghe, Megatron, quack,
SGLang, Transformer Engine, vLLM."""

import torch
from torch.nn import functional as F

from ling_kernels.op import E4M3
from ling_kernels.ops.quantize import dequantize

from . import first, only, peer


def dequantized(theirs, ours):
    """Of a pair of FP8 and its scales on either side, in rows."""
    return dequantize(*theirs[:2]), dequantize(*ours[:2])


def plain_norm(prepare):
    def checked(x, w, residual=None, eps=1e-6, quantize=False, columns=False):
        only(residual is None and not quantize, "residual or quantisation here")
        return prepare(x, w, eps)

    return checked


@peer("rms_norm", "torch rms_norm")
@plain_norm
def torch_norm(x, w, eps):
    return lambda: F.rms_norm(x, w.shape, w, eps)


@peer("rms_norm", "FlashInfer", "flashinfer")
@plain_norm
def flashinfer_norm(x, w, eps):
    import flashinfer

    return lambda: flashinfer.norm.rmsnorm(x, w, eps)


@peer("rms_norm", "Liger", "liger_kernel")
@plain_norm
def liger_norm(x, w, eps):
    from liger_kernel.ops.rms_norm import LigerRMSNormFunction

    return lambda: LigerRMSNormFunction.apply(x, w, eps, 0.0, "gemma")


@peer("rms_norm", "linghe", "linghe")
@plain_norm
def linghe_norm(x, w, eps):
    from linghe.facade.norm import rms_norm

    return lambda: rms_norm(x, w, eps)


@peer("rms_norm", "SGLang", "sgl_kernel")
@plain_norm
def sglang_norm(x, w, eps):
    import sgl_kernel

    return lambda: sgl_kernel.rmsnorm(x, w, eps)


@peer("rms_norm", "Transformer Engine", "transformer_engine.pytorch")
@plain_norm
def te_norm(x, w, eps):
    import transformer_engine.pytorch as te

    norm = te.RMSNorm(x.shape[-1], eps=eps, dtype=x.dtype, device=x.device)
    norm.weight.data.copy_(w)
    return lambda: norm(x)


@peer("rms_norm", "vLLM", "vllm")
@plain_norm
def vllm_norm(x, w, eps):
    from vllm import _custom_ops

    out = torch.empty_like(x)

    def call():
        _custom_ops.rms_norm(out, x, w, eps)
        return out

    return call


@peer("rms_norm", "quack", "quack")
def quack_norm(x, w, residual=None, eps=1e-6, quantize=False, columns=False):
    import quack

    only(not quantize, "quantisation here")
    return lambda: quack.rmsnorm(x, w, residual=residual, eps=eps, prenorm=residual is not None)


def fits_residual(x, residual, quantize: bool) -> bool:
    return residual is not None and residual.dtype == x.dtype and not quantize


@peer("rms_norm", "Liger with residual", "liger_kernel")
def liger_add_norm(x, w, residual=None, eps=1e-6, quantize=False, columns=False):
    from liger_kernel.ops.fused_add_rms_norm import LigerFusedAddRMSNormFunction

    only(fits_residual(x, residual, quantize), "norm without a residual of x's dtype")
    return lambda: LigerFusedAddRMSNormFunction.apply(x, residual, w, eps, 0.0, "gemma", False)


def add_norm(fn):
    """One that overwrites its input and residual: from the second call on it has other numbers, as many of them."""

    def prepare(x, w, residual=None, eps=1e-6, quantize=False, columns=False):
        only(fits_residual(x, residual, quantize), "norm without a residual of x's dtype")
        x, residual, run = x.clone(), residual.clone(), fn()

        def call():
            run(x, residual, w, eps)
            return x

        return call

    return prepare


@add_norm
def flashinfer_add_norm():
    import flashinfer

    return flashinfer.norm.fused_add_rmsnorm


@add_norm
def sglang_add_norm():
    import sgl_kernel

    return sgl_kernel.fused_add_rmsnorm


@add_norm
def vllm_add_norm():
    from vllm import _custom_ops

    return _custom_ops.fused_add_rms_norm


peer("rms_norm", "FlashInfer with residual", "flashinfer")(flashinfer_add_norm)
peer("rms_norm", "SGLang with residual", "sgl_kernel")(sglang_add_norm)
peer("rms_norm", "vLLM with residual", "vllm")(vllm_add_norm)


@peer("rms_norm", "linghe with quantisation", "linghe")
def linghe_norm_quantize(x, w, residual=None, eps=1e-6, quantize=False, columns=False):
    from linghe.utils.norm import triton_rms_norm_and_block_quant_forward

    only(quantize and residual is None, "norm without quantisation by this function")
    mode = 2 if columns else 0
    return (
        lambda: triton_rms_norm_and_block_quant_forward(x, w, eps=eps, output_mode=mode),
        lambda theirs, ours: (dequantize(theirs[0], theirs[1].T), dequantize(*ours[1:3])),
    )


@peer("qk_norm_rope", "linghe", "linghe")
def linghe_qk_norm_rope(qkv, q_weight, k_weight, cos, sin, positions, num_kv_heads, eps=1e-6,
                        cache=None, slots=None):  # fmt: skip
    from linghe.utils.rope import triton_varlen_qk_norm_and_half_rope_forward

    T, heads, D = qkv.shape
    only(cache is None and 4 * cos.shape[1] == D, "cache, or rotation of other than half a head")
    angle = torch.atan2(sin, cos)[positions.long()]
    qkv, freqs = qkv.reshape(T, heads * D), torch.cat([angle, angle], 1).contiguous()  # one row of freqs a token,
    ends = torch.tensor([0, T], dtype=torch.int32, device=qkv.device)  # hence one sequence
    only((cos.square() + sin.square()).allclose(torch.ones_like(cos), atol=1e-4), "factor of cos and sin here")
    return (
        lambda: triton_varlen_qk_norm_and_half_rope_forward(
            qkv, q_weight, k_weight, freqs, ends, ends, H=heads - 2 * num_kv_heads, h=num_kv_heads, eps=eps,
            interleaved=False, reuse=True,
        ),
        lambda theirs, ours: tuple(torch.cat([t.flatten() for t in side]) for side in (theirs, ours)),
    )  # fmt: skip


def plain_swiglu(prepare):
    def checked(x, weights=None, quantize=False, columns=False, plan=None, pow2=False):
        only(weights is None and not quantize, "weights or quantisation here")
        return prepare(x)

    return checked


@peer("swiglu", "FlashInfer", "flashinfer")
@plain_swiglu
def flashinfer_swiglu(x):
    import flashinfer

    return lambda: flashinfer.activation.silu_and_mul(x)


@peer("swiglu", "Liger", "liger_kernel")
@plain_swiglu
def liger_swiglu(x):
    from liger_kernel.ops.swiglu import LigerSiLUMulFunction

    gate, up = (t.contiguous() for t in x.chunk(2, -1))
    return lambda: LigerSiLUMulFunction.apply(gate, up)


@peer("swiglu", "SGLang", "sgl_kernel")
@plain_swiglu
def sglang_swiglu(x):
    import sgl_kernel

    return lambda: sgl_kernel.silu_and_mul(x)


@peer("swiglu", "vLLM", "vllm")
@plain_swiglu
def vllm_swiglu(x):
    import vllm._custom_ops  # noqa: F401  declares torch.ops._C

    out = x.new_empty(*x.shape[:-1], x.shape[-1] // 2)

    def call():
        torch.ops._C.silu_and_mul(out, x)
        return out

    return call


@peer("swiglu", "linghe", "linghe")
def linghe_swiglu(x, weights=None, quantize=False, columns=False, plan=None, pow2=False):
    from linghe.utils import silu

    only(x.ndim == 2 and plan is None, "column-wise copy for experts here")
    if not quantize:
        return lambda: silu.triton_weighted_silu_forward(x, weights)
    only(weights is None, "weights with quantisation here")
    mode = 2 if columns else 0
    return (
        lambda: silu.triton_silu_and_block_quant_forward(x, round_scale=pow2, output_mode=mode),
        lambda theirs, ours: (dequantize(theirs[0], theirs[1].T), dequantize(*ours[:2])),
    )


@peer("swiglu", "Megatron", "megatron.core")
def megatron_swiglu(x, weights=None, quantize=False, columns=False, plan=None, pow2=False):
    from megatron.core.fusions.fused_bias_swiglu import bias_swiglu_impl, weighted_bias_swiglu_impl

    only(not quantize, "quantisation")
    if weights is None:
        return lambda: bias_swiglu_impl(x, None)
    return lambda: weighted_bias_swiglu_impl(x, None, weights[:, None])


@peer("quantize", "SGLang", "sgl_kernel")
def sglang_quantize(x, rows=True, columns=False, plan=None, pow2=False):
    import sgl_kernel

    only(rows and not columns and not pow2, "columns or powers of two here")
    q = torch.empty_like(x, dtype=E4M3)
    scale = torch.empty(x.shape[1] // 128, len(x), device=x.device).T

    def call():
        sgl_kernel.sgl_per_token_group_quant_8bit(x, q, scale, 128, 1e-10, -448.0, 448.0)
        return q, scale

    return call, dequantized


@peer("quantize", "vLLM", "vllm")
def vllm_quantize(x, rows=True, columns=False, plan=None, pow2=False):
    from vllm.model_executor.layers.quantization.utils.fp8_utils import per_token_group_quant_fp8

    only(rows and not columns, "columns")
    return lambda: per_token_group_quant_fp8(x, 128, column_major_scales=True, use_ue8m0=pow2), dequantized


@peer("quantize", "linghe", "linghe")
def linghe_quantize(x, rows=True, columns=False, plan=None, pow2=False):
    from linghe.quant.block import triton_blockwise_quant
    from linghe.quant.group import triton_group_quant

    only(rows and plan is None, "column-wise copy for experts here")
    if not columns:
        return lambda: triton_group_quant(x, round_scale=pow2), dequantized
    return (
        lambda: triton_blockwise_quant(x, round_scale=pow2, output_mode=2),
        lambda theirs, ours: (dequantize(theirs[0], theirs[1].T), dequantize(*ours[:2])),
    )


@peer("quantize_weight", "linghe", "linghe")
def linghe_quantize_weight(w, pow2=False):
    from linghe.quant.block import triton_block_quant

    rows = w.reshape(-1, w.shape[-1])
    return (
        lambda: triton_block_quant(rows, round_scale=pow2),
        lambda theirs, ours: (dequantize(*theirs), dequantize(*ours).view(rows.shape)),
    )


@peer("cross_entropy", "torch cross_entropy")
def torch_cross_entropy(logits, targets, ignore_index=-100, reduction="mean"):
    return lambda: F.cross_entropy(logits, targets, ignore_index=ignore_index, reduction=reduction)


@peer("cross_entropy", "Liger", "liger_kernel")
def liger_cross_entropy(logits, targets, ignore_index=-100, reduction="mean"):
    from liger_kernel.ops.cross_entropy import LigerCrossEntropyFunction

    return lambda: LigerCrossEntropyFunction.apply(logits, targets, None, ignore_index, 0.0, 0.0, reduction)


@peer("cross_entropy", "linghe", "linghe")
def linghe_cross_entropy(logits, targets, ignore_index=-100, reduction="mean"):
    from linghe.facade.loss import softmax_cross_entropy

    only(reduction == "mean", "sum of its losses")
    count = (targets != ignore_index).sum()
    return lambda: softmax_cross_entropy(logits, targets, ignore_index).sum() / count


@peer("cross_entropy", "quack", "quack")
def quack_cross_entropy(logits, targets, ignore_index=-100, reduction="mean"):
    import quack

    return lambda: quack.cross_entropy(logits, targets, ignore_index=ignore_index, reduction=reduction)


@peer("linear_cross_entropy", "Liger", "liger_kernel")
def liger_linear_cross_entropy(x, w, targets, ignore_index=-100, reduction="mean", chunk=1024):
    from liger_kernel.ops.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyFunction as Function

    return lambda: first(Function.apply(x, w, targets, None, None, ignore_index, 0.0, 0.0, reduction))


@peer("grad_norm", "torch get_total_norm")
def torch_grad_norm(grads):
    return lambda: torch.nn.utils.get_total_norm(grads)


@peer("grad_norm", "linghe", "linghe")
def linghe_grad_norm(grads):
    from linghe.utils.reduce import triton_batch_norm

    grads = [*grads]
    return lambda: triton_batch_norm(grads, ord=2, scalar=False)
