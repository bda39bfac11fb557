"""A linear layer and the norm before it: y = rms_norm(x) w^T.

For the few rows of a decode step this is one kernel, bound by the load of w: every block norms all rows, as FP8 codes
where w is FP8. For more rows, or with gradients, it is `rms_norm` and the product.
"""

import torch
from torch import Tensor
from torch.nn.functional import linear

from .. import backend as backends
from ..op import E4M3, expect, op, rows_aligned
from .gemm_fp8 import gemm_fp8
from .moe import Weight
from .quantize import BLOCK, quantize
from .rms_norm import MAX_N, near_rows, rms_norm

ROWS = 8  # at most, of the kernel


def rms_norm_linear(
    x: Tensor, norm: Tensor | None, w: Weight, eps: float = 1e-6, dtype: torch.dtype | None = None
) -> Tensor:
    """x [M, K], norm [K] or None for no norm, w [N, K] -> rms_norm(x, norm) w^T [M, N] in dtype, by default x's.

    w may be FP8, a pair as `quantize_weight` returns it: then the normed rows are quantised before they are rounded to
    x's dtype, and w passes no gradient on. Other gradients are those of the parts. The product follows autocast, as
    `torch.nn.functional.linear`, whose result is rounded before it is cast to dtype; the kernel rounds once. Raises
    ValueError for shapes and dtypes that do not fit.
    """
    w, scale = w if isinstance(w, tuple) else (w, None)
    K = x.shape[1] if x.ndim == 2 else 0
    expect(K > 0 and w.ndim == 2 and w.shape[1] == K, "x [M, K] and w [N, K]", x, w)
    expect(norm is None or norm.shape == (K,), "norm [K]", norm, x)
    expect((w.dtype == E4M3) == (scale is not None), "a w in e4m3 with its scales, or in another dtype without", w)
    one_dtype = scale is not None or w.dtype == x.dtype or torch.is_autocast_enabled(x.device.type)
    expect(one_dtype, "x and w in one dtype", x, w)
    dtype = x.dtype if dtype is None else dtype
    if backends.backend(x) == "cuda" and fits_kernel(x, norm, w, scale, dtype):
        y = x.new_empty(len(x), len(w), dtype=dtype)
        rms_norm_linear_fwd(near_rows(x), norm, w, scale, y, eps)
        return y
    if scale is None:
        return linear(x if norm is None else rms_norm(x, norm, None, eps), w).to(dtype)
    x_q, x_scale = quantize(x) if norm is None else rms_norm(x, norm, None, eps, quantize=True)[1:]
    return gemm_fp8(x_q, x_scale, w, scale, dtype=dtype)


def fits_kernel(x: Tensor, norm: Tensor | None, w: Tensor, scale: Tensor | None, dtype: torch.dtype) -> bool:
    """Whether the kernel takes these: else the parts run, which is no fallback for most linear layers."""
    (M, K), N = x.shape, len(w)
    tensors = [t for t in (x, norm, w) if t is not None]
    if torch.is_autocast_enabled(x.device.type) or (torch.is_grad_enabled() and any(t.requires_grad for t in tensors)):
        return False
    bf16, fp32 = torch.bfloat16, torch.float32
    dtypes = x.dtype == bf16 and dtype in (bf16, fp32) and (norm is None or norm.dtype in (bf16, fp32))
    if scale is None:
        weight = w.dtype == bf16 and K % 64 == N % 16 == 0
    else:
        weight = norm is not None and scale.dtype == fp32 and scale.shape == (N // BLOCK, K // BLOCK)
        weight = weight and K % BLOCK == N % BLOCK == 0
    return dtypes and weight and 0 < M <= ROWS and K <= MAX_N and N > 0 and rows_aligned(x, norm, w)


@op("y", runs="cuda")
def rms_norm_linear_fwd(
    x: Tensor, norm: Tensor | None, w: Tensor, w_scale: Tensor | None, y: Tensor, eps: float
) -> None:  # fmt: skip
    backends._C.rms_norm_linear_fwd(x, norm, w, w_scale, y, eps)
