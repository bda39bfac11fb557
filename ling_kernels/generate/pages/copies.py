"""Copies of whole pages between the caches and host memory, and what makes a page valid.

A page is a row of bytes: the keys, values and scales of every layer, one after the other.
"""

import hashlib
from collections.abc import Iterable, Sequence
from functools import cache
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from ...model import Ling
from ...ops.attention_decode import KVCache

FORMAT = 1  # of a row; another number makes all files of earlier versions foreign
BLOCK_BYTES = 1 << 30  # of host memory that is allocated at a time: torch rounds a pinned block up to a power of two
STAGING = 256 << 20  # bytes on a GPU for the rows of a copy
WORDS = 1 << 20  # of 4 bytes that a sum of `digest_of` covers


class Event(Protocol):
    """The end of copies that were started; torch.cuda.Event is one."""

    def query(self) -> bool: ...

    def synchronize(self) -> None: ...


class Copies:
    """On a CPU: a copy is complete when the call returns, and there is no event. pinned: of the rows' memory."""

    pinned = False

    def __init__(self, caches: Sequence[KVCache]):
        tensors = [t for c in caches for t in c if t is not None]
        self.parts = [t.view(len(t), -1).view(torch.uint8) for t in tensors]  # [pages, bytes]
        self.row_bytes = sum(part.shape[1] for part in self.parts)
        self.most = max(1, STAGING // self.row_bytes)  # pages of one call

    def memory(self, count: int) -> list[Tensor]:
        """Host memory for so many pages, as rows [row_bytes] uint8."""
        rows_of_block = max(1, BLOCK_BYTES // self.row_bytes)
        sizes = [min(rows_of_block, count - first) for first in range(0, count, rows_of_block)]
        blocks = [torch.empty(n, self.row_bytes, dtype=torch.uint8, pin_memory=self.pinned) for n in sizes]
        return [row for block in blocks for row in block]

    def save(self, pages: Sequence[int], rows: Sequence[Tensor]) -> Event | None:
        """Copy pages of the caches to rows [row_bytes] uint8 of host memory."""
        for page, row in zip(pages, rows, strict=True):
            torch.cat([part[page] for part in self.parts], out=row)
        return None

    def load(self, pages: Sequence[int], rows: Sequence[Tensor]) -> Event | None:
        """Copy rows to pages, which no pass may use before the event."""
        for page, row in zip(pages, rows, strict=True):
            for part, piece in zip(self.parts, row.split([p.shape[1] for p in self.parts]), strict=True):
                part[page] = piece
        return None


class StreamCopies(Copies):
    """On a GPU: on a stream of its own, beside the passes. Rows lie in pinned memory.

    The pages of a call go through one tensor on the device, so that a row is one transfer over the bus. A later pass
    waits only until `save` has read the pages, at the speed of the device's memory.
    """

    pinned = True

    def __init__(self, caches: Sequence[KVCache]):
        super().__init__(caches)
        self.device = self.parts[0].device
        self.stream = torch.cuda.Stream(self.device)

    def save(self, pages: Sequence[int], rows: Sequence[Tensor]) -> Event | None:
        passes, read, copied = torch.cuda.current_stream(self.device), torch.cuda.Event(), torch.cuda.Event()
        self.stream.wait_stream(passes)  # what they write to the pages
        with torch.cuda.stream(self.stream):
            index = torch.tensor(pages).to(self.device, non_blocking=True)
            staged = torch.cat([part[index] for part in self.parts], 1)
            read.record()
            for row, from_device in zip(rows, staged, strict=True):
                row.copy_(from_device, non_blocking=True)
            copied.record()
        passes.wait_event(read)
        return copied

    def load(self, pages: Sequence[int], rows: Sequence[Tensor]) -> Event | None:
        copied = torch.cuda.Event()
        self.stream.wait_stream(torch.cuda.current_stream(self.device))  # a pass may still use what the pages held
        with torch.cuda.stream(self.stream):
            index = torch.tensor(pages).to(self.device, non_blocking=True)
            staged = torch.empty(len(rows), self.row_bytes, dtype=torch.uint8, device=self.device)
            for row, to_device in zip(rows, staged, strict=True):
                to_device.copy_(row, non_blocking=True)
            for part, piece in zip(self.parts, staged.split([p.shape[1] for p in self.parts], 1), strict=True):
                part.index_copy_(0, index, piece)
            copied.record()
        return copied


def copies_of(caches: Sequence[KVCache]) -> Copies:
    return (StreamCopies if caches[0].k.is_cuda else Copies)(caches)


def page_identity(model: Ling, caches: Sequence[KVCache], page_size: int) -> bytes:
    """16 bytes that differ where pages of the same tokens do: by weights, configuration (RoPE and norms), layers, dtype
    and page size of the cache, type of device, and whether the model is pinned."""
    first, pinned = caches[0].k, model.layers[0].attention.pinned
    about = f"{FORMAT} {model.config!r} {len(caches)} {first.dtype} {page_size} {first.device.type} {pinned} "
    weights = digest_of(sorted(model.state_dict().items()))
    return hashlib.blake2b(about.encode() + weights, digest_size=16).digest()


@torch.no_grad()
def digest_of(tensors: Iterable[tuple[str, Tensor]]) -> bytes:
    """16 bytes of tensors' names, shapes, dtypes and contents. The contents are read once, on their device: of every
    WORDS words of 4 bytes two sums of products with random 64-bit numbers are taken, modulo 2^64."""
    digest = hashlib.blake2b(digest_size=16)
    for name, tensor in tensors:
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)} ".encode())
        content = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
        if len(content) % 4 or content.storage_offset() % 4:
            content = torch.cat([content, content.new_zeros(-len(content) % 4)])
        factors = random_factors(content.device)
        sums = [(words * factors[:, : len(words)]).sum(1) for words in content.view(torch.int32).split(WORDS)]
        digest.update(torch.cat(sums).cpu().numpy().tobytes())
    return digest.digest()


@cache
def random_factors(device: torch.device) -> Tensor:
    """[2, WORDS] odd int64, the same in every process."""
    raw = np.random.Philox(key=2).random_raw(2 * WORDS) | np.uint64(1)
    return torch.from_numpy(raw.view(np.int64)).view(2, WORDS).to(device)
