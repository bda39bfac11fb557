"""The engine: many requests share one model, enter and leave between forward passes, and get their tokens as they come.

    engine = Engine(load_model(folder, device="cuda"))
    for token in engine.stream(tokenizer.encode("The "), max_new_tokens=64): ...
    texts = engine.generate([ids, more_ids], sampling=Sampling(temperature=0.8, seed=1))
    async for token in engine.astream(ids): ...

Whoever waits for tokens computes the next step, for all; `astream` does so in a thread. Prompts are computed in chunks
of at most max_rows rows a step, so memory does not grow with their length, beside the tokens of those that decode.
On a GPU a step launches the next pass before it asks for the last one's tokens, so that the GPU never waits for the
host; what it computed of a text that had ended is dropped.
"""

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch

from ..errors import InputError
from ..model import Ling
from ..model.decode import empty_caches
from .cache import Pages, page_bytes
from .forward import Chunk, Flight, Forward
from .sample import NO_NUMBERS, Mode, Sampling
from .scheduler import PAST, Request, Scheduler, Work, longest

SHARE = 0.9  # of the memory that the weights leave on a GPU
CPU_BYTES = 1 << 30
MAX_ROWS = 8  # that attention_decode takes of a sequence


class Engine:
    """Serves a model, in eval mode, on the device it lies on.

    cache_tokens: how many the cache holds in all, guesses apart; default: what 90 % of a GPU's free memory holds, 1 GiB
      on a CPU, but no more than max_running texts of the model's length. cache_dtype: the model's;
      torch.float8_e4m3fn quantises.
    max_running requests are in a step, of max_rows rows in all; max_waiting more may queue.
    draft: how many tokens to guess ahead in each step, by the MTP layer, or where the model has none by what followed
      earlier in the text. All are computed at once and those that are right are kept: `right` of `guessed` so far. No
      text depends on it, but for rounding.
    """

    def __init__(
        self,
        model: Ling,
        cache_tokens: int | None = None,
        cache_dtype: torch.dtype | None = None,
        page_size: int = 64,
        max_running: int = 64,
        max_rows: int = 2048,
        max_waiting: int = 1024,
        draft: int = 0,
    ):
        if not 0 <= draft < MAX_ROWS:
            raise InputError(f"draft {draft} is not among 0 to {MAX_ROWS - 1}")
        if not 1 <= max_running * (1 + draft) <= max_rows:
            raise InputError(
                f"max_rows {max_rows} does not hold the {1 + draft} rows of each of max_running {max_running}"
            )
        for name, value in (("cache_tokens", cache_tokens), ("page_size", page_size), ("max_waiting", max_waiting)):
            if value is not None and value < 1:
                raise InputError(f"{name} is {value}; it must be at least 1")
        self.model, self.config = model.eval(), model.config
        self.device = model.word_embeddings.weight.device
        dtype = cache_dtype or model.word_embeddings.weight.dtype
        layers = self.config.num_hidden_layers + bool(draft and len(model.mtp))
        each = page_bytes(self.config, layers, page_size, dtype)
        if cache_tokens is None:
            free = SHARE * torch.cuda.mem_get_info(self.device)[0] if self.device.type == "cuda" else CPU_BYTES
            pages = min(int(free) // each, max_running * -(-self.config.max_positions // page_size))
        else:
            pages = -(-cache_tokens // page_size) + max_running * -(-PAST * draft // page_size)
        if pages < 1:
            raise InputError(f"there is no memory for a cache of even {page_size} tokens, {each} bytes")
        self.pages = Pages(pages, page_size)
        caches = empty_caches(self.config, layers, pages, page_size, dtype, self.device)
        self.forward = Forward(model, caches, page_size, max_running, draft)
        self.draft, self.guessed, self.right = draft, 0, 0
        self.scheduler = Scheduler(self.pages, max_running, max_rows, max_waiting, draft)
        self.late, self.flight = self.device.type == "cuda", None  # a CPU has computed when a launch returns
        self.stepping: asyncio.Task | None = None
        self.lock = threading.Lock()  # no RLock: a stream that is collected in the middle of a step cancels too

    def submit(
        self,
        prompt: Sequence[int],
        sampling: Sampling | None = None,
        max_new_tokens: int | None = None,
        ends: Iterable[int] | None = None,
        timeout: float | None = None,
    ) -> Request:
        """Queue a request; its new_tokens grow with every `step`.

        max_new_tokens: default 256, or what the model's length leaves. ends: tokens that end the text, default the
        configuration's eos_token_id. timeout: seconds from now, after which it ends where it stands. Raises InputError
        for a prompt that is empty or too long or has unknown tokens, and Busy where the queue is full.
        """
        prompt = [int(t) for t in prompt]
        positions, vocabulary = longest(self.config.max_positions, self.draft), self.config.vocab_size
        if max_new_tokens is None:
            max_new_tokens = max(1, min(256, positions - len(prompt)))
        if not prompt or max_new_tokens < 1:
            raise InputError("a request needs a prompt of at least one token, and max_new_tokens of at least 1")
        if len(prompt) + max_new_tokens > positions:
            left = f", less {PAST} for each guess" if self.draft else ""
            raise InputError(f"{len(prompt)} tokens of prompt and {max_new_tokens} new ones are more than the model's"
                             f" {self.config.max_positions} positions{left}")  # fmt: skip
        if unknown := [t for t in prompt if not 0 <= t < vocabulary]:
            raise InputError(f"token {unknown[0]} is not one of the model's {vocabulary}")
        ends = frozenset({self.config.eos_token_id} if ends is None else ends)
        deadline = float("inf") if timeout is None else time.monotonic() + timeout
        request = Request(prompt, sampling or Sampling(), max_new_tokens, ends, deadline)
        self.scheduler.submit(request)
        return request

    def cancel(self, request: Request) -> None:
        """End it where it stands, at once or after the step that is being computed; nothing where it has ended."""
        request.cancelled = True
        if self.lock.acquire(blocking=False):
            try:
                self.scheduler.sweep()
            finally:
                self.lock.release()

    def warm_up(self) -> None:
        """Make a GPU's graphs of common passes now; otherwise the first request that needs one waits for it."""
        if self.forward.graphs is not None:
            with self.lock, self.device_of_thread(), torch.inference_mode():
                self.forward.graphs.prepare(
                    Mode(False, False, False), Mode(True, False, False), Mode(True, True, False)
                )

    def step(self) -> bool:
        """One forward pass for those whose turn it is; False where there was nothing to do."""
        with self.lock:
            return self.next_pass()

    def next_pass(self) -> bool:
        """For who has the lock."""
        try:
            with self.device_of_thread():
                flying = self.flight is not None
                if flying and self.scheduler.tight:
                    self.land()
                plan, flight = self.scheduler.plan(), None
                if plan:
                    with self.blamed_on(plan):
                        flight = self.launch(plan)
                self.land()
                self.flight = flight
                if not self.late:
                    self.land()
                self.scheduler.sweep()  # who was cancelled meanwhile
                return bool(plan or flying)
        except BaseException:  # Ctrl-C, between any two lines: lanes may be further than the host knows
            self.flight = None
            for request in [*self.scheduler.running]:
                self.scheduler.finish(request, "error", RuntimeError("a step of the engine was interrupted"))
            raise

    def device_of_thread(self) -> torch.cuda.device:
        """Whoever waits computes a step, in a thread that may look at another GPU; nothing on a CPU."""
        return torch.cuda.device_of(self.model.word_embeddings.weight)

    def launch(self, plan: dict[Request, Work]) -> Flight | None:
        for request in plan:
            if request.placed == 0:
                self.forward.begin(request)
        decoding = [r for r, work in plan.items() if work.decodes]
        chunks = [Chunk(r, r.computed, work.chunk) for r, work in plan.items() if work.chunk]
        flight = self.forward(decoding, chunks)
        for request, _, rows in chunks:
            self.scheduler.advance(request, rows)
        for request in decoding:
            request.ahead += 1
        return flight

    def land(self) -> None:
        """Take the tokens of the pass that is on its way, once the device has them."""
        flight, self.flight = self.flight, None
        if flight is None:
            return
        with self.blamed_on(flight.requests):
            for request, tokens in zip(flight.requests, flight.tokens(), strict=True):
                request.ahead -= 1
                if not request.finished:
                    self.accept(request, tokens)

    @contextmanager
    def blamed_on(self, requests: Iterable[Request]) -> Iterator[None]:
        """What goes wrong ends these: the cache is undefined for them, and sound for the others."""
        try:
            yield
        except Exception as error:
            for request in [*requests]:
                self.scheduler.finish(request, "error", error)

    def accept(self, request: Request, tokens: list[int]) -> None:
        """All but the first were guessed, and are what they would be without."""
        if request.guessed:
            self.guessed, self.right = self.guessed + self.draft, self.right + len(tokens) - 1
        request.guessed = self.draft > 0
        reason = error = None
        taken = 0
        for token in tokens:
            taken += 1
            if token < 0:
                reason, error = "error", InputError(NO_NUMBERS)
            elif token in request.ends:
                reason = "stop"
            else:
                request.tokens.append(token)
                if request.written == request.max_new_tokens:
                    reason = "length"
            if reason:
                break
        self.scheduler.advance(request, taken)
        if reason:
            self.scheduler.finish(request, reason, error)

    def stream(self, prompt: Sequence[int], **options) -> Iterator[int]:
        """The new tokens of one request as they come; options are `submit`'s. Who leaves early cancels it."""
        return self.follow(self.submit(prompt, **options))

    def follow(self, request: Request) -> Iterator[int]:
        """What `stream` gives, of a request that has been submitted. Raises what went wrong with it."""
        sent = 0
        try:
            while self.wait(request, sent):
                new = request.after(sent)
                yield from new
                sent += len(new)
        finally:
            self.cancel(request)
        raise_error(request)

    async def astream(self, prompt: Sequence[int], **options) -> AsyncIterator[int]:
        """`stream` for asyncio: steps run in threads."""
        async for token in self.afollow(self.submit(prompt, **options)):
            yield token

    async def afollow(self, request: Request) -> AsyncIterator[int]:
        sent = 0
        try:
            while await self.written(request, sent):
                new = request.after(sent)
                for token in new:
                    yield token
                sent += len(new)
        finally:
            self.cancel(request)
        raise_error(request)

    async def written(self, request: Request, sent: int) -> bool:
        """`wait`; the tasks of an event loop wait for one step together, which the first of them starts in a thread."""
        while not request.finished and request.written <= sent:
            if self.stepping is None or self.stepping.done() or self.stepping.get_loop() != asyncio.get_running_loop():
                self.stepping = asyncio.create_task(asyncio.to_thread(self.step))
            if not await asyncio.shield(self.stepping):  # it may have begun before the request came
                return await asyncio.to_thread(self.wait, request, sent)
        return request.written > sent

    def wait(self, request: Request, sent: int) -> bool:
        """Step until it has more than `sent` new tokens (True), or has ended without (False)."""
        while not request.finished and request.written <= sent:
            with self.lock:  # who waited for it here may find that another's step has brought the token
                if not request.finished and request.written <= sent:
                    assert self.next_pass() or request.finished, "a request that has not ended is in no step"
        return request.written > sent

    def generate(self, prompts: Iterable[Sequence[int]], **options) -> list[list[int]]:
        """The new tokens of every prompt; more prompts than may wait are queued as there is room.

        Where one raises, all end.
        """
        requests = []
        try:
            for prompt in prompts:
                while self.scheduler.full:
                    self.step()
                requests.append(self.submit(prompt, **options))
            for request in requests:
                while self.wait(request, request.written):
                    pass
                raise_error(request)
        finally:
            for request in requests:
                if not request.finished:
                    self.cancel(request)
        return [request.new_tokens for request in requests]


def raise_error(request: Request) -> None:
    if request.error is not None:
        raise request.error
