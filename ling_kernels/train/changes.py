"""What a resumed run may change of its settings, and the record of what it has changed.

A change counts from the checkpoint on that the run resumes from. New data is read from its beginning, in an order of
its own; rows are counted on, and the data of earlier steps stays in the run's folder, so that one may go back.
"""

import re
from collections.abc import Collection, Sequence
from dataclasses import fields
from pathlib import Path

from .settings import FIELDS, Settings

DATA_FOLDER = "data"  # of a run: the tokens that it began with


def changes(before: Settings, after: Settings, step: int) -> list[dict]:
    """The settings that differ: for each the last step before the change, the name, the old and the new value."""
    pairs = [(f.name, getattr(before, f.name), getattr(after, f.name)) for f in fields(Settings)]
    return [dict(step=step, setting=name, old=old, new=new) for name, old, new in pairs if old != new]


def first_value(name: str, record: Sequence[dict], now):
    """A setting's value when the run began; now: its present one."""
    return next((change["old"] for change in record if change["setting"] == name), now)


def described(change: dict) -> str:
    name = change["setting"]
    old, new = (in_words(name, change[which]) for which in ("old", "new"))
    return f"changed    {name.replace('_', '-')}: {new} from step {change['step'] + 1} on; before: {old}"


def in_words(name: str, value) -> str:
    """A setting's value as the help has it: what None stands for, on and off."""
    if value is None:
        return str(FIELDS[name].metadata.get("shown", "none")) if name in FIELDS else "none"
    if isinstance(value, bool):
        return "on" if value else "off"
    return " ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)


def are_changes(value) -> bool:
    """Whether a value of state.json is such a record."""
    keys = {"step", "setting", "old", "new"}
    return isinstance(value, list) and all(isinstance(change, dict) and change.keys() == keys for change in value)


def new_data_folder(step: int, taken: Collection[str]) -> str:
    """The folder of data that begins after a step; `taken` are those of the data before and of later checkpoints."""
    name = f"{DATA_FOLDER}-{step:06d}"
    return new_data_folder(step + 1, taken) if name in taken else name


def is_data_folder(name) -> bool:
    return isinstance(name, str) and re.fullmatch(rf"{DATA_FOLDER}(-\d+)?", name) is not None


def tokens_in(run: Path, data_folder: str) -> Path:
    return run / data_folder / "tokens.bin"
