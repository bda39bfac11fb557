"""python -m ling_kernels.train.data SOURCES --out X.bin: tokenise text or chats into a .bin file."""

import sys
from collections.abc import Sequence
from dataclasses import fields

from ...errors import InputError, Parser, command
from ...files import user_path
from ...tokenizer import load_tokenizer
from ..flags import add_flag
from ..settings import TEXT_SETTINGS, Settings
from ..signals import STOPPED, interrupted_by_sigterm
from .chats import chats_and_texts, write_chats
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
    sources, out, tokenizer = options.pop("sources"), user_path(options.pop("out")), options.pop("tokenizer")
    if out.suffix != ".bin":
        raise InputError(f"--out {out} must end in .bin")
    if out.exists():
        raise InputError(f"{out} exists; it is not overwritten")
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


if __name__ == "__main__":
    sys.exit(main())
