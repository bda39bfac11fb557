"""The ASGI application: endpoints, and errors as OpenAI's error objects."""

import asyncio
import html
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from fastapi import FastAPI
from fastapi import Request as HttpRequest
from fastapi.middleware.cors import CORSMiddleware
from fastapi.responses import HTMLResponse, JSONResponse, PlainTextResponse
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp

from ...errors import Busy, InputError
from .answers import complete, unless_left
from .body import BodyError, Parsed, parse_body
from .guard import CLOSE, Guard, printable
from .metrics import FORMAT
from .protocol import UNSUPPORTED, ChatCompletionRequest, CompletionRequest, DetokenizeRequest, TokenizeRequest
from .service import INTERNAL_ERROR, ContextTooLong, Service, error_response

# The status page reads this server alone, and no other page may show it.
PAGE_POLICY = (
    "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; connect-src 'self'; "
    "frame-ancestors 'none'"
)
PATHS = (
    "/v1/completions", "/v1/chat/completions", "/v1/models", "/tokenize", "/detokenize", "/tokenizer_info", "/health",
    "/live", "/metrics", "/status",
)  # fmt: skip
FIELDS = {*CompletionRequest.model_fields, *ChatCompletionRequest.model_fields, *DetokenizeRequest.model_fields}


def first_field(message: str) -> str | None:
    """The field that a message of ours begins with."""
    word = message.partition(" ")[0].rstrip(":")
    return word if word in FIELDS or word in UNSUPPORTED else None


def make_app(service: Service) -> ASGIApp:
    """The ASGI application."""

    @asynccontextmanager
    async def lifespan(_) -> AsyncIterator[None]:
        probing = asyncio.create_task(service.keep_probing())
        yield
        probing.cancel()
        await asyncio.to_thread(service.finish)

    app = FastAPI(title="ling_kernels", docs_url=None, redoc_url=None, openapi_url=None, lifespan=lifespan)
    metrics = service.metrics

    async def read(kind: type[Parsed], request: HttpRequest) -> Parsed:
        """The request's body. Parsing takes time, and may not hold up the event loop."""
        content, kind_of_content = await request.body(), request.headers.get("content-type", "")
        work = service.texts.call(request.state.client, parse_body, kind, content, kind_of_content)
        return await unless_left(request, work)

    @app.exception_handler(BodyError)
    async def on_body_error(_, error: BodyError):
        return error_response(400, str(error), param=error.field or first_field(str(error)))

    @app.exception_handler(InputError)
    async def on_input_error(_, error: InputError):
        return error_response(400, str(error), param=first_field(str(error)))

    @app.exception_handler(ContextTooLong)
    async def on_context_too_long(_, error: ContextTooLong):
        return error_response(400, str(error), param="max_tokens", code="context_length_exceeded")

    @app.exception_handler(Busy)
    async def on_busy(_, error: Busy):
        return error_response(429, str(error), {"Retry-After": "1"})

    @app.exception_handler(HTTPException)
    async def on_http_exception(request: HttpRequest, error: HTTPException):
        code = "model_not_found" if error.status_code == 404 and "the model" in str(error.detail) else None
        message = error.detail
        if error.status_code == 404 and code is None:
            message = f"there is no {printable(request.url.path)} here; there are {', '.join(PATHS)}"
        return error_response(error.status_code, message, error.headers, code and "model", code)

    @app.exception_handler(Exception)
    async def on_exception(_, error: Exception):  # uvicorn logs the traceback, and closes the connection
        return error_response(500, INTERNAL_ERROR, CLOSE)

    @app.post("/v1/completions")
    async def completions(request: HttpRequest):
        return await complete(service, await read(CompletionRequest, request), request, "text_completion")

    @app.post("/v1/chat/completions")
    async def chat_completions(request: HttpRequest):
        return await complete(service, await read(ChatCompletionRequest, request), request, "chat.completion")

    @app.get("/v1/models")
    async def models():
        return {"object": "list", "data": [service.model_card(name) for name in (service.name, *service.adapters)]}

    @app.get("/v1/models/{name:path}")
    async def model(name: str):
        return service.model_card(name)

    @app.post("/tokenize")
    async def tokenize(request: HttpRequest):
        body = await read(TokenizeRequest, request)
        card = service.model_card(service.name if body.model is None else body.model)
        ids = await unless_left(request, service.texts.call(request.state.client, body.ids, service.tokenizer))
        return {"count": len(ids), "max_model_len": card.get("max_model_len"), "tokens": ids}

    @app.post("/detokenize")
    async def detokenize(request: HttpRequest):
        body = await read(DetokenizeRequest, request)
        service.model_card(service.name if body.model is None else body.model)
        text = service.texts.call(request.state.client, body.text, service.tokenizer, service.vocabulary)
        return {"prompt": await unless_left(request, text)}

    @app.get("/tokenizer_info")
    async def tokenizer_info():
        tokens = {name: service.tokenizer.token(name) for name in ("bos_token", "eos_token", "pad_token")}
        return tokens | {"chat_template": service.tokenizer.chat_template}

    @app.api_route("/health", methods=["GET", "HEAD"])
    async def health():
        fault = service.fault
        return JSONResponse({"status": fault or "ok"}, 503 if fault else 200)

    @app.api_route("/live", methods=["GET", "HEAD"])
    async def live():
        return {"status": "ok"}

    @app.get("/metrics")
    async def prometheus_metrics():
        return PlainTextResponse(metrics.text(service.engine), media_type=FORMAT)

    page = Path(__file__).with_name("status.html").read_text(encoding="utf-8")
    page = page.replace("MODEL_NAME", html.escape(service.name))

    @app.get("/status")
    async def status():
        return HTMLResponse(page, headers={"Content-Security-Policy": PAGE_POLICY, "Cache-Control": "no-store"})

    guarded: ASGIApp = Guard(app, service)
    if service.origins:
        return CORSMiddleware(
            guarded, allow_origins=service.origins, allow_methods=["*"], allow_headers=["*"],
            expose_headers=["X-Request-Id", "Retry-After"],
        )  # fmt: skip
    return guarded
