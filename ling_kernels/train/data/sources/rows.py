"""Rows of .json and .jsonl files, and the texts in rows."""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from ....errors import InputError
from .options import Position, TextOptions
from .text import text_chunks


def jsonl_rows(
    path: Path, options: TextOptions, position: Position, columns: Sequence[str] | None = None, any_of: bool = False
) -> Iterator[tuple[str, Any]]:
    """Each line's value; empty lines are skipped."""
    for number, line in enumerate(lines(text_chunks(path, options.encoding, position)), 1):
        line = line.removeprefix("\ufeff")  # files with byte order marks may have been put together
        if line.strip(" \t\r\v\f"):
            source = f"{path}, line {number}"
            yield source, parsed(line, source)


def json_rows(
    path: Path, options: TextOptions, position: Position, columns: Sequence[str] | None = None, any_of: bool = False
) -> Iterator[tuple[str, Any]]:
    """The value, or each element of an array, where a text or null is the text of a row. The file is read whole."""
    content = parsed("".join(text_chunks(path, options.encoding, position)), str(path))
    if not isinstance(content, list):
        yield str(path), content
        return
    for number, row in enumerate(content, 1):
        is_text = row is None or isinstance(row, str)
        yield f"{path}, element {number}", {options.text_field: row} if is_text else row


def lines(chunks: Iterator[str]) -> Iterator[str]:
    begin: list[str] = []  # of a line that is longer than a chunk
    for chunk in chunks:
        first, *others = chunk.split("\n")
        begin.append(first)
        if others:
            yield "".join(begin)
            *whole, last = others
            yield from whole
            begin = [last]
    yield "".join(begin)


def parsed(text: str, source: str):
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:  # RecursionError: nested too deep
        raise InputError(f"{source}: not JSON: {error}") from None


def field_of(row, field: str, source: str) -> str:
    if not isinstance(row, dict) or field not in row:
        has = f"its fields are {', '.join(row)}" if isinstance(row, dict) else "it is not an object"
        raise InputError(f"{source}: no field {field!r}: {has}; --text-field names another")
    return checked(row[field], f"{source}: the field {field!r}")


def checked(text, source: str) -> str:
    """The text; null, a row without text, is empty. Raises InputError for anything else and for lone surrogates."""
    if text is None:
        return ""
    if not isinstance(text, str):
        raise InputError(f"{source} is not text but {type(text).__name__}")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InputError(f"{source} is not valid Unicode at character {error.start}") from None
    return text
