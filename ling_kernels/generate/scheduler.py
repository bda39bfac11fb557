"""The scheduler: continuous batching with chunked prefill over a paged KV cache.

A running request holds pages; the first `computed` of its tokens have keys and values in them. A pass decodes
every request with only its last token uncomputed; the pass's remaining rows prefill the other requests, oldest first,
in chunks. The last prompt token is decoded in the pass of the last chunk. Of the waiting requests the next is one of
the client with the fewest running ones; it is admitted once the cache has room for it. Requests with the same prefix
share pages. When the pages run out, the youngest request is preempted: it releases its pages and waits at the head of
the queue.

On a GPU the next pass is scheduled before the host has the tokens of the last one. Then a request counts with the
longest length it can have by now, and is not scheduled beyond max_new_tokens.
"""

import operator
import secrets
import time
from collections import Counter, deque
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import NamedTuple

from torch import Tensor

from ..errors import Busy, InputError
from ..model.sample import Sampling
from .cache import PagePool, hash_page
from .logprobs import TokenLogprob

DRAFT_SLACK = 3  # spare cache slots and positions per draft token, for rows computed past a sequence's end


def max_sequence_tokens(capacity: int, draft: int) -> int:
    """Longest prompt and output together in `capacity` cache slots or model positions."""
    return capacity - DRAFT_SLACK * draft


@dataclass(eq=False)
class Request:
    """One sequence: what was submitted, and its progress.

    finished is None while it is queued or running, then the finish reason: stop, length, cancelled, timeout or error.
    """

    prompt: list[int]
    sampling: Sampling
    max_new_tokens: int
    stop_token_ids: frozenset[int]  # they end the sequence and are not part of it
    deadline: float = float("inf")  # by time.monotonic()
    num_logprobs: int | None = None  # alternatives of each new token; None: no log-probabilities
    num_prompt_logprobs: int | None = None  # of each prompt token but the first
    keep_stop: bool = False  # the stop token that ends the sequence is the last of its tokens
    policy_version: int = 0  # of the weights that it is computed with, see Engine.new_weights
    client: str = ""  # who shares the engine fairly with others
    priority: int = 0  # the smallest of a client's waiting requests is next

    tokens: list[int] = field(default_factory=list)  # prompt, and the new tokens that the host has
    computed: int = 0  # tokens with keys and values in the cache
    submitted: float = field(default_factory=time.monotonic)
    admitted: float | None = None  # time of the first admission
    cached_tokens: int | None = None  # prompt tokens found in the prefix cache at the first admission
    passes_in_flight: int = 0  # passes that decode it and whose tokens the host does not have yet
    has_drafts: bool = False  # the next pass verifies draft tokens
    cancelled: bool = False  # the next step finishes it
    finished: str | None = None
    error: Exception | None = None
    logprobs: list[TokenLogprob] = field(default_factory=list)  # of the new tokens
    prompt_logprobs: list[TokenLogprob] = field(default_factory=list)  # of the prompt's tokens after the first
    routing: Tensor | None = None  # of an engine that records it, when it has finished, see Engine
    pages: list[int] = field(default_factory=list)
    lane: int | None = None  # its row of the device state while it runs
    pages_on_device: int = 0  # leading pages already in the lane's block table
    page_hashes: list[bytes] = field(default_factory=list)  # of the full pages of tokens

    def __post_init__(self):
        self.tokens = list(self.prompt)
        self.seed = secrets.randbits(63) if self.sampling.seed is None else self.sampling.seed

    @property
    def needs_prompt_rows(self) -> bool:
        """Whether the log-probabilities of its prompt are incomplete: then no row of the prompt may be left out."""
        return self.num_prompt_logprobs is not None and len(self.prompt_logprobs) < len(self.prompt) - 1

    @property
    def uncomputed(self) -> int:
        """Tokens without keys and values; 1 if the request only has to decode."""
        return len(self.tokens) - self.computed

    @property
    def new_tokens(self) -> list[int]:
        return self.new_tokens_from(0)

    def new_tokens_from(self, start: int) -> list[int]:
        """The new tokens without the first `start`."""
        return self.tokens[len(self.prompt) + start :]

    @property
    def num_new_tokens(self) -> int:
        return len(self.tokens) - len(self.prompt)


def token_list(name: str, tokens: Iterable[int]) -> list[int]:
    """Token ids as ints. Raises InputError for text and for numbers that are not whole."""
    try:
        return [operator.index(token) for token in tokens]
    except TypeError:
        raise InputError(f"{name} must be token ids, which a tokenizer encodes, not {tokens!r}") from None


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
        self.waiting: deque[Request] = deque()
        self.running: list[Request] = []  # in order of admission
        self.lanes = deque(range(max_running))  # free ones
        self.free_rows = max_rows  # of the pass being scheduled

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
        self.free_rows = self.max_rows
        for request in sorted(self.running, key=lambda r: r.uncomputed > 1):  # decodes first; stable: oldest first
            if request.lane is not None:  # not preempted by an older request
                self.schedule_request(request, scheduled)
        while self.waiting and self.free_rows and self.lanes and self.admit(request := self.next_waiting()):
            self.waiting.remove(request)
            self.running.append(request)
            if not self.schedule_request(request, scheduled):
                break
        return scheduled

    def next_waiting(self) -> Request:
        """A preempted request, or the first of the client with the fewest running requests."""
        if self.waiting[0].admitted is not None:
            return self.waiting[0]
        running = Counter(r.client for r in self.running)
        return min(self.waiting, key=lambda r: (running[r.client], r.priority))

    def schedule_request(self, request: Request, scheduled: dict[Request, Work]) -> bool:
        """Add as much of its work as the free rows allow; False if it was preempted instead."""
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
        """Whether it can still be below max_new_tokens: every pass in flight gives at least one token."""
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
        self.hash_pages(request)
        reusable = (len(request.tokens) - 1) // self.pages.size  # the last token must be computed
        reusable = 0 if request.needs_prompt_rows else reusable
        request.pages = self.pages.share_prefix(request.page_hashes[:reusable])
        slots = self.slots_needed(request, Work(0, True)) + 1
        if self.pages.needed(slots) - len(request.pages) > self.pages.available:
            self.release(request)
            return False
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
            self.waiting.appendleft(youngest)
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
            hashes.append(hash_page(hashes[-1] if hashes else b"", request.tokens[i * size : (i + 1) * size]))

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
