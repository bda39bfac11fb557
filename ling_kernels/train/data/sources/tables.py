"""Rows of .parquet files and of .arrow files, as Hugging Face datasets save them."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ....errors import InputError
from .options import Position, TextOptions
from .text import reading

BATCH_ROWS = 256  # that are Python objects at a time


@contextmanager
def importing_pyarrow(path: Path):
    """The module pyarrow, whose errors become InputErrors that name the file."""
    try:
        import pyarrow
    except ImportError:
        raise InputError(f"{path} needs the package pyarrow: pip install '.[train]'") from None
    try:
        with reading(path):
            yield pyarrow
    except InputError:
        raise
    # The latter: a text that is not UTF-8, a time that Python has no object for, a column that comes twice.
    except (pyarrow.ArrowException, ValueError, OverflowError, KeyError) as error:
        raise InputError(f"cannot read {path}: {error}") from None


def parquet_rows(
    path: Path, options: TextOptions, position: Position, columns: Sequence[str] | None = None, any_of: bool = False
) -> Iterator[tuple[str, dict]]:
    with importing_pyarrow(path):
        from pyarrow import parquet

        with parquet.ParquetFile(path) as file:
            columns = check_columns(file.schema_arrow, columns, path, any_of)
            size, rows, row = path.stat().st_size, file.metadata.num_rows, 0
            for batch in file.iter_batches(BATCH_ROWS, columns=columns):
                yield from numbered(batch, row, path)
                row += len(batch)
                position.within = size * row // rows


def arrow_rows(
    path: Path, options: TextOptions, position: Position, columns: Sequence[str] | None = None, any_of: bool = False
) -> Iterator[tuple[str, dict]]:
    """Rows of an IPC stream, which Hugging Face datasets write, or of an IPC file."""
    with importing_pyarrow(path) as pyarrow, open(path, "rb") as file:
        table = arrow_table(pyarrow, file)
        of_file = getattr(table, "num_record_batches", None)  # a stream does not know it
        columns = check_columns(table.schema, columns, path, any_of)
        row = 0
        for batch in table if of_file is None else map(table.get_batch, range(of_file)):
            batch.validate(full=True)  # offsets of a damaged file may point anywhere
            for first in range(0, len(batch), BATCH_ROWS):
                part = batch.slice(first, BATCH_ROWS)
                yield from numbered(part if columns is None else part.select(columns), row + first, path)
            row += len(batch)
            position.within = file.tell()


def arrow_table(pyarrow, file):
    """The reader of an IPC file, or of an IPC stream."""
    is_file = file.read(6) == b"ARROW1"
    file.seek(0)
    return pyarrow.ipc.open_file(file) if is_file else pyarrow.ipc.open_stream(file)


def column_names(path: Path) -> list[str]:
    """Of a .parquet or .arrow file, whose rows may be damaged."""
    with importing_pyarrow(path) as pyarrow, open(path, "rb") as file:
        if path.suffix == ".arrow":
            return arrow_table(pyarrow, file).schema.names
        from pyarrow import parquet

        return parquet.read_schema(file).names


def check_columns(schema, columns: Sequence[str] | None, path: Path, any_of: bool) -> list[str] | None:
    """The columns to read; any_of: those of them that are there."""
    if columns is None:
        return None
    if any_of:
        return [name for name in columns if name in schema.names]
    for name in columns:
        if name not in schema.names:
            has = ", ".join(schema.names)
            raise InputError(f"{path} has no column {name!r}, only {has}; --text-field names another")
    return list(columns)


def numbered(batch, row: int, path: Path) -> Iterator[tuple[str, dict]]:
    """(where it is, row) of the rows of a batch that has `row` rows before it."""
    for number, content in enumerate(batch.to_pylist(), row + 1):
        yield f"{path}, row {number}", {name: without_nulls(value) for name, value in content.items()}


def without_nulls(value: Any) -> Any:
    """A value without the null fields of objects in it: each object of a column has every field of any other."""
    if isinstance(value, dict):
        return {name: without_nulls(v) for name, v in value.items() if v is not None}
    return [without_nulls(v) for v in value] if isinstance(value, list) else value
