"""Clients on sockets that are slow, half-open or hostile, and the end of a server beside them."""

# ruff: noqa: F811 (fixtures are imported)
import contextlib
import json
import shutil
import signal
import socket
import ssl
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

pytest.importorskip("fastapi")
pytest.importorskip("uvicorn")

from ling_kernels.generate.server.app import make_app  # noqa: E402
from ling_kernels.generate.server.connections import Server  # noqa: E402
from tests.test_server import BODY, checkpoint, httpx, service  # noqa: E402, F401

HEAD = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
LONG = 300.0  # seconds that no test waits for
SSL_WAIT = 25.0  # seconds, less than asyncio waits for the goodbye of a TLS client by itself, 30
WITH_OPENSSL = pytest.mark.skipif(shutil.which("openssl") is None, reason="no openssl makes a certificate")


@contextlib.contextmanager
def running(service, client_timeout=LONG, **options):
    """A server in a thread."""
    server = Server(make_app(service), LONG, client_timeout, lambda: None, **options)
    listener = socket.socket()
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)  # of its connections too
    listener.bind(("127.0.0.1", 0))
    listener.listen(2048)
    thread = threading.Thread(target=server.run, args=[[listener]])
    thread.start()
    while not server.started:
        time.sleep(0.01)
    try:
        yield server
    finally:
        server.should_exit = server.force_exit = True
        thread.join()


def port_of(server: Server) -> int:
    return server.servers[0].sockets[0].getsockname()[1]


def connect(port: int, data: bytes = b"") -> socket.socket:
    client = socket.create_connection(("127.0.0.1", port), timeout=LONG)
    client.sendall(data)
    return client


def read_all(client: socket.socket) -> bytes:
    data = b""
    with contextlib.suppress(ConnectionResetError):
        while piece := client.recv(1 << 16):
            data += piece
    return data


def test_bodies_are_counted_and_a_wrong_key_is_refused_before_one_is_read(checkpoint):
    """With both lengths, without a length, and with a wrong one."""
    locked = service(checkpoint, keys=frozenset({"k"}), max_body=1000)
    key = b"Authorization: Bearer k\r\n"
    body = json.dumps(BODY).encode()
    chunk = b"%x\r\n%b\r\n" % (len(body), body)
    with running(locked) as server:
        port = port_of(server)
        for head, status in (
            (key + b"Content-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n", 400),
            (b"Transfer-Encoding: chunked\r\n\r\n", 401),
            (b"Content-Length: 900\r\n\r\n", 401),
            (key + b"Content-Length: 1001\r\n\r\n", 413),
            (key + b"Transfer-Encoding: chunked\r\n\r\n" + b"3e8\r\n" + b"x" * 1000 + b"\r\n1\r\nx\r\n", 413),
            (key + b"Connection: close\r\nTransfer-Encoding: chunked\r\n\r\n" + chunk + b"0\r\n\r\n", 200),
        ):
            with connect(port, HEAD + head) as client:  # no body, or not all of it: the answer comes without it
                answer = read_all(client)
                assert answer.startswith(b"HTTP/1.1 %d " % status), answer
        assert b"bcd" in answer


def test_slow_clients_are_cut_off_and_others_are_not(checkpoint):
    """A connection without a request, half a head, a head that trickles in, half a body, also after a request."""
    body = json.dumps(BODY).encode()
    request = HEAD + b"Content-Length: %d\r\n\r\n" % len(body)
    with running(service(checkpoint), client_timeout=1.0) as server:
        port, started = port_of(server), time.monotonic()
        slow = [connect(port), connect(port, HEAD[:20]), connect(port, HEAD + b"Content-Length: 50\r\n\r\n{")]
        pipelined = connect(port, request + body + request + body[:-1])
        trickle = connect(port, HEAD[:5])
        while trickle is not None and time.monotonic() - started < LONG:
            time.sleep(0.2)
            try:
                trickle.sendall(b"x")
            except OSError:
                trickle.close()
                trickle = None
        assert trickle is None, "bytes that trickle in do not keep a connection"
        for client in slow:
            assert read_all(client) == b""
            client.close()
        with pipelined:
            assert read_all(pipelined).count(b"bcd") == 1
        answer = httpx.post(f"http://127.0.0.1:{port}/v1/completions", json=BODY, timeout=LONG)
        assert answer.json()["choices"][0]["text"] == "bcd"


def test_a_client_that_does_not_read_is_cut_off(checkpoint):
    body = json.dumps(BODY | dict(max_tokens=40, n=16, stream=True, ignore_eos=True, logprobs=20)).encode()
    with running(service(checkpoint), client_timeout=1.0) as server, socket.socket() as client:
        port = port_of(server)
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        client.settimeout(LONG)
        client.connect(("127.0.0.1", port))
        client.sendall(HEAD + b"Content-Length: %d\r\n\r\n" % len(body) + body)
        deadline = time.monotonic() + LONG
        while not server.server_state.connections:
            time.sleep(0.01)
        while server.server_state.connections and time.monotonic() < deadline:
            time.sleep(0.1)
        assert time.monotonic() < deadline
        assert b"[DONE]" not in read_all(client)


def certificate(folder: Path) -> tuple[str, str]:
    """A new certificate and its key."""
    cert, key = str(folder / "cert.pem"), str(folder / "key.pem")
    make = "openssl req -x509 -newkey rsa:2048 -nodes -days 2 -subj /CN=x -addext subjectAltName=IP:127.0.0.1"
    subprocess.run([*make.split(), "-keyout", key, "-out", cert], check=True, capture_output=True)
    return cert, key


@WITH_OPENSSL
def test_tls(checkpoint, tmp_path):
    """A client that knows the certificate is answered; another refuses the server."""
    cert, key = certificate(tmp_path)
    with running(service(checkpoint), ssl_certfile=cert, ssl_keyfile=key) as server:
        url = f"https://127.0.0.1:{port_of(server)}/v1/completions"
        known = ssl.create_default_context(cafile=cert)
        assert httpx.post(url, json=BODY, timeout=LONG, verify=known).json()["choices"][0]["text"] == "bcd"
        with pytest.raises(httpx.ConnectError, match="CERTIFICATE_VERIFY_FAILED"):
            httpx.post(url, json=BODY, timeout=LONG)


def test_a_limit_of_calls(checkpoint):
    """Above it calls get 503, and /health answers; a call without its body counts."""
    with running(service(checkpoint, limit_concurrency=2)) as server:
        port = port_of(server)
        url = f"http://127.0.0.1:{port}"
        with (
            connect(port, HEAD + b"Content-Length: 50\r\n\r\n{"),
            connect(port, HEAD + b"Content-Length: 50\r\n\r\n{"),
        ):
            while (refused := httpx.post(f"{url}/v1/completions", json=BODY, timeout=LONG)).status_code != 503:
                time.sleep(0.05)
            assert refused.json()["error"]["message"] == "the server has its limit of 2 calls"
            assert httpx.get(f"{url}/health", timeout=LONG).status_code == 200
        while httpx.post(f"{url}/v1/completions", json=BODY, timeout=LONG).status_code != 200:
            time.sleep(0.05)


def test_a_client_that_leaves_while_it_waits(checkpoint):
    """Its request ends although it has no token yet."""
    fresh = service(checkpoint, dict(max_running=1))
    with running(fresh) as server:
        body = json.dumps(BODY).encode()
        first = fresh.engine.submit([97], max_new_tokens=150, stop_token_ids=())  # nobody runs its passes
        fresh.engine.step()
        real, fresh.engine.step = fresh.engine.step, lambda: time.sleep(0.05) or True
        with connect(port_of(server), HEAD + b"Content-Length: %d\r\n\r\n" % len(body) + body):
            while not fresh.engine.scheduler.queued:
                time.sleep(0.01)
        while not fresh.metrics.responses[499]:
            time.sleep(0.05)
        fresh.engine.step = real
        fresh.engine.cancel(first)
        while fresh.engine.step():
            pass
        assert fresh.engine.scheduler.queued == 0 and fresh.metrics.finished["cancelled"] == 1


@contextlib.contextmanager
def command(checkpoint, *flags, ulimit="-S -n 1024"):
    """The server's command in a process, and its port."""
    args = ["bash", "-c", f'ulimit {ulimit} && exec "$0" "$@"']
    args += [sys.executable, "-m", "ling_kernels.generate.server", "--model", checkpoint, "--port", "0", *flags]
    with subprocess.Popen(args, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            yield process, int(process.stdout.readline().split()[2].split(":")[2].partition("/")[0])
        finally:
            process.kill()


def children(pid: int) -> list[int]:
    """The processes that a process has started, in that order."""
    found = []  # not from the lists in its threads' folders: a thread may end meanwhile
    for file in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # it has ended
            if int(file.read_text().rpartition(")")[2].split()[1]) == pid:
                found.append(int(file.parent.name))
    return sorted(found)


@pytest.mark.parametrize("tls", [False, pytest.param(True, marks=WITH_OPENSSL)], ids=["plain", "tls"])
def test_sigterm_does_not_wait_for_clients_that_have_no_answer(checkpoint, tmp_path, tls):
    """With no request, with a part of one, and with one that was answered."""
    cert, key = certificate(tmp_path) if tls else ("", "")
    context = ssl.create_default_context(cafile=cert) if tls else None
    flags = ["--grace", str(2 * LONG), "--client-timeout", str(2 * LONG)]
    flags += ["--tls-cert", cert, "--tls-key", key] if tls else []
    with command(checkpoint, *flags) as (process, port), contextlib.ExitStack() as stack:
        for data in (b"", HEAD[:20], HEAD + b"Content-Length: 50\r\n\r\n{", b"GET /live HTTP/1.1\r\nHost: x\r\n\r\n"):
            client = stack.enter_context(connect(port))
            if context is not None:
                client = stack.enter_context(context.wrap_socket(client, server_hostname="127.0.0.1"))
            client.sendall(data)
        assert client.recv(1 << 16).startswith(b"HTTP/1.1 200 ")
        process.send_signal(signal.SIGTERM)
        assert process.wait(SSL_WAIT) == -signal.SIGTERM
        assert "Traceback" not in process.stderr.read()


# An answer that goes on until the server ends, as the client does not read it.
ENDLESS = dict(BODY, prompt=["a"] * 128, max_tokens=190, ignore_eos=True, logprobs=20, stream=True)


def ask(port: int, body: dict) -> socket.socket:
    """A client whose answer has begun."""
    data = json.dumps(body).encode()
    while True:  # the model is loading at first
        client = connect(port, HEAD + b"Content-Length: %d\r\n\r\n" % len(data) + data)
        status = client.recv(len("HTTP/1.1 200"))[-3:]
        if status == b"200":
            return client
        client.close()
        assert status == b"503"
        time.sleep(0.1)


def test_sigterm_finishes_answers_within_the_grace(checkpoint):
    body = BODY | dict(max_tokens=190, ignore_eos=True, stream=True)
    with command(checkpoint, "--grace", str(2 * LONG)) as (process, port), ask(port, body) as client:
        process.send_signal(signal.SIGTERM)
        assert b"data: [DONE]" in read_all(client)
        assert process.wait(LONG) == -signal.SIGTERM
    with command(checkpoint, "--grace", "1") as (process, port), ask(port, ENDLESS):
        process.send_signal(signal.SIGTERM)
        assert process.wait(LONG) == -signal.SIGTERM
        assert "Traceback" not in process.stderr.read()


def test_a_second_signal_ends_at_once(checkpoint):
    with command(checkpoint, "--grace", "600") as (process, port), ask(port, ENDLESS):
        process.send_signal(signal.SIGTERM)
        time.sleep(0.5)
        assert process.poll() is None, "the grace is not over"
        process.send_signal(signal.SIGTERM)
        assert process.wait(LONG) == 128 + signal.SIGTERM


def test_a_connection_outlives_its_place_in_a_clients_pool(checkpoint):
    """Else a client may send a request just as its connection is closed: once in 8,500 calls of an hour of `make soak`,
    whose client keeps connections as long as uvicorn does by default."""
    with running(service(checkpoint)) as server:
        assert server.config.timeout_keep_alive > 90  # Go's pool, the longest
        with httpx.Client(base_url=f"http://127.0.0.1:{port_of(server)}") as client:
            assert client.get("/health").headers.get("connection") != "close"
            time.sleep(0.1)
            assert len(server.server_state.connections) == 1
