"""AdamW whose moments are kept in 8 bits a value, as bitsandbytes keeps them (arXiv 2110.02861).

A block of 256 values holds its largest absolute value and, for each, the index of the nearest of 256 numbers in [-1, 1]
(m) or [0, 1] (v), half as many in each decade towards 0: see `dynamic_map`. The update is that of torch.optim.AdamW:
m = b1 m + (1 - b1) g,  v = b2 v + (1 - b2) g^2,
p = p (1 - lr wd) - lr (m / (1 - b1^t)) / (sqrt(v / (1 - b2^t)) + eps).
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from ..op import expect, wide

BLOCK = 256


class Moments(NamedTuple):
    """Of one parameter with n elements; a moment is map[code] * scale of its block."""

    m: Tensor  # [n] uint8
    m_scale: Tensor  # [ceil(n / 256)] fp32
    v: Tensor  # [n] uint8
    v_scale: Tensor  # [ceil(n / 256)] fp32


def adamw_8bit(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    state: Sequence[Moments],
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    step: int,
) -> None:
    """One AdamW step, number `step` (from 1 on), in place in params and in their state of `adamw_8bit_state`.

    Arithmetic in fp32 and with the new moments before they are rounded to 8 bits; params may be bf16. This states what
    an 8-bit AdamW computes. For production prefer bitsandbytes' AdamW8bit (paged, fused) or torchao's: they are kept
    well, and nobody has measured a reason against them. Raises ValueError where grads or state do not fit params.
    """
    expect(len(params) == len(grads) == len(state), "as many grads and states as params",
           len(params), len(grads), len(state))  # fmt: skip
    expect(step >= 1 and all(0 <= b < 1 for b in betas) and eps > 0, "step >= 1, betas in [0, 1), eps > 0",
           step, betas, eps)  # fmt: skip
    for p, g, s in zip(params, grads, state, strict=True):
        n, blocks = p.numel(), -(-p.numel() // BLOCK)
        expect(p.is_floating_point() and g.is_floating_point() and g.shape == p.shape, "grads as params", p, g)
        expect(s.m.shape == s.v.shape == (n,) and s.m_scale.shape == s.v_scale.shape == (blocks,)
               and s.m.dtype == s.v.dtype == torch.uint8, "the state of adamw_8bit_state(params)", p, *s)  # fmt: skip
    adamw_8bit_ref(params, grads, state, lr, betas, eps, weight_decay, step)


def adamw_8bit_state(params: Sequence[Tensor]) -> list[Moments]:
    """Zero moments, on the device of each parameter."""
    state = []
    for p in params:
        zeros = torch.zeros(p.numel(), device=p.device)
        signed, unsigned = maps(p)
        state.append(Moments(*quantize_moment(zeros, signed), *quantize_moment(zeros, unsigned)))
    return state


@torch.no_grad()
def adamw_8bit_ref(params, grads, state, lr, betas, eps, weight_decay, step):
    b1, b2 = betas
    for p, g, s in zip(params, grads, state, strict=True):
        signed, unsigned = maps(p)
        g, w = wide(g).flatten(), wide(p).flatten()
        m = b1 * dequantize_moment(s.m, s.m_scale, signed) + (1 - b1) * g
        v = b2 * dequantize_moment(s.v, s.v_scale, unsigned) + (1 - b2) * g.square()
        update = (m / (1 - b1**step)) / ((v / (1 - b2**step)).sqrt() + eps)
        p.copy_((w * (1 - lr * weight_decay) - lr * update).view(p.shape))
        new = (*quantize_moment(m, signed), *quantize_moment(v, unsigned))
        for old, value in zip(s, new, strict=True):
            old.copy_(value)


def dynamic_map(signed: bool, device: torch.device | None = None) -> Tensor:
    """The 256 numbers, ascending, fp32: 0, 1, and 2^i (signed, of either sign) or 2^(i+1) numbers in decade i of seven.

    Those of decade i are the centres of equal parts of [0.1, 1] * 10^(i - 6).
    """
    decades = []
    for i in range(7):
        edges = torch.linspace(0.1, 1, 2 ** (i if signed else i + 1) + 1, device=device)
        decades.append((edges[:-1] + edges[1:]) / 2 * 10.0 ** (i - 6))
    positive = torch.cat(decades)
    ends = torch.tensor([0.0, 1.0], device=device)
    return torch.cat([positive, -positive, ends] if signed else [positive, ends]).sort().values


def maps(p: Tensor) -> tuple[Tensor, Tensor]:
    """Of the first and of the second moment."""
    return dynamic_map(True, p.device), dynamic_map(False, p.device)


def quantize_moment(x: Tensor, table: Tensor) -> tuple[Tensor, Tensor]:
    """x [n] -> codes [n] uint8 and scale [ceil(n / 256)]."""
    blocks = F.pad(x, (0, -len(x) % BLOCK)).view(-1, BLOCK)
    scale = blocks.abs().amax(1)
    unit = blocks / scale.clamp(min=1e-30)[:, None]
    codes = torch.bucketize(unit.float(), (table[:-1] + table[1:]) / 2)  # between two midpoints lies the nearest
    return codes.to(torch.uint8).flatten()[: len(x)], scale


def dequantize_moment(codes: Tensor, scale: Tensor, table: Tensor) -> Tensor:
    return table[codes.long()] * scale.repeat_interleave(BLOCK)[: len(codes)]
