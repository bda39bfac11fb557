"""Completions of the server: submit a body's requests to the engine, and answer with one JSON object or with SSE."""

import asyncio
import json
import logging
import secrets
import time
from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from dataclasses import dataclass, field

from fastapi import Request as HttpRequest
from fastapi.responses import JSONResponse, StreamingResponse
from starlette.exceptions import HTTPException

from ..errors import InputError, one_line
from ..tokenizer import Tokenizer
from .engine import Engine
from .metrics import Metrics
from .protocol import MAX_CHOICES, ChatCompletionRequest, CompletionBase, CompletionRequest
from .scheduler import Request, max_sequence_tokens
from .text import StoppedText

INTERNAL_ERROR = "internal server error; the server's log has the details"


@dataclass
class Service:
    """State and limits shared by the endpoints."""

    engine: Engine
    tokenizer: Tokenizer
    name: str  # the model's
    stop_token_ids: frozenset[int]
    key: str | None = None  # required as `Authorization: Bearer KEY`
    max_tokens: int | None = None  # per request
    max_body: int = 1 << 20  # bytes
    timeout: float | None = None  # seconds per request
    metrics: Metrics = field(default_factory=Metrics)
    created: int = field(default_factory=lambda: int(time.time()))

    def max_new_tokens(self, body: CompletionRequest | ChatCompletionRequest, prompt: list[int]) -> int:
        """New tokens of a request. The engine refuses a number that does not fit; defaults are reduced to fit."""
        requested, default = body.max_new_tokens()
        if requested is not None:
            if self.max_tokens is not None and requested > self.max_tokens:
                raise InputError(f"max_tokens {requested} exceeds this server's limit: at most {self.max_tokens}")
            return requested
        engine, pages = self.engine, self.engine.pages
        capacity = min(engine.config.max_positions, pages.count * pages.size)
        rest = max_sequence_tokens(capacity, engine.draft) - len(prompt)
        return max(1, min(n for n in (default, self.max_tokens, rest) if n is not None))

    def model_card(self) -> dict:
        card = {"id": self.name, "object": "model", "created": self.created, "owned_by": "ling_kernels"}
        return card | {"max_model_len": self.engine.config.max_positions}

    def require_model(self, name: str) -> None:
        if name != self.name:
            raise HTTPException(404, f"the model {name!r} does not exist; this server has {self.name!r}")


def error_response(
    status: int, message: str, headers: Mapping[str, str] | None = None, param: str | None = None
) -> JSONResponse:
    return JSONResponse({"error": error_object(status, message, param)}, status, headers)


def error_object(status: int, message: str, param: str | None = None) -> dict:
    """OpenAI's error object."""
    kind = "invalid_request_error" if status < 500 else "server_error"
    return {"message": one_line(message), "type": kind, "param": param, "code": status}


@dataclass
class Choice:
    """One choice of a completion: its request, and the finish reason."""

    service: Service
    request: Request
    stop: list[str]
    finish_reason: str | None = None
    submitted: float = field(default_factory=time.perf_counter)

    async def stream(self) -> AsyncIterator[str]:
        """Yield pieces of its text. Raises HTTPException if the model fails or the request times out."""
        metrics, last = self.service.metrics, None
        text = StoppedText(self.service.tokenizer, self.stop, self.request.prompt)
        tokens = self.service.engine.afollow(self.request)
        try:
            async for token in tokens:
                now = time.perf_counter()
                if last is None:
                    metrics.time_to_first_token.add(now - self.submitted)
                else:
                    metrics.time_between_tokens.add(now - last)
                last = now
                if piece := text.add(token):
                    yield piece
                if text.found:
                    break
            if piece := text.end():
                yield piece
            self.finish_reason = "stop" if text.found else self.request.finished
        except InputError as error:  # NaN logits: an error of the model, not of the call
            raise HTTPException(500, str(error)) from None
        finally:
            await tokens.aclose()
            self.record_metrics()
        if self.finish_reason == "timeout":
            raise HTTPException(503, "the request timed out")

    def record_metrics(self) -> None:
        metrics, request = self.service.metrics, self.request
        metrics.finished[self.finish_reason or ("error" if request.error else "cancelled")] += 1
        metrics.request_time.add(time.perf_counter() - self.submitted)
        metrics.prompt_tokens += len(request.prompt)
        metrics.cached_tokens += self.cached_tokens
        metrics.generated_tokens += request.num_new_tokens

    @property
    def cached_tokens(self) -> int:
        return self.request.cached_tokens or 0

    def cancel(self) -> None:
        self.service.engine.cancel(self.request)


async def complete(
    service: Service, body: CompletionRequest | ChatCompletionRequest, http_request: HttpRequest, object_type: str
):
    """The response to a body: an EventStream if body.stream, else a JSON object."""
    service.require_model(body.model)
    prompts, stop = body.prompts(service.tokenizer), body.stop_strings()
    if len(prompts) * body.n > MAX_CHOICES:
        raise InputError(f"{len(prompts)} prompts with n = {body.n} are more than {MAX_CHOICES} choices")
    choices = []
    options: dict = dict(stop_token_ids=() if body.ignore_eos else service.stop_token_ids, timeout=service.timeout)
    try:
        for prompt in prompts:
            new_tokens = service.max_new_tokens(body, prompt)
            for i in range(body.n):
                request = service.engine.submit(prompt, body.sampling(i), new_tokens, **options)
                choices.append(Choice(service, request, stop))
    except Exception:  # Busy or InputError of a later choice
        for choice in choices:
            choice.cancel()
        raise
    header = {"id": f"{object_type}-{secrets.token_hex(12)}", "created": int(time.time()), "model": service.name}
    if body.stream:
        return EventStream(choices, body, object_type, header)
    return await full_response(choices, body, object_type, header, http_request)


def usage(choices: list[Choice], n: int) -> dict:
    """OpenAI's usage object; the n choices of a prompt count its tokens once."""
    prompt = sum(len(c.request.prompt) for c in choices[::n])
    cached = sum(c.cached_tokens for c in choices[::n])
    new = sum(c.request.num_new_tokens for c in choices)
    counts = {"prompt_tokens": prompt, "completion_tokens": new, "total_tokens": prompt + new}
    return counts | {"prompt_tokens_details": {"cached_tokens": cached}}


async def merge_streams(choices: list[Choice]) -> AsyncGenerator[tuple[int, str | None], None]:
    """Yield (index of a choice, piece of its text) as pieces arrive; None ends a choice. Raises any choice's error."""
    queue = asyncio.Queue()

    async def read(i: int, choice: Choice) -> None:
        try:
            async for piece in choice.stream():
                queue.put_nowait((i, piece))
            queue.put_nowait((i, None))
        except Exception as error:
            queue.put_nowait((i, error))

    tasks, unfinished = [asyncio.create_task(read(i, choice)) for i, choice in enumerate(choices)], len(choices)
    try:
        while unfinished:
            i, piece = await queue.get()
            if isinstance(piece, Exception):
                raise piece
            unfinished -= piece is None
            yield i, piece
    finally:
        for task in tasks:
            task.cancel()


async def full_response(
    choices: list[Choice], body: CompletionBase, object_type: str, header: dict, http_request: HttpRequest
):
    """The complete JSON object; cancels the requests if the client disconnects."""
    texts = [""] * len(choices)
    pieces = merge_streams(choices)
    try:
        async for i, piece in pieces:
            texts[i] += piece or ""
            if await http_request.is_disconnected():
                return error_response(499, "the client closed the connection")
    finally:
        await pieces.aclose()
        for choice in choices:
            choice.cancel()
    contents = []
    for i, (choice, text) in enumerate(zip(choices, texts, strict=True)):
        content: dict = {"message": {"role": "assistant", "content": text}}
        if isinstance(body, CompletionRequest):
            echo = choice.service.tokenizer.decode(choice.request.prompt) if body.echo else ""
            content = {"text": echo + text}
        contents.append({"index": i, **content, "logprobs": None, "finish_reason": choice.finish_reason})
    return header | {"object": object_type, "choices": contents, "usage": usage(choices, body.n)}


class EventStream(StreamingResponse):
    """A completion as server-sent events. The status is sent first, so a later error becomes an event."""

    def __init__(self, choices: list[Choice], body: CompletionBase, object_type: str, header: dict):
        self.choices, self.request_body, self.chat = choices, body, isinstance(body, ChatCompletionRequest)
        self.header = header | {"object": "chat.completion.chunk" if self.chat else object_type}
        self.header |= {"usage": None} if body.stream_options.include_usage else {}
        super().__init__(self.events(), media_type="text/event-stream", headers={"Cache-Control": "no-cache"})

    async def __call__(self, *connection) -> None:
        try:
            await super().__call__(*connection)
        finally:  # also if the client disconnects before the first event
            for choice in self.choices:
                choice.cancel()

    def event(self, i: int, text: str, finish_reason: str | None = None, first: bool = False) -> str:
        if self.chat:
            role = {"role": "assistant"} if first else {}
            content = {"delta": role | ({"content": text} if text or first else {})}
        else:
            content = {"text": text}
        return self.data(choices=[{"index": i, **content, "logprobs": None, "finish_reason": finish_reason}])

    def data(self, **fields) -> str:
        return f"data: {json.dumps(self.header | fields)}\n\n"

    async def events(self) -> AsyncIterator[str]:
        choices, body = self.choices, self.request_body
        try:
            for i, choice in enumerate(choices):
                if self.chat or (isinstance(body, CompletionRequest) and body.echo):
                    text = "" if self.chat else choice.service.tokenizer.decode(choice.request.prompt)
                    yield self.event(i, text, first=True)
            async for i, piece in merge_streams(choices):
                yield self.event(i, "", choices[i].finish_reason) if piece is None else self.event(i, piece)
            if body.stream_options.include_usage:
                yield self.data(choices=[], usage=usage(choices, body.n))
            yield "data: [DONE]\n\n"
        except HTTPException as error:
            yield f"data: {json.dumps({'error': error_object(error.status_code, error.detail)})}\n\n"
        except Exception:
            logging.getLogger(__name__).exception("a streamed completion failed")
            yield f"data: {json.dumps({'error': error_object(500, INTERNAL_ERROR)})}\n\n"
