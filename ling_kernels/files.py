"""Atomic file writes: a file is complete or absent, also after a crash."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


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
