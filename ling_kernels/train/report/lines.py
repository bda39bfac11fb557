"""Files of JSON lines, as metrics.jsonl: appended to by a run, read by whoever wants its figures."""

import json
import os
from pathlib import Path

from ...errors import InputError
from ...files import atomic_write
from ...model.config_json import is_integer


class Lines:
    """A file of JSON lines to append to. Lines that cannot be written, as on a full disk, are kept until they can. A
    file that is removed meanwhile begins again."""

    def __init__(self, path: Path):
        self.path, self.file = path, open(path, "ab", buffering=0)
        self.unwritten, self.failed = b"", False

    def write(self, record: dict) -> None:
        self.unwritten += (json.dumps(record) + "\n").encode()
        self.flush()

    def flush(self) -> None:
        try:
            if not (os.fstat(self.file.fileno()).st_nlink or self.path.exists()):
                self._begin_again()
            while self.unwritten:
                self.unwritten = self.unwritten[self.file.write(self.unwritten) :]
            self.failed = False
        except OSError as error:
            if not self.failed:
                print(
                    f"warning: cannot write {self.path}: {error.strerror}; its lines are kept until it can", flush=True
                )
            self.failed = True

    def _begin_again(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        file = open(self.path, "ab", buffering=0)
        self.file.close()
        self.file = file
        print(f"warning: {self.path} was removed, with its lines so far; it begins again", flush=True)

    def close(self) -> None:
        self.flush()
        self.file.close()

    def __enter__(self) -> "Lines":
        return self

    def __exit__(self, *_) -> None:
        self.close()


def open_lines(path: Path, since: int) -> Lines:
    """Open a file of JSON lines to append to. Keeps the lines of steps up to `since`; drops those that are damaged."""
    kept = [json.dumps(row) + "\n" for row in read_lines(path) if row["step"] <= since]
    try:
        with atomic_write(path) as partial:
            partial.write_text("".join(kept))
        return Lines(path)
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror}") from None


def read_lines(path: Path) -> list[dict]:
    """The records of a file of JSON lines, each with its step. Leaves out damaged lines, such as an incomplete last one
    of a process that was killed."""
    rows = []
    if path.is_file():
        for line in path.read_bytes().splitlines():
            try:
                row = json.loads(line)
            except (ValueError, RecursionError):
                continue
            if isinstance(row, dict) and is_integer(row.get("step")):
                rows.append(row)
    return rows
