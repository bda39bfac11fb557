"""The flags of `python -m ling_kernels.train`, one for each setting, in groups."""

import argparse
from collections.abc import Callable, Collection
from dataclasses import Field, fields
from typing import Any

from .settings import PRESETS, Settings

# The first setting of each group of the help.
GROUPS = dict(
    model="model", data="data", steps="batches, optimizer, learning rate",
    eval_every="validation, checkpoints, what is shown", dp="several GPUs, a process for each, by torchrun",
    device="device, precision, memory",
)  # fmt: skip


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
