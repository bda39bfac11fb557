"""python -m ling_kernels.generate.server --model DIR: an OpenAI-compatible server over the engine.

POST /v1/completions and /v1/chat/completions, whole or streamed; GET /v1/models, /health and /metrics (Prometheus).
One process, one model, one GPU. Who needs more than that finds it in vLLM or SGLang.
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
    from fastapi import Request as Call
    from fastapi.exceptions import RequestValidationError
    from fastapi.responses import JSONResponse, PlainTextResponse
    from starlette.exceptions import HTTPException

    from .answers import FAILED, Service, answer, known, refusal
    from .protocol import Chat, Completion
except ImportError as error:
    raise SystemExit(f"error: {error}: pip install ling_kernels[server]") from None

from ..errors import InputError, Parser, command
from ..model import load_model
from .__main__ import add_model, checkpoint, end_ids, find_tokenizer, placement
from .engine import Engine
from .metrics import FORMAT
from .scheduler import Busy


def invalid(error: RequestValidationError) -> JSONResponse:
    first = error.errors()[0]
    if first["loc"] == ("body",) and first["type"] in ("missing", "model_attributes_type"):
        return refusal(400, "the body must be a JSON object, sent as Content-Type: application/json")
    where = []
    for part in first["loc"][1:]:
        if isinstance(part, str) and (part == "str" or not part.isidentifier()):  # which of several types
            break
        where.append(str(part))
    message = first["msg"].removeprefix("Value error, ")
    param = ".".join(where) if where and not where[0].isdecimal() else None
    return refusal(400, f"{param}: {message}" if param else message, param=param)


def make_app(service: Service) -> FastAPI:
    app = FastAPI(title="ling_kernels", docs_url=None, redoc_url=None, openapi_url=None)
    metrics = service.metrics

    @app.exception_handler(RequestValidationError)
    async def malformed(_, error: RequestValidationError):
        return invalid(error)

    @app.exception_handler(InputError)
    async def meaningless(_, error: InputError):
        return refusal(400, str(error))

    @app.exception_handler(Busy)
    async def busy(_, error: Busy):
        return refusal(429, str(error), {"Retry-After": "1"})

    @app.exception_handler(HTTPException)
    async def refused(_, error: HTTPException):
        return refusal(error.status_code, error.detail, error.headers)

    @app.exception_handler(Exception)
    async def failed(_, error: Exception):  # its traceback goes to the log
        return refusal(500, FAILED)

    async def allowed(call: Call) -> None:
        kind, _, given = call.headers.get("authorization", "").partition(" ")
        right = service.key is None or secrets.compare_digest(given.strip().encode(), service.key.encode())
        if not right or (service.key is not None and kind.lower() != "bearer"):
            raise HTTPException(401, "the key is missing or wrong", {"WWW-Authenticate": "Bearer"})

    def too_large(call: Call) -> JSONResponse | None:
        """Refused before it is read; the header binds, since a server cuts a body at what it says."""
        size = call.headers.get("content-length", "0")
        if call.method == "POST" and (not size.isdecimal() or "content-length" not in call.headers):
            return refusal(411, "a body needs a Content-Length")
        if int(size) > service.max_body:
            return refusal(413, f"the body is {size} bytes; at most {service.max_body} are taken")

    @app.middleware("http")
    async def counted(call: Call, follow):
        status = 500
        try:
            response = too_large(call) or await follow(call)
            status = response.status_code
            return response
        finally:
            metrics.responses[status] += 1

    checks = [Depends(allowed)]

    @app.post("/v1/completions", dependencies=checks)
    async def completions(asked: Completion, call: Call):
        return await answer(service, asked, call, "text_completion")

    @app.post("/v1/chat/completions", dependencies=checks)
    async def chat_completions(asked: Chat, call: Call):
        return await answer(service, asked, call, "chat.completion")

    @app.get("/v1/models", dependencies=checks)
    async def models():
        return {"object": "list", "data": [service.card()]}

    @app.get("/v1/models/{name:path}", dependencies=checks)
    async def model(name: str):
        known(service, name)
        return service.card()

    @app.get("/health")
    async def health():
        return {"status": "ok"}

    @app.get("/metrics")
    async def measurements():
        return PlainTextResponse(metrics.text(service.engine), media_type=FORMAT)

    return app


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
    add("--cache", choices=("auto", "fp8"), default="auto", help="keys and values: the model's type (default), or FP8")
    add("--cache-tokens", type=int, metavar="N", help="that the KV cache holds (default: what memory there is)")
    return parser


def check(args: argparse.Namespace) -> None:
    for name in ("max_tokens", "max_body", "max_running", "max_waiting", "cache_tokens"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise InputError(f"--{name.replace('_', '-')} is {value}; it must be at least 1")
    if args.timeout is not None and not args.timeout > 0:
        raise InputError(f"--timeout is {args.timeout}; it must be above 0")
    if args.key == "":
        raise InputError("--key is empty")


def bind(host: str, port: int) -> socket.socket:
    """Taken before the model is loaded, so that a port in use is told at once."""
    listener = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
    except (OSError, OverflowError) as error:
        listener.close()
        raise InputError(f"cannot listen on {host}, port {port}: {error}") from None
    return listener


def start(args: argparse.Namespace, folder: Path) -> Engine:
    engine = Engine(
        load_model(folder, **placement(args)),
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
    config, folder = checkpoint(args.model)
    tokenizer = find_tokenizer(args.tokenizer, folder, config)
    with bind(args.host, args.port) as listener:
        try:
            engine = start(args, folder)
        except torch.OutOfMemoryError:
            raise InputError(
                "the GPU's memory is too small; ling_kernels.generate.plan says what a model takes"
            ) from None
        name, ends = args.name or folder.resolve().name, frozenset(end_ids(config, tokenizer, folder))
        service = Service(engine, tokenizer, name, ends, args.key, args.max_tokens, args.max_body, args.timeout)
        listener.listen(2048)  # from now on a call may come, though it waits a moment
        where = f"http://{f'[{args.host}]' if ':' in args.host else args.host}:{listener.getsockname()[1]}/v1"
        print(f"{name} at {where}, a cache of {engine.pages.count * engine.pages.size} tokens", flush=True)
        server = uvicorn.Server(uvicorn.Config(make_app(service), log_level="warning"))
        try:
            server.run(sockets=[listener])
        except KeyboardInterrupt:  # which uvicorn raises again when it has finished what ran
            return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
