"""Kernels for Ling-2.0 mixture-of-experts models on NVIDIA Hopper; `ling_kernels.<op>` is every public op.

The import is light: an op's file, and Triton where it has Triton kernels, is loaded at the op's first use.
"""

from typing import TYPE_CHECKING

from . import ops
from .errors import Busy, Diverged, InputError, LingError

__version__ = "0.1.0"
__all__ = [*ops.EXPORTS, *ops.HELPERS, "Busy", "Diverged", "InputError", "LingError", "explain"]

if TYPE_CHECKING:
    from .op import explain
    from .ops import *  # noqa: F403
else:  # a type checker would take every name for an attribute

    def __getattr__(name: str):
        if name not in __all__:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        if name == "explain":
            from .op import explain as value
        else:
            value = getattr(ops, name)
        globals()[name] = value
        return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
