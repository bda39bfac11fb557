"""qk_norm_rope and causal self-attention over packed sequences as one op, which keeps one qkv for its backward pass.

Keys are normed and rotated once, before. Queries are so inside the attention kernel, which is the only one to read them
(the fused form), or together with the keys (the form with a pre-pass). Backward computes q, k and v anew from qkv.
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
    head_groups,
    programs,
    qk_norm_rope_bwd,
    qk_norm_rope_ref,
    rotate_heads,
    rotated,
    serves,
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
    fused: bool | None = None,
) -> tuple[Tensor, Tensor]:
    """qkv [T, Hq + 2 Hkv, D], packed as cu_seqlens [B + 1] int32 says -> out [T, Hq, D] and lse [Hq, T] fp32.

    The other arguments, dtypes and errors are those of `qk_norm_rope` and `attention`; under autocast qkv is cast
    before. fused chooses the form, where kernels run; the two may differ in a last bit of q. Gradient: to qkv and both
    weights; lse is not differentiable. For it qkv, out and lse are kept, no q, k or v.
    """
    T, H, D = qkv.shape if qkv.ndim == 3 else (-1, 0, 0)
    expect(T >= 0 and qkv.is_floating_point() and num_kv_heads > 0 and H > 2 * num_kv_heads and H % num_kv_heads == 0,
           "qkv [T, Hq + 2 Hkv, D], Hq % Hkv == 0", qkv, num_kv_heads)  # fmt: skip
    expect(q_weight.shape == k_weight.shape == (D,), "q_weight and k_weight [D]", q_weight, k_weight, qkv)
    expect(cos.ndim == 2 and cos.shape == sin.shape and cos.dtype == sin.dtype == torch.float32
           and 2 * cos.shape[1] <= D, "cos and sin [P, R/2] fp32, R <= D", cos, sin, qkv)  # fmt: skip
    expect(positions.shape == (T,) and positions.dtype in (torch.int32, torch.int64),
           "positions [T] int32 or int64", positions, qkv)  # fmt: skip
    devices = {t.device for t in (qkv, q_weight, k_weight, cos, sin, positions)}
    expect(len(devices) == 1, "all tensors on one device", *devices)
    expect(scale is None or scale > 0, "scale > 0", scale)
    expect_bounds(cu_seqlens, T, qkv.device)
    if positions.device.type == "cpu" and not torch.compiler.is_compiling() and T:
        low, high = int(positions.min()), int(positions.max())
        expect(low >= 0 and high < len(cos), f"positions in 0..{len(cos) - 1}, the rows of cos and sin", low, high)
    (qkv,) = autocast(qkv)
    scale = default_scale(qkv, scale)
    args = qkv, q_weight, k_weight, cos, sin, positions, num_kv_heads, cu_seqlens, causal, scale, eps, round_first
    if backend(qkv) == "torch" or any(t.dtype not in FLOATS for t in (qkv, q_weight, k_weight)):
        return qk_norm_attention_ref(*args)
    return QKNormAttention.apply(*args, fuses(qkv) if fused is None else fused)


def qk_norm_attention_ref(
    qkv, q_weight, k_weight, cos, sin, positions, num_kv_heads, cu_seqlens,
    causal=True, scale=None, eps=1e-6, round_first=False, fused=None,
):  # fmt: skip
    q, k, v = qk_norm_rope_ref(qkv, q_weight, k_weight, cos, sin, positions, num_kv_heads, eps, round_first)
    return attention_ref(q, k, v, cu_seqlens, None, causal, scale)


def fuses(qkv: Tensor) -> bool:
    """Whether the fused form is the default. Not measured.

    By count it saves writing and reading q, on an H200 a tenth of the time that the products take at sequences of 4K
    tokens and a hundredth at 32K; against that, the norm of a tile waits for its loads. One answer for all lengths: the
    other form may have other bits, and a packed batch would not have those of its sequences.
    """
    return True


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
        Hq, D = out.shape[1:]
        q, k, v = rotated(qkv, q_weight, k_weight, cos, sin, positions, num_kv_heads, eps, round_first)
        dq, dk, dv = (torch.empty_like(x) for x in (q, k, v))
        attention_bwd(dout.contiguous(), q, k, v, out, lse, cu, None, dq, dk, dv, causal, scale)
        groups = head_groups(Hq, num_kv_heads)[:2]
        dqkv = torch.empty_like(qkv)
        dw = torch.empty(
            programs(len(qkv), Hq, num_kv_heads, D), sum(groups), D, dtype=torch.float32, device=qkv.device
        )
        qk_norm_rope_bwd(dq, dk, dv, qkv, q_weight, k_weight, cos, sin, positions, dqkv, dw, eps, round_first)
        dq_weight, dk_weight = (part.sum((0, 1)) for part in dw.split(groups, dim=1))
        return dqkv, dq_weight.to(q_weight.dtype), dk_weight.to(k_weight.dtype), *[None] * 10


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
