"""Files that are whole or absent, also after a crash."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def whole(path: Path, durable: bool = False) -> Iterator[Path]:
    """Yields another name beside `path`, to write under. It becomes `path` at the end; after an error it is removed.

    durable: it is on the disk, not only on its way there, before it takes the name.
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
