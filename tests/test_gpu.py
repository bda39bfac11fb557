"""`make gpu` without a GPU: one line; its steps' limits, failures and results, with other commands in their place."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from benchmarks import gpu

ROOT = Path(__file__).parents[1]


@pytest.fixture(autouse=True)
def logs(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu, "LOGS", tmp_path / "logs")


def python(code):
    return [sys.executable, "-c", code]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so():
    env = {k: v for k, v in os.environ.items() if k not in ("ARGS", "MAKEFLAGS", "MAKEOVERRIDES", "MFLAGS")}
    command = ["make", "-s", "gpu", f"PYTHON={sys.executable}"]
    result = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert result.returncode and result.stderr.startswith("error: make gpu needs a Hopper GPU: torch sees no GPU\n")
    assert not result.stdout


def test_a_step_that_fails_is_reported_and_the_others_still_run(capsys):
    slow = "import subprocess, sys; subprocess.run([sys.executable, '-c', 'import time; time.sleep(900)'])"
    began = time.monotonic()
    good = gpu.run_all([
        gpu.Step("fails", python("print('why'); raise SystemExit(3)"), 10),
        gpu.Step("is slow", python(slow), -5),
        gpu.Step("is not there", ["/no/such/program"], 60),
        gpu.Step("cannot", python(""), 60, "there is no nvcc"),
        gpu.Step("is refused", python("raise SystemExit('Device not supported')"), 60, sanitizer=True),
        gpu.Step("is ok", python("import os; print(os.environ['PYTHONPATH'])"), 60),
    ])  # fmt: skip
    assert not good and time.monotonic() - began < 600  # the child of the slow step was killed too
    lines = capsys.readouterr().out.splitlines()[6:]
    found = {line[:12].strip(): line[12:].split(" s  ") for line in lines if " s  " in line}
    assert {name: status.split("  ")[0].strip() for name, (status, _) in found.items()} == {
        "fails": "failed", "is slow": "timed out", "is not there": "failed", "cannot": "not run",
        "is refused": "refused", "is ok": "ok",
    }  # fmt: skip
    assert found["fails"][1] == "why" and "no nvcc" in found["cannot"][1] and found["is ok"][1].startswith(str(ROOT))


def test_a_step_that_cannot_run_here_does_not_fail():
    refused = gpu.Step("is refused", python("raise SystemExit('Device not supported')"), 60, sanitizer=True)
    assert gpu.run_all([gpu.Step("cannot", python(""), 1, "no tool"), refused])
    assert not gpu.run_all([gpu.Step("no sanitizer", refused.command, 10)])


def test_a_step_leaves_its_time_to_those_after_it():
    quick, slow = python(""), python("import time; time.sleep(2)")
    assert gpu.run_all([gpu.Step("quick", quick, 30), gpu.Step("slow", slow, 1)])
    assert not gpu.run_all([gpu.Step("slow", slow, 1.5), gpu.Step("quick", quick, 20)])


def test_all_limits_together_are_ten_minutes():
    assert sum(step.limit for step in gpu.steps(True, None)) <= 600
    assert [s.name for s in gpu.steps(False, None)] == [s.name for s in gpu.steps(True, None)][1:]
    (bench,) = (s for s in gpu.steps(False, "abc") if s.name == "bench")
    assert bench.command[-1] == "--commit=abc"


def test_an_interrupted_pytest_still_writes_its_results(tmp_path):
    """pytest-benchmark writes at the end; a step that is out of time must not lose what it has."""
    pytest.importorskip("pytest_benchmark")
    (tmp_path / "bench_it.py").write_text(
        "def bench_quick(benchmark):\n    benchmark.pedantic(abs, (1,))\n"
        f"def bench_slow():\n    import time\n    open({str(tmp_path / 'slow')!r}, 'w')\n    time.sleep(900)\n"
    )
    out = tmp_path / "out.json"
    command = [sys.executable, "-m", "pytest", "-q", "-c", ROOT / "pyproject.toml", f"--rootdir={tmp_path}",
               "-p", "no:cacheprovider", "-p", "no:xdist", f"--benchmark-json={out}", tmp_path]  # fmt: skip
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, start_new_session=True) as process:
        while not (tmp_path / "slow").exists():
            assert process.poll() is None
            time.sleep(0.1)
        process.send_signal(signal.SIGINT)  # as `timeout --signal=INT` does, which `make gpu` uses
    assert '"name": "bench_quick"' in out.read_text()
