"""Norms, SwiGLU, quantisation and losses of the peers."""

import torch
from torch.nn import functional as F

from .arithmetic import fp8, gate_up, norm


class LigerRMSNorm:
    @staticmethod
    def apply(X, W, eps, offset=0.0, casting_mode="llama", in_place=True):
        assert casting_mode in ("llama", "gemma") and offset == 0.0
        return norm(X, W, eps)


class LigerAddRMSNorm:
    @staticmethod
    def apply(X, R, W, eps, offset=0.0, casting_mode="llama", in_place=False):
        return norm(X + R, W, eps), X + R


class LigerSiLUMul:
    @staticmethod
    def apply(a, b):
        return (F.silu(a.float()) * b.float()).to(a.dtype)


class LigerCrossEntropy:
    @staticmethod
    def apply(_input, target, weight, ignore_index=-100, lse_square_scale=0.0, label_smoothing=0.0, reduction="mean"):
        assert weight is None and lse_square_scale == label_smoothing == 0
        return F.cross_entropy(_input.float(), target, ignore_index=ignore_index, reduction=reduction), None


class LigerLinearCrossEntropy:
    @staticmethod
    def apply(_input, weight, target, bias=None, ce_weight=None, ignore_index=-100, lse_square_scale=0.0,
              label_smoothing=0.0, reduction="mean"):  # fmt: skip
        logits = _input.float() @ weight.float().T
        return LigerCrossEntropy.apply(logits, target, ce_weight, ignore_index, 0.0, 0.0, reduction)


def rmsnorm(input, weight, eps=1e-6, out=None, enable_pdl=None):
    return norm(input, weight, eps)


def fused_add_rmsnorm(input, residual, weight, eps=1e-6, enable_pdl=None):
    residual += input
    input.copy_(norm(residual, weight, eps))


def vllm_rms_norm(out, input, weight, epsilon):
    out.copy_(norm(input, weight, epsilon))


def quack_rmsnorm(x, weight=None, bias=None, residual=None, out_dtype=None, residual_dtype=None, eps=1e-6,
                  prenorm=False, weight_offset=0.0):  # fmt: skip
    total = x if residual is None else x + residual
    return (norm(total, weight, eps), total) if prenorm else norm(total, weight, eps)


class TeRMSNorm:
    def __init__(self, normalized_shape=None, eps=1e-5, sequence_parallel=None, params_dtype=None, dtype=None,
                 device=None):  # fmt: skip
        self.weight, self.eps = torch.nn.Parameter(torch.empty(normalized_shape, dtype=dtype)), eps

    def __call__(self, x):
        return norm(x, self.weight, self.eps).detach()


def norm_quant(x, weight, eps=1e-6, out=None, scale=None, rms=None, round_scale=False, output_mode=2):
    q, scale = fp8(norm(x, weight, eps))
    return q, scale.T.contiguous(), None, None, None


def norm_rope(qkv, q_norm_weight, k_norm_weight, freqs, cu_seqlens_q, cu_seqlens_kv, H=32, h=4, eps=1e-6,
              interleaved=True, silu=False, cp_rank=0, cp_size=1, mscale=1.0, reuse=False):  # fmt: skip
    assert not interleaved and qkv.ndim == 2 and freqs.is_contiguous() and cu_seqlens_q[-1] == len(qkv) == len(freqs)
    q, k, v = qkv.unflatten(1, (H + 2 * h, -1)).split([H, h, h], 1)
    half = freqs.shape[1] // 2

    def turned(x, w):
        x = norm(x, w, eps).float()
        y, rest = x.split(freqs.shape[1], -1)
        turn = torch.cat([-y[..., half:], y[..., :half]], -1)
        return torch.cat([y * freqs.cos()[:, None] + turn * freqs.sin()[:, None], rest], -1).to(qkv.dtype)

    return turned(q, q_norm_weight), turned(k, k_norm_weight), v


def silu_and_mul(input, out=None, enable_pdl=None):
    return gate_up(input)


def silu_quant(x, out=None, scale=None, round_scale=False, output_mode=2):
    q, scale = fp8(gate_up(x))
    return q, scale.T.contiguous(), None, None


def group_quant(input, output_q, output_s, group_size, eps, fp8_min, fp8_max, scale_ue8m0=False):
    assert (group_size, fp8_min, fp8_max) == (128, -448, 448) and output_s.stride(0) == 1
    for out, value in zip((output_q, output_s), fp8(input), strict=True):
        out.copy_(value)


def blockwise_quant(x, round_scale=False, output_mode=2):
    q, scale = fp8(x)
    return q, scale.T.contiguous(), None, None


def silu_and_mul_out(result, input):
    """vLLM's, which is declared to torch.ops alone."""
    result.copy_(gate_up(input))


def quack_cross_entropy(x, target, lse_partial=None, weight=None, ignore_index=-100, reduction="mean"):
    assert lse_partial is weight is None
    return F.cross_entropy(x.float(), target, ignore_index=ignore_index, reduction=reduction)


def vllm_group_quant(x, group_size, eps=1e-10, dtype=None, column_major_scales=False, tma_aligned_scales=False,
                     out_q=None, use_ue8m0=None):  # fmt: skip
    assert group_size == 128 and column_major_scales and out_q is None
    return fp8(x)
