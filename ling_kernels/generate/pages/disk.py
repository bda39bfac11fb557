"""Pages of the KV cache in a folder: a file for each, `IDENTITY/HASH.page`, which several engines may share.

A file is a header and a row. It appears whole, by a rename, and is checked when it is read: by its size, by the
identity and the hash in its header, and by a checksum. Its modification time is that of its last use, by which the
oldest files are removed. Files with other names are left alone.
"""

import hashlib
import os
import re
import secrets
import struct
import time
from pathlib import Path
from typing import NamedTuple

from ...errors import warn

MAGIC = b"ling page"
HEADER = struct.Struct("<9s16s16sQ16s")  # magic, identity, hash of the page, bytes of the row, their checksum
RESCAN = 1 / 16  # of the limit: after so many bytes that this engine wrote, it looks what others did
SPARE = 1 / 16  # of the limit, which removing files leaves free
ABANDONED = 600.0  # seconds after which a file that was begun is nobody's
NAME = re.compile(r"[0-9a-f]{32}")


class File(NamedTuple):
    used: int  # ns
    bytes: int
    path: Path


class DiskPages:
    """At most `limit` bytes of files in a folder, of engines of any identity. No thread of its own: `write` is called
    from one, everything else from any."""

    def __init__(self, folder: Path, limit: int):
        self.folder, self.limit = folder, limit
        self.bytes = 0  # of the files, as far as is known
        self.unseen = limit  # bytes written since the folder was last scanned; at first it is not known
        self.damaged = self.failed = 0  # files that were wrong; reads and writes that the system refused

    def path(self, identity: bytes, page_hash: bytes) -> Path:
        return self.folder / identity.hex() / f"{page_hash.hex()}.page"

    def touch(self, path: Path, used: int) -> bool:
        """Set the time of a file's last use, in ns; False if there is no such file."""
        try:
            os.utime(path, ns=(used, used))
        except OSError:
            return False
        return True

    def read(self, path: Path, row: memoryview) -> bool:
        """Fill a row from a file. False if it is missing, or cannot be used: then it is removed."""
        try:
            with open(path, "rb") as file:
                header = file.read(HEADER.size)
                size = file.readinto(row)
                complete = size == len(row) and not file.read(1)
        except FileNotFoundError:
            return False  # another engine has removed it
        except OSError as error:
            self.fail(path, error)
            return False
        if complete and header == header_of(path, row):
            return True
        self.damaged += 1
        if self.damaged == 1:
            warn(f"{path} is damaged or no page of this cache: it is removed; more of them are removed without a word")
        path.unlink(missing_ok=True)
        return False

    def write(self, path: Path, row: memoryview) -> None:
        """Write a file, unless it is there; first remove the oldest files where it would exceed the limit."""
        size = HEADER.size + len(row)
        if self.touch(path, time.time_ns()) or size > self.limit:
            return
        partial = path.with_name(f".{path.stem}.{secrets.token_hex(8)}.partial")
        try:
            if self.bytes + size > self.limit or self.unseen + size > RESCAN * self.limit:
                self.make_room(size)
            path.parent.mkdir(mode=0o700, exist_ok=True)  # a page tells what its prompt said
            with open(os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
                file.write(header_of(path, row))
                file.write(row)
            os.replace(partial, path)
        except OSError as error:
            self.fail(path, error)
            partial.unlink(missing_ok=True)
            return
        self.bytes, self.unseen = self.bytes + size, self.unseen + size

    def fail(self, path: Path, error: OSError) -> None:
        self.failed += 1
        if self.failed == 1:
            warn(f"the cache goes on without {path}: {error}; further errors are only counted")

    def make_room(self, size: int) -> None:
        """Scan the folder, and remove the files that were used least recently until `size` bytes more fit."""
        files = self.scan()
        self.bytes, self.unseen = sum(file.bytes for file in files), 0
        if self.bytes + size <= self.limit:
            return
        for file in sorted(files):
            if self.bytes + size <= (1 - SPARE) * self.limit:
                break
            file.path.unlink(missing_ok=True)
            self.bytes -= file.bytes

    def scan(self) -> list[File]:
        """The pages of all identities. Files that were begun long ago and never finished are removed."""
        found = []
        for folder in self.folder.iterdir():
            if not NAME.fullmatch(folder.name) or folder.is_symlink():
                continue
            try:
                entries = [*os.scandir(folder)]
            except OSError:  # another user's, or no folder
                continue
            for entry in entries:
                stem, _, kind = entry.name.lstrip(".").partition(".")
                if not NAME.fullmatch(stem):
                    continue
                try:
                    state = entry.stat(follow_symlinks=False)
                except OSError:  # another engine has removed it
                    continue
                if kind == "page":
                    found.append(File(state.st_mtime_ns, state.st_size, Path(entry.path)))
                elif kind.endswith("partial") and time.time() - state.st_mtime > ABANDONED:
                    Path(entry.path).unlink(missing_ok=True)
        return found


def header_of(path: Path, row: memoryview) -> bytes:
    """The header of the file at this path with this row."""
    checksum = hashlib.blake2b(row, digest_size=16).digest()
    names = bytes.fromhex(path.parent.name), bytes.fromhex(path.stem)
    return HEADER.pack(MAGIC, *names, len(row), checksum)
