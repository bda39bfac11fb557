"""An answer of the server: its texts as the engine writes them, whole or as server-sent events."""

import asyncio
import json
import logging
import secrets
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field

from fastapi import Request as Call
from fastapi.responses import JSONResponse, StreamingResponse
from starlette.exceptions import HTTPException

from ..errors import InputError
from ..tokenizer import Tokenizer
from .engine import Engine
from .metrics import Metrics
from .protocol import CHOICES, Asked, Chat, Completion
from .scheduler import Busy, Request, longest
from .text import CutText

FAILED = "the server failed at this; its log says why"


@dataclass
class Service:
    """What the endpoints share."""

    engine: Engine
    tokenizer: Tokenizer
    name: str
    ends: frozenset[int]
    key: str | None = None  # what `Authorization: Bearer` must hold
    max_tokens: int | None = None  # that a call may ask for
    max_body: int = 1 << 20  # bytes
    timeout: float | None = None  # seconds that a call may take
    metrics: Metrics = field(default_factory=Metrics)
    created: int = field(default_factory=lambda: int(time.time()))

    def length(self, asked: Completion | Chat, prompt: list[int]) -> int:
        """How many tokens may follow the prompt; the engine refuses what it has no room for."""
        wanted, default = asked.length()
        if wanted is not None:
            if self.max_tokens is not None and wanted > self.max_tokens:
                raise InputError(f"max_tokens {wanted}: at most {self.max_tokens} are written here")
            return wanted
        engine, pages = self.engine, self.engine.pages
        room = longest(min(engine.config.max_positions, pages.count * pages.size), engine.draft) - len(prompt)
        return max(1, min(n for n in (default, self.max_tokens, room) if n is not None))

    def card(self) -> dict:
        about = {"id": self.name, "object": "model", "created": self.created, "owned_by": "ling_kernels"}
        return about | {"max_model_len": self.engine.config.max_positions}


def refusal(status: int, message: str, headers: dict | None = None, param: str | None = None) -> JSONResponse:
    """An error as OpenAI's clients read it."""
    return JSONResponse({"error": fault(status, message, param)}, status, headers)


def fault(status: int, message: str, param: str | None = None) -> dict:
    kind = "invalid_request_error" if status < 500 else "server_error"
    return {"message": message, "type": kind, "param": param, "code": status}


def known(service: Service, model: str) -> None:
    if model != service.name:
        raise HTTPException(404, f"there is no model {model!r} here, but {service.name!r}")


@dataclass
class Choice:
    """One text of an answer: its request, and why it ended."""

    service: Service
    request: Request
    stop: list[str]
    reason: str | None = None
    began: float = field(default_factory=time.perf_counter)

    async def pieces(self) -> AsyncIterator[str]:
        """Its text as it comes. HTTPException where it is the server's fault that it does not."""
        metrics, last = self.service.metrics, None
        text, tokens = CutText(self.service.tokenizer, self.stop), self.service.engine.afollow(self.request)
        try:
            async for token in tokens:
                now = time.perf_counter()
                metrics.first.add(now - self.began) if last is None else metrics.between.add(now - last)
                last = now
                if piece := text.add(token):
                    yield piece
                if text.found:
                    break
            if piece := text.end():
                yield piece
            self.reason = "stop" if text.found else self.request.finished
        except InputError as error:  # the call was sound, the model is not
            raise HTTPException(500, str(error)) from None
        finally:
            await tokens.aclose()
            self.count()
        if self.reason == "timeout":
            raise HTTPException(503, "the answer took too long")

    def count(self) -> None:
        metrics, request = self.service.metrics, self.request
        metrics.ended[self.reason or ("error" if request.error else "cancelled")] += 1
        metrics.whole.add(time.perf_counter() - self.began)
        metrics.read += len(request.prompt)
        metrics.cached += self.cached
        metrics.written += request.written

    @property
    def cached(self) -> int:
        """Tokens of its prompt that were not computed for it."""
        return self.request.shared or 0

    def cancel(self) -> None:
        self.service.engine.cancel(self.request)


async def answer(service: Service, asked: Completion | Chat, call: Call, kind: str):
    known(service, asked.model)
    prompts, stop = asked.prompts(service.tokenizer), asked.stops()
    if len(prompts) * asked.n > CHOICES:
        raise InputError(f"{len(prompts)} prompts times n = {asked.n} is more than {CHOICES}")
    choices = []
    options = dict(ends=() if asked.ignore_eos else service.ends, timeout=service.timeout)
    try:
        for prompt in prompts:
            length = service.length(asked, prompt)
            for i in range(asked.n):
                request = service.engine.submit(prompt, asked.sampling(i), length, **options)
                choices.append(Choice(service, request, stop))
    except (Busy, InputError):
        for choice in choices:
            choice.cancel()
        raise
    about = {"id": f"{kind}-{secrets.token_hex(12)}", "created": int(time.time()), "model": service.name}
    return (
        Events(choices, asked, kind, about) if asked.stream else await whole_answer(choices, asked, kind, about, call)
    )


def usage(choices: list[Choice], n: int) -> dict:
    read, cached = sum(len(c.request.prompt) for c in choices[::n]), sum(c.cached for c in choices[::n])
    written = sum(c.request.written for c in choices)
    counts = {"prompt_tokens": read, "completion_tokens": written, "total_tokens": read + written}
    return counts | {"prompt_tokens_details": {"cached_tokens": cached}}


async def merged(choices: list[Choice]) -> AsyncIterator[tuple[int, str | None]]:
    """The number of a choice and a piece of it, as they come; None is its end. Raises what any of them raises."""
    queue = asyncio.Queue()

    async def read(i: int, choice: Choice) -> None:
        try:
            async for piece in choice.pieces():
                queue.put_nowait((i, piece))
            queue.put_nowait((i, None))
        except Exception as error:
            queue.put_nowait((i, error))

    tasks, left = [asyncio.create_task(read(i, choice)) for i, choice in enumerate(choices)], len(choices)
    try:
        while left:
            i, piece = await queue.get()
            if isinstance(piece, Exception):
                raise piece
            left -= piece is None
            yield i, piece
    finally:
        for task in tasks:
            task.cancel()


async def whole_answer(choices: list[Choice], asked: Asked, kind: str, about: dict, call: Call):
    texts = [""] * len(choices)
    pieces = merged(choices)
    try:
        async for i, piece in pieces:
            texts[i] += piece or ""
            if await call.is_disconnected():
                return refusal(499, "the client has left")
    finally:
        await pieces.aclose()
        for choice in choices:
            choice.cancel()
    found = []
    for i, (choice, text) in enumerate(zip(choices, texts, strict=True)):
        if isinstance(asked, Chat):
            shown = {"message": {"role": "assistant", "content": text}}
        else:
            echo = choice.service.tokenizer.decode(choice.request.prompt) if asked.echo else ""
            shown = {"text": echo + text}
        found.append({"index": i, **shown, "logprobs": None, "finish_reason": choice.reason})
    return about | {"object": kind, "choices": found, "usage": usage(choices, asked.n)}


class Events(StreamingResponse):
    """An answer as server-sent events. An error after the first of them can only be told in one."""

    def __init__(self, choices: list[Choice], asked: Asked, kind: str, about: dict):
        self.choices, self.asked, self.chat = choices, asked, isinstance(asked, Chat)
        self.about = about | {"object": "chat.completion.chunk" if self.chat else kind}
        self.about |= {"usage": None} if asked.stream_options.include_usage else {}
        super().__init__(self.events(), media_type="text/event-stream", headers={"Cache-Control": "no-cache"})

    async def __call__(self, *connection) -> None:
        try:
            await super().__call__(*connection)
        finally:  # also where the client left before the first event
            for choice in self.choices:
                choice.cancel()

    def event(self, i: int, text: str, reason: str | None = None, first: bool = False) -> str:
        if self.chat:
            role = {"role": "assistant"} if first else {}
            shown = {"delta": role | ({"content": text} if text or first else {})}
        else:
            shown = {"text": text}
        return self.data(choices=[{"index": i, **shown, "logprobs": None, "finish_reason": reason}])

    def data(self, **more) -> str:
        return f"data: {json.dumps(self.about | more)}\n\n"

    async def events(self) -> AsyncIterator[str]:
        choices, asked = self.choices, self.asked
        try:
            for i, choice in enumerate(choices):
                if self.chat or asked.echo:
                    text = "" if self.chat else choice.service.tokenizer.decode(choice.request.prompt)
                    yield self.event(i, text, first=True)
            async for i, piece in merged(choices):
                yield self.event(i, "", choices[i].reason) if piece is None else self.event(i, piece)
            if asked.stream_options.include_usage:
                yield self.data(choices=[], usage=usage(choices, asked.n))
            yield "data: [DONE]\n\n"
        except HTTPException as error:
            yield f"data: {json.dumps({'error': fault(error.status_code, error.detail)})}\n\n"
        except Exception:
            logging.getLogger(__name__).exception("an answer broke off")
            yield f"data: {json.dumps({'error': fault(500, FAILED)})}\n\n"
