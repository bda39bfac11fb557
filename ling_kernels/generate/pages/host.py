"""Pages of the KV cache in host memory: rows of a fixed number, of which the least recently used is given away."""

import threading
from collections import OrderedDict, deque
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from .copies import Event


@dataclass(eq=False)
class HostPage:
    """A row, and who needs it. Between `take` and `insert` no request sees it."""

    row: Tensor  # [row_bytes] uint8
    users: int = 1  # copies and files that read or write the row, which is not given away meanwhile
    copied: Event | None = None  # the end of the last copy from the device, before which the host must not use the row
    from_disk: bool = False  # since its last use
    written: float = 0.0  # when a file was last written or touched for it, by time.monotonic()
    dropped: bool = False  # its row is free once nobody uses it


class HostPages:
    """Rows [row_bytes] uint8 by the hashes of the pages in them. May be called from any thread."""

    def __init__(self, rows: Sequence[Tensor]):
        self.count, self.row_bytes = len(rows), len(rows[0])
        self.free = deque(map(HostPage, rows))
        self.pages: OrderedDict[bytes, HostPage] = OrderedDict()  # the least recently used first
        self.lock = threading.Lock()

    def __contains__(self, page_hash: bytes) -> bool:
        return page_hash in self.pages

    def take(self) -> HostPage | None:
        """A row to fill, for `insert` or `drop`. None where all rows are in use."""
        with self.lock:
            if not self.free:
                oldest = next((h for h, page in self.pages.items() if not page.users), None)
                if oldest is None:
                    return None
                self.free.append(self.pages.pop(oldest))
            last = self.free.popleft()  # a copy of the page before may still be on its way to the row
            return HostPage(last.row, copied=last.copied)

    def insert(self, page_hash: bytes, page: HostPage) -> None:
        """Let requests find a row; one with the same hash is dropped. The caller goes on using it until `leave`."""
        with self.lock:
            old = self.pages.pop(page_hash, None)
            if old is not None:
                self._drop(old)
            self.pages[page_hash] = page

    def use(self, page_hash: bytes) -> HostPage | None:
        """The page, which is kept until `leave`; it is now the most recently used."""
        with self.lock:
            page = self.pages.get(page_hash)
            if page is not None:
                page.users += 1
                self.pages.move_to_end(page_hash)
            return page

    def keep(self, page: HostPage) -> None:
        """One more `leave` of a page that the caller uses."""
        with self.lock:
            page.users += 1

    def leave(self, page: HostPage) -> None:
        with self.lock:
            page.users -= 1
            if page.dropped and not page.users:
                self.free.append(page)

    def drop(self, page: HostPage) -> None:
        """Leave a row that was not inserted, and free it."""
        with self.lock:
            self._drop(page)
            page.users -= 1
            if not page.users:
                self.free.append(page)

    def _drop(self, page: HostPage) -> None:
        page.dropped = True
        if not page.users:
            self.free.append(page)

    def forget(self) -> None:
        """Drop all pages."""
        with self.lock:
            for page in self.pages.values():
                self._drop(page)
            self.pages.clear()

    @property
    def used_bytes(self) -> int:
        return (self.count - len(self.free)) * self.row_bytes
