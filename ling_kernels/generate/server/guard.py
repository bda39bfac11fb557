"""Before the endpoints: the key, the size of the body, a request's id, and the log and count of responses.

A body is read only after the key was checked, and never beyond the limit, whatever its headers say.
"""

import asyncio
import hashlib
import hmac
import re
import secrets
import sys
import time

from fastapi.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from .service import Limits, error_response

OPEN_PATHS = {"/", "/health", "/live", "/metrics", "/status"}  # without a key
CLOSE = {"Connection": "close"}  # the rest of a refused body is not read


class Guard:
    """ASGI application around `app`. What it learns of a request is in its scope's state: id and client; `complete`
    adds `answer`."""

    def __init__(self, app: ASGIApp, service: Limits):
        self.app, self.service = app, service
        self.calls = 0  # of /v1/, that have no whole answer yet

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        headers = {name.lower(): value.decode("latin-1") for name, value in scope["headers"]}
        state, started, status = scope.setdefault("state", {}), time.perf_counter(), 500
        traced = time.time_ns()
        state["id"] = request_id(headers.get(b"x-request-id", ""))

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message.get("headers", []), (b"x-request-id", state["id"].encode())]
            await send(message)

        number = int(scope["path"].startswith("/v1/"))
        try:
            self.calls += number
            answer = self.refusal(scope, headers)
            if answer is None:
                body = await read_body(receive, self.service.max_body)
                if isinstance(body, bytes):
                    answer, receive = self.app, replay(body, receive)
                elif body is not None:
                    answer = body
            if answer is not None:
                await answer(scope, receive, send_with_id)
            else:
                status = 499  # the client has left
        except asyncio.CancelledError:  # the grace of a shutdown is over: uvicorn says so, a traceback says no more
            status = 499
        finally:
            self.calls -= number
            self.service.metrics.responses[status] += 1
            if self.service.access_log:
                seconds = time.perf_counter() - started
                client, method, path = state["client"], scope["method"], printable(scope["path"])
                print(f"{stamp()} {client} {method} {path} {status} {seconds:.3f} s {state['id']}", file=sys.stderr)
            if self.service.traces is not None:
                self.service.traces.add(scope["path"], headers, state, traced, status)

    def refusal(self, scope: Scope, headers: dict[bytes, str]) -> JSONResponse | None:
        """An error that the headers alone decide. Sets the client: by its key, or else by its address."""
        key = self.matching_key(headers.get(b"authorization", ""))
        address = scope["client"][0] if scope.get("client") else "unknown"
        scope["state"]["client"] = f"key-{hashlib.sha256(key.encode()).hexdigest()[:8]}" if key else address
        if self.service.keys and key is None and scope["path"] not in OPEN_PATHS:
            more = CLOSE | {"WWW-Authenticate": "Bearer"}
            return error_response(401, "the key is missing or wrong", more)
        length = headers.get(b"content-length", "0")
        if b"transfer-encoding" in headers and b"content-length" in headers:
            # RFC 9112, 6.1: a proxy may read one and the server the other, so that a body is taken for a request
            return error_response(400, "the request has both Content-Length and Transfer-Encoding", CLOSE)
        if not (length.isascii() and length.isdecimal()):
            return error_response(400, "Content-Length is not a number", CLOSE)
        if len(length) > 18 or int(length) > self.service.max_body:
            return too_large(self.service.max_body)
        limit = self.service.limit_concurrency
        if limit is not None and self.calls > limit and scope["path"].startswith("/v1/"):
            return error_response(503, f"the server has its limit of {limit} calls", {"Retry-After": "1"} | CLOSE)
        unable = self.service.unable
        if unable is not None and scope["path"].startswith("/v1/"):
            return error_response(503, unable, {"Retry-After": "5"} | CLOSE)
        return None

    def matching_key(self, authorization: str) -> str | None:
        """The service's key that the header gives; all are compared, so that the time tells nothing."""
        scheme, _, given = authorization.partition(" ")
        data = given.strip().encode("latin-1", "replace")
        found = [key for key in self.service.keys if hmac.compare_digest(data, key.encode())]
        return found[0] if found and scheme.lower() == "bearer" else None


async def read_body(receive: Receive, most: int) -> bytes | JSONResponse | None:
    """The whole body; a refusal where it is larger than `most` bytes; None if the client leaves."""
    parts, size = [], 0
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            return None
        parts.append(message.get("body", b""))
        size += len(parts[-1])
        if size > most:
            return too_large(most)
        if not message.get("more_body"):
            return b"".join(parts)


def replay(body: bytes, receive: Receive) -> Receive:
    """A `receive` that gives a body that has been read, and then what comes after it."""
    messages: list[Message] = [dict(type="http.request", body=body, more_body=False)]

    async def receive_again() -> Message:
        return messages.pop() if messages else await receive()

    return receive_again


def too_large(most: int) -> JSONResponse:
    return error_response(413, f"the body is larger than the limit of {most} bytes", CLOSE)


def request_id(given: str) -> str:
    """The client's X-Request-Id, or one of ours where it has none or one that does not belong into a log."""
    return given if re.fullmatch(r"[\w.:/+=@-]{1,128}", given, re.ASCII) else secrets.token_hex(12)


def printable(path: str) -> str:
    return "".join(c if c.isprintable() and c != " " else "?" for c in path[:200])


def stamp() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S%z")
