"""New grammars are read in turns of the clients, while requests with known ones go on."""

# ruff: noqa: F811 (a fixture is imported)
import asyncio
import json
import threading
import time

import pytest

pytest.importorskip("llguidance")

from ling_kernels.generate import grammar  # noqa: E402
from ling_kernels.generate.server.app import make_app  # noqa: E402
from ling_kernels.generate.server.service import MOST_GRAMMARS  # noqa: E402
from tests.speller import speller  # noqa: E402
from tests.test_server import checkpoint, httpx, service  # noqa: E402, F401
from tests.test_server_connections import HEAD, LONG, connect, port_of, running  # noqa: E402
from tests.test_server_structured import CHAT, post  # noqa: E402
from tests.test_server_turns import until  # noqa: E402

BODY = dict(model="speller", prompt="a", temperature=0, max_tokens=30)


def slow_trials(service):
    """(the grammars in the order of their trials, an event for which those with "slow" in them wait)."""
    trial, tried, go = service.grammars().trial, [], threading.Event()
    real = trial.fault

    def fault(source):
        tried.append(source)
        assert "slow" not in source or go.wait(LONG)
        return real(source)

    trial.fault = fault
    return tried, go


def with_regex(pattern: str) -> dict:
    return BODY | dict(structured_outputs=dict(regex=pattern))


def test_known_grammars_pass_and_others_are_read_in_turn(checkpoint):
    served = service(checkpoint, keys=frozenset("abc"))
    tried, go = slow_trials(served)

    async def check() -> None:
        transport = httpx.ASGITransport(make_app(served))
        async with httpx.AsyncClient(transport=transport, base_url="http://test", timeout=LONG) as client:

            def ask(key: str, pattern: str):
                headers = {"Authorization": f"Bearer {key}"}
                return asyncio.create_task(client.post("/v1/completions", json=with_regex(pattern), headers=headers))

            assert (await ask("b", "[xy]{2}")).status_code == 200
            slow = [ask("a", "slow0")]
            await until(lambda: len(tried) == 2)
            slow += [ask("a", f"slow{i}") for i in range(1, 1 + MOST_GRAMMARS)]
            await until(lambda: [*map(len, served.new_grammars.waiting.values())] == [MOST_GRAMMARS])
            refused = await ask("a", "more")
            assert refused.status_code == 429 and refused.headers["retry-after"]
            assert "new grammars of this client" in refused.json()["error"]["message"]
            for key in "ab":  # nothing has been read meanwhile
                known = await ask(key, "[xy]{2}")
                assert known.status_code == 200 and len(known.json()["choices"][0]["text"]) == 2
            other = ask("c", "[pq]{3}")
            await until(lambda: len(served.new_grammars.waiting) == 2)
            go.set()
            assert len((await other).json()["choices"][0]["text"]) == 3
            texts = [answer.json()["choices"][0]["text"] for answer in await asyncio.gather(*slow)]
            assert texts == [f"slow{i}" for i in range(1 + MOST_GRAMMARS)]

    asyncio.run(check())
    first = next(i for i, source in enumerate(tried) if "slow" in source)
    assert "[pq]{3}" in tried[first + 1] and len(tried) == 3 + MOST_GRAMMARS


@pytest.mark.parametrize("stream", [False, True])
def test_a_trial_whose_client_has_gone_does_not_start(checkpoint, stream):
    served = service(checkpoint)
    tried, go = slow_trials(served)

    def request(pattern: str) -> bytes:
        body = json.dumps(with_regex(pattern) | dict(stream=stream)).encode()
        return HEAD + b"Content-Length: %d\r\n\r\n" % len(body) + body

    with running(served) as server:
        port = port_of(server)
        with connect(port, request("slow one")) as first:
            while not tried:
                time.sleep(0.01)
            with connect(port, request("slow two")):
                while not served.new_grammars.waiting:
                    time.sleep(0.01)
            while not served.metrics.responses[499]:
                time.sleep(0.01)
            go.set()
            assert first.recv(12) == b"HTTP/1.1 200"
        answer = httpx.post(f"http://127.0.0.1:{port}/v1/completions", json=with_regex("three"), timeout=LONG)
        assert answer.json()["choices"][0]["text"] == "three"
    assert len(tried) == 2 and "slow two" not in "".join(tried)


def test_a_body_with_more_grammars_than_are_kept(tmp_path, monkeypatch):
    monkeypatch.setattr(grammar, "GRAMMARS", 2)
    tools = [dict(type="function", function=dict(name=f"f{i}", strict=True, parameters={"const": i})) for i in range(5)]
    served = service(speller(tmp_path / "speller", positions=1500))
    for _ in range(2):
        answer = post(served, CHAT | dict(tools=tools, tool_choice="required", parallel_tool_calls=False))
        assert answer.status_code == 200, answer.text
        (called,) = answer.json()["choices"][0]["message"]["tool_calls"]
        assert called["function"]["name"] == f"f{called['function']['arguments']}"
    assert len(served.grammars().cache) == 2
