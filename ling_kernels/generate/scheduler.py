"""Which rows the next forward pass computes: continuous batching over a paged cache.

A running request has tokens of which the first `computed` have their keys and values in the cache. In a step every
request that lacks one only decodes; what is left of the step's rows goes to the others, oldest first, in chunks of
their prompts. Requests enter in order, as soon as the cache can hold their texts; pages that hold the same beginning
are shared. When the pages run out, the youngest gives its own back and waits for its turn again.
"""

import random
import time
from collections import deque
from dataclasses import dataclass, field

from ..errors import InputError
from .cache import Pages, digest
from .sample import Sampling


class Busy(Exception):
    """The queue is full: come back later."""


@dataclass(eq=False)
class Request:
    """What was asked, and how far it is. finished: None, or stop, length, cancelled, timeout, error."""

    prompt: list[int]
    sampling: Sampling
    max_new_tokens: int
    ends: frozenset[int]  # tokens that end the text; they are not part of it
    deadline: float = float("inf")  # by time.monotonic()

    tokens: list[int] = field(default_factory=list)  # prompt and what came after it
    computed: int = 0
    shared: int = 0  # tokens found in the cache when it was last admitted
    cancelled: bool = False  # its user wants no more; the next step ends it
    finished: str | None = None
    error: Exception | None = None
    pages: list[int] = field(default_factory=list)
    drafts: list[int] = field(default_factory=list)  # guesses of what follows tokens, to be computed with them
    uniforms: list[float] = field(default_factory=list)  # drawn for the tokens to come
    digests: list[bytes] = field(default_factory=list)  # of the full pages of tokens

    def __post_init__(self):
        self.tokens = list(self.prompt)
        self.random = random.Random(self.sampling.seed)

    @property
    def pending(self) -> int:
        return len(self.tokens) - self.computed

    @property
    def wanted(self) -> int:
        """Rows that bring it to its next token."""
        return self.pending + len(self.drafts)

    def uniform(self, ahead: int) -> float:
        """In [0, 1): what the seed has for the token `ahead` tokens from now; one is used up with each token."""
        while len(self.uniforms) <= ahead:
            self.uniforms.append(self.random.random())
        return self.uniforms[ahead]

    @property
    def new_tokens(self) -> list[int]:
        return self.tokens[len(self.prompt) :]

    @property
    def written(self) -> int:
        """How many new tokens there are."""
        return len(self.tokens) - len(self.prompt)

    def rows(self, start: int, n: int) -> list[int]:
        """n of its tokens and drafts from `start` on; fewer where there are no more."""
        known = self.tokens[start : start + n]
        return known + self.drafts[: n - len(known)]


class Scheduler:
    def __init__(self, pages: Pages, max_running: int, max_rows: int, max_waiting: int):
        self.pages, self.max_running, self.max_rows, self.max_waiting = pages, max_running, max_rows, max_waiting
        self.arrived: deque[Request] = deque()  # what other threads may add to; the rest belongs to who has the lock
        self.waiting: deque[Request] = deque()
        self.running: list[Request] = []  # in the order in which they entered

    def submit(self, request: Request) -> None:
        """Raises Busy where the queue is full, InputError for a text that the cache can never hold."""
        total = len(request.prompt) + request.max_new_tokens
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

    def plan(self) -> list[tuple[Request, int]]:
        """The next forward pass: requests and how many rows of theirs it computes."""
        self.sweep()
        chosen: dict[Request, int] = {}
        left = self.max_rows
        for request in sorted(self.running, key=lambda r: r.pending > 1):  # stable: of each kind the oldest first
            rows = min(request.wanted, left)
            if request in self.running and rows and self.reserve(request, rows, chosen):
                chosen[request] = rows
                left = self.max_rows - sum(chosen.values())
        while self.waiting and left and len(self.running) < self.max_running and self.admit(self.waiting[0]):
            request = self.waiting.popleft()
            self.running.append(request)
            rows = min(request.pending, left)
            if not self.reserve(request, rows, chosen):
                break
            chosen[request] = rows
            left -= rows
        return list(chosen.items())

    def sweep(self) -> None:
        """Let in who has arrived, and end who was cancelled or is out of time."""
        now = time.monotonic()
        while self.arrived:
            self.waiting.append(self.arrived.popleft())
        for request in [*self.waiting, *self.running]:
            if request.cancelled or now >= request.deadline:
                self.finish(request, "cancelled" if request.cancelled else "timeout")

    def admit(self, request: Request) -> bool:
        """Whether the pages suffice for its text as it stands and one token; then it holds what is known of it."""
        self.digest(request)
        before_last = (len(request.tokens) - 1) // self.pages.size  # one row at least must be computed
        request.pages = self.pages.share(request.digests[:before_last])
        if self.pages.needed(len(request.tokens) + 1) - len(request.pages) > self.pages.available:
            self.give_back(request)
            return False
        request.computed = request.shared = len(request.pages) * self.pages.size
        return True

    def reserve(self, request: Request, rows: int, chosen: dict[Request, int]) -> bool:
        """Pages for `rows` more tokens, the youngest requests giving theirs back; False where it did so itself."""
        while self.pages.needed(request.computed + rows) > len(request.pages):
            if self.pages.available:
                request.pages.append(self.pages.take())
                continue
            youngest = self.running.pop()
            chosen.pop(youngest, None)
            self.give_back(youngest)
            self.waiting.appendleft(youngest)
            if youngest is request:
                return False
        return True

    def advance(self, request: Request, rows: int) -> None:
        """The keys and values of `rows` more tokens are in the cache."""
        full = request.computed // self.pages.size
        request.computed += rows
        self.digest(request)
        for i in range(full, request.computed // self.pages.size):
            self.pages.publish(request.pages[i], request.digests[i])

    def room(self, request: Request, tokens: int) -> int:
        """How many of `tokens` more than it has its pages can hold, after taking what nobody else wants now."""
        while self.pages.needed(len(request.tokens) + tokens) > len(request.pages) and self.pages.available:
            request.pages.append(self.pages.take())
        return min(tokens, len(request.pages) * self.pages.size - len(request.tokens))

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
        request.pages, request.drafts, request.computed = [], [], 0
