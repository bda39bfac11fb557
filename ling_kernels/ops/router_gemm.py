"""Router GEMM: logits = x w^T with fp32's precision, for a bf16 x and an fp32 w, on tensor cores.

Tensor cores do not multiply fp32. w = w1 + w2 + w3 with bf16 parts (w1 = bf16(w), w2 = bf16(w - w1), ..) is exact, so
three bf16 products give the fp32 result.
"""

import torch
from torch import Tensor

from ..op import expect, first_derivative_only, multiprocessors, op, upcast, use_reference
from .triton_import import tl, triton


def router_gemm(x: Tensor, w: Tensor) -> Tensor:
    """x [T, H], w [E, H], each bf16 or fp32 -> logits [T, E] fp32, also where autocast is on.

    Gradients in the dtypes of x and w. Raises ValueError for shapes that do not fit.
    """
    fits = x.ndim == w.ndim == 2 and x.shape[1] == w.shape[1] and x.is_floating_point() and w.is_floating_point()
    expect(fits, "x [T, H], w [E, H]", x, w)
    expect((x.dtype == torch.float64) == (w.dtype == torch.float64), "x and w both in fp64 or neither", x, w)
    other = x.dtype != torch.bfloat16 or w.dtype not in (torch.float32, torch.bfloat16)
    reason = f"x in {x.dtype} and w in {w.dtype}".replace("torch.", "") if other else None
    if use_reference("router_gemm", x, w, unsupported=reason):
        return router_gemm_ref(x, w)
    return RouterGEMM.apply(x, w)


def router_gemm_ref(x, w):
    dtype = torch.promote_types(upcast(x).dtype, upcast(w).dtype)
    x, w = x.to(dtype), w.to(dtype)
    with torch.autocast(x.device.type, enabled=False):
        return x @ w.T


class RouterGEMM(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, w):
        logits = x.new_empty(len(x), len(w), dtype=torch.float32)
        split_gemm(x, w.T, logits, 3)
        ctx.save_for_backward(x, w)
        return logits

    @staticmethod
    @first_derivative_only
    def backward(ctx, dlogits):
        x, w = ctx.saved_tensors
        dx = dw = None
        if ctx.needs_input_grad[0]:  # dx is bf16: the two upper parts of both factors suffice
            dx = torch.empty_like(x, memory_format=torch.contiguous_format)
            split_gemm(dlogits, w, dx, 2)
        if ctx.needs_input_grad[1]:  # few tiles, many tokens: programs split the tokens, and torch adds their sums
            parts = shares(len(x), *w.shape)
            dw = w.new_empty(parts, *w.shape, dtype=torch.float32)
            split_gemm(dlogits.T, x, dw, 3)
            dw = (dw[0] if parts == 1 else dw.sum(0)).to(w.dtype)
        return dx, dw


def shares(T: int, E: int, H: int) -> int:
    """Into how many shares dw's kernel splits the tokens, so that about 128 programs run. Not measured."""
    tiles = triton.cdiv(E, 128) * triton.cdiv(H, 128)
    return max(min(128 // max(tiles, 1), triton.cdiv(T, 512)), 1)


def config(M: int, N: int, sms: int) -> dict:
    """Not measured. With few rows the load of w is the bound: narrow tiles give more programs that load."""
    if M <= 64:
        return dict(BLOCK_M=64, BLOCK_N=32, BLOCK_K=64, num_warps=4, num_stages=4)
    if sms <= 78:
        return dict(BLOCK_M=64, BLOCK_N=128, BLOCK_K=64, num_warps=8, num_stages=3)
    return dict(BLOCK_M=128, BLOCK_N=128, BLOCK_K=64, num_warps=8, num_stages=3)


@op("c")
def split_gemm(a: Tensor, b: Tensor, c: Tensor, passes: int) -> None:
    """c [M, N] = a [M, K] b [K, N], or c [P, M, N], the products of P shares of K.

    fp32 factors are split into `passes` bf16 parts; products of parts i and j with i + j >= passes are left out.
    """
    (M, K), N = a.shape, b.shape[1]
    P = c.shape[0] if c.ndim == 3 else 1
    chosen = config(M, N, multiprocessors(a.device))
    share = triton.cdiv(triton.cdiv(K, P), chosen["BLOCK_K"]) * chosen["BLOCK_K"]
    if c.numel():
        grid = triton.cdiv(M, chosen["BLOCK_M"]) * triton.cdiv(N, chosen["BLOCK_N"]), P
        split_gemm_kernel[grid](a, b, c, M, N, K, share, *a.stride(), *b.stride(), PASSES=passes, **chosen)


@triton.jit
def split_dot(a, b, acc, PASSES: tl.constexpr):
    for i in tl.static_range(PASSES if a.dtype == tl.float32 else 1):
        upper_a, rest = a.to(tl.bfloat16), b
        for _j in tl.static_range(PASSES - i if b.dtype == tl.float32 else 1):
            upper_b = rest.to(tl.bfloat16)
            acc = tl.dot(upper_a, upper_b, acc)
            rest = rest - upper_b.to(tl.float32)
        a = a - upper_a.to(tl.float32)
    return acc


@triton.jit
def split_gemm_kernel(
    a, b, c, M, N, K, share, lda, a_step, b_step, ldb, PASSES: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    # Neighbouring programs have the same rows of a
    tiles_n = tl.cdiv(N, BLOCK_N)
    m = (tl.program_id(0) // tiles_n * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
    n = (tl.program_id(0) % tiles_n * BLOCK_N + tl.arange(0, BLOCK_N)).to(tl.int64)
    first = tl.program_id(1) * share
    last = tl.minimum(first + share, K)
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for k0 in range(first, last, BLOCK_K):
        k = k0 + tl.arange(0, BLOCK_K)
        offset = m[:, None] * lda + k[None, :].to(tl.int64) * a_step
        part = tl.load(a + offset, mask=(m < M)[:, None] & (k < last)[None, :], other=0.0)
        offset = k[:, None].to(tl.int64) * b_step + n[None, :] * ldb
        other = tl.load(b + offset, mask=(k < last)[:, None] & (n < N)[None, :], other=0.0)
        # Triton may leave a round's last product in flight, while the next round overwrites its operand a in registers
        # (triton-lang/triton issue 9433). It did in narrow tiles; a sum apart makes it wait. Wide tiles would spill.
        if BLOCK_N < 128:
            acc += split_dot(part, other, tl.zeros_like(acc), PASSES)
        else:
            acc = split_dot(part, other, acc, PASSES)
    offset = tl.program_id(1).to(tl.int64) * M * N + m[:, None] * N + n[None, :]
    tl.store(c + offset, acc, mask=(m < M)[:, None] & (n < N)[None, :])
