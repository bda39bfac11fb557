"""Texts in .json and .jsonl files."""

import json
from collections.abc import Iterator
from pathlib import Path

from ....errors import InputError
from .options import Position, TextOptions
from .text import text_chunks


def jsonl_documents(path: Path, options: TextOptions, position: Position) -> Iterator[list[str]]:
    """The field of each line's object; empty lines are skipped."""
    for number, line in enumerate(lines(text_chunks(path, options.encoding, position)), 1):
        line = line.removeprefix("\ufeff")  # files with byte order marks may have been put together
        if line.strip(" \t\r\v\f"):
            source = f"{path}, line {number}"
            yield [field_of(parsed(line, source), options.text_field, source)]


def json_documents(path: Path, options: TextOptions, position: Position) -> Iterator[list[str]]:
    """The field of an object, or of each object of an array, whose texts are documents too. The file is read whole."""
    content = parsed("".join(text_chunks(path, options.encoding, position)), str(path))
    if not isinstance(content, list):
        yield [field_of(content, options.text_field, str(path))]
        return
    for number, row in enumerate(content, 1):
        source = f"{path}, element {number}"
        is_text = row is None or isinstance(row, str)
        yield [checked(row, source) if is_text else field_of(row, options.text_field, source)]


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
