"""The package's errors, and how commands report them: bad input is one line and exit code 2, others keep a traceback.

An op that is called with wrong tensors raises a plain ValueError.
"""

import argparse
import functools
import operator
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
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
    """A caller's whole number, also numpy's or a tensor's. Raises InputError for anything else and for less."""
    try:
        number = operator.index(value)
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


@contextmanager
def one_line_warnings() -> Iterator[None]:
    """Within it a warning, of whatever package, is a line without its place in the source."""
    before = warnings.formatwarning
    warnings.formatwarning = lambda message, *place, **more: f"warning: {one_line(str(message))}\n"
    try:
        yield
    finally:
        warnings.formatwarning = before


class Busy(LingError):
    """The engine's queue is full: try again later."""


class LostRank(LingError, RuntimeError):
    """Another process of an engine that several share has ended, or does not answer: none can go on."""


class Diverged(LingError):
    """Training stopped because too many steps in a row were skipped. `record` holds the last step's figures."""

    def __init__(self, message: str, record: dict | None = None):
        super().__init__(message)
        self.record = record or {}


class Parser(argparse.ArgumentParser):
    """Reports a flag that argparse refuses like any other bad input, in one line. A flag cannot be abbreviated."""

    def __init__(self, *args, **options):
        super().__init__(*args, allow_abbrev=False, **options)

    def error(self, message: str):
        raise InputError(f"{message}; --help lists the flags")


def check_environment() -> None:
    """Raise InputError where LING_BACKEND names no backend, or one that is not built."""
    if os.environ.get("LING_BACKEND"):
        try:
            from .backend import check_forced
        except (ImportError, OSError):  # no torch: `info` says so, and no other command comes this far
            return
        check_forced()


def command(main: Callable[..., int | None]) -> Callable[..., int]:
    """main() of a command line: an InputError, or too little memory, becomes `error: ...` on stderr and exit code 2; a
    warning becomes a line `warning: ...`."""

    @functools.wraps(main)
    def run(*args, **kwargs) -> int:
        try:
            with one_line_warnings():
                check_environment()
                return main(*args, **kwargs) or 0
        except OtherRank:
            return 2
        except InputError as error:
            print(f"error: {error}", file=sys.stderr)
            return 2
        except (MemoryError, RuntimeError) as error:
            if isinstance(error, RuntimeError) and "can't allocate memory" not in str(error):  # torch's, on a CPU
                raise
            print(f"error: too little memory: {one_line(str(error))}", file=sys.stderr)
            return 2

    return run
