"""Loss-free balance: b += rate * (sign(mean(c) - c) - mean(sign(mean(c) - c))); an expert with few tokens rises.

The mean of b does not change. Source: arXiv 2510.22115, section 2.2; rate 1e-3, then 1e-4 after context extension.
"""

import torch
from torch import Tensor

from ..op import expect, op, use_reference
from .triton_import import tl, triton


def balance_bias_(bias: Tensor, counts: Tensor, rate: float) -> None:
    """Update bias [E] fp32 in place from counts [E] (integers: tokens of each expert in the whole global batch).

    Runs on the device, asks the host nothing. Raises ValueError for another shape or dtype.
    """
    fits = bias.ndim == 1 and bias.shape == counts.shape and not counts.is_floating_point()
    expect(fits and bias.dtype in (torch.float32, torch.float64), "bias [E] fp32 and counts [E] int", bias, counts)
    if use_reference("balance_bias_", bias, unsupported=None if bias.is_contiguous() else "a strided bias"):
        balance_bias_ref(bias, counts, rate)
    else:
        balance_bias_fwd(bias.detach(), counts.contiguous(), rate)


@torch.no_grad()
def balance_bias_ref(bias, counts, rate):
    c = counts.long()  # E * (mean(c) - c) in integers: a count above 2^24 would lose its sign in fp32
    sign = (c.sum() - len(c) * c).sign().to(bias.dtype)
    bias += rate * (sign - sign.sum() / bias.new_full((), len(c)))  # mean() on a GPU multiplies by the reciprocal


def unsupported(bias, counts, rate) -> str | None:
    return None if counts.dtype in (torch.int32, torch.int64) else f"counts of {counts.dtype}"


@op("bias", cuda=unsupported)
def balance_bias_fwd(bias: Tensor, counts: Tensor, rate: float) -> None:
    E = len(bias)
    if E:
        balance_bias_kernel[(1,)](bias, counts, rate, E, BLOCK_E=triton.next_power_of_2(E), enable_fp_fusion=False)


@triton.jit
def balance_bias_kernel(bias, counts, rate, E, BLOCK_E: tl.constexpr):
    e = tl.arange(0, BLOCK_E)
    c = tl.load(counts + e, mask=e < E, other=0).to(tl.int64)
    above = tl.sum(c) - E * c
    sign = tl.where(e < E, (above > 0).to(tl.int32) - (above < 0).to(tl.int32), 0)
    mean = tl.div_rn(tl.sum(sign).to(tl.float32), E * 1.0)
    b = tl.load(bias + e, mask=e < E, other=0.0)
    tl.store(bias + e, b + rate * (sign.to(tl.float32) - mean), mask=e < E)
