"""Hundreds of streams at once through the product's `Server`, beside passes that fail and clients that misbehave."""

# ruff: noqa: F811 (fixtures are imported)
import asyncio
import json
import socket
import threading
import time
from collections import Counter
from typing import NamedTuple

import pytest

pytest.importorskip("fastapi")
pytest.importorskip("uvicorn")

from ling_kernels.generate.server.service import INTERNAL_ERROR  # noqa: E402
from tests.speller import LETTERS  # noqa: E402
from tests.test_server import BODY, checkpoint, httpx, service  # noqa: E402, F401
from tests.test_server_connections import HEAD, LONG, connect, port_of, read_all, running  # noqa: E402

STREAMS = ["greedy"] * 140 + ["b", "c", "d"] * 20  # the key of each; one client asks for most of them, and first
LEAVING = 10  # every tenth stream is cancelled by its client
HALF_OPEN, NOT_READING = 20, 4  # clients
LANES = 16
FAILING = {30, 31, 60}  # passes


class Answer(NamedTuple):
    number: int
    text: str
    end: str  # "whole", "left" by the client, or the message of an error


def first_and_text(number: int) -> tuple[str, str]:
    start = number % 20
    return LETTERS[start], LETTERS[start + 1 :]


async def stream(http, number: int) -> Answer:
    body, text = BODY | dict(prompt=first_and_text(number)[0], max_tokens=40, stream=True), ""
    key = {"Authorization": f"Bearer {STREAMS[number]}"}
    async with http.stream("POST", "/v1/completions", json=body, headers=key) as response:
        if response.status_code != 200:
            return Answer(number, text, json.loads(await response.aread())["error"]["message"])
        async for line in response.aiter_lines():
            if line == "data: [DONE]":
                return Answer(number, text, "whole")
            if line.startswith("data: "):
                event = json.loads(line[6:])
                if "error" in event:
                    return Answer(number, text, event["error"]["message"])
                text += event["choices"][0]["text"]
                if number % LEAVING == 5 and text:
                    return Answer(number, text, "left")
    return Answer(number, text, "cut off")


def post(length: int) -> bytes:
    return HEAD + b"Authorization: Bearer unread\r\nContent-Length: %d\r\n\r\n" % length


def half_open(port: int, number: int) -> socket.socket:
    """A connection with nothing, half a head, a head without a body, or half a body."""
    return connect(port, [b"", HEAD[:30], post(50), post(50) + b'{"model": '][number % 4])


def not_reading(port: int) -> socket.socket:
    body = json.dumps(BODY | dict(max_tokens=190, stream=True, ignore_eos=True, logprobs=20)).encode()
    client = socket.socket()
    client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    client.settimeout(LONG)
    client.connect(("127.0.0.1", port))
    client.sendall(post(len(body)) + body)
    return client


def test_many_streams_beside_faults(checkpoint, monkeypatch):
    """Every answer is the right text or says what failed, each client gets its share, and nothing is left over."""
    engine = dict(max_running=LANES, cache_tokens=2000, page_size=16)
    fresh = service(checkpoint, engine, keys=frozenset({*STREAMS, "unread"}))
    scheduler, launch = fresh.engine.scheduler, fresh.engine.launch
    all_wait, passes = threading.Event(), 0

    def faulty(scheduled):
        nonlocal passes
        assert all_wait.wait(LONG)
        passes += 1
        if passes in FAILING:
            raise RuntimeError("no kernel")
        return launch(scheduled)

    monkeypatch.setattr(fresh.engine, "launch", faulty)

    async def run(port: int) -> list[Answer]:
        """The answers in the order in which they ended."""
        answers: list[Answer] = []
        limits = httpx.Limits(max_connections=None)
        async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", limits=limits, timeout=LONG) as http:
            tasks = [asyncio.create_task(stream(http, number)) for number in range(len(STREAMS))]
            for task in tasks:
                task.add_done_callback(lambda task: answers.append(task.result()))
            while scheduler.queued + len(scheduler.running) < len(STREAMS):
                await asyncio.sleep(0.01)
            assert (await http.get("/health")).status_code == 200, "while all wait"
            all_wait.set()
            while passes < max(FAILING):
                await asyncio.sleep(0.01)
            unread.extend(not_reading(port) for _ in range(NOT_READING))  # none of them is ended by an error
            await asyncio.gather(*tasks)
        return answers

    with running(fresh, client_timeout=5.0) as server:
        port = port_of(server)
        open_ones = [half_open(port, number) for number in range(HALF_OPEN)]
        unread: list[socket.socket] = []
        answers = asyncio.run(asyncio.wait_for(run(port), LONG))
        end = time.monotonic() + LONG
        while server.server_state.connections:  # until the last is cut off
            assert time.monotonic() < end
            time.sleep(0.1)
        for client in open_ones:
            assert read_all(client) == b""
            client.close()
        for client in unread:
            assert b"[DONE]" not in read_all(client)
            client.close()

    ends = Counter(answer.end for answer in answers)
    assert {*ends} == {"whole", "left", INTERNAL_ERROR} and ends[INTERNAL_ERROR] <= len(FAILING) * LANES
    for number, text, end in answers:
        want = first_and_text(number)[1]
        assert text == want if end == "whole" else want.startswith(text), (number, text, end)
    whole = Counter(STREAMS[answer.number] for answer in answers if answer.end == "whole")
    assert all(whole[key] >= 5 for key in {*STREAMS}), whole
    last = max(rank for rank, answer in enumerate(answers) if STREAMS[answer.number] != "greedy")
    assert last < len(answers) - 40, "who asks for little does not wait for who asked before for much"

    while fresh.engine.step():
        pass
    assert passes > max(FAILING) and fresh.fault is None
    finished = fresh.metrics.finished
    assert sum(finished.values()) == len(STREAMS) + NOT_READING
    assert finished["stop"] >= ends["whole"] and finished["cancelled"] >= NOT_READING
    assert not scheduler.queued and not scheduler.running
    assert fresh.engine.pages.available == fresh.engine.pages.count
