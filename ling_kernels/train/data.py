"""Documents of token ids, and packing: an endless stream of rows that depends on documents, seed and row number alone.

Text is tokenised once into a .bin file (tokenise.py), which is memory-mapped. `python -m ling_kernels.train.data
SOURCES --out X.bin` writes such a file.

An epoch is all documents in a shuffled order; epochs follow one another without a gap. This stream is cut into pieces
of seq_len tokens, the rows, which are shuffled again within blocks of an epoch (at most a million rows), so that
neighbours in a document are not neighbours in a batch.
"""

import functools
import sys
import warnings
import zlib
from bisect import bisect_left, insort
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..errors import InputError
from ..model.packing import IGNORE
from ..tokenizer import Tokenizer
from .chats import LAST, TRAINED, mask_of
from .sources import DEFAULTS, TextOptions, find_files, reading
from .token_files import map_tokens
from .tokenise import tokenise

SCAN = 1 << 24  # ids read at a time
BLOCK = 1 << 20  # most rows in a block
ROWS, DOCUMENTS = 0, 1  # kinds of shuffles


@dataclass(frozen=True)
class Documents:
    """Document d is arrays[which[d]][start[d] : end[d]], its end token, if any, included."""

    arrays: list[np.ndarray]
    which: np.ndarray  # [n] int32
    start: np.ndarray  # [n] int64
    end: np.ndarray  # [n] int64
    checksum: int  # of all ids: a resumed run compares it
    masks: list[np.ndarray] = field(default_factory=list)  # of chats, as arrays: 1 where a token is trained on

    def __len__(self) -> int:
        return len(self.start)

    @property
    def tokens(self) -> int:
        return int(self.lengths.sum())

    def take(self, keep: np.ndarray) -> "Documents":
        return replace(self, which=self.which[keep], start=self.start[keep], end=self.end[keep])

    def __getitem__(self, d: int) -> np.ndarray:
        return self.arrays[self.which[d]][self.start[d] : self.end[d]]

    @property
    def lengths(self) -> np.ndarray:
        return self.end - self.start

    def trained(self, d: int) -> np.ndarray:
        """1 where a token of document d, of a chat, is trained on."""
        return self.masks[self.which[d]][self.start[d] : self.end[d]] & TRAINED


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


def open_tokens(files: Sequence[Path], vocab_size: int, eos_id: int) -> Documents:
    """Map .bin files, find the documents in them and check every id. Raises InputError for damaged or foreign files."""
    arrays, which, start, end, checksum = [], [], [], [], 0
    for path in files:
        ids, boundaries = map_tokens(path, vocab_size, eos_id)
        stops, checksum = [boundaries], zlib.crc32(boundaries.tobytes(), checksum)
        with reading(path):
            for first in range(0, len(ids), SCAN):
                part = np.array(ids[first : first + SCAN])
                for found in (int(part.max()), int(part.min())):
                    if not 0 <= found < vocab_size:
                        raise InputError(f"{path} holds the token {found}, but the model's vocabulary has {vocab_size}")
                checksum = zlib.crc32(part, checksum)
                stops.append(np.flatnonzero(part == eos_id) + first + 1)
        ends = np.concatenate(stops)
        if len(boundaries):
            warn_of_missing_ends(path, ids[boundaries - 1] != eos_id, eos_id)
            ends = np.unique(ends)
        if not len(ends) or ends[-1] != len(ids):  # the last document has no end token
            ends = np.append(ends, len(ids))
        end.append(ends)
        start.append(np.append(0, ends[:-1]))
        which.append(np.full(len(ends), len(arrays), np.int32))
        arrays.append(ids)
    return Documents(arrays, np.concatenate(which), np.concatenate(start), np.concatenate(end), checksum)


def warn_of_missing_ends(path: Path, missing: np.ndarray, eos_id: int) -> None:
    if missing.any():
        number = f"{int(missing.sum()):,} of {len(missing):,} documents in {path} do"
        warnings.warn(f"{number} not end with the end token {eos_id}: from them no model learns to stop", stacklevel=2)


def open_chats(files: Sequence[Path], vocab_size: int, eos_id: int) -> Documents:
    """Map token files of conversations and check every id. Raises InputError for damaged or foreign files."""
    arrays, masks, which, start, end, checksum = [], [], [], [], [], 0
    for path in files:
        (ids, _), beside = map_tokens(path, vocab_size, eos_id), mask_of(path)
        with reading(beside):
            mask = np.fromfile(beside, np.uint8)
        if len(mask) != len(ids) or mask.max() > (TRAINED | LAST) or not mask[-1] & LAST:
            raise InputError(f"{beside} is damaged: it must have a byte of 0 to 3 for each of {len(ids)} tokens")
        with reading(path):
            content = np.array(ids)
        if (largest := int(content.max())) >= vocab_size:
            raise InputError(f"{path} holds the token {largest}, but the model's vocabulary has {vocab_size}")
        checksum = zlib.crc32(mask, zlib.crc32(content, checksum))
        ends = np.flatnonzero(mask & LAST) + 1
        end.append(ends)
        start.append(np.append(0, ends[:-1]))
        which.append(np.full(len(ends), len(arrays), np.int32))
        arrays.append(ids)
        masks.append(mask)
    return Documents(arrays, np.concatenate(which), np.concatenate(start), np.concatenate(end), checksum, masks)


def cut(docs: Documents, seq_len: int) -> tuple[Documents, int]:
    """The conversations with at most seq_len tokens each, their first, and how many were longer."""
    longer = docs.lengths > seq_len
    return replace(docs, end=np.where(longer, docs.start + seq_len, docs.end)), int(longer.sum())


def gather_tokens(
    data: Sequence[str | Path] | None,
    tokenizer: Tokenizer,
    vocab_size: int,
    cache: Path,
    options: TextOptions = DEFAULTS,
) -> Documents:
    """All documents of `data` (None: CPython's text). Text is tokenised into `cache`; .bin files are mapped in place.

    An existing cache is used as it is, so that a resumed run sees the data it began with, also if the texts are gone.
    """
    files = None if data is None else find_files(data, texts_may_be_gone=cache.is_file())
    text = None if files is None else [p for p in files if p.suffix != ".bin"]
    if (text is None or text) and not cache.is_file():
        about = tokenise(text, tokenizer, cache, options)
        if text and about["empty"] and about["documents"]:
            warnings.warn(f"{about['empty']:,} rows and files of the data have no text and are skipped", stacklevel=2)
    mapped = [p for p in files or () if p.suffix == ".bin"]
    if cache.is_file() and cache.stat().st_size:
        mapped.insert(0, cache)
    if not mapped:
        raise InputError(f"the data is empty: no text in {', '.join(map(str, data))}")
    return open_tokens(mapped, vocab_size, tokenizer.eos_id)


def hold_out(docs: Documents, every: int) -> tuple[Documents, Documents]:
    """Split into documents to train on and to validate on: every `every`-th document; with fewer documents the last
    1/every of the longest one, or the last one of chats, which are never cut."""
    n = np.arange(len(docs))
    if len(docs) >= every or (docs.masks and len(docs) > 1):
        held_out = n % every == every - 1 if len(docs) >= every else n == len(docs) - 1
        return docs.take(~held_out), docs.take(held_out)
    longest = int(docs.lengths.argmax())
    if docs.masks or len(docs[longest]) < 2 * every:
        size = "one conversation" if docs.masks else f"{docs.tokens} tokens"
        raise InputError(f"the data is too small to hold out 1/{every} for validation: {size}")
    cut = int(docs.end[longest] - len(docs[longest]) // every)
    train = replace(docs, end=np.where(n == longest, cut, docs.end))
    return train, replace(docs.take(n == longest), start=np.array([cut]))


def join(parts: Sequence[Documents]) -> Documents:
    """The documents of several parts, without their masks."""
    if len(parts) == 1:
        return parts[0]
    arrays = [array for part in parts for array in part.arrays]
    first = np.cumsum([0, *(len(part.arrays) for part in parts)])
    which = np.concatenate([part.which + n for part, n in zip(parts, first, strict=False)]).astype(np.int32)
    start, end = (np.concatenate([getattr(part, name) for part in parts]) for name in ("start", "end"))
    checksum = zlib.crc32(np.array([part.checksum for part in parts], "<u4"))
    return Documents(arrays, which, start, end, checksum)


def describe(docs: Documents) -> dict:
    """Size and checksum of the data, which a checkpoint keeps and a resumed run compares."""
    return dict(tokens=docs.tokens, documents=len(docs), checksum=docs.checksum)


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


if __name__ == "__main__":
    from .tokenise import main

    sys.exit(main())
