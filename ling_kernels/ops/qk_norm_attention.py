"""qk_norm_rope and causal self-attention over packed sequences as one op, which saves one qkv for its backward pass.

One kernel norms and rotates the keys, once. The attention kernel norms and rotates queries itself, and is the only one
to read them; values are read where they lie in qkv. Backward computes q, k and v again from qkv. By count this saves
the write and read of q, on an H200 a tenth of the products' time at sequences of 4K tokens and a hundredth at 32K; in
return the norm of a tile waits for its loads. Not measured.
"""

import torch
from torch import Tensor

from ..op import autocast, expect, first_derivative_only, use_reference
from .attention import (
    attention_backward,
    attention_fwd,
    attention_ref,
    attention_torch,
    default_scale,
    empty_outputs,
    expect_bounds,
)
from .qk_norm_rope import (
    expect_heads,
    normed_and_rotated,
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
) -> tuple[Tensor, Tensor]:
    """qkv [T, Hq + 2 Hkv, D], packed as cu_seqlens [B + 1] int32 says -> out [T, Hq, D] and lse [Hq, T] fp32.

    The other arguments, dtypes and errors are those of `qk_norm_rope` and `attention`; under autocast qkv is cast
    before. Gradient: to qkv and both weights; lse is not differentiable. qkv, out and lse are saved for it, no q, k or
    v.
    """
    expect_heads(qkv, q_weight, k_weight, cos, sin, positions, num_kv_heads)
    expect(scale is None or scale > 0, "scale > 0", scale)
    expect_bounds(cu_seqlens, len(qkv), qkv.device)
    (qkv,) = autocast(qkv)
    scale = default_scale(qkv, scale)
    args = qkv, q_weight, k_weight, cos, sin, positions, num_kv_heads, cu_seqlens, causal, scale, eps
    if use_reference("qk_norm_attention", qkv, q_weight, k_weight):
        q, k, v = normed_and_rotated(qkv, q_weight, k_weight, cos, sin, positions, num_kv_heads, eps)
        return attention_torch(q, k, v, cu_seqlens, None, causal, scale)
    return QKNormAttention.apply(*args)


def qk_norm_attention_ref(
    qkv, q_weight, k_weight, cos, sin, positions, num_kv_heads, cu_seqlens,
    causal=True, scale=None, eps=1e-6,
):  # fmt: skip
    q, k, v = qk_norm_rope_ref(qkv, q_weight, k_weight, cos, sin, positions, num_kv_heads, eps)
    return attention_ref(q, k, v, cu_seqlens, None, causal, scale)


class QKNormAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, qkv, q_weight, k_weight, cos, sin, positions, num_kv_heads, cu, causal, scale, eps):
        qkv, q_weight, k_weight, cos, sin, positions, cu = map(
            Tensor.contiguous, (qkv, q_weight, k_weight, cos, sin, positions, cu)
        )
        q, k, v = qkv.split([qkv.shape[1] - 2 * num_kv_heads, num_kv_heads, num_kv_heads], dim=1)  # views
        k = torch.empty_like(k, memory_format=torch.contiguous_format)
        qk_norm_rope_fwd(qkv, q_weight, k_weight, cos, sin, positions, None, None, k, None, None, None, eps)
        out, lse = empty_outputs(q)
        attention_fwd(q, k, v, cu, None, out, lse, causal, scale, q_weight, cos, sin, positions, eps)
        ctx.save_for_backward(qkv, q_weight, k_weight, cos, sin, positions, cu, out, lse)
        ctx.options = num_kv_heads, causal, scale, eps
        ctx.mark_non_differentiable(lse)
        return out, lse

    @staticmethod
    @first_derivative_only
    def backward(ctx, dout, _):
        qkv, q_weight, k_weight, cos, sin, positions, cu, out, lse = ctx.saved_tensors
        num_kv_heads, causal, scale, eps = ctx.options
        q, k, v = qk_norm_rope_forward(qkv, q_weight, k_weight, cos, sin, positions, num_kv_heads, eps)
        grads = attention_backward(dout, q, k, v, out, lse, cu, None, causal, scale)
        grads = qk_norm_rope_backward(*grads, qkv, q_weight, k_weight, cos, sin, positions, eps)
        return *grads, *[None] * 8
