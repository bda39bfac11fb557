"""Chat data: conversations as ids, and which of them are trained on.

A conversation is a row with `messages` (objects with role and content, as OpenAI has them) or `conversations` (with
from and value, as ShareGPT has them), and optionally `tools` and `thinking`. The chat template of the tokenizer renders
it. Beside the ids in X.bin, X.mask.bin has a byte for each: bit 0 is set where the token is trained on, bit 1 at the
last token of a conversation. X.json says "chats": true.
"""

import functools
import json
import os
from collections.abc import Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np

from ...errors import InputError
from ...files import atomic_write
from ...tokenizer import Tokenizer
from .conversations import COLUMNS, FIELDS, conversation, thinking_of
from .processes import in_order
from .progress import ReadingProgress
from .sources import DEFAULTS, Position, TextOptions, first_fields, rows
from .token_files import DTYPES

TRAINED, LAST = 1, 2  # bits of a mask
BATCH, BATCH_BYTES = 256, 1 << 20  # rows, and about the bytes of a file, that are encoded together


def mask_of(path: Path) -> Path:
    return path.with_suffix(".mask.bin")


def chats_and_texts(files: Sequence[Path], options: TextOptions = DEFAULTS) -> tuple[list[Path], list[Path]]:
    """The files that have conversations, and the others."""
    chats = [path for path in files if is_chats(path, options)]
    return chats, [path for path in files if path not in chats]


def is_chats(path: Path, options: TextOptions) -> bool:
    """Whether a file has conversations: a token file of them, or by its columns or its first row."""
    try:
        if path.suffix == ".bin":
            return json.loads(path.with_suffix(".json").read_text()).get("chats") is True
        found = first_fields(path, options)
    except (InputError, OSError, ValueError, AttributeError, RecursionError):
        return False  # whoever reads the file next says what is wrong with it
    return options.text_field not in found and not {*FIELDS}.isdisjoint(found)


def is_trained(message: dict, source: str) -> bool:
    """Whether a message is trained on, by its `weight` of 0 or 1 and `train` of true or false. Raises InputError."""
    weight, train = message.pop("weight", 1), message.pop("train", True)
    if weight not in (0, 1) or not isinstance(train, bool):
        raise InputError(f"{source}: the weight of a message is 0 or 1, and train is true or false")
    return bool(weight) and train


def encode_conversation(row: Any, source: str, tokenizer: Tokenizer, train_on: str) -> tuple[list[int], np.ndarray]:
    """Ids and mask of a conversation. Raises InputError, naming its source, for one that the template refuses and for
    one without anything to train on."""
    messages, tools = conversation(row, source)
    thinking = thinking_of(row, source)
    if thinking is False:  # the same answer without its thought
        messages = [{k: v for k, v in m.items() if k != "reasoning_content"} for m in messages]
    trained = [is_trained(message, source) for message in messages]
    if train_on == "assistant" and not any(m["role"] == "assistant" for m in messages):
        raise InputError(f"{source}: no message has the role assistant, so there is nothing to train on")
    try:
        ids, answers = tokenizer.encode_answers(messages, tools, thinking)
    except InputError as error:
        raise InputError(f"{source}: {error}") from None
    mask = np.full(len(ids), TRAINED if train_on == "all" else 0, np.uint8)
    for message, first, stop in answers:
        mask[first:stop] = trained[message]
    if not mask.any():
        raise InputError(f"{source}: every message has weight 0, so there is nothing to train on")
    mask[-1] |= LAST
    return ids, mask


def encode_conversations(
    rows: Sequence[tuple[str, Any]], tokenizer: Tokenizer, train_on: str
) -> tuple[np.ndarray, np.ndarray]:
    """Ids and mask of (source, row) of several conversations, put together."""
    ids, masks = zip(*(encode_conversation(row, source, tokenizer, train_on) for source, row in rows), strict=True)
    return np.array([i for part in ids for i in part], np.uint32), np.concatenate(masks)


def batches(files: Sequence[Path], options: TextOptions, position: Position) -> Iterator[list[tuple[str, Any]]]:
    batch: list[tuple[str, Any]] = []
    begin = 0
    for path in files:
        for found in rows(path, options, position, COLUMNS, any_of=True):
            batch.append(found)
            if len(batch) == BATCH or position.bytes - begin > BATCH_BYTES:
                yield batch
                batch, begin = [], position.bytes
        position.file_is_done(path.stat().st_size)
    if batch:
        yield batch


def write_chats(
    files: Sequence[Path], tokenizer: Tokenizer, out: Path, train_on: str, options: TextOptions = DEFAULTS
) -> dict:
    """Tokenise conversations into `out`, its .mask.bin and its .json, which appear complete or not at all. Returns the
    content of the .json. Raises InputError."""
    name = "uint16" if tokenizer.vocab_size <= 1 << 16 else "uint32"
    about: dict = dict(
        dtype=name, eos_id=tokenizer.eos_id, vocab_size=tokenizer.vocab_size, chats=True, train_on=train_on
    )
    about |= dict(tokens=0, trained=0, documents=0, empty=0)
    position = Position()
    encode = functools.partial(encode_conversations, tokenizer=tokenizer, train_on=train_on)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        # The inner context ends first: the ids appear last.
        with atomic_write(out) as ids_file, atomic_write(mask_of(out)) as mask_file:
            with atomic_write(out.with_suffix(".json")) as sidecar, ReadingProgress(position, files) as progress:
                found = in_order(encode, batches(files, options, position))
                with open(ids_file, "wb") as one, open(mask_file, "wb") as two, closing(found):
                    for ids, mask in found:
                        one.write(ids.astype(DTYPES[name]).tobytes())
                        two.write(mask.tobytes())
                        about["tokens"] += len(ids)
                        about["trained"] += int((mask & TRAINED).sum())
                        about["documents"] += int((mask & LAST > 0).sum())
                        progress.show(about["tokens"])
                    for file in (one, two):
                        file.flush()
                        os.fsync(file.fileno())
                if not about["documents"]:
                    raise InputError(f"the data is empty: no conversation in {', '.join(map(str, files))}")
                sidecar.write_text(json.dumps(about) + "\n")
    except OSError as error:
        raise InputError(f"cannot write {out}: {error.strerror or error}") from None
    return about
