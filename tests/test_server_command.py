"""python -m ling_kernels.generate.server: its flags, its start and its end."""

# ruff: noqa: F811 (fixtures are imported)
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("fastapi")
pytest.importorskip("uvicorn")

from ling_kernels.generate import server  # noqa: E402
from ling_kernels.generate.server import main  # noqa: E402
from tests.test_server import ASK, checkpoint, httpx  # noqa: E402, F401


@pytest.mark.parametrize("args, said", [
    ([], "--model"), (["--model", "tiny"], "checkpoint folder"), (["--model", "/nowhere"], "/nowhere"),
    (["--model", "tiny", "--max-waiting", "0"], "--max-waiting"),
    (["--model", "tiny", "--timeout", "nan"], "--timeout"),
    (["--model", "tiny", "--key", ""], "--key"),
])  # fmt: skip
def test_bad_arguments(capsys, args, said):
    assert main(args) == 2
    assert said in capsys.readouterr().err


def test_a_port_in_use(checkpoint, capsys):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        assert main(["--model", checkpoint, "--port", str(taken.getsockname()[1])]) == 2
    assert "cannot listen on 127.0.0.1" in capsys.readouterr().err


def test_memory_that_is_too_small(checkpoint, capsys, monkeypatch):
    def too_much(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(server, "start", too_much)
    assert main(["--model", checkpoint, "--port", "0"]) == 2
    assert "memory is too small" in capsys.readouterr().err


def test_an_fp8_cache(checkpoint):
    args = server.arguments().parse_args(["--model", checkpoint, "--cache", "fp8", "--cache-tokens", "640"])
    engine = server.start(args, Path(checkpoint))
    assert engine.forward.caches[0].k.dtype == torch.float8_e4m3fn and engine.pages.count == 10
    assert list(engine.stream([ord("a")], max_new_tokens=3)) == [*b"bcd"]


def test_the_command_finishes_what_runs_when_it_is_told_to_end(checkpoint):
    args = ["--model", checkpoint, "--port", "0", "--name", "speller"]
    command = [sys.executable, "-m", "ling_kernels.generate.server", *args]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            where = process.stdout.readline().split()[2].removesuffix("/v1,")
            asked, got = ASK | dict(max_tokens=150, ignore_eos=True, stream=True), []
            with httpx.stream("POST", f"{where}/v1/completions", json=asked, timeout=60) as response:
                for line in response.iter_lines():
                    if not got:
                        process.send_signal(signal.SIGTERM)
                    got.append(line)
            assert "data: [DONE]" in got and process.wait(60) == -signal.SIGTERM and process.stderr.read() == ""
        finally:
            process.kill()
