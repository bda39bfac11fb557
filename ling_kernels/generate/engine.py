"""The engine: many requests share one model, enter and leave between forward passes, and get their tokens as they come.

    engine = Engine(load_model(folder, device="cuda"))
    for token in engine.stream(tokenizer.encode("The "), max_new_tokens=64): ...
    texts = engine.generate([ids, more_ids], sampling=Sampling(temperature=0.8, seed=1))
    async for token in engine.astream(ids): ...

Whoever waits for tokens computes the next step, for all; `astream` does so in a thread. Prompts are computed in chunks
of at most max_rows rows a step, so memory does not grow with their length, beside the tokens of those that decode.
"""

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Iterable, Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from ..errors import InputError
from ..model import Ling
from ..model.decode import empty_caches
from ..nn import Rows
from .cache import Pages, page_bytes
from .forward import Forward, Span, lookup
from .sample import NO_NUMBERS, Sampling, choose
from .scheduler import Request, Scheduler

SHARE = 0.9  # of the memory that the weights leave on a GPU
CPU_BYTES = 1 << 30
MAX_ROWS = 8  # that attention_decode takes of a sequence


class Engine:
    """Serves a model, in eval mode, on the device it lies on.

    cache_tokens: how many the cache holds in all; default: what 90 % of a GPU's free memory holds, 1 GiB on a CPU, but
      no more than max_running texts of the model's length. cache_dtype: the model's; torch.float8_e4m3fn quantises.
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
        self.model, self.config = model.eval(), model.config
        self.device = model.word_embeddings.weight.device
        dtype = cache_dtype or model.word_embeddings.weight.dtype
        layers = self.config.num_hidden_layers + bool(draft and len(model.mtp))
        each = page_bytes(self.config, layers, page_size, dtype)
        if cache_tokens is None:
            free = SHARE * torch.cuda.mem_get_info(self.device)[0] if self.device.type == "cuda" else CPU_BYTES
            pages = min(int(free) // each, max_running * -(-self.config.max_positions // page_size))
        else:
            pages = -(-cache_tokens // page_size)
        if pages < 1:
            raise InputError(f"there is no memory for a cache of even {page_size} tokens, {each} bytes")
        self.pages = Pages(pages, page_size)
        caches = empty_caches(self.config, layers, pages, page_size, dtype, self.device)
        self.forward = Forward(model, caches, page_size)
        self.draft, self.guessed, self.right = draft, 0, 0
        self.scheduler = Scheduler(self.pages, max_running, max_rows, max_waiting)
        self.lock = threading.RLock()

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
        positions, vocabulary = self.config.max_positions, self.config.vocab_size
        if max_new_tokens is None:
            max_new_tokens = max(1, min(256, positions - len(prompt)))
        if not prompt or max_new_tokens < 1:
            raise InputError("a request needs a prompt of at least one token, and max_new_tokens of at least 1")
        if len(prompt) + max_new_tokens > positions:
            raise InputError(f"{len(prompt)} tokens of prompt and {max_new_tokens} new ones are more than the model's"
                             f" {positions} positions")  # fmt: skip
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
            with self.lock:
                self.scheduler.sweep()
            self.lock.release()

    def step(self) -> bool:
        """One forward pass for those whose turn it is; False where there was nothing to do."""
        with self.lock:
            plan = self.scheduler.plan()
            if plan:
                try:
                    self.compute(plan)
                except Exception as error:  # the cache is undefined for these, and sound for the others
                    for request, _ in plan:
                        self.scheduler.finish(request, "error", error)
                self.scheduler.sweep()  # who was cancelled meanwhile
            return bool(plan)

    @torch.inference_mode()
    def compute(self, plan: list[tuple[Request, int]]) -> None:
        """The host waits once for the tokens, and once more for guesses of the MTP layer."""
        each = 1 + self.draft
        spans = sorted((Span(r, r.computed, n) for r, n in plan), key=lambda span: span.rows != each)
        rows = self.forward.rows(spans, each)
        h = self.forward.hidden(spans, rows)
        ready = self.sample(spans, h)
        for request, _, n in spans:
            if request in ready:
                self.accept(request, ready[request])
            else:
                self.scheduler.advance(request, n)
        if self.draft:
            self.guess(spans, rows, h, [r for r in ready if not r.finished])

    def sample(self, spans: list[Span], h: Tensor) -> dict[Request, list[int]]:
        """For each request that has all its rows the tokens after its last one and after each of its drafts."""
        places, asked, so_far, uniforms, ready = [], [], [], [], []
        for (request, _, n), end in zip(spans, np.cumsum([s.rows for s in spans]), strict=True):
            if n < request.wanted:
                continue
            ready.append(request)
            penalised = request.sampling.repetition_penalty != 1  # others need no copy of their text
            for ahead in range(1 + len(request.drafts)):
                places.append(end - 1 - len(request.drafts) + ahead)
                asked.append(request.sampling)
                so_far.append(request.tokens + request.drafts[:ahead] if penalised else ())
                uniforms.append(request.uniform(ahead))
        if not ready:
            return {}
        tokens = iter(choose(self.forward.logits(h, places), asked, so_far, uniforms).tolist())
        return {request: [next(tokens) for _ in range(1 + len(request.drafts))] for request in ready}

    def accept(self, request: Request, tokens: list[int]) -> None:
        """Take tokens as long as the drafts were right: each is what it would have been without them."""
        reason = error = None
        pending, right = request.pending, 0
        for draft, token in zip([*request.drafts, None], tokens, strict=True):
            if token < 0:
                reason, error = "error", InputError(NO_NUMBERS)
            elif token in request.ends:
                reason = "stop"
            else:
                request.tokens.append(token)
                del request.uniforms[0]
                if request.written == request.max_new_tokens:
                    reason = "length"
            if reason or token != draft:
                break
            right += 1
        self.guessed += len(request.drafts)
        self.right += right
        request.drafts = []
        self.scheduler.advance(request, pending + right)
        if reason:
            self.scheduler.finish(request, reason, error)

    def guess(self, spans: list[Span], rows: Rows, h: Tensor, requests: list[Request]) -> None:
        """Drafts for the next step: no more than the text may still have but one, and than the pages hold."""
        counts = {}
        for request in requests:
            left = request.max_new_tokens - request.written - 1
            counts[request] = self.scheduler.room(request, min(self.draft, left))
        if self.forward.draft_cache is not None:
            self.forward.draft(spans, rows, h, counts)
            return
        for request, count in counts.items():
            request.drafts = lookup(request.tokens, count)

    def stream(self, prompt: Sequence[int], **options) -> Iterator[int]:
        """The new tokens of one request as they come; options are `submit`'s. Who leaves early cancels it."""
        return self.follow(self.submit(prompt, **options))

    def follow(self, request: Request) -> Iterator[int]:
        """What `stream` gives, of a request that has been submitted. Raises what went wrong with it."""
        sent = 0
        try:
            while self.wait(request, sent):
                new = request.new_tokens[sent:]
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
            while await asyncio.to_thread(self.wait, request, sent):
                new = request.new_tokens[sent:]
                for token in new:
                    yield token
                sent += len(new)
        finally:
            self.cancel(request)
        raise_error(request)

    def wait(self, request: Request, sent: int) -> bool:
        """Step until it has more than `sent` new tokens (True), or has ended without (False)."""
        while not request.finished and request.written <= sent:
            with self.lock:  # who waited for it here may find that another's step has brought the token
                if not request.finished and request.written <= sent:
                    assert self.step() or request.finished, "a request that has not ended is in no step"
        return request.written > sent

    def generate(self, prompts: Iterable[Sequence[int]], **options) -> list[list[int]]:
        """The new tokens of every prompt; more prompts than may wait are queued as there is room."""
        requests = []
        for prompt in prompts:
            while self.scheduler.full:
                self.step()
            requests.append(self.submit(prompt, **options))
        for request in requests:
            while self.wait(request, request.written):
                pass
            raise_error(request)
        return [request.new_tokens for request in requests]


def raise_error(request: Request) -> None:
    if request.error is not None:
        raise request.error
