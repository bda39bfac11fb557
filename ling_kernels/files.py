"""Atomic file writes (a file is complete or absent, also after a crash), and JSON objects in files."""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from .errors import InputError


@contextmanager
def atomic_write(path: Path, durable: bool = False) -> Iterator[Path]:
    """Yield a temporary path beside `path` to write to. It replaces `path` on exit; an error removes it.

    durable: fsync the temporary file first, so that the new content survives a power failure.
    """
    partial = path.with_name(f".{path.name}.partial")
    try:
        yield partial
        if durable:
            with open(partial, "rb") as file:
                os.fsync(file.fileno())
        os.replace(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def read_json(file: Path) -> dict:
    """The JSON object in a file. Raises InputError if there is none."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:  # RecursionError: nested too deep
        raise InputError(f"cannot read {file}: it is not readable JSON: {error}") from None
    if not isinstance(content, dict):
        raise InputError(f"{file} is not a JSON object")
    return content
