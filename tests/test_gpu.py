"""`make gpu` where there is no GPU: one line; and what its steps promise, with other commands in their place."""

import importlib.util
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]


@pytest.fixture
def gpu(tmp_path, monkeypatch):
    spec = importlib.util.spec_from_file_location("benchmarks_gpu", ROOT / "benchmarks/gpu.py")
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)  # dataclasses look it up
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "LOGS", tmp_path / "logs")
    monkeypatch.setattr(module, "TIMES", tmp_path / "times.json")
    return module


def python(code):
    return [sys.executable, "-c", code]


def run(gpu, tmp_path, *steps):
    out = tmp_path / "results/gpu.json"
    well = gpu.run_all([*steps], dict(steps={}), out)
    return well, json.loads(out.read_text())


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so():
    env = {k: v for k, v in os.environ.items() if k not in ("ARGS", "MAKEFLAGS", "MAKEOVERRIDES", "MFLAGS")}
    command = ["make", "-s", "gpu", f"PYTHON={sys.executable}"]
    result = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert result.returncode and result.stderr.startswith("error: make gpu needs a Hopper GPU: torch sees no GPU\n")
    assert not result.stdout


def test_a_step_that_fails_is_reported_and_the_others_still_run(gpu, tmp_path, capsys):
    slow = "import subprocess, sys; subprocess.run([sys.executable, '-c', 'import time; time.sleep(60)'])"
    began = time.monotonic()
    well, report = run(
        gpu, tmp_path,
        gpu.Step("fails", python("print('why'); raise SystemExit(3)"), 10),
        gpu.Step("is slow", python(slow), -5),
        gpu.Step("is not there", ["/no/such/program"], 10),
        gpu.Step("cannot", python(""), 10, without="there is no nvcc"),
        gpu.Step("is refused", python("raise SystemExit('Device not supported')"), 10, refused=gpu.REFUSED),
        gpu.Step("goes well", python("import os; print(os.environ['PYTHONPATH'])"), 10),
    )  # fmt: skip
    assert not well and time.monotonic() - began < 40
    assert {name: r["status"] for name, r in report["steps"].items()} == {
        "fails": "failed", "is slow": "timed out", "is not there": "failed", "cannot": "not run",
        "is refused": "refused", "goes well": "ok",
    }  # fmt: skip
    assert report["steps"]["fails"]["detail"] == "why" and "no nvcc" in report["steps"]["cannot"]["detail"]
    assert report["steps"]["goes well"]["detail"].startswith(str(ROOT))
    printed = capsys.readouterr().out
    assert "fails       failed" in printed and "goes well   ok" in printed and "gpu.json" in printed


def test_what_is_passed_over_is_no_failure(gpu, tmp_path):
    well, _ = run(
        gpu, tmp_path, gpu.Step("cannot", python(""), 1, without="no tool"),
        gpu.Step("is refused", python("raise SystemExit('Device not supported')"), 10, refused=gpu.REFUSED),
    )  # fmt: skip
    assert well


def test_time_left_over_is_the_successors(gpu, tmp_path):
    quick, slow = python(""), python("import time; time.sleep(2)")
    assert run(gpu, tmp_path, gpu.Step("quick", quick, 20), gpu.Step("slow", slow, 1))[0]
    assert not run(gpu, tmp_path, gpu.Step("slow", slow, 1.5), gpu.Step("quick", quick, 20))[0]


def test_all_limits_together_are_ten_minutes(gpu):
    assert sum(step.limit for step in gpu.steps(build=True)) <= 600
    assert [s.name for s in gpu.steps(build=False)] == [s.name for s in gpu.steps(build=True)][1:]


def test_an_interrupted_pytest_still_tells_its_times(gpu, tmp_path):
    """pytest-benchmark writes at the end; the last bench of a step that is out of time must not cost the others."""
    pytest.importorskip("pytest_benchmark")
    (tmp_path / "bench_it.py").write_text(
        "def bench_quick(benchmark):\n    benchmark.extra_info['GB/s'] = 7\n    benchmark.pedantic(abs, (1,))\n"
        "def bench_slow():\n    import time\n    time.sleep(600)\n"
    )
    command = [sys.executable, "-m", "pytest", "-q", "-c", ROOT / "pyproject.toml", f"--rootdir={tmp_path}",
               "-p", "no:cacheprovider", "-p", "no:xdist", f"--benchmark-json={gpu.TIMES}", tmp_path]  # fmt: skip
    well, report = run(gpu, tmp_path, gpu.Step("benchmarks", command, 60))
    assert not well and report["steps"]["benchmarks"]["status"] == "timed out"
    (row,) = report["benchmarks"]
    assert row["name"] == "bench_quick" and row["median_us"] > 0 and row["GB/s"] == 7


def test_the_commit_comes_from_the_stamp_where_there_is_no_history(gpu, tmp_path, monkeypatch):
    (tmp_path / "stamp").write_text("0123abc-dirty\n")
    monkeypatch.setattr(gpu, "ROOT", tmp_path)
    monkeypatch.setattr(gpu, "STAMP", tmp_path / "stamp")
    assert gpu.commit() == "0123abc-dirty"
    monkeypatch.setattr(gpu, "STAMP", tmp_path / "none")
    assert gpu.commit().startswith("unknown")


def test_what_a_run_writes_makes_no_tree_dirty(gpu, tmp_path, monkeypatch):
    git = ["git", "-c", "user.name=a", "-c", "user.email=b", "-C", tmp_path]
    for path in ("benchmarks/results/a.json", "docs/performance.md", "README.md", "code.py"):
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text("")
    for words in (["init", "-q"], ["add", "."], ["commit", "-qm", "one"]):
        subprocess.run([*git, *words], check=True)
    monkeypatch.setattr(gpu, "ROOT", tmp_path)
    clean = gpu.commit()
    assert len(clean) == 40
    for path, dirty in (("benchmarks/results/a.json", ""), ("docs/performance.md", ""), ("README.md", ""),
                        ("code.py", "-dirty")):  # fmt: skip
        (tmp_path / path).write_text("changed")
        assert gpu.commit() == clean + dirty
