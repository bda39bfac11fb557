"""Dispatch: sort the choices (token, k) by expert, stably in token order, and return the row of each.

A choice is a pair (token t, k-th chosen expert), numbered t * topk + k. A row is a position in the sorted order.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from ..op import expect, op, use_reference, values_on_host
from .triton_import import tl, triton

PAD = 128  # column-wise copies start each expert's run of rows at a multiple of this
TILE = 256  # choices of one program, whose work grows with the square; not measured


class Plan(NamedTuple):
    """The order of the S = T x topk choices (token, k) sorted by expert; int32, on the device.

    Expert e owns rows offsets[e] : offsets[e + 1]. slot[t, k] is the row of token t's k-th choice, -1 if that choice
    is not routed here. source[s] = t * topk + k is the choice in row s. Rows past offsets[E] are undefined and never
    read. padded_offsets are the same runs in a column-wise copy, each starting at a multiple of 128.
    """

    offsets: Tensor  # [E + 1]
    slot: Tensor  # [T, topk], choice -> row
    source: Tensor  # [S], row -> choice
    padded_offsets: Tensor  # [E + 1]


def dispatch(experts: Tensor, counts: Tensor) -> Plan:
    """The plan for experts [T, topk] int32 (-1: not routed here) with counts [E] int32, both from `route`.

    Stable in token order and deterministic. counts[e] must be the number of times that e occurs. Raises ValueError for
    another shape or dtype, and on a CPU, whose values cost no synchronisation, for other counts.
    """
    ints = experts.dtype == counts.dtype == torch.int32
    expect(experts.ndim == 2 and counts.ndim == 1 and ints, "experts [T, topk] and counts [E], int32", experts, counts)
    if values_on_host(experts):
        fits = torch.equal(counts_of(experts, len(counts)), counts)
        expect(fits, "experts below E, and counts[e] the number of times that e occurs", experts, counts)
    if use_reference("dispatch", experts):
        return dispatch_ref(experts, counts)
    E = len(counts)
    plan = Plan(counts.new_empty(E + 1), torch.empty_like(experts, memory_format=torch.contiguous_format),
                experts.new_empty(experts.numel()), counts.new_empty(E + 1))  # fmt: skip
    tiles = triton.cdiv(experts.numel(), TILE)
    before = counts.new_empty(tiles, E) if tiles > 1 else None
    dispatch_fwd(experts.contiguous(), counts.contiguous(), before, *plan)
    return plan


def expect_plan(plan: Plan, T: int | None = None, S: int | None = None) -> None:
    """Check the shapes and dtypes of a plan, of T tokens or of S rows where these are given."""
    offsets, slot, source, padded_offsets = plan
    tokens, topk = slot.shape if slot.ndim == 2 else (-1, 0)
    fits = T in (None, tokens) and S in (None, tokens * topk) and source.shape == (tokens * topk,) and topk > 0
    bounds = offsets.ndim == 1 and offsets.shape == padded_offsets.shape and len(offsets) > 0
    ints = all(t.dtype == torch.int32 for t in plan)
    of = f"{T} tokens" if T is not None else f"{S} rows"
    expect(fits and bounds and ints, f"a plan of {of}: offsets [E + 1], slot [T, topk], source [T topk], padded_offsets"
           " [E + 1], int32", *plan)  # fmt: skip


def expect_offsets(offsets: Tensor, num_experts: int, S: int) -> None:
    """offsets [E + 1] int32 of runs of at most S rows; values are looked at where they cost no synchronisation."""
    fits = num_experts > 0 and offsets.shape == (num_experts + 1,) and offsets.dtype == torch.int32
    expect(fits, "offsets [E + 1] int32, E > 0", offsets, num_experts)
    if values_on_host(offsets):
        bounds = offsets.tolist()
        expect(bounds == sorted(bounds) and 0 <= bounds[0] and bounds[-1] <= S,
               f"offsets that ascend from 0 to at most {S} rows", bounds)  # fmt: skip


def dispatch_ref(experts, counts):
    flat = experts.flatten()
    routed = flat >= 0
    key = torch.where(routed, flat, len(counts))  # choices that are not routed here go last
    source = key.argsort(stable=True)
    slot = torch.empty_like(flat).scatter_(0, source, torch.arange(len(flat), dtype=flat.dtype, device=flat.device))
    slot = torch.where(routed, slot, -1).view_as(experts)
    return Plan(exclusive_sum(counts), slot, source.int(), exclusive_sum((counts + PAD - 1) // PAD * PAD))


def counts_of(experts: Tensor, num_experts: int) -> Tensor:
    """[E] int32: how often each expert occurs; negative ones do not count. Longer if one is not below num_experts."""
    return torch.bincount(experts.flatten().clamp(min=-1) + 1, minlength=num_experts + 1)[1:].int()


def counts_here(experts: Tensor, number: int) -> Tensor:
    """How often each of experts 0 to number - 1 was chosen, [number] int32; -1 are choices of experts elsewhere. The
    host does not wait."""
    counts = experts.new_zeros(number + 1, dtype=torch.int32)  # the last: choices of experts elsewhere
    chosen = experts.where(experts >= 0, number).flatten().long()
    return counts.scatter_add_(0, chosen, torch.ones_like(chosen, dtype=torch.int32))[:number]


def exclusive_sum(counts: Tensor) -> Tensor:
    """[E] -> [E + 1] int32, starting at 0."""
    ends = counts.cumsum(0, dtype=torch.int32)
    return torch.cat([ends.new_zeros(1), ends])


def unsupported(experts, counts, *others) -> str | None:
    return None if len(counts) <= 512 else f"{len(counts)} experts"


@op("before", "offsets", "slot", "source", "padded_offsets", cuda=unsupported)
def dispatch_fwd(
    experts: Tensor,
    counts: Tensor,
    before: Tensor | None,
    offsets: Tensor,
    slot: Tensor,
    source: Tensor,
    padded_offsets: Tensor,
) -> None:
    """before [tiles, E] int32: scratch, the number of each expert's choices in earlier tiles; None for one tile."""
    S, E = len(source), len(counts)
    BLOCK_E = triton.next_power_of_2(max(E, 1))
    tiles = triton.cdiv(S, TILE)
    if before is not None:
        dispatch_count_kernel[(tiles,)](experts, before, S, E, BLOCK=TILE, BLOCK_E=BLOCK_E)
        columns = min(BLOCK_E, 16)
        dispatch_scan_kernel[(triton.cdiv(E, columns),)](before, tiles, E, BLOCK=64, BLOCK_E=columns)
    BLOCK = TILE if tiles > 1 else triton.next_power_of_2(max(S, 1))
    dispatch_kernel[(max(tiles, 1),)](
        experts, counts, before, offsets, slot, source, padded_offsets, S, E, PAD=PAD, BLOCK=BLOCK,
        BLOCK_E=BLOCK_E, STEP=32,
    )  # fmt: skip


@triton.jit
def dispatch_count_kernel(experts, before, S, E, BLOCK: tl.constexpr, BLOCK_E: tl.constexpr):
    tile = tl.program_id(0)
    i = tile * BLOCK + tl.arange(0, BLOCK)
    e = tl.arange(0, BLOCK_E)
    chosen = tl.load(experts + i, mask=i < S, other=-1)
    found = tl.histogram(tl.maximum(chosen, 0), BLOCK_E)
    unrouted = tl.sum((chosen < 0).to(tl.int32))  # they were counted as expert 0
    tl.store(before + tile.to(tl.int64) * E + e, found - tl.where(e == 0, unrouted, 0), mask=e < E)


@triton.jit
def dispatch_scan_kernel(before, tiles, E, BLOCK: tl.constexpr, BLOCK_E: tl.constexpr):
    """Replace each tile's counts by the sum over the earlier tiles, in place; a program has a few experts."""
    e = tl.program_id(0) * BLOCK_E + tl.arange(0, BLOCK_E)[None, :]
    total = tl.zeros((BLOCK_E,), tl.int32)
    for first in range(0, tiles, BLOCK):
        tile = first + tl.arange(0, BLOCK)[:, None]
        pointers = before + tile.to(tl.int64) * E + e
        valid = (tile < tiles) & (e < E)
        found = tl.load(pointers, mask=valid, other=0)
        tl.store(pointers, total[None, :] + tl.cumsum(found, 0) - found, mask=valid)
        total += tl.sum(found, 0)


@triton.jit
def dispatch_kernel(
    experts, counts, before, offsets, slot, source, padded_offsets, S, E,
    PAD: tl.constexpr, BLOCK: tl.constexpr, BLOCK_E: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    tile = tl.program_id(0)
    i, e = tl.arange(0, BLOCK), tl.arange(0, BLOCK_E)
    if tile == 0:
        runs = tl.load(counts + e, mask=e < E, other=0)
        tl.store(offsets + e + 1, tl.cumsum(runs, 0), mask=e < E)
        tl.store(padded_offsets + e + 1, tl.cumsum((runs + PAD - 1) // PAD * PAD, 0), mask=e < E)
        tl.store(offsets + e, tl.zeros((BLOCK_E,), tl.int32), mask=e == 0)
        tl.store(padded_offsets + e, tl.zeros((BLOCK_E,), tl.int32), mask=e == 0)

    # The row of a choice: the number of choices of lower experts, of its expert in earlier tiles, and before it in this
    # tile. Choices that are not routed here go last, as if to expert E, so that source holds every choice once.
    choices = tile * BLOCK + i
    chosen = load_chosen(experts, choices, S, E)
    row = tl.zeros((BLOCK,), tl.int32)
    for first in range(0, E, STEP):
        lower = first + tl.arange(0, STEP)
        count = tl.load(counts + lower, mask=lower < E, other=0)
        row += tl.sum(tl.where(lower[None, :] < chosen[:, None], count[None, :], 0), 1)
    if before is not None:
        routed_before = before + tile.to(tl.int64) * E  # [E] choices of each expert in earlier tiles
        earlier = tl.load(routed_before + chosen, mask=chosen < E, other=0)
        unrouted = tile * BLOCK - tl.sum(tl.load(routed_before + e, mask=e < E, other=0))
        row += tl.where(chosen < E, earlier, unrouted)
    for first in range(0, BLOCK, STEP):
        j = first + tl.arange(0, STEP)
        same = load_chosen(experts, tile * BLOCK + j, S, E)[None, :] == chosen[:, None]
        row += tl.sum((same & (j[None, :] < i[:, None])).to(tl.int32), 1)
    tl.store(slot + choices, tl.where(chosen < E, row, -1), mask=choices < S)
    tl.store(source + row, choices, mask=(choices < S) & (row < S))


@triton.jit
def load_chosen(experts, choices, S, E):
    """The experts of choices; E for choices that are not routed here."""
    chosen = tl.load(experts + choices, mask=choices < S, other=-1)
    return tl.where(chosen < 0, E, chosen)
