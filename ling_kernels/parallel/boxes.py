"""Which part of a tensor a rank holds, and where parts overlap.

A box is a part of a tensor that is contiguous in each dimension: from and to, for every dimension.
"""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

Range = tuple[int, int]
Box = tuple[Range, ...]


class Part(NamedTuple):
    """Ranges of one dimension of a tensor, one after the other: the rows of some experts, or of some heads in each of
    query, key and value. Without ranges all of it."""

    dim: int
    ranges: tuple[Range, ...]

    def take(self, whole: Tensor) -> Tensor:
        """The part of a whole tensor, which is copied where it is not the whole."""
        if not self.ranges:
            return whole
        return torch.cat([whole.narrow(self.dim, a, b - a) for a, b in self.ranges], self.dim)

    def boxes(self, shape: Sequence[int]) -> list[tuple[Box, Box]]:
        """For each range its box in a whole tensor of this shape, and in the part."""
        if not self.ranges:
            return [(whole_box(shape), whole_box(shape))]
        found, start = [], 0
        for a, b in self.ranges:
            local = (start, start + b - a)
            found.append((replaced(shape, self.dim, (a, b)), replaced(shape, self.dim, local)))
            start += b - a
        return found

    def flattened(self, shape: Sequence[int], unit: int) -> "Part | None":
        """The part of a vector with a number for each `unit` elements, in their order, of a whole tensor of this shape;
        None where such a number is of several parts."""
        if not self.ranges:
            return self
        row = torch.Size(shape[1:]).numel()
        if self.dim or any(bound * row % unit for r in self.ranges for bound in r):
            return None
        return Part(0, tuple((a * row // unit, b * row // unit) for a, b in self.ranges))


EVERYTHING = Part(0, ())


def equal_part(number: int, of: int, length: int, dim: int = 0) -> Part:
    """Part `number` of `of` equal ones of a dimension with this length."""
    return Part(dim, ((number * length // of, (number + 1) * length // of),))


def whole_box(shape: Sequence[int]) -> Box:
    return tuple((0, n) for n in shape)


def replaced(shape: Sequence[int], dim: int, r: Range) -> Box:
    """The box of a whole tensor of this shape, with another range in one dimension."""
    return tuple(r if d == dim else (0, n) for d, n in enumerate(shape))


def overlap(a: Box, b: Box) -> Box | None:
    """What two boxes of one tensor have in common; None where that is nothing."""
    both = tuple((max(p[0], q[0]), min(p[1], q[1])) for p, q in zip(a, b, strict=True))
    return both if all(start < stop for start, stop in both) else None


def within(inner: Box, outer: Box, held: Box | None = None) -> tuple[slice, ...]:
    """The slices of the box `inner` in a tensor that is the box `outer`, or that has it at `held`."""
    starts = [p[0] for p in outer] if held is None else [p[0] - q[0] for p, q in zip(outer, held, strict=True)]
    return tuple(slice(a - start, b - start) for (a, b), start in zip(inner, starts, strict=True))


def as_box(slices: Sequence[slice]) -> Box:
    return tuple((s.start, s.stop) for s in slices)


def shape_of(boxes: Iterable[Box]) -> torch.Size:
    """The shape of a tensor that these boxes fill."""
    return torch.Size([max(stops) for stops in zip(*([stop for _, stop in box] for box in boxes), strict=True)])


def size(box: Box) -> int:
    """Number of elements."""
    return torch.Size([stop - start for start, stop in box]).numel()
