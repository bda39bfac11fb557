"""Dispatch: order the routed slots by expert, stably in token order, and say where everything lies."""

from typing import NamedTuple

import torch
from torch import Tensor

from ..op import expect

PAD = 128  # column-wise copies start each expert's run of rows at a multiple of this


class Plan(NamedTuple):
    """Where the S = T x topk routed slots lie once sorted by expert; int32, on the device.

    Expert e owns rows offsets[e] : offsets[e + 1]. A token's k-th choice is row slot[t, k], -1 where it is not routed
    here; row s comes from source[s] = t * topk + k. Rows past offsets[E] are undefined and never read.
    padded_offsets are the same runs in a column-wise copy, each starting at a multiple of 128.
    """

    offsets: Tensor  # [E + 1]
    slot: Tensor  # [T, topk]
    source: Tensor  # [S]
    padded_offsets: Tensor  # [E + 1]


def dispatch(experts: Tensor, counts: Tensor) -> Plan:
    """The plan for experts [T, topk] int32 (-1: not routed here) with counts [E] int32, both from `route`.

    Stable in token order and deterministic. counts[e] must be the number of times that e occurs. Raises ValueError for
    another shape or dtype.
    """
    ints = experts.dtype == counts.dtype == torch.int32
    expect(experts.ndim == 2 and counts.ndim == 1 and ints, "experts [T, topk] and counts [E], int32", experts, counts)
    return dispatch_ref(experts, counts)


def dispatch_ref(experts, counts):
    flat = experts.flatten().long()
    routed = flat >= 0
    key = torch.where(routed, flat, len(counts))  # those not routed here go last
    source = key.argsort(stable=True)
    slot = torch.empty_like(source).scatter_(0, source, torch.arange(len(source), device=source.device))
    slot = torch.where(routed, slot, -1).view_as(experts)
    return Plan(
        exclusive_sum(counts),
        slot.int(),
        source.int(),
        exclusive_sum((counts + PAD - 1) // PAD * PAD),
    )


def exclusive_sum(counts: Tensor) -> Tensor:
    """[E] -> [E + 1] int32, starting at 0."""
    return torch.nn.functional.pad(counts.cumsum(0), (1, 0)).int()
