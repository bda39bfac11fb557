"""A setting's value in the type of its field: what flags, Python, JSON and recipes give becomes one type."""

import math
import os
from collections.abc import Iterable
from dataclasses import Field, fields
from numbers import Integral, Real
from typing import Any

import numpy as np

from ..errors import InputError


def plain(f: Field, value: Any) -> Any:
    """A setting's value in the type of its field. Raises InputError for a value that has none."""
    if value is None and f.default is None:
        return None
    if f.name == "vocab":
        return vocabulary(value)
    kind = next(kind for kind in (bool, int, float, str, tuple[str, ...]) if f.type in (kind, kind | None))
    is_bool = isinstance(value, bool | np.bool_)
    if kind is bool and is_bool:
        return bool(value)
    if kind is int and isinstance(value, Integral) and not is_bool:
        if abs(int(value)) >= 1 << 63:  # such numbers turn up as nan and 0 in floating point
            raise InputError(f"--{f.name.replace('_', '-')} {value}: it must have at most 63 bits")
        return int(value)
    if kind is float and isinstance(value, Real) and not is_bool:
        return value if type(value) in (int, float) else float(value)
    if kind is str and isinstance(value, str | os.PathLike) and os.fspath(value):
        return os.fspath(value)
    if kind == tuple[str, ...]:
        values = (value,) if isinstance(value, str | os.PathLike) else value
        values = tuple(values) if isinstance(values, Iterable) and not isinstance(values, bytes) else (None,)
        if all(isinstance(v, str | os.PathLike) and os.fspath(v) for v in values):  # "" would be the current folder
            return tuple(map(os.fspath, values))
    names = {bool: "True or False", int: "a whole number", float: "a number", str: "text"}
    raise InputError(f"{f.name} {value!r}: it must be {names.get(kind, 'a path or several')}")


def in_bounds(f: Field, value: Any) -> bool:
    """Whether a number is finite and within the bounds of its field, `least` and `above`; other values have none."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return True
    least, above = f.metadata.get("least", -math.inf), f.metadata.get("above", -math.inf)
    return math.isfinite(value) and value >= least and value > above


def check_bounds(settings: Any) -> None:
    """Raise InputError for the first field of a dataclass of settings whose value is not among its choices or not
    within its bounds."""
    for f in fields(settings):
        value, name, limits = getattr(settings, f.name), f.name.replace("_", "-"), f.metadata
        if limits.get("choices") and value not in limits["choices"]:
            raise InputError(f"--{name} {value}: it must be one of {', '.join(limits['choices'])}")
        if not in_bounds(f, value):
            least = f"at least {limits['least']}" if "least" in limits else ""
            bound = least or f"more than {limits.get('above', -math.inf)}"
            raise InputError(f"--{name} {value}: it must be {bound}")


def vocabulary(value: Any) -> int | str:
    """The setting vocab: a number, or auto."""
    if isinstance(value, Integral) and not isinstance(value, bool):
        return int(value)
    if value == "auto" or (isinstance(value, str) and value.isascii() and value.isdecimal()):
        return value if value == "auto" else int(value)
    raise InputError(f"--vocab {value!r}: it must be auto or a whole number")
