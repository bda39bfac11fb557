"""The server's command: flags, loading, running until a signal."""

import argparse
import gc
import os
import socket
import sys
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

try:
    from starlette.types import ASGIApp

    from .app import make_app
    from .connections import Server
    from .listener import raise_descriptors
    from .protocol import SAMPLING
    from .replicas import Router, visible_gpus
    from .service import Service
    from .traces import make_traces
except ImportError as error:
    raise SystemExit(f"error: {error}: pip install '.[server]'") from None

from ...commands import Parser, command
from ...errors import InputError
from ...files import read_json, user_path
from ...model.sample import Sampling
from ...tokenizer import Tokenizer
from ..adapters import read_flags
from ..cli import add_model_flags, find_tokenizer, load_options, make_engine, resolve_checkpoint, stop_token_ids
from ..engine import Engine
from ..pages.levels import Spill, usable_folder

KEY_VARIABLE = "LING_API_KEY"
PROGRESS_SECONDS = 10.0  # between two lines of the log while the model loads
Progress = Callable[[int, int], None]  # of load_model


def arguments() -> Parser:
    parser = Parser("python -m ling_kernels.generate.server", description="An OpenAI-compatible server.")
    add_model_flags(parser)
    add = parser.add_argument
    add("--name", help="model name for clients (default: the folder's name)")
    add(
        "--adapter",
        metavar="NAME=FOLDER",
        action="append",
        default=[],
        help="an adapter (LoRA) in peft's format, which clients ask for as the model NAME; repeatable",
    )
    add("--host", default="127.0.0.1", help="address to listen on (default: this machine only)")
    add("--port", type=int, default=8000, help="default: 8000; 0 takes a free one")
    add(
        "--key",
        metavar="SECRET",
        action="append",
        default=[],
        help=f"require `Authorization: Bearer SECRET`; repeatable; {KEY_VARIABLE} holds one without showing it in ps",
    )
    add("--key-file", metavar="FILE", help="keys, one in a line")
    add(
        "--allow-origin",
        metavar="URL",
        action="append",
        default=[],
        help="web pages that may call the server (CORS); repeatable; *: all",
    )
    add("--tls-cert", metavar="FILE", help="certificate chain, PEM, with --tls-key")
    add("--tls-key", metavar="FILE", help="private key of --tls-cert, PEM")
    add("--max-tokens", type=int, metavar="N", help="limit per request (default: the model's positions)")
    add("--max-body", type=int, default=1 << 20, metavar="BYTES", help="limit of a request body (default: 1 MiB)")
    add("--max-running", type=int, default=64, metavar="N", help="requests in a batch (default: 64)")
    add(
        "--max-rows", type=int, default=2048, metavar="N",
        help="tokens of a pass: fewer make long prompts hold up running streams less, and take longer (default: 2048)",
    )  # fmt: skip
    add("--max-waiting", type=int, default=1024, metavar="N", help="requests in the queue (default: 1024)")
    add("--timeout", type=float, metavar="SECONDS", help="limit per request (default: none)")
    add(
        "--client-timeout",
        type=float,
        default=60.0,
        metavar="SECONDS",
        help="limit for a client to send a request, and to read what is sent to it (default: 60)",
    )
    add("--limit-concurrency", type=int, metavar="N", help="calls at once; more get 503 (default: no limit)")
    add(
        "--grace",
        type=float,
        default=30.0,
        metavar="SECONDS",
        help="time for running requests after SIGTERM (default: 30); a second signal ends the process at once",
    )
    add(
        "--stuck-after",
        type=float,
        default=600.0,
        metavar="SECONDS",
        help="a pass that takes longer makes /health fail; after twice as long the process ends (default: 600)",
    )
    add(
        "--otlp",
        metavar="URL",
        help="send traces to this OpenTelemetry collector (default: OTEL_EXPORTER_OTLP_ENDPOINT)",
    )
    add("--access-log", action="store_true", help="print a line for each response to standard error")
    add("--draft", type=int, default=0, metavar="N", help="draft tokens per step (default: 0)")
    add(
        "--cache", choices=("auto", "fp8"), default="auto", help="type of keys and values: the model's (default) or FP8"
    )
    add(
        "--batch-invariant",
        action="store_true",
        help="a text has the same bits whatever else runs: in bf16, fp8 and on a CPU fp32, and slower",
    )
    add("--cache-tokens", type=int, metavar="N", help="capacity of the KV cache (default: the free memory)")
    add("--cache-host", type=float, metavar="GB", help="host memory for pages that leave the KV cache (default: none)")
    add("--cache-disk", metavar="PATH", help="folder for them, which a restarted server reads; needs --cache-host")
    add("--cache-disk-gb", type=float, default=100.0, metavar="GB", help="limit of its files (default: 100)")
    add("--replicas", type=int, default=1, metavar="N", help="engines, each on GPUs of its own (default: 1)")
    add("--socket", metavar="PATH", help=argparse.SUPPRESS)  # of a replica
    return parser


def check(args: argparse.Namespace) -> None:
    """Raise InputError for flags out of range."""
    for name in (
        "max_tokens",
        "max_body",
        "max_running",
        "max_rows",
        "max_waiting",
        "cache_tokens",
        "limit_concurrency",
        "replicas",
        "tp",
    ):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise InputError(f"--{name.replace('_', '-')} is {value}; it must be at least 1")
    for name in ("timeout", "client_timeout", "grace", "stuck_after", "cache_host", "cache_disk_gb"):
        value = getattr(args, name)
        if value is not None and not value > 0:
            raise InputError(f"--{name.replace('_', '-')} is {value}; it must be above 0")
        if name.startswith("cache") and value == float("inf"):
            raise InputError(f"--{name.replace('_', '-')} is {value}; it must be finite")
    if args.cache_disk is not None:
        if args.cache_host is None:
            raise InputError("--cache-disk needs --cache-host, the memory by which its pages come and go")
        usable_folder(args.cache_disk)
    if (args.tls_cert is None) != (args.tls_key is None):
        raise InputError("--tls-cert and --tls-key need each other")
    for name in ("tls_cert", "tls_key"):
        if (file := getattr(args, name)) is not None:
            setattr(args, name, user_path(file))
            if not user_path(file).is_file():
                raise InputError(f"there is no file {file}")


def read_keys(args: argparse.Namespace) -> frozenset[str]:
    """The keys of flags, file and environment."""
    keys = [*args.key]
    if args.key_file is not None:
        try:
            lines = user_path(args.key_file).read_text(encoding="utf-8").split("\n")
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"--key-file {args.key_file}: {error}") from None
        found = [line.strip() for line in lines if line.strip()]
        keys += found
        if not found:
            raise InputError(f"--key-file {args.key_file} has no key")
    if KEY_VARIABLE in os.environ:
        keys.append(os.environ[KEY_VARIABLE])
    for key in keys:
        if not (key and key.isascii() and key.isprintable() and key == key.strip()):
            raise InputError("a --key is empty, or has characters other than printable ASCII, which no header can hold")
    return frozenset(keys)


def sampling_defaults(folder: Path) -> dict:
    """The sampling parameters in the checkpoint's generation_config.json, which vLLM applies too."""
    file = folder / "generation_config.json"
    settings = read_json(file) if file.is_file() else {}
    found = {name: settings[name] for name in SAMPLING if settings.get(name) is not None}
    checked = {"temperature": 1.0} | found
    if checked["temperature"] == 0:  # greedy: as in a body, what restricts random sampling has no effect
        checked["temperature"] = 1.0
    if checked.get("top_k") == -1:  # all tokens, as in a body
        checked["top_k"] = 0
    try:
        Sampling(**checked)
    except InputError as error:
        raise InputError(f"{file}: {error}") from None
    return found


def bind(host: str, port: int, path: str | None = None) -> socket.socket:
    """Bind before loading the model, so that a port in use is reported at once. path: of a Unix socket instead."""
    if path is not None:
        listener = socket.socket(socket.AF_UNIX)
        Path(path).unlink(missing_ok=True)  # of the process before
        listener.bind(path)
        return listener
    listener = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
    except (OSError, OverflowError) as error:
        listener.close()
        raise InputError(f"cannot listen on {host}, port {port}: {error}") from None
    return listener


def start(
    args: argparse.Namespace, folder: Path, adapters: dict[str, Path] | None = None, progress: Progress | None = None
) -> Engine:
    """Load the model and warm up its engine."""
    spill = None
    if args.cache_host is not None:
        spill = Spill(int(args.cache_host * 1e9), args.cache_disk, int(args.cache_disk_gb * 1e9))
    engine = make_engine(
        folder,
        args,
        progress,
        cache_tokens=args.cache_tokens,
        cache_dtype=torch.float8_e4m3fn if args.cache == "fp8" else None,
        max_running=args.max_running,
        max_rows=max(args.max_rows, args.max_running * (1 + args.draft)),
        max_waiting=args.max_waiting,
        draft=args.draft,
        adapters=adapters,
        batch_invariant=args.batch_invariant,
        spill=spill,
    )
    engine.warm_up()
    return engine


def keep_loaded() -> None:
    """Take what is there out of garbage collection, which would read all of it several times while it parses a body of
    many lists: 1.2 s for a megabyte, in which nothing else runs, and 0.2 s without it."""
    gc.collect()
    gc.freeze()


class Loading:
    """Loads the engine in a thread, while the server already answers /health."""

    def __init__(self, load: Callable[[Progress], Engine], service: Service, url: str):
        self.load, self.service, self.url = load, service, url
        self.shown = time.perf_counter()  # when the log last said something
        self.error: BaseException | None = None

    def start(self) -> None:
        threading.Thread(target=self.run, daemon=True).start()

    def run(self) -> None:
        started = time.perf_counter()
        try:
            engine = self.load(self.progress)
        except BaseException as error:
            self.error = error
            return
        keep_loaded()
        self.service.start(engine)
        tokens = engine.pages.count * engine.pages.size
        seconds = time.perf_counter() - started
        print(f"{self.service.name} at {self.url}, a cache of {tokens} tokens, loaded in {seconds:.1f} s", flush=True)

    def progress(self, loaded: int, total: int) -> None:
        """Tell /health, and now and then the log, how many bytes of the weights are loaded."""
        self.service.loading = f"loading: {loaded / 1e9:.2f} of {total / 1e9:.2f} GB of weights"
        if time.perf_counter() - self.shown >= PROGRESS_SECONDS:
            self.shown = time.perf_counter()
            print(f"{self.service.name}: {self.service.loading}", file=sys.stderr, flush=True)

    def watch(self) -> str | None:
        """What ends the server."""
        return "the model could not be loaded" if self.error else self.service.dead


@command
def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    args = arguments().parse_args(argv)
    check(args)
    raise_descriptors()
    keys = read_keys(args)
    config, folder = resolve_checkpoint(args.model)
    name = args.name or folder.resolve().name
    adapters = read_flags(args.adapter, name, config, folder)
    tokenizer: Tokenizer = find_tokenizer(args.tokenizer, folder, config)
    limits = dict(keys=keys, max_body=args.max_body, limit_concurrency=args.limit_concurrency)
    options = load_options(args)  # refuses a device that is not there
    traces = make_traces(args.otlp)
    if args.replicas > 1 and args.socket is None:
        return route(args, argv, name, dict(access_log=args.access_log, **limits), options["device"] == "cuda")
    service = Service(
        None, tokenizer, name, frozenset(stop_token_ids(config, tokenizer, folder)), adapters=tuple(adapters),
        max_tokens=args.max_tokens, timeout=args.timeout, stuck_after=args.stuck_after,
        sampling_defaults=sampling_defaults(folder), origins=tuple(args.allow_origin),
        access_log=args.access_log and args.socket is None, traces=traces, **limits,
    )  # fmt: skip
    with bind(args.host, args.port, args.socket) as listener:
        url = listen(listener, args)
        loading = Loading(partial(start, args, folder, adapters), service, url)
        if args.socket is None:
            about = f"loading {size(folder)} from {folder}; {url.removesuffix('/v1')}/health says when it is ready"
            print(about, file=sys.stderr, flush=True)
        server = make_server(make_app(service), args, loading.watch if args.socket is None else with_parent(loading))
        loading.start()
        if not run(server, listener):
            return 130
    if isinstance(loading.error, torch.OutOfMemoryError):
        raise InputError("out of GPU memory; python -m ling_kernels.plan decode shows the memory that a model needs")
    if loading.error is not None:
        raise loading.error
    return ended(server)


def route(args: argparse.Namespace, argv: list[str], name: str, limits: dict, on_gpu: bool) -> int:
    """Run --replicas processes of this command behind a router."""
    gpus = visible_gpus(args.replicas, torch.cuda.device_count(), args.tp) if on_gpu else None
    command = [sys.executable, "-m", "ling_kernels.generate.server", *argv]
    with bind(args.host, args.port) as listener:
        url = listen(listener, args)
        router = Router(args.replicas, command, gpus, **limits)
        server = make_server(router.app(), args, lambda: router.dead)
        ready = f"{url.removesuffix('/v1')}/health says when they are ready"
        print(f"{name} at {url}, {args.replicas} replicas; {ready}", flush=True)
        keep_loaded()
        if not run(server, listener):
            return 130
    return ended(server)


def listen(listener: socket.socket, args: argparse.Namespace) -> str:
    """Listen, and return the URL."""
    listener.listen(2048)
    if args.socket is not None:
        return args.socket
    host = f"[{args.host}]" if ":" in args.host else args.host
    return f"http{'s' * bool(args.tls_cert)}://{host}:{listener.getsockname()[1]}/v1"


def make_server(app: ASGIApp, args: argparse.Namespace, watch: Callable[[], str | None]) -> Server:
    """uvicorn with the flags' limits. A replica speaks no TLS, and believes what the router says of a client."""
    tls = {} if args.socket else dict(ssl_certfile=args.tls_cert, ssl_keyfile=args.tls_key)
    proxy = dict(forwarded_allow_ips="*") if args.socket else {}
    server = Server(app, args.grace, args.client_timeout, watch, **tls, **proxy)
    try:
        server.config.load()
    except OSError as error:  # ssl.SSLError too
        raise InputError(f"--tls-cert, --tls-key: {error}") from None
    return server


def with_parent(loading: Loading) -> Callable[[], str | None]:
    """`loading.watch` of a replica, which ends with its router, however that ends."""
    parent = os.getppid()
    return lambda: loading.watch() or (None if os.getppid() == parent else "the router has ended")


def run(server: Server, listener: socket.socket) -> bool:
    """Serve until a signal; False after Ctrl-C."""
    try:
        server.run(sockets=[listener])
    except KeyboardInterrupt:  # uvicorn raises it again after its graceful shutdown
        return False
    return True


def ended(server: Server) -> int:
    if server.fault is not None:
        print(f"error: {server.fault}", file=sys.stderr)
        return 1
    return 0


def size(folder: Path) -> str:
    return f"{sum(file.stat().st_size for file in folder.glob('*.safetensors')) / 1e9:.2f} GB"
