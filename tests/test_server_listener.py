"""Clients that connect and send nothing, beside others."""

# ruff: noqa: F811 (fixtures are imported)
import contextlib
import os
import re
import resource
import signal
import socket
import ssl
from pathlib import Path

import pytest

pytest.importorskip("fastapi")
pytest.importorskip("uvicorn")

from ling_kernels.generate.server.listener import Listener, Waiting  # noqa: E402
from tests.test_server import checkpoint, httpx, service  # noqa: E402, F401
from tests.test_server_connections import (  # noqa: E402
    ENDLESS,
    LONG,
    WITH_OPENSSL,
    ask,
    certificate,
    command,
    port_of,
    read_all,
    running,
)  # fmt: skip

LIVE = b"GET /live HTTP/1.1\r\nHost: x\r\n\r\n"


def connect_from(address: str, port: int, data: bytes = b"") -> socket.socket:
    client = socket.create_connection(("127.0.0.1", port), LONG, (address, 0))
    with contextlib.suppress(ConnectionError):  # it was refused
        client.sendall(data)
    return client


def closed(client: socket.socket) -> bool:
    """Whether the server has closed it, or does within a second."""
    client.settimeout(1)
    try:
        return client.recv(1) == b""
    except ConnectionError:
        return True
    except TimeoutError:
        return False


def answered(client: socket.socket) -> bool:
    data = b""
    while not data.endswith(b"}") and (piece := client.recv(1 << 16)):
        data += piece
    return data.startswith(b"HTTP/1.1 200 ") and data.endswith(b"}")


def test_the_soft_limit_of_descriptors_is_raised(checkpoint):
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with command(checkpoint, ulimit="-S -n 300") as (process, _):
        (soft,) = re.findall(r"Max open files\s+(\d+)", Path(f"/proc/{process.pid}/limits").read_text())
    assert int(soft) == hard > 300


@pytest.mark.parametrize("tls", [False, pytest.param(True, marks=WITH_OPENSSL)], ids=["plain", "tls"])
def test_half_open_connections_leave_room_for_others(checkpoint, tmp_path, tls):
    """Of 256 descriptors one address takes 128 and all take 192, also before TLS has begun; the newest are closed."""
    cert, key = certificate(tmp_path) if tls else ("", "")
    flags = ["--client-timeout", str(2 * LONG), *(["--tls-cert", cert, "--tls-key", key] if tls else [])]
    url = f"http{'s' * tls}://127.0.0.1"
    verify = ssl.create_default_context(cafile=cert) if tls else True
    with command(checkpoint, *flags, ulimit="-n 256") as (process, port), contextlib.ExitStack() as stack:
        transport = httpx.HTTPTransport(local_address="127.0.0.9", verify=verify)
        other = stack.enter_context(httpx.Client(transport=transport, base_url=f"{url}:{port}", timeout=LONG))
        first = [stack.enter_context(connect_from("127.0.0.2", port, b"GET"[: i % 4])) for i in range(300)]
        assert other.get("/live").status_code == 200
        assert not any(map(closed, (first[0], first[127]))) and all(map(closed, first[128:]))
        second = [stack.enter_context(connect_from("127.0.0.3", port)) for _ in range(100)]
        assert not closed(second[62]) and closed(second[63]), "192 with the other's, which waits between its requests"
        assert other.get("/live").status_code == 200, "one that was there before is served"
        for client in first:
            client.close()
        while (new := connect_from("127.0.0.3", port)) and closed(new):
            new.close()
        new.close()
        process.send_signal(signal.SIGTERM)
        errors = process.stderr.read()
        assert errors.count("new connections are refused: too many connections without a request") == 1
        assert "Traceback" not in errors and len(errors.splitlines()) < 10


def test_a_connection_waits_again_after_its_request(checkpoint):
    """The descriptors of one address are half of 256, whatever was asked before."""
    with command(checkpoint, ulimit="-n 256") as (_, port), contextlib.ExitStack() as stack:
        for _ in range(128):
            client = stack.enter_context(connect_from("127.0.0.2", port, LIVE))
            assert answered(client)
        assert closed(stack.enter_context(connect_from("127.0.0.2", port)))
        client.sendall(LIVE.replace(b"Host", b"Connection: close\r\nHost"))
        assert read_all(client).startswith(b"HTTP/1.1 200 ")
        again = stack.enter_context(connect_from("127.0.0.2", port, LIVE))
        assert answered(again)


def test_an_answer_does_not_wait(checkpoint):
    """A client that has sent its request is not counted until it has its answer."""
    with running(service(checkpoint)) as server, ask(port_of(server), ENDLESS):
        assert len(server.waiting.addresses) == 1 and not server.waiting.waiting and not server.waiting.counts


def test_without_descriptors_connections_are_refused_and_one_line_says_so(capsys):
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.ExitStack() as stack:
        listening = socket.create_server(("127.0.0.1", 0))
        listening.setblocking(False)
        address = listening.getsockname()
        listener = stack.enter_context(Listener(listening, Waiting()))
        listener.setblocking(False)
        clients = [stack.enter_context(socket.create_connection(address, LONG)) for _ in range(20)]
        taken = []
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (max(map(int, os.listdir("/proc/self/fd"))) + 4, hard))
            with contextlib.suppress(OSError):
                while True:
                    taken.append(os.dup(0))
            with pytest.raises(BlockingIOError):
                listener.accept()
        finally:
            for number in taken:
                os.close(number)
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        assert taken and all(map(closed, clients))
        client = stack.enter_context(socket.create_connection(address, LONG))
        accepted, _ = listener.accept()
        accepted.sendall(b"x")
        assert client.recv(1) == b"x"
        accepted.close()
        assert not listener.waiting.waiting and not listener.waiting.counts and not listener.waiting.addresses
    assert capsys.readouterr().err == "new connections are refused: Too many open files\n"
