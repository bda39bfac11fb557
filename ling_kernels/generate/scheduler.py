"""Which rows the next forward pass computes: continuous batching over a paged cache.

A running request has tokens of which the first `computed` have their keys and values in the cache. In a pass every
request that lacks one only decodes; what is left of the pass's rows goes to the others, oldest first, in chunks of
their prompts, of which the last token decodes at once. Requests enter in order, as soon as the cache can hold their
texts; pages that hold the same beginning are shared. When the pages run out, the youngest gives its own back and waits
for its turn again.

The next pass may be planned while the host does not know yet what the last one gives: then a text counts as long as it
can be by now, and is not followed past what it may be at most.
"""

import secrets
import time
from collections import deque
from dataclasses import dataclass, field
from typing import NamedTuple

from ..errors import Busy, InputError
from .cache import Pages, digest
from .sample import Sampling

PAST = 3  # a text's end is followed by cells for so many times the guesses of a pass, which may be computed in vain


def longest(cells: int, draft: int) -> int:
    """How many tokens a text may have at most, of so many cells of a cache or positions of a model."""
    return cells - PAST * draft


@dataclass(eq=False)
class Request:
    """What was asked, and how far it is. finished: None, or stop, length, cancelled, timeout, error."""

    prompt: list[int]
    sampling: Sampling
    max_new_tokens: int
    ends: frozenset[int]  # tokens that end the text; they are not part of it
    deadline: float = float("inf")  # by time.monotonic()

    tokens: list[int] = field(default_factory=list)  # prompt and what is known to come after it
    computed: int = 0
    shared: int | None = None  # tokens found in the cache when it was first admitted
    ahead: int = 0  # passes that decode it and whose tokens are not known yet
    guessed: bool = False  # the next pass has guesses to check
    cancelled: bool = False  # its user wants no more; the next step ends it
    finished: str | None = None
    error: Exception | None = None
    pages: list[int] = field(default_factory=list)
    lane: int | None = None  # of the device's memory, while it runs
    placed: int = 0  # pages that its lane knows
    digests: list[bytes] = field(default_factory=list)  # of the full pages of tokens

    def __post_init__(self):
        self.tokens = list(self.prompt)
        self.seed = secrets.randbits(63) if self.sampling.seed is None else self.sampling.seed

    @property
    def pending(self) -> int:
        return len(self.tokens) - self.computed

    @property
    def new_tokens(self) -> list[int]:
        return self.after(0)

    def after(self, sent: int) -> list[int]:
        """The new tokens but the first `sent`."""
        return self.tokens[len(self.prompt) + sent :]

    @property
    def written(self) -> int:
        """How many new tokens there are."""
        return len(self.tokens) - len(self.prompt)


class Work(NamedTuple):
    """A request's part in a pass."""

    chunk: int  # rows of its prompt
    decodes: bool  # its last token, and draft guesses after it


class Scheduler:
    """draft guesses are decoded with every text's last token, and as many then made anew."""

    def __init__(self, pages: Pages, max_running: int, max_rows: int, max_waiting: int, draft: int):
        self.pages, self.max_rows, self.max_waiting, self.draft = pages, max_rows, max_waiting, draft
        self.arrived: deque[Request] = deque()  # what other threads may add to; the rest belongs to who has the lock
        self.waiting: deque[Request] = deque()
        self.running: list[Request] = []  # in the order in which they entered
        self.lanes = deque(range(max_running))
        self.left = max_rows  # of the pass that is being planned

    def submit(self, request: Request) -> None:
        """Raises Busy where the queue is full, InputError for a text that the cache can never hold."""
        total = len(request.prompt) + request.max_new_tokens + PAST * self.draft
        if self.pages.needed(total) > self.pages.count:
            raise InputError(f"a text of up to {total} tokens; the cache holds {self.pages.count * self.pages.size}")
        if self.full:
            raise Busy(f"{self.max_waiting} requests are waiting already")
        self.arrived.append(request)

    @property
    def full(self) -> bool:
        return self.queued >= self.max_waiting

    @property
    def queued(self) -> int:
        return len(self.arrived) + len(self.waiting)

    def plan(self) -> dict[Request, Work]:
        """The next pass. Nothing may be on its way where `tight` is true."""
        self.sweep()
        chosen: dict[Request, Work] = {}
        self.left = self.max_rows
        for request in sorted(self.running, key=lambda r: r.pending > 1):  # stable: of each kind the oldest first
            if request.lane is not None:  # it has not given way to an older one
                self.choose(request, chosen)
        while self.waiting and self.left and self.lanes and self.admit(self.waiting[0]):
            request = self.waiting.popleft()
            self.running.append(request)
            if not self.choose(request, chosen):
                break
        return chosen

    def choose(self, request: Request, chosen: dict[Request, Work]) -> bool:
        """Give it what is left to do for it of the rows that are left; False where it gave way instead."""
        chunk = min(request.pending - 1, self.left)
        last = chunk == request.pending - 1 and self.left - chunk > self.draft
        work = Work(chunk, last and self.may_decode(request))
        if any(work):
            if not self.reserve(request, self.cells(request, work), chosen):
                return False
            chosen[request] = work
            self.left -= self.rows(work)
        return True

    def rows(self, work: Work) -> int:
        return work.chunk + work.decodes * (1 + self.draft)

    def may_decode(self, request: Request) -> bool:
        """Every pass that is on its way brings at least a token."""
        return request.written + request.ahead < request.max_new_tokens

    def cells(self, request: Request, work: Work) -> int:
        """Of the cache, that this work may write to."""
        if not work.decodes:
            return request.computed + work.chunk
        longest = len(request.tokens) + request.ahead * (1 + self.draft)
        return longest + self.draft + max(0, self.draft - 1)  # the last are of the MTP layer alone

    @property
    def tight(self) -> bool:
        """Whether a request may have to give way in the next pass."""
        short = 0
        for r in self.running:
            work = Work(r.pending - 1, self.may_decode(r))
            short += max(0, self.pages.needed(self.cells(r, work)) - len(r.pages))
        return short > self.pages.available

    def sweep(self) -> None:
        """Let in who has arrived, and end who was cancelled or is out of time."""
        now = time.monotonic()
        while self.arrived:
            self.waiting.append(self.arrived.popleft())
        for request in [*self.waiting, *self.running]:
            if request.cancelled or now >= request.deadline:
                self.finish(request, "cancelled" if request.cancelled else "timeout")

    def admit(self, request: Request) -> bool:
        """Whether the pages suffice for its text as it stands, one token and guesses; then it holds what is known."""
        self.digest(request)
        before_last = (len(request.tokens) - 1) // self.pages.size  # one row at least must be computed
        request.pages = self.pages.share(request.digests[:before_last])
        if self.pages.needed(self.cells(request, Work(0, True)) + 1) - len(request.pages) > self.pages.available:
            self.give_back(request)
            return False
        request.computed = len(request.pages) * self.pages.size
        request.shared = request.computed if request.shared is None else request.shared
        request.lane = self.lanes.popleft()
        return True

    def reserve(self, request: Request, cells: int, chosen: dict[Request, Work]) -> bool:
        """Pages for so many tokens, the youngest requests giving theirs back; False where it did so itself."""
        while self.pages.needed(cells) > len(request.pages):
            if self.pages.available:
                request.pages.append(self.pages.take())
                continue
            youngest = self.running.pop()
            if youngest in chosen:
                self.left += self.rows(chosen.pop(youngest))
            self.give_back(youngest)
            self.waiting.appendleft(youngest)
            if youngest is request:
                return False
        return True

    def advance(self, request: Request, rows: int) -> None:
        """The keys and values of `rows` more tokens are in the cache, or will be before a later pass looks for them."""
        full = request.computed // self.pages.size
        request.computed += rows
        self.digest(request)
        for i in range(full, request.computed // self.pages.size):
            self.pages.publish(request.pages[i], request.digests[i])

    def digest(self, request: Request) -> None:
        size, known = self.pages.size, request.digests
        for i in range(len(known), len(request.tokens) // size):
            known.append(digest(known[-1] if known else b"", request.tokens[i * size : (i + 1) * size]))

    def finish(self, request: Request, reason: str, error: Exception | None = None) -> None:
        """Its pages are free from now on, but what the full ones hold stays known."""
        if request.finished:
            return
        request.finished, request.error = reason, error
        queue = self.running if request in self.running else self.waiting
        if request in queue:
            queue.remove(request)
        self.give_back(request)

    def give_back(self, request: Request) -> None:
        self.pages.release(request.pages)
        if request.lane is not None:
            self.lanes.append(request.lane)
        request.pages, request.computed, request.lane, request.placed, request.guessed = [], 0, None, 0, False
