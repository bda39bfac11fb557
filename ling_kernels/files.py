"""Atomic file writes (a file is complete or absent, also after a crash), JSON objects in files, locks of folders;
where results come from."""

import datetime
import json
import math
import os
import platform
import subprocess
import weakref
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from .errors import InputError

try:
    import fcntl
except ImportError:  # Windows has none: folders are not locked
    fcntl = None

LOCK = ".lock"  # a file in a locked folder


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


def user_path(path: str | Path, name: str = "a path") -> Path:
    """A path that a user names, which need not exist. Raises InputError for a name that no file can have. name: of the
    flag."""
    if not isinstance(path, str | os.PathLike):
        raise InputError(f"{path!r} is no path of a file")
    if not os.fspath(path):
        raise InputError(f"{name} is empty")
    try:
        os.lstat(path)
    except (FileNotFoundError, NotADirectoryError, PermissionError):
        pass
    except (OSError, ValueError) as error:  # too long; a null byte
        raise InputError(f"{path} is no path of a file: {getattr(error, 'strerror', None) or error}") from None
    return Path(path)


def check_output(path: str | Path, name: str) -> Path:
    """The path of a file that a command will write after long work. Raises InputError where it cannot, as far as can be
    seen without writing. name: of the flag."""
    file = user_path(path, name)
    if file.is_dir():
        raise InputError(f"{name} {path}: it is a folder")
    if not file.parent.is_dir():
        raise InputError(f"{name} {path}: there is no folder {file.parent}")
    if not os.access(file if file.exists() else file.parent, os.W_OK):
        raise InputError(f"{name} {path}: it cannot be written")
    return file


def read_json(file: Path) -> dict:
    """The JSON object in a file. Raises InputError if there is none."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"cannot read {file}: {error.strerror}") from None
    except (ValueError, RecursionError) as error:  # RecursionError: nested too deep
        raise InputError(f"cannot read {file}: it is not readable JSON: {error}") from None
    if not isinstance(content, dict):
        raise InputError(f"{file} is not a JSON object")
    return content


class FolderLock:
    """Keeps other processes out of a folder, until `remove`, garbage collection, or the end of this process, even one
    by kill -9: the kernel holds the lock on the open file. A file system without locks gives none."""

    def __init__(self, folder: Path):
        self.path = folder / LOCK
        try:
            descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o666)
        except OSError as error:
            raise InputError(f"cannot write to {folder}: {error.strerror or error}") from None
        self.close = weakref.finalize(self, os.close, descriptor)
        try:
            if fcntl:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            os.truncate(descriptor, 0)
            os.write(descriptor, f"{os.getpid()}\n".encode())
        except BlockingIOError:
            holder = os.read(descriptor, 20).decode(errors="replace")
            self.close()
            raise InputError(f"{folder} is in use by another process, {holder.strip()}") from None
        except OSError:  # a file system without locks, or a full one
            pass

    def remove(self) -> None:
        """Unlock the folder, and remove the file."""
        _locks.pop(str(self.path), None)
        self.path.unlink(missing_ok=True)
        self.close()


_locks: weakref.WeakValueDictionary[str, FolderLock] = weakref.WeakValueDictionary()  # of this process, by path


def lock_folder(folder: Path) -> FolderLock:
    """The lock of a folder, one in a process. Raises InputError where another process holds it."""
    folder = folder.resolve()
    lock = _locks.get(str(folder / LOCK))
    if lock is None:
        lock = _locks[str(folder / LOCK)] = FolderLock(folder)
    return lock


def format_bytes(n: float) -> str:
    """A number of bytes in the unit that suits it: 0, 12.5 kB, 3.1 MB, 72.20 GB."""
    for size, unit, digits in ((1e9, "GB", 2), (1e6, "MB", 1)):
        if n >= size:
            return f"{n / size:.{digits}f} {unit}"
    return f"{n / 1e3:.1f} kB" if n else "0"


def finite(value):
    """None instead of NaN and infinity, which JSON lacks."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


def origin() -> dict:
    """Where results come from: the commit of this code (with -dirty where files have changed; "unknown" outside its
    repository), date and versions."""
    import torch

    root, commit = Path(__file__).parents[1], ""
    if (root / ".git").exists():
        command = ["git", "describe", "--always", "--abbrev=40", "--dirty", "--exclude=*"]
        with suppress(OSError):
            commit = subprocess.run(command, cwd=root, capture_output=True, text=True).stdout.strip()
    date = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
    versions = dict(python=platform.python_version(), torch=torch.__version__)
    return dict(commit=commit or "unknown", date=date, threads=torch.get_num_threads()) | versions
