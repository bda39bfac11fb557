"""The data of a run: documents of token ids from files of text, chats and ids, and the rows that they are packed into.

`python -m ling_kernels.train.data SOURCES --out X.bin` tokenises text or chats into a .bin file.
"""

from .documents import Documents, cut, describe, gather_tokens, hold_out, join, open_chats, open_tokens
from .packing import Batch, Packed, PackedWhole, batch_of, best_fit, packed_rows

__all__ = [
    "Batch", "Documents", "Packed", "PackedWhole", "batch_of", "best_fit", "cut", "describe", "gather_tokens",
    "hold_out", "join", "open_chats", "open_tokens", "packed_rows",
]  # fmt: skip
