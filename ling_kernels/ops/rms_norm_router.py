"""The step between attention and experts: s = x + residual, h = rms_norm(s), and the router's logits h router_w^T.

For the few rows of a decode step this is one kernel, bound by the load of router_w: every program norms all rows and
computes the logits of some experts. For more rows, or with gradients, it is `rms_norm` and `router_gemm`.
"""

import torch
from torch import Tensor

from ..backend import backend
from ..op import KERNEL_FLOATS, expect, op, rows_aligned
from .rms_norm import MAX_N, load_sum, near_rows, rms_norm, unsupported_rows
from .router_gemm import router_gemm
from .triton_import import tl, triton

ROWS = 8  # at most, of the kernels


def rms_norm_router(
    x: Tensor, w: Tensor, router_w: Tensor, residual: Tensor | None = None, eps: float = 1e-6
) -> tuple[Tensor, Tensor, Tensor]:
    """x [T, H], w [H], router_w [E, H] bf16 or fp32 -> h [T, H] in x's dtype, s [T, H], logits [T, E] fp32.

    s is x + residual in residual's dtype, or x itself without a residual; h is its norm. logits are computed from the
    rounded h with fp32's precision. Gradients are those of `rms_norm` and `router_gemm`. Raises ValueError for shapes
    that do not fit.
    """
    H = x.shape[1] if x.ndim == 2 else 0
    expect(H > 0 and w.shape == (H,) and x.is_floating_point() and w.is_floating_point(), "x [T, H] and w [H]", x, w)
    expect(router_w.ndim == 2 and router_w.shape[1] == H and router_w.is_floating_point(), "router_w [E, H]", router_w)
    fits = residual is None or (residual.shape == x.shape and residual.is_floating_point())
    expect(fits, "residual as x", x, residual)
    tensors = [t for t in (x, w, router_w, residual) if t is not None]
    gradients = torch.is_grad_enabled() and any(t.requires_grad for t in tensors)
    dtypes = x.dtype == torch.bfloat16 and all(t.dtype in KERNEL_FLOATS for t in tensors)
    if backend(x) == "torch" or gradients or not dtypes or not 0 < len(x) <= ROWS or H > MAX_N or len(router_w) == 0:
        out = rms_norm(x, w, residual, eps)
        h, s = (out, x) if residual is None else out
        return h, s, router_gemm(h, router_w)
    x, residual = near_rows(x), near_rows(residual)
    h, logits = x.new_empty(x.shape), x.new_empty(len(x), len(router_w), dtype=torch.float32)
    total = None if residual is None else residual.new_empty(x.shape)
    rms_norm_router_fwd(x, w.contiguous(), router_w.contiguous(), residual, h, total, logits, eps)
    return h, x if total is None else total, logits


def unsupported(x, w, router_w, residual, *others) -> str | None:
    if router_w.dtype == torch.float16:
        return "an fp16 router_w"
    if not rows_aligned(router_w):
        return "rows of router_w that do not start at multiples of 16 bytes"
    return unsupported_rows(x, w, residual)


@op("h", "total", "logits", cuda=unsupported)
def rms_norm_router_fwd(
    x: Tensor, w: Tensor, router_w: Tensor, residual: Tensor | None,
    h: Tensor, total: Tensor | None, logits: Tensor, eps: float,
) -> None:  # fmt: skip
    (T, H), E = x.shape, len(router_w)
    chosen = config(T, H)
    rms_norm_router_kernel[(triton.cdiv(E, chosen["BLOCK_E"]),)](
        x, w, router_w, residual, h, total, logits,
        x.stride(0), 0 if residual is None else residual.stride(0), T, H, E, eps, **chosen,
    )  # fmt: skip


def config(T: int, H: int) -> dict:
    """Two experts for a program, so that Ling's 256 experts fill an H200. Not measured."""
    BLOCK_T = triton.next_power_of_2(T)
    return dict(BLOCK_T=BLOCK_T, BLOCK_E=2, BLOCK_H=min(triton.next_power_of_2(H), 2048 // BLOCK_T), num_warps=8)


@triton.jit
def rms_norm_router_kernel(
    x, w, router_w, residual, h, total, logits, ldx, ldr, T, H, E, eps,
    BLOCK_T: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    t = tl.arange(0, BLOCK_T)[:, None]
    e = tl.program_id(0) * BLOCK_E + tl.arange(0, BLOCK_E)
    columns = tl.arange(0, BLOCK_H)[None, :]
    squares = tl.zeros((BLOCK_T, BLOCK_H), tl.float32)
    for first in tl.range(0, H, BLOCK_H, num_stages=2):
        n = first + columns
        xs = load_sum(x, residual, t * ldx + n, t * ldr + n, (t < T) & (n < H))
        squares += xs * xs
    r = tl.rsqrt(tl.sum(squares, 1) / H + eps)[:, None]

    writes = t % tl.num_programs(0) == tl.program_id(0)  # program t writes row t
    dots = tl.zeros((BLOCK_T, BLOCK_E, BLOCK_H), tl.float32)
    for first in tl.range(0, H, BLOCK_H, num_stages=2):
        n = first + columns
        inside = (t < T) & (n < H)
        xs = load_sum(x, residual, t * ldx + n, t * ldr + n, inside)
        if total is not None:
            tl.store(total + t * H + n, xs, mask=inside & writes)
        hs = (xs * r * tl.load(w + n, mask=n < H, other=0.0).to(tl.float32)).to(h.dtype.element_ty)
        tl.store(h + t * H + n, hs, mask=inside & writes)
        offset = e[:, None].to(tl.int64) * H + n
        ws = tl.load(router_w + offset, mask=(e < E)[:, None] & (n < H), other=0.0).to(tl.float32)
        dots += hs.to(tl.float32)[:, None, :] * ws[None, :, :]
    tl.store(logits + t * E + e[None, :], tl.sum(dots, 2), mask=(t < T) & (e < E)[None, :])
