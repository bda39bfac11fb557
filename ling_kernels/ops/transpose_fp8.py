"""The exact transpose of an FP8 weight: its blocks are square, so codes and scales are transposed separately."""

import torch
from torch import Tensor

from ..op import E4M3, expect, multiprocessors, op, rows_aligned, use_reference
from .quantize import BLOCK
from .triton_import import tl, triton


def transpose_fp8(w_q: Tensor, w_scale: Tensor, out: tuple[Tensor, Tensor] | None = None) -> tuple[Tensor, Tensor]:
    """w_q [N, K] or [E, N, K] e4m3, w_scale [(E,) N/128, K/128] fp32 -> wt_q [(E,) K, N], wt_scale [(E,) K/128, N/128].

    out: the contiguous wt_q and wt_scale to write and return. Not differentiable. Raises ValueError where 128 does not
    divide N and K, or the scales or out do not fit.
    """
    N, K = w_q.shape[-2:] if w_q.ndim in (2, 3) else (1, 1)
    fits = N % BLOCK == K % BLOCK == 0 and w_scale.shape == (*w_q.shape[:-2], N // BLOCK, K // BLOCK)
    expect(fits and w_q.dtype == E4M3, "w_q [(E,) N, K] e4m3 and w_scale [(E,) N/128, K/128]", w_q, w_scale)
    if out is not None:
        fits = all(t.shape == s.mT.shape and t.dtype == s.dtype for t, s in zip(out, (w_q, w_scale), strict=True))
        expect(fits and all(t.is_contiguous() for t in out), "out of wt_q and wt_scale, contiguous", *out, w_q)
    if use_reference("transpose_fp8", w_q):
        return transpose_fp8_ref(w_q, w_scale, out)
    if out is None:
        out = tuple(torch.empty_like(t.mT, memory_format=torch.contiguous_format) for t in (w_q, w_scale))
    transpose_fp8_fwd(w_q.contiguous(), w_scale.float().contiguous(), *out)
    return out


def transpose_fp8_ref(w_q, w_scale, out=None):
    if out is None:
        return w_q.mT.contiguous(), w_scale.mT.contiguous()
    return tuple(t.copy_(s.mT) for t, s in zip(out, (w_q, w_scale), strict=True))


def unsupported(w_q, w_scale, wt_q, wt_scale) -> str | None:
    return None if rows_aligned(w_q, wt_q) else "weights that do not start at multiples of 16 bytes"


@op("wt_q", "wt_scale", cuda=unsupported)
def transpose_fp8_fwd(w_q: Tensor, w_scale: Tensor, wt_q: Tensor, wt_scale: Tensor) -> None:
    if w_scale.numel():
        w_q, wt_q = w_q.view(torch.uint8), wt_q.view(torch.uint8)
        *_, N, K = w_q.shape
        tiles = config(multiprocessors(w_q.device))
        transpose_fp8_kernel[(w_scale.numel(),)](w_q, w_scale, wt_q, wt_scale, N, K, BLOCK=BLOCK, **tiles)


def config(sms: int) -> dict:
    """Not measured. A program owns a tile of 128 x 128. With 4 warps more programs fit on an SM than with 8: an SM of
    an H20 (78 SMs) needs 1.4 times the bytes in flight of one of an H200 (132).
    """
    return dict(num_warps=8 if sms > 100 else 4)


@triton.jit
def transpose_fp8_kernel(w_q, w_scale, wt_q, wt_scale, N, K, BLOCK: tl.constexpr):
    blocks_n, blocks_k = N // BLOCK, K // BLOCK
    block = tl.program_id(0)
    n, k = block // blocks_k % blocks_n, block % blocks_k
    expert = (block // (blocks_n * blocks_k)).to(tl.int64)
    i, j = tl.arange(0, BLOCK)[:, None], tl.arange(0, BLOCK)[None, :]
    codes = tl.load(w_q + expert * N * K + (n * BLOCK + i).to(tl.int64) * K + k * BLOCK + j)
    tl.store(wt_q + expert * N * K + (k * BLOCK + i).to(tl.int64) * N + n * BLOCK + j, tl.trans(codes))
    tl.store(wt_scale + (expert * blocks_k + k) * blocks_n + n, tl.load(w_scale + block))
