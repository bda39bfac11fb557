"""One pass of the engine: schedule, launch, collect the last pass's tokens, give them to their requests."""

import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch

from ..errors import InputError
from ..model import Ling
from ..model.sample import BAD_LOGITS
from .forward import Chunk, Forward, PendingTokens
from .health import PassRecord
from .logprobs import read_scores
from .pages.pool import PagePool
from .request import Request
from .scheduler import Scheduler, Work


class Passes:
    """The part of an Engine that runs passes; the rest of it is what callers use."""

    model: Ling
    forward: Forward
    scheduler: Scheduler
    pages: PagePool
    draft: int
    drafted: int
    accepted: int
    overlap: bool  # a pass is launched before the last one's tokens are read
    pending: PendingTokens | None  # of the last pass, until `collect`
    record: PassRecord
    lock: threading.Lock

    def step(self) -> bool:
        """Run one forward pass; False if there was nothing to do."""
        with self.lock:
            return self.run_pass()

    def run_pass(self) -> bool:
        """`step` for a caller that holds the lock: schedule, launch the next pass, collect the last one's tokens."""
        try:
            with self.record.running(), self.use_device():
                had_pending = self.pending is not None
                if had_pending and self.scheduler.may_preempt:
                    self.collect()
                scheduled, pending = self.scheduler.schedule(), None
                if scheduled:
                    with self.fail_on_error(scheduled):
                        pending = self.launch(scheduled)
                self.collect()
                self.pending = pending
                if not self.overlap:
                    self.collect()
                self.scheduler.sweep()  # requests cancelled during the pass
                worked = bool(scheduled or had_pending)
                return self.after_pass(worked) if self.pages.levels is not None else worked
        except BaseException as error:  # Ctrl-C between any two lines: lanes may be ahead of the host's state
            if isinstance(error, Exception):
                self.record.fail(error)
            self.pending = None
            for request in [*self.scheduler.running]:
                self.scheduler.finish(request, "error", RuntimeError("a step of the engine was interrupted"))
            raise

    def after_pass(self, worked: bool) -> bool:
        """What lower levels of the cache need between passes; False if there was nothing to do or to wait for."""
        self.pages.levels.save_released(all_of_them=not self.scheduler.running)
        if not worked and self.scheduler.held_back:
            self.pages.levels.wait()
        return worked or self.scheduler.held_back

    def use_device(self) -> torch.cuda.device:
        """Make the model's GPU current in the calling thread; no effect on a CPU."""
        return torch.cuda.device_of(self.model.word_embeddings.weight)

    def launch(self, scheduled: dict[Request, Work]) -> PendingTokens | None:
        """Launch a pass, and update the requests as far as is known without its tokens."""
        for request in scheduled:
            if request.pages_on_device == 0:  # the lane is not filled yet
                self.forward.fill_lane(request)
        decoding = [r for r, work in scheduled.items() if work.decode]
        chunks = [Chunk(r, r.computed, work.prefill) for r, work in scheduled.items() if work.prefill]
        pending = self.forward(decoding, chunks)
        for request, _, rows in chunks:
            self.scheduler.advance(request, rows)
        for request in decoding:
            request.passes_in_flight += 1
        return pending

    def collect(self) -> None:
        """Wait for the tokens of the pending pass and give them to its requests."""
        pending, self.pending = self.pending, None
        if pending is None:
            return
        for request, start, scores in pending.prompts:
            known = request.first_scored_row - start  # a preempted request prefills its prompt again
            tokens = request.prompt[start + 1 : start + 1 + len(scores)]
            new = read_scores(scores.cpu(), tokens, request.num_prompt_logprobs)[max(known, 0) :]
            request.prompt_logprobs += new if known >= 0 else []
        with self.fail_on_error(pending.requests):
            good = []  # of each request whether its logits were
            for i, (request, tokens) in enumerate(zip(pending.requests, pending.tokens(), strict=True)):
                request.passes_in_flight -= 1
                if not request.finished:
                    if request.num_logprobs is not None:  # before the tokens, which another thread may read at once
                        request.logprobs += pending.logprobs(i, tokens)
                    good.append(self.accept(request, tokens, pending.drafts(i)))
                    del request.logprobs[request.num_new_tokens :]  # of an end token, and of tokens after it
            if any(good):
                self.record.succeed()
            elif good:
                self.record.fail(InputError(BAD_LOGITS))

    @contextmanager
    def fail_on_error(self, requests: Iterable[Request]) -> Iterator[None]:
        """An exception finishes these requests: only their part of the cache is undefined."""
        try:
            yield
        except Exception as error:
            self.record.fail(error)
            for request in [*requests]:
                self.scheduler.finish(request, "error", error)

    def accept(self, request: Request, tokens: list[int], drafts: list[int]) -> bool:
        """Append a pass's tokens (accepted draft tokens, then a new one) up to a stop token or max_new_tokens; False
        where one is of NaN logits. drafts: those that the next pass verifies, of a request with a grammar."""
        if request.has_drafts:
            self.drafted, self.accepted = self.drafted + self.draft, self.accepted + len(tokens) - 1
        request.has_drafts = self.draft > 0
        reason = error = None
        used, good = 0, True
        for token in tokens:
            used += 1
            if token < 0:
                reason, error, good = "error", InputError(BAD_LOGITS), False
                break
            reason = "stop" if token in request.stop_token_ids else None
            guide = request.guide if reason is None else None
            if guide is not None and not guide.accept(token):
                reason, error = "error", InputError(guide.fault)
                break
            if reason is None or request.keep_stop:
                request.tokens.append(token)
                reason = "stop" if guide is not None and guide.complete else reason
                reason = reason or ("length" if request.num_new_tokens == request.max_new_tokens else None)
            if reason:
                break
        if request.guide is not None and not reason:
            request.guide.prepare(drafts)
        self.scheduler.advance(request, used)
        if reason:
            request.routing = self.forward.routing_of(request)
            self.scheduler.finish(request, reason, error)
        return good
