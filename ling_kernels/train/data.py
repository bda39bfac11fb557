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
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..errors import InputError
from ..tokenizer import Tokenizer
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

    def __len__(self) -> int:
        return len(self.start)

    @property
    def tokens(self) -> int:
        return int((self.end - self.start).sum())

    def take(self, keep: np.ndarray) -> "Documents":
        return replace(self, which=self.which[keep], start=self.start[keep], end=self.end[keep])

    def __getitem__(self, d: int) -> np.ndarray:
        return self.arrays[self.which[d]][self.start[d] : self.end[d]]


class Batch(NamedTuple):
    ids: Tensor  # [rows, seq_len] int64
    cu_seqlens: Tensor  # [n + 1] int32: where documents and rows start in the flattened ids

    def targets(self, ahead: int = 1) -> int:
        """Number of positions with a token `ahead` positions later in the same document and row."""
        return int((self.cu_seqlens.diff() - ahead).clamp(min=0).sum())


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
    """Split into documents to train on and to validate on: every `every`-th document, or with fewer documents the last
    1/every of the longest one."""
    n = np.arange(len(docs))
    if len(docs) >= every:
        held_out = n % every == every - 1
        return docs.take(~held_out), docs.take(held_out)
    longest = int((docs.end - docs.start).argmax())
    if len(docs[longest]) < 2 * every:
        raise InputError(f"the data is too small to hold out 1/{every} for validation: {docs.tokens} tokens")
    cut = int(docs.end[longest] - len(docs[longest]) // every)
    train = replace(docs, end=np.where(n == longest, cut, docs.end))
    return train, replace(docs.take(n == longest), start=np.array([cut]))


def describe(docs: Documents) -> dict:
    """Size and checksum of the data, which a checkpoint keeps and a resumed run compares."""
    return dict(tokens=docs.tokens, documents=len(docs), checksum=docs.checksum)


class Packed:
    """Rows of seq_len tokens from documents. seed shuffles them, differently in each epoch; None keeps their order."""

    def __init__(self, docs: Documents, seq_len: int, seed: int | None):
        self.docs, self.seq_len, self.seed = docs, seq_len, seed
        self.per_epoch = docs.tokens
        self.block = min(max(self.per_epoch // seq_len, 1), BLOCK)  # rows in a block
        self._shuffle = functools.lru_cache(maxsize=4)(self._permutation)  # a block spans two epochs of documents

    def batch(self, rows: Sequence[int]) -> Batch:
        """The rows with these numbers. The result depends on nothing else: no state is kept between calls."""
        ids = np.empty((len(rows), self.seq_len), np.int64)
        starts = []
        for i, row in enumerate(rows):
            block, within = divmod(row, self.block)
            piece = block * self.block + int(self._shuffle(ROWS, block)[within])
            filled = 0
            while filled < self.seq_len:
                starts.append(i * self.seq_len + filled)
                run = self._run(piece * self.seq_len + filled)[: self.seq_len - filled]
                ids[i, filled : filled + len(run)] = run
                filled += len(run)
        starts.append(ids.size)
        return Batch(torch.from_numpy(ids), torch.tensor(starts, dtype=torch.int32))

    def _run(self, position: int) -> np.ndarray:
        """The stream from `position` to the end of the document there."""
        epoch, within = divmod(position, self.per_epoch)
        order, ends = self._shuffle(DOCUMENTS, epoch)
        i = int(np.searchsorted(ends, within, side="right"))
        document = self.docs[order[i]]
        return document[len(document) - int(ends[i] - within) :]

    def _permutation(self, kind: int, number: int):
        """The order of the rows of block `number`; or the order of epoch `number`'s documents, and their ends."""
        size = self.block if kind == ROWS else len(self.docs)
        if self.seed is None:
            order = np.arange(size)
        else:
            # numpy guarantees the raw bits of Philox in all versions, but not the result of permutation().
            bits = np.random.Philox(key=[self.seed, 2 * number + kind])
            order = np.argsort(bits.random_raw(size), kind="stable")
        return order if kind == ROWS else (order, np.cumsum((self.docs.end - self.docs.start)[order]))


if __name__ == "__main__":
    from .tokenise import main

    sys.exit(main())
