"""Router GEMM: logits = x w^T in fp32, for a bf16 x and an fp32 w too large for fp32 arithmetic on tensor cores.

w = w1 + w2 + w3 with bf16 parts (w1 = bf16(w), w2 = bf16(w - w1), ..) is exact, so three bf16 passes give what fp32
would; passes=2 drops w3, an error of 2^-17 |x| |w|.
"""

import torch
from torch import Tensor

from ..op import expect, wide


def router_gemm(x: Tensor, w: Tensor, passes: int = 3) -> Tensor:
    """x [T, H], w [E, H], each bf16 or fp32 -> logits [T, E] fp32, also where autocast is on.

    Gradients in the dtypes of x and w; with passes=2 the gradient to x is of the w that the product saw. Raises
    ValueError for shapes that do not fit.
    """
    fits = x.ndim == w.ndim == 2 and x.shape[1] == w.shape[1] and x.is_floating_point() and w.is_floating_point()
    expect(fits and passes in (2, 3), "x [T, H], w [E, H] and 2 or 3 passes", x, w, passes)
    return router_gemm_ref(x, w, passes)


def router_gemm_ref(x, w, passes=3):
    x, w = wide(x), wide(w)
    if passes == 2:
        w = w + (two_parts(w.detach()) - w.detach())
    with torch.autocast(x.device.type, enabled=False):
        return x @ w.T


def two_parts(w: Tensor) -> Tensor:
    """bf16(w) + bf16(w - bf16(w)), which fp32 holds exactly."""
    high = w.bfloat16().to(w.dtype)
    return high + (w - high).bfloat16().to(w.dtype)
