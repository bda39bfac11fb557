"""The number of CPU threads that a run begins with, and when a resumed run chooses anew."""

# ruff: noqa: F811 (fixtures are imported)
import json
import os

import pytest
import torch

from ling_kernels.train import Settings, Trainer
from ling_kernels.train.prepare import threads
from tests.training import small, text  # noqa: F401

CORES = {0, 1, 2, 3}


@pytest.mark.parametrize(
    "idle, limit, want", [(400, 99, 4), (300, 99, 3), (190, 99, 2), (0, 99, 1), (400, 1.5, 2), (400, 0.2, 1)]
)
def test_free_cores(monkeypatch, idle, limit, want):
    """idle: of 400 ticks of four cores."""
    readings = iter([(1000, 5000), (1000 + idle, 5400)])
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: CORES, raising=False)
    monkeypatch.setattr(threads, "idle_and_total", lambda cores: next(readings))
    monkeypatch.setattr(threads, "quota", lambda: limit)
    monkeypatch.setattr(threads, "SECONDS", 0)
    assert threads.free_cores() == want


def test_free_cores_without_proc(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: CORES, raising=False)
    monkeypatch.setattr(threads, "idle_and_total", lambda cores: ())
    monkeypatch.setattr(threads, "quota", lambda: float("inf"))
    assert threads.free_cores() == 4


@pytest.mark.parametrize(
    "files, want",
    [
        ({"cpu.max": "150000 100000\n"}, 1.5),
        ({"cpu.max": "max 100000\n"}, float("inf")),
        ({"cpu/cpu.cfs_quota_us": "200000\n", "cpu/cpu.cfs_period_us": "100000\n"}, 2),
        ({"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, float("inf")),
        ({}, float("inf")),
    ],
)
def test_quota(tmp_path, files, want):
    (tmp_path / "cpu").mkdir()
    for name, content in files.items():
        (tmp_path / name).write_text(content)
    assert threads.quota(tmp_path) == want


def test_a_resumed_run_keeps_its_threads_unless_the_machine_has_other_cores(tmp_path, small, text, monkeypatch):
    before, run = torch.get_num_threads(), tmp_path / "run"
    try:
        torch.set_num_threads(4)
        monkeypatch.setattr("ling_kernels.train.prepare.run.free_cores", lambda: 3)
        rows = dict(seq_len=32, batch=2, eval_rows=1, sample_tokens=0)
        trainer = Trainer(Settings(model=small, data=text, steps=1, threads=2, **rows), run)
        trainer.step()
        trainer.save()
        del trainer
        seen = []
        for cores, options in ((os.cpu_count(), {}), (4096, {"threads": 2}), (4096, {})):
            (run / threads.STARTS).write_text(json.dumps(dict(step=0, cores=cores)) + "\n")
            torch.set_num_threads(4)
            seen.append(Trainer.resume(run, **options).settings.threads)
        assert seen == [2, 2, 3]
    finally:
        torch.set_num_threads(before)
