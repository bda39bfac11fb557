"""Bad input is answered with one line and exit code 2; anything else that goes wrong keeps its traceback."""

import argparse
import functools
import sys
from collections.abc import Callable


class InputError(ValueError):
    """What a user gave cannot be used; the message says what, where, and what would do."""


class Parser(argparse.ArgumentParser):
    """A flag that argparse refuses is bad input like any other: one line."""

    def error(self, message: str):
        raise InputError(f"{message}; --help lists the flags")


def command(main: Callable[..., int | None]) -> Callable[..., int]:
    """main() of a command line: an InputError becomes `error: ...` on stderr and exit code 2."""

    @functools.wraps(main)
    def run(*args, **kwargs) -> int:
        try:
            return main(*args, **kwargs) or 0
        except InputError as error:
            print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
            return 2

    return run
