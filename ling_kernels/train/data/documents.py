"""Documents of token ids. Text is tokenised once into a .bin file (tokenise.py), which is memory-mapped."""

import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from ...errors import InputError, warn
from ...tokenizer import Tokenizer
from .chats import LAST, TRAINED, mask_of
from .sources import DEFAULTS, TextOptions, find_files, reading
from .token_files import map_tokens
from .tokenise import tokenise

SCAN = 1 << 24  # ids read at a time


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

    @property
    def trained_tokens(self) -> int:
        """Tokens of chats that are trained on."""
        total = 0
        for i, mask in enumerate(self.masks):
            here = self.which == i
            bounds = np.stack([self.start[here], self.end[here]], 1).ravel()
            trained = np.append(mask & TRAINED, 0)  # so that a bound may be the mask's end
            total += int(np.add.reduceat(trained, bounds, dtype=np.int64)[::2].sum()) if len(bounds) else 0
        return total

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
        warn(f"{number} not end with the end token {eos_id}: from them no model learns to stop")


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


def cut(docs: Documents, seq_len: int) -> tuple[Documents, int, int]:
    """The conversations with at most seq_len tokens each, their first, without those whose answers begin later; how
    many were longer, and how many of these are left out."""
    longer = docs.lengths > seq_len
    docs = replace(docs, end=np.where(longer, docs.start + seq_len, docs.end))
    # The first token of a row is not predicted.
    empty = [d for d in np.flatnonzero(longer).tolist() if not docs.trained(d)[1:].any()]
    return docs.take(np.delete(np.arange(len(docs)), empty)) if empty else docs, int(longer.sum()), len(empty)


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
        about = tokenise(text, tokenizer, cache, options, may_be_empty=len(text or ()) < len(files or ()))
        if text and about["empty"] and about["documents"]:
            warn(f"{about['empty']:,} rows and files of the data have no text and are skipped")
    mapped = [p for p in files or () if p.suffix == ".bin"]
    if cache.is_file() and cache.stat().st_size:
        mapped.insert(0, cache)
    if not mapped:
        raise InputError(f"the data is empty: no text in {', '.join(map(str, data or ()))}")
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
