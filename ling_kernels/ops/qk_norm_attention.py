"""qk_norm_rope and causal self-attention over packed sequences as one op, which keeps one qkv for its backward pass.

Keys are normed and rotated once, before. Queries are so inside the attention kernel, which is the only one to read them
(the fused form), or together with the keys (the form with a pre-pass). Backward computes q, k and v anew from qkv.

Fused is the default; not measured. By count it saves writing and reading q, on an H200 a tenth of the time that the
products take at sequences of 4K tokens and a hundredth at 32K; against that, the norm of a tile waits for its loads.
One answer for all lengths: a packed batch would otherwise not have the bits of its sequences.
"""

import torch
from torch import Tensor

from ..op import autocast, expect, first_derivative_only, use_reference
from .attention import attention_backward, attention_fwd, attention_ref, default_scale, empty_outputs, expect_bounds
from .qk_norm_rope import (
    expect_heads,
    qk_norm_rope_backward,
    qk_norm_rope_forward,
    qk_norm_rope_fwd,
    qk_norm_rope_ref,
)


def qk_norm_attention(
    qkv: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor,
    num_kv_heads: int,
    cu_seqlens: Tensor,
    causal: bool = True,
    scale: float | None = None,
    eps: float = 1e-6,
    round_first: bool = False,
    fused: bool = True,
) -> tuple[Tensor, Tensor]:
    """qkv [T, Hq + 2 Hkv, D], packed as cu_seqlens [B + 1] int32 says -> out [T, Hq, D] and lse [Hq, T] fp32.

    The other arguments, dtypes and errors are those of `qk_norm_rope` and `attention`; under autocast qkv is cast
    before. fused=False chooses the other form, where kernels run; the two may differ in a last bit of q. Gradient: to
    qkv and both weights; lse is not differentiable. For it qkv, out and lse are kept, no q, k or v.
    """
    expect_heads(qkv, q_weight, k_weight, cos, sin, positions, num_kv_heads)
    expect(scale is None or scale > 0, "scale > 0", scale)
    expect_bounds(cu_seqlens, len(qkv), qkv.device)
    (qkv,) = autocast(qkv)
    scale = default_scale(qkv, scale)
    args = qkv, q_weight, k_weight, cos, sin, positions, num_kv_heads, cu_seqlens, causal, scale, eps, round_first
    if use_reference("qk_norm_attention", qkv, q_weight, k_weight):
        return qk_norm_attention_ref(*args)
    return QKNormAttention.apply(*args, fused)


def qk_norm_attention_ref(
    qkv, q_weight, k_weight, cos, sin, positions, num_kv_heads, cu_seqlens,
    causal=True, scale=None, eps=1e-6, round_first=False, fused=True,
):  # fmt: skip
    q, k, v = qk_norm_rope_ref(qkv, q_weight, k_weight, cos, sin, positions, num_kv_heads, eps, round_first)
    return attention_ref(q, k, v, cu_seqlens, None, causal, scale)


class QKNormAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx, qkv, q_weight, k_weight, cos, sin, positions, num_kv_heads, cu, causal, scale, eps, round_first, fused
    ):
        qkv, q_weight, k_weight, cos, sin, positions, cu = map(
            Tensor.contiguous, (qkv, q_weight, k_weight, cos, sin, positions, cu)
        )
        if fused:
            q, k, v = split_heads(qkv, num_kv_heads)
            k, norm = torch.empty_like(k, memory_format=torch.contiguous_format), (q_weight, cos, sin, positions)
            qk_norm_rope_fwd(
                qkv, q_weight, k_weight, cos, sin, positions, None, None, k, None, None, None, eps, round_first
            )
        else:
            q, k, v = qk_norm_rope_forward(qkv, q_weight, k_weight, cos, sin, positions, num_kv_heads, eps, round_first)
            norm = None, None, None, None
        out, lse = empty_outputs(q)
        attention_fwd(q, k, v, cu, None, out, lse, causal, scale, *norm, eps, round_first)
        ctx.save_for_backward(qkv, q_weight, k_weight, cos, sin, positions, cu, out, lse)
        ctx.options = num_kv_heads, causal, scale, eps, round_first
        ctx.mark_non_differentiable(lse)
        return out, lse

    @staticmethod
    @first_derivative_only
    def backward(ctx, dout, _):
        qkv, q_weight, k_weight, cos, sin, positions, cu, out, lse = ctx.saved_tensors
        num_kv_heads, causal, scale, eps, round_first = ctx.options
        q, k, v = qk_norm_rope_forward(qkv, q_weight, k_weight, cos, sin, positions, num_kv_heads, eps, round_first)
        grads = attention_backward(dout, q, k, v, out, lse, cu, None, causal, scale)
        grads = qk_norm_rope_backward(*grads, qkv, q_weight, k_weight, cos, sin, positions, eps, round_first)
        return *grads, *[None] * 10


def split_heads(qkv: Tensor, num_kv_heads: int) -> tuple[Tensor, ...]:
    """Views of the heads of q, k and v."""
    return qkv.split([qkv.shape[1] - 2 * num_kv_heads, num_kv_heads, num_kv_heads], dim=1)
