"""Token files of Megatron-LM's preprocess_data.py (MMapIndexedDataset), mapped in place.

X.idx is little-endian: 9 bytes of magic, uint64 version 1, uint8 code of the ids' type, uint64 number of sequences N,
uint64 number of document borders D; int32 [N] lengths of the sequences in ids, int64 [N] their first bytes in X.bin,
int64 [D] documents' first sequences, the last border being N; int8 [N] modes where there are several, which are
skipped.
"""

import struct
from pathlib import Path

import numpy as np

from ...errors import InputError
from .sources import reading

MAGIC = b"MMIDIDX\x00\x00"
HEADER = struct.Struct("<9sQBQQ")
DTYPES = {code: np.dtype(name) for code, name in {1: "u1", 2: "i1", 3: "<i2", 4: "<i4", 5: "<i8", 8: "<u2"}.items()}


def map_megatron(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """The ids of a .bin file, and the ends of its documents in ascending order. Raises InputError for a damaged file,
    and for sequences that do not follow one another."""
    index = path.with_suffix(".idx")
    with reading(index):
        content, size = index.read_bytes(), path.stat().st_size
    if len(content) < HEADER.size or not content.startswith(MAGIC):
        raise InputError(f"{index} is no index of Megatron's MMapIndexedDataset")
    _, version, code, sequences, borders = HEADER.unpack_from(content)
    if version != 1 or code not in DTYPES:
        raise InputError(f"{index} has version {version} and type {code}; known are version 1 and types of integers")
    rest = len(content) - HEADER.size - 12 * sequences - 8 * borders
    if rest not in (0, sequences) or not borders:
        raise InputError(f"{index} is damaged: {len(content)} bytes do not hold {sequences} sequences")
    offset = HEADER.size
    lengths = np.frombuffer(content, "<i4", sequences, offset)
    first_bytes = np.frombuffer(content, "<i8", sequences, offset := offset + 4 * sequences)
    documents = np.frombuffer(content, "<i8", borders, offset + 8 * sequences)
    dtype, ends = DTYPES[code], np.append(0, np.cumsum(lengths, dtype=np.int64))
    if (lengths < 0).any() or not np.array_equal(first_bytes, ends[:-1] * dtype.itemsize):
        raise InputError(f"{index} is damaged, or its sequences do not lie one after the other")
    if documents[0] != 0 or documents[-1] != sequences or (np.diff(documents) < 0).any():
        raise InputError(f"{index} is damaged: its documents are not its sequences")
    if size != ends[-1] * dtype.itemsize:
        raise InputError(f"{path} has {size} bytes, but {index.name} says {ends[-1]} ids of {dtype.itemsize} bytes")
    if not size:
        raise InputError(f"{path} holds no tokens")
    ends = np.unique(ends[documents])
    with reading(path):
        return np.memmap(path, dtype, "r"), ends[ends > 0]
