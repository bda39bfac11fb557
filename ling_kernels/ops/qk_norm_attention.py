"""qk_norm_rope and causal self-attention over packed sequences as one op, which keeps one qkv for its backward pass.

Keys are normed and rotated once, before. Queries are so inside the attention kernel, which is the only one to read them
(the fused form), or together with the keys (the form with a pre-pass). Backward computes q, k and v anew from qkv.

Fused is the default; not measured. By count it saves writing and reading q, on an H200 a tenth of the time that the
products take at sequences of 4K tokens and a hundredth at 32K; against that, the norm of a tile waits for its loads.
One answer for all lengths: a packed batch would otherwise not have the bits of its sequences.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..backend import _C, backend
from ..op import autocast, expect, multiprocessors, op
from .attention import (
    attention_bwd,
    attention_fwd,
    attention_ref,
    cuda_serves,
    default_scale,
    expect_bounds,
    launch_fwd,
)
from .qk_norm_rope import (
    FLOATS,
    config,
    expect_heads,
    head_groups,
    qk_norm_rope_ref,
    rotated,
    serves,
    turned_back,
)
from .qk_norm_rope_kernels import rotate_heads


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
    if backend(qkv) == "torch" or any(t.dtype not in FLOATS for t in (qkv, q_weight, k_weight)):
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
        T, H, D = qkv.shape
        Hq = H - 2 * num_kv_heads
        qkv, q_weight, k_weight, cos, sin, positions = map(
            Tensor.contiguous, (qkv, q_weight, k_weight, cos, sin, positions)
        )
        out = qkv.new_empty(T, Hq, D)
        lse = torch.empty(Hq, T, dtype=torch.float32, device=qkv.device)
        if fused:
            qk_norm_attention_fwd(
                qkv, q_weight, k_weight, cos, sin, positions, cu, out, lse,
                num_kv_heads, causal, scale, eps, round_first,
            )  # fmt: skip
        else:
            q, k, v = rotated(qkv, q_weight, k_weight, cos, sin, positions, num_kv_heads, eps, round_first)
            attention_fwd(q, k, v, cu, None, out, lse, causal, scale)
        ctx.save_for_backward(qkv, q_weight, k_weight, cos, sin, positions, cu, out, lse)
        ctx.options = num_kv_heads, causal, scale, eps, round_first
        ctx.mark_non_differentiable(lse)
        return out, lse

    @staticmethod
    def backward(ctx, dout, _):
        qkv, q_weight, k_weight, cos, sin, positions, cu, out, lse = ctx.saved_tensors
        num_kv_heads, causal, scale, eps, round_first = ctx.options
        q, k, v = rotated(qkv, q_weight, k_weight, cos, sin, positions, num_kv_heads, eps, round_first)
        dq, dk, dv = (torch.empty_like(x) for x in (q, k, v))
        attention_bwd(dout.contiguous(), q, k, v, out, lse, cu, None, dq, dk, dv, causal, scale)
        grads = turned_back(dq, dk, dv, qkv, q_weight, k_weight, cos, sin, positions, eps, round_first)
        return *grads, *[None] * 10


@op("out", "lse")
def qk_norm_attention_fwd(
    qkv: Tensor, q_weight: Tensor, k_weight: Tensor, cos: Tensor, sin: Tensor, positions: Tensor, cu_seqlens: Tensor,
    out: Tensor, lse: Tensor, num_kv_heads: int, causal: bool, scale: float, eps: float, round_first: bool,
) -> None:  # fmt: skip
    """The fused form. Values are read where they are in qkv."""
    T, H, D = qkv.shape
    Hq = H - 2 * num_kv_heads
    k, v = qkv.new_empty(T, num_kv_heads, D), qkv[:, Hq + num_kv_heads :]
    rotation = cos, sin, positions
    if T and backend(qkv) == "cuda" and fuses_on_cuda(qkv, k, v, out, cu_seqlens, scale, q_weight, k_weight, cos, sin):
        _C.qk_norm_rope_fwd(qkv, q_weight, k_weight, *rotation, None, None, k, None, None, None, eps, round_first)
        q = qkv[:, :Hq]
        return _C.attention_fwd(
            q, k, v, cu_seqlens, None, out, lse, causal, scale, q_weight, *rotation, eps, round_first
        )
    sizes = config(Hq, num_kv_heads, D, cos.shape[1], multiprocessors(qkv.device))
    if T:
        k_norm_rope_kernel[(triton.cdiv(T, sizes["BLOCK_T"]), head_groups(Hq, num_kv_heads)[1])](
            qkv, k_weight, cos, sin, positions, k, T, len(cos), eps, ROUND_FIRST=round_first, **sizes
        )
    norm = q_weight, *rotation
    launch_fwd(qkv, k, v, cu_seqlens, None, out, lse, causal, scale, norm, eps, round_first)


def fuses_on_cuda(qkv, k, v, out, cu_seqlens, scale, q_weight, k_weight, cos, sin) -> bool:
    """Whether both kernels of csrc/ that the fused form takes serve these."""
    return cuda_serves(qkv, k, v, out, cu_seqlens, scale) and serves(qkv, q_weight, k_weight, cos, sin)


@triton.jit
def k_norm_rope_kernel(
    qkv, k_weight, cos, sin, positions, k, T, P, eps,
    NUM_Q: tl.constexpr, NUM_KV: tl.constexpr, D: tl.constexpr, HALF: tl.constexpr, ROUND_FIRST: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_HALF: tl.constexpr, BLOCK_REST: tl.constexpr,
):  # fmt: skip
    rotate_heads(
        qkv, k_weight, cos, sin, positions, None, k, None, T, P, 0, eps, tl.program_id(1), NUM_Q, NUM_KV,
        NUM_Q + 2 * NUM_KV, D, HALF, ROUND_FIRST, BLOCK_T, BLOCK_H, BLOCK_HALF, BLOCK_REST,
    )  # fmt: skip
