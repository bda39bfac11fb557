"""python -m ling_kernels.generate.server: flags, start, shutdown."""

# ruff: noqa: F811 (fixtures are imported)
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

pytest.importorskip("fastapi")
pytest.importorskip("uvicorn")

from ling_kernels.errors import InputError  # noqa: E402
from ling_kernels.generate import Spill  # noqa: E402
from ling_kernels.generate.server import command as server  # noqa: E402
from ling_kernels.generate.server.command import main  # noqa: E402
from ling_kernels.generate.server.traces import make_traces  # noqa: E402
from ling_kernels.nn.batch_invariant import PinnedLinear  # noqa: E402
from tests.test_server import BODY, call, checkpoint, httpx, service  # noqa: E402, F401
from tests.test_server_connections import command  # noqa: E402


@pytest.mark.parametrize("args, message", [
    ([], "--model"), (["--model", "tiny"], "checkpoint folder"), (["--model", "/nowhere"], "/nowhere"),
    (["--model", "tiny", "--max-waiting", "0"], "--max-waiting"),
    (["--model", "tiny", "--timeout", "nan"], "--timeout"),
    (["--model", "tiny", "--key", ""], "--key"), (["--model", "tiny", "--key", "sécret"], "printable ASCII"),
    (["--model", "tiny", "--max-rows", "0"], "--max-rows"),
    (["--model", "tiny", "--cache-host", "0"], "--cache-host is 0.0; it must be above 0"),
    (["--model", "tiny", "--cache-disk", "/tmp"], "--cache-disk needs --cache-host"),
    (["--model", "tiny", "--cache-host", "1", "--cache-disk", "/dev/null"], "the cache cannot be kept in /dev/null"),
])  # fmt: skip
def test_invalid_arguments(capsys, args, message):
    assert main(args) == 2
    assert message in capsys.readouterr().err


def test_a_missing_package_is_named_as_pip_installs_it():
    code = f"import sys; sys.modules['fastapi'] = None; import runpy; runpy.run_module({server.__name__!r})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode and "pip install '.[server]'" in done.stderr.splitlines()[-1]


def test_keys_of_flags_a_file_and_the_environment(tmp_path, monkeypatch):
    (tmp_path / "keys").write_text("one\n\n two \n")
    monkeypatch.setenv("LING_API_KEY", "three")
    flags = ["--key", "four", "--key", "five", "--key-file", str(tmp_path / "keys")]
    args = server.arguments().parse_args(["--model", "tiny", *flags])
    assert server.read_keys(args) == {"one", "two", "three", "four", "five"}
    (tmp_path / "keys").write_text("\n")
    with pytest.raises(InputError, match="has no key"):
        server.read_keys(args)


def test_unreadable_tls_files(checkpoint, capsys, tmp_path):
    (tmp_path / "pem").write_text("x")
    for file, message in ((tmp_path / "pem", "--tls-cert, --tls-key: "), (tmp_path / "none", "there is no file")):
        flags = ["--tls-cert", str(file), "--tls-key", str(file)]
        assert main(["--model", checkpoint, "--port", "0", *flags]) == 2
        assert message in capsys.readouterr().err


def test_batch_invariant_pins_the_model(checkpoint):
    flags = ["--model", checkpoint, "--cache-tokens", "64", "--max-running", "2", "--batch-invariant"]
    with server.start(server.arguments().parse_args(flags), Path(checkpoint)) as engine:
        assert isinstance(engine.model.lm_head, PinnedLinear)


def test_a_port_in_use(checkpoint, capsys):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        assert main(["--model", checkpoint, "--port", str(taken.getsockname()[1])]) == 2
    assert "cannot listen on 127.0.0.1" in capsys.readouterr().err


def test_traces_without_a_package_or_a_url(checkpoint, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "opentelemetry", None)
    for url, message in [("http://localhost:4318", "pip install '.[telemetry]'"), ("localhost:4317", "is no URL")]:
        assert main(["--model", checkpoint, "--port", "0", "--otlp", url]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert message in line
    assert make_traces(None) is None and not capsys.readouterr().err
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://localhost:4318")
    assert make_traces(None) is None, "where all programs have the variable, it is no reason to fail"
    assert "is set, but opentelemetry is not installed" in capsys.readouterr().err


def test_out_of_memory(checkpoint, capsys, monkeypatch):
    def too_much(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(server, "start", too_much)
    assert main(["--model", checkpoint, "--port", "0"]) == 2
    assert "out of GPU memory" in capsys.readouterr().err


def test_fp8_cache(checkpoint):
    args = server.arguments().parse_args(["--model", checkpoint, "--cache", "fp8", "--cache-tokens", "640"])
    engine = server.start(args, Path(checkpoint))
    assert engine.forward.caches[0].k.dtype == torch.float8_e4m3fn and engine.pages.count == 10
    assert list(engine.stream([ord("a")], max_new_tokens=3)) == [*b"bcd"]


def test_sigterm_finishes_running_requests(checkpoint):
    args = ["--model", checkpoint, "--port", "0", "--name", "speller"]
    command = [sys.executable, "-m", "ling_kernels.generate.server", *args]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            url = process.stdout.readline().split()[2].removesuffix("/v1,")
            body, got = BODY | dict(max_tokens=150, ignore_eos=True, stream=True), []
            with httpx.stream("POST", f"{url}/v1/completions", json=body, timeout=600) as response:
                for line in response.iter_lines():
                    if not got:
                        process.send_signal(signal.SIGTERM)
                    got.append(line)
            assert "data: [DONE]" in got and process.wait(600) == -signal.SIGTERM
            (line,) = process.stderr.read().splitlines()
            assert line.startswith("loading ")
        finally:
            process.kill()


def test_a_server_answers_from_its_folder(checkpoint, tmp_path):
    """With what an engine before it has left there; after SIGTERM its own pages are there, too."""
    body, more = (BODY | dict(prompt=text * 17, max_tokens=4) for text in ("abcdefgh", "hgfedcba"))
    before = service(checkpoint, dict(spill=Spill(1 << 20, tmp_path, 1 << 20)))
    want = call(before, "/v1/completions", body).json()
    before.finish()
    assert len([*tmp_path.glob("*/*.page")]) == 2 and want["usage"]["prompt_tokens_details"]["cached_tokens"] == 0
    flags = ["--cache-host", "0.05", "--cache-disk", str(tmp_path), "--cache-disk-gb", "0.05", "--cache-tokens", "256"]
    with command(checkpoint, *flags) as (process, port):
        url = f"http://127.0.0.1:{port}"
        while httpx.get(f"{url}/health").status_code != 200:
            time.sleep(0.1)
        found, _ = (httpx.post(f"{url}/v1/completions", json=b, timeout=600).json() for b in (body, more))
        metrics = httpx.get(f"{url}/metrics").text
        process.send_signal(signal.SIGTERM)
        assert process.wait(600) == -signal.SIGTERM
    assert found["choices"] == want["choices"] and found["usage"]["prompt_tokens_details"]["cached_tokens"] == 128
    for line in ('cache_hit_tokens_total{level="disk"} 128', 'cache_hit_tokens_total{level="host"} 0',
                 'cache_level_bytes_limit{level="disk"} 50000000', "cache_damaged_files_total 0"):  # fmt: skip
        assert f"ling_{line}\n" in metrics
    assert len([*tmp_path.glob("*/*.page")]) == 4
