"""make gpu: all that only a Hopper GPU can tell, with the active python and without a network.

Stage 1, four minutes: is it right? Link or build csrc/, the checks of tests/bring_up.py, the tests of ops and model on
the GPU, compute-sanitizer, Triton's ConSan. Stage 2, five minutes: is it fast? The suites of benchmarks/bench.py into
benchmarks/results/<gpu>.json. A step that fails is reported and the others still run. Each has a time limit, and a step
that needs less leaves the rest to those after it. Logs and stage1.json, stage2.json lie in build/gpu/.

    --stage 1|2     one stage instead of both
    --prebuilt      use the existing ling_kernels/_C
    --out FOLDER    for logs and JSON
    --commit ID     for the results, in a copy of the tree without git history
    --rehearse      the same commands on a CPU, with 20 times the limits, but for those that need a driver
"""

import argparse
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

from ling_kernels.commands import command
from ling_kernels.errors import InputError
from tests import pack

ROOT = Path(__file__).parents[1]
LOGS = ROOT / "build/gpu"
# Messages of a sanitizer on a machine that does not permit it; that is no failure.
REFUSED = r"[Dd]evice not supported|[Nn]ot permitted|[Ii]nsufficient p|Unable to (?:find|attach|initialize)"


@dataclass
class Step:
    name: str
    command: list
    limit: float  # seconds
    missing: str | None = None  # why it cannot run here
    env: dict = field(default_factory=dict)
    sanitizer: bool = False
    driver: bool = False  # it cannot even be rehearsed without CUDA's driver


def steps(stage: int, build: bool, commit: str | None) -> list[Step]:
    make_extension = [build_step()] if build else []
    return [*make_extension, *(stage_one() if stage == 1 else stage_two(commit))]


def build_step() -> Step:
    """Link the objects that `make gpu-pack` compiled, if they are there, or compile them here."""
    nvcc, python = tool("nvcc"), sys.executable
    if (pack.PACK / "pack.json").is_file():
        return Step("link", [python, "-m", "tests.pack", "link"], 40)
    build = [python, "setup.py", "-q", "build_ext", "--inplace"]
    return Step("build", build, 130, None if nvcc else "there is no nvcc, and no build/gpu-pack (make gpu-pack)")


def stage_one() -> list[Step]:
    python, sanitizer = sys.executable, tool("compute-sanitizer")
    parallel = ["-n", str(min(8, os.cpu_count()))] if importlib.util.find_spec("xdist") else []
    pytest = [python, "-m", "pytest", "--disable-warnings", "-rf", "-p", "no:cacheprovider", "-p", "no:benchmark"]
    gpu_tests = sorted((ROOT / "tests").glob("test_*_on_gpu.py"))
    small = [python, "-m", "tests.on_gpu", "--small"]
    load = "import ling_kernels._C as C; print(C.__file__, C.device_count())"
    no_sanitizer = None if sanitizer else "there is no compute-sanitizer"
    alone = dict(PYTORCH_NO_CUDA_MEMORY_CACHING="1")  # each tensor is an allocation
    return [
        Step("load", [python, "-c", load], 10, driver=True),
        Step("bring up", [python, "-m", "tests.bring_up"], 50),
        Step("cuda tests", [*pytest, *parallel, "-k", "cuda", "tests/test_ops.py"], 40),
        Step("gpu tests", [*pytest, *gpu_tests], 35),
        Step("triton tests", [*pytest, *parallel, "-k", "triton", "tests/test_ops.py"], 25),
        *(Step(name, [sanitizer, "--tool", name, "--error-exitcode", "9", *small], 20, no_sanitizer, alone, True)
          for name in ("memcheck", "racecheck")),
        Step("consan", [*small, "triton"], 15, env=dict(TRITON_INSTRUMENTATION_MODE="consan"), driver=True),
    ]  # fmt: skip


def stage_two(commit: str | None) -> list[Step]:
    missing = None if importlib.util.find_spec("pytest_benchmark") else "pytest-benchmark is not installed"
    bench = [sys.executable, "-m", "benchmarks", "--quick", *([f"--commit={commit}"] if commit else [])]
    return [Step("bench", bench, 250, missing)]


def tool(name: str) -> str | None:
    return shutil.which(name) or shutil.which(name, path=Path(os.environ.get("CUDA_HOME") or "/usr/local/cuda", "bin"))


def run(step: Step, until: float) -> tuple[str, str]:
    """(ok, failed, timed out, refused or not run; the last line that it printed, or why)."""
    if step.missing:
        return "not run", step.missing
    seconds = until - time.monotonic()
    if seconds < 1:
        return "timed out", "the steps before it took its time"
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"OMP_NUM_THREADS": "1"} | step.env
    env["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), env.get("PYTHONPATH")]))
    # An interrupted pytest still writes the results that it has; timeout signals all that the command has started.
    command = ["timeout", "--signal=INT", "--kill-after=20", f"{seconds:.0f}", *step.command]
    log = LOGS / f"{step.name}.log"
    with log.open("w") as out:
        status = subprocess.run(command, cwd=ROOT, env=env, stdout=out, stderr=subprocess.STDOUT).returncode
    text = log.read_text(errors="replace").strip()
    result = "ok" if status == 0 else "timed out" if status in (124, 137, -9) else "failed"
    if result == "failed" and step.sanitizer and re.search(REFUSED, text):
        result = "refused"
    return result, (text.splitlines() or [""])[-1]


def run_all(todo: list[Step], record: Path | None = None, about: dict | None = None) -> bool:
    """Run the steps and print each result; True unless one failed or ran out of time.

    `record` is a JSON file of `about` and the steps so far, written after each step.
    """
    LOGS.mkdir(parents=True, exist_ok=True)
    until, found = time.monotonic(), []
    for step in todo:
        until += step.limit
        print(f"[gpu] {step.name} ...", flush=True)
        began = time.monotonic()
        status, detail = run(step, until)
        found.append(dict(step=step.name, status=status, seconds=round(time.monotonic() - began, 1), detail=detail))
        if record:
            record.write_text(json.dumps({**(about or {}), "steps": found}, indent=1))
    for row in found:
        print(f"{row['step']:<13}{row['status']:<11}{row['seconds']:>6.1f} s  {row['detail'][:100]}")
    print(f"logs: {LOGS}")
    return all(row["status"] not in ("failed", "timed out") for row in found)


def why_no_hopper() -> str | None:
    try:
        import torch
    except ImportError as error:
        return f"this python has no torch: {error}"
    if not torch.cuda.is_available():
        return "torch sees no GPU"
    return None if torch.cuda.get_device_capability() == (9, 0) else f"{torch.cuda.get_device_name()} is no sm_90"


def run_small(backend: str = "cuda", seconds: float = 35) -> None:
    """For the sanitizers: each Case of the backend, forward and backward, at one test shape, then at the others."""
    import torch

    from ling_kernels.backend import force
    from tests.cases import CASES, args_of
    from tests.test_ops import outputs_and_grads

    until, cases = time.monotonic() + seconds, [c for c in CASES if backend in c.backends]
    shapes = [[s for s in c.shapes[-2::-1] if 0 not in s.values()] for c in cases]  # the last one is the benchmark's
    for i in range(max(map(len, shapes))):
        for case, found in zip(cases, shapes, strict=True):
            if i < len(found) and (i == 0 or time.monotonic() < until):
                with force(backend):
                    outputs_and_grads(case, case.op, args_of(case, found[i], case.dtypes[0]))
                if torch.cuda.is_available():
                    torch.cuda.synchronize()


def describe(commit: str | None) -> dict:
    """Machine and commit, for the record."""
    import torch

    git = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return dict(
        commit=commit or git.stdout.strip() or None, csrc=pack.sources_hash(), gpu=name, torch=torch.__version__
    )


def main() -> int:
    global LOGS
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--stage", type=int, choices=(1, 2))
    parser.add_argument("--prebuilt", action="store_true")
    parser.add_argument("--rehearse", action="store_true")
    parser.add_argument("--out", type=Path, default=LOGS)
    parser.add_argument("--commit")
    parser.add_argument("--small", nargs="?", const="cuda", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.small:
        run_small(args.small)
        return 0
    reason = None if args.rehearse else why_no_hopper()
    reason = reason and f"make gpu needs a Hopper GPU: {reason}"
    if not args.prebuilt and (pack.PACK / "pack.json").is_file():
        reason = reason or pack.why_not(tool("nvcc"))
    if reason:
        raise InputError(reason)
    LOGS, good = args.out.resolve(), True
    for stage in [args.stage] if args.stage else [1, 2]:
        todo = steps(stage, not args.prebuilt and stage == (args.stage or 1), args.commit)
        for step in todo if args.rehearse else []:
            step.limit *= 20
            step.missing = step.missing or ("there is no CUDA driver" if step.driver else None)
        good = run_all(todo, LOGS / f"stage{stage}.json", describe(args.commit)) and good
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(command(main)())
