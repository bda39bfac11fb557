"""python -m ling_kernels.generate.server --model DIR: an OpenAI-compatible server over the engine.

POST /v1/completions and /v1/chat/completions, whole or streamed; GET /v1/models, /health and /metrics (Prometheus).
One process serves one model on one GPU; for more, use vLLM or SGLang.
"""

import argparse
import secrets
import socket
import sys
from pathlib import Path

import torch

try:
    import uvicorn
    from fastapi import Depends, FastAPI
    from fastapi import Request as HttpRequest
    from fastapi.exceptions import RequestValidationError
    from fastapi.responses import JSONResponse, PlainTextResponse
    from starlette.exceptions import HTTPException

    from .completions import INTERNAL_ERROR, Service, complete, error_response
    from .protocol import ChatCompletionRequest, CompletionRequest
except ImportError as error:
    raise SystemExit(f"error: {error}: pip install '.[server]'") from None

from ..errors import Busy, InputError, Parser, command
from ..model import load_model
from .cli import add_model_flags, find_tokenizer, load_options, resolve_checkpoint, stop_token_ids
from .engine import Engine
from .metrics import FORMAT


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
    param = ".".join(path) if path and not path[0].isdecimal() else None
    return error_response(400, f"{param}: {message}" if param else message, param=param)


def make_app(service: Service) -> FastAPI:
    """The ASGI application."""
    app = FastAPI(title="ling_kernels", docs_url=None, redoc_url=None, openapi_url=None)
    metrics = service.metrics

    @app.exception_handler(RequestValidationError)
    async def on_validation_error(_, error: RequestValidationError):
        return validation_error_response(error)

    @app.exception_handler(InputError)
    async def on_input_error(_, error: InputError):
        return error_response(400, str(error))

    @app.exception_handler(Busy)
    async def on_busy(_, error: Busy):
        return error_response(429, str(error), {"Retry-After": "1"})

    @app.exception_handler(HTTPException)
    async def on_http_exception(_, error: HTTPException):
        return error_response(error.status_code, error.detail, error.headers)

    @app.exception_handler(Exception)
    async def on_exception(_, error: Exception):  # uvicorn logs the traceback
        return error_response(500, INTERNAL_ERROR)

    async def authorize(request: HttpRequest) -> None:
        if service.key is None:
            return
        scheme, _, key = request.headers.get("authorization", "").partition(" ")
        matches = secrets.compare_digest(key.strip().encode(), service.key.encode())
        if not matches or scheme.lower() != "bearer":
            raise HTTPException(401, "the key is missing or wrong", {"WWW-Authenticate": "Bearer"})

    def check_size(request: HttpRequest) -> JSONResponse | None:
        """Refuse a large body before reading it. uvicorn reads no more than Content-Length."""
        size = request.headers.get("content-length", "" if request.method == "POST" else "0")
        if not size.isdecimal():
            return error_response(411, "a POST needs a Content-Length header, which is a number")
        if len(size) > 18 or int(size) > service.max_body:
            return error_response(413, f"the body is {size[:20]} bytes; the limit is {service.max_body}")
        return None

    @app.middleware("http")
    async def count_responses(request: HttpRequest, call_next):
        status = 500
        try:
            response = check_size(request) or await call_next(request)
            status = response.status_code
            return response
        finally:
            metrics.responses[status] += 1

    authorized = [Depends(authorize)]

    @app.post("/v1/completions", dependencies=authorized)
    async def completions(body: CompletionRequest, request: HttpRequest):
        return await complete(service, body, request, "text_completion")

    @app.post("/v1/chat/completions", dependencies=authorized)
    async def chat_completions(body: ChatCompletionRequest, request: HttpRequest):
        return await complete(service, body, request, "chat.completion")

    @app.get("/v1/models", dependencies=authorized)
    async def models():
        return {"object": "list", "data": [service.model_card()]}

    @app.get("/v1/models/{name:path}", dependencies=authorized)
    async def model(name: str):
        service.require_model(name)
        return service.model_card()

    @app.get("/health")
    async def health():
        return {"status": "ok"}

    @app.get("/metrics")
    async def prometheus_metrics():
        return PlainTextResponse(metrics.text(service.engine), media_type=FORMAT)

    return app


def arguments() -> Parser:
    parser = Parser("python -m ling_kernels.generate.server", description=__doc__.split("\n\n")[0])
    add_model_flags(parser)
    add = parser.add_argument
    add("--name", help="model name for clients (default: the folder's name)")
    add("--host", default="127.0.0.1", help="address to listen on (default: this machine only)")
    add("--port", type=int, default=8000)
    add("--key", metavar="SECRET", help="require `Authorization: Bearer SECRET`")
    add("--max-tokens", type=int, metavar="N", help="limit per request (default: the model's positions)")
    add("--max-body", type=int, default=1 << 20, metavar="BYTES", help="limit of a request body (default: 1 MiB)")
    add("--max-running", type=int, default=64, metavar="N", help="requests in a batch (default: 64)")
    add("--max-waiting", type=int, default=1024, metavar="N", help="requests in the queue (default: 1024)")
    add("--timeout", type=float, metavar="SECONDS", help="limit per request (default: none)")
    add("--draft", type=int, default=0, metavar="N", help="draft tokens per step (default: 0)")
    add(
        "--cache", choices=("auto", "fp8"), default="auto", help="type of keys and values: the model's (default) or FP8"
    )
    add("--cache-tokens", type=int, metavar="N", help="capacity of the KV cache (default: the free memory)")
    return parser


def check(args: argparse.Namespace) -> None:
    """Raise InputError for flags out of range."""
    for name in ("max_tokens", "max_body", "max_running", "max_waiting", "cache_tokens"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise InputError(f"--{name.replace('_', '-')} is {value}; it must be at least 1")
    if args.timeout is not None and not args.timeout > 0:
        raise InputError(f"--timeout is {args.timeout}; it must be above 0")
    if args.key == "":
        raise InputError("--key is empty")


def bind(host: str, port: int) -> socket.socket:
    """Bind before loading the model, so that a port in use is reported at once."""
    listener = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
    except (OSError, OverflowError) as error:
        listener.close()
        raise InputError(f"cannot listen on {host}, port {port}: {error}") from None
    return listener


def start(args: argparse.Namespace, folder: Path) -> Engine:
    """Load the model and warm up its engine."""
    engine = Engine(
        load_model(folder, **load_options(args)),
        cache_tokens=args.cache_tokens,
        cache_dtype=torch.float8_e4m3fn if args.cache == "fp8" else None,
        max_running=args.max_running,
        max_rows=max(2048, args.max_running * (1 + args.draft)),
        max_waiting=args.max_waiting,
        draft=args.draft,
    )
    engine.warm_up()
    return engine


@command
def main(argv: list[str] | None = None) -> int:
    args = arguments().parse_args(argv)
    check(args)
    config, folder = resolve_checkpoint(args.model)
    tokenizer = find_tokenizer(args.tokenizer, folder, config)
    with bind(args.host, args.port) as listener:
        try:
            engine = start(args, folder)
        except torch.OutOfMemoryError:
            raise InputError(
                "out of GPU memory; python -m ling_kernels.plan decode shows the memory that a model needs"
            ) from None
        name, stop = args.name or folder.resolve().name, frozenset(stop_token_ids(config, tokenizer, folder))
        service = Service(engine, tokenizer, name, stop, args.key, args.max_tokens, args.max_body, args.timeout)
        listener.listen(2048)  # clients can connect now, and wait until the server runs
        host = f"[{args.host}]" if ":" in args.host else args.host
        url = f"http://{host}:{listener.getsockname()[1]}/v1"
        print(f"{name} at {url}, a cache of {engine.pages.count * engine.pages.size} tokens", flush=True)
        server = uvicorn.Server(uvicorn.Config(make_app(service), log_level="warning"))
        try:
            server.run(sockets=[listener])
        except KeyboardInterrupt:  # uvicorn raises it again after its graceful shutdown
            return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
