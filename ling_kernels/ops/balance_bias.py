"""Loss-free balance: b += rate * (sign(mean(c) - c) - mean(sign(mean(c) - c))); an expert with few tokens rises.

The mean of b stays what it was. Source: arXiv 2510.22115, section 2.2; rate 1e-3, then 1e-4 after context extension.
"""

import torch
from torch import Tensor

from ..op import expect


def balance_bias_(bias: Tensor, counts: Tensor, rate: float) -> None:
    """Update bias [E] fp32 in place from counts [E] (integers: tokens of each expert in the whole global batch).

    Runs on the device, asks the host nothing. Raises ValueError for another shape or dtype.
    """
    fits = bias.ndim == 1 and bias.shape == counts.shape and not counts.is_floating_point()
    expect(fits and bias.dtype in (torch.float32, torch.float64), "bias [E] fp32 and counts [E] int", bias, counts)
    balance_bias_ref(bias, counts, rate)


@torch.no_grad()
def balance_bias_ref(bias, counts, rate):
    c = counts.long()  # E * (mean(c) - c) in integers: a count above 2^24 would lose its sign in fp32
    sign = (c.sum() - len(c) * c).sign().to(bias.dtype)
    bias += rate * (sign - sign.mean())
