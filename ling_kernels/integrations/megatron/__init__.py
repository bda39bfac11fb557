"""Our ops inside Megatron-core's GPTModel: `apply()` before the model is built, `undo()` to have Megatron's own again.

docs/integrations/megatron.md says what is replaced, and where Megatron's own code still runs. Megatron-core is imported
when a name here is first used; without it that raises MissingPackage.
"""

import importlib
from typing import Any

__all__ = ["PARTS", "Attention", "Experts", "Fp8Experts", "apply", "replaced", "undo"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(".patch", __name__), name)
