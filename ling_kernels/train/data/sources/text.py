"""Text files, plain or compressed: decoded strictly, in pieces, and split into documents."""

import codecs
import gzip
import itertools
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from operator import itemgetter
from pathlib import Path
from typing import BinaryIO

from ....errors import InputError
from .options import Position, TextOptions

PIECE = 1 << 20  # bytes read at a time, and characters above which a document is cut at a line end
BYTE_ORDER_MARKS = {codecs.BOM_UTF16_LE: "utf-16", codecs.BOM_UTF16_BE: "utf-16"}


@contextmanager
def reading(path: Path):
    """Turn an error of reading a file into an InputError that names it."""
    try:
        yield
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror or error}") from None
    except (EOFError, zlib.error) as error:  # gzip
        raise InputError(f"cannot read {path}: it is damaged: {error}") from None


@contextmanager
def opened(path: Path, file: BinaryIO) -> Iterator[BinaryIO]:
    """The content of an open file, decompressed where its name ends in .gz or .zst."""
    if path.suffix == ".gz":
        with gzip.GzipFile(fileobj=file) as content:
            yield content
    elif path.suffix == ".zst":
        try:
            import pyarrow
        except ImportError:
            raise InputError(f"{path} needs the package pyarrow: pip install '.[train]'") from None
        with pyarrow.CompressedInputStream(pyarrow.PythonFile(file, mode="r"), "zstd") as content:
            yield content
    else:
        yield file


def text_chunks(path: Path, encoding: str, position: Position) -> Iterator[str]:
    """The text of a file, about a megabyte at a time, without the byte order mark that it may begin with. Raises
    InputError where a byte is not valid in the encoding."""
    decoder = codecs.getincrementaldecoder(encoding)()
    offset, first, part = 0, True, b" "
    with reading(path), open(path, "rb") as file, opened(path, file) as content:
        while part:
            part = content.read(PIECE)
            waiting = len(decoder.getstate()[0])  # bytes of a character whose end is in `part`
            try:
                text = decoder.decode(part, final=not part)
            except UnicodeError as error:
                at = offset - waiting + getattr(error, "start", 0)
                raise InputError(not_decodable(path, encoding, at, part if first else b"")) from None
            position.within = file.tell()
            offset += len(part)
            if first and text:
                text, first = text.removeprefix("\ufeff"), False
            if text:
                yield text


def not_decodable(path: Path, encoding: str, at: int, start: bytes) -> str:
    """The message about a byte that is not valid; start: the first bytes of the file, if the byte is among them."""
    mark = next((name for mark, name in BYTE_ORDER_MARKS.items() if start.startswith(mark) and at == 0), None)
    names = f"its first bytes are those of {mark}" if mark else "for example gb18030, latin-1 or utf-16"
    inside = " of its content" if path.suffix in (".gz", ".zst") else ""
    return f"{path} is not {encoding} at byte {at:,}{inside}; --encoding names its encoding: {names}"


def text_documents(path: Path, options: TextOptions, position: Position) -> Iterator[Iterator[str]]:
    """The file's text as one document; with a separator, its parts that are more than white space."""
    numbered = pieces(text_chunks(path, options.encoding, position), options.between)
    for _, group in itertools.groupby(numbered, key=itemgetter(0)):
        yield map(itemgetter(1), group)


def pieces(chunks: Iterator[str], separator: str | None) -> Iterator[tuple[int, str]]:
    """(number of the document, piece of its text). Without a separator there is one document, and no text is one empty
    piece. A piece ends at a line end; in a line of more than PIECE characters at a space, or anywhere."""
    number, rest, begun = 0, "", separator is None
    hold = len(separator or " ") - 1  # characters at the end that may begin a separator
    for chunk in chunks:
        *whole, rest = (rest + chunk).split(separator) if separator else [rest + chunk]
        for text in whole:
            if begun or not text.isspace() and text:
                yield number, text
            number, begun = number + 1, False
        if separator and (len(rest) <= PIECE + hold or not begun and rest.isspace()):
            continue
        limit = len(rest) - hold
        cut = rest.rfind("\n", 0, limit) + 1 or max(rest.rfind(" ", 0, limit), 0) or limit
        if begun or not rest[:cut].isspace():
            begun = True
            yield number, rest[:cut]
            rest = rest[cut:]
    if begun or rest and not rest.isspace():
        yield number, rest
