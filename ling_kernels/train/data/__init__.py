"""The data of a run: documents of token ids from files of text, chats and ids, and the rows that they are packed into.

`python -m ling_kernels.train.data SOURCES --out X.bin` tokenises text or chats into a .bin file. The rows are tensors,
for which torch is loaded when the first of their names is used: commands that only read text do without.
"""

import importlib
from typing import TYPE_CHECKING

from .documents import Documents, cut, describe, gather_tokens, hold_out, join, open_chats, open_tokens

__all__ = [
    "Batch", "Documents", "Packed", "PackedWhole", "batch_of", "best_fit", "cut", "describe", "gather_tokens",
    "hold_out", "join", "open_chats", "open_tokens", "packed_rows",
]  # fmt: skip

if TYPE_CHECKING:
    from .packing import Batch, Packed, PackedWhole, batch_of, best_fit, packed_rows
else:

    def __getattr__(name: str):
        if name not in __all__:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        value = globals()[name] = getattr(importlib.import_module(".packing", __name__), name)
        return value
