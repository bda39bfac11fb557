"""Mixtures: `PATH=WEIGHT` sources, and which source each row comes from.

With shares a_k of a period of D = sum a_k rows, row r comes from source table[r mod D]. The table is Tijdeman's
solution of the chairman assignment problem (Discrete Mathematics 32, 1980): after every number n of rows, source k has
given n a_k / D rows, up to an error below one row. After a period the errors are zero, so that a row's source, and its
number among the rows of that source, follow from the row's number alone: a resumed run needs no state.
"""

import math
import os
from collections.abc import Sequence
from fractions import Fraction
from typing import Protocol

import numpy as np

from ...errors import InputError
from .packing import Batch, Piece, batch_of

PERIOD = 1 << 16  # most rows in a period; finer weights are rounded to it


def parse_sources(data: Sequence[str]) -> list[tuple[str, Fraction | None]]:
    """Path and weight of each source; the weights are all None or all given.

    A source is a path where such a file or folder exists, also one with = in its name, and otherwise what stands before
    its last = where a number follows. Raises InputError for weights that are not positive, and where some are missing.
    """
    sources = [split_weight(source) for source in data]
    weighted = [path for path, weight in sources if weight is not None]
    if weighted and len(weighted) < len(sources):
        bare = next(path for path, weight in sources if weight is None)
        raise InputError(f"--data: {weighted[0]} has a weight and {bare} has none: give every source a weight, or none")
    return sources


def split_weight(source: str) -> tuple[str, Fraction | None]:
    path, equals, text = source.rpartition("=")
    if not equals or not path or os.path.exists(os.path.expanduser(source)):
        return source, None
    try:
        weight = float(text)
    except ValueError:  # a path that is not there
        return source, None
    if not (math.isfinite(weight) and weight > 0):
        raise InputError(f"--data {source}: a weight must be more than 0 and finite")
    return path, Fraction(text.strip())


def shares_of(weights: Sequence[Fraction]) -> list[int]:
    """Whole numbers in the proportions of the weights: exact where they sum to at most PERIOD, else rounded to it.

    A source has at least one row in a period.
    """
    total = sum(weights)
    parts = [w / total for w in weights]
    period = math.lcm(*(p.denominator for p in parts))
    if period <= PERIOD:
        return [int(p * period) for p in parts]
    shares = [max(1, int(p * PERIOD)) for p in parts]
    shares[shares.index(max(shares))] += PERIOD - sum(shares)
    return shares


def schedule(shares: Sequence[int]) -> np.ndarray:
    """The source of each row of a period, [sum of shares] int64."""
    a, period = np.array(shares, np.int64), sum(shares)
    if len(a) == 1:
        return np.zeros(period, np.int64)
    # In units of 1 / (period m) of a row. Of the sources that are behind by at least 1 / m of a row, the one
    # that would be first behind by 1 - 1 / m is next.
    m = 2 * len(a) - 2
    table, behind = np.empty(period, np.int64), np.zeros(len(a), np.int64)
    for row in range(period):
        behind += m * a
        deadline = np.where(behind >= period, (period * (m - 1) - behind) / a, np.inf)
        table[row] = k = int(deadline.argmin())
        behind[k] -= m * period
    return table


class Rows(Protocol):
    """An endless numbered stream of rows."""

    seq_len: int

    @property
    def rows_per_epoch(self) -> float: ...

    def row(self, number: int) -> list[Piece]: ...

    def batch(self, rows: Sequence[int]) -> Batch: ...


class Mixture:
    """Rows of several sources in fixed proportions. Each source goes through epochs of its own."""

    def __init__(self, sources: Sequence[Rows], shares: Sequence[int]):
        self.sources, self.shares, self.seq_len = list(sources), list(shares), sources[0].seq_len
        self.table = schedule(shares)
        # [period]: how many earlier rows of the period come from the same source
        self.earlier = np.empty(len(self.table), np.int64)
        for k in range(len(shares)):
            self.earlier[self.table == k] = np.arange(shares[k])

    @property
    def rows_per_epoch(self) -> float:
        return sum(source.rows_per_epoch for source in self.sources)

    def source_of(self, number: int) -> tuple[int, int]:
        """The source of a row, and the row's number there."""
        period, within = divmod(number, len(self.table))
        k = int(self.table[within])
        return k, period * self.shares[k] + int(self.earlier[within])

    def row(self, number: int) -> list[Piece]:
        k, there = self.source_of(number)
        return self.sources[k].row(there)

    def batch(self, rows: Sequence[int]) -> Batch:
        """The rows with these numbers. The result depends on nothing else: no state is kept between calls."""
        return batch_of(map(self.row, rows), len(rows), self.seq_len)

    def drawn(self, rows: int) -> list[int]:
        """How many of the first `rows` rows come from each source."""
        periods, rest = divmod(rows, len(self.table))
        begun = np.bincount(self.table[:rest], minlength=len(self.shares))
        return [periods * share + int(n) for share, n in zip(self.shares, begun, strict=True)]

    def epochs(self, rows: int) -> list[float]:
        """The epochs of each source that the first `rows` rows take."""
        return [n / source.rows_per_epoch for n, source in zip(self.drawn(rows), self.sources, strict=True)]
