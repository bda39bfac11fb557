"""Several servers behind one port: each is a process with a GPU of its own, and a router gives it its requests.

A request goes to the replica that has seen the longest beginning of its prompt, whose pages may be in its cache, unless
that one has AHEAD more requests than the least busy. A replica whose process ends is started again. Its requests go to
another one, except for streams that have begun: they end with an error event.

Replicas listen on Unix sockets that only this user can open.
"""

import asyncio
import json
import os
import signal
import sys
import tempfile
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path

import httpx
from fastapi.responses import JSONResponse, PlainTextResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from ...errors import InputError
from .guard import Guard
from .metrics import FORMAT, labelled, lines
from .service import LOADING, Limits, error_object, error_response

AHEAD = 8  # requests
PREFIX = 512  # characters of a prompt, by which beginnings are compared
PREFIXES = 64  # of a prompt that are compared
REMEMBERED = 1 << 16  # beginnings of prompts
FIRST_PAUSE, LONGEST_PAUSE = 1.0, 30.0  # seconds before a replica that ended is started again; twice as long each time
POLL = 0.5  # seconds between two looks at a replica's health
KILL_AFTER = 5.0  # seconds that a replica has to end at a shutdown
HOP = {
    "connection",
    "keep-alive",
    "transfer-encoding",
    "te",
    "trailer",
    "upgrade",
    "host",
    "content-length",
}  # RFC 9110
RUNS_AGAIN = "the replica that served this request has ended; please try again"
ENDED_TWICE = "two replicas, one after the other, have ended while they had this request; it is not tried again"
UNABLE = "no replica can serve now"


class Replica:
    """A process of the server, and the requests that it has."""

    def __init__(self, number: int, command: list[str], socket: Path, gpu: str | None):
        self.number, self.command, self.socket, self.gpu = number, command, socket, gpu
        self.fault: str | None = "loading"
        self.failure: int | None = None  # the exit code of the last process, where it ended before it could serve
        self.served = False  # whether its process has been able to serve
        self.running = 0
        self.process: asyncio.subprocess.Process | None = None
        transport = httpx.AsyncHTTPTransport(uds=str(socket), limits=httpx.Limits(max_connections=None))
        self.client = httpx.AsyncClient(transport=transport, base_url="http://replica", timeout=None)

    async def keep_running(self) -> None:
        """Start the process, and again whenever it has ended."""
        pause = FIRST_PAUSE
        while True:
            self.served = False
            environment = {**os.environ, **({} if self.gpu is None else {"CUDA_VISIBLE_DEVICES": self.gpu})}
            self.process = await asyncio.create_subprocess_exec(
                *self.command, env=environment, stdin=asyncio.subprocess.DEVNULL, start_new_session=True
            )
            looking = asyncio.create_task(self.look())
            code = await self.process.wait()
            looking.cancel()
            self.failure = None if self.served else code
            if self.served:
                pause = FIRST_PAUSE
            self.fault = f"replica {self.number} has ended with exit code {code}"
            print(f"{self.fault}; it is started again in {pause:g} s", file=sys.stderr, flush=True)
            await asyncio.sleep(pause)
            pause = min(2 * pause, LONGEST_PAUSE)

    async def look(self) -> None:
        """Follow the process's /health."""
        while True:
            try:
                answer = await self.client.get("/health", timeout=10)
                self.fault = None if answer.status_code == 200 else answer.json()["status"]
                self.served = self.served or self.fault is None
            except httpx.TransportError:
                self.fault = self.fault or "it does not answer"
            await asyncio.sleep(POLL)

    async def stop(self) -> None:
        """End the process, by force where it does not."""
        if self.process is not None and self.process.returncode is None:
            self.process.send_signal(signal.SIGTERM)
            try:
                await asyncio.wait_for(self.process.wait(), KILL_AFTER)
            except asyncio.TimeoutError:
                self.process.kill()
                await self.process.wait()
        await self.client.aclose()


class Router(Limits):
    """ASGI application over `count` replicas. command: the server's with the flags of each, but for its socket."""

    def __init__(self, count: int, command: list[str], gpus: list[str] | None, **limits):
        super().__init__(**limits)
        self.folder = tempfile.TemporaryDirectory(prefix="ling-")  # of this user alone
        sockets = [Path(self.folder.name, f"{i}.sock") for i in range(count)]
        self.replicas = [
            Replica(i, [*command, "--socket", str(socket)], socket, gpus[i] if gpus else None)
            for i, socket in enumerate(sockets)
        ]
        self.seen: OrderedDict[int, int] = OrderedDict()  # hash of a prompt's beginning -> number of the replica
        self.tasks: list[asyncio.Task] = []

    def app(self) -> ASGIApp:
        return Guard(self, self)

    @property
    def loading(self) -> bool:
        """Whether all are; each then says how far it is."""
        return all((replica.fault or "").startswith("loading") for replica in self.replicas)

    @property
    def unable(self) -> str | None:
        faults = {replica.number: replica.fault for replica in self.replicas}
        if None in faults.values():
            return None
        if self.loading:
            return LOADING
        return f"{UNABLE}: " + "; ".join(f"replica {number}: {fault}" for number, fault in faults.items())

    @property
    def dead(self) -> str | None:
        """Why the router should end: no replica could be loaded."""
        failures = [replica.failure for replica in self.replicas]
        if None in failures or self.unable is None:
            return None
        return f"no replica could be loaded: exit codes {', '.join(map(str, failures))}"

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self.live(receive, send)
        elif scope["path"] == "/health":
            faults = {str(r.number): r.fault or "ok" for r in self.replicas}
            able = "ok" in faults.values()
            status = "ok" if able else "loading" if self.loading else UNABLE
            answer = JSONResponse({"status": status, "replicas": faults}, 200 if able else 503)
            await answer(scope, receive, send)
        elif scope["path"] == "/live":
            await JSONResponse({"status": "ok"})(scope, receive, send)
        elif scope["path"] == "/metrics":
            await PlainTextResponse(await self.metrics_text(), media_type=FORMAT)(scope, receive, send)
        else:
            body = (await receive())["body"]  # the guard has read it whole
            serving = asyncio.create_task(self.serve(scope, body, receive, send))
            leaving = asyncio.ensure_future(receive())
            try:
                await asyncio.wait([serving, leaving], return_when=asyncio.FIRST_COMPLETED)
                if serving.done():
                    serving.result()
            finally:  # where the client has left, its replica learns it by the connection's end
                for task in (serving, leaving):
                    task.cancel()
                await asyncio.gather(serving, leaving, return_exceptions=True)

    async def live(self, receive: Receive, send: Send) -> None:
        await receive()
        self.tasks = [asyncio.create_task(replica.keep_running()) for replica in self.replicas]
        await send({"type": "lifespan.startup.complete"})
        await receive()
        for task in self.tasks:
            task.cancel()
        await asyncio.gather(*(replica.stop() for replica in self.replicas))
        self.folder.cleanup()
        await send({"type": "lifespan.shutdown.complete"})

    async def serve(self, scope: Scope, body: bytes, receive: Receive, send: Send) -> None:
        """Pass a request on; to the next replica where one cannot be reached, and once where one ends before it has
        answered: the request itself may have ended it."""
        headers = [(name, value) for name, value in scope["headers"] if name.decode("latin-1").lower() not in HOP]
        headers.append((b"x-forwarded-for", scope["state"]["client"].encode()))
        headers.append((b"x-request-id", scope["state"]["id"].encode()))
        url = scope["path"] + ("?" + scope["query_string"].decode() if scope["query_string"] else "")
        prefixes, tried = await asyncio.to_thread(lambda: [*prefixes_of(body)]), set()
        ended = 0
        while ended < 2 and (replica := self.choose(prefixes, tried)) is not None:
            tried.add(replica.number)
            replica.running += 1
            try:
                request = replica.client.build_request(scope["method"], url, content=body, headers=headers)
                answer = await replica.client.send(request, stream=True)
                try:
                    if await pass_on(answer, send):
                        return
                finally:
                    await answer.aclose()
            except httpx.ConnectError:
                pass
            except httpx.TransportError:
                ended += 1
            finally:
                replica.running -= 1
        if ended == 2:  # the header is of OpenAI's clients, which otherwise send the request again by themselves
            answer = error_response(503, ENDED_TWICE, {"x-should-retry": "false"})
        else:
            why = RUNS_AGAIN if ended else self.unable or f"{UNABLE}; please try again"
            answer = error_response(503, why, {"Retry-After": "5"})
        await answer(scope, receive, send)

    def choose(self, prefixes: list[int], tried: set[int]) -> Replica | None:
        """The replica of a prompt with these beginnings, of those that serve and were not tried."""
        able = [r for r in self.replicas if r.fault is None and r.number not in tried]
        if not able:
            return None
        chosen = min(able, key=lambda r: (r.running, r.number))
        known = next((self.seen[p] for p in reversed(prefixes) if p in self.seen), None)
        for replica in able:
            if replica.number == known and replica.running < chosen.running + AHEAD:
                chosen = replica
        for prefix in prefixes:
            self.seen[prefix] = chosen.number
            self.seen.move_to_end(prefix)
        while len(self.seen) > REMEMBERED:
            self.seen.popitem(last=False)
        return chosen

    async def metrics_text(self) -> str:
        """All replicas' metrics, with the label `replica`; the router's own are its refusals."""
        ready = [(f'{{replica="{r.number}"}}', float(r.fault is None)) for r in self.replicas]
        counts = labelled("status", self.metrics.responses)
        own = [(f'{label[:-1]},replica="router"}}', float(n)) for label, n in counts]
        found = {"ready": [*lines("ready", "gauge", "whether a replica serves", ready)]}
        for replica in self.replicas:
            try:
                answer = await replica.client.get("/metrics", timeout=5)
            except httpx.HTTPError:
                continue
            for line in answer.text.splitlines():
                if line.startswith("# HELP "):
                    metric = found.setdefault(line.split()[2].removeprefix("ling_"), [])
                if not line.startswith("#"):
                    metric.append(with_label(line, replica.number))
                elif line not in metric:
                    metric.append(line)
        own_lines = [*lines("http_responses_total", "counter", "HTTP responses by status", own)]
        found.setdefault("http_responses_total", own_lines[:2]).extend(own_lines[2:])
        return "".join(f"{line}\n" for metric in found.values() for line in metric)


def with_label(line: str, replica: int) -> str:
    """A sample in Prometheus' text format, with one more label."""
    name, _, value = line.rpartition(" ")
    label = f'replica="{replica}"'
    return f"{name[:-1]},{label}}} {value}" if name.endswith("}") else f"{name}{{{label}}} {value}"


async def pass_on(answer: httpx.Response, send: Send) -> bool:
    """Send a replica's answer to the client; False, and nothing sent, where the replica does not serve any more. Raises
    TransportError where it ends before the answer has begun."""
    stream = answer.headers.get("content-type", "").startswith("text/event-stream")
    if answer.status_code == 503 and "retry-after" in answer.headers:
        return False
    if not stream:
        await answer.aread()
    kept = [(k.lower(), v) for k, v in answer.headers.raw if k.decode("latin-1").lower() not in HOP | {"x-request-id"}]
    if not stream:
        kept.append((b"content-length", str(len(answer.content)).encode()))
    await send({"type": "http.response.start", "status": answer.status_code, "headers": kept})
    if not stream:
        await send({"type": "http.response.body", "body": answer.content})
        return True
    try:
        async for part in answer.aiter_raw():
            await send({"type": "http.response.body", "body": part, "more_body": True})
        end = b""
    except httpx.TransportError:
        end = f"data: {json.dumps({'error': error_object(500, RUNS_AGAIN)})}\n\n".encode()
    await send({"type": "http.response.body", "body": end})
    return True


def prefixes_of(body: bytes) -> Iterator[int]:
    """Hashes of a prompt's beginnings, the shortest first; the last is of all of it if it is short."""
    try:
        request = json.loads(body)
        prompt, model = request.get("messages") or request.get("prompt"), str(request.get("model"))
    except (ValueError, AttributeError, RecursionError):  # the replica refuses it
        return
    if not prompt:
        return
    text = prompt if isinstance(prompt, str) else json.dumps(prompt)
    for end in range(PREFIX, min(len(text), PREFIX * PREFIXES) + 1, PREFIX):
        yield hash((model, text[:end]))  # adapters share no pages


def visible_gpus(count: int, available: int, each: int = 1) -> list[str]:
    """Values of CUDA_VISIBLE_DEVICES for `count` engines of `each` GPUs. Raises InputError where there are fewer."""
    if count * each > available:
        times = f" times --tp {each}" if each > 1 else ""
        raise InputError(f"--replicas {count}{times}: torch sees {available} GPUs")
    given = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    gpus = given.split(",") if given else [str(i) for i in range(available)]
    return [",".join(gpus[i * each : (i + 1) * each]) for i in range(count)]
