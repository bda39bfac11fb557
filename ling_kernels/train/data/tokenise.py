"""Tokenise text into a .bin file, on all free cores."""

import functools
import itertools
import json
import os
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ...errors import InputError
from ...files import atomic_write
from ...tokenizer import Tokenizer
from ...tokenizer.words import word_encoder
from .processes import in_order
from .progress import ReadingProgress
from .sources import DEFAULTS, Position, TextOptions, cpython_documents, documents
from .token_files import DTYPES

BATCH = 1 << 19  # characters, at most 1.5 million with a piece of a document; each takes 50 bytes until it is encoded
BATCH_TEXTS = 1 << 14
MANY = 1 << 20  # characters, for which a memory of words is worth the second it takes to make


class TextBatch(NamedTuple):
    texts: list[str]
    ends: list[int]  # for each document that ends in the batch, the number of texts up to there


def tokenise(
    files: Sequence[Path] | None,
    tokenizer: Tokenizer,
    out: Path,
    options: TextOptions = DEFAULTS,
    may_be_empty: bool = False,
) -> dict:
    """Tokenise the documents in `files` (None: CPython's text) into `out` with a progress bar; see write_tokens. Raises
    InputError for files without any text, unless they may be empty."""
    position = Position()
    found = cpython_documents() if files is None else documents(files, options, position)

    names = "Python's library" if files is None else ", ".join(map(str, files))
    fault = None if may_be_empty else f"the data is empty: no text in {names}"
    with ReadingProgress(position, files or ()) as progress:
        return write_tokens(found, tokenizer, out, options.special_tokens, progress, fault)


def write_tokens(
    documents: Iterable[Iterable[str]],
    tokenizer: Tokenizer,
    out: Path,
    special_tokens: bool = False,
    progress: ReadingProgress | None = None,
    fault_if_empty: str | None = None,
) -> dict:
    """Tokenise documents into `out` and its .json; both appear complete or not at all. Returns the content of the
    .json.

    documents: each an iterable of pieces of text; those without text are skipped and counted as `empty`. Each ends with
    the end token. special_tokens: names of special tokens in the text become these tokens; the end token ends a
    document then. fault_if_empty: what the InputError says if there is no text at all; None writes empty files then.
    Raises InputError where the files cannot be written.
    """
    name = "uint16" if tokenizer.vocab_size <= 1 << 16 else "uint32"
    about: dict = dict(
        dtype=name, eos_id=tokenizer.eos_id, vocab_size=tokenizer.vocab_size, tokens=0, documents=0, empty=0
    )
    open_document = False  # its last id is written and is no end token
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        # The inner context ends first: the .json is renamed before the data.
        with atomic_write(out) as tokens, atomic_write(out.with_suffix(".json")) as sidecar:
            found = encoded(batches(documents), tokenizer, special_tokens)
            with open(tokens, "wb") as file, closing(found):
                for ids, ends in found:
                    written, open_document, empty = with_end_tokens(ids, ends, tokenizer.eos_id, open_document)
                    file.write(written.astype(DTYPES[name]).tobytes())
                    about["tokens"] += len(written)
                    about["documents"] += int((written == tokenizer.eos_id).sum())
                    about["empty"] += empty
                    if progress:
                        progress.show(about["tokens"])
                file.flush()
                os.fsync(file.fileno())
            if fault_if_empty and not about["tokens"]:
                raise InputError(fault_if_empty)
            sidecar.write_text(json.dumps(about) + "\n")
    except OSError as error:
        raise InputError(f"cannot write {out}: {error.strerror or error}") from None
    return about


def batches(documents: Iterable[Iterable[str]]) -> Iterator[TextBatch]:
    texts, ends, size = [], [], 0
    for document in documents:
        for text in filter(None, document):
            if size >= BATCH or len(texts) >= BATCH_TEXTS:
                yield TextBatch(texts, ends)
                texts, ends, size = [], [], 0
            texts.append(text)
            size += len(text)
        ends.append(len(texts))
    yield TextBatch(texts, ends)


def encoded(
    batches: Iterator[TextBatch], tokenizer: Tokenizer, special: bool
) -> Generator[tuple[list[np.ndarray], list[int]], None, None]:
    """(ids of each text, ends) of each batch, in order."""
    first = [*itertools.islice(batches, 2)]
    many = sum(len(text) for batch in first for text in batch.texts) >= MANY
    by_words = word_encoder(tokenizer) if many and not special else None
    encode = by_words.encode_batch if by_words else functools.partial(tokenizer.encode_batch, special=special)
    alone = tokenizer.backend is None and not special  # bytes take less time than their way to another process
    yield from in_order(functools.partial(encode_batch, encode), itertools.chain(first, batches), alone)


def encode_batch(encode: Callable, batch: TextBatch) -> tuple[list[np.ndarray], list[int]]:
    return encode(batch.texts), batch.ends


def with_end_tokens(
    ids: list[np.ndarray], ends: list[int], eos: int, open_document: bool
) -> tuple[np.ndarray, bool, int]:
    """The ids of a batch with the end tokens that they lack; whether they end inside a document; the number of
    documents without text. open_document: whether the batch begins inside one."""
    end_token, parts, first, empty = np.array([eos], np.uint32), [], 0, 0
    begun = open_document
    for end in [*ends, None]:
        for part in ids[first:end]:
            if len(part):
                parts.append(part)
                begun, open_document = True, part[-1] != eos
        if end is None:
            break
        if open_document:
            parts.append(end_token)
        empty += not begun
        begun, open_document, first = False, False, end
    return (np.concatenate(parts) if parts else end_token[:0]), open_document, empty
