"""RMS norm over the last dimension: y = x * rstd * w with rstd = 1 / sqrt(mean(x^2) + eps)."""

import torch
from torch import Tensor

from ..op import (
    expect,
    few_calls_on_cpu,
    first_derivative_only,
    multiprocessors,
    op,
    round_up,
    rows_aligned,
    upcast,
    use_reference,
)
from .quantize import BLOCK, empty_fp8, quantize_ref
from .triton_fp8 import quantize_along, store_columns
from .triton_import import tl, triton

MAX_N = 8192  # columns of a row that the kernels hold in registers
PROGRAMS = 264  # at most, of the backward kernel: two for each SM of an H200, all resident on an H20 too


def rms_norm(
    x: Tensor,
    w: Tensor,
    residual: Tensor | None = None,
    eps: float = 1e-6,
    quantize: bool = False,
    columns: bool = False,
) -> Tensor | tuple[Tensor, ...]:
    """x [..., N], w [N] -> y [..., N] in x's dtype; reductions run in fp32.

    With residual [..., N] the op norms x + residual and returns (y, sum), the sum in residual's dtype. quantize appends
    y's FP8 rows and scales, columns also its column-wise copy, in the layout of `quantize`, from y before it is rounded
    (without a gradient; x must be [M, N], N % 128 == 0). Gradient: to x, residual and w. Raises ValueError for shapes
    that do not fit.
    """
    if not (quantize or columns) and w.shape == x.shape[-1:] and few_calls_on_cpu(x, w):
        if residual is None:
            return torch.rms_norm(x, w.shape, w, eps)
        if residual.shape == x.shape and residual.dtype == x.dtype:
            total = x + residual
            return torch.rms_norm(total, w.shape, w, eps), total
    N = x.shape[-1] if x.ndim else 0
    expect(N > 0 and w.shape == (N,) and x.is_floating_point() and w.is_floating_point(), "x [..., N] and w [N]", x, w)
    fits = residual is None or (residual.shape == x.shape and residual.is_floating_point())
    expect(fits, "residual as x", x, residual)
    expect(not (quantize or columns) or (x.ndim == 2 and N % BLOCK == 0), "x [M, N], N % 128 == 0, for FP8", x)
    too_wide = f"rows of {N} columns, more than {MAX_N}" if N > MAX_N else None
    if use_reference("rms_norm", x, w, residual, unsupported=too_wide):
        return rms_norm_ref(x, w, residual, eps, quantize, columns)
    if residual is not None:
        residual = residual.reshape(-1, N)
    y, *rest = RMSNorm.apply(x.reshape(-1, N), w, residual, eps, quantize, columns)
    if residual is not None:
        rest[0] = rest[0].view(x.shape)
    return (y.view(x.shape), *rest) if rest else y.view(x.shape)


def rms_norm_ref(x, w, residual=None, eps=1e-6, quantize=False, columns=False):
    total = x if residual is None else (upcast(x) + upcast(residual)).to(residual.dtype)
    y = torch.rms_norm(upcast(total), total.shape[-1:], upcast(w), eps)
    out = [y.to(x.dtype)] + ([] if residual is None else [total])
    if quantize or columns:
        out += quantize_ref(y, quantize, columns)
    return out[0] if len(out) == 1 else tuple(out)


def near_rows(x: Tensor | None) -> Tensor | None:
    """x [M, N], or a copy, with dense rows so near that offsets in a tile of 128 rows have 32 bits."""
    return x if x is None or x.stride(1) == 1 and x.stride(0) < 2**24 else x.contiguous()


class RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, w, residual, eps, quantize, columns):
        M, N = x.shape
        x, residual = near_rows(x), near_rows(residual)
        w = w.contiguous()
        y, rstd = x.new_empty(M, N), x.new_empty(M, dtype=torch.float32)
        total = None if residual is None else residual.new_empty(M, N)
        y_q, y_scale, yt_q, yt_scale = empty_fp8(x, M, N, quantize, columns, None)
        rms_norm_fwd(x, w, residual, y, rstd, total, y_q, y_scale, yt_q, yt_scale, eps)
        ctx.save_for_backward(x if total is None else total, w, rstd)
        ctx.x_dtype, ctx.has_residual = x.dtype, residual is not None
        ctx.set_materialize_grads(False)
        fp8 = [t for t in (y_q, y_scale, yt_q, yt_scale) if t is not None]
        ctx.mark_non_differentiable(*fp8)
        return y, *([] if total is None else [total]), *fp8

    @staticmethod
    @first_derivative_only
    def backward(ctx, dy, *rest):
        total, w, rstd = ctx.saved_tensors
        M, N = total.shape
        dtotal = rest[0].contiguous() if ctx.has_residual and rest[0] is not None else None
        dy = total.new_zeros(M, N, dtype=ctx.x_dtype) if dy is None else dy.contiguous()
        dx = torch.empty_like(dy)
        one_dtype = total.dtype == dy.dtype
        dresidual = None if one_dtype else torch.empty_like(total, memory_format=torch.contiguous_format)
        dw = torch.empty(programs(M, N), N, dtype=torch.float32, device=dy.device)
        rms_norm_bwd(dy, dtotal, total, w, rstd, dx, dresidual, dw)
        dresidual = (dx if one_dtype else dresidual) if ctx.has_residual else None
        return dx, dw.sum(0).to(w.dtype), dresidual, None, None, None


def unsupported_fwd(x, w, residual, y, rstd, total, y_q, y_scale, yt_q, *others) -> str | None:
    return unsupported_rows(x, w, x if residual is None else residual) if yt_q is None else "a column-wise copy"


@op("y", "rstd", "total", "y_q", "y_scale", "yt_q", "yt_scale", cuda=unsupported_fwd)
def rms_norm_fwd(
    x: Tensor, w: Tensor, residual: Tensor | None, y: Tensor, rstd: Tensor, total: Tensor | None,
    y_q: Tensor | None, y_scale: Tensor | None, yt_q: Tensor | None, yt_scale: Tensor | None,
    eps: float,
) -> None:  # fmt: skip
    M, N = x.shape
    if M == 0:
        return
    tile = config(N, yt_q is not None, multiprocessors(x.device))
    splits = 1 if yt_q is None else column_splits(M, N)
    rms_norm_fwd_kernel[(triton.cdiv(M, tile["BLOCK_M"]), splits)](
        x, w, residual, y, rstd, total, y_q, y_scale, yt_q, yt_scale,
        x.stride(0), 0 if residual is None else residual.stride(0), 0 if y_q is None else y_scale.stride(1),
        M, N, round_up(M, BLOCK), eps,
        TILES=triton.cdiv(N, tile["BLOCK_N"]), SPLITS=splits, **tile,
    )  # fmt: skip


def unsupported_bwd(dy, dtotal, total, w, *others) -> str | None:
    return unsupported_rows(dy, w, total, dtotal)


@op("dx", "dresidual", "dw", cuda=unsupported_bwd)
def rms_norm_bwd(
    dy: Tensor, dtotal: Tensor | None, total: Tensor, w: Tensor, rstd: Tensor,
    dx: Tensor, dresidual: Tensor | None, dw: Tensor,
) -> None:  # fmt: skip
    """total is x or x + residual. dresidual has total's dtype, dx has x's. dw [programs(M, N), N] are partial sums."""
    M, N = total.shape
    if M:
        rms_norm_bwd_kernel[(len(dw),)](
            dy, dtotal, total, w, rstd, dx, dresidual, dw, total.stride(0), M, N, len(dw),
            **backward_config(N),
        )  # fmt: skip


def unsupported_rows(x: Tensor, w: Tensor, *others: Tensor | None) -> str | None:
    """What csrc/'s kernels for whole rows do not support, in words: x [M, N], w [N] and other tensors [M, N]."""
    if any(t is not None and t.dtype not in (x.dtype, torch.float32) for t in (w, *others)):
        return "a weight or residual that is neither of x's dtype nor fp32"
    if x.shape[1] % 8 or not rows_aligned(x, w, *others):
        return "rows that do not start at multiples of 16 bytes"
    return None


def config(N: int, columns: bool, sms: int) -> dict:
    """A tile has whole rows, except for a column-wise copy, which needs tiles of 128 x 128. Not measured.

    A thread has 32 elements on an H200 (132 SMs) and 64 on an H20 (78), where an SM needs 1.4 times the bytes in
    flight. Independent of M, so that a row's result does not depend on its batch.
    """
    if columns:
        return dict(BLOCK_M=BLOCK, BLOCK_N=BLOCK, num_warps=16)
    BLOCK_N = triton.next_power_of_2(N)
    elements, most = (8192, 32) if sms < 100 else (4096, 16)
    BLOCK_M = min(max(elements // BLOCK_N, 1), most)
    return dict(BLOCK_M=BLOCK_M, BLOCK_N=BLOCK_N, num_warps=max(BLOCK_M * BLOCK_N * 4 // elements, 1))


def column_splits(M: int, N: int) -> int:
    """How many programs share the columns of 128 rows, to fill an H200; a power of two that divides N/128.

    Each program reads whole rows for their norm (once from HBM, then from L2) and writes its own columns.
    """
    splits = 1
    while splits * triton.cdiv(M, BLOCK) < 128 and N // BLOCK % (2 * splits) == 0:
        splits *= 2
    return splits


def backward_config(N: int) -> dict:
    """16 elements of each operand for a thread. Not measured; an SM of an H20 has 1.7 times an H200's programs."""
    BLOCK_N = triton.next_power_of_2(N)
    BLOCK_M = min(max(4096 // BLOCK_N, 1), 16)
    return dict(BLOCK_M=BLOCK_M, BLOCK_N=BLOCK_N, num_warps=max(BLOCK_M * BLOCK_N // 512, 1))


def programs(M: int, N: int) -> int:
    """Programs of the backward kernel. Each sums dw over its rows; torch adds the partial sums in order."""
    return min(triton.cdiv(M, backward_config(N)["BLOCK_M"]), PROGRAMS)


@triton.jit
def load_sum(x, residual, at_x, at_residual, mask):
    total = tl.load(x + at_x, mask=mask, other=0.0).to(tl.float32)
    if residual is not None:
        total += tl.load(residual + at_residual, mask=mask, other=0.0).to(tl.float32)
        total = total.to(residual.dtype.element_ty).to(tl.float32)
    return total


@triton.jit
def rms_norm_fwd_kernel(
    x, w, residual, y, rstd, total, y_q, y_scale, yt_q, yt_scale, ldx, ldr, ld_scale, M, N, M_pad, eps,
    TILES: tl.constexpr, SPLITS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    # The 64-bit offset of the tile is added to the pointers, so that offsets inside a tile are 32-bit.
    first = tl.program_id(0).to(tl.int64) * BLOCK_M
    m = tl.arange(0, BLOCK_M)[:, None]
    columns = tl.arange(0, BLOCK_N)[None, :]
    real = m < M - first
    x += first * ldx
    if residual is not None:
        residual += first * ldr

    # Rows of one tile stay in registers; wider rows are read twice, the second time from L2.
    xs = load_sum(x, residual, m * ldx + columns, m * ldr + columns, real & (columns < N))
    squares = tl.sum(xs * xs, 1)
    for i in tl.range(1, TILES, num_stages=2):
        n = i * BLOCK_N + columns
        more = load_sum(x, residual, m * ldx + n, m * ldr + n, real & (n < N))
        squares += tl.sum(more * more, 1)
    r = tl.rsqrt(squares / N + eps)[:, None]
    split = tl.program_id(1)
    tl.store(rstd + first + m, r, mask=real & (split == 0))

    for i in range(split * (TILES // SPLITS), (split + 1) * (TILES // SPLITS)):
        n = i * BLOCK_N + columns
        inside = real & (n < N)
        if TILES > 1:
            xs = load_sum(x, residual, m * ldx + n, m * ldr + n, inside)
        if total is not None:
            tl.store(total + first * N + (m * N + n), xs, mask=inside)
        ys = xs * r * tl.load(w + n, mask=n < N, other=0.0).to(tl.float32)
        tl.store(y + first * N + (m * N + n), ys, mask=inside)
        if y_q is not None:
            q, scale = quantize_along(tl.reshape(ys, (BLOCK_M, BLOCK_N // 128, 128)), 2, False)
            tl.store(y_q + first * N + (m * N + n), tl.reshape(q, (BLOCK_M, BLOCK_N)), mask=inside)
            block = i * (BLOCK_N // 128) + tl.arange(0, BLOCK_N // 128)[None, :]
            tl.store(y_scale + first + block.to(tl.int64) * ld_scale + m, scale, mask=real & (block < N // 128))
        if yt_q is not None:
            store_columns(tl.where(inside, ys, 0.0), tl.program_id(0), i, yt_q, yt_scale, N, M_pad, False)


@triton.jit
def rms_norm_bwd_kernel(
    dy, dtotal, total, w, rstd, dx, dresidual, dw, ld, M, N, PROGRAMS,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    # With g = dy * w and x^ = x * rstd:  dx = rstd * (g - x^ * mean(g * x^)),  dw = sum over rows of dy * x^
    n = tl.arange(0, BLOCK_N)[None, :]
    ws = tl.load(w + n, mask=n < N, other=0.0).to(tl.float32)
    dws = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    p = tl.program_id(0).to(tl.int64)
    for first in tl.range(p * BLOCK_M, M, PROGRAMS * BLOCK_M, num_stages=2):
        m = (first + tl.arange(0, BLOCK_M))[:, None]
        inside = (m < M) & (n < N)
        r = tl.load(rstd + m, mask=m < M, other=0.0)
        dys = tl.load(dy + m * N + n, mask=inside, other=0.0).to(tl.float32)
        xhat = tl.load(total + m * ld + n, mask=inside, other=0.0).to(tl.float32) * r
        g = dys * ws
        dws += dys * xhat
        dxs = r * (g - xhat * (tl.sum(g * xhat, 1) / N)[:, None])
        if dtotal is not None:
            dxs += tl.load(dtotal + m * N + n, mask=inside, other=0.0).to(tl.float32)
        tl.store(dx + m * N + n, dxs, mask=inside)
        if dresidual is not None:
            tl.store(dresidual + m * N + n, dxs, mask=inside)
    tl.store(dw + p * N + tl.arange(0, BLOCK_N), tl.sum(dws, 0), mask=tl.arange(0, BLOCK_N) < N)
