"""/health follows the engine, and the process ends with an engine that cannot go on."""

# ruff: noqa: F811 (fixtures are imported)
import asyncio
import time

import pytest
import torch

pytest.importorskip("fastapi")
pytest.importorskip("uvicorn")

from ling_kernels.errors import InputError  # noqa: E402
from ling_kernels.generate import health as records  # noqa: E402
from ling_kernels.generate.forward import PendingTokens  # noqa: E402
from ling_kernels.generate.health import FAILURES, PROBES  # noqa: E402
from ling_kernels.generate.server import command  # noqa: E402
from ling_kernels.generate.server import service as services  # noqa: E402
from tests.test_server import BODY, call, checkpoint, httpx, service  # noqa: E402, F401
from tests.test_server_connections import LONG, port_of, running  # noqa: E402


def health(service) -> tuple[int, str]:
    response = call(service, "/health")
    assert call(service, "/live").status_code == 200
    return response.status_code, response.json()["status"]


def fail(error):
    def backbone(*_, **__):
        raise error

    return backbone


def test_passes_that_fail_in_a_row(checkpoint, monkeypatch):
    fresh = service(checkpoint)
    assert health(fresh) == (200, "ok")
    with monkeypatch.context() as patch:
        patch.setattr(fresh.engine.model, "backbone", fail(RuntimeError("no kernel")))
        for n in range(FAILURES):
            assert health(fresh) == (200, "ok"), f"{n} failures may be of the requests"
            assert call(fresh, "/v1/completions", BODY).status_code == 500
        assert health(fresh) == (503, f"the last {FAILURES} passes failed: no kernel") and fresh.dead is None
    assert call(fresh, "/v1/completions", BODY).status_code == 200
    assert health(fresh) == (200, "ok"), "a good pass heals"


def test_a_model_of_nan(checkpoint):
    fresh = service(checkpoint)
    with torch.no_grad():
        fresh.engine.model.lm_head.weight.fill_(float("nan"))
    for _ in range(FAILURES):
        assert call(fresh, "/v1/completions", BODY).status_code == 500
    status, text = health(fresh)
    assert status == 503 and "NaN" in text


def test_a_pass_counts_once(checkpoint, monkeypatch):
    """However many requests it has; it is good where one of them got a token."""
    fresh = service(checkpoint)
    engine, record, tokens = fresh.engine, fresh.engine.record, PendingTokens.tokens

    def run_one(bad: set[int]) -> None:
        requests = [engine.submit([97], max_new_tokens=1, stop_token_ids=()) for _ in range(FAILURES)]
        with monkeypatch.context() as patch:
            patch.setattr(PendingTokens, "tokens", lambda pending: [
                [-1] if i in bad else row for i, row in enumerate(tokens(pending))
            ])  # fmt: skip
            assert engine.step() and all(request.finished for request in requests)
        assert [request.finished == "error" for request in requests] == [i in bad for i in range(FAILURES)]

    run_one({*range(FAILURES)})
    assert record.failures == 1 and record.fault is None
    run_one({*range(FAILURES)})
    assert record.failures == 2
    run_one({FAILURES - 1})
    assert record.failures == 0


def test_an_error_outside_the_model_counts(checkpoint, monkeypatch):
    fresh = service(checkpoint)
    monkeypatch.setattr(fresh.engine.scheduler, "schedule", fail(RuntimeError("no pages")))
    for _ in range(FAILURES):
        assert call(fresh, "/v1/completions", BODY).status_code == 500
    assert health(fresh) == (503, f"the last {FAILURES} passes failed: no pages")


def test_it_heals_without_requests(checkpoint, monkeypatch):
    monkeypatch.setattr(services, "PROBE_SECONDS", 0.01)
    monkeypatch.setattr(records, "PROBES", 1 << 30)
    fresh = service(checkpoint)
    with running(fresh) as server, httpx.Client(base_url=f"http://127.0.0.1:{port_of(server)}", timeout=LONG) as http:
        with monkeypatch.context() as patch:
            patch.setattr(fresh.engine.model, "backbone", fail(RuntimeError("no kernel")))
            for _ in range(FAILURES):
                answer = http.post("/v1/completions", json=BODY)
                assert answer.status_code == 500 and answer.headers["connection"] == "close", "uvicorn closes it"
            while fresh.engine.record.failed_probes < 3:
                assert http.get("/health").status_code == 503
        end = time.monotonic() + LONG
        while http.get("/health").status_code != 200:
            assert time.monotonic() < end
        assert fresh.engine.record.failed_probes == 0
        assert http.post("/v1/completions", json=BODY).json()["choices"][0]["text"] == "bcd"


def test_probes_that_fail_are_the_end(checkpoint, monkeypatch):
    """Those in a row: a good pass between starts the count again."""
    fresh = service(checkpoint)
    record = fresh.engine.record
    for good_ones in (1, 0):
        with monkeypatch.context() as patch:
            patch.setattr(fresh.engine.model, "backbone", fail(torch.OutOfMemoryError("CUDA out of memory")))
            for _ in range(FAILURES):
                call(fresh, "/v1/completions", BODY)
            for _ in range(PROBES - good_ones):
                assert fresh.dead is None
                asyncio.run(fresh.probe())
        if good_ones:
            assert fresh.dead is None
            asyncio.run(fresh.probe())
            assert record.fault is None and record.failed_probes == 0
    assert "the engine cannot go on" in fresh.dead and "out of memory" in fresh.dead


def test_a_cuda_error_is_the_end(checkpoint, monkeypatch):
    fresh = service(checkpoint)
    monkeypatch.setattr(
        fresh.engine.model, "backbone", fail(torch.AcceleratorError("CUDA error: an illegal memory access", 700))
    )
    call(fresh, "/v1/completions", BODY)
    assert health(fresh)[0] == 503 and "illegal memory access" in fresh.dead


def test_a_pass_that_does_not_return(checkpoint):
    fresh = service(checkpoint, stuck_after=100.0)
    record = fresh.engine.record
    record.started = time.monotonic() - 50
    assert health(fresh) == (200, "ok")
    record.started -= 100
    assert health(fresh)[0] == 503 and "has been running" in health(fresh)[1] and fresh.dead is None
    record.started -= 100
    assert "has been running" in fresh.dead


def test_progress_of_loading(checkpoint, monkeypatch, capsys):
    """In /health after each weight, and in the log at most every PROGRESS_SECONDS."""
    fresh, seen = service(checkpoint), []
    engine, fresh.engine = fresh.engine, None

    def load(progress):
        for seconds, loaded in ((1.0, 10**9), (11.0, 2 * 10**9), (12.0, 3 * 10**9)):
            monkeypatch.setattr(command.time, "perf_counter", lambda seconds=seconds: seconds)
            progress(loaded, 4 * 10**9)
            seen.append(health(fresh))
        return engine

    monkeypatch.setattr(command.time, "perf_counter", lambda: 0.0)
    command.Loading(load, fresh, "http://x").run()
    assert seen == [(503, f"loading: {n}.00 of 4.00 GB of weights") for n in (1, 2, 3)]
    assert capsys.readouterr().err.splitlines() == ["speller: loading: 2.00 of 4.00 GB of weights"]
    assert health(fresh) == (200, "ok")


def test_a_model_that_loads(checkpoint):
    fresh = service(checkpoint)
    engine, fresh.engine = fresh.engine, None
    assert health(fresh) == (503, "loading") and "queue" in call(fresh, "/metrics").text
    assert call(fresh, "/v1/completions", BODY).status_code == 503
    fresh.start(engine)
    assert health(fresh) == (200, "ok") and call(fresh, "/v1/completions", BODY).status_code == 200
    assert "ling_pass_seconds_count 0" not in call(fresh, "/metrics").text


CUDA_ERROR = torch.AcceleratorError("CUDA error: an illegal memory access", 700)
NO_END = f"error: the engine cannot go on: the last {FAILURES + PROBES} passes failed: the model's logits are NaN"


@pytest.mark.parametrize("error, code, message", [
    (InputError("no such shard"), 2, "error: no such shard"), (CUDA_ERROR, 1, "error: the engine cannot go on"),
    (None, 1, NO_END),
])  # fmt: skip
def test_the_process_ends(checkpoint, monkeypatch, capsys, error, code, message):
    """With a model that cannot be loaded, with an engine that cannot go on, and with one that only gives NaN."""
    monkeypatch.setattr(services, "PROBE_SECONDS", 0.01)
    start = command.start

    def broken(*args):
        if isinstance(error, InputError):
            raise error
        engine = start(*args)
        if error is not None:
            engine.record.fail(error)
            return engine
        with torch.no_grad():
            engine.model.lm_head.weight.fill_(float("nan"))
        for _ in range(FAILURES):
            with pytest.raises(InputError, match="NaN"):
                engine.generate([[97]])
        return engine

    monkeypatch.setattr(command, "start", broken)
    assert command.main(["--model", checkpoint, "--port", "0"]) == code
    assert message in capsys.readouterr().err
