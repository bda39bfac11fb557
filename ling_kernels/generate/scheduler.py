"""The scheduler: continuous batching with chunked prefill over a paged KV cache.

A running request holds pages; the first `computed` of its tokens have keys and values in them. A pass decodes
every request with only its last token uncomputed; the pass's remaining rows prefill the other requests, oldest first,
in chunks. The last prompt token is decoded in the pass of the last chunk. Of the waiting requests the next is one of
the client with the fewest running ones; it is admitted once the cache has room for it. Requests with the same prefix
share pages: one whose next page a running request computes waits until it is there, and others pass it. When the pages
run out, the youngest request is preempted: it releases its pages and waits at the head of the queue.

On a GPU the next pass is scheduled before the host has the tokens of the last one. Then a request counts with the
longest length it can have by now, and is not scheduled beyond max_new_tokens.
"""

import time
from collections import Counter, deque
from typing import NamedTuple

from ..errors import Busy, InputError
from .pages.pool import PagePool, hash_page
from .request import DRAFT_SLACK, Request
from .waiting import Waiting


class Work(NamedTuple):
    """One request's part of a pass."""

    prefill: int  # tokens to prefill
    decode: bool  # decode its last token and the draft tokens after it


class Scheduler:
    """Owns the queues and the pages. A decode has 1 + draft rows: the last token and the draft tokens to verify.

    `submit` may be called from any thread; everything else needs the engine's lock.
    """

    def __init__(self, pages: PagePool, max_running: int, max_rows: int, max_waiting: int, draft: int):
        self.pages, self.max_rows, self.max_waiting, self.draft = pages, max_rows, max_waiting, draft
        self.submitted: deque[Request] = deque()  # `sweep` moves them to waiting
        self.waiting = Waiting()
        self.running: list[Request] = []  # in order of admission
        self.lanes = deque(range(max_running))  # free ones
        self.free_rows = max_rows  # of the pass being scheduled
        self.held_back = False  # whether a request was left out of it, whose pages are on their way to the device

    def submit(self, request: Request) -> None:
        """Queue a request. Raises Busy if the queue is full, InputError if the cache is too small for the request."""
        total = len(request.prompt) + request.max_new_tokens + DRAFT_SLACK * self.draft
        if self.pages.needed(total) > self.pages.count:
            raise InputError(
                f"the request needs up to {total} tokens; the cache holds {self.pages.count * self.pages.size}"
            )
        if self.full and not self.below_share(request.client):
            raise Busy(f"the queue is full: {self.queued} requests are waiting")
        self.submitted.append(request)

    @property
    def full(self) -> bool:
        return self.queued >= self.max_waiting

    def below_share(self, client: str) -> bool:
        """Whether a client may wait although the queue is full: it has less than an equal part of it, because others
        filled it. Such requests make it at most twice as long."""
        waiting = Counter(r.client for r in [*self.submitted, *self.waiting])
        share = self.max_waiting // len({*waiting, client})
        return waiting[client] < share and self.queued < 2 * self.max_waiting

    @property
    def queued(self) -> int:
        """Requests that wait for admission."""
        return len(self.submitted) + len(self.waiting)

    def schedule(self) -> dict[Request, Work]:
        """Choose the work of the next pass and reserve its pages. If may_preempt, collect the pending pass first."""
        self.sweep()
        scheduled: dict[Request, Work] = {}
        self.free_rows, self.held_back = self.max_rows, False
        for request in sorted(self.running, key=lambda r: r.uncomputed > 1):  # decodes first; stable: oldest first
            if request.lane is not None:  # not preempted by an older request
                self.schedule_request(request, scheduled)
        if self.waiting and self.free_rows and self.lanes:
            self.admit_waiting(scheduled)
        return scheduled

    def admit_waiting(self, scheduled: dict[Request, Work]) -> None:
        """Start waiting requests in their order, while there are rows, lanes and pages. Those wait and are passed whose
        next page a running request computes, or whose pages are being read from files."""
        computing = {h for r in self.running for h in self.uncomputed_pages(r)}
        running = Counter(r.client for r in self.running)
        for request in self.waiting.in_order(running):
            if request.admitted is None and not self.fetched(request):
                continue
            if computing and self.missing_page(request) in computing:
                continue
            if not self.admit(request):
                break
            self.waiting.remove(request)
            self.running.append(request)
            running[request.client] += 1
            computing.update(self.uncomputed_pages(request))
            if not (self.schedule_request(request, scheduled) and self.free_rows and self.lanes):
                break

    def fetched(self, request: Request) -> bool:
        """Whether no file of its prefix is being read, or is to be read; begins to do so."""
        if self.pages.levels is None:
            return True
        if request.fetch is None:
            request.fetch = self.pages.levels.fetch(self.reusable_pages(request))
        done = request.fetch is not None and request.fetch.done
        self.held_back |= not done
        return done

    def uncomputed_pages(self, request: Request) -> list[bytes]:
        """The hashes of the full pages of a running request's tokens that are not in the cache."""
        return request.page_hashes[request.computed // self.pages.size :]

    def reusable_pages(self, request: Request) -> list[bytes]:
        """The hashes of the pages that may come from the prefix cache."""
        self.hash_pages(request)
        first = len(request.tokens) - 1  # the last token must be computed
        first = min(first, request.first_scored_row) if request.needs_prompt_rows else first
        return request.page_hashes[: first // self.pages.size]

    def missing_page(self, request: Request) -> bytes | None:
        """The hash of the first of these pages that the cache does not have."""
        hashes = self.reusable_pages(request)
        known = sum(1 for _ in self.pages.prefix(hashes))
        return hashes[known] if known < len(hashes) else None

    def schedule_request(self, request: Request, scheduled: dict[Request, Work]) -> bool:
        """Add as much of its work as the free rows allow; False if it was preempted instead."""
        if self.pages.levels is not None and not self.pages.levels.loaded(request.pages):
            self.held_back = True
            return True
        prefill = min(request.uncomputed - 1, self.free_rows)
        reaches_last = prefill == request.uncomputed - 1 and self.free_rows - prefill > self.draft
        work = Work(prefill, reaches_last and self.may_decode(request))
        if any(work):
            if not self.reserve_pages(request, self.slots_needed(request, work), scheduled):
                return False
            scheduled[request] = work
            self.free_rows -= self.rows_of(work)
        return True

    def rows_of(self, work: Work) -> int:
        return work.prefill + work.decode * (1 + self.draft)

    def may_decode(self, request: Request) -> bool:
        """Whether it can still be below max_new_tokens: every pass in flight gives at least one token. A grammar's mask
        needs that token, so that such a request waits for its last pass."""
        if request.guide is not None and request.passes_in_flight:
            return False
        return request.num_new_tokens + request.passes_in_flight < request.max_new_tokens

    def slots_needed(self, request: Request, work: Work) -> int:
        """Cache slots that the request may use up to and including this work."""
        if not work.decode:
            return request.computed + work.prefill
        longest = len(request.tokens) + request.passes_in_flight * (1 + self.draft)
        return longest + self.draft + max(0, self.draft - 1)  # draft - 1: rows of the MTP layer only

    @property
    def may_preempt(self) -> bool:
        """Whether the next pass may have to preempt a request."""
        missing = 0
        for r in self.running:
            work = Work(r.uncomputed - 1, self.may_decode(r))
            missing += max(0, self.pages.needed(self.slots_needed(r, work)) - len(r.pages))
        return missing > self.pages.available

    def sweep(self) -> None:
        """Move submitted requests to the waiting queue; finish cancelled requests and those past their deadline."""
        now = time.monotonic()
        while self.submitted:
            self.waiting.append(self.submitted.popleft())
        for request in [*self.waiting, *self.running]:
            if request.cancelled or now >= request.deadline:
                self.finish(request, "cancelled" if request.cancelled else "timeout")

    def admit(self, request: Request) -> bool:
        """Give it a lane and the cached pages of its prefix, if the pages suffice for its tokens and one decode."""
        hashes = self.reusable_pages(request)
        needed = self.pages.needed(self.slots_needed(request, Work(0, True)) + 1)
        if needed - self.pages.in_use(hashes) > self.pages.available:
            return False
        request.pages = self.pages.share_prefix(hashes)
        request.computed = len(request.pages) * self.pages.size
        request.cached_tokens = request.computed if request.cached_tokens is None else request.cached_tokens
        request.admitted = time.monotonic() if request.admitted is None else request.admitted
        request.lane = self.lanes.popleft()
        return True

    def reserve_pages(self, request: Request, slots: int, scheduled: dict[Request, Work]) -> bool:
        """Allocate pages for so many slots, preempting the youngest requests; False if it was itself preempted."""
        while self.pages.needed(slots) > len(request.pages):
            if self.pages.available:
                request.pages.append(self.pages.allocate())
                continue
            youngest = self.running.pop()
            if youngest in scheduled:
                self.free_rows += self.rows_of(scheduled.pop(youngest))
            self.release(youngest)
            self.waiting.preempted.appendleft(youngest)
            if youngest is request:
                return False
        return True

    def advance(self, request: Request, tokens: int) -> None:
        """Count tokens whose keys and values are in the cache, or will be before a later pass reads them."""
        full_pages = request.computed // self.pages.size
        request.computed += tokens
        self.hash_pages(request)
        for i in range(full_pages, request.computed // self.pages.size):
            self.pages.register(request.pages[i], request.page_hashes[i])

    def hash_pages(self, request: Request) -> None:
        """Bring page_hashes up to date with tokens."""
        size, hashes = self.pages.size, request.page_hashes
        for i in range(len(hashes), len(request.tokens) // size):
            before = hashes[-1] if hashes else request.prefix_seed
            hashes.append(hash_page(before, request.tokens[i * size : (i + 1) * size]))

    def finish(self, request: Request, reason: str, error: Exception | None = None) -> None:
        """End a request and release its pages; full pages stay in the prefix cache. No effect if it has ended."""
        if request.finished:
            return
        request.finished, request.error = reason, error
        queue = self.running if request in self.running else self.waiting
        if request in queue:
            queue.remove(request)
        self.release(request)

    def release(self, request: Request) -> None:
        """Release its pages and lane."""
        self.pages.release(request.pages)
        if request.lane is not None:
            self.lanes.append(request.lane)
        request.pages, request.computed, request.lane = [], 0, None
        request.pages_on_device, request.has_drafts = 0, False
