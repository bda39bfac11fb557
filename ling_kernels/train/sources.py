"""Documents from files: .txt, .jsonl, .parquet, folders of these, or the text that ships with CPython.

A document is an iterable of UTF-8 pieces of about a megabyte, cut at line ends, so that a file of any size streams.
"""

import json
import sysconfig
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from ..errors import InputError
from ..files import user_path

PIECE = 1 << 20  # bytes
SUFFIXES = (".txt", ".jsonl", ".parquet", ".bin")


@dataclass(frozen=True)
class TextOptions:
    """How the text in files is found."""

    text_field: str = "text"  # field of .jsonl and column of .parquet that holds the text


DEFAULTS = TextOptions()


def find_files(sources: Sequence[str | Path], texts_may_be_gone: bool = False) -> list[Path]:
    """The data files that `sources` name, in a fixed order; folders are searched recursively.

    Raises InputError for a source that is not there or has no data, unless it may be a text that is gone.
    """
    found = []
    for path in map(user_path, sources):
        if path.is_dir():
            inside = [p for p in sorted(path.rglob("*")) if p.suffix in SUFFIXES and p.is_file()]
            inside = [p for p in inside if p.suffix != ".bin" or p.with_suffix(".json").is_file()]
            if not inside and not texts_may_be_gone:
                raise InputError(f"the folder {path} holds no {', '.join(SUFFIXES)} file")
            found += inside
        elif not path.exists() and texts_may_be_gone and path.suffix != ".bin":
            continue
        elif not path.exists():
            raise InputError(f"there is no data at {path}")
        elif path.suffix not in SUFFIXES:
            raise InputError(f"{path} has an unknown suffix; known are {', '.join(SUFFIXES)}")
        else:
            found.append(path)
    return found


def documents(files: Sequence[Path], options: TextOptions = DEFAULTS) -> Iterator[Iterable[bytes]]:
    """One document for each .txt file, line of a .jsonl file and row of a .parquet file; null is an empty text."""
    for path in files:
        if path.suffix == ".txt":
            yield text_pieces(path)
        elif path.suffix == ".jsonl":
            yield from jsonl_documents(path, options.text_field)
        else:
            yield from parquet_documents(path, options.text_field)


def cpython_documents() -> Iterator[Iterable[bytes]]:
    """English prose and Python source from CPython: the topics of help(), then the top-level modules of the standard
    library. The same for every installation of one Python version."""
    try:
        from pydoc_data.topics import topics
    except ImportError:  # some distributions leave it out
        topics = {}
    modules = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    modules = [m for m in modules if not m.name.startswith("_sysconfigdata")]  # a table of how Python was built
    if not topics and not modules:
        raise InputError("this Python ships neither pydoc_data.topics nor the sources of its library; give --data")
    yield from ([topics[name].encode()] for name in sorted(topics))
    yield from map(text_pieces, modules)


@contextmanager
def reading(path: Path):
    """Turn an OSError into an InputError that names the file."""
    try:
        yield
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror or error}") from None


def text_pieces(path: Path) -> Iterator[bytes]:
    rest = b""
    with reading(path), open(path, "rb") as file:
        while part := file.read(PIECE):
            piece = rest + part
            cut = whole_lines(piece)
            rest = piece[cut:]
            yield piece[:cut]
    if rest:
        yield rest


def whole_lines(piece: bytes) -> int:
    """Bytes of a piece up to its last line end, or where there is none up to the last complete character."""
    cut = piece.rfind(b"\n") + 1
    if not cut:
        cut = len(piece) - 1
        while cut > len(piece) - 4 and cut > 0 and piece[cut] & 0xC0 == 0x80:
            cut -= 1
    return cut


def jsonl_documents(path: Path, field: str) -> Iterator[list[bytes]]:
    with reading(path), open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as error:  # RecursionError: nested too deep
                raise InputError(f"{path}, line {number}: not JSON: {error}") from None
            if not isinstance(row, dict) or field not in row:
                has = f"its fields are {', '.join(row)}" if isinstance(row, dict) else "it is not an object"
                raise InputError(f"{path}, line {number}: no field {field!r}: {has}; --text-field names another")
            yield [utf8(row[field], f"{path}, line {number}: the field {field!r}")]


def parquet_documents(path: Path, field: str) -> Iterator[list[bytes]]:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError:
        raise InputError(f"{path} needs the package pyarrow: pip install ling_kernels[train]") from None
    try:
        with reading(path), parquet.ParquetFile(path) as file:
            names = file.schema_arrow.names
            if field not in names:
                raise InputError(f"{path} has no column {field!r}, only {', '.join(names)}; --text-field names another")
            row = 0
            for batch in file.iter_batches(batch_size=1024, columns=[field]):
                for text in batch.column(0).to_pylist():
                    row += 1
                    yield [utf8(text, f"{path}, row {row}: the column {field!r}")]
    except (pyarrow.ArrowException, UnicodeDecodeError) as error:  # the latter for a text that is not UTF-8
        raise InputError(f"cannot read {path}: {error}") from None


def utf8(text, source: str) -> bytes:
    """Text as UTF-8; null, a row without text, is empty. Raises InputError for anything else."""
    if text is None:
        return b""
    if not isinstance(text, str):
        raise InputError(f"{source} is not text but {type(text).__name__}")
    try:
        return text.encode()
    except UnicodeEncodeError as error:
        raise InputError(f"{source} is not valid Unicode at character {error.start}") from None
