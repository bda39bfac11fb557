"""Tokens on disk, and packing: an endless stream of rows that is a pure function of (documents, seed, row number).

Text is tokenised once into a .bin file, memory-mapped from there on: little-endian uint16 or uint32 ids, every document
followed by the end token, and beside X.bin an X.json with dtype, eos_id and vocab_size. `python -m
ling_kernels.train.data SOURCES --out X.bin` writes such a file.

An epoch is all documents in an order of its own, one after the other; epochs follow one another without a gap, and all
that is cut into pieces of seq_len tokens. The rows are those pieces, shuffled once more, an epoch of them (or a
million) at a time: neighbours in a document are no neighbours in a batch.
"""

import argparse
import functools
import json
import os
import sys
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..errors import InputError, command
from ..files import whole
from ..tokenizer import Tokenizer, load_tokenizer
from .sources import cpython_documents, documents, find_files, reading

DTYPES = {"uint16": np.dtype("<u2"), "uint32": np.dtype("<u4")}
SCAN = 1 << 24  # ids read at a time
BLOCK = 1 << 20  # rows shuffled among themselves at most
ROWS, DOCUMENTS = 0, 1  # what is shuffled


@dataclass(frozen=True)
class Documents:
    """Document d is arrays[which[d]][start[d] : end[d]], its end token included where it has one."""

    arrays: list[np.ndarray]
    which: np.ndarray  # [n] int32
    start: np.ndarray  # [n] int64
    end: np.ndarray  # [n] int64
    checksum: int  # of all ids, so that a resumed run knows its data again

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
        """How many positions have a token `ahead` of them in the same document and row."""
        return int((self.cu_seqlens.diff() - ahead).clamp(min=0).sum())


def write_tokens(pieces: Iterable[Iterable[bytes]], tokenizer: Tokenizer, out: Path) -> dict:
    """Tokenise documents into `out` and its .json; both appear whole or not at all. Returns what the .json says."""
    name = "uint16" if tokenizer.vocab_size <= 1 << 16 else "uint32"
    eos = np.array([tokenizer.eos_id], DTYPES[name]).tobytes()
    count = number = 0
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with whole(out) as tokens, whole(out.with_suffix(".json")) as sidecar:  # which takes its name first
            with open(tokens, "wb") as file:
                for document in pieces:
                    before = count
                    for piece in document:
                        ids = tokenizer.encode_bytes(piece)
                        file.write(ids.astype(DTYPES[name]).tobytes())
                        count += len(ids)
                    if count > before:  # an empty document is none
                        file.write(eos)
                        count, number = count + 1, number + 1
                file.flush()
                os.fsync(file.fileno())
            about = dict(dtype=name, eos_id=tokenizer.eos_id, vocab_size=tokenizer.vocab_size)
            about |= dict(tokens=count, documents=number)
            sidecar.write_text(json.dumps(about) + "\n")
    except OSError as error:
        raise InputError(f"cannot write {out}: {error.strerror or error}") from None
    return about


def open_tokens(files: Sequence[Path], vocab_size: int, eos_id: int) -> Documents:
    """Map .bin files, find their documents and check every id in one pass."""
    arrays, which, start, end, checksum = [], [], [], [], 0
    for path in files:
        ids = map_tokens(path, vocab_size, eos_id)
        stops = []
        with reading(path):
            for at in range(0, len(ids), SCAN):
                some = np.array(ids[at : at + SCAN])
                if (worst := int(some.max())) >= vocab_size:
                    raise InputError(f"{path} holds the token {worst}, and the model's vocabulary ends at {vocab_size}")
                checksum = zlib.crc32(some, checksum)
                stops.append(np.flatnonzero(some == eos_id) + at + 1)
        ends = np.concatenate(stops)
        if not len(ends) or ends[-1] != len(ids):  # what follows the last end token is a document too
            ends = np.append(ends, len(ids))
        end.append(ends)
        start.append(np.append(0, ends[:-1]))
        which.append(np.full(len(ends), len(arrays), np.int32))
        arrays.append(ids)
    return Documents(arrays, np.concatenate(which), np.concatenate(start), np.concatenate(end), checksum)


def map_tokens(path: Path, vocab_size: int, eos_id: int) -> np.ndarray:
    sidecar = path.with_suffix(".json")
    try:
        about = json.loads(sidecar.read_text())
        its_dtype, its_eos, its_vocab = about["dtype"], int(about["eos_id"]), int(about["vocab_size"])
        dtype = DTYPES[its_dtype]
    except OSError as error:
        raise InputError(f"{path} needs {sidecar.name} beside it: {error.strerror or error}") from None
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{sidecar} must give dtype (uint16 or uint32), eos_id and vocab_size: {error!r}") from None
    if its_vocab > vocab_size:
        raise InputError(f"{path} is of a tokenizer with {its_vocab} tokens, more than the model's {vocab_size}")
    if its_eos != eos_id:
        raise InputError(f"{path} ends documents with token {its_eos}, the tokenizer with {eos_id}: name its tokenizer")
    with reading(path):
        size = path.stat().st_size
        if size == 0:
            raise InputError(f"{path} holds no tokens")
        if size % dtype.itemsize or about.get("tokens", size // dtype.itemsize) * dtype.itemsize != size:
            raise InputError(
                f"{path} is truncated: {size} bytes, where {sidecar.name} tells of {about.get('tokens')} ids"
            )
        return np.memmap(path, dtype, "r")


def gather_tokens(
    data: Sequence[str | Path] | None, tokenizer: Tokenizer, vocab_size: int, cache: Path, text_field: str = "text"
) -> Documents:
    """All documents of `data`, or of CPython where it is None: text is tokenised into `cache`, .bin mapped in place.

    A cache that is there already is taken as it is: a resumed run sees the data it began with."""
    files = None if data is None else find_files(data)
    text = None if files is None else [p for p in files if p.suffix != ".bin"]
    if (text is None or text) and not cache.is_file():
        write_tokens(cpython_documents() if text is None else documents(text, text_field), tokenizer, cache)
    mapped = [p for p in files or () if p.suffix == ".bin"]
    if cache.is_file() and cache.stat().st_size:
        mapped.insert(0, cache)
    if not mapped:
        raise InputError(f"the data is empty: no text in {', '.join(map(str, data))}")
    return open_tokens(mapped, vocab_size, tokenizer.eos_id)


def hold_out(docs: Documents, every: int) -> tuple[Documents, Documents]:
    """Documents to train on and documents to validate on: every `every`-th. Where there are fewer than that, the last
    1/every of the longest."""
    n = np.arange(len(docs))
    if len(docs) >= every:
        kept = n % every == every - 1
        return docs.take(~kept), docs.take(kept)
    longest = int((docs.end - docs.start).argmax())
    if len(docs[longest]) < 2 * every:
        raise InputError(f"the data is too small to hold out 1/{every} for validation: {docs.tokens} tokens")
    cut = int(docs.end[longest] - len(docs[longest]) // every)
    train = replace(docs, end=np.where(n == longest, cut, docs.end))
    return train, replace(docs.take(n == longest), start=np.array([cut]))


class Packed:
    """Rows of seq_len tokens out of documents; `seed` orders them anew every epoch, None keeps their order."""

    def __init__(self, docs: Documents, seq_len: int, seed: int | None):
        self.docs, self.seq_len, self.seed = docs, seq_len, seed
        self.per_epoch = docs.tokens
        self.block = min(max(self.per_epoch // seq_len, 1), BLOCK)  # rows that are shuffled among themselves
        self._shuffle = functools.lru_cache(maxsize=4)(self._shuffle)  # a block of rows meets two epochs of documents

    def batch(self, rows: Sequence[int]) -> Batch:
        """The rows of these numbers. Only the arguments decide: no state is carried from call to call."""
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
        """The stream of documents from `position` to the end of the document it lies in."""
        epoch, within = divmod(position, self.per_epoch)
        order, ends = self._shuffle(DOCUMENTS, epoch)
        i = int(np.searchsorted(ends, within, side="right"))
        document = self.docs[order[i]]
        return document[len(document) - int(ends[i] - within) :]

    def _shuffle(self, what: int, number: int):
        """The order of a block's rows; or of an epoch's documents, and where each of them ends then."""
        size = self.block if what == ROWS else len(self.docs)
        if self.seed is None:
            order = np.arange(size)
        else:
            # Raw bits of a counter-based generator: numpy promises them for ever, its permutation() it does not.
            bits = np.random.Philox(key=[self.seed, 2 * number + what])
            order = np.argsort(bits.random_raw(size), kind="stable")
        return order if what == ROWS else (order, np.cumsum((self.docs.end - self.docs.start)[order]))


@command
def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser("python -m ling_kernels.train.data", description="Tokenise text into a .bin file.")
    parser.add_argument("sources", nargs="*", help=".txt, .jsonl, .parquet, or folders of them (default: CPython's)")
    parser.add_argument("--out", required=True, type=Path, help="the .bin file to write; its .json is put beside it")
    parser.add_argument("--tokenizer", help="a tokenizer.json or its folder (default: byte-level)")
    parser.add_argument("--text-field", default="text", help="field or column with the text (default: %(default)s)")
    args = parser.parse_args(argv)
    if args.out.suffix != ".bin":
        raise InputError(f"--out {args.out} does not end in .bin")
    if args.out.exists():
        raise InputError(f"{args.out} exists; it is not overwritten")
    tokenizer = load_tokenizer(args.tokenizer)
    files = find_files(args.sources)
    if binary := [p for p in files if p.suffix == ".bin"]:
        raise InputError(f"{binary[0]} is tokenised already")
    about = write_tokens(documents(files, args.text_field) if files else cpython_documents(), tokenizer, args.out)
    print(f"{args.out}: {about['tokens']:,} tokens of {about['documents']:,} documents, {about['dtype']}")


if __name__ == "__main__":
    sys.exit(main())
