"""Pages of the KV cache: who holds which, and which hold the beginning of a text that another request begins with too.

A page is blank, or held by one request or more, or idle: nobody's, its content still known. A full page is known by a
digest of all tokens up to its end, so equal digests mean equal keys and values. Idle ones are taken last, oldest first.
"""

import hashlib
from array import array
from collections import OrderedDict, deque
from collections.abc import Iterable, Sequence

import torch


class Pages:
    """count pages of size tokens each."""

    def __init__(self, count: int, size: int):
        self.count, self.size = count, size
        self.holders = [0] * count
        self.blank = deque(range(count))
        self.idle: OrderedDict[int, None] = OrderedDict()
        self.known: dict[bytes, int] = {}
        self.digests: dict[int, bytes] = {}  # of the pages in `known`

    @property
    def available(self) -> int:
        return len(self.blank) + len(self.idle)

    def needed(self, tokens: int) -> int:
        return -(-tokens // self.size)

    def take(self) -> int:
        """A page whose content is nobody's. IndexError where none is available."""
        if self.idle and not self.blank:
            page, _ = self.idle.popitem(last=False)
            del self.known[self.digests.pop(page)]
        else:
            page = self.blank.popleft()
        self.holders[page] = 1
        return page

    def share(self, digests: Iterable[bytes]) -> list[int]:
        """Hold the pages that are known, up to the first that is not."""
        found = []
        for digest in digests:
            if (page := self.known.get(digest)) is None:
                break
            self.idle.pop(page, None)
            self.holders[page] += 1
            found.append(page)
        return found

    def publish(self, page: int, digest: bytes) -> None:
        """Say what a full page holds, unless another page is known to hold it."""
        if digest not in self.known and page not in self.digests:
            self.known[digest], self.digests[page] = page, digest

    def release(self, pages: Iterable[int]) -> None:
        """In a text's order: its end is given to others before its beginning."""
        for page in reversed(list(pages)):
            self.holders[page] -= 1
            if self.holders[page] == 0:
                if page in self.digests:
                    self.idle[page] = None
                else:
                    self.blank.append(page)


def digest(before: bytes, tokens: Sequence[int]) -> bytes:
    """Of a page's tokens after the pages whose digest is `before` (b"" at the beginning)."""
    return hashlib.blake2b(before + array("q", tokens).tobytes(), digest_size=16).digest()


def page_bytes(config, layers: int, size: int, dtype: torch.dtype) -> int:
    """Of keys and values; FP8 has a fp32 scale for each token and head."""
    cell = config.head_dim * dtype.itemsize + (4 if dtype == torch.float8_e4m3fn else 0)
    return 2 * layers * size * config.num_key_value_heads * cell
