"""Kernels for Ling-2.0 mixture-of-experts models on NVIDIA Hopper; `ling_kernels.<op>` is every public op.

The import is light: an op's file, and Triton where it has Triton kernels, is loaded at the op's first use.
"""

import importlib
from typing import TYPE_CHECKING

from .errors import Busy, Diverged, InputError, LingError
from .ops import EXPORTS, HELPERS

__version__ = "0.1.0"
_LAZY = {name: f".ops.{file}" for name, file in (EXPORTS | HELPERS).items()} | {"explain": ".op"}
__all__ = [*_LAZY, "Busy", "Diverged", "InputError", "LingError"]

if TYPE_CHECKING:
    from .op import explain as explain
    from .ops import *  # noqa: F403
else:  # a type checker would take every name for an attribute

    def __getattr__(name: str):
        if name not in _LAZY:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        value = globals()[name] = getattr(importlib.import_module(_LAZY[name], __name__), name)
        return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
