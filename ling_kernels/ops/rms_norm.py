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

    With residual [..., N], x + residual is normed and the sum is returned too: (y, sum). quantize appends y's FP8 rows
    and scales, columns also its column-wise copy, as `quantize` lays them out, taken from y before it is rounded (those
    carry no gradient; x must be [M, N], N % 128 == 0). round_first rounds x * rstd to x's dtype before the weight, as
    the official model's code does; its checkpoints were trained without. Raises ValueError for shapes that do not fit.
    """
    expect(x.shape[-1:] == w.shape and w.is_floating_point(), "x [..., N] and w [N]", x, w)
    expect(residual is None or residual.shape == x.shape, "residual as x", x, residual)
    expect(not (quantize or columns) or (x.ndim == 2 and x.shape[1] % 128 == 0), "x [M, N], N % 128 == 0, for FP8", x)
    plain = residual is None and not (quantize or columns or round_first) and x.dtype == w.dtype
    if backend(x) == "torch" or not plain:
        return rms_norm_ref(x, w, residual, eps, quantize, columns, round_first)
    return RMSNorm.apply(x.reshape(-1, x.shape[-1]), w, eps).view_as(x)


def rms_norm_ref(x, w, residual=None, eps=1e-6, quantize=False, columns=False, round_first=False):
    total = x if residual is None else (wide(x) + wide(residual)).to(x.dtype)
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
        y, rstd = torch.empty_like(x), x.new_empty(len(x), dtype=torch.float32)
        rms_norm_fwd(x, w, y, rstd, eps)
        ctx.save_for_backward(x, w, rstd)
        return y

    @staticmethod
    def backward(ctx, dy):
        x, w, rstd = ctx.saved_tensors
        dx = torch.empty_like(x)
        dw = torch.zeros(programs(len(x)), len(w), dtype=torch.float32, device=x.device)
        rms_norm_bwd(dy.contiguous(), x, w, rstd, dx, dw)
        return dx, dw.sum(0).to(w.dtype), None


def programs(M: int) -> int:
    """Of the backward kernel: each sums dw over its rows, and a second pass adds the partial sums in order."""
    return min(M, 256)


@op("y", "rstd")
def rms_norm_fwd(x: Tensor, w: Tensor, y: Tensor, rstd: Tensor, eps: float) -> None:
    if backend(x) == "cuda":
        return _C.rms_norm_fwd(x, w, y, rstd, eps)
    M, N = x.shape
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
        tl.store(dx + m * ldx + n, r * (g - xhat * tl.sum(g * xhat) / N), mask=n < N)
        dws += dys * xhat
    tl.store(dw + p * N + n, dws, mask=n < N)
