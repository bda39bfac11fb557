"""Options of the benchmarks: how much of the grid, what a run before has done, when to stop; what was left out."""

import json
import time
from pathlib import Path

import pytest

ORDER = ("bench_ops", "bench_cutlass", "bench_model", "bench_decode", "bench_host", "peers", "torch.compile")
LEFT_OUT: dict[str, str] = {}


def pytest_addoption(parser):
    group = parser.getgroup("ling_kernels")
    group.addoption(
        "--grid", choices=("quick", "full"), default="quick", help="each op's own shape, or Ling's grid too"
    )
    group.addoption("--done", type=Path, help="results whose rows are not timed again")
    group.addoption("--seconds", type=float, help="stop, in order, after so long")


def pytest_configure(config):
    config.ling_began = time.monotonic()


def pytest_collection_modifyitems(config, items):
    items.sort(key=place)
    done = config.getoption("--done")
    if done and done.exists():
        report = json.loads(done.read_text())
        names = {row["name"] for row in report.get("benchmarks", [])} | {*report.get("left_out", {})}
        config.hook.pytest_deselected(
            items=[i for i in items if i.name in names and not i.name.startswith("bench_rate")]
        )
        items[:] = [i for i in items if i.name not in names or i.name.startswith("bench_rate")]


def place(item) -> int:
    """A run may be stopped: first our kernels, whole models and the host, then what to compare with."""
    by = item.callspec.params.get("by") if hasattr(item, "callspec") else None
    if by == "peer:torch.compile":  # each compiles for seconds
        return ORDER.index("torch.compile")
    if isinstance(by, str) and (by == "torch" or by.startswith("peer:")):
        return ORDER.index("peers")
    return ORDER.index(item.path.stem) if item.path.stem in ORDER else len(ORDER)


def pytest_runtest_logreport(report):
    if report.skipped and isinstance(report.longrepr, tuple):
        LEFT_OUT[report.nodeid.split("::")[-1]] = report.longrepr[2].removeprefix("Skipped: ")
    elif report.failed:
        LEFT_OUT[report.nodeid.split("::")[-1]] = "failed: " + str(report.longrepr).strip().splitlines()[-1][:200]


@pytest.hookimpl(trylast=True)
def pytest_runtest_teardown(item, nextitem):
    seconds = item.config.getoption("--seconds")
    if seconds and nextitem is not None and time.monotonic() - item.config.ling_began > seconds:
        item.session.shouldstop = f"{seconds:.0f} s are over; the rest is for another run"


def pytest_sessionfinish(session):
    """Also where no benchmark ran, in which case pytest-benchmark writes nothing."""
    path = session.config.getoption("--benchmark-json", None)
    if path:
        out = Path(path.name).with_suffix(".left.json")
        out.write_text(json.dumps(dict(left_out=LEFT_OUT, complete=not session.shouldstop)))
