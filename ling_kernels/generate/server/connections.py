"""uvicorn with limits on slow clients, and a shutdown that ends.

The one file that uses what uvicorn does not document: `H11Protocol.conn`, `transport` and `on_response_complete`,
`Server.handle_exit` and `on_tick`. tests/test_server_connections.py fails where a version changes them.
"""

import asyncio
import os
import socket
import sys
import threading
from collections.abc import Callable

import h11
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from .listener import Listener, Waiting

READING = (h11.IDLE, h11.SEND_BODY)  # states of a client that has not sent its whole request
EXIT_SLACK = 5.0  # seconds beyond --grace
# Seconds that a connection stays open without a request. A client whose pool keeps it longer may send the next request
# just as it is closed, and gets an error. Pools keep connections 5 s (httpx), 15 (aiohttp), 60 (nginx) and 90 (Go).
KEEP_ALIVE = 120
# Seconds that a TLS client has to say that it closes a connection, too, at the server's end. One that waits for nothing
# does not read that it should, and asyncio would wait for 30 s.
GOODBYE = 1.0


def connection_class(seconds: float, waiting: Waiting) -> type[H11Protocol]:
    """Connections that are cut where a client takes longer than `seconds` to send a request, or to read anything of an
    answer that waits for it. Between requests the limit is KEEP_ALIVE."""

    class Connection(H11Protocol):
        def connection_made(self, transport: asyncio.BaseTransport) -> None:
            super().connection_made(transport)  # type: ignore[arg-type]
            self.timers: dict[str, asyncio.TimerHandle] = {}
            self.number = transport.get_extra_info("socket").fileno()
            self.start_timer("request")

        def data_received(self, data: bytes) -> None:
            super().data_received(data)
            if self.conn.their_state in READING and not self.transport.is_closing():
                self.start_timer("request")
            else:
                self.stop_timer("request")
                waiting.end(self.number)

        def on_response_complete(self) -> None:
            super().on_response_complete()
            if self.conn.their_state in READING and not self.transport.is_closing():
                waiting.begin(self.number)
            if self.conn.their_state is h11.SEND_BODY:  # of a next request that came with the last one
                self.start_timer("request")

        def pause_writing(self) -> None:
            super().pause_writing()
            self.start_timer("answer")

        def resume_writing(self) -> None:
            super().resume_writing()
            self.stop_timer("answer")

        def shutdown(self) -> None:
            """At the server's end: an answer goes on; a request that is not whole, also in its body, is cut off."""
            if self.conn.their_state is h11.SEND_BODY:
                self.transport.abort()
                return
            super().shutdown()
            if self.transport.is_closing() and not self.transport.get_write_buffer_size():
                self.start_timer("goodbye", GOODBYE)

        def connection_lost(self, exc: Exception | None) -> None:
            for name in [*self.timers]:
                self.stop_timer(name)
            super().connection_lost(exc)

        def start_timer(self, name: str, seconds: float = seconds) -> None:
            """A timer that runs goes on, whatever trickles in."""
            if name not in self.timers:
                self.timers[name] = self.loop.call_later(seconds, self.transport.abort)

        def stop_timer(self, name: str) -> None:
            if name in self.timers:
                self.timers.pop(name).cancel()

    return Connection


class Server(uvicorn.Server):
    """`watch` is called ten times a second; what it returns ends the server with that line and exit code 1."""

    def __init__(self, app, grace: float, client_timeout: float, watch: Callable[[], str | None], **options):
        self.waiting = Waiting()
        super().__init__(
            uvicorn.Config(
                app, http=connection_class(client_timeout, self.waiting), ws="none", loop="asyncio",
                log_level="warning", timeout_graceful_shutdown=max(1, round(grace)), timeout_keep_alive=KEEP_ALIVE,
                **options,
            )
        )  # fmt: skip
        self.grace, self.watch = grace, watch
        self.fault: str | None = None
        self.deadline: threading.Timer | None = None

    def run(self, sockets: list[socket.socket] | None = None) -> None:
        """Serve on sockets that listen, of which the TCP ones are closed in the end."""
        sockets = [s if s.family == socket.AF_UNIX else Listener(s, self.waiting) for s in sockets or []]
        try:
            super().run(sockets)
        finally:
            if self.deadline is not None:
                self.deadline.cancel()

    async def on_tick(self, counter: int) -> bool:
        fault = self.watch()
        if fault is not None:
            self.fault = fault
            self.exit_later(1)
            return True
        return await super().on_tick(counter)

    def handle_exit(self, sig, frame) -> None:
        """The first signal finishes what runs, within the grace; a second one ends the process at once."""
        if self.should_exit:
            sys.stderr.flush()
            os._exit(128 + sig)
        super().handle_exit(sig, frame)
        self.exit_later(128 + sig)

    def exit_later(self, code: int) -> None:
        """End the process after the grace, also where a pass of the engine does not return."""
        self.deadline = threading.Timer(self.grace + EXIT_SLACK, os._exit, [code])
        self.deadline.daemon = True
        self.deadline.start()
