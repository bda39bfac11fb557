"""Chat data: conversations as ids, and which of them are trained on.

A conversation is a row with `messages` (objects with role and content, as OpenAI has them) or `conversations` (with
from and value, as ShareGPT has them), and optionally `tools`. The chat template of the tokenizer renders it. Beside the
ids in X.bin, X.mask.bin has a byte for each: bit 0 is set where the token is trained on, bit 1 at the last token of a
conversation. X.json says "chats": true.
"""

import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from ...errors import InputError
from ...files import atomic_write
from ...tokenizer import Tokenizer
from .sources import reading
from .token_files import DTYPES

FIELDS = ("messages", "conversations")
ROLES = {"human": "user", "gpt": "assistant", "function_response": "tool", "observation": "tool"}  # of ShareGPT
TRAINED, LAST = 1, 2  # bits of a mask


def mask_of(path: Path) -> Path:
    return path.with_suffix(".mask.bin")


def is_chats(path: Path, text_field: str) -> bool:
    """Whether a file has conversations: a token file of them, or by its first row."""
    try:
        if path.suffix == ".bin":
            return json.loads(path.with_suffix(".json").read_text()).get("chats") is True
        if path.suffix not in (".jsonl", ".parquet"):
            return False
        names = next(({*row} for _, row in rows_of(path)), set())
    except (InputError, OSError, ValueError, AttributeError, RecursionError):
        return False  # whoever reads the file next says what is wrong with it
    return text_field not in names and not names.isdisjoint(FIELDS)


def rows_of(path: Path) -> Iterator[tuple[str, dict]]:
    """(where it is, row) of a .jsonl or .parquet file."""
    if path.suffix == ".parquet":
        yield from parquet_rows(path)
        return
    with reading(path), open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            source = f"{path}, line {number}"
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as error:  # RecursionError: nested too deep
                raise InputError(f"{source}: not JSON: {error}") from None
            if not isinstance(row, dict):
                raise InputError(f"{source}: it is not an object")
            yield source, row


def parquet_rows(path: Path) -> Iterator[tuple[str, dict]]:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError:
        raise InputError(f"{path} needs the package pyarrow: pip install ling_kernels[train]") from None
    number = 0
    try:
        with reading(path), parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=256):
                for row in batch.to_pylist():
                    number += 1
                    yield f"{path}, row {number}", row
    except (pyarrow.ArrowException, UnicodeDecodeError) as error:
        raise InputError(f"cannot read {path}: {error}") from None


def conversation(row: dict, source: str) -> tuple[list[dict], list | None]:
    """The messages of a row, with role and content, and its tools. Raises InputError."""
    name = next((name for name in FIELDS if row.get(name) is not None), None)
    messages = row[name] if name else None
    if not isinstance(messages, list) or not messages or not all(isinstance(m, dict) for m in messages):
        raise InputError(f"{source}: no conversation: messages is a list of objects with role and content")
    found = []
    for number, given in enumerate(messages, 1):
        message = {k: v for k, v in given.items() if v is not None or k == "content"}
        if "from" in message and "role" not in message:
            message["role"], message["content"] = message.pop("from"), message.pop("value", None)
        role = message.get("role")
        if not isinstance(role, str):
            raise InputError(f"{source}: message {number} has no role")
        if message.get("content") is None and not message.get("tool_calls"):
            raise InputError(f"{source}: message {number}, of {role}, has no content")
        message["role"] = ROLES.get(role, role)
        message["content"] = "" if message.get("content") is None else message["content"]
        found.append(message)
    tools = row.get("tools")
    if isinstance(tools, str):
        try:
            tools = json.loads(tools)
        except (ValueError, RecursionError):
            raise InputError(f"{source}: tools is text that is not JSON") from None
    if tools is not None and not isinstance(tools, list):
        raise InputError(f"{source}: tools is {type(tools).__name__}, not a list")
    return found, tools or None


def is_trained(message: dict, source: str) -> bool:
    """Whether a message is trained on, by its `weight` of 0 or 1 and `train` of true or false. Raises InputError."""
    weight, train = message.pop("weight", 1), message.pop("train", True)
    if weight not in (0, 1) or not isinstance(train, bool):
        raise InputError(f"{source}: the weight of a message is 0 or 1, and train is true or false")
    return bool(weight) and train


def encode_conversation(row: dict, source: str, tokenizer: Tokenizer, train_on: str) -> tuple[list[int], np.ndarray]:
    """Ids and mask of a conversation. Raises InputError, naming its source, for one that the template refuses and for
    one without anything to train on."""
    messages, tools = conversation(row, source)
    trained = [is_trained(message, source) for message in messages]
    if train_on == "assistant" and not any(m["role"] == "assistant" for m in messages):
        raise InputError(f"{source}: no message has the role assistant, so there is nothing to train on")
    try:
        ids, answers = tokenizer.encode_answers(messages, tools)
    except InputError as error:
        raise InputError(f"{source}: {error}") from None
    mask = np.full(len(ids), TRAINED if train_on == "all" else 0, np.uint8)
    for message, first, stop in answers:
        mask[first:stop] = trained[message]
    if not mask.any():
        raise InputError(f"{source}: every message has weight 0, so there is nothing to train on")
    mask[-1] |= LAST
    return ids, mask


def write_chats(files: Sequence[Path], tokenizer: Tokenizer, out: Path, train_on: str) -> dict:
    """Tokenise conversations into `out`, its .mask.bin and its .json, which appear complete or not at all. Returns the
    content of the .json. Raises InputError."""
    name = "uint16" if tokenizer.vocab_size <= 1 << 16 else "uint32"
    about: dict = dict(
        dtype=name, eos_id=tokenizer.eos_id, vocab_size=tokenizer.vocab_size, chats=True, train_on=train_on
    )
    about |= dict(tokens=0, trained=0, documents=0, empty=0)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        # The inner context ends first: the ids appear last.
        with atomic_write(out) as ids_file, atomic_write(mask_of(out)) as mask_file:
            with atomic_write(out.with_suffix(".json")) as sidecar:
                with open(ids_file, "wb") as one, open(mask_file, "wb") as two:
                    for path in files:
                        for source, row in rows_of(path):
                            ids, mask = encode_conversation(row, source, tokenizer, train_on)
                            one.write(np.array(ids, DTYPES[name]).tobytes())
                            two.write(mask.tobytes())
                            about["tokens"] += len(ids)
                            about["trained"] += int((mask & TRAINED).sum())
                            about["documents"] += 1
                    for file in (one, two):
                        file.flush()
                        os.fsync(file.fileno())
                if not about["documents"]:
                    raise InputError(f"the data is empty: no conversation in {', '.join(map(str, files))}")
                sidecar.write_text(json.dumps(about) + "\n")
    except OSError as error:
        raise InputError(f"cannot write {out}: {error.strerror or error}") from None
    return about
