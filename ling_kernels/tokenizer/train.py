"""python -m ling_kernels.tokenizer.train DATA... --out FOLDER: a byte-level BPE tokenizer of the data.

The folder gets a tokenizer.json and a tokenizer_config.json that AutoTokenizer reads too. Ids 0..255 are the bytes,
then come the merges, most frequent first, then Ling's special tokens; the chat template is Ling's. Equal data gives
equal files. It needs the package tokenizers, and no torch.
"""

import json
import sys
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from ..commands import Parser, command
from ..errors import InputError
from ..files import user_path
from ..train.data.chats import chats_and_texts  # this file is a command, so it may look above its room
from ..train.data.conversations import COLUMNS, conversation, message_texts
from ..train.data.sources import DEFAULTS, TextOptions, documents, find_files, rows
from .byte_level import SPECIAL_TOKENS, byte_settings, byte_tokenizer_json
from .tokenizer import Tokenizer

LEAST = 256 + len(SPECIAL_TOKENS)
# What BPE may not merge across, in the order of what is tried: an English contraction's ending; a word with the one
# character before it, mostly a space; a digit; punctuation with the line ends after it; line ends; spaces except the
# last before a word. As in GPT-4's cl100k, but each digit is alone as in Qwen2 and Qwen3, and a combining mark belongs
# to its word as in GPT-4o's o200k, without which the words of Hindi or Thai fall apart.
SPLIT = "|".join([
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)", r"[^\r\n\p{L}\p{M}\p{N}]?[\p{L}\p{M}]+", r"\p{N}",
    r" ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*", r"\s*[\r\n]+", r"\s+(?!\S)", r"\s+",
])  # fmt: skip


def train_tokenizer(texts: Iterable[str], vocab: int = 32768) -> Tokenizer:
    """A byte-level BPE tokenizer of the texts, with `vocab` tokens, or fewer where no pair of tokens occurs twice any
    more. Raises InputError without the package tokenizers, and for a vocabulary smaller than bytes and special tokens.
    """
    if vocab < LEAST:
        raise InputError(f"--vocab {vocab}: the bytes and Ling's special tokens alone are {LEAST}")
    try:
        import tokenizers
    except ImportError:
        raise InputError("training a tokenizer needs the package tokenizers: pip install '.[train]'") from None
    split = {"type": "Split", "pattern": {"Regex": SPLIT}, "behavior": "Isolated", "invert": False}
    content: dict[str, Any] = byte_tokenizer_json()
    content["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [split, content["pre_tokenizer"]]}
    byte_ids = content["model"]["vocab"]
    backend = tokenizers.Tokenizer.from_str(json.dumps(content | {"added_tokens": []}))
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocab - len(SPECIAL_TOKENS), min_frequency=2, initial_alphabet=list(byte_ids),
        show_progress=sys.stderr.isatty(),
    )  # fmt: skip
    backend.train_from_iterator(texts, trainer)
    model = json.loads(backend.to_str())["model"]
    merged = sorted(model["vocab"].keys() - byte_ids.keys(), key=model["vocab"].get)
    ids = {token: i for i, token in enumerate([*byte_ids, *merged])}
    content["model"] |= {"vocab": ids, "merges": model["merges"]}
    content["added_tokens"] = [
        token | {"id": len(ids) + i} for i, token in enumerate(byte_tokenizer_json()["added_tokens"])
    ]
    return Tokenizer(tokenizers.Tokenizer.from_str(json.dumps(content)), byte_settings())


def texts_of(data: Sequence[str], options: TextOptions = DEFAULTS) -> Iterator[str]:
    """The text of data files, of chats that of their messages, in pieces of about a megabyte. Raises InputError for
    data that is not text."""
    files = find_files(data)
    if tokens := [path for path in files if path.suffix == ".bin"]:
        raise InputError(f"{tokens[0]} holds tokens, not text")
    chats, texts = chats_and_texts(files, options)
    for document in documents(texts, options):
        yield from document
    for path in chats:
        for source, row in rows(path, options, columns=COLUMNS, any_of=True):
            yield from message_texts(conversation(row, source)[0])


@command
def main(argv: Sequence[str] | None = None) -> None:
    parser = Parser("python -m ling_kernels.tokenizer.train", description="Train a byte-level BPE tokenizer.")
    parser.add_argument("data", nargs="+", help="files of text or chats, as for --data of the trainer, or folders")
    parser.add_argument("--out", required=True, help="folder for tokenizer.json and tokenizer_config.json")
    parser.add_argument(
        "--vocab", type=int, default=32768, metavar="N", help="tokens, special ones too (default: 32768)"
    )
    parser.add_argument("--text-field", default="text", help="field or column that holds the text (default: text)")
    parser.add_argument("--encoding", default="utf-8", help="of the text (default: utf-8)")
    args = parser.parse_args(argv)
    options = TextOptions(args.text_field, args.encoding)
    file = user_path(args.out, "--out") / "tokenizer.json"
    if file.exists():
        raise InputError(f"{file} exists already: give another --out")
    tokenizer = train_tokenizer(texts_of(args.data, options), args.vocab)
    tokenizer.save(file.parent)
    few = f", as no pair of them occurs twice: --vocab {args.vocab} needs more text" * (
        tokenizer.vocab_size < args.vocab
    )
    print(f"{args.out}: {tokenizer.vocab_size:,} tokens{few}")


if __name__ == "__main__":
    sys.exit(main())
