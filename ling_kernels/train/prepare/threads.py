"""How many CPU threads a run begins with: as many as there are cores that it may use and that others leave idle, or one
where a trial before the first step shows that it is faster, as with a small model or a core that is not really idle.

Sums of torch's products may depend on the number of threads. So a run keeps the number it began with, also when it is
resumed, and equals an uninterrupted one to the byte; on a machine with another number of cores it chooses anew, without
a trial.
"""

import json
import os
import time
from collections.abc import Callable
from pathlib import Path

import torch

TRIAL_SECONDS, TRIAL_SHARE = 2.0, 0.01  # that a trial may take at most: seconds, or a share of the run
SHORT = 10  # a run of fewer trials is too short for one
HOPELESS = 1.5  # one thread that takes so many times as long is not timed again
SECONDS = 0.25  # of the measurement: 25 ticks of /proc/stat a core
STARTS = "starts.jsonl"  # in a run's folder, see starts.py
CGROUP = Path("/sys/fs/cgroup")


def free_cores() -> int:
    """At least 1. By the process's affinity, the quota of its cgroup, and what is idle now, where Linux tells them."""
    allowed = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set(range(os.cpu_count() or 1))
    before = idle_and_total(allowed)
    if before and len(allowed) > 1:
        time.sleep(SECONDS)
    idle, total = (now - then for now, then in zip(idle_and_total(allowed), before, strict=True)) if before else (1, 1)
    free = len(allowed) * (idle / total if total > 0 else 1)
    return max(1, round(min(free, quota())))


def idle_and_total(cores: set[int]) -> tuple[int, ...]:
    """Clock ticks since boot in which these cores were idle, and all their ticks; () where there is no /proc/stat."""
    try:
        lines = Path("/proc/stat").read_text().splitlines()
        ticks = [[*map(int, line.split()[1:9])] for line in lines if line.split()[0] in {f"cpu{c}" for c in cores}]
        return sum(t[3] + t[4] for t in ticks), sum(map(sum, ticks))  # idle and iowait; without guests, counted in user
    except (OSError, ValueError, IndexError):
        return ()


def quota(cgroup: Path = CGROUP) -> float:
    """Cores that the cgroup's quota allows (version 2, then 1); infinite without one."""
    for files in (("cpu.max",), ("cpu/cpu.cfs_quota_us", "cpu/cpu.cfs_period_us")):
        try:
            limit, period = " ".join((cgroup / file).read_text() for file in files).split()
            return int(limit) / int(period) if limit != "max" and int(limit) > 0 else float("inf")
        except (OSError, ValueError, ZeroDivisionError):
            continue
    return float("inf")


def began_elsewhere(starts: Path) -> bool:
    """Whether the last line of a run's starts.jsonl is of a machine with another number of cores."""
    try:
        return json.loads(starts.read_text().splitlines()[-1])["cores"] != os.cpu_count()
    except (OSError, ValueError, LookupError, TypeError):
        return False


def faster_threads(one_pass: Callable[[], object], threads: int, passes: int) -> tuple[int, str | None]:
    """1 or `threads`, whichever takes less time for `one_pass`, and a line that says so; without a trial `threads` and
    None. It is set for torch. passes: of the run.

    A trial is at most three passes with `threads` and two with one, each of which takes at most `threads` times as
    long. That many seconds must be below TRIAL_SECONDS, or below TRIAL_SHARE of the run.
    """
    trial = 3 + 2 * threads  # passes with `threads` that take as long
    if threads < 2 or passes < SHORT * trial:
        return threads, None

    def timed(number: int) -> float:
        torch.set_num_threads(number)
        start = time.perf_counter()
        one_pass()
        return time.perf_counter() - start

    try:
        first = timed(threads)  # fills caches, and is not counted
        if trial * first > max(TRIAL_SECONDS, TRIAL_SHARE * passes * first):
            return threads, None
        many, one = timed(threads), timed(1)
        if one < HOPELESS * many:  # interleaved, as other programs come and go
            many, one = min(many, timed(threads)), min(one, timed(1))
    finally:
        torch.set_num_threads(threads)
    chosen, other = (1, threads) if one < many else (threads, 1)
    torch.set_num_threads(chosen)
    return chosen, (
        f"threads    {chosen}, faster than {other} in a trial: {1000 * min(one, many):.3g} ms a forward and backward"
        f" against {1000 * max(one, many):.3g}"
    )
