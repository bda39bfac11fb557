"""python -m ling_kernels.train.data SOURCES --out X.bin: tokenise text or chats into a .bin file."""

import os
import sys
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path

from ...commands import Parser, command
from ...errors import InputError
from ...files import read_json, user_path
from ...tokenizer import load_tokenizer
from ..flags import add_flag
from ..settings import TEXT_SETTINGS, Settings
from ..signals import STOPPED, interrupted_by_sigterm
from .chats import chats_and_texts, mask_of, write_chats
from .sources import find_files
from .tokenise import tokenise


@command
def main(argv: Sequence[str] | None = None) -> int:
    parser = Parser("python -m ling_kernels.train.data", description="Tokenise text into a .bin file.")
    parser.add_argument(
        "sources", nargs="*",
        help="text files, .json, .jsonl, .parquet, .arrow, or folders of them; .gz and .zst too (default: CPython's)",
    )  # fmt: skip
    parser.add_argument("--out", required=True, help="the .bin file to write; its .json is put beside it")
    parser.add_argument("--tokenizer", help="a tokenizer.json or its folder (default: byte-level)")
    for f in fields(Settings):
        if f.name in (*TEXT_SETTINGS, "train_on"):
            add_flag(parser.add_argument, f)
    options = vars(parser.parse_args(argv))
    sources, out, tokenizer = options.pop("sources"), user_path(options.pop("out"), "--out"), options.pop("tokenizer")
    if out.suffix != ".bin":
        raise InputError(f"--out {out} must end in .bin")
    if out.exists():
        raise InputError(f"{out} exists; it is not overwritten")
    check_beside(out)
    settings = Settings(**options)
    text_options, train_on = settings.text_options, settings.train_on
    tokenizer = load_tokenizer(tokenizer)
    files = find_files(sources)
    if binary := [p for p in files if p.suffix == ".bin"]:
        raise InputError(f"{binary[0]} is tokenised already")
    chats, texts = chats_and_texts(files, text_options)
    if chats and texts:
        raise InputError(f"{chats[0]} has chats and {texts[0]} has texts: write a file for each kind")
    try:
        with interrupted_by_sigterm():
            if chats:
                about = write_chats(chats, tokenizer, out, train_on, text_options)
            else:
                about = tokenise(texts or None, tokenizer, out, text_options)
    except KeyboardInterrupt:
        print(f"stopped: {out} is not written", file=sys.stderr)
        return STOPPED
    skipped = f"; {about['empty']:,} without text are skipped" if about["empty"] else ""
    print(f"{out}: {about['tokens']:,} tokens of {about['documents']:,} documents, {about['dtype']}{skipped}")
    return 0


def check_beside(out: Path) -> None:
    """Raise InputError where a file of another kind has a name that one beside `out` would get, as data.json has where
    its tokens go to data.bin. Files that a killed process left without `out` are written again."""
    about = out.with_suffix(".json")
    if os.path.lexists(about) and not is_about_tokens(about):
        raise InputError(f"{about} exists; it is not overwritten, and would be beside {out}: name another --out")
    if os.path.lexists(mask_of(out)) and not about.exists():
        raise InputError(f"{mask_of(out)} exists; it is not overwritten, and may be beside {out}: name another --out")


def is_about_tokens(path: Path) -> bool:
    try:
        return {"dtype", "eos_id", "vocab_size"} <= read_json(path).keys()
    except InputError:
        return False


if __name__ == "__main__":
    sys.exit(main())
