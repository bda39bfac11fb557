"""Answers to completions: submit a body's requests to the engine, and answer with one JSON object or with SSE."""

import asyncio
import json
import logging
import secrets
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Coroutine
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from fastapi import Request as HttpRequest
from fastapi.responses import JSONResponse, StreamingResponse
from starlette.exceptions import HTTPException

from ...errors import InputError, LostRank
from ...tokenizer import Tokenizer
from ..grammar import Grammar
from ..logprobs import TokenLogprob
from ..request import Request
from ..text import StoppedText
from .logprobs import ChatLogprobs, CompletionLogprobs, prompt_logprobs
from .new_grammars import grammar_of
from .protocol import MAX_CHOICES, Body, ChatCompletionRequest, CompletionRequest
from .service import INTERNAL_ERROR, Service, error_object
from .text_parts import TAGS, Part, TextParts, opens_thought
from .turns import Result

SMALL = 2000  # tokens and their log-probabilities, which take milliseconds of the event loop


class Piece(NamedTuple):
    """What new tokens add to a choice."""

    text: str
    logprobs: list[TokenLogprob]


@dataclass
class Choice:
    """One choice of a completion: its request, and the finish reason."""

    service: Service
    request: Request
    stop: list[str]
    shows_answer: bool
    hidden: frozenset[int] = frozenset()  # tokens that have no text
    finish_reason: str | None = None
    submitted: float = field(default_factory=time.perf_counter)
    first_token: float | None = None  # when it came, by time.monotonic()

    async def stream(self) -> AsyncIterator[Piece]:
        """Yield pieces of its text. Raises HTTPException if the model fails or the request times out."""
        metrics, request, last = self.service.metrics, self.request, None
        text = StoppedText(self.service.tokenizer, self.stop, request.prompt)
        tokens = self.service.engine.afollow(request)
        count = 0
        try:
            async for token in tokens:
                now = time.perf_counter()
                if last is None:
                    self.first_token = time.monotonic()
                    metrics.time_to_first_token.add(now - self.submitted)
                    metrics.queue_time.add(request.admitted - request.submitted)
                    metrics.cached_tokens += self.cached_tokens
                else:
                    metrics.time_between_tokens.add(now - last)
                last, count = now, count + 1
                metrics.generated_tokens += 1
                if self.shows_answer:
                    shown = "" if token in self.hidden or self.is_end(token) else text.add(token)
                    piece = Piece(shown, request.logprobs[count - 1 : count])
                    if piece.text or piece.logprobs:
                        yield piece
                if text.found:
                    break
            if self.shows_answer and (rest := text.end()):
                yield Piece(rest, [])
            self.finish_reason = "stop" if text.found else request.finished
            if not self.shows_answer and self.finish_reason == "stop":  # by the token that is not shown
                self.finish_reason = "length"
        except InputError as error:  # NaN logits: an error of the model, not of the call, whose grammar may be one
            guide = request.guide
            raise HTTPException(400 if guide is not None and guide.fault else 500, str(error)) from None
        except LostRank as error:  # the process ends, and whoever started it may start another
            raise HTTPException(503, f"{error}; please try again") from None
        finally:
            await tokens.aclose()
            metrics.finished[self.finish_reason or ("error" if request.error else "cancelled")] += 1
            metrics.request_time.add(time.perf_counter() - self.submitted)
        if self.finish_reason == "timeout":
            raise HTTPException(503, "the request timed out")

    @property
    def cached_tokens(self) -> int:
        return self.request.cached_tokens or 0

    def is_end(self, token: int) -> bool:
        """Whether it is the end token, which completions with log-probabilities keep: it has one, but no text. lm-eval
        takes the last for that of a new token and leaves it out."""
        return self.request.keep_stop and token in self.request.stop_token_ids

    @property
    def num_new_tokens(self) -> int:
        """Those with text: the counts do not depend on logprobs."""
        request = self.request
        if not self.shows_answer:
            return 0
        return request.num_new_tokens - (request.num_new_tokens > 0 and self.is_end(request.tokens[-1]))

    def cancel(self) -> None:
        self.service.engine.cancel(self.request)


async def complete(service: Service, body: Body, http_request: HttpRequest, object_type: str):
    """The response to a body: an EventStream if body.stream, else a JSON object."""
    adapter = service.adapter_of(body.model)
    stop, scored, client = body.stop_strings(), body.num_logprobs, http_request.state.client
    prompts, grammar = await unless_left(http_request, read(service, body, client))
    if body.n > 1 and len(prompts) * body.n > MAX_CHOICES:
        raise InputError(f"n = {body.n} for {len(prompts)} prompts gives more than {MAX_CHOICES} choices")
    choices = []
    hidden = hidden_tokens(service.tokenizer) if body.skip_special_tokens else frozenset()
    ends = frozenset(body.stop_token_ids) | (frozenset() if body.ignore_eos else service.stop_token_ids)
    requested, default = body.max_new_tokens()
    options: dict = dict(
        stop_token_ids=ends, timeout=service.timeout, logprobs=scored, prompt_logprobs=body.num_prompt_logprobs,
        keep_stop=scored is not None and object_type == "text_completion",
        client=client, priority=body.priority, min_new_tokens=body.min_tokens,
        grammar=grammar, adapter=adapter,
    )  # fmt: skip
    try:
        for prompt in prompts:
            new_tokens = service.max_new_tokens(requested, default, len(prompt))
            if body.min_tokens > new_tokens:
                raise InputError(f"min_tokens is {body.min_tokens}; it must be at most max_tokens, {new_tokens}")
            for i in range(body.n):
                sampling = body.sampling(i, service.sampling_defaults)
                request = service.engine.submit(prompt, sampling, new_tokens, **options)
                choices.append(Choice(service, request, stop, body.shows_answer, hidden))
                service.metrics.prompt_tokens += len(prompt)
    except Exception:  # Busy or InputError of a later choice
        for choice in choices:
            choice.cancel()
        raise
    prefix = "chatcmpl" if isinstance(body, ChatCompletionRequest) else "cmpl"
    header = {"id": f"{prefix}-{secrets.token_hex(12)}", "created": int(time.time()), "model": body.model}
    http_request.state.answer = body, header["id"], choices
    if body.stream:
        return EventStream(choices, body, object_type, header)
    return await full_response(choices, body, object_type, header, http_request)


def hidden_tokens(tokenizer: Tokenizer) -> frozenset[int]:
    """The control tokens, without those by which an answer is divided into its parts."""
    return frozenset(token for name, token in tokenizer.control_tokens.items() if name not in TAGS)


async def read(service: Service, body: Body, client: str) -> tuple[list[list[int]], Grammar | None]:
    """A body's prompts, and the grammar of its answer."""
    prompts = await service.texts.call(client, body.prompts, service.tokenizer)
    return prompts, await grammar_of(service, body, prompts, client) if body.structured else None


def usage(choices: list[Choice], n: int) -> dict:
    """OpenAI's usage object; the n choices of a prompt count its tokens once."""
    prompt = sum(len(c.request.prompt) for c in choices[::n])
    cached = sum(c.cached_tokens for c in choices[::n])
    new = sum(c.num_new_tokens for c in choices)
    counts = {"prompt_tokens": prompt, "completion_tokens": new, "total_tokens": prompt + new}
    return counts | {"prompt_tokens_details": {"cached_tokens": cached}}


async def merge_streams(choices: list[Choice]) -> AsyncGenerator[tuple[int, Piece | None], None]:
    """Yield (index of a choice, its next piece) as pieces arrive; None ends a choice. Raises any choice's error."""
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


class CompletionWriter:
    """The objects of /v1/completions for one choice."""

    def __init__(self, choice: Choice, body: CompletionRequest):
        self.choice, self.body = choice, body
        self.logprobs = CompletionLogprobs(choice.service.tokenizer) if body.logprobs is not None else None

    def first(self) -> dict | None:
        """What comes before the answer: the prompt, with `echo`."""
        if not self.body.echo:
            return None
        text = self.choice.service.tokenizer.decode(self.choice.request.prompt)
        return {"text": text, "logprobs": self.logprobs and self.logprobs.prompt(self.choice.request)}

    def piece(self, piece: Piece) -> dict:
        return {"text": piece.text, "logprobs": self.logprobs and self.logprobs.add(piece.logprobs)}

    def last(self) -> tuple[dict, str]:
        return {"text": "", "logprobs": None}, self.choice.finish_reason

    def whole(self, pieces: list[Piece]) -> tuple[dict, str]:
        """The complete object, and the finish reason."""
        parts = [self.first() or {"text": "", "logprobs": None}, *map(self.piece, pieces)]
        text = "".join(part["text"] for part in parts)
        logprobs = self.logprobs and CompletionLogprobs.joined([part["logprobs"] for part in parts])
        return {"text": text, "logprobs": logprobs}, self.choice.finish_reason


class ChatWriter:
    """The objects of /v1/chat/completions for one choice: thoughts and calls of tools apart from the content."""

    def __init__(self, choice: Choice, body: ChatCompletionRequest):
        self.choice = choice
        tokenizer = choice.service.tokenizer
        self.parts = TextParts(opens_thought(tokenizer, choice.request.prompt), body.parses_calls)
        self.logprobs = ChatLogprobs(tokenizer) if body.logprobs else None
        self.calls, self.several = 0, body.parallel_tool_calls

    def first(self) -> dict | None:
        return {"delta": {"role": "assistant", "content": ""}, "logprobs": None}

    def piece(self, piece: Piece) -> dict | None:
        """None where nothing can be shown yet."""
        delta = self.delta(self.parts.add(piece.text))
        logprobs = self.logprobs and self.logprobs.add(piece.logprobs)
        return {"delta": delta, "logprobs": logprobs} if delta or logprobs else None

    def last(self) -> tuple[dict, str]:
        return {"delta": self.delta(self.parts.end()), "logprobs": None}, self.finish_reason()

    def finish_reason(self) -> str:
        called = self.calls and self.choice.finish_reason == "stop"
        return "tool_calls" if called else self.choice.finish_reason

    def delta(self, parts: list[Part]) -> dict:
        content = "".join(part.text for part in parts if part.kind == "content")
        reasoning = "".join(part.text for part in parts if part.kind == "reasoning")
        calls = [part.call for part in parts if part.kind == "call"]
        calls = [self.call(call) for call in (calls if self.several else calls[: 1 - self.calls])]
        found = {"content": content, "reasoning_content": reasoning, "tool_calls": calls}
        return {name: value for name, value in found.items() if value}

    def call(self, call: dict) -> dict:
        self.calls += 1
        return {"index": self.calls - 1, "id": f"call_{secrets.token_hex(8)}", "type": "function", "function": call}

    def whole(self, pieces: list[Piece]) -> tuple[dict, str]:
        """The complete object, and the finish reason."""
        parts = [part for piece in pieces for part in self.parts.add(piece.text)] + self.parts.end()
        delta = self.delta(parts)
        calls = [{k: v for k, v in call.items() if k != "index"} for call in delta.pop("tool_calls", [])]
        content = delta.pop("content", "")
        message = {"role": "assistant", "content": None if calls and not content else content} | delta
        message |= {"tool_calls": calls} if calls else {}
        logprobs = self.logprobs and self.logprobs.add([entry for piece in pieces for entry in piece.logprobs])
        return {"message": message, "logprobs": logprobs}, self.finish_reason()


def writer(choice: Choice, body: Body) -> CompletionWriter | ChatWriter:
    return CompletionWriter(choice, body) if isinstance(body, CompletionRequest) else ChatWriter(choice, body)


async def disconnected(http_request: HttpRequest) -> None:
    """Return when the client has left, also while its requests wait."""
    while (await http_request.receive())["type"] != "http.disconnect":
        pass


async def unless_left(http_request: HttpRequest, work: Coroutine[Any, Any, Result]) -> Result:
    """The result of work, which is cancelled with an HTTPException when the client leaves."""
    task, leaving = asyncio.create_task(work), asyncio.create_task(disconnected(http_request))
    try:
        await asyncio.wait([task, leaving], return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise HTTPException(499, "the client closed the connection")
        return task.result()
    finally:
        task.cancel()
        leaving.cancel()


async def built(choice: Choice, body: Body, tokens: int, build: Callable[[], Result]) -> Result:
    """build(), a part of an answer that shows these tokens: in a thread where they are many."""
    if tokens * (2 + max(body.num_logprobs or 0, body.num_prompt_logprobs or 0)) <= SMALL:
        return build()
    return await choice.service.answers.call(choice.request.client, build)


async def full_response(
    choices: list[Choice], body: Body, object_type: str, header: dict, http_request: HttpRequest
) -> JSONResponse:
    """The complete JSON object; cancels the requests if the client disconnects."""
    found: list[list[Piece]] = [[] for _ in choices]

    def build() -> JSONResponse:
        contents = []
        for i, (choice, its_pieces) in enumerate(zip(choices, found, strict=True)):
            content, reason = writer(choice, body).whole(its_pieces)
            contents.append({"index": i, **content, "finish_reason": reason})
        whole = header | {"object": object_type, "choices": contents, "usage": usage(choices, body.n)}
        if isinstance(body, ChatCompletionRequest) and body.prompt_logprobs is not None:
            whole["prompt_logprobs"] = prompt_logprobs(choices[0].service.tokenizer, choices[0].request)
        return JSONResponse(whole)

    async def answer() -> JSONResponse:
        async for i, piece in merge_streams(choices):
            found[i] += [] if piece is None else [piece]
        with_prompt = body.echo or body.num_prompt_logprobs is not None
        shown = sum(len(c.request.tokens) if with_prompt else c.num_new_tokens for c in choices)
        return await built(choices[0], body, shown, build)

    try:
        return await unless_left(http_request, answer())
    finally:
        for choice in choices:
            choice.cancel()


class EventStream(StreamingResponse):
    """A completion as server-sent events. The status is sent first, so a later error becomes an event."""

    def __init__(self, choices: list[Choice], body: Body, object_type: str, header: dict):
        self.choices, self.request_body = choices, body
        chat = isinstance(body, ChatCompletionRequest)
        self.header = header | {"object": "chat.completion.chunk" if chat else object_type}
        super().__init__(self.events(), media_type="text/event-stream", headers={"Cache-Control": "no-cache"})

    async def __call__(self, *connection) -> None:
        try:
            await super().__call__(*connection)
        finally:  # also if the client disconnects before the first event
            for choice in self.choices:
                choice.cancel()

    def event(self, i: int, content: dict, finish_reason: str | None = None) -> str:
        counts = self.request_body.stream_options
        fields: dict = {"choices": [{"index": i, **content, "finish_reason": finish_reason}]}
        if counts.continuous_usage_stats:
            fields["usage"] = usage(self.choices, self.request_body.n)
        elif counts.include_usage:
            fields["usage"] = None
        return self.data(**fields)

    def data(self, **fields) -> str:
        return f"data: {json.dumps(self.header | fields)}\n\n"

    async def first(self, i: int, choice: CompletionWriter | ChatWriter) -> str | None:
        """The event that comes before the answer, which may be a long prompt."""
        echoed = len(choice.choice.request.prompt) if self.request_body.echo else 0

        def build() -> str | None:
            content = choice.first()
            return None if content is None else self.event(i, content)

        return await built(choice.choice, self.request_body, echoed, build)

    async def events(self) -> AsyncIterator[str]:
        body = self.request_body
        writers = [writer(choice, body) for choice in self.choices]
        # The log-probabilities of an echoed prompt are known with its first token.
        shown = [False] * len(writers)
        early = body.num_prompt_logprobs is None
        try:
            for i, choice in enumerate(writers):
                if early and (event := await self.first(i, choice)) is not None:
                    yield event
            async for i, piece in merge_streams(self.choices):
                if not early and not shown[i]:
                    shown[i] = True
                    yield await self.first(i, writers[i])
                if piece is None:
                    yield self.event(i, *writers[i].last())
                elif (content := writers[i].piece(piece)) is not None:
                    yield self.event(i, content)
            if body.stream_options.include_usage:
                yield self.data(choices=[], usage=usage(self.choices, body.n))
            yield "data: [DONE]\n\n"
        except HTTPException as error:
            yield f"data: {json.dumps({'error': error_object(error.status_code, error.detail)})}\n\n"
        except Exception:
            logging.getLogger(__name__).exception("a streamed completion failed")
            yield f"data: {json.dumps({'error': error_object(500, INTERNAL_ERROR)})}\n\n"
