"""What the endpoints share: the engine, the tokenizer, limits, metrics; and OpenAI's error object."""

import asyncio
import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from ...errors import InputError, one_line
from ...tokenizer import Tokenizer
from ..engine import Engine
from ..grammar import Grammars
from .metrics import Metrics
from .turns import Turns

if TYPE_CHECKING:
    from .traces import Traces

INTERNAL_ERROR = "internal server error; the server's log has the details"
MOST_TEXTS, MOST_GRAMMARS = 1024, 32  # of a client that may wait to be tokenised or read
FINISH_SECONDS = 5.0  # that the cache's last files may take when the server ends
LOADING = "the model is loading"
PROBE_SECONDS = 5.0  # between two probes of an engine whose passes fail
# OpenAI's words for a status, by which clients classify errors
CODES = {401: "invalid_api_key", 429: "rate_limit_exceeded"}
TYPES = {401: "authentication_error", 429: "rate_limit_error"}


@dataclass(kw_only=True)
class Limits:
    """What is checked before a request is looked at, by a server or by a router before several."""

    keys: frozenset[str] = frozenset()  # one of them is required as `Authorization: Bearer KEY`; none: no key is
    max_body: int = 1 << 20  # bytes
    limit_concurrency: int | None = None  # calls of /v1/ at once
    access_log: bool = False
    metrics: Metrics = field(default_factory=Metrics)
    traces: "Traces | None" = None

    @property
    def unable(self) -> str | None:
        """Why there is no model to ask, in one line; None where there is one."""
        raise NotImplementedError


@dataclass
class Service(Limits):
    """State and limits shared by the endpoints. `engine` is None while the model is loading."""

    engine: Engine | None
    tokenizer: Tokenizer
    name: str  # the model's
    stop_token_ids: frozenset[int]
    adapters: tuple[str, ...] = ()  # names of the engine's, each a model for clients
    max_tokens: int | None = None  # per request
    timeout: float | None = None  # seconds per request
    stuck_after: float = 600.0  # seconds of a pass; the first of a shape may compile kernels
    sampling_defaults: dict = field(default_factory=dict)  # of generation_config.json, for what a body leaves out
    origins: tuple[str, ...] = ()  # web pages that may call the server; "*": all
    loading: str = "loading"  # what /health says while `engine` is None
    _grammars: Grammars | None = None
    created: int = field(default_factory=lambda: int(time.time()))
    # Apart from the threads of the engine's passes, which a long prompt must not keep waiting.
    texts: Turns = field(default_factory=lambda: Turns(2, "texts", MOST_TEXTS))
    new_grammars: Turns = field(default_factory=lambda: Turns(1, "new grammars", MOST_GRAMMARS))
    answers: Turns = field(default_factory=lambda: Turns(1, "answers"))  # large ones are built
    grammar_lock: threading.Lock = field(default_factory=threading.Lock)

    @property
    def unable(self) -> str | None:
        return LOADING if self.engine is None else None

    def grammars(self) -> Grammars:
        """Made at the first use. Raises InputError where llguidance is missing."""
        with self.grammar_lock:
            if self._grammars is None:
                self._grammars = Grammars(self.tokenizer, self.vocabulary, guarded=True)
            return self._grammars

    def start(self, engine: Engine) -> None:
        """Serve with this engine, which has been loaded."""
        engine.record.on_pass = self.metrics.pass_time.add
        self.engine = engine

    async def keep_probing(self) -> None:
        """Probe the engine while its passes fail, until it is given up."""
        while True:
            await asyncio.sleep(PROBE_SECONDS)
            record = self.engine.record if self.engine else None
            if record is not None and record.fault is not None and not record.dead:
                await self.probe()

    async def probe(self) -> None:
        """Let the engine generate a token: a good pass heals it, and routers send requests to healthy servers alone."""
        with suppress(Exception):  # of the pass, whose record has it; or the queue is full
            async for _ in self.engine.astream([0], max_new_tokens=1, stop_token_ids=()):
                pass
        if self.engine.record.fault is not None:
            self.engine.record.failed_probes += 1

    def finish(self) -> None:
        """At the server's end: wait for the last spans and the cache's files, not for the engine, which may be
        stuck."""
        if self.traces is not None:
            self.traces.finish()
        levels = self.engine.pages.levels if self.engine else None
        if levels is not None:
            levels.close(FINISH_SECONDS)

    @property
    def fault(self) -> str | None:
        """Why the server cannot serve now, in one line; None while it can."""
        if self.engine is None:
            return self.loading
        seconds = self.engine.record.stuck_for()
        if seconds > self.stuck_after:
            return f"a pass has been running for {seconds:.0f} s"
        return self.engine.record.fault

    @property
    def dead(self) -> str | None:
        """Why the process should end, in one line; None while it should not."""
        if self.engine is None:
            return None
        record = self.engine.record
        if record.dead or record.stuck_for() > 2 * self.stuck_after:
            return f"the engine cannot go on: {self.fault}"
        return None

    @property
    def vocabulary(self) -> int:
        """Token ids are below it; a model's rows may be more than its tokenizer's tokens."""
        return self.engine.config.vocab_size if self.engine else self.tokenizer.vocab_size

    def max_new_tokens(self, requested: int | None, default: int | None, prompt: int) -> int:
        """New tokens of a request after `prompt` tokens. `requested` must fit; a default is reduced to fit."""
        limit, most = self.engine.max_sequence, self.max_tokens
        if prompt + (requested or 1) > limit:
            asked = f"{prompt + (requested or 0)} tokens ({prompt} of the prompt, {requested or 0} of the completion)"
            raise ContextTooLong(
                f"This model's maximum context length is {limit} tokens. However, you asked for {asked}"
            )
        if requested is not None:
            if most is not None and requested > most:
                raise InputError(f"max_tokens {requested} exceeds this server's limit: at most {most}")
            return requested
        return max(1, min(n for n in (default, most, limit - prompt) if n is not None))

    def model_card(self, name: str) -> dict:
        """Of the model or of an adapter, whose parent is the model. Raises HTTPException for another name."""
        self.adapter_of(name)
        card = {"id": name, "object": "model", "created": self.created, "owned_by": "ling_kernels"}
        card |= {"parent": None if name == self.name else self.name}
        return card | ({"max_model_len": self.engine.config.max_positions} if self.engine else {})

    def adapter_of(self, name: str) -> str | None:
        """The adapter that a body's `model` names; None: the model alone. Raises HTTPException for another name."""
        if name == self.name:
            return None
        if name not in self.adapters:
            has = ", ".join(map(repr, (self.name, *self.adapters)))
            raise HTTPException(404, f"the model {name!r} does not exist; this server has {has}")
        return name


class ContextTooLong(InputError):
    """Prompt and answer do not fit into the model's positions; in OpenAI's words, which clients look for."""


def error_response(
    status: int,
    message: str,
    headers: Mapping[str, str] | None = None,
    param: str | None = None,
    code: str | None = None,
) -> JSONResponse:
    return JSONResponse({"error": error_object(status, message, param, code)}, status, headers)


def error_object(status: int, message: str, param: str | None = None, code: str | None = None) -> dict:
    """OpenAI's error object."""
    kind = TYPES.get(status, "invalid_request_error" if status < 500 else "server_error")
    return {"message": one_line(message), "type": kind, "param": param, "code": code or CODES.get(status)}
