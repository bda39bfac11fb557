"""Files of token ids. X.bin holds little-endian uint16 or uint32 ids, each document followed by the end token; X.json
beside it gives dtype, eos_id and vocab_size. Megatron's X.bin has X.idx beside it instead, see megatron.py."""

import json
from pathlib import Path

import numpy as np

from ...errors import InputError
from .megatron import map_megatron
from .sources import reading

DTYPES = {"uint16": np.dtype("<u2"), "uint32": np.dtype("<u4")}


def map_tokens(path: Path, vocab_size: int, eos_id: int) -> tuple[np.ndarray, np.ndarray]:
    """The ids of a .bin file, mapped, and where its documents end besides at the end tokens. Raises InputError for a
    damaged file, and for one that another tokenizer wrote, as far as it says so."""
    sidecar = path.with_suffix(".json")
    if not sidecar.exists() and path.with_suffix(".idx").is_file():
        return map_megatron(path)
    try:
        about = json.loads(sidecar.read_text())
        dtype, file_eos, file_vocab = DTYPES[about["dtype"]], int(about["eos_id"]), int(about["vocab_size"])
        tokens = int(about["tokens"]) if "tokens" in about else None
    except OSError as error:
        raise InputError(
            f"{path} needs {sidecar.name} or Megatron's {path.stem}.idx beside it: {error.strerror or error}"
        ) from None
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError) as error:
        raise InputError(f"{sidecar} must give dtype (uint16 or uint32), eos_id and vocab_size, and tokens as a number:"
                         f" {error!r}") from None  # fmt: skip
    if file_vocab > vocab_size:
        raise InputError(
            f"{path} was written with a tokenizer of {file_vocab} tokens, more than the model's {vocab_size}:"
            " give --tokenizer the one that wrote it, and a model whose vocabulary holds it"
        )
    if file_eos != eos_id:
        raise InputError(
            f"{path} ends documents with token {file_eos}, the tokenizer uses {eos_id}: give --tokenizer the one"
            " that wrote it"
        )
    with reading(path):
        size = path.stat().st_size
        if size == 0:
            raise InputError(f"{path} holds no tokens")
        if size % dtype.itemsize or tokens not in (None, size // dtype.itemsize):
            raise InputError(f"{path} is truncated: {size} bytes, but {sidecar.name} says {tokens} ids")
        return np.memmap(path, dtype, "r"), np.zeros(0, np.int64)
