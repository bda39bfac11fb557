"""Pages of an engine over several processes that leave its devices: each rank copies its part.

The processes share the host memory of the prefix cache, and a row of it has the parts of all ranks, one after the
other. So a page is there whole or not at all, in memory and in a file, and rank 0 keeps both as an engine of one
process does (pages/levels.py). It tells the others which pages to copy to which rows, and back, between the passes;
they do so before their next pass, and say when they have.
"""

import hashlib
import mmap
import os
import weakref
from collections.abc import Callable, Sequence
from contextlib import suppress
from multiprocessing.connection import Connection

import torch
from torch import Tensor

from ..errors import LostRank
from ..model import Ling
from ..ops.attention_decode import KVCache
from .pages.copies import Copies, Event, copies_of, page_identity
from .workers import Workers


class Copied:
    """The end of a copy on every rank; `number`: of the copies so far. It has come, too, when a rank is lost: nobody
    waits for ever, and the next pass fails."""

    def __init__(self, workers: Workers, number: int, here: Event | None):
        self.workers, self.number, self.here = workers, number, here

    def query(self) -> bool:
        return self.workers.cannot_go_on or (
            self.workers.have_copied(self.number) and (self.here is None or self.here.query())
        )

    def synchronize(self) -> None:
        if self.here is not None:
            self.here.synchronize()
        self.workers.wait_for_copies(self.number)


class Saved(Copied):
    """The end of a copy to rows, which is not to be written to a file where a part is missing."""

    def synchronize(self) -> None:
        """Raises LostRank."""
        super().synchronize()
        if not self.workers.have_copied(self.number):
            raise self.workers.lost or LostRank("the engine is closed")


class LeadCopies(Copies):
    """Rank 0's copies, `here`, and those that it has the others make."""

    def __init__(self, workers: Workers, here: Copies):
        self.workers, self.here, self.number = workers, here, 0
        self.row_bytes, self.most = here.row_bytes * workers.n, here.most

    def memory(self, count: int) -> list[Tensor]:
        file = os.memfd_create("pages")
        try:
            os.ftruncate(file, count * self.row_bytes)
            self.workers.send("memory", f"/proc/{os.getpid()}/fd/{file}")
            rows = mapped(file, self.here.pinned).view(count, self.row_bytes)
            self.workers.receive("mapped")
        finally:
            os.close(file)
        return [*rows]

    def identity(self, here: Callable[[], bytes]) -> bytes:
        """Of all parts: what a rank's page holds depends on the weights of every rank."""
        self.workers.send("identity", None)
        parts = [here(), *self.workers.receive("identity")]
        return hashlib.blake2b(b"".join(parts), digest_size=16).digest()

    def save(self, pages: Sequence[int], rows: Sequence[Tensor]) -> Event | None:
        self.tell("save", pages, rows)
        return Saved(self.workers, self.number, self.here.save(pages, self.parts_of(rows)))

    def load(self, pages: Sequence[int], rows: Sequence[Tensor]) -> Event | None:
        self.tell("load", pages, rows)
        return Copied(self.workers, self.number, self.here.load(pages, self.parts_of(rows)))

    def tell(self, name: str, pages: Sequence[int], rows: Sequence[Tensor]) -> None:
        self.number += 1
        with suppress(LostRank):  # which the next pass raises
            self.workers.send(name, (pages, [row.storage_offset() // self.row_bytes for row in rows]))

    def parts_of(self, rows: Sequence[Tensor]) -> list[Tensor]:
        return [row[: self.here.row_bytes] for row in rows]


class FollowCopies:
    """The copies of rank `rank` of n, as rank 0 says."""

    def __init__(self, connection: Connection, n: int, rank: int, model: Ling, caches: list[KVCache], page_size: int):
        self.connection, self.n, self.rank = connection, n, rank
        self.model, self.caches, self.page_size = model, caches, page_size

    def memory(self, path: str) -> None:
        self.copies = copies_of(self.caches)
        with open(path, "r+b") as file:
            self.rows = mapped(file.fileno(), self.copies.pinned).view(-1, self.n, self.copies.row_bytes)[:, self.rank]
        self.connection.send(("mapped", None))

    def identity(self, _: None) -> None:
        self.connection.send(("identity", page_identity(self.model, self.caches, self.page_size)))

    def save(self, given: tuple[list[int], list[int]]) -> None:
        self.finish(self.copies.save(given[0], [self.rows[i] for i in given[1]]))

    def load(self, given: tuple[list[int], list[int]]) -> None:
        self.finish(self.copies.load(given[0], [self.rows[i] for i in given[1]]))

    def finish(self, event: Event | None) -> None:
        if event is not None:
            event.synchronize()
        self.connection.send(("copied", None))


def mapped(file: int, pin: bool) -> Tensor:
    """[bytes] uint8: the memory of an open file, for all processes that map it."""
    memory = mmap.mmap(file, 0)
    tensor = torch.frombuffer(memory, dtype=torch.uint8)
    if pin:
        cuda, address = torch.cuda.cudart(), tensor.data_ptr()
        torch.cuda.check_error(cuda.cudaHostRegister(address, len(tensor), 0))
        weakref.finalize(memory, cuda.cudaHostUnregister, address)  # before it is unmapped
    return tensor
