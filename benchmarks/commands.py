"""make times: what a stranger waits for, each command in a fresh clone of the last commit, into
benchmarks/results/commands-<machine>.json. For README.md and docs/performance.md.

    make times               train, then ci
    make times ARGS=train    make train: set-up and training; its loss and what it prints
    make times ARGS=ci       .ci/run and its steps: set-up with the build, where nvcc is; lint; tests
    make times ARGS=build    csrc/ alone, from nothing, where nvcc is; after `make install` here

The packages of PYTHON are used as `make` uses them, so that what pip must still fetch is in the time. Nothing of this
working tree counts but its last commit. Needs no torch itself.
"""

import argparse
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.gpu import origin

ROOT = Path(__file__).parents[1]
PYTHON = next(p for p in (ROOT / ".venv/bin/python", Path(sys.executable)) if p.exists())
COMMANDS = dict(
    train=["make", "train"], ci=[".ci/run"],
    build=[PYTHON, "setup.py", "-q", "build_ext", "--build-temp", "build/temp", "--build-lib", "build/lib"],
)  # fmt: skip


def printed(text: str) -> dict:
    """What a command says of itself: the steps of .ci/run; of a training run its loss and the lines README shows."""
    found = {}
    steps = re.findall(r"^\[ci\] (.+): (\d+) s$", text, re.M)
    if steps:
        found["steps"] = {name: int(seconds) for name, seconds in steps}
    losses = re.findall(r"^(step \d+: validation loss ([\d.]+) nats per token)", text, re.M)
    if losses:
        last, loss = losses[-1]
        first = re.split(r"^(step +\d+/.*)$", text, maxsplit=1, flags=re.M)
        about = re.findall(r"^(?:model|data|device|run) .*", first[0], re.M)
        found |= dict(validation_loss=float(loss), shown=[*about, *first[1:2], "...", last])
    return found


def run(command: list, folder: Path) -> tuple[float, str]:
    """Seconds, and what it printed, which is passed on. Raises SystemExit where it fails."""
    ours = ("MAKEFLAGS", "MAKEOVERRIDES", "MAKELEVEL", "MFLAGS", "ARGS")  # of the make that called this
    env = {k: v for k, v in os.environ.items() if k not in ours}
    began, said = time.monotonic(), []
    process = subprocess.Popen(
        command, cwd=folder, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    for line in process.stdout:
        print(line, end="", flush=True)
        said.append(line)
    if process.wait():
        raise SystemExit(f"error: {' '.join(map(str, command))} failed: nothing is written")
    return time.monotonic() - began, "".join(said)


def in_clone(name: str) -> dict:
    """One command in a clone of its own, which has none of this tree's files but the commit's."""
    if name == "build" and not shutil.which("nvcc"):
        raise SystemExit("error: there is no nvcc on PATH to build csrc/ with")
    with tempfile.TemporaryDirectory(prefix="ling-") as folder:
        clone = Path(folder) / "ling_kernels"
        subprocess.run(["git", "clone", "-q", "--no-hardlinks", ROOT, clone], check=True)
        seconds, said = run(COMMANDS[name], clone)
    told = "csrc/ from nothing" if name == "build" else " ".join(COMMANDS[name])
    return dict(command=told, seconds=round(seconds, 1)) | printed(said)


def begin(path: Path, about: dict) -> dict:
    """The file that is there, where it is of this commit and machine, or a new one."""
    if path.exists():
        old = json.loads(path.read_text())
        if all(old.get(k) == about[k] for k in ("commit", "machine", "cores", "python")):
            return old
    return about | dict(commands={})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", default=["train", "ci"], metavar="train | ci | build")
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks/results")
    args = parser.parse_args()
    if unknown := {*args.names} - {*COMMANDS}:
        parser.error(f"{', '.join(sorted(unknown))}: not among train, ci and build")
    path = args.results / f"commands-{platform.system().lower()}-{platform.machine()}.json"
    about = origin() | dict(
        machine=f"{platform.system()}, {platform.machine()}", cores=os.cpu_count(), load=round(os.getloadavg()[0], 2)
    )
    about["commit"] = about["commit"].removesuffix("-dirty")  # the clone is clean
    args.results.mkdir(parents=True, exist_ok=True)
    result = begin(path, about)
    for name in args.names:
        result["commands"][name] = in_clone(name)
        path.write_text(json.dumps(result, indent=1) + "\n")
        print(f"{name}: {result['commands'][name]['seconds']} s, in {path}")


if __name__ == "__main__":
    main()
