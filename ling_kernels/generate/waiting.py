"""The requests that wait for admission, in the order in which the scheduler takes them."""

import heapq
from bisect import bisect_left, insort
from collections import Counter, deque
from collections.abc import Iterator

from .request import Request

Entry = tuple[int, int, Request]  # (priority, a number that grows with every arrival, request)


class Waiting:
    """Preempted requests come first. Of the others the next is one of the client with the fewest running requests;
    among those the one with the smallest priority, then the first.

    With n requests a change, and a step of `in_order`, take O(log n) comparisons. It belongs to the engine's lock, but
    for `len` and iteration, which any thread may use.
    """

    def __init__(self):
        self.preempted: deque[Request] = deque()
        self.entries: dict[Request, Entry] = {}
        self.queues: dict[str, list[Entry]] = {}  # of each client, sorted
        self.heads: list[Entry] = []  # the first entry of each client, sorted
        self.arrivals = 0

    def __len__(self) -> int:
        return len(self.preempted) + len(self.entries)

    def __iter__(self) -> Iterator[Request]:
        return iter([*self.preempted, *self.entries])

    def __contains__(self, request: Request) -> bool:
        return request in self.entries or request in self.preempted

    def append(self, request: Request) -> None:
        self.arrivals += 1
        entry = self.entries[request] = (request.priority, self.arrivals, request)
        queue = self.queues.setdefault(request.client, [])
        first = queue[:1]
        insort(queue, entry)
        self._update_head(first, queue)

    def remove(self, request: Request) -> None:
        if request not in self.entries:
            self.preempted.remove(request)
            return
        queue = self.queues[request.client]
        first = queue[:1]
        del queue[bisect_left(queue, self.entries.pop(request))]
        if not queue:
            del self.queues[request.client]
        self._update_head(first, queue)

    def _update_head(self, before: list[Entry], queue: list[Entry]) -> None:
        if before != queue[:1]:
            if before:
                del self.heads[bisect_left(self.heads, before[0])]
            if queue:
                insort(self.heads, queue[0])

    def in_order(self, running: Counter[str]) -> Iterator[Request]:
        """The requests, the next one first. Between two of them the caller may remove the last one, and count it in
        `running`, the number of each client's running requests: then the rest of its client's come later."""
        yield from [*self.preempted]
        found: list[tuple[int, int, int, Request, Iterator[Entry]]] = []  # a heap: the next request of some clients

        def add(rest: Iterator[Entry]) -> None:
            if (entry := next(rest, None)) is not None:
                heapq.heappush(found, (running[entry[2].client], *entry, rest))

        for client in [*running]:
            if running[client] and client in self.queues:
                add(iter([*self.queues[client]]))
        # All other clients have no running request: of these the heap needs the first only.
        idle = (request for _, _, request in [*self.heads] if not running[request.client])
        head: Request | None = None
        while True:
            if head is None and (head := next(idle, None)) is not None:
                add(iter([*self.queues[head.client]]))
            if not found:
                return
            *_, request, rest = heapq.heappop(found)
            head = None if request is head else head
            yield request
            add(rest)
