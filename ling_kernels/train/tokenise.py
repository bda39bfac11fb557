"""Tokenise text into a .bin file; the command `python -m ling_kernels.train.data`."""

import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from ..errors import InputError, Parser, command
from ..files import atomic_write, user_path
from ..tokenizer import Tokenizer, load_tokenizer
from .sources import DEFAULTS, TextOptions, cpython_documents, documents, find_files
from .token_files import DTYPES


def tokenise(files: Sequence[Path] | None, tokenizer: Tokenizer, out: Path, options: TextOptions = DEFAULTS) -> dict:
    """Tokenise the documents in `files` (None: CPython's text) into `out`; see write_tokens."""
    return write_tokens(cpython_documents() if files is None else documents(files, options), tokenizer, out)


def write_tokens(documents: Iterable[Iterable[bytes]], tokenizer: Tokenizer, out: Path) -> dict:
    """Tokenise documents into `out` and its .json; both appear complete or not at all. Returns the content of the
    .json.

    documents: each an iterable of UTF-8 pieces; those without text are skipped and counted as `empty`. Raises
    InputError where the files cannot be written.
    """
    name = "uint16" if tokenizer.vocab_size <= 1 << 16 else "uint32"
    eos = np.array([tokenizer.eos_id], DTYPES[name]).tobytes()
    count = number = empty = 0
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        # The inner context ends first: the .json is renamed before the data.
        with atomic_write(out) as tokens, atomic_write(out.with_suffix(".json")) as sidecar:
            with open(tokens, "wb") as file:
                for document in documents:
                    before = count
                    for piece in document:
                        ids = tokenizer.encode_bytes(piece)
                        file.write(ids.astype(DTYPES[name]).tobytes())
                        count += len(ids)
                    if count > before:
                        file.write(eos)
                        count, number = count + 1, number + 1
                    else:
                        empty += 1
                file.flush()
                os.fsync(file.fileno())
            about = dict(dtype=name, eos_id=tokenizer.eos_id, vocab_size=tokenizer.vocab_size)
            about |= dict(tokens=count, documents=number, empty=empty)
            sidecar.write_text(json.dumps(about) + "\n")
    except OSError as error:
        raise InputError(f"cannot write {out}: {error.strerror or error}") from None
    return about


@command
def main(argv: Sequence[str] | None = None) -> None:
    parser = Parser("python -m ling_kernels.train.data", description="Tokenise text into a .bin file.")
    parser.add_argument("sources", nargs="*", help=".txt, .jsonl, .parquet, or folders of them (default: CPython's)")
    parser.add_argument("--out", required=True, help="the .bin file to write; its .json is put beside it")
    parser.add_argument("--tokenizer", help="a tokenizer.json or its folder (default: byte-level)")
    parser.add_argument("--text-field", default="text", help="field or column with the text (default: %(default)s)")
    args = parser.parse_args(argv)
    out = user_path(args.out)
    if out.suffix != ".bin":
        raise InputError(f"--out {out} must end in .bin")
    if out.exists():
        raise InputError(f"{out} exists; it is not overwritten")
    tokenizer = load_tokenizer(args.tokenizer)
    files = find_files(args.sources)
    if binary := [p for p in files if p.suffix == ".bin"]:
        raise InputError(f"{binary[0]} is tokenised already")
    about = tokenise(files or None, tokenizer, out, TextOptions(args.text_field))
    skipped = f"; {about['empty']:,} without text are skipped" if about["empty"] else ""
    print(f"{out}: {about['tokens']:,} tokens of {about['documents']:,} documents, {about['dtype']}{skipped}")
