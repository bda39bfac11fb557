"""Kernels for Ling-2.0 mixture-of-experts models on NVIDIA Hopper; `ling_kernels.<op>` is every public op.

Nothing heavy is imported here: an op's file, and Triton where it has Triton kernels, is loaded when it is first used.
"""

import importlib

from .ops import EXPORTS

__version__ = "0.1.0"
__all__ = [*EXPORTS]


def __getattr__(name: str):
    if name not in EXPORTS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(importlib.import_module(f".ops.{EXPORTS[name]}", __name__), name)
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *EXPORTS])
