"""Several servers behind one port: where requests go, replicas that end, metrics; and the command with processes."""

# ruff: noqa: F811 (fixtures are imported)
import asyncio
import json
import os
import signal
import sys
import time

import pytest

pytest.importorskip("fastapi")
pytest.importorskip("uvicorn")

from ling_kernels.generate import health as records  # noqa: E402
from ling_kernels.generate.server import replicas as module  # noqa: E402
from ling_kernels.generate.server import service as services  # noqa: E402
from ling_kernels.generate.server.app import make_app  # noqa: E402
from ling_kernels.generate.server.replicas import Router, prefixes_of, visible_gpus, with_label  # noqa: E402
from tests.test_server import BODY, checkpoint, httpx, service  # noqa: E402, F401
from tests.test_server_command import main  # noqa: E402
from tests.test_server_connections import LONG, children, command  # noqa: E402
from tests.test_server_health import fail  # noqa: E402

LONG_PROMPT = "abcdefgh" * 130  # two beginnings of 512 characters


@pytest.fixture
def router(checkpoint):
    """Two replicas in this process."""
    router = Router(2, [], None, keys=frozenset({"k"}))
    for replica in router.replicas:
        replica.service = service(checkpoint)
        replica.fault = None
        transport = httpx.ASGITransport(make_app(replica.service), raise_app_exceptions=False)
        replica.client = httpx.AsyncClient(transport=transport, base_url="http://replica")
    return router


def ask(router, *bodies, path="/v1/completions", key="k", headers=()):
    """The answers to requests one after another."""

    async def all_of_them():
        transport = httpx.ASGITransport(router.app())
        async with httpx.AsyncClient(transport=transport, base_url="http://router") as client:
            sent = {"Authorization": f"Bearer {key}", "X-Request-Id": "mine", **dict(headers)}
            return [await client.post(path, json=body, headers=sent) for body in bodies]

    return asyncio.run(all_of_them())


class Failing(httpx.AsyncBaseTransport):
    """A replica that cannot be reached, or whose process ends after the first event of a stream."""

    def __init__(self, events=(), error=None):
        self.events, self.calls, self.error = events, 0, error or httpx.ConnectError("refused")

    async def handle_async_request(self, request):
        self.calls += 1
        if not self.events:
            raise self.error

        class Stream(httpx.AsyncByteStream):
            async def __aiter__(stream):
                for event in self.events:
                    yield event
                raise httpx.ReadError("gone")

        return httpx.Response(200, headers={"content-type": self.kind}, stream=Stream())

    kind = "text/event-stream"


def failing(router, number, *events, kind="text/event-stream", error=None):
    transport = Failing(events, error)
    transport.kind = kind
    router.replicas[number].client = httpx.AsyncClient(transport=transport, base_url="http://replica")
    return transport


def test_a_clients_trace_goes_on_in_its_replica(router):
    got = []
    for replica in router.replicas:
        transport = httpx.MockTransport(lambda request: got.append(request.headers) or httpx.Response(200, json={}))
        replica.client = httpx.AsyncClient(transport=transport, base_url="http://replica")
    trace = {"traceparent": "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01", "tracestate": "a=b"}
    assert ask(router, BODY, headers=trace)[0].status_code == 200
    assert [{name: headers[name] for name in trace} for headers in got] == [trace]


def test_answers_are_a_replicas(router):
    stream, whole, wrong = ask(router, BODY | dict(stream=True), BODY, BODY | dict(max_tokens=-1))
    events = [json.loads(line[6:]) for line in stream.text.split("\n\n")[:-2]]
    assert "".join(e["choices"][0]["text"] for e in events) == whole.json()["choices"][0]["text"] == "bcd"
    assert stream.headers["x-request-id"] == whole.headers["x-request-id"] == "mine"
    assert whole.headers["content-length"] == str(len(whole.content)) and stream.text.endswith("data: [DONE]\n\n")
    assert wrong.status_code == 400 and wrong.json()["error"]["param"] == "max_tokens"
    assert ask(router, BODY, key="wrong")[0].status_code == 401
    assert all(replica.running == 0 for replica in router.replicas)


def test_a_prompt_goes_where_its_beginning_is(router):
    router.replicas[0].running = 1
    long = BODY | dict(prompt=LONG_PROMPT, max_tokens=1)
    prefixes = [*prefixes_of(json.dumps(long).encode())]
    assert len(prefixes) == 2
    first = router.choose(prefixes, set())
    assert first.number == 1
    router.replicas[1].running = 1 + module.AHEAD - 1
    assert router.choose([*prefixes_of(json.dumps(long | dict(prompt=LONG_PROMPT[:600])).encode())], set()) is first
    router.replicas[1].running += 1
    assert router.choose(prefixes, set()).number == 0 and router.choose(prefixes, {0}).number == 1
    assert router.choose(prefixes, {0, 1}) is None
    messages = dict(messages=[dict(role="user", content="x" * 600)])
    assert len([*prefixes_of(json.dumps(messages).encode())]) == 1
    for body in (b"", b"[", b"[]", b"3", b"{}", b'{"prompt": 3}', b'{"prompt": null}'):
        assert [*prefixes_of(body)] == []


def test_what_is_remembered_is_bounded(router, monkeypatch):
    monkeypatch.setattr(module, "REMEMBERED", 3)
    for n in range(9):
        router.choose([n], set())
    assert [*router.seen] == [6, 7, 8]


@pytest.mark.parametrize("kind", ["application/json", None])
def test_a_request_goes_to_another_replica(router, kind):
    """Where the first cannot be reached, or ends within an answer of which nothing was sent."""
    broken = failing(router, 0, *([b'{"id"'] if kind else []), kind=kind)
    (answer,) = ask(router, BODY)
    assert answer.status_code == 200 and broken.calls == 1
    assert router.replicas[1].service.metrics.generated_tokens > 0
    failing(router, 1)
    (answer,) = ask(router, BODY)
    message = answer.json()["error"]["message"]
    assert answer.status_code == 503 and message.startswith(module.RUNS_AGAIN if kind else module.UNABLE)
    assert answer.headers["retry-after"]


@pytest.mark.parametrize("error", [httpx.ReadError("gone"), httpx.RemoteProtocolError("no answer")])
def test_a_request_that_ends_its_replicas_ends_two(checkpoint, error):
    """Of four, of which one cannot be reached and so has not had it."""
    router = Router(4, [], None)
    for replica in router.replicas:
        replica.fault = None
    transports = [failing(router, i, error=error if i else None) for i in range(4)]
    (answer,) = ask(router, BODY)
    assert [transport.calls for transport in transports] == [1, 1, 1, 0]
    assert answer.status_code == 503 and answer.json()["error"]["message"] == module.ENDED_TWICE
    assert answer.headers["x-should-retry"] == "false" and "retry-after" not in answer.headers


def test_replicas_heal(router, monkeypatch):
    """All passes fail until no replica is asked any more; then they succeed again."""
    monkeypatch.setattr(module, "POLL", 0.01)
    monkeypatch.setattr(services, "PROBE_SECONDS", 0.01)
    monkeypatch.setattr(records, "PROBES", 1 << 30)

    async def follow():
        tasks = [asyncio.create_task(t) for r in router.replicas for t in (r.look(), r.service.keep_probing())]
        transport = httpx.ASGITransport(router.app())
        async with httpx.AsyncClient(transport=transport, base_url="http://router") as client:
            client.headers["Authorization"] = "Bearer k"
            with monkeypatch.context() as patch:
                for replica in router.replicas:
                    patch.setattr(replica.service.engine.model, "backbone", fail(RuntimeError("no kernel")))
                while (answer := await client.post("/v1/completions", json=BODY)).status_code == 500:
                    pass
                health = await client.get("/health")
            while (await client.get("/health")).json()["replicas"] != {"0": "ok", "1": "ok"}:
                await asyncio.sleep(0.01)
            healed = await client.post("/v1/completions", json=BODY)
        for task in tasks:
            task.cancel()
        return answer, health, healed

    answer, health, healed = asyncio.run(asyncio.wait_for(follow(), LONG))
    message = answer.json()["error"]["message"]
    assert answer.status_code == 503 and message.startswith(f"{module.UNABLE}: replica 0: the last ")
    assert message.count("passes failed: no kernel") == 2
    assert health.status_code == 503 and health.json()["status"] == module.UNABLE
    assert healed.json()["choices"][0]["text"] == "bcd" and router.unable is None


@pytest.mark.parametrize("served, failure", [(False, 3), (True, None)])
def test_only_a_process_that_could_not_serve_is_a_failure(tmp_path, monkeypatch, served, failure):
    """Else the router would end with its replicas, instead of starting them again."""
    replica = module.Replica(0, [sys.executable, "-c", "raise SystemExit(3)"], tmp_path / "0.sock", None)
    replica.failure = None if failure else 7  # of a process before

    async def look():
        replica.served = served

    async def follow():
        running = asyncio.create_task(replica.keep_running())
        while "exit code 3" not in replica.fault:
            await asyncio.sleep(0.01)
        running.cancel()

    monkeypatch.setattr(replica, "look", look)
    asyncio.run(asyncio.wait_for(follow(), LONG))
    assert replica.failure == failure


def test_a_loading_replica_is_passed_over(router):
    router.replicas[0].service.engine = None
    assert [answer.status_code for answer in ask(router, BODY, BODY)] == [200, 200]
    router.replicas[0].fault = router.replicas[1].fault = "loading"
    (answer,) = ask(router, BODY)
    assert answer.status_code == 503 and answer.json()["error"]["message"] == services.LOADING
    router.replicas[1].fault = "it does not answer"
    (answer,) = ask(router, BODY)
    assert answer.json()["error"]["message"] == (f"{module.UNABLE}: replica 0: loading; replica 1: it does not answer")


def test_a_stream_of_a_replica_that_ends_has_an_error_event(router):
    failing(router, 0, b"data: {}\n\n")
    (answer,) = ask(router, BODY | dict(stream=True))
    first, last, rest = answer.text.split("\n\n")
    assert (answer.status_code, first, rest) == (200, "data: {}", "")
    assert json.loads(last[6:])["error"]["message"] == module.RUNS_AGAIN


def test_health_and_metrics(router):
    async def get(path):
        transport = httpx.ASGITransport(router.app())
        async with httpx.AsyncClient(transport=transport, base_url="http://router") as client:
            return await client.get(path)

    ask(router, BODY)
    assert asyncio.run(get("/health")).json() == dict(status="ok", replicas={"0": "ok", "1": "ok"})
    text = asyncio.run(get("/metrics")).text
    samples = [line for line in text.splitlines() if not line.startswith("#")]
    assert 'ling_ready{replica="1"} 1.0' in samples and any(
        s.startswith('ling_cache_pages{replica="1"}') for s in samples
    )
    assert 'ling_http_responses_total{status="200",replica="router"} 2.0' in samples
    assert len(samples) == len({line.rpartition(" ")[0] for line in samples})
    kinds = [line for line in text.splitlines() if line.startswith("# TYPE")]
    assert len(kinds) == len({*kinds})
    router.replicas[0].fault, router.replicas[1].fault = "loading", "loading: 0.5 of 4.0 GB of weights"
    answer = asyncio.run(get("/health"))
    assert answer.status_code == 503 and answer.json()["status"] == "loading"
    assert router.dead is None
    router.replicas[0].failure = router.replicas[1].failure = 2
    assert router.dead == "no replica could be loaded: exit codes 2, 2"


def test_labels():
    assert with_label("a 1", 0) == 'a{replica="0"} 1' and with_label('a{b="c d"} 1', 1) == 'a{b="c d",replica="1"} 1'


def test_gpus(monkeypatch, checkpoint, capsys):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert visible_gpus(2, 8) == ["0", "1"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5,7")
    assert visible_gpus(2, 3) == ["4", "5"]
    with pytest.raises(module.InputError, match="--replicas 4: torch sees 3 GPUs"):
        visible_gpus(4, 3)
    assert main(["--model", checkpoint, "--replicas", "0"]) == 2
    assert "--replicas is 0" in capsys.readouterr().err


def test_processes(checkpoint):
    """One of two is killed within a stream: the stream says so, later requests are answered, and it comes back."""
    with command(checkpoint, "--replicas", "2", "--device", "cpu", "--name", "speller") as (process, port):
        url = f"http://127.0.0.1:{port}"

        def health():
            return httpx.get(f"{url}/health", timeout=LONG).json()["replicas"]

        def until(condition):
            end = time.monotonic() + LONG
            while not condition():
                assert time.monotonic() < end and process.poll() is None
                time.sleep(0.1)

        until(lambda: {*health().values()} == {"ok"})
        replicas = children(process.pid)
        assert len(replicas) == 2
        answers = {
            httpx.post(f"{url}/v1/completions", json=BODY, timeout=LONG).text.split('"choices"')[1] for _ in "12"
        }
        assert len(answers) == 1
        body = BODY | dict(max_tokens=150, ignore_eos=True, stream=True)
        with httpx.stream("POST", f"{url}/v1/completions", json=body, timeout=LONG) as response:
            lines = response.iter_lines()
            next(lines)
            text = httpx.get(f"{url}/metrics", timeout=LONG).text
            busy = next(i for i in (0, 1) if f'ling_running_requests{{replica="{i}"}} 1' in text)
            os.kill(replicas[busy], signal.SIGKILL)
            assert module.RUNS_AGAIN in [*lines][-2]
        assert httpx.post(f"{url}/v1/completions", json=BODY, timeout=LONG).status_code == 200
        until(lambda: health()[str(busy)] != "ok")
        until(lambda: {*health().values()} == {"ok"})
        process.send_signal(signal.SIGTERM)
        assert process.wait(LONG) == -signal.SIGTERM
        assert not os.path.exists(f"/proc/{replicas[1 - busy]}")
