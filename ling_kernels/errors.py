"""The package's errors. An op that is called with wrong tensors raises a plain ValueError."""

import operator
import sys
import warnings
from typing import Any


class LingError(Exception):
    """Base of the package's own errors."""


class InputError(LingError, ValueError):
    """A user's input cannot be used. The message says which, where, and what would be accepted, in one line."""

    def __init__(self, message: str):
        super().__init__(one_line(message))


class OtherRank(InputError):
    """Bad input in a run of several processes, which another of them reports."""


def one_line(message: str) -> str:
    """The message without line breaks and, as it may quote any value, without the middle of a long one and without
    lone surrogates, which no file or response can hold."""
    line = " ".join(message.split()).encode(errors="backslashreplace").decode()
    return line if len(line) <= LONGEST else f"{line[: LONGEST // 2]} ... {line[-LONGEST // 2 :]}"


def counted(number: int, noun: str) -> str:
    """1 row, 2 rows, 2 batches, 2 processes."""
    ending = "es" if noun.endswith(("s", "ch")) else "s"
    return f"{number:,} {noun}{ending * (number != 1)}"


LONGEST = 800  # characters of a message


def integer(name: str, value: Any, least: int) -> int:
    """A caller's whole number, also numpy's or a tensor's. Raises InputError for anything else, also True, and for
    less."""
    try:
        number = operator.index(None if isinstance(value, bool) else value)
    except TypeError:
        raise InputError(f"{name} is {value!r}; it must be an integer") from None
    if number < least:
        raise InputError(f"{name} is {number}; it must be at least {least}")
    return number


def warn(message: str) -> None:
    """Warn at the line outside the package that led here, as a line of the package tells its user nothing."""
    frame, level = sys._getframe(1), 2
    while frame.f_back is not None and frame.f_globals.get("__name__", "").partition(".")[0] == __package__:
        frame, level = frame.f_back, level + 1
    warnings.warn(message, stacklevel=level)


class Busy(LingError):
    """The engine's queue is full: try again later."""


class LostRank(LingError, RuntimeError):
    """Another process of an engine that several share has ended, or does not answer: none can go on."""


class Diverged(LingError):
    """Training stopped because too many steps in a row were skipped. `record` holds the last step's figures."""

    def __init__(self, message: str, record: dict | None = None):
        super().__init__(message)
        self.record = record or {}
