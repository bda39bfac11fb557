"""How text is found in files, and how much of them has been read."""

import codecs
from dataclasses import dataclass

from ....errors import InputError


@dataclass(frozen=True)
class TextOptions:
    """How the text in files is found. Raises InputError for an encoding that Python does not know."""

    text_field: str = "text"  # field of .json and .jsonl, column of .parquet and .arrow
    encoding: str = "utf-8"  # of text files, .json and .jsonl
    separator: str | None = None  # ends a document in text files; \n and \t in it are line end and tab
    special_tokens: bool = False  # names of special tokens in the text are these tokens, not plain text

    def __post_init__(self):
        try:
            known = codecs.lookup(self.encoding)._is_text_encoding and codecs.getincrementaldecoder(self.encoding)
        except (LookupError, ValueError):  # ValueError: a null character
            known = False
        if not known:
            raise InputError(f"--encoding {self.encoding}: Python knows no such encoding of text")
        if self.separator == "":
            raise InputError("--separator is empty")

    @property
    def between(self) -> str | None:
        """The separator itself."""
        return self.separator and self.separator.replace("\\n", "\n").replace("\\t", "\t")


DEFAULTS = TextOptions()


class Position:
    """Bytes of the files that have been read."""

    def __init__(self):
        self.before = 0  # in the files that are done
        self.within = 0  # in the present file

    def file_is_done(self, size: int) -> None:
        self.before, self.within = self.before + size, 0

    @property
    def bytes(self) -> int:
        return self.before + self.within
