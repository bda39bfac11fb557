"""python -m ling_kernels.generate.server --model DIR: an OpenAI-compatible server over the engine.

POST /v1/completions and /v1/chat/completions, whole or streamed; GET /v1/models, /health and /metrics (Prometheus).
One process, one model, one GPU. Who needs more than that finds it in vLLM or SGLang.
"""

import json
import secrets
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Annotated

try:
    import uvicorn
    from fastapi import Depends, FastAPI, HTTPException
    from fastapi import Request as Call
    from fastapi.exceptions import RequestValidationError
    from fastapi.responses import JSONResponse, PlainTextResponse, StreamingResponse
    from pydantic import BaseModel, ConfigDict, Field, StrictBool, StrictInt, StrictStr
except ImportError as error:
    raise SystemExit(f"error: {error}: pip install ling_kernels[server]") from None

from ..errors import InputError, Parser, command
from ..model import load_model
from ..tokenizer import TextStream, Tokenizer
from .__main__ import add_model, checkpoint, end_ids, find_tokenizer, placement
from .engine import Engine
from .sample import Sampling
from .scheduler import Busy, Request
from .text import StopStrings

CHOICES = 16  # of one call, at most


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
    ended: Counter = field(default_factory=Counter)  # requests, by what ended them
    read: int = 0  # tokens of prompts
    written: int = 0


class Asked(BaseModel):
    """What both endpoints take; anything else is refused, so that nothing is silently left undone."""

    model_config = ConfigDict(extra="forbid")

    model: StrictStr
    max_tokens: Annotated[StrictInt, Field(ge=1)] | None = None
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: StrictInt = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: StrictInt | None = None
    n: Annotated[StrictInt, Field(ge=1, le=CHOICES)] = 1
    stop: StrictStr | Annotated[list[StrictStr], Field(max_length=CHOICES)] | None = None
    stream: StrictBool = False
    ignore_eos: StrictBool = False
    user: StrictStr | None = None  # known to OpenAI's clients; nothing is done with it

    def sampling(self, choice: int) -> Sampling:
        seed = None if self.seed is None else self.seed + choice
        greedy = dict(top_k=0, top_p=1.0, min_p=0.0) if self.temperature == 0 else {}
        asked = dict(top_k=self.top_k, top_p=self.top_p, min_p=self.min_p)
        return Sampling(self.temperature, **(asked | greedy), repetition_penalty=self.repetition_penalty, seed=seed)

    def stops(self) -> list[str]:
        stops = [self.stop] if isinstance(self.stop, str) else self.stop or []
        if "" in stops:
            raise InputError("a stop string is empty")
        return stops


class Completion(Asked):
    prompt: StrictStr | Annotated[list[StrictStr] | list[StrictInt] | list[list[StrictInt]], Field(min_length=1)]
    echo: StrictBool = False

    def prompts(self, tokenizer: Tokenizer) -> list[list[int]]:
        given = self.prompt
        several = isinstance(given, list) and not isinstance(given[0], int)
        return [tokenizer.encode(p) if isinstance(p, str) else p for p in (given if several else [given])]


class Message(BaseModel):
    model_config = ConfigDict(extra="forbid")

    role: StrictStr
    content: StrictStr


class Chat(Asked):
    messages: Annotated[list[Message], Field(min_length=1)]
    max_completion_tokens: Annotated[StrictInt, Field(ge=1)] | None = None

    def prompts(self, tokenizer: Tokenizer) -> list[list[int]]:
        text = tokenizer.apply_chat_template([m.model_dump() for m in self.messages])
        return [tokenizer.encode(text, special=True)]


def refusal(status: int, message: str, headers: dict | None = None) -> JSONResponse:
    """An error as OpenAI's clients read it."""
    kind = "invalid_request_error" if status < 500 else "server_error"
    return JSONResponse({"error": {"message": message, "type": kind, "code": status}}, status, headers)


def make_app(service: Service) -> FastAPI:
    app = FastAPI(title="ling_kernels", docs_url=None, redoc_url=None, openapi_url=None)

    @app.exception_handler(RequestValidationError)
    async def invalid(_, error: RequestValidationError):
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"][1:])
        return refusal(400, f"{where}: {first['msg']}" if where else first["msg"])

    @app.exception_handler(InputError)
    async def meaningless(_, error: InputError):
        return refusal(400, str(error))

    @app.exception_handler(Busy)
    async def busy(_, error: Busy):
        return refusal(429, str(error), {"Retry-After": "1"})

    @app.exception_handler(HTTPException)
    async def refused(_, error: HTTPException):
        return refusal(error.status_code, error.detail, error.headers)

    async def allowed(call: Call) -> None:
        given = call.headers.get("authorization", "").removeprefix("Bearer ")
        if service.key and not secrets.compare_digest(given.encode(), service.key.encode()):
            raise HTTPException(401, "the key is missing or wrong", {"WWW-Authenticate": "Bearer"})

    @app.middleware("http")
    async def small_bodies(call: Call, follow):
        """Refused before they are read; the header binds, since a server cuts a body at what it says."""
        size = call.headers.get("content-length", "0")
        if call.method == "POST" and (not size.isdecimal() or "content-length" not in call.headers):
            return refusal(411, "a body needs a Content-Length")
        if int(size) > service.max_body:
            return refusal(413, f"the body is {size} bytes; at most {service.max_body} are taken")
        return await follow(call)

    checks = [Depends(allowed)]

    @app.post("/v1/completions", dependencies=checks)
    async def completions(asked: Completion, call: Call):
        return await answer(service, asked, call, "text_completion", asked.max_tokens or 16)

    @app.post("/v1/chat/completions", dependencies=checks)
    async def chat_completions(asked: Chat, call: Call):
        return await answer(service, asked, call, "chat.completion", asked.max_completion_tokens or asked.max_tokens)

    @app.get("/v1/models", dependencies=checks)
    async def models():
        return {"object": "list", "data": [{"id": service.name, "object": "model", "owned_by": "ling_kernels"}]}

    @app.get("/health")
    async def health():
        return {"status": "ok"}

    @app.get("/metrics", response_class=PlainTextResponse)
    async def metrics():
        return "".join(f"{line}\n" for line in measurements(service))

    return app


def measurements(service: Service) -> list[str]:
    """In Prometheus' text format."""
    engine, pages = service.engine, service.engine.pages
    ended = [(f'{{reason="{reason}"}}', count) for reason, count in sorted(service.ended.items())]
    known = [
        ("requests_total", "counter", "requests that ended", ended),
        ("prompt_tokens_total", "counter", "tokens read", [("", service.read)]),
        ("generated_tokens_total", "counter", "tokens written", [("", service.written)]),
        ("drafted_tokens_total", "counter", "tokens guessed ahead", [("", engine.guessed)]),
        ("accepted_tokens_total", "counter", "of these, right", [("", engine.right)]),
        ("running_requests", "gauge", "requests in the batch", [("", len(engine.scheduler.running))]),
        ("waiting_requests", "gauge", "requests in the queue", [("", engine.scheduler.queued)]),
        ("cache_pages", "gauge", "pages of the KV cache", [("", pages.count)]),
        ("cache_pages_available", "gauge", "of these, held by no request", [("", pages.available)]),
    ]
    lines = []
    for name, kind, text, values in known:
        lines += [f"# HELP ling_{name} {text}", f"# TYPE ling_{name} {kind}"]
        lines += [f"ling_{name}{label} {value}" for label, value in values]
    return lines


@dataclass
class Choice:
    """One text of an answer: its request, and what of it may be shown by now."""

    service: Service
    request: Request
    stop: list[str]
    reason: str | None = None

    async def pieces(self) -> AsyncIterator[str]:
        """As stream_text, which is for plain iterators."""
        text, cut = TextStream(self.service.tokenizer), StopStrings(self.stop)
        tokens = self.service.engine.afollow(self.request)
        try:
            async for token in tokens:
                if piece := cut.add(text.add(token)):
                    yield piece
                if cut.found:
                    break
            if piece := cut.add(text.end()) + cut.end():
                yield piece
            self.reason = "stop" if cut.found else self.request.finished
        finally:
            await tokens.aclose()
            self.service.ended[self.reason or "cancelled"] += 1
            self.service.read += len(self.request.prompt)
            self.service.written += self.request.written


async def answer(service: Service, asked: Completion | Chat, call: Call, kind: str, max_tokens: int | None):
    if asked.model != service.name:
        raise HTTPException(404, f"there is no model {asked.model!r} here, but {service.name!r}")
    if service.max_tokens is not None:
        if max_tokens is not None and max_tokens > service.max_tokens:
            raise InputError(f"max_tokens {max_tokens}: at most {service.max_tokens} are written here")
        max_tokens = max_tokens or service.max_tokens
    prompts, stop = asked.prompts(service.tokenizer), asked.stops()
    if len(prompts) * asked.n > CHOICES:
        raise InputError(f"{len(prompts)} prompts times n = {asked.n} is more than {CHOICES}")
    choices = []
    options = dict(max_new_tokens=max_tokens, ends=() if asked.ignore_eos else service.ends, timeout=service.timeout)
    try:
        for prompt in prompts:
            for i in range(asked.n):
                request = service.engine.submit(prompt, asked.sampling(i), **options)
                choices.append(Choice(service, request, stop))
    except (Busy, InputError):
        for choice in choices:
            service.engine.cancel(choice.request)
        raise
    about = {"id": f"{kind}-{secrets.token_hex(12)}", "created": int(time.time()), "model": service.name}
    if asked.stream:
        events = stream_events(choices, asked, kind, about)
        return StreamingResponse(events, media_type="text/event-stream")
    return await whole_answer(choices, asked, kind, about, call)


def usage(choices: list[Choice], n: int) -> dict:
    read = sum(len(c.request.prompt) for c in choices[::n])
    written = sum(c.request.written for c in choices)
    return {"prompt_tokens": read, "completion_tokens": written, "total_tokens": read + written}


async def whole_answer(choices: list[Choice], asked, kind: str, about: dict, call: Call):
    texts = []
    for choice in choices:  # one after another: every step computes all of them
        text = ""
        async for piece in choice.pieces():
            text += piece
            if await call.is_disconnected():
                for other in choices:
                    other.service.engine.cancel(other.request)
                return refusal(499, "the client has left")
        if choice.reason == "timeout":
            raise HTTPException(503, "the answer took too long")
        texts.append(text)
    found = []
    for i, (choice, text) in enumerate(zip(choices, texts, strict=True)):
        if isinstance(asked, Chat):
            shown = {"message": {"role": "assistant", "content": text}}
        else:
            echo = choice.service.tokenizer.decode(choice.request.prompt) if asked.echo else ""
            shown = {"text": echo + text}
        found.append({"index": i, **shown, "logprobs": None, "finish_reason": choice.reason})
    return about | {"object": kind, "choices": found, "usage": usage(choices, asked.n)}


async def stream_events(choices: list[Choice], asked, kind: str, about: dict) -> AsyncIterator[str]:
    """Server-sent events. An error after the first of them can only be told in one."""
    chat = isinstance(asked, Chat)
    about = about | {"object": "chat.completion.chunk" if chat else kind}

    def event(i: int, text: str, reason: str | None, first: bool = False) -> str:
        if chat:
            shown = {"delta": ({"role": "assistant"} if first else {}) | ({"content": text} if text else {})}
        else:
            shown = {"text": text}
        choice = {"index": i, **shown, "logprobs": None, "finish_reason": reason}
        return f"data: {json.dumps(about | {'choices': [choice]})}\n\n"

    try:
        for i, choice in enumerate(choices):
            if chat or asked.echo:
                yield event(i, "" if chat else choice.service.tokenizer.decode(choice.request.prompt), None, chat)
            async for piece in choice.pieces():
                yield event(i, piece, None)
            yield event(i, "", choice.reason)
        yield "data: [DONE]\n\n"
    except Exception as error:
        yield f"data: {json.dumps({'error': {'message': str(error), 'type': 'server_error', 'code': 500}})}\n\n"
    finally:
        for choice in choices:
            choice.service.engine.cancel(choice.request)


def arguments() -> Parser:
    parser = Parser("python -m ling_kernels.generate.server", allow_abbrev=False, description=__doc__.split("\n\n")[0])
    add_model(parser)
    add = parser.add_argument
    add("--name", help="what clients call the model (default: the folder's name)")
    add("--host", default="127.0.0.1", help="address to listen on (default: this machine alone)")
    add("--port", type=int, default=8000)
    add("--key", metavar="SECRET", help="what clients must send as `Authorization: Bearer SECRET`")
    add("--max-tokens", type=int, metavar="N", help="that a call may ask for (default: what the model's length leaves)")
    add("--max-body", type=int, default=1 << 20, metavar="BYTES", help="of a call (default: 1 MiB)")
    add("--max-running", type=int, default=64, metavar="N", help="requests computed at once (default: 64)")
    add("--max-waiting", type=int, default=1024, metavar="N", help="requests that may queue (default: 1024)")
    add("--timeout", type=float, metavar="SECONDS", help="that an answer may take (default: any)")
    add("--draft", type=int, default=0, metavar="N", help="tokens to guess ahead in each step (default: none)")
    add("--cache-tokens", type=int, metavar="N", help="that the KV cache holds (default: what memory there is)")
    return parser


@command
def main(argv: list[str] | None = None) -> int:
    args = arguments().parse_args(argv)
    config, folder = checkpoint(args.model)
    tokenizer = find_tokenizer(args.tokenizer, folder, config)
    engine = Engine(
        load_model(folder, **placement(args)),
        cache_tokens=args.cache_tokens,
        max_running=args.max_running,
        max_rows=max(2048, args.max_running * (1 + args.draft)),
        max_waiting=args.max_waiting,
        draft=args.draft,
    )
    engine.warm_up()
    name, ends = args.name or folder.resolve().name, frozenset(end_ids(config, tokenizer, folder))
    service = Service(engine, tokenizer, name, ends, args.key, args.max_tokens, args.max_body, args.timeout)
    print(f"{name} at http://{args.host}:{args.port}/v1, a cache of {engine.pages.count * engine.pages.size} tokens",
          flush=True)  # fmt: skip
    uvicorn.run(make_app(service), host=args.host, port=args.port, log_level="warning")
    return 0


if __name__ == "__main__":
    sys.exit(main())
