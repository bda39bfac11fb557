"""Grouped GEMM: y[s] = b[e] a[s] for every row s that expert e owns, ragged rows, accumulated in fp32, rounded once."""

import torch
from torch import Tensor

from ..op import autocast, expect, op, wide
from .grouped_wgrad import grouped_wgrad_fwd


def grouped_gemm(a: Tensor, b: Tensor, offsets: Tensor) -> Tensor:
    """a [S, K], b [E, N, K] of one dtype, offsets [E + 1] int32 -> y [S, N] in that dtype (autocast's where it is on).

    Expert e owns rows offsets[e] : offsets[e + 1]; empty experts are legal. Rows of y past offsets[E] are undefined and
    rows of a past it are never read; their gradient is 0. Gradients: to a and b. Raises ValueError for shapes or dtypes
    that do not fit. On a CPU, and on a GPU for anything but bf16, the offsets are read by the host.
    """
    a, b = autocast(a, b)
    fits = a.ndim == 2 and b.ndim == 3 and a.shape[1] == b.shape[2] and a.dtype == b.dtype and a.is_floating_point()
    expect(fits, "a [S, K] and b [E, N, K] of one dtype", a, b)
    fits = len(b) > 0 and offsets.shape == (len(b) + 1,) and offsets.dtype == torch.int32
    expect(fits, "offsets [E + 1] int32, E > 0", offsets, b)
    return GroupedGemm.apply(a, b, offsets)


def grouped_gemm_ref(a, b, offsets):
    bounds = offsets.tolist()
    with torch.autocast(a.device.type, enabled=False):
        parts = [wide(a[lo:hi]) @ wide(b[e]).T for e, (lo, hi) in enumerate(zip(bounds, bounds[1:], strict=False))]
    rest = wide(a).new_zeros(len(a) - bounds[-1], b.shape[1])
    return torch.cat([*parts, rest]).to(a.dtype)


class GroupedGemm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, a, b, offsets):
        ctx.save_for_backward(a, b, offsets)
        return grouped_product(a, b, offsets)

    @staticmethod
    def backward(ctx, dy):
        a, b, offsets = ctx.saved_tensors
        dy = dy.contiguous()
        da = db = None
        if ctx.needs_input_grad[0]:
            da = grouped_product(dy, b.mT, offsets)
            if serves(dy, b):  # that product leaves the rows nobody owns as they were in memory
                unowned = torch.arange(len(da), device=da.device) >= offsets[-1]
                da = da.masked_fill(unowned[:, None], 0)
        if ctx.needs_input_grad[1]:
            db = torch.empty_like(b, memory_format=torch.contiguous_format)
            grouped_wgrad_fwd(dy, a, offsets, db, False, None, None, False)
        return da, db, None


def grouped_product(a: Tensor, b: Tensor, offsets: Tensor) -> Tensor:
    if serves(a, b):
        return torch.nn.functional.grouped_mm(a.contiguous(), b.mT, offs=offsets[1:])
    y = a.new_empty(len(a), b.shape[1])
    grouped_gemm_fwd(a, b, offsets, y)
    return y


def serves(a: Tensor, b: Tensor) -> bool:
    """Whether torch's grouped_mm takes these: bf16 on a GPU, rows of a multiple of 16 bytes."""
    return a.is_cuda and a.dtype == torch.bfloat16 and a.numel() > 0 and b.shape[1] % 8 == b.shape[2] % 8 == 0


@op("y")
def grouped_gemm_fwd(a: Tensor, b: Tensor, offsets: Tensor, y: Tensor) -> None:
    # The reference, without its copies
    bounds = offsets.tolist()
    with torch.autocast(a.device.type, enabled=False):
        for e, (lo, hi) in enumerate(zip(bounds, bounds[1:], strict=False)):
            if lo < hi:
                y[lo:hi] = wide(a[lo:hi]) @ wide(b[e]).T
    y[bounds[-1] :] = 0
