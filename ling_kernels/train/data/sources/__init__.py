"""Documents and rows from files: text and source files, .json, .jsonl, .parquet, .arrow, compressed ones, folders of
these, or the text that ships with CPython.

A document is an iterable of pieces of text of about a megabyte, cut at line ends, so that a file of any size streams.
"""

import sysconfig
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from ....errors import InputError
from .find import SUFFIXES, TABLES, find_files, kind_of
from .options import DEFAULTS, Position, TextOptions
from .rows import field_of, json_rows, jsonl_rows
from .tables import arrow_rows, column_names, parquet_rows
from .text import reading, text_documents

__all__ = [
    "DEFAULTS", "SUFFIXES", "Position", "TextOptions", "cpython_documents", "documents", "find_files",
    "first_fields", "has_rows", "reading", "rows",
]  # fmt: skip

ROWS: dict[str, Callable[..., Iterator[tuple[str, Any]]]] = {
    ".json": json_rows, ".jsonl": jsonl_rows, ".parquet": parquet_rows, ".arrow": arrow_rows,
}  # fmt: skip


def has_rows(path: Path) -> bool:
    return kind_of(path) in ROWS


def first_fields(path: Path, options: TextOptions) -> list[str]:
    """The columns of a table, or the fields of the first row of .json and .jsonl, if that is an object; [] for text.
    Raises InputError for files that cannot be read."""
    if path.suffix in TABLES:
        return column_names(path)
    first = next((row for _, row in rows(path, options)), None) if has_rows(path) else None
    return [*first] if isinstance(first, dict) else []


def rows(
    path: Path,
    options: TextOptions,
    position: Position | None = None,
    columns: Sequence[str] | None = None,
    any_of: bool = False,
) -> Iterator[tuple[str, Any]]:
    """(where it is, row) of a .json, .jsonl, .parquet or .arrow file, or of a compressed one. A row of a table is a
    dict of the `columns`, by default of all, with any_of of those that are there, and objects in it have no fields of
    null; one of JSON is any value, as it is.

    Raises InputError for files that cannot be read and for columns that are not there.
    """
    return ROWS[kind_of(path)](path, options, Position() if position is None else position, columns, any_of)


def documents(
    files: Sequence[Path], options: TextOptions = DEFAULTS, position: Position | None = None
) -> Iterator[Iterable[str]]:
    """The documents of files: each text file, or each of its parts between separators; each text of a .json file, line
    of a .jsonl file, and row of a .parquet or .arrow file, where null is an empty text.

    Each is to be read before the next one. `position` follows the reading. Raises InputError for files that cannot be
    read.
    """
    position = Position() if position is None else position
    for path in files:
        size = path.stat().st_size if path.is_file() else 0
        if has_rows(path):
            field = options.text_field
            yield from ([field_of(row, field, source)] for source, row in rows(path, options, position, [field]))
        else:
            yield from text_documents(path, options, position)
        position.file_is_done(size)


def cpython_documents() -> Iterator[Iterable[str]]:
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
    yield from ([topics[name]] for name in sorted(topics))
    yield from documents(modules)
