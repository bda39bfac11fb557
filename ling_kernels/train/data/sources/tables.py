"""Texts in columns of .parquet files and of .arrow files, as Hugging Face datasets save them."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ....errors import InputError
from .options import Position, TextOptions
from .rows import checked
from .text import reading


@contextmanager
def importing_pyarrow(path: Path):
    """The module pyarrow, whose errors become InputErrors that name the file."""
    try:
        import pyarrow
    except ImportError:
        raise InputError(f"{path} needs the package pyarrow: pip install ling_kernels[train]") from None
    try:
        with reading(path):
            yield pyarrow
    except (pyarrow.ArrowException, UnicodeDecodeError) as error:  # the latter for a text that is not UTF-8
        raise InputError(f"cannot read {path}: {error}") from None


def parquet_documents(path: Path, options: TextOptions, position: Position) -> Iterator[list[str]]:
    with importing_pyarrow(path):
        from pyarrow import parquet

        with parquet.ParquetFile(path) as file:
            field = column_of(file.schema_arrow, options.text_field, path)
            size, rows, row = path.stat().st_size, file.metadata.num_rows, 0
            for batch in file.iter_batches(batch_size=1024, columns=[field]):
                yield from texts(batch.column(0), row, field, path)
                row += len(batch)
                position.within = size * row // rows


def arrow_documents(path: Path, options: TextOptions, position: Position) -> Iterator[list[str]]:
    """Rows of an IPC stream, which Hugging Face datasets write, or of an IPC file."""
    with importing_pyarrow(path) as pyarrow, open(path, "rb") as file:
        is_file = file.read(6) == b"ARROW1"
        file.seek(0)
        if is_file:
            table = pyarrow.ipc.open_file(file)
            batches = map(table.get_batch, range(table.num_record_batches))
        else:
            batches = table = pyarrow.ipc.open_stream(file)
        field, row = column_of(table.schema, options.text_field, path), 0
        for batch in batches:
            batch.validate(full=True)  # offsets of a damaged file may point anywhere
            yield from texts(batch.column(field), row, field, path)
            row += len(batch)
            position.within = file.tell()


def column_of(schema, field: str, path: Path) -> str:
    if field not in schema.names:
        raise InputError(f"{path} has no column {field!r}, only {', '.join(schema.names)}; --text-field names another")
    return field


def texts(column, row: int, field: str, path: Path) -> Iterator[list[str]]:
    """The texts of a column whose first row has `row` rows before it."""
    for number, text in enumerate(column.to_pylist(), row + 1):
        yield [checked(text, f"{path}, row {number}: the column {field!r}")]
