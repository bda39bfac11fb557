"""Packing: an endless stream of rows that depends on documents, seed and row number alone.

An epoch is all documents in a shuffled order; epochs follow one another without a gap. This stream is cut into pieces
of seq_len tokens, the rows, which are shuffled again within blocks of an epoch (at most a million rows), so that
neighbours in a document are not neighbours in a batch.
"""

import functools
from bisect import bisect_left, insort
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ...model.packing import IGNORE
from .documents import Documents

BLOCK = 1 << 20  # most rows in a block
ROWS, DOCUMENTS = 0, 1  # kinds of shuffles


class Piece(NamedTuple):
    """Tokens of one document in a row."""

    ids: np.ndarray
    trained: np.ndarray | None = None  # 1 where a token is trained on; None: everywhere


class Batch(NamedTuple):
    ids: Tensor  # [rows, seq_len] int64
    cu_seqlens: Tensor  # [n + 1] int32: where documents and rows start in the flattened ids
    masked: Tensor | None = None  # [rows, seq_len] int64: the ids, -100 where a token is not trained on

    @property
    def labels(self) -> Tensor:
        return self.ids if self.masked is None else self.masked

    def to(self, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
        """ids, labels and cu_seqlens on the device."""
        ids, cu_seqlens = (t.to(device, non_blocking=True) for t in (self.ids, self.cu_seqlens))
        return ids, ids if self.masked is None else self.masked.to(device, non_blocking=True), cu_seqlens

    def targets(self, ahead: int = 1) -> int:
        """Number of positions with a token `ahead` positions later in the same document and row, of those that are
        trained on."""
        if self.masked is None:
            return int((self.cu_seqlens.diff() - ahead).clamp(min=0).sum())
        return len(self.target_ids(ahead))

    def target_ids(self, ahead: int = 1) -> Tensor:
        """The tokens that are predicted from `ahead` positions earlier, [targets(ahead)]."""
        labels, starts = self.labels.flatten(), self.cu_seqlens.long()
        position = (
            torch.arange(len(labels)) - starts[torch.searchsorted(starts, torch.arange(len(labels)), right=True) - 1]
        )
        return labels[(position >= ahead) & (labels != IGNORE)]


def batch_of(rows: Iterable[Sequence[Piece]], number: int, seq_len: int) -> Batch:
    """A batch of `number` rows from their pieces. A row that they do not fill is padded: a document of its own, without
    labels."""
    ids = np.empty((number, seq_len), np.int64)  # first, as a batch that memory cannot hold fails here
    trained: np.ndarray | None = None
    starts = []
    for i, pieces in enumerate(rows):
        filled = 0
        for piece in pieces:
            starts.append(i * seq_len + filled)
            stop = filled + len(piece.ids)
            ids[i, filled:stop] = piece.ids
            if piece.trained is not None:
                trained = np.ones(ids.shape, bool) if trained is None else trained
                trained[i, filled:stop] = piece.trained
            filled = stop
        if filled < seq_len:
            starts.append(i * seq_len + filled)
            trained = np.ones(ids.shape, bool) if trained is None else trained
            ids[i, filled:], trained[i, filled:] = ids[i, filled - 1], False
    starts.append(ids.size)
    masked = None if trained is None else torch.from_numpy(np.where(trained, ids, IGNORE))
    return Batch(torch.from_numpy(ids), torch.tensor(starts, dtype=torch.int32), masked)


def order_of(size: int, seed: int | None, number: int) -> np.ndarray:
    """A permutation of `size` things, another one for each number; None: as they are."""
    if seed is None:
        return np.arange(size)
    # numpy guarantees the raw bits of Philox in all versions, but not the result of permutation().
    return np.argsort(np.random.Philox(key=[seed, number]).random_raw(size), kind="stable")


class Packed:
    """Rows of seq_len tokens from documents. seed shuffles them, differently in each epoch; None keeps their order."""

    def __init__(self, docs: Documents, seq_len: int, seed: int | None):
        self.docs, self.seq_len, self.seed = docs, seq_len, seed
        self.per_epoch = docs.tokens
        self.block = min(max(self.per_epoch // seq_len, 1), BLOCK)  # rows in a block
        self._shuffle = functools.lru_cache(maxsize=4)(self._permutation)  # a block spans two epochs of documents

    @property
    def rows_per_epoch(self) -> float:
        return self.per_epoch / self.seq_len

    def batch(self, rows: Sequence[int]) -> Batch:
        """The rows with these numbers. The result depends on nothing else: no state is kept between calls."""
        return batch_of(map(self.row, rows), len(rows), self.seq_len)

    def row(self, number: int) -> list[Piece]:
        block, within = divmod(number, self.block)
        first = (block * self.block + int(self._shuffle(ROWS, block)[within])) * self.seq_len
        return self.pieces(first, first + self.seq_len)

    def pieces(self, first: int, stop: int) -> list[Piece]:
        """The stream from position `first` to `stop`."""
        pieces = []
        while first < stop:
            pieces.append(Piece(self._run(first)[: stop - first]))
            first += len(pieces[-1].ids)
        return pieces

    def _run(self, position: int) -> np.ndarray:
        """The stream from `position` to the end of the document there."""
        epoch, within = divmod(position, self.per_epoch)
        order, ends = self._shuffle(DOCUMENTS, epoch)
        i = int(np.searchsorted(ends, within, side="right"))
        document = self.docs[order[i]]
        return document[len(document) - int(ends[i] - within) :]

    def _permutation(self, kind: int, number: int):
        """The order of the rows of block `number`; or the order of epoch `number`'s documents, and their ends."""
        order = order_of(self.block if kind == ROWS else len(self.docs), self.seed, 2 * number + kind)
        return order if kind == ROWS else (order, np.cumsum(self.docs.lengths[order]))


class PackedWhole:
    """Rows of whole documents: chats, which a row never divides. Documents that share a row are chosen once, by best
    fit; each epoch has all rows, in a shuffled order of its own. Longer documents than seq_len are an error of the
    caller."""

    def __init__(self, docs: Documents, seq_len: int, seed: int | None):
        self.docs, self.seq_len, self.seed = docs, seq_len, seed
        self.filled = best_fit(docs.lengths, seq_len)
        self._order = functools.lru_cache(maxsize=2)(lambda epoch: order_of(len(self.filled), seed, epoch))

    @property
    def rows_per_epoch(self) -> float:
        return len(self.filled)

    def batch(self, rows: Sequence[int]) -> Batch:
        """The rows with these numbers. The result depends on nothing else: no state is kept between calls."""
        return batch_of(map(self.row, rows), len(rows), self.seq_len)

    def row(self, number: int) -> list[Piece]:
        epoch, within = divmod(number, len(self.filled))
        return [Piece(self.docs[d], self.docs.trained(d)) for d in self.filled[self._order(epoch)[within]]]


def packed_rows(docs: Documents, seq_len: int, seed: int | None) -> Packed | PackedWhole:
    return (PackedWhole if docs.masks else Packed)(docs, seq_len, seed)


def best_fit(lengths: np.ndarray, size: int) -> list[list[int]]:
    """Divide things of these lengths into rows of at most `size`: the longest first, each into the fullest row that has
    room for it, or a new one. Ties are broken by number, so that the result is always the same."""
    rows: list[list[int]] = []
    by_room: dict[int, list[int]] = {}  # rows by the room that is left
    rooms: list[int] = []  # the keys of by_room that have rows, in order
    for d in np.argsort(-lengths, kind="stable").tolist():
        length = int(lengths[d])
        i = bisect_left(rooms, length)
        if i < len(rooms):
            room = rooms[i]
            row = by_room[room].pop()
            if not by_room[room]:
                del rooms[i]
        else:
            room, row = size, len(rows)
            rows.append([])
        rows[row].append(d)
        left = room - length
        if not by_room.setdefault(left, []):
            insort(rooms, left)
        by_room[left].append(row)
    return rows
