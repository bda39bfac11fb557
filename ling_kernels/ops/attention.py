"""Causal grouped-query attention over packed sequences: out = softmax(scale * q k^T) v, lse = logsumexp(scale * q k^T).

Head h of the Hq query heads reads KV head h // (Hq / Hkv). The causal mask is aligned at the bottom right, as in
flash-attention: of a sequence with Lq queries and Lk keys, query i sees keys 0 .. i + Lk - Lq.
Gradients, with P = exp(scale * q k^T - lse) and delta = rowsum(dout * out):
dv = P^T dout,  dS = P * (dout v^T - delta),  dq = scale * dS k,  dk = scale * dS^T q.
P and dS are rounded to the inputs' dtype before their products, since tensor cores take them so.
"""

from itertools import pairwise

import torch
from torch import Tensor

from ..op import (
    autocast,
    expect,
    first_derivative_only,
    multiprocessors,
    op,
    round_up,
    rows_aligned,
    upcast,
    use_reference,
    values_on_host,
)
from .attention_cpu import attention_cpu_bwd, attention_cpu_fwd, sdpa_fits
from .attention_kernels import attention_dkv_kernel, attention_dq_kernel, attention_fwd_kernel
from .gemm_fp8 import launch_with_scratch
from .triton_import import triton

# Implementations of `Attention`. ONE: Triton's forward whatever csrc/ supports, so that bits do not depend on it
KERNELS, ONE, REFERENCE, SDPA = "kernels", "one kernel", "reference", "sdpa"
BLOCK_M = 128  # queries at a time in the reference: bounds the memory of scores, and skips keys that none of them sees


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor | None = None,
    causal: bool = True,
    scale: float | None = None,
    batch_invariant: bool = False,
) -> tuple[Tensor, Tensor]:
    """q [Tq, Hq, D], k and v [Tk, Hkv, D] of one dtype -> out [Tq, Hq, D] in that dtype and lse [Hq, Tq] fp32.

    Sequence b is rows cu_seqlens_q[b] : cu_seqlens_q[b + 1] of q, and rows cu_seqlens_k[b] : cu_seqlens_k[b + 1] of k
    and v. cu_seqlens [B + 1] are int32, on the device, and ascend from 0 to the number of rows; cu_seqlens_k defaults
    to cu_seqlens_q. Hkv divides Hq; scale is positive and defaults to 1 / sqrt(D). Softmax in fp32. A query that sees
    no key gives out 0 and lse -inf. batch_invariant: Triton's forward runs on every GPU; a query's bits in bf16 depend
    on the query and its keys alone, and are those of `attention_cells`. Gradient: to q, k and v through out; lse is not
    differentiable. Raises ValueError for another shape, dtype or device, and on a CPU for cu_seqlens that do not ascend
    from 0 to the number of rows. On a GPU the host does not read them: with such cu_seqlens Triton's kernels fill out,
    lse and the gradients with NaN, csrc/ built with LING_DEBUG=1 stops, and csrc/ built without it gives undefined
    results.
    """
    if cu_seqlens_k is cu_seqlens_q:
        cu_seqlens_k = None  # torch.compile refuses one tensor in two places of an autograd.Function
    shapes = q.ndim == k.ndim == 3 and k.shape == v.shape and q.shape[2] == k.shape[2] > 0
    heads = shapes and k.shape[1] > 0 and q.shape[1] > 0 and q.shape[1] % k.shape[1] == 0
    expect(heads and q.is_floating_point() and q.dtype == k.dtype == v.dtype,
           "q [Tq, Hq, D], k and v [Tk, Hkv, D] of one dtype, Hq % Hkv == 0, D > 0", q, k, v)  # fmt: skip
    expect(q.device == k.device == v.device, "q, k and v on one device", q.device, k.device, v.device)
    expect(scale is None or scale > 0, "scale > 0", scale)
    expect(cu_seqlens_k is not None or len(q) == len(k), "as many rows in k as in q, or cu_seqlens_k", q, k)
    expect_bounds(cu_seqlens_q, len(q), q.device)
    if cu_seqlens_k is not None:
        expect_bounds(cu_seqlens_k, len(k), q.device)
        expect(len(cu_seqlens_k) == len(cu_seqlens_q), "as many bounds of k as of q", cu_seqlens_q, cu_seqlens_k)
    q, k, v = autocast(q, k, v)
    if use_reference("attention", q):
        return attention_torch(q, k, v, cu_seqlens_q, cu_seqlens_k, causal, scale)
    q, k, v, cu_seqlens_q = map(Tensor.contiguous, (q, k, v, cu_seqlens_q))
    cu_seqlens_k = None if cu_seqlens_k is None else cu_seqlens_k.contiguous()
    implementation = ONE if batch_invariant else KERNELS
    return Attention.apply(q, k, v, cu_seqlens_q, cu_seqlens_k, causal, default_scale(q, scale), implementation)


def expect_bounds(cu_seqlens: Tensor, T: int, device: torch.device) -> None:
    expect(cu_seqlens.dtype == torch.int32 and cu_seqlens.ndim == 1 and len(cu_seqlens) > 0,
           "cu_seqlens [B + 1] int32", cu_seqlens)  # fmt: skip
    expect(cu_seqlens.device == device, "cu_seqlens on the device of the rows", cu_seqlens.device, device)
    expect(T == 0 or len(cu_seqlens) > 1, f"cu_seqlens of at least one sequence for {T} rows", cu_seqlens)
    if values_on_host(cu_seqlens):
        host_bounds(cu_seqlens, T)


def attention_ref(q, k, v, cu_seqlens_q, cu_seqlens_k=None, causal=True, scale=None):
    """A loop over sequences, for which the host reads cu_seqlens: on a GPU each call waits for that copy."""
    return Attention.apply(q, k, v, cu_seqlens_q, cu_seqlens_k, causal, default_scale(q, scale), REFERENCE)


def attention_torch(q, k, v, cu_seqlens_q, cu_seqlens_k=None, causal=True, scale=None):
    """`attention_ref`, by torch's own kernel where that gives the same values."""
    implementation = SDPA if sdpa_fits(q, cu_seqlens_k) else REFERENCE
    return Attention.apply(q, k, v, cu_seqlens_q, cu_seqlens_k, causal, default_scale(q, scale), implementation)


def default_scale(q: Tensor, scale: float | None) -> float:
    return q.shape[-1] ** -0.5 if scale is None else scale


class Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, cu_q, cu_k, causal, scale, implementation):
        out, lse = empty_outputs(q)
        if not len(k):
            out.zero_(), lse.fill_(-torch.inf)
        elif implementation == KERNELS:
            attention_fwd(q, k, v, cu_q, cu_k, out, lse, causal, scale, None, None, None, None, 0.0)
        elif implementation == ONE:
            attention_one_fwd(q, k, v, cu_q, cu_k, out, lse, causal, scale)
        elif implementation == SDPA:
            attention_cpu_fwd(q, k, v, cu_q, out, lse, causal, scale)
        else:
            attention_ref_fwd(q, k, v, cu_q, cu_k, out, lse, causal, scale)
        ctx.save_for_backward(q, k, v, out, lse, cu_q, cu_k)
        ctx.causal, ctx.scale, ctx.implementation = causal, scale, implementation
        ctx.mark_non_differentiable(lse)
        return out, lse

    @staticmethod
    @first_derivative_only
    def backward(ctx, dout, _):
        q, k, v, out, lse, cu_q, cu_k = ctx.saved_tensors
        return *attention_backward(
            dout, q, k, v, out, lse, cu_q, cu_k, ctx.causal, ctx.scale, ctx.implementation
        ), *[None] * 5  # fmt: skip


def empty_outputs(q: Tensor) -> tuple[Tensor, Tensor]:
    """out, contiguous and of q's shape, and lse."""
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    dtype = torch.promote_types(q.dtype, torch.float32)
    return out, torch.empty(q.shape[1], q.shape[0], dtype=dtype, device=q.device)


def attention_backward(dout, q, k, v, out, lse, cu_q, cu_k, causal, scale, implementation=KERNELS) -> list[Tensor]:
    """dq, dk and dv, contiguous."""
    if not (len(q) and len(k)):
        return [torch.zeros(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v)]
    grads = [torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v)]
    dout = dout.contiguous()
    if implementation in (KERNELS, ONE):
        scratch = torch.empty(2, q.shape[1], round_up(len(q), 4), dtype=torch.float32, device=q.device)
        attention_bwd(dout, q, k, v, out, lse, cu_q, cu_k, *grads, causal, scale, scratch)
    elif implementation == SDPA:
        attention_cpu_bwd(dout, q, k, v, out, lse, cu_q, *grads, causal, scale)
    else:
        attention_ref_bwd(dout, q, k, v, out, lse, cu_q, cu_k, *grads, causal, scale)
    return grads


@op("out", "lse", runs="torch")
def attention_ref_fwd(
    q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor | None, out: Tensor, lse: Tensor,
    causal: bool, scale: float,
) -> None:  # fmt: skip
    Tq, Tk, Hkv, G = len(q), len(k), k.shape[1], q.shape[1] // k.shape[1]
    qs, ks, vs = (by_kv_head(x, Hkv) for x in (q, k, v))
    outs, lses = torch.zeros_like(qs), qs.new_full(qs.shape[:2], -torch.inf)
    with torch.autocast(q.device.type, enabled=False):
        for rows, keys, hidden in tiles(cu_q, cu_k, Tq, Tk, G, causal):
            outs[:, rows], lses[:, rows] = attend(qs[:, rows], ks[:, keys], vs[:, keys], hidden, scale, q.dtype)
    out.copy_(by_token(outs, out.shape))
    lse.copy_(lses.view(Hkv, Tq, G).transpose(1, 2).reshape(lse.shape))


@op("dq", "dk", "dv", runs="torch")
def attention_ref_bwd(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, cu_q: Tensor, cu_k: Tensor | None,
    dq: Tensor, dk: Tensor, dv: Tensor, causal: bool, scale: float,
) -> None:  # fmt: skip
    Tq, Tk, Hkv, G = len(q), len(k), k.shape[1], q.shape[1] // k.shape[1]
    qs, ks, vs, outs, douts = (by_kv_head(x, Hkv) for x in (q, k, v, out, dout))
    lses = lse.view(Hkv, G, Tq).transpose(1, 2).reshape(Hkv, Tq * G, 1)
    delta = (douts * outs).sum(-1, keepdim=True)
    dqs, dks, dvs = (torch.zeros_like(x) for x in (qs, ks, vs))
    with torch.autocast(q.device.type, enabled=False):
        for rows, keys, hidden in tiles(cu_q, cu_k, Tq, Tk, G, causal):
            q_, k_, v_, dout_ = qs[:, rows], ks[:, keys], vs[:, keys], douts[:, rows]
            p = (q_ @ k_.mT).mul_(scale).sub_(lses[:, rows]).exp_().masked_fill_(hidden, 0)
            dvs[:, keys] += rounded(p, q.dtype).mT @ dout_
            ds = (dout_ @ v_.mT).sub_(delta[:, rows]).mul_(p)
            ds = rounded(ds, q.dtype)
            dqs[:, rows] = (ds @ k_).mul_(scale)
            dks[:, keys] += (ds.mT @ q_).mul_(scale)
    for x, xs in ((dq, dqs), (dk, dks), (dv, dvs)):
        x.copy_(by_token(xs, x.shape))


def attend(q: Tensor, k: Tensor, v: Tensor, hidden: Tensor, scale: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """q [..., M, D], k and v [..., N, D], hidden [..., M, N] bool -> out [..., M, D] and lse [..., M]; fp32 or fp64.

    The unnormalised P is rounded to dtype and its row sums are not, as in flash-attention.
    """
    s = (q @ k.mT).mul_(scale).masked_fill_(hidden, -torch.inf)
    largest = s.amax(-1, keepdim=True).clamp(min=torch.finfo(s.dtype).min)  # -inf - -inf would be NaN
    p = s.sub_(largest).exp_()
    total = p.sum(-1, keepdim=True)
    out = (rounded(p, dtype) @ v) / total.masked_fill(total == 0, 1)
    return out, (largest + total.log()).squeeze(-1)


def tiles(cu_q: Tensor, cu_k: Tensor | None, Tq: int, Tk: int, G: int, causal: bool):
    """Yield slices of q's rows (G per token, see by_kv_head), the keys that any of them sees, and a mask [M, N] of the
    keys that a row does not see.
    """
    bounds_q = host_bounds(cu_q, Tq)
    bounds_k = bounds_q if cu_k is None else host_bounds(cu_k, Tk)
    for (q0, q1), (k0, k1) in zip(pairwise(bounds_q), pairwise(bounds_k), strict=True):
        for m0 in range(q0, q1, BLOCK_M):
            m1 = min(m0 + BLOCK_M, q1)
            n1 = k1 - (q1 - m1) if causal else k1  # the end of the keys that query m1 - 1 sees
            if n1 <= k0:
                continue
            hidden = torch.zeros((), dtype=torch.bool, device=cu_q.device)
            if causal:
                query = torch.arange(m0, m1, device=cu_q.device).repeat_interleave(G)
                hidden = torch.arange(k0, n1, device=cu_q.device) > query[:, None] + (k1 - q1)
            yield slice(m0 * G, m1 * G), slice(k0, n1), hidden


def host_bounds(cu_seqlens: Tensor, T: int) -> list[int]:
    """cu_seqlens as a list on the host. Raises ValueError unless it ascends from 0 to T."""
    bounds = cu_seqlens.tolist()
    fits = bounds[0] == 0 and bounds[-1] == T and all(a <= b for a, b in pairwise(bounds))
    expect(fits, f"cu_seqlens that ascend from 0 to {T}, the number of rows", bounds)
    return bounds


def by_kv_head(x: Tensor, Hkv: int) -> Tensor:
    """[T, H, D] -> [Hkv, T * G, D], upcast: the G = H / Hkv heads that share keys are rows of one product."""
    T, H, D = x.shape
    return upcast(x).view(T, Hkv, H // Hkv, D).transpose(0, 1).reshape(Hkv, T * (H // Hkv), D)


def by_token(x: Tensor, shape: torch.Size) -> Tensor:
    """The inverse of by_kv_head: to shape [T, H, D]."""
    T, H, D = shape
    return x.view(len(x), T, H // len(x), D).transpose(0, 1).reshape(shape)


def rounded(x: Tensor, dtype: torch.dtype) -> Tensor:
    """x rounded to dtype and cast back."""
    return x.to(dtype).to(x.dtype)


def unsupported_fwd(
    q, k, v, cu_q, cu_k, out, lse, causal, scale, q_weight, cos, sin, positions, *options
) -> str | None:  # fmt: skip
    if q_weight is not None and (cos.shape[1] != 32 or q_weight.dtype not in (torch.float32, q.dtype)):
        return "rotation of other than 64 dims, or a q_weight that is neither bf16 nor fp32"
    if q_weight is not None and not rows_aligned(cos, sin):
        return "cos or sin that does not start at a multiple of 16 bytes"
    return unsupported_heads(cu_q, q, k, v, out)


@op("out", "lse", cuda=unsupported_fwd)
def attention_fwd(
    q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor | None, out: Tensor, lse: Tensor,
    causal: bool, scale: float, q_weight: Tensor | None, cos: Tensor | None, sin: Tensor | None,
    positions: Tensor | None, eps: float,
) -> None:  # fmt: skip
    """q, k and v may be heads of wider rows, such as qkv's. With q_weight the kernel norms and rotates q first."""
    launch_fwd(q, k, v, cu_q, cu_k, out, lse, causal, scale, q_weight, cos, sin, positions, eps)


@op("out", "lse")
def attention_one_fwd(
    q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor | None, out: Tensor, lse: Tensor,
    causal: bool, scale: float,
) -> None:  # fmt: skip
    """Never csrc/'s kernel, which has another order of keys and not all head sizes and numbers of sequences."""
    launch_fwd(q, k, v, cu_q, cu_k, out, lse, causal, scale, None, None, None, None, 0.0)


def launch_fwd(q, k, v, cu_q, cu_k, out, lse, causal, scale, q_weight, cos, sin, positions, eps) -> None:
    (Tq, Hq, D), (Tk, Hkv, _), B = q.shape, k.shape, len(cu_q) - 1
    c = config("fwd" if q_weight is None else "fwd_norm", q.dtype, multiprocessors(q.device))
    P, half = (0, 0) if cos is None else cos.shape
    if not rows_aligned(k, v):  # Triton omits a fence where cp.async can load one of the two and the other not
        c["num_stages"] = 1
    if Tq:
        launch_with_scratch(
            attention_fwd_kernel[(max_tiles(Tq, B, c["BLOCK_M"]), Hq)],
            q, k, v, cu_q, cu_k, out, lse, q_weight, cos, sin, positions, scale, eps, Tq, Tk, P, B,
            q.stride(0), k.stride(0), v.stride(0), Hq, Hkv, HALF=half, CAUSAL=causal,
            TMA=tma_compatible(q, k, v), D=D,
            BLOCK_B=triton.next_power_of_2(max(B, 1)), BLOCK_D=block_d(D), **c,
        )  # fmt: skip


def unsupported_bwd(dout, q, k, v, out, lse, cu_q, cu_k, dq, dk, dv, *options) -> str | None:
    return unsupported_heads(cu_q, dout, q, k, v, out, dq, dk, dv)


@op("dq", "dk", "dv", "scratch", cuda=unsupported_bwd)
def attention_bwd(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, cu_q: Tensor, cu_k: Tensor | None,
    dq: Tensor, dk: Tensor, dv: Tensor, causal: bool, scale: float, scratch: Tensor,
) -> None:  # fmt: skip
    """dq and delta by one program per tile of queries, then dk and dv by one program per tile of keys.

    This needs no atomics, but 7 matrix products instead of 5. Tq, Tk > 0. scratch [2, Hq, Tq rounded up to 4] fp32
    holds delta, and in csrc/ also the lse that its kernels start from.
    """
    (Tq, Hq, D), (Tk, Hkv, _), B = q.shape, k.shape, len(cu_q) - 1
    sms, delta, sizes = multiprocessors(q.device), scratch, (scale, Tq, Tk, B, Hq, Hkv)
    options = dict(
        CAUSAL=causal, TMA=tma_compatible(q, k, v, out, dout), D=D,
        BLOCK_B=triton.next_power_of_2(max(B, 1)), BLOCK_D=block_d(D),
    )  # fmt: skip
    c = config("dq", q.dtype, sms)
    launch_with_scratch(
        attention_dq_kernel[(max_tiles(Tq, B, c["BLOCK_M"]), Hq)],
        q, k, v, out, dout, lse, cu_q, cu_k, dq, delta, *sizes, **options, **c,
    )  # fmt: skip
    c = config("dkv", q.dtype, sms)
    launch_with_scratch(
        attention_dkv_kernel[(max_tiles(Tk, B, c["BLOCK_N"]), Hkv)],
        q, k, v, dout, lse, delta, cu_q, cu_k, dk, dv, *sizes, **options, **c,
    )  # fmt: skip


MAX_SEQUENCES = 1024  # kMaxSequences of csrc/attention/heads.h


def unsupported_heads(cu_q: Tensor, *heads: Tensor) -> str | None:
    """What csrc/ does not support, in words: tensors [T, H, D]; the first holds the queries or their gradient."""
    if heads[0].dtype != torch.bfloat16 or heads[0].shape[2] != 128:
        return f"{heads[0].dtype} heads of {heads[0].shape[2]}, but bfloat16 heads of 128".replace("torch.", "")
    if len(cu_q) - 1 > MAX_SEQUENCES:
        return f"{len(cu_q) - 1} sequences, more than {MAX_SEQUENCES}"
    return None if rows_aligned(*heads) else "heads that do not start at multiples of 16 bytes"


def tma_compatible(*tensors: Tensor) -> bool:
    """Whether TMA descriptors can take heads of these: aligned to 16 bytes, and no wider than a tile."""
    return all(
        x.element_size() == 2 and x.shape[2] == block_d(x.shape[2]) and x.stride(0) % 8 == 0 and x.data_ptr() % 16 == 0
        for x in tensors
    )


def max_tiles(T: int, B: int, block: int) -> int:
    """An upper bound of the tiles of B sequences with T rows together, whose lengths the host does not know."""
    return min(triton.cdiv(T, block) + B, max(T, 1))


def block_d(D: int) -> int:
    return max(16, triton.next_power_of_2(D))


def config(kernel: str, dtype: torch.dtype, sms: int) -> dict:
    """Tile sizes of the kernel: fwd, fwd_norm (fwd that norms and rotates q), dq or dkv. Not measured; no spills.

    An H20 (78 SMs) has a quarter of an H200's tensor rate, so products bound it, not shared memory: with smaller tiles
    two programs fit an SM, and one computes exponentials while the other multiplies.
    """
    if dtype == torch.float32:
        return dict(BLOCK_M=16, BLOCK_N=16, num_warps=8, num_stages=1)
    M, N, warps, stages = TILES["H20" if sms < 100 else "H200"][kernel]
    return dict(BLOCK_M=M, BLOCK_N=N, num_warps=warps, num_stages=stages)


TILES = dict(
    H200=dict(fwd=(128, 128, 8, 2), fwd_norm=(128, 128, 8, 2), dq=(128, 64, 8, 2), dkv=(32, 128, 8, 3)),
    H20=dict(fwd=(64, 64, 4, 3), fwd_norm=(64, 32, 4, 3), dq=(64, 64, 4, 2), dkv=(32, 64, 4, 2)),
)
