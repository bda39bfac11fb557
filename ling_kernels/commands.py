"""What every command line shares: its parser, and how it reports errors.

Bad input is one line and exit code 2; other errors keep a traceback.
"""

import argparse
import functools
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from .errors import InputError, LostRank, OtherRank, one_line


@contextmanager
def one_line_warnings() -> Iterator[None]:
    """Within it a warning, of whatever package, is a line without its place in the source."""
    before = warnings.formatwarning
    warnings.formatwarning = lambda message, *place, **more: f"warning: {one_line(str(message))}\n"
    try:
        yield
    finally:
        warnings.formatwarning = before


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
    warning becomes a line `warning: ...`. A lost rank is `error: ...` and exit code 1."""

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
        except LostRank as error:
            print(f"error: {one_line(str(error))}", file=sys.stderr)
            return 1
        except (MemoryError, RuntimeError) as error:
            if isinstance(error, RuntimeError) and "can't allocate memory" not in str(error):  # torch's, on a CPU
                raise
            print(f"error: too little memory: {one_line(str(error))}", file=sys.stderr)
            return 2

    return run
