"""The ASGI application: endpoints, and errors as OpenAI's error objects."""

import asyncio
import html
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from fastapi import FastAPI
from fastapi import Request as HttpRequest
from fastapi.exceptions import RequestValidationError
from fastapi.middleware.cors import CORSMiddleware
from fastapi.responses import HTMLResponse, JSONResponse, PlainTextResponse
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp

from ...errors import Busy, InputError
from .answers import complete, unless_left
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


def validation_error_response(error: RequestValidationError) -> JSONResponse:
    """400 with the first error of a body and the path of its field."""
    first = error.errors()[0]
    if first["loc"] == ("body",) and first["type"] in ("missing", "model_attributes_type"):
        return error_response(400, "the body must be a JSON object, sent as Content-Type: application/json")
    path = []
    for part in first["loc"][1:]:
        if isinstance(part, str) and (part == "str" or not part.isidentifier()):  # the name of a union's type
            break
        path.append(str(part))
    message = first["msg"].removeprefix("Value error, ")
    if not path or path[0].isdecimal():
        return error_response(400, message, param=first_field(message))
    param = ".".join(path)
    return error_response(400, f"{param}: {message}", param=param)


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

    @app.exception_handler(RequestValidationError)
    async def on_validation_error(_, error: RequestValidationError):
        return validation_error_response(error)

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
    async def completions(body: CompletionRequest, request: HttpRequest):
        return await complete(service, body, request, "text_completion")

    @app.post("/v1/chat/completions")
    async def chat_completions(body: ChatCompletionRequest, request: HttpRequest):
        return await complete(service, body, request, "chat.completion")

    @app.get("/v1/models")
    async def models():
        return {"object": "list", "data": [service.model_card(name) for name in (service.name, *service.adapters)]}

    @app.get("/v1/models/{name:path}")
    async def model(name: str):
        return service.model_card(name)

    @app.post("/tokenize")
    async def tokenize(body: TokenizeRequest, request: HttpRequest):
        card = service.model_card(service.name if body.model is None else body.model)
        ids = await unless_left(request, service.texts.call(request.state.client, body.ids, service.tokenizer))
        return {"count": len(ids), "max_model_len": card.get("max_model_len"), "tokens": ids}

    @app.post("/detokenize")
    async def detokenize(body: DetokenizeRequest, request: HttpRequest):
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
