"""FP8 GEMM: D = A B^T, where the product over each 128 of K is scaled and added in fp32, in the order of K.

FP8 tensor cores of Hopper keep about 14 bits of a sum, hence the promotion to fp32 every 128.
"""

import torch
from torch import Tensor

from ..op import E4M3, expect, wide
from .quantize import BLOCK


def gemm_fp8(
    a: Tensor,
    a_scale: Tensor,
    b: Tensor,
    b_scale: Tensor,
    out: Tensor | None = None,
    accumulate: bool = False,
    dtype: torch.dtype = torch.bfloat16,
) -> Tensor:
    """a [M, K] e4m3, a_scale [M, K/128]; b [N, K] e4m3, b_scale [N/128, K/128] (a weight) or [N, K/128] -> [M, N].

    The result is in dtype, or in out [M, N] (bf16 or fp32), to which accumulate adds. Not differentiable. Raises
    ValueError for shapes or dtypes that do not fit, and where K, or for a weight N, is no multiple of 128.
    """
    expect_fp8(a, a_scale, b, b_scale)
    expect(a.ndim == b.ndim == 2, "a [M, K] and b [N, K]", a, b)
    shape = (len(a), len(b))
    expect(out is None or (out.shape == shape and out.is_floating_point()), "out [M, N]", out, shape)
    expect(out is not None or not accumulate, "out where accumulate is given", out)
    return gemm_fp8_ref(a, a_scale, b, b_scale, out, accumulate, dtype)


def gemm_fp8_ref(a, a_scale, b, b_scale, out=None, accumulate=False, dtype=torch.bfloat16):
    d = scaled_product(a, a_scale, b, b_scale)
    if out is None:
        return d if d.dtype == torch.float64 else d.to(dtype)
    return out.copy_(wide(out) + d if accumulate else d)


def scaled_product(a: Tensor, a_scale: Tensor, b: Tensor, b_scale: Tensor) -> Tensor:
    """The definition: [..., M, K] times [..., N, K]^T in the scales' precision, fp32 or fp64, not yet rounded."""
    M, K = a.shape[-2:]
    N = b.shape[-2]
    if b_scale.shape[-2] != N:
        b_scale = b_scale.repeat_interleave(BLOCK, -2)
    dtype = torch.promote_types(a_scale.dtype, b_scale.dtype)
    d = torch.zeros(*a.shape[:-2], M, N, dtype=dtype, device=a.device)
    with torch.autocast(a.device.type, enabled=False):
        for k in range(K // BLOCK):
            block = slice(k * BLOCK, (k + 1) * BLOCK)
            part = a[..., block].to(dtype) @ b[..., block].to(dtype).mT
            d = d + part * (a_scale[..., :, k, None] * b_scale[..., None, :, k])
    return d


def expect_fp8(a: Tensor, a_scale: Tensor, b: Tensor, b_scale: Tensor) -> None:
    """What every product of FP8 rows with FP8 weights asks of its operands."""
    expect(a.dtype == b.dtype == E4M3, "e4m3 operands", a, b)
    fits = a.ndim >= 2 and b.ndim >= 2 and a.shape[-1] == b.shape[-1] and a.shape[-1] % BLOCK == 0
    expect(fits, "a [.., M, K] and b [.., N, K], K % 128 == 0", a, b)
    K = a.shape[-1] // BLOCK
    expect(a_scale.shape == (*a.shape[:-1], K), "a_scale [.., M, K/128]", a, a_scale)
    weight = b.shape[-2] % BLOCK == 0 and b_scale.shape == (*b.shape[:-2], b.shape[-2] // BLOCK, K)
    expect(weight or b_scale.shape == (*b.shape[:-1], K), "b_scale [.., N/128 or N, K/128]", b, b_scale)
    scales = all(s.dtype in (torch.float32, torch.float64) for s in (a_scale, b_scale))
    expect(scales, "fp32 scales", a_scale, b_scale)
