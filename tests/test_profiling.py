"""--profile: which steps it records, what it writes, that it changes no bits, and the calls for a GPU's memory."""

# ruff: noqa: F811 (fixtures are imported)
import json

import pytest
import torch

from ling_kernels.train import profiling
from ling_kernels.train.__main__ import main
from ling_kernels.train.profiling import WARM_UP, StepProfiler
from tests.test_train import SPEED, metrics_of
from tests.training import flags, small, text, uninterrupted  # noqa: F401


def test_profiles_of_a_run_and_of_the_run_that_resumes_it(tmp_path, flags, uninterrupted, capsys):
    run = tmp_path / "run"
    assert main([*flags, "--out", str(run), "--steps", "6", "--profile", "2"]) == 0
    assert "profile of steps 4 to 5 in" in capsys.readouterr().out
    assert main(["--resume", str(run), "--steps", "9", "--profile", "2"]) == 0  # recorded already
    assert "steps-000004-000005 was recorded before" in capsys.readouterr().out
    assert main(["--resume", str(run), "--steps", "14", "--profile", "1"]) == 0
    names = sorted(path.name for path in (run / "profile").iterdir())
    assert names == ["steps-000004-000005.json", "steps-000004-000005.txt", "steps-000013-000013.json",
                     "steps-000013-000013.txt"]  # fmt: skip
    events = json.loads((run / "profile" / names[0]).read_text())["traceEvents"]
    assert {"aten::mm", "AttentionBackward"} <= {e.get("name") for e in events}
    table = (run / "profile" / names[1]).read_text()
    assert "aten::mm" in table and "Self CPU" in table
    for got, want in zip(metrics_of(run), metrics_of(uninterrupted), strict=True):
        assert all(got[k] == want[k] for k in want.keys() - SPEED)  # got has validations after steps 6 and 9


@pytest.mark.parametrize(
    "since, number, steps, recorded",
    [(0, 2, 100, (4, 5)), (7, 1, 100, (11, 11)), (0, 2, 4, (3, 4)), (0, 9, 4, (1, 4)), (98, 5, 100, (99, 100)),
     (0, 0, 9, None)],
)  # fmt: skip
def test_steps_that_are_recorded(tmp_path, monkeypatch, since, number, steps, recorded):
    """After WARM_UP others; a short run has fewer of these."""
    assert WARM_UP == 3
    profiler = StepProfiler(tmp_path, since, number, steps, torch.device("cpu"))
    on = []
    monkeypatch.setattr(profiling, "profile", lambda **options: type("P", (), dict(start=lambda self: None))())
    monkeypatch.setattr(profiler, "stop", lambda step: on.append(step) or setattr(profiler, "profile", None) or [])
    begun = []
    for step in range(since + 1, steps + 1):
        before = profiler.profile
        profiler.begin(step)
        if before is None and profiler.profile is not None:
            begun.append(step)
        if profiler.end(step) or on:
            break
    assert (begun, on[:1]) == (([recorded[0]], [recorded[1]]) if recorded else ([], [1]))


def test_a_run_that_stops_in_between_has_what_was_recorded(tmp_path):
    profiler = StepProfiler(tmp_path / "profile", 0, 50, 100, torch.device("cpu"))
    profiler.begin(4)
    torch.ones(3) + 1
    assert profiler.end(4) == []
    (line,) = profiler.stop(4)
    assert "steps 4 to 4" in line and (tmp_path / "profile" / "steps-000004-000004.json").is_file()
    assert profiler.stop(5) == []


def test_a_profile_that_cannot_be_written_is_a_line(tmp_path):
    (tmp_path / "profile").write_text("a file")
    profiler = StepProfiler(tmp_path / "profile", 0, 1, 100, torch.device("cpu"))
    profiler.begin(4)
    (line,) = profiler.end(4)
    assert line.startswith("warning: no profile")


def test_memory_snapshot_of_a_gpu(tmp_path, monkeypatch):
    calls = []
    for name in ("_record_memory_history", "_dump_snapshot"):
        monkeypatch.setattr(torch.cuda.memory, name, lambda *a, name=name, **k: calls.append((name, a, k)))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: calls.append(("synchronize", (), {})))
    profiler = StepProfiler(tmp_path / "profile", 0, 1, 100, torch.device("cuda"))
    profiler.begin(4)
    (line,) = profiler.end(4)
    assert [name for name, _, _ in calls] == ["_record_memory_history", "synchronize", "_dump_snapshot",
                                              "_record_memory_history"]  # fmt: skip
    assert calls[0][2]["max_entries"] > 0 and calls[3][2] == dict(enabled=None)
    assert calls[2][1] == (str(tmp_path / "profile" / "steps-000004-000004.pickle"),) and ".pickle" in line
