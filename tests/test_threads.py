"""The number of CPU threads that a run begins with, and when a resumed run chooses anew."""

# ruff: noqa: F811 (fixtures are imported)
import json
import os
import platform
import subprocess
import sys
from dataclasses import replace

import pytest
import torch

from ling_kernels.train import Settings, Trainer
from ling_kernels.train.data import cores
from ling_kernels.train.prepare import run as run_module
from ling_kernels.train.prepare import threads
from tests.test_train import SPEED
from tests.training import small, text  # noqa: F401

CORES = {0, 1, 2, 3}


@pytest.mark.parametrize(
    "idle, limit, want", [(400, 99, 4), (300, 99, 3), (190, 99, 2), (0, 99, 1), (400, 1.5, 2), (400, 0.2, 1)]
)
def test_free_cores(monkeypatch, idle, limit, want):
    """idle: of 400 ticks of four cores."""
    readings = iter([(1000, 5000), (1000 + idle, 5400)])
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: CORES, raising=False)
    monkeypatch.setattr(cores, "idle_and_total", lambda allowed: next(readings))
    monkeypatch.setattr(cores, "quota", lambda: limit)
    monkeypatch.setattr(cores, "SECONDS", 0)
    assert cores.free_cores() == want


def test_free_cores_without_proc(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: CORES, raising=False)
    monkeypatch.setattr(cores, "idle_and_total", lambda allowed: ())
    monkeypatch.setattr(cores, "quota", lambda: float("inf"))
    assert cores.free_cores() == 4


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
    assert cores.quota(tmp_path) == want


@pytest.mark.parametrize(
    "seconds, number, passes, chosen, tried",
    [
        ({1: 0.025, 2: 0.02}, 2, 600, 2, [2, 2, 1, 2, 1]),
        ({1: 0.02, 2: 0.03}, 2, 600, 1, [2, 2, 1, 2, 1]),
        ({1: 0.08, 2: 0.04}, 2, 600, 2, [2, 2, 1]),  # hopeless
        ({1: 0.02, 2: 0.03}, 2, 69, 2, []),  # a short run
        ({1: 0.2, 2: 0.3}, 2, 600, 2, [2]),  # 7 passes of 0.3 s are more than 2 s and than 1 % of the run
        ({1: 0.2, 2: 0.3}, 2, 800, 1, [2, 2, 1, 2, 1]),  # 7 of 800 passes are less
        ({1: 0.2, 64: 0.02}, 64, 6000, 64, [64]),  # one thread may take 64 times as long
        ({1: 0.02}, 1, 600, 1, []),
    ],
)
def test_the_trial_of_one_thread(monkeypatch, seconds, number, passes, chosen, tried):
    clock, seen, now = [0.0], [], []
    monkeypatch.setattr(torch, "set_num_threads", now.append)
    monkeypatch.setattr(threads.time, "perf_counter", lambda: clock[0])

    def one_pass():
        seen.append(now[-1])
        clock[0] += seconds[now[-1]] * (1 + (len(seen) == 1))  # the first is slower

    found, line = threads.faster_threads(one_pass, number, passes)
    assert (found, seen) == (chosen, tried) and (not now or now[-1] == chosen)
    assert (line is not None) == (len(tried) > 1)
    if seconds == {1: 0.02, 2: 0.03} and tried:
        assert line == "threads    1, faster than 2 in a trial: 20 ms a forward and backward against 30"


@pytest.mark.parametrize("precision", ["fp32", "fp8"])
def test_a_trial_changes_nothing(tmp_path, small, text, monkeypatch, precision):
    """The run has the bits of one with that number given; a resumed run keeps it, without a trial."""
    monkeypatch.setattr("ling_kernels.train.prepare.run.free_cores", lambda: 2)
    monkeypatch.setattr(threads, "SHORT", 0)
    before, trials, genuine = torch.get_num_threads(), [], threads.faster_threads

    def one_is_faster(one_pass, number, passes):
        trials.append(genuine(one_pass, number, passes))
        torch.set_num_threads(1)
        return 1, "threads    1"

    monkeypatch.setattr(run_module, "faster_threads", one_is_faster)
    settings = Settings(
        model=small, data=text, steps=4, seq_len=32, batch=4, micro_batch=2, eval_rows=1, precision=precision
    )
    try:
        torch.set_num_threads(2)
        tried = Trainer(settings, tmp_path / "tried")
        assert tried.settings.threads == 1 and "threads    1" in tried.notes and len(trials) == 1
        assert json.loads((tmp_path / "tried" / "settings.json").read_text())["threads"] == 1
        given = Trainer(replace(settings, threads=1), tmp_path / "given")
        for _ in range(2):
            one, two = tried.step(), given.step()
            assert {k: one[k] for k in one.keys() - SPEED} == {k: two[k] for k in two.keys() - SPEED}
        assert all(map(torch.equal, tried.model.state_dict().values(), given.model.state_dict().values()))
        tried.save()
        torch.set_num_threads(2)
        assert Trainer.resume(tmp_path / "tried").settings.threads == 1 and len(trials) == 1
    finally:
        torch.set_num_threads(before)


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


NEW_PAGES = """
import resource, torch
from ling_kernels.host_memory import keep_freed_memory
if {keep}:
    keep_freed_memory()
for tensor in range(40):
    if tensor == 30:  # before, the heap grows: a free piece does not hold the next tensor, which is aligned
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.empty(1 << 25, dtype=torch.uint8).fill_(1)
new = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
print(new * resource.getpagesize() / (10 << 25))
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc's setting")
@pytest.mark.parametrize("keep", (False, True))
def test_freed_memory_is_kept(keep):
    """Tensors of 32 MiB get pages of those before them: none is new to the process."""
    command = [sys.executable, "-c", NEW_PAGES.format(keep=keep)]
    share = float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    assert share < 0.01 if keep else share > 0
