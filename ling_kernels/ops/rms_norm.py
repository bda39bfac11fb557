"""RMS norm over the last dimension: y = x * rstd * w with rstd = 1 / sqrt(mean(x^2) + eps)."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..backend import _C, backend
from ..op import expect, op, wide
from .quantize import quantize_ref


def rms_norm(
    x: Tensor,
    w: Tensor,
    residual: Tensor | None = None,
    eps: float = 1e-6,
    quantize: bool = False,
    columns: bool = False,
    round_first: bool = False,
) -> Tensor | tuple[Tensor, ...]:
    """x [..., N], w [N] -> y [..., N] in x's dtype; reductions run in fp32.

    With residual [..., N], x + residual is normed and the sum is returned too, in residual's dtype: (y, sum). quantize
    appends y's FP8 rows and scales, columns also its column-wise copy, as `quantize` lays them out, taken from y before
    it is rounded (those carry no gradient; x must be [M, N], N % 128 == 0). round_first rounds x * rstd to x's dtype
    before the weight, as the official model's code does; its checkpoints were trained without. Gradient: to x, residual
    and w. Raises ValueError for shapes that do not fit.
    """
    N = x.shape[-1] if x.ndim else 0
    expect(N > 0 and w.shape == (N,) and x.is_floating_point() and w.is_floating_point(), "x [..., N] and w [N]", x, w)
    fits = residual is None or (residual.shape == x.shape and residual.is_floating_point())
    expect(fits, "residual as x", x, residual)
    expect(not (quantize or columns) or (x.ndim == 2 and N % 128 == 0), "x [M, N], N % 128 == 0, for FP8", x)
    one_dtype = x.dtype == w.dtype == (x if residual is None else residual).dtype != torch.float64
    if backend(x) == "torch" or quantize or columns or round_first or not one_dtype:
        return rms_norm_ref(x, w, residual, eps, quantize, columns, round_first)
    total = x if residual is None else x + residual
    y = RMSNorm.apply(total.reshape(-1, N), w, eps).view(x.shape)
    return y if residual is None else (y, total)


def rms_norm_ref(x, w, residual=None, eps=1e-6, quantize=False, columns=False, round_first=False):
    total = x if residual is None else (wide(x) + wide(residual)).to(residual.dtype)
    xw = wide(total)
    xhat = xw * (xw.square().mean(-1, keepdim=True) + eps).rsqrt()
    if round_first:
        xhat = wide(xhat.to(x.dtype))
    y = xhat * wide(w)
    out = [y.to(x.dtype)] + ([] if residual is None else [total])
    if quantize or columns:
        out += quantize_ref(y, quantize, columns)
    return out[0] if len(out) == 1 else tuple(out)


class RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, w, eps):
        x, w = x if x.stride(1) == 1 else x.contiguous(), w.contiguous()
        y, rstd = x.new_empty(x.shape), x.new_empty(len(x), dtype=torch.float32)
        rms_norm_fwd(x, w, y, rstd, eps)
        ctx.save_for_backward(x, w, rstd)
        return y

    @staticmethod
    def backward(ctx, dy):
        x, w, rstd = ctx.saved_tensors
        dx = x.new_empty(x.shape)
        dw = torch.zeros(programs(len(x)), len(w), dtype=torch.float32, device=x.device)
        rms_norm_bwd(dy.contiguous(), x, w, rstd, dx, dw)
        return dx, dw.sum(0).to(w.dtype), None


def programs(M: int) -> int:
    """Of the backward kernel: each sums dw over its rows, and a second pass adds the partial sums in order."""
    return min(M, 256)


@op("y", "rstd")
def rms_norm_fwd(x: Tensor, w: Tensor, y: Tensor, rstd: Tensor, eps: float) -> None:
    M, N = x.shape
    vectors = N % 8 == x.stride(0) % 8 == x.data_ptr() % 16 == w.data_ptr() % 16 == 0  # of 16 bytes, 8 elements or 4
    if backend(x) == "cuda" and vectors and x.dtype in (torch.float32, torch.bfloat16):
        return _C.rms_norm_fwd(x, w, y, rstd, eps)
    if M:
        rms_norm_fwd_kernel[(M,)](x, w, y, rstd, x.stride(0), y.stride(0), N, eps, BLOCK_N=triton.next_power_of_2(N))


@op("dx", "dw")
def rms_norm_bwd(dy: Tensor, x: Tensor, w: Tensor, rstd: Tensor, dx: Tensor, dw: Tensor) -> None:
    """dw [programs(M), N] fp32 holds partial sums."""
    M, N = x.shape
    if M:
        rms_norm_bwd_kernel[(len(dw),)](
            dy, x, w, rstd, dx, dw, x.stride(0), M, N, len(dw), BLOCK_N=triton.next_power_of_2(N)
        )


@triton.jit
def rms_norm_fwd_kernel(x, w, y, rstd, ldx, ldy, N, eps, BLOCK_N: tl.constexpr):
    m = tl.program_id(0).to(tl.int64)
    n = tl.arange(0, BLOCK_N)
    xs = tl.load(x + m * ldx + n, mask=n < N, other=0.0).to(tl.float32)
    ws = tl.load(w + n, mask=n < N, other=0.0).to(tl.float32)
    r = tl.rsqrt(tl.sum(xs * xs) / N + eps)
    tl.store(rstd + m, r)
    tl.store(y + m * ldy + n, xs * r * ws, mask=n < N)


@triton.jit
def rms_norm_bwd_kernel(dy, x, w, rstd, dx, dw, ldx, M, N, PROGRAMS, BLOCK_N: tl.constexpr):
    # With g = dy * w and x^ = x * rstd:  dx = rstd * (g - x^ * mean(g * x^)),  dw = sum over rows of dy * x^
    n = tl.arange(0, BLOCK_N)
    ws = tl.load(w + n, mask=n < N, other=0.0).to(tl.float32)
    dws = tl.zeros((BLOCK_N,), tl.float32)
    p = tl.program_id(0).to(tl.int64)
    for m in range(p, M, PROGRAMS):
        r = tl.load(rstd + m)
        dys = tl.load(dy + m * N + n, mask=n < N, other=0.0).to(tl.float32)
        xhat = tl.load(x + m * ldx + n, mask=n < N, other=0.0).to(tl.float32) * r
        g = dys * ws
        tl.store(dx + m * N + n, r * (g - xhat * tl.sum(g * xhat) / N), mask=n < N)
        dws += dys * xhat
    tl.store(dw + p * N + n, dws, mask=n < N)
