"""The flags of `python -m ling_kernels.train`, one for each setting, in groups."""

import argparse
import re
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import Field, fields
from typing import Any

from ..commands import Parser
from ..errors import InputError
from .settings import PRESETS, Settings

# The first setting of each group of the help.
GROUPS = dict(
    model="model", data="data", steps="batches, optimizer, learning rate",
    eval_every="validation, checkpoints, what is shown", dp="several GPUs, a process for each, by torchrun",
    device="device, precision, memory",
)  # fmt: skip


def parser() -> Parser:
    flags = Parser(
        "python -m ling_kernels.train", usage="%(prog)s [flags]",
        description="Train a Ling-2.0 model on one GPU or CPU. Without flags it trains tiny on the text that ships in"
        " CPython, in minutes. docs/training.md has examples and explains what happens.",
    )  # fmt: skip
    flags.add_argument("--out", metavar="RUN", help="folder of a new run (default: runs/MODEL-DATE-TIME)")
    flags.add_argument(
        "--resume",
        metavar="RUN",
        help="a run, to continue from its latest checkpoint; or one of its checkpoints; or auto: the run in --out, or"
        " else the latest of the model, or a new one where there is none (default: a new run)",
    )
    flags.add_argument(
        "--plan", action="store_true", help="print the memory, time and disk that the run takes, and stop"
    )
    flags.add_argument(
        "--recipe", metavar="NAME",
        help="train the stages of a recipe one after the other: tiny, mini, flash, 1t, or a folder of stages; other"
        " flags are for all stages; with --plan, show them (default: one run)",
    )  # fmt: skip
    flags.add_argument(
        "--source", nargs="+", metavar="NAME=PATH", help="the data of a recipe's sources (default: tiny has small ones)"
    )
    add_flags(flags)
    return flags


def add_flags(parser: argparse.ArgumentParser, without: Collection[str] = ()) -> None:
    """Add --preset and one flag per setting, but for those of `without`. Flags that are not given are absent from the
    result: a resumed run keeps its own values for them."""
    presets = "; ".join(f"{name}: {as_flags(values)}" for name, values in PRESETS.items())
    parser.add_argument(
        "--preset", choices=PRESETS, default=argparse.SUPPRESS,
        help=f"a recipe's settings, for the flags that are not given: {presets}",
    )  # fmt: skip
    add_argument = parser.add_argument
    for f in fields(Settings):
        if f.name in GROUPS:
            add_argument = parser.add_argument_group(GROUPS[f.name]).add_argument
        if f.name not in without:
            add_flag(add_argument, f)


def add_flag(add_argument: Callable[..., Any], f: Field) -> None:
    """Add a setting's flag by the method `add_argument` of a parser or a group."""
    options = {k: v for k, v in f.metadata.items() if k not in ("least", "above", "shown")}
    default = f.metadata.get("shown", f.default)
    options["help"] = f"{options['help']} (default: {default})"
    if "choices" not in options and "action" not in options:
        options["type"] = next((kind for kind in (int, float) if f.type in (kind, kind | None)), str)
        options.setdefault("metavar", {int: "N", float: "X"}.get(options["type"], f.name.upper()))
    add_argument("--" + f.name.replace("_", "-"), default=argparse.SUPPRESS, **options)


def as_flags(values: dict) -> str:
    return " ".join(f"--{k.replace('_', '-')} {v}" for k, v in values.items())


@contextmanager
def named_as_in_python() -> Iterator[None]:
    """Within it, an InputError names settings as Python does: seq_len, where the command has --seq-len."""
    try:
        yield
    except InputError as error:
        flags = "|".join(f.name.replace("_", "-") for f in fields(Settings))
        text = re.sub(rf"--({flags}|out|resume)(?![\w-])", lambda match: match[1].replace("-", "_"), str(error))
        raise InputError(text) from None
