"""Gathering, summing and sending rows over a process group, all of whose ranks call them together."""

import torch
import torch.distributed as dist
from torch import Tensor

from .turns import turns

Sizes = tuple[list[int], list[int]]  # rows sent to, and received from, each rank

# Its name since torch 2.13, which warns of the old one.
all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


def gather(rows: Tensor, group: dist.ProcessGroup) -> Tensor:
    """rows [T, ...] of each of n ranks, of one T -> [n T, ...] in order of rank."""
    out = rows.new_empty(dist.get_world_size(group) * len(rows), *rows.shape[1:])
    all_gather(out, rows.contiguous(), group=group)
    return out


def scatter_sum(rows: Tensor, group: dist.ProcessGroup) -> Tensor:
    """rows [n T, ...], a summand from every rank -> this rank's [T, ...] of the sum.

    Summands travel as they are, and are added here in fp32 and in order of rank, whatever the backend's algorithm.
    """
    theirs = torch.empty_like(rows, memory_format=torch.contiguous_format)
    dist.all_to_all_single(theirs, rows.contiguous(), group=group)
    n = dist.get_world_size(group)
    theirs = theirs.unflatten(0, (n, len(rows) // n))
    return theirs.sum(0, dtype=torch.promote_types(rows.dtype, torch.float32)).to(rows.dtype)


class Gather(torch.autograd.Function):
    """`gather`, whose gradient is `scatter_sum`."""

    @staticmethod
    def forward(ctx, rows: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return gather(rows, group)

    @staticmethod
    def backward(ctx, gradient: Tensor):  # type: ignore[override]
        return scatter_sum(gradient, ctx.group), None


class ScatterSum(torch.autograd.Function):
    """`scatter_sum`, whose gradient is `gather`."""

    @staticmethod
    def forward(ctx, rows: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return scatter_sum(rows, group)

    @staticmethod
    def backward(ctx, gradient: Tensor):  # type: ignore[override]
        return gather(gradient, ctx.group), None


class Send(torch.autograd.Function):
    """An all-to-all with given sizes; the gradient takes the way back."""

    @staticmethod
    def forward(ctx, rows: Tensor, to: list[int], from_: list[int], group: dist.ProcessGroup) -> Tensor:
        ctx.to, ctx.from_, ctx.group, ctx.length = to, from_, group, len(rows)
        out = rows.new_empty(sum(from_), *rows.shape[1:])
        all_to_all(out, rows[: sum(to)].contiguous(), from_, to, group)
        return out

    @staticmethod
    def backward(ctx, gradient: Tensor):  # type: ignore[override]
        out = gradient.new_zeros(ctx.length, *gradient.shape[1:])
        part = out[: sum(ctx.to)]
        all_to_all(part, gradient.contiguous(), ctx.to, ctx.from_, ctx.group)
        return out, None, None, None


def all_to_all(out: Tensor, rows: Tensor, from_: list[int], to: list[int], group: dist.ProcessGroup) -> None:
    """Rows to every rank and from it; of a forward and a backward that take turns the other one computes meanwhile."""
    if (both := turns()) is None:
        dist.all_to_all_single(out, rows, from_, to, group=group)
        return
    under_way = dist.all_to_all_single(out, rows, from_, to, group=group, async_op=True)
    both.hand_over()
    under_way.wait()


def exchanged(counts: Tensor, rows: int, group: dist.ProcessGroup) -> tuple[Tensor, Sizes]:
    """counts [n, m] of this rank's rows for each of n ranks, at most `rows` in all -> those of each rank's rows for
    this one, and the sums of both, for which the host waits.

    Over a fake group there is nothing to count: `rows` are shared out evenly, and as many come.
    """
    theirs = torch.empty_like(counts)
    dist.all_to_all_single(theirs, counts, group=group)
    if is_fake(group):
        n = len(counts)
        even = [(r + 1) * rows // n - r * rows // n for r in range(n)]
        return theirs, (even, even)
    to, from_ = torch.stack([counts.sum(1), theirs.sum(1)]).tolist()
    return theirs, (to, from_)


def is_fake(group: dist.ProcessGroup | None = None) -> bool:
    """Whether the processes of a group, or of all, are those of a plan, which is one (fake_group.py)."""
    return dist.get_backend(group) == "fake"


def most_rows(rows: int, device: torch.device, group: dist.ProcessGroup) -> int:
    """The largest number of rows that a rank has; the host waits for it."""
    number = torch.tensor([rows], device=device)
    dist.all_reduce(number, dist.ReduceOp.MAX, group=group)
    return int(number)
