"""Grouped FP8 GEMM: `gemm_fp8` of every expert's rows with that expert's weight, rows ragged or in fixed slabs."""

import torch
from torch import Tensor

from ..op import E4M3, expect, op, round_up, use_reference, values_on_host
from .dispatch import Plan, expect_offsets, expect_plan
from .gemm_fp8 import (
    block_scales,
    column_major,
    expect_fp8,
    launch_gemm_fp8,
    no_columns,
    row_major,
    scaled_product,
    unsupported_operands,
    unsupported_result,
)
from .quantize import BLOCK
from .swiglu import swiglu_ref
from .transpose_fp8 import transpose_fp8


def grouped_gemm_fp8(
    a: Tensor,
    a_scale: Tensor,
    b: Tensor,
    b_scale: Tensor,
    offsets: Tensor,
    gather: Plan | None = None,
    swiglu: bool = False,
    dtype: torch.dtype = torch.bfloat16,
    transposed: bool = False,
    out: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """a [S, K] e4m3, a_scale [S, K/128], b [E, N, K] e4m3, b_scale [E, N/128, K/128], offsets [E + 1] int32 -> [S, N].

    gather: a is [T, K], unpermuted, and row s of the product uses row gather.source[s] // topk of it.
    swiglu: N = 2F, and the result is (y_q [S, F], y_scale [S, F/128]), the FP8 rows of swiglu(product), which is not
    rounded in between; dtype is then ignored.
    transposed, without these: b is [E, K, N] and b_scale [E, K/128, N/128], weights as the forward pass has them, and
    the result is a b[e], as its backward pass wants it. csrc/ transposes the tiles it has loaded; Triton a whole copy.
    out [S, N] bf16 or fp32, without swiglu: the result is written to it and returned; dtype is then ignored.
    Rows past offsets[E] are undefined. Not differentiable. Raises ValueError for operands that do not fit.
    Backend torch reads the offsets on the host.
    """
    bt, bt_scale = (b.mT, b_scale.mT) if transposed and b.ndim > 1 and b_scale.ndim > 1 else (b, b_scale)
    expect_fp8(a, a_scale, bt, bt_scale)
    expect(a.ndim == 2 and b.ndim == 3, "a [S, K] and b [E, N, K]", a, b)
    expect(not transposed or (gather is None and not swiglu and block_scales(bt, bt_scale)),
           "b_scale [E, K/128, N/128], no gather and no swiglu, where b is transposed", b_scale, swiglu)  # fmt: skip
    if gather is not None:
        expect_plan(gather, T=len(a))
    expect(not swiglu or b.shape[1] % 256 == 0, "N % 256 == 0 for swiglu", b)
    expect_offsets(offsets, len(b), len(a) if gather is None else len(gather.source))
    S, N = len(a) if gather is None else len(gather.source), bt.shape[1]
    expect(out is None or not swiglu, "out without swiglu", out, swiglu)
    expect_out(out, (S, N))
    if use_reference("grouped_gemm_fp8", a, a_scale, b_scale, out, unsupported=no_columns(a)):
        return grouped_gemm_fp8_ref(a, a_scale, b, b_scale, offsets, gather, swiglu, dtype, transposed, out)
    a, b, source, topk = row_major(a), b.contiguous(), None, 1
    if gather is None:
        a_scale = column_major(a_scale)
    else:
        source, topk = gather.source, gather.slot.shape[1]
    if swiglu:
        y = torch.empty(S, N // 2, dtype=E4M3, device=a.device)
        y_scale = a_scale.new_empty(N // 2 // BLOCK, round_up(S, 4)).T[:S]
    else:
        y, y_scale = torch.empty(S, N, dtype=dtype, device=a.device) if out is None else out, None
    grouped_gemm_fp8_fwd(a, a_scale, b, b_scale, offsets, source, topk, y, y_scale, transposed)
    return (y, y_scale) if swiglu else y


def grouped_gemm_fp8_ref(
    a, a_scale, b, b_scale, offsets, gather=None, swiglu=False, dtype=torch.bfloat16, transposed=False, out=None
):
    if transposed:
        b, b_scale = b.mT, b_scale.mT
    if gather is not None:
        token = gather.source.long() // gather.slot.shape[1]
        a, a_scale = a[token], a_scale[token]
    y = torch.empty(len(a), b.shape[1], dtype=torch.promote_types(a_scale.dtype, b_scale.dtype), device=a.device)
    grouped_gemm_fp8_ref_fwd(a, a_scale, b, b_scale, offsets, y)
    if swiglu:
        return swiglu_ref(y, quantize=True)
    if out is not None:
        return out.copy_(y)
    return y if y.dtype == torch.float64 else y.to(dtype)


@op("y", runs="torch")
def grouped_gemm_fp8_ref_fwd(
    a: Tensor, a_scale: Tensor, b: Tensor, b_scale: Tensor, offsets: Tensor, y: Tensor
) -> None:
    """y [S, N] in the scales' precision, zeros in the rows past offsets[E]; the host reads the offsets."""
    bounds = offsets.tolist()
    for e, (lo, hi) in enumerate(zip(bounds, bounds[1:], strict=False)):
        y[lo:hi] = scaled_product(a[lo:hi], a_scale[lo:hi], b[e], b_scale[e])
    y[bounds[-1] :] = 0


def unsupported_fwd(a, a_scale, b, b_scale, offsets, source, topk, y, y_scale, transposed) -> str | None:
    if not (transposed or block_scales(b, b_scale)):
        return "weights with one scale per 1 x 128"
    return unsupported_operands((a, b), () if source is not None else (a_scale,)) or unsupported_result(y, len(b))


@op("y", "y_scale", cuda=unsupported_fwd)
def grouped_gemm_fp8_fwd(
    a: Tensor,
    a_scale: Tensor,
    b: Tensor,
    b_scale: Tensor,
    offsets: Tensor,
    source: Tensor | None,
    topk: int,
    y: Tensor,
    y_scale: Tensor | None,
    transposed: bool,
) -> None:
    if transposed:
        b, b_scale = transpose_fp8(b, b_scale)
    launch_gemm_fp8(a, a_scale, b, b_scale, y, y_scale, offsets, source=source, topk=topk)


def expect_out(out: Tensor | None, shape: tuple[int, ...]) -> None:
    """Check a tensor that the caller gives for the result."""
    fits = out is None or (out.shape == shape and out.dtype in (torch.bfloat16, torch.float32) and out.is_contiguous())
    expect(fits, f"out {list(shape)}, bf16 or fp32, contiguous", out)


def grouped_gemm_fp8_masked(
    a: Tensor,
    a_scale: Tensor,
    b: Tensor,
    b_scale: Tensor,
    counts: Tensor,
    dtype: torch.dtype = torch.bfloat16,
    out: Tensor | None = None,
) -> Tensor:
    """a [E, max_m, K] e4m3, a_scale [E, max_m, K/128], b [E, N, K], b_scale [E, N/128, K/128] -> [E, max_m, N].

    Expert e owns the first counts[e] rows of its slab, counts [E] int32 on the device; the others are not read and
    undefined in the result. The layout of low-latency expert parallelism and of decode graphs. Not differentiable.
    out [E, max_m, N] bf16 or fp32: the result is written to it and returned; dtype is then ignored.
    Raises ValueError for operands that do not fit.
    """
    expect_fp8(a, a_scale, b, b_scale)
    expect(a.ndim == b.ndim == 3 and len(a) == len(b), "a [E, max_m, K] and b [E, N, K]", a, b)
    expect(counts.shape == (len(b),) and counts.dtype == torch.int32, "counts [E] int32", counts, b)
    if values_on_host(counts):
        expect(bool(((counts >= 0) & (counts <= a.shape[1])).all()), "counts between 0 and max_m", counts, a)
    expect_out(out, (*a.shape[:2], b.shape[1]))
    if use_reference("grouped_gemm_fp8_masked", a, a_scale, b_scale, out, unsupported=no_columns(a)):
        return grouped_gemm_fp8_masked_ref(a, a_scale, b, b_scale, counts, dtype, out)
    y = torch.empty(*a.shape[:2], b.shape[1], dtype=dtype, device=a.device) if out is None else out
    a_scale = column_major(a_scale.flatten(0, 1)).unflatten(0, a.shape[:2])
    grouped_gemm_fp8_masked_fwd(a.contiguous(), a_scale, b.contiguous(), b_scale, counts, y)
    return y


def grouped_gemm_fp8_masked_ref(a, a_scale, b, b_scale, counts, dtype=torch.bfloat16, out=None):
    y = scaled_product(a, a_scale, b, b_scale)
    other = torch.arange(a.shape[1], device=a.device) >= counts[:, None]
    y = y.masked_fill(other[..., None], 0)
    if out is not None:
        return out.copy_(y)
    return y if y.dtype == torch.float64 else y.to(dtype)


def unsupported_masked(a, a_scale, b, b_scale, counts, y) -> str | None:
    if not block_scales(b, b_scale):
        return "weights with one scale per 1 x 128"
    return unsupported_operands((a, b), (a_scale.flatten(0, 1),)) or unsupported_result(y, len(b))


@op("y", cuda=unsupported_masked)
def grouped_gemm_fp8_masked_fwd(
    a: Tensor, a_scale: Tensor, b: Tensor, b_scale: Tensor, counts: Tensor, y: Tensor
) -> None:
    launch_gemm_fp8(a, a_scale, b, b_scale, y, counts=counts)


def grouped_gemm_fp8_cutlass(
    a: Tensor, a_scale: Tensor, b: Tensor, b_scale: Tensor, offsets: Tensor, pingpong: bool = False
) -> Tensor:
    """`grouped_gemm_fp8` by CUTLASS's Hopper collectives, for comparison -> [S, N] bf16.

    a [S, K] e4m3, a_scale [S, K/128], b [E, N, K] e4m3, b_scale [E, N/128, K/128], offsets [E + 1] int32. Rows past
    offsets[E] are undefined. pingpong: tiles of 64 rows instead of 128. Not differentiable. Raises ImportError where
    the optional extension `ling_kernels._cutlass` is not built (`make cutlass`), ValueError for operands that it does
    not take.
    """
    import_cutlass()
    y = torch.empty(len(a), b.shape[1], dtype=torch.bfloat16, device=a.device)
    grouped_gemm_fp8_cutlass_fwd(row_major(a), column_major(a_scale), b.contiguous(), b_scale, offsets, y, pingpong)
    return y


@op("y", runs="cuda")
def grouped_gemm_fp8_cutlass_fwd(
    a: Tensor, a_scale: Tensor, b: Tensor, b_scale: Tensor, offsets: Tensor, y: Tensor, pingpong: bool
) -> None:
    cutlass = import_cutlass()
    size = cutlass.grouped_gemm_fp8_workspace(len(a), len(b), a.shape[1])
    workspace = torch.empty(size, dtype=torch.uint8, device=a.device)
    cutlass.grouped_gemm_fp8(a, a_scale, b, b_scale, offsets, y, workspace, pingpong)


def import_cutlass():
    try:
        from .. import _cutlass
    except ImportError as error:
        raise ImportError(f"ling_kernels._cutlass is not built (make cutlass, docs/install.md): {error}") from None
    return _cutlass
