"""How many cores this process may use that others leave idle."""

import os
import time
from pathlib import Path

SECONDS = 0.25  # of the measurement: 25 ticks of /proc/stat a core
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
