"""python -m ling_kernels.generate.server --tp 2."""

# ruff: noqa: F811 (fixtures are imported)
import os
import signal

import pytest

pytest.importorskip("fastapi")
pytest.importorskip("uvicorn")
pytest.importorskip("llguidance")

from tests.test_server import BODY, checkpoint, httpx  # noqa: E402, F401
from tests.test_server_connections import LONG, children, command  # noqa: E402


def test_a_server_of_two_processes(checkpoint):
    """It answers. Its worker is killed within a stream: the stream ends with an error, and the process with code 1."""
    flags = ["--tp", "2", "--device", "cpu", "--name", "speller", "--grace", "60", "--cache-host", "0.01"]
    with command(checkpoint, *flags, "--batch-invariant") as (process, port):
        url = f"http://127.0.0.1:{port}/v1/completions"
        (worker,) = children(process.pid)  # before the process that tries grammars
        assert httpx.post(url, json=BODY, timeout=LONG).json()["choices"][0]["text"] == "bcd"
        form = dict(structured_outputs=dict(choice=["xb", "xc"]))  # masks go to the worker
        assert httpx.post(url, json=BODY | form, timeout=LONG).json()["choices"][0]["text"] in ("xb", "xc")
        body, events = BODY | dict(max_tokens=180, ignore_eos=True, stream=True, stop=None), []
        with httpx.stream("POST", url, json=body, timeout=LONG) as response:
            for line in response.iter_lines():
                if not events:
                    os.kill(worker, signal.SIGKILL)
                events.append(line)
        assert any("cannot go on; please try again" in line for line in events[-3:]), events[-3:]
        assert process.wait(LONG) == 1
        errors = process.stderr.read()
        assert "Traceback" not in errors
        assert "rank 1 of 2 has ended with exit code -9; the engine's 2 processes cannot go on" in errors
        assert errors.splitlines()[-1].startswith("error: the engine cannot go on")
