"""Pages of the KV cache on the device: allocation, reference counts, and prefix caching by page hash.

A page is free, in use by one or more requests, or evictable: without users, its content still cached. A full page is
identified by the hash of its adapter and all tokens up to its end, so equal hashes mean equal keys and values.
Evictable pages are allocated after the free ones, least recently released first. What they held then goes on in the
levels below, if there are any (levels.py).
"""

import hashlib
import os
from array import array
from collections import OrderedDict, deque
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from .levels import PageLevels


class PagePool:
    """`count` pages of `size` tokens each."""

    def __init__(self, count: int, size: int):
        self.count, self.size = count, size
        self.ref_counts = [0] * count
        self.free = deque(range(count))
        self.evictable: OrderedDict[int, None] = OrderedDict()
        self.page_of_hash: dict[bytes, int] = {}
        self.hash_of_page: dict[int, bytes] = {}
        self.levels: PageLevels | None = None  # below the device

    @property
    def available(self) -> int:
        """Pages that can be allocated: free and evictable ones."""
        return len(self.free) + len(self.evictable)

    def needed(self, tokens: int) -> int:
        """Pages for so many tokens."""
        return -(-tokens // self.size)

    def allocate(self) -> int:
        """A page without cached content. Raises IndexError if none is available."""
        if self.evictable and not self.free:
            page, _ = self.evictable.popitem(last=False)
            if self.levels is not None:
                self.levels.evict(page)
            del self.page_of_hash[self.hash_of_page.pop(page)]
        else:
            page = self.free.popleft()
        self.ref_counts[page] = 1
        return page

    def prefix(self, hashes: Iterable[bytes]) -> Iterator[tuple[bytes, int | None]]:
        """(hash, page) up to the first hash that is not cached; page is None where a lower level has it."""
        for page_hash in hashes:
            page = self.page_of_hash.get(page_hash)
            if page is None and (self.levels is None or page_hash not in self.levels.host):
                return
            yield page_hash, page

    def in_use(self, hashes: Iterable[bytes]) -> int:
        """How many of the pages that `share_prefix` would give have a user already."""
        return sum(page is not None and self.ref_counts[page] > 0 for _, page in self.prefix(hashes))

    def share_prefix(self, hashes: Iterable[bytes]) -> list[int]:
        """Add a reference to each cached page, up to the first hash that is not cached. Pages of lower levels are
        copied to available ones; see PageLevels.loaded."""
        pages, loads = [], []
        for page_hash, page in self.prefix(hashes):
            if page is None:
                held = self.levels.host.use(page_hash) if self.available else None
                if held is None:
                    break
                page = self.allocate()
                self.register(page, page_hash)
                loads.append((page, held))
            else:
                self.evictable.pop(page, None)
                self.ref_counts[page] += 1
            pages.append(page)
        if self.levels is not None:
            self.levels.load(loads)
            self.levels.hits["device"] += (len(pages) - len(loads)) * self.size
        return pages

    def register(self, page: int, page_hash: bytes) -> None:
        """Make a full page available to `share_prefix`, unless another page has the same content."""
        if page_hash not in self.page_of_hash and page not in self.hash_of_page:
            self.page_of_hash[page_hash], self.hash_of_page[page] = page, page_hash

    def forget(self) -> None:
        """Free the pages that are cached without users, whose content is of no use any more."""
        for page in self.evictable:
            del self.page_of_hash[self.hash_of_page.pop(page)]
        self.free.extend(self.evictable)
        self.evictable.clear()
        if self.levels is not None:
            self.levels.forget()

    def release(self, pages: Iterable[int]) -> None:
        """Drop a reference to each page of a sequence, in its order: the end is evicted before the beginning."""
        for page in reversed(list(pages)):
            self.ref_counts[page] -= 1
            if self.ref_counts[page] == 0:
                if page in self.hash_of_page:
                    self.evictable[page] = None
                    if self.levels is not None:
                        self.levels.release(page, self.hash_of_page[page])
                else:
                    self.free.append(page)


def hash_page(prefix_hash: bytes, tokens: Sequence[int]) -> bytes:
    """The hash of a page's tokens after the pages whose hash is prefix_hash (Request.prefix_seed for the first)."""
    return hashlib.blake2b(prefix_hash + array("q", tokens).tobytes(), digest_size=16).digest()


def page_bytes(config, layers: int, size: int, dtype: torch.dtype) -> int:
    """Bytes of a page: keys and values of all layers, in FP8 with an fp32 scale per token and head."""
    per_head = config.head_dim * dtype.itemsize + (4 if dtype == torch.float8_e4m3fn else 0)
    return 2 * layers * size * config.num_key_value_heads * per_head


def memory_of(device: torch.device) -> int:
    """Bytes of a GPU's memory, or of the machine's."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[1]
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
