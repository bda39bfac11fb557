"""Split of a fused QKV projection, RMS norm of every query and key head, rotation of their first R dims.

y = x / sqrt(mean(x^2) + eps) * w per head; then, with (a, b) the halves of y[:R] and the angles of the position,
(a, b) -> (a cos - b sin, b cos + a sin), which is NeoX's rotate-half. Dims from R on and the values pass unrotated.
"""

import torch
from torch import Tensor

from ..op import (
    E4M3,
    expect,
    first_derivative_only,
    multiprocessors,
    op,
    rows_aligned,
    upcast,
    use_reference,
    values_on_host,
)
from .attention_decode import KVCache, append, expect_slots
from .qk_norm_rope_kernels import qk_norm_rope_bwd_kernel, qk_norm_rope_fwd_kernel
from .triton_import import triton

PROGRAMS = 1056  # at most, of the backward kernel: 8 for each SM of an H200


def qk_norm_rope(
    qkv: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor,
    num_kv_heads: int,
    eps: float = 1e-6,
    cache: KVCache | None = None,
    slots: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """qkv [T, Hq + 2 Hkv, D], q_weight and k_weight [D] -> q [T, Hq, D], k and v [T, Hkv, D], in qkv's dtype.

    cos and sin [P, R/2] fp32 are those of `rope_tables`, R <= D; positions [T] int32 or int64 are their rows. Computed
    in fp32 and rounded once. Given a cache, k and v are also written into it at slots [T], see `append` of
    attention_decode. Gradient: to qkv and both weights, not through the cache. Raises ValueError for another shape or
    dtype, and on a CPU for a position outside 0..P-1.
    """
    expect_heads(qkv, q_weight, k_weight, cos, sin, positions, num_kv_heads)
    expect((cache is None) == (slots is None), "cache and slots together", slots)
    if cache is not None:
        expect_slots(cache, slots, len(qkv), num_kv_heads, qkv.shape[2])
    args = qkv, q_weight, k_weight, cos, sin, positions, num_kv_heads, eps
    if use_reference("qk_norm_rope", qkv, q_weight, k_weight, None if cache is None else cache.k):
        return qk_norm_rope_ref(*args, cache, slots)
    # The kernel writes into a cache without scales; its cells carry no gradient.
    if cache is not None and cache.k_scale is None and not differentiable(qkv, q_weight, k_weight):
        return qk_norm_rope_forward(*args, cache.k, cache.v, slots)
    q, k, v = QKNormRope.apply(*args)
    if cache is not None:
        append(cache, k, v, slots)
    return q, k, v


def expect_heads(qkv, q_weight, k_weight, cos, sin, positions, num_kv_heads) -> None:
    """Check the operands of this op and of qk_norm_attention."""
    T, H, D = qkv.shape if qkv.ndim == 3 else (-1, 0, 0)
    wide = qkv.is_floating_point() and qkv.dtype != E4M3
    expect(T >= 0 and wide and num_kv_heads > 0 and H > 2 * num_kv_heads and H % num_kv_heads == 0,
           "qkv [T, Hq + 2 Hkv, D], Hq % Hkv == 0", qkv, num_kv_heads)  # fmt: skip
    expect_norm(qkv, q_weight, k_weight, cos, sin)
    expect(positions.shape == (T,) and positions.dtype in (torch.int32, torch.int64),
           "positions [T] int32 or int64", positions, qkv)  # fmt: skip
    expect(positions.device == qkv.device, "positions on the device of qkv", positions.device, qkv.device)
    if T and values_on_host(positions):
        low, high = int(positions.min()), int(positions.max())
        expect(low >= 0 and high < len(cos), f"positions in 0..{len(cos) - 1}, the rows of cos and sin", low, high)


def expect_norm(qkv, q_weight, k_weight, cos, sin) -> None:
    """Check the weights and tables for qkv [..., D]."""
    D = qkv.shape[-1]
    expect(q_weight.shape == k_weight.shape == (D,), "q_weight and k_weight [D]", q_weight, k_weight, qkv)
    expect(cos.ndim == 2 and cos.shape == sin.shape and cos.dtype == sin.dtype == torch.float32
           and 2 * cos.shape[1] <= D, "cos and sin [P, R/2] fp32, R <= D", cos, sin, qkv)  # fmt: skip
    devices = {t.device for t in (qkv, q_weight, k_weight, cos, sin)}
    expect(len(devices) == 1, "all tensors on one device", *devices)


def qk_norm_rope_ref(qkv, q_weight, k_weight, cos, sin, positions, num_kv_heads, eps=1e-6, cache=None, slots=None):
    q, k, v = normed_and_rotated(qkv, q_weight, k_weight, cos, sin, positions, num_kv_heads, eps)
    q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
    if cache is not None:
        append(cache, k, v, slots)
    return q, k, v


def normed_and_rotated(qkv, q_weight, k_weight, cos, sin, positions, num_kv_heads, eps) -> tuple[Tensor, ...]:
    """q, k and v as heads of wider rows."""
    cos, sin = (table[positions.long()][:, None] for table in (cos, sin))  # [T, 1, R/2]
    return norm_and_rotate(qkv, q_weight, k_weight, cos, sin, num_kv_heads, eps)


def norm_and_rotate(qkv, q_weight, k_weight, cos, sin, num_kv_heads, eps) -> tuple[Tensor, ...]:
    """`normed_and_rotated` by cos and sin [T, 1, R/2] of the rows. The heads of q and k take each step together, for
    half the operations."""
    num_q, D = qkv.shape[1] - 2 * num_kv_heads, qkv.shape[2]
    qk, v = qkv.split([num_q + num_kv_heads, num_kv_heads], dim=1)
    w = torch.cat([upcast(q_weight).expand(num_q, D), upcast(k_weight).expand(num_kv_heads, D)])
    qk = rotate(head_norm(qk, w, eps), cos, sin).to(qkv.dtype)
    return *qk.split([num_q, num_kv_heads], dim=1), v


def head_norm(x: Tensor, w: Tensor, eps: float) -> Tensor:
    xw = upcast(x)
    xhat = xw * (xw.square().mean(-1, keepdim=True) + eps).rsqrt()
    return xhat * upcast(w)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    half = cos.shape[-1]
    a, b, rest = x.split([half, half, x.shape[-1] - 2 * half], dim=-1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin, rest], dim=-1)


def differentiable(*tensors: Tensor) -> bool:
    return torch.is_grad_enabled() and any(t.requires_grad for t in tensors)


class QKNormRope(torch.autograd.Function):
    @staticmethod
    def forward(ctx, qkv, q_weight, k_weight, cos, sin, positions, num_kv_heads, eps):
        ctx.save_for_backward(qkv, q_weight, k_weight, cos, sin, positions)
        ctx.eps = eps
        return qk_norm_rope_forward(qkv, q_weight, k_weight, cos, sin, positions, num_kv_heads, eps)

    @staticmethod
    @first_derivative_only
    def backward(ctx, dq, dk, dv):
        return *qk_norm_rope_backward(dq, dk, dv, *ctx.saved_tensors, ctx.eps), *[None] * 5


def qk_norm_rope_forward(
    qkv, q_weight, k_weight, cos, sin, positions, num_kv_heads, eps,
    k_cache=None, v_cache=None, slots=None,
):  # fmt: skip
    """q, k and v by the kernel, which also writes k and v into the cache."""
    T, H, D = qkv.shape
    q = qkv.new_empty(T, H - 2 * num_kv_heads, D)
    k, v = (qkv.new_empty(T, num_kv_heads, D) for _ in range(2))
    inputs = map(Tensor.contiguous, (qkv, q_weight, k_weight, cos, sin, positions))
    slots = slots if slots is None else slots.contiguous()
    qk_norm_rope_fwd(*inputs, slots, q, k, v, k_cache, v_cache, eps)
    return q, k, v


def qk_norm_rope_backward(dq, dk, dv, qkv, q_weight, k_weight, cos, sin, positions, eps):
    """The gradients of qkv and of both weights. The kernel's programs give partial sums of the latter."""
    num_q, num_kv, D = dq.shape[1], dk.shape[1], qkv.shape[2]
    groups = head_groups(num_q, num_kv)[:2]
    dqkv = torch.empty_like(qkv, memory_format=torch.contiguous_format)
    dw = torch.empty(programs(len(qkv), num_q, num_kv, D), sum(groups), D, dtype=torch.float32, device=qkv.device)
    inputs = map(Tensor.contiguous, (dq, dk, dv, qkv, q_weight, k_weight, cos, sin, positions))
    qk_norm_rope_bwd(*inputs, dqkv, dw, eps)
    dq_weight, dk_weight = (part.sum((0, 1)) for part in dw.split(groups, dim=1))
    return dqkv, dq_weight.to(q_weight.dtype), dk_weight.to(k_weight.dtype)


def unsupported_fwd(
    qkv, q_weight, k_weight, cos, sin, positions, slots, q, k, v, k_cache, v_cache, *options
) -> str | None:  # fmt: skip
    return unsupported_heads(qkv, q_weight, k_weight, cos, sin, k_cache, v_cache)


@op("q", "k", "v", "k_cache", "v_cache", cuda=unsupported_fwd)
def qk_norm_rope_fwd(
    qkv: Tensor, q_weight: Tensor, k_weight: Tensor, cos: Tensor, sin: Tensor, positions: Tensor, slots: Tensor | None,
    q: Tensor | None, k: Tensor, v: Tensor | None, k_cache: Tensor | None, v_cache: Tensor | None,
    eps: float,
) -> None:  # fmt: skip
    """With q and v None only the keys are computed."""
    (T, H, D), num_kv = qkv.shape, k.shape[1]
    num_q = H - 2 * num_kv
    sizes = config(num_q, num_kv, D, cos.shape[1], multiprocessors(qkv.device))
    if T:
        cells = 0 if k_cache is None else k_cache.shape[0] * k_cache.shape[1]
        groups = head_groups(num_q, num_kv)
        programs_of_heads = groups[1] if q is None else sum(groups)
        qk_norm_rope_fwd_kernel[(triton.cdiv(T, sizes["BLOCK_T"]), programs_of_heads)](
            qkv, q_weight, k_weight, cos, sin, positions, slots, q, k, v, k_cache, v_cache, T, len(cos), cells, eps,
            **sizes,
        )  # fmt: skip


def unsupported_bwd(dq, dk, dv, qkv, q_weight, k_weight, cos, sin, *others) -> str | None:
    return unsupported_heads(qkv, q_weight, k_weight, cos, sin, dq, dk, dv)


@op("dqkv", "dw", cuda=unsupported_bwd)
def qk_norm_rope_bwd(
    dq: Tensor, dk: Tensor, dv: Tensor, qkv: Tensor, q_weight: Tensor, k_weight: Tensor,
    cos: Tensor, sin: Tensor, positions: Tensor, dqkv: Tensor, dw: Tensor, eps: float,
) -> None:  # fmt: skip
    """dw [programs(T, Hq, Hkv, D), groups of q and of k, D] holds partial sums."""
    T, H, D = qkv.shape
    sms = multiprocessors(qkv.device)
    if T:
        qk_norm_rope_bwd_kernel[(len(dw), sum(head_groups(dq.shape[1], dk.shape[1])))](
            dq, dk, dv, qkv, q_weight, k_weight, cos, sin, positions, dqkv, dw, T, len(cos), len(dw), eps,
            **config(dq.shape[1], dk.shape[1], D, cos.shape[1], sms, True),
        )  # fmt: skip


def unsupported_heads(qkv, q_weight, k_weight, cos, sin, *others: Tensor | None) -> str | None:
    """What csrc/ does not support, in words: operands of norm and rotation, and other tensors with qkv's heads."""
    if qkv.shape[-1] != 128 or cos.shape[1] != 32:
        return f"heads of {qkv.shape[-1]} with {2 * cos.shape[1]} rotated dims, but 128 with 64"
    weights = q_weight.dtype == k_weight.dtype in (qkv.dtype, torch.float32)
    if not weights or any(t is not None and t.dtype != qkv.dtype for t in others):
        return "a weight that is neither of qkv's dtype nor fp32, or a cache or gradient of another dtype than qkv"
    if not rows_aligned(qkv, q_weight, k_weight, cos, sin, *others):
        return "heads that do not start at multiples of 16 bytes"
    return None


def config(num_q: int, num_kv: int, D: int, half: int, sms: int, backward: bool = False) -> dict:
    """A program owns BLOCK_T tokens of BLOCK_H heads. Not measured."""
    return dict(
        NUM_Q=num_q, NUM_KV=num_kv, D=D, HALF=half,
        BLOCK_T=block_t(num_kv, D, backward, sms), BLOCK_H=heads_per_group(num_kv), num_warps=4,
        BLOCK_HALF=triton.next_power_of_2(max(half, 1)), BLOCK_REST=triton.next_power_of_2(max(D - 2 * half, 1)),
    )  # fmt: skip


def block_t(num_kv: int, D: int, backward: bool, sms: int = 132) -> int:
    """Tokens of a program: 32 elements for a thread on an H200; 64 on an H20, where an SM needs 1.4 times the bytes in
    flight; 16 in the backward kernel, which has three operands.
    """
    elements = 2048 if backward else 4096 if sms > 100 else 8192
    return min(max(elements // (heads_per_group(num_kv) * triton.next_power_of_2(D)), 1), 32)


def heads_per_group(num_kv: int) -> int:
    return min(triton.next_power_of_2(num_kv), 4)


def head_groups(num_q: int, num_kv: int) -> list[int]:
    """The number of programs for the heads of q, of k and of v."""
    kv = triton.cdiv(num_kv, heads_per_group(num_kv))
    return [triton.cdiv(num_q, heads_per_group(num_kv)), kv, kv]


def programs(T: int, num_q: int, num_kv: int, D: int) -> int:
    """Programs of the backward kernel for each group of heads. Each sums dw over its tokens; the sums are then added in
    order. The number is the same on every GPU, and so are the bits of dw.
    """
    most = max(PROGRAMS // sum(head_groups(num_q, num_kv)), 1)
    return min(triton.cdiv(T, block_t(num_kv, D, True)), most)
