"""make bench: times all that this machine can, and writes benchmarks/results/bench-<machine>.json and the report.

    python -m benchmarks.run --quick           each op at its own shape: at most 8 minutes on a GPU
    python -m benchmarks.run                   Ling's grid; where a run was stopped, the next one of that commit goes on

Where there is no GPU: the MoE layer and the host's part on the CPU, and what every op must take at least on Hopper.
"""

import argparse
import contextlib
import importlib.util
import json
import os
import platform
import re
import signal
import subprocess
import sys
from pathlib import Path

import torch

from benchmarks import peers, predict, report
from benchmarks.gpu import clocks, origin
from ling_kernels.errors import InputError, command
from ling_kernels.files import whole

ROOT = Path(__file__).parents[1]
TIMES = ROOT / "build/bench/times.json"


def machine() -> dict:
    """What a result must say of where it comes from."""
    about = origin() | dict(
        torch=torch.__version__, triton=peers.version("triton"),
        threads=int(os.environ.get("OMP_NUM_THREADS", torch.get_num_threads())), cores=os.cpu_count(),
        load=round(os.getloadavg()[0], 2),
    )  # fmt: skip
    if torch.cuda.is_available():
        gpu = torch.cuda.get_device_properties(0)
        return about | dict(machine=gpu.name, gpu=gpu.name, sms=gpu.multi_processor_count, cuda=torch.version.cuda)
    return about | dict(machine=f"CPU, {platform.machine()}", gpu=None)


def begin(out: Path, quick: bool, again: bool) -> dict:
    """A new report, or the one that is there where it goes on: the same clean commit on the same machine."""
    new = machine() | dict(quick=quick, benchmarks=[], left_out={}, clocks=[], complete=False)
    if again or not out.exists():
        return new
    old = json.loads(out.read_text())
    same = all(old.get(k) == new[k] for k in ("commit", "machine", "torch", "triton", "quick"))
    return old if same and not old["complete"] and not report.is_dirty(new["commit"]) else new


def run_pytest(done: Path, quick: bool, seconds: float | None) -> int:
    """Benchmarks that `done` has not; what they tell is in TIMES."""
    TIMES.parent.mkdir(parents=True, exist_ok=True)
    for file in (TIMES, TIMES.with_suffix(".left.json")):
        file.unlink(missing_ok=True)
    folder = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--benchmark-columns=median,iqr,rounds",
              f"--benchmark-json={TIMES}", f"--done={done}", f"--grid={'quick' if quick else 'full'}"]  # fmt: skip
    process = subprocess.Popen([*folder, *([f"--seconds={seconds}"] if seconds else []), "benchmarks"], cwd=ROOT)
    while True:
        try:
            return process.wait()
        except KeyboardInterrupt:  # pytest has it too, and still writes what it has
            with contextlib.suppress(ProcessLookupError):
                process.send_signal(signal.SIGINT)


def row(b: dict) -> dict:
    return dict(name=b["name"], median_us=b["stats"]["median"] * 1e6, iqr_us=b["stats"]["iqr"] * 1e6,
                rounds=b["stats"]["rounds"]) | b["extra_info"]  # fmt: skip


def take(into: dict) -> None:
    """Add what pytest has written; a row that was there is replaced."""
    if TIMES.exists() and TIMES.stat().st_size:
        rows = {r["name"]: r for r in into["benchmarks"]}
        rows |= {b["name"]: row(b) for b in json.loads(TIMES.read_text())["benchmarks"] if b["stats"]["rounds"]}
        into["benchmarks"] = [*rows.values()]
    left = TIMES.with_suffix(".left.json")
    if left.exists():
        told = json.loads(left.read_text())
        into["left_out"] |= told["left_out"]
        into["complete"] = told["complete"]


def slim(left_out: dict[str, str]) -> dict[str, str]:
    """Without those that only say that there is no GPU, which the report does."""
    return {name: why for name, why in left_out.items() if why not in ("times a GPU", "there is no GPU")}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="each op at its own shape only")
    parser.add_argument("--seconds", type=float, help="stop after so long; the next run goes on (quick: 420)")
    parser.add_argument("--again", action="store_true", help="begin anew where a run could go on")
    parser.add_argument(
        "--force", action="store_true", help="report also results of a changed tree or throttled clocks"
    )
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks/results")
    args = parser.parse_args()
    if importlib.util.find_spec("pytest_benchmark") is None:
        raise InputError("pytest-benchmark is not installed: pip install ling_kernels[dev]")
    name = re.sub(r"\W+", "-", machine()["machine"].lower()).strip("-")
    out = args.results / f"bench-{name}.json"
    result = begin(out, args.quick, args.again)
    result["peers"] = peers.inventory()
    result["clocks"].append(clocks())
    args.results.mkdir(parents=True, exist_ok=True)
    with whole(out) as partial:
        partial.write_text(json.dumps(result, indent=1) + "\n")
    status = run_pytest(out, args.quick, args.seconds or (420 if args.quick else None))
    result["clocks"].append(clocks())
    take(result)
    result["left_out"] = slim(result["left_out"])
    result["forced"] = args.force
    with whole(out) as partial:
        partial.write_text(json.dumps(result, indent=1) + "\n")
    print(f"{len(result['benchmarks'])} rows in {out}{'' if result['complete'] else ', more to do: run it again'}")
    predict.main()
    report.write(args.results, args.force)
    if status not in (0, 2, 5):  # 2: stopped, by --seconds or by Ctrl-C; 5: there was nothing left to time
        raise SystemExit(status)


if __name__ == "__main__":
    sys.exit(command(main)())
