"""Triton and its language, or stand-ins where it is not installed: it has no wheels for macOS and Windows.

With the stand-ins every op can be imported and runs as its reference. No kernel is ever launched: `backend` says before
that triton is missing.
"""

import importlib.util
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING or importlib.util.find_spec("triton"):
    import triton
    import triton.language as tl
else:

    class Language:
        """Has every name, for the annotations and constants of kernels that never run."""

        def __getattr__(self, name: str) -> Any:
            return self

        def __call__(self, *args, **kwargs) -> Any:
            return self

    tl = Language()
    triton = SimpleNamespace(
        jit=lambda kernel: kernel, cdiv=lambda a, b: -(-a // b), next_power_of_2=lambda n: 1 << (n - 1).bit_length()
    )  # fmt: skip

__all__ = ["tl", "triton"]
