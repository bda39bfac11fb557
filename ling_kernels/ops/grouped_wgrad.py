"""Grouped weight gradient: dW[e] (+)= sum over the rows s of expert e of dy[s] x[s]^T, in fp32.

With columns the operands are column-wise FP8 copies, and the products over each 128 rows are scaled, then added.
"""

import torch
from torch import Tensor

from ..op import E4M3, expect, op, wide
from .gemm_fp8 import BLOCK, scaled_product
from .quantize import dequantize


def grouped_wgrad(
    dy: Tensor,
    x: Tensor,
    offsets: Tensor,
    out: Tensor | None = None,
    accumulate: bool = False,
    dy_scale: Tensor | None = None,
    x_scale: Tensor | None = None,
    columns: bool = False,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """dW [E, N, K] in dtype, or in out (fp32 or bf16), from, with offsets [E + 1] int32,

      dy [S, N], x [S, K] of one wide dtype, without scales; or
      dy [S, N], x [S, K] e4m3 with dy_scale [S, N/128], x_scale [S, K/128], dequantised; or, with columns,
      dy [N, S_pad], x [K, S_pad] e4m3 with dy_scale [N, S_pad/128], x_scale [K, S_pad/128], the column-wise copies of
      `quantize(..., plan=plan)`; offsets is then plan.padded_offsets.
    accumulate adds to out; otherwise out is written without being read, zeros for an expert without rows. Rows outside
    every expert are never read. Not differentiable. Raises ValueError for operands that do not fit. The host reads the
    offsets where no kernel serves.
    """
    rows = 1 if columns else 0
    fp8 = dy.dtype == x.dtype == E4M3
    expect(dy.ndim == x.ndim == 2 and dy.dtype == x.dtype and dy.shape[rows] == x.shape[rows],
           "dy [S, N] and x [S, K] of one dtype (columns: [N, S_pad] and [K, S_pad])", dy, x)  # fmt: skip
    expect(fp8 if columns or dy_scale is not None or x_scale is not None else x.is_floating_point() and not fp8,
           "e4m3 with scales, or wide operands without", dy, x, dy_scale, x_scale)  # fmt: skip
    for t, scale in ((dy, dy_scale), (x, x_scale)) if fp8 else ():
        expect(t.shape[1] % BLOCK == 0 and scale is not None and scale.shape == (len(t), t.shape[1] // BLOCK),
               "one scale per 1 x 128 of dy and of x", t, scale)  # fmt: skip
    expect(offsets.ndim == 1 and len(offsets) > 1 and offsets.dtype == torch.int32, "offsets [E + 1] int32", offsets)
    shape = (len(offsets) - 1, dy.shape[1 - rows], x.shape[1 - rows])
    expect(out is None or (out.shape == shape and out.is_floating_point()), "out [E, N, K]", out, shape)
    expect(out is not None or not accumulate, "out where accumulate is given", out)
    if out is None:
        out = torch.empty(shape, dtype=dtype, device=dy.device)
    grouped_wgrad_fwd(dy.detach(), x.detach(), offsets, out, accumulate, dy_scale, x_scale, columns)
    return out


def grouped_wgrad_ref(
    dy, x, offsets, out=None, accumulate=False, dy_scale=None, x_scale=None, columns=False, dtype=torch.float32
):
    bounds = offsets.tolist()
    if dy_scale is not None and not columns:
        dy, x = dequantize(dy, dy_scale), dequantize(x, x_scale)
    parts = []
    for lo, hi in zip(bounds, bounds[1:], strict=False):
        if columns:
            blocks = slice(lo // BLOCK, hi // BLOCK)
            parts.append(scaled_product(dy[:, lo:hi], dy_scale[:, blocks], x[:, lo:hi], x_scale[:, blocks]))
        else:
            with torch.autocast(dy.device.type, enabled=False):
                parts.append(wide(dy[lo:hi]).T @ wide(x[lo:hi]))
    dw = torch.stack(parts)
    if out is None:
        return dw if dw.dtype == torch.float64 else dw.to(dtype)
    return out.copy_(wide(out) + dw if accumulate else dw)


@op("out")
def grouped_wgrad_fwd(
    dy: Tensor,
    x: Tensor,
    offsets: Tensor,
    out: Tensor,
    accumulate: bool,
    dy_scale: Tensor | None,
    x_scale: Tensor | None,
    columns: bool,
) -> None:
    grouped_wgrad_ref(dy, x, offsets, out, accumulate, dy_scale, x_scale, columns)
