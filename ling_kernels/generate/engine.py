"""The serving engine: continuous batching of many requests over one model, with streamed tokens.

    engine = Engine(load_model(folder, device="cuda"))
    for token in engine.stream(tokenizer.encode("The "), max_new_tokens=64): ...
    outputs = engine.generate([ids, more_ids], sampling=Sampling(temperature=0.8, seed=1))
    async for token in engine.astream(ids): ...

There is no engine thread: a caller that waits for tokens runs the next pass for all requests; `astream` does so in a
worker thread. Prompts are prefilled in chunks within max_rows rows per pass, so activation memory does not grow with
their length. On a GPU a step launches the next pass before it reads the last pass's tokens, so the GPU does not wait
for the host; rows that were computed past a sequence's end are dropped.

forward.py lists the calls of a decode step.
"""

import asyncio
import os
import threading
from collections.abc import AsyncGenerator, Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from itertools import repeat
from pathlib import Path

import torch

from ..errors import InputError, integer
from ..model import Ling
from ..model.decode import empty_caches
from ..model.sample import Sampling, SamplingMode
from ..nn.batch_invariant import batch_invariant_
from .adapters import Adapter, Adapters
from .forward import Forward
from .grammar import Grammar
from .health import PassRecord
from .pages.copies import Copies, copies_of, page_identity
from .pages.levels import PageLevels, Spill
from .pages.pool import PagePool, memory_of, page_bytes
from .passes import Passes
from .request import DRAFT_SLACK, Request, add_guide, max_sequence_tokens, new_request
from .scheduler import Scheduler
from .weights import take_weights

SHARE = 0.9  # part of a GPU's free memory, after the weights, for the KV cache
CPU_CACHE_BYTES = 1 << 30
MAX_RUNNING = 1 << 16  # each has a row of a block table
CACHE_TYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float8_e4m3fn)  # those of attention_decode
MAX_ROWS = 8  # per sequence, limit of attention_decode


class Engine(Passes):
    """Serves a model, in eval mode, on the model's device.

    cache_tokens: capacity of the KV cache, without draft tokens; default: 90 % of a GPU's free memory, 1 GiB on a CPU,
      at most max_running sequences of the model's length. cache_dtype: default the model's; torch.float8_e4m3fn
      quantises keys and values.
    max_running: requests per pass; max_rows: rows per pass, prefill and decode; max_waiting: length of the queue.
    draft: draft tokens per sequence and pass, proposed by the MTP layer, or without one by prompt lookup, and verified
      in the next pass. Output does not depend on draft (up to rounding). So far `accepted` of `drafted` were right.
    record_routing: keep every token's experts in the M MoE layers (not MTP's) beside its keys and values. A request
      that ends by itself then has `routing` [n, M, topk] on the device, uint8 up to 256 experts, else int16, of its n
      tokens that were inputs: all, but for a new one at the end. Decode passes do without `moe_decode`.
    adapters: folders of adapters (LoRA) by name, in peft's format, which requests may name; `model` stays as it is.
    batch_invariant: pin the model (nn/batch_invariant.py), so that a request's tokens and log-probabilities have the
      same bits whatever else runs, and in whatever chunks and drafts it is computed: in bf16, with FP8 weights or
      without, and on a CPU in fp32.
    spill: where the prefix cache goes on when the device's memory is full, see pages/levels.py; not with
      record_routing.
    Raises InputError for values out of range, for adapters that are not for this model, and for a model that cannot be
    pinned.
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
        record_routing: bool = False,
        adapters: Mapping[str, str | Path] | None = None,
        batch_invariant: bool = False,
        spill: Spill | None = None,
    ):
        if not isinstance(model, torch.nn.Module):
            raise InputError(f"the model is a {type(model).__name__}, not a Ling, which load_model returns")
        page_size, max_running = integer("page_size", page_size, 1), integer("max_running", max_running, 1)
        if max_running > MAX_RUNNING:
            raise InputError(f"max_running is {max_running}; it must be at most {MAX_RUNNING}")
        max_rows, max_waiting = integer("max_rows", max_rows, 1), integer("max_waiting", max_waiting, 1)
        if integer("draft", draft, 0) >= MAX_ROWS:
            raise InputError(f"draft is {draft}; it must be from 0 to {MAX_ROWS - 1}")
        if cache_dtype not in (None, *CACHE_TYPES):
            raise InputError(f"cache_dtype is {cache_dtype!r}; it must be one of {', '.join(map(str, CACHE_TYPES))}")
        if max_running * (1 + draft) > max_rows:
            raise InputError(f"max_rows {max_rows} is less than max_running {max_running} x {1 + draft} rows")
        if batch_invariant:
            if adapters:
                raise InputError("batch_invariant does not cover adapters: leave out one of the two")
            if cache_dtype not in (None, model.word_embeddings.weight.dtype):
                raise InputError(f"batch_invariant needs a cache in the model's precision, not in {cache_dtype}")
            self.pin(model)
        self.model, self.config = model.eval(), model.config
        self.device = model.word_embeddings.weight.device
        self.adapters = self.make_adapters(adapters) if adapters else None
        dtype = cache_dtype or model.word_embeddings.weight.dtype
        layers = self.config.num_hidden_layers + bool(draft and len(model.mtp))
        bytes_per_page = page_bytes(self.config, layers, page_size, dtype)
        if cache_tokens is None:
            free = SHARE * torch.cuda.mem_get_info(self.device)[0] if self.device.type == "cuda" else CPU_CACHE_BYTES
            pages = min(int(free) // bytes_per_page, max_running * -(-self.config.max_positions // page_size))
        else:
            tokens = integer("cache_tokens", cache_tokens, 1)
            pages = -(-tokens // page_size) + max_running * -(-DRAFT_SLACK * draft // page_size)
            if pages * bytes_per_page > (memory := memory_of(self.device)):
                raise InputError(f"cache_tokens is {tokens}: {pages * bytes_per_page:,} bytes, of {memory:,} in all")
        if pages < 1:
            raise InputError(f"too little memory for a KV cache of {page_size} tokens, {bytes_per_page} bytes")
        self.pages = PagePool(pages, page_size)
        caches = empty_caches(self.config, layers, pages, page_size, dtype, self.device)
        self.forward = self.make_forward(model, caches, page_size, max_running, draft, record_routing, self.adapters)
        if spill is not None:
            if record_routing:
                raise InputError("record_routing needs all pages on the device: leave out spill")
            identity = partial(page_identity, self.model, caches, page_size)
            self.pages.levels = self.make_levels(spill, copies_of(caches), identity)
        self.draft, self.drafted, self.accepted = draft, 0, 0
        self.scheduler = Scheduler(self.pages, max_running, max_rows, max_waiting, draft)
        self.overlap = self.device.type == "cuda"  # on a CPU a pass is complete when it has been launched
        self.pending = None
        self.record = PassRecord()
        self.step_task: asyncio.Task | None = None
        self.closed, self.process = False, os.getpid()
        self.policy_version = 0  # see `new_weights`
        self.lock = threading.Lock()  # no RLock: garbage collection during a step may cancel a stream, see `cancel`

    def pin(self, model: Ling) -> None:
        batch_invariant_(model)

    def make_adapters(self, folders: Mapping[str, str | Path]) -> Adapters:
        return Adapters(self.model, folders)

    def make_forward(self, *arguments) -> Forward:
        return Forward(*arguments)

    def make_levels(self, spill: Spill, copies: Copies, identity: Callable[[], bytes]) -> PageLevels:
        return PageLevels(spill, self.pages, copies, identity)

    def submit(
        self,
        prompt: Sequence[int],
        sampling: Sampling | None = None,
        max_new_tokens: int | None = None,
        stop_token_ids: Iterable[int] | None = None,
        timeout: float | None = None,
        logprobs: int | None = None,
        prompt_logprobs: int | None = None,
        prompt_logprobs_start: int = 1,
        min_new_tokens: int = 0,
        grammar: Grammar | None = None,
        keep_stop: bool = False,
        client: str = "",
        priority: int = 0,
        adapter: str | None = None,
    ) -> Request:
        """Queue a request; its new_tokens grow with every `step`.

        max_new_tokens: default 256, or the rest of the model's positions. stop_token_ids: tokens that end the sequence,
        default the configuration's eos_token_id; before min_new_tokens there are none. timeout: seconds from now,
        after which the request finishes with the tokens it has. logprobs: 0 to 20, the number of likeliest tokens that
        the request's `logprobs` name beside each new token's; prompt_logprobs likewise, for its `prompt_logprobs` of
        the prompt's tokens from prompt_logprobs_start on: the prefix cache can give the rows of tokens before the one
        before that, so that many continuations of a context cost it once. They are the model's log-probabilities,
        before temperature, truncation, penalties and masks. grammar: the only texts that may come, see grammar.py; the
        request ends where nothing can follow. keep_stop: the stop token is the last of the new tokens, instead of being
        left out. client: whoever has the fewest running requests is next; among a client's requests the smallest
        priority. adapter: one of the engine's, by its name; None: the model alone. Raises InputError for a prompt that
        is empty, too long or has ids outside the vocabulary and for a name without adapter, and Busy if the queue is
        full.
        """
        if self.closed:
            raise InputError("the engine is closed")
        if os.getpid() != self.process:
            raise InputError("the engine is of the process that this one was forked from: make one here")
        request = new_request(
            self.config, self.draft, prompt, sampling, max_new_tokens, stop_token_ids, timeout,
            num_logprobs=logprobs, num_prompt_logprobs=prompt_logprobs, prompt_logprobs_start=prompt_logprobs_start,
            min_new_tokens=min_new_tokens, keep_stop=keep_stop, policy_version=self.policy_version, client=client,
            priority=priority, adapter=self.adapter(adapter),
        )  # fmt: skip
        add_guide(request, grammar, self.config.vocab_size, 1 + self.draft, self.device.type == "cuda")
        self.scheduler.submit(request)
        return request

    def adapter(self, name: str | None) -> Adapter | None:
        """The adapter of a name, None of None. Raises InputError for an unknown one."""
        if self.adapters is not None:
            return self.adapters.of(name)
        if name is not None:
            raise InputError(f"there is no adapter {name!r}: the engine has none")
        return None

    def cancel(self, request: Request) -> None:
        """Finish a request now, or after the running step; no effect if it has finished."""
        request.cancelled = True
        if self.lock.acquire(blocking=False):  # else the step in progress sweeps when it ends
            try:
                self.scheduler.sweep()
            finally:
                self.lock.release()

    def new_weights(self, model: torch.nn.Module | Mapping[str, torch.Tensor] | None = None) -> int:
        """Say that the weights have changed, or copy a model's, or tensors by official key, into them in place; returns
        the policy version, which later requests name. Cached prefixes are forgotten. Where the engine's weights are FP8
        and the given ones are not, they are quantised.

        Raises InputError where requests are unfinished, and for tensors of another model.
        """
        with self.lock, self.use_device():
            take_weights(self, model)
        return self.policy_version

    @property
    def max_sequence(self) -> int:
        """Most tokens of a prompt and its new ones together."""
        capacity = min(self.config.max_positions, self.pages.count * self.pages.size)
        return max_sequence_tokens(capacity, self.draft)

    def close(self) -> None:
        """Cancel all requests, write what goes to files, and free the cache and the graphs. Closing again has no
        effect."""
        with self.lock:
            if self.closed:
                return
            self.closed = True
            with self.use_device():
                self.collect()
            for request in [*self.scheduler.submitted, *self.scheduler.waiting, *self.scheduler.running]:
                request.cancelled = True
            self.scheduler.sweep()
            if self.pages.levels is not None:
                with self.use_device():
                    self.pages.levels.save_released(all_of_them=True)
                self.pages.levels.close()
                self.pages.levels = None  # it holds the caches too
            del self.forward

    def __enter__(self) -> "Engine":
        return self

    def __exit__(self, *_) -> None:
        self.close()

    async def __aenter__(self) -> "Engine":
        return self

    async def __aexit__(self, *_) -> None:
        await asyncio.to_thread(self.close)  # a pass may be running

    def __reduce__(self):
        raise InputError("an engine cannot go to another process: load the model and make one there")

    def warm_up(self) -> None:
        """Capture the CUDA graphs of common sampling modes now, instead of when a request first needs them."""
        if self.forward.graphs is not None:
            modes = [SamplingMode(*steps, False) for steps in ((False, False), (True, False), (True, True))]
            modes += [mode._replace(adapted=True) for mode in modes if self.adapters is not None]
            with self.lock, self.use_device(), torch.inference_mode():
                self.forward.graphs.prepare(*modes)

    def stream(self, prompt: Sequence[int], **options) -> Iterator[int]:
        """Submit a request when iteration starts, and yield its new tokens; options as in `submit`.

        Closing or dropping the iterator cancels the request.
        """
        yield from self.follow(self.submit(prompt, **options))

    def follow(self, request: Request) -> Iterator[int]:
        """Yield the new tokens of a submitted request, as `stream`; raises the request's error."""
        tokens = self._follow(request)
        next(tokens)  # enter the try block: closing a generator that has not started would not cancel the request
        return tokens

    def _follow(self, request: Request) -> Iterator[int]:
        sent = 0
        try:
            yield -1  # for follow's next()
            while self.wait_for_tokens(request, sent):
                new = request.new_tokens_from(sent)
                yield from new
                sent += len(new)
        finally:
            self.cancel(request)
        raise_error(request)

    async def astream(self, prompt: Sequence[int], **options) -> AsyncGenerator[int, None]:
        """`stream` for asyncio; submits when iteration starts, and runs passes in worker threads."""
        async for token in self.afollow(self.submit(prompt, **options)):
            yield token

    async def afollow(self, request: Request) -> AsyncGenerator[int, None]:
        """`follow` for asyncio. If it may be dropped before iteration starts, the caller must cancel the request."""
        sent = 0
        try:
            while await self.await_tokens(request, sent):
                new = request.new_tokens_from(sent)
                for token in new:
                    yield token
                sent += len(new)
        finally:
            self.cancel(request)
        raise_error(request)

    async def await_tokens(self, request: Request, sent: int) -> bool:
        """`wait_for_tokens` for asyncio. The tasks of an event loop share one step, which one of them starts."""
        while not request.finished and request.num_new_tokens <= sent:
            task = self.step_task
            if task is None or task.done() or task.get_loop() != asyncio.get_running_loop():
                self.step_task = asyncio.create_task(asyncio.to_thread(self.step))
            if not await asyncio.shield(self.step_task):  # the step may have begun before the request was submitted
                return await asyncio.to_thread(self.wait_for_tokens, request, sent)
        return request.num_new_tokens > sent

    def wait_for_tokens(self, request: Request, sent: int) -> bool:
        """Run passes until the request has more than `sent` new tokens (True), or has finished without (False)."""
        while not request.finished and request.num_new_tokens <= sent:
            with self.lock:  # while this thread waited for the lock, another may have run the pass
                if request.finished or request.num_new_tokens > sent:
                    continue
                if not self.run_pass() and not request.finished:
                    raise RuntimeError("the scheduler has no work, but a request has not finished")
        return request.num_new_tokens > sent

    def generate(self, prompts: Iterable[Sequence[int]], **options) -> list[list[int]]:
        """The new tokens of every prompt; options as in `finish`."""
        return [request.new_tokens for request in self.finish(prompts, **options)]

    def finish(
        self,
        prompts: Iterable[Sequence[int]],
        sampling: Sampling | Sequence[Sampling | None] | None = None,
        n: int = 1,
        adapter: str | Sequence[str | None] | None = None,
        **options,
    ) -> list[Request]:
        """Finished requests of every prompt, which have its new tokens, finish reason and log-probabilities.

        sampling, adapter: of all prompts, or one for each. n: requests of each prompt, next to each other, with the
        seeds seed, seed + 1, ...; other options as in `submit`. Prompts beyond max_waiting are submitted later. An
        error of one request cancels the others and is raised.
        """
        with self.submitted(prompts, sampling, n, adapter, **options) as requests:
            for request in requests:
                while self.wait_for_tokens(request, request.num_new_tokens):
                    pass
                raise_error(request)
        return requests

    @contextmanager
    def submitted(self, prompts, sampling=None, n: int = 1, adapter=None, **options) -> Iterator[list[Request]]:
        """Submit requests as `finish` does; in the end those that have not finished are cancelled."""
        if isinstance(prompts, str) or not isinstance(prompts, Iterable):
            raise InputError(f"prompts are lists of token ids, not {prompts!r}")
        requests: list[Request] = []
        try:
            for prompt, choice, of_prompt in choices(prompts, integer("n", n, 1), sampling=sampling, adapter=adapter):
                while self.scheduler.full:
                    self.step()
                requests.append(self.submit(prompt, choice, adapter=of_prompt, **options))
            yield requests
        finally:
            for request in requests:
                if not request.finished:
                    self.cancel(request)

    def score(
        self, prompts: Iterable[Sequence[int]], adapter: str | Sequence[str | None] | None = None
    ) -> list[list[float]]:
        """The natural log-probability of each prompt's tokens after the first; adapter as in `finish`."""
        found = self.finish(prompts, max_new_tokens=1, prompt_logprobs=0, adapter=adapter)
        return [[t.logprob for t in r.prompt_logprobs] for r in found]


def choices(prompts: Iterable[Sequence[int]], n: int, **options) -> Iterator[tuple]:
    """Each prompt n times, with its value of every option, which is one for all prompts or a list of one for each.
    Raises InputError where their numbers differ."""
    lists = {name: value for name, value in options.items() if isinstance(value, list | tuple)}
    if lists:
        prompts = known = [*prompts]
        for name, value in lists.items():
            if len(known) != len(value):
                raise InputError(f"there are {len(known)} prompts, but {len(value)} in {name}")
    values = (value if name in lists else repeat(value) for name, value in options.items())
    for prompt, sampling, *others in zip(prompts, *values):  # noqa: B905 (repeat has no end)
        for k in range(n):
            yield prompt, of_choice(sampling, k), *others


def of_choice(sampling: Sampling | None, k: int) -> Sampling | None:
    """Sampling parameters of a prompt's text k, which has a seed of its own."""
    if k == 0 or not isinstance(sampling, Sampling) or sampling.seed is None:
        return sampling
    return replace(sampling, seed=(sampling.seed + k) % (1 << 63))


def raise_error(request: Request) -> None:
    if request.error is not None:
        raise request.error
