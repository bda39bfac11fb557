"""`make gpu` without a GPU: one line; its steps' limits, failures and results, with other commands in their place."""

import functools
import importlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from ling_kernels.backend import force
from tests import bring_up, pack
from tests import on_gpu as gpu
from tests.cases import runs

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
    assert result.returncode == 2 and result.stderr.startswith(
        "error: make gpu needs a Hopper GPU: torch sees no GPU\n"
    )
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


def test_the_limits_of_each_stage(monkeypatch, tmp_path):
    """Four and five minutes with what `make gpu-pack` compiled."""
    monkeypatch.setattr(pack, "PACK", tmp_path)
    assert gpu.build_step().name == "build"
    (tmp_path / "pack.json").write_text("{}")
    one, two = gpu.steps(1, True, None), gpu.steps(2, True, "abc")
    assert one[0].name == two[0].name == "link"
    assert sum(step.limit for step in one) <= 260 and sum(step.limit for step in two) <= 300
    assert [s.name for s in gpu.steps(1, False, None)] == [s.name for s in one][1:]
    assert two[-1].name == "bench" and two[-1].command[-1] == "--commit=abc"


def test_the_record_is_written_after_each_step(tmp_path):
    record = tmp_path / "stage1.json"
    see = python(f"print(len(__import__('json').load(open({str(record)!r}))['steps']))")
    gpu.run_all([gpu.Step("first", python("print(1)"), 60), gpu.Step("second", see, 60)], record, dict(gpu="none"))
    found = json.loads(record.read_text())
    assert found["gpu"] == "none" and [row["status"] for row in found["steps"]] == ["ok", "ok"]
    assert found["steps"][1]["detail"] == "1"


def test_a_check_that_hangs_or_crashes_costs_seconds_and_the_others_run():
    commands = {
        "right": python("print('M 1')"), "hangs": python("print('M 2', flush=True); import time; time.sleep(900)"),
        "crashes": python("import os; print('M 3', flush=True); os.abort()"), "wrong": python("assert 1 == 2"),
    }  # fmt: skip
    found = {name: (status, detail) for name, status, detail, _ in bring_up.run_all(commands, seconds=8)}
    assert found == {
        "right": ("ok", "M 1"), "hangs": ("hangs", "M 2"), "crashes": ("failed", "M 3"),
        "wrong": ("failed", "AssertionError"),
    }  # fmt: skip


def wrong_codes(launch, w, scale, w_t, scale_t):
    """transpose_fp8 with the last bit of each code flipped."""
    launch(w, scale, w_t, scale_t)
    w_t.view(torch.uint8).bitwise_xor_(1)


def with_the_weights_of_the_call_before(launch, a, a_scale, b, *args, seen=[]):  # noqa: B006  between calls
    """gemm_fp8 that reads its weights too early."""
    seen.append(b.clone())
    launch(a, a_scale, seen[-2 if len(seen) > 1 else -1], *args)


@pytest.mark.parametrize("name, launcher, wrong", [
    ("quantize", "transpose_fp8_fwd", wrong_codes),
    ("fresh weights", "gemm_fp8_fwd", with_the_weights_of_the_call_before),
])  # fmt: skip
def test_a_check_tells_a_right_kernel_from_a_wrong_one(name, launcher, wrong, monkeypatch):
    if not runs("cuda"):
        pytest.skip("csrc/ does not run here")
    C = importlib.import_module("ling_kernels._C")
    with force("cuda"):
        bring_up.CHECKS[name]()
        monkeypatch.setattr(C, launcher, functools.partial(wrong, getattr(C, launcher)))
        with pytest.raises(AssertionError):
            bring_up.CHECKS[name]()


def test_objects_of_another_csrc_or_nvcc_are_named(tmp_path):
    assert "make gpu-pack" in pack.why_not(None, tmp_path)
    about = dict(sources=pack.sources_hash(), nvcc="13.0")
    (tmp_path / "pack.json").write_text(json.dumps(about | dict(sources="0")))
    assert pack.why_not(None, tmp_path) == "the pack's objects are of another csrc/: make gpu-pack"
    (tmp_path / "pack.json").write_text(json.dumps(about))
    nvcc = tmp_path / "nvcc"
    nvcc.write_text("#!/bin/sh\necho 'Cuda compilation tools, release 12.8, V12.8.93'\n")
    nvcc.chmod(0o755)
    assert pack.why_not(nvcc, tmp_path) == "the pack's objects are of nvcc 13.0, this machine has 12.8"
    assert pack.why_not(None, tmp_path) is None or not shutil.which("g++")


@pytest.mark.skipif(not pack.OBJECTS.is_dir() or not shutil.which("nvcc"), reason="csrc/ is not built in place")
def test_the_pack_links_without_cuda_and_without_other_headers(tmp_path, monkeypatch):
    """What `make gpu-pack` collects is enough: g++ finds no header of CUDA, pybind11 or DLPack elsewhere."""
    pack.pack(tmp_path / "pack")
    monkeypatch.setenv("PATH", os.path.dirname(shutil.which("g++")))
    monkeypatch.delenv("CPATH", raising=False)
    out = pack.link(tmp_path / "pack", tmp_path / "_C.so")
    found = subprocess.run(
        python("import _C; print(*dir(_C))"), cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert "route_fwd" in found.stdout and out.parent == tmp_path


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
