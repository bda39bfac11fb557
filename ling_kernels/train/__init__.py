"""Training on one device: the class `Trainer`, and the command `python -m ling_kernels.train`, which uses it.

The import is light: torch is loaded at the first use of a name, so that the command can prepare the process before.
"""

import importlib
from typing import TYPE_CHECKING

from ..errors import Diverged

__all__ = ["Diverged", "Settings", "Trainer"]

if TYPE_CHECKING:
    from .settings import Settings
    from .trainer import Trainer
else:

    def __getattr__(name: str):
        if name not in ("Settings", "Trainer"):
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        value = globals()[name] = getattr(importlib.import_module(f".{name.lower()}", __name__), name)
        return value
