"""make gpu: all that only a Hopper GPU can tell, in about ten minutes, with the active python and without a network.

Build csrc/ where there is an nvcc, run the tests on the GPU, benchmark into benchmarks/results/<gpu>.json, and look for
bad memory accesses and races with compute-sanitizer. A step that fails is reported and the others still run. Each step
has a time limit, and a step that needs less leaves the rest to those after it. Logs: build/gpu/.

    --prebuilt      use the existing ling_kernels/_C
    --commit ID     for the results, in a copy of the tree without git history
"""

import argparse
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

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


def steps(build: bool, commit: str | None) -> list[Step]:
    python, nvcc, sanitizer = sys.executable, tool("nvcc"), tool("compute-sanitizer")
    pytest = [python, "-m", "pytest", "-q", "-rf", "-p", "no:cacheprovider", "-p", "no:benchmark"]
    parallel = ["-n", str(min(8, os.cpu_count()))] if importlib.util.find_spec("xdist") else []
    no_nvcc = None if nvcc else "there is no nvcc"
    gpu_tests = sorted((ROOT / "tests").glob("test_*_on_gpu.py"))
    no_benchmark = None if importlib.util.find_spec("pytest_benchmark") else "pytest-benchmark is not installed"
    bench = [python, "-m", "benchmarks", "--quick", *([f"--commit={commit}"] if commit else [])]
    check = ["--error-exitcode", "9", python, __file__, "--small"]
    alone = dict(PYTORCH_NO_CUDA_MEMORY_CACHING="1")  # each tensor is an allocation
    no_sanitizer = None if sanitizer else "there is no compute-sanitizer"
    found = [
        Step("build", [python, "setup.py", "-q", "build_ext", "--inplace"], 130, no_nvcc),
        Step("load", [python, "-c", "import ling_kernels._C as C; print(C.__file__, C.device_count())"], 10),
        Step("tests", [*pytest, *parallel, "tests/test_ops.py", "tests/test_generate.py"], 115),
        Step("gpu tests", [*pytest, *gpu_tests], 75),
        Step("bench", bench, 140, no_benchmark),
        Step("memcheck", [sanitizer, "--tool", "memcheck", *check], 50, no_sanitizer, alone, True),
        Step("racecheck", [sanitizer, "--tool", "racecheck", *check], 50, no_sanitizer, alone, True),
    ]
    return found if build else found[1:]


def tool(name: str) -> str | None:
    return shutil.which(name) or shutil.which(name, path=Path(os.environ.get("CUDA_HOME") or "/usr/local/cuda", "bin"))


def run(step: Step, until: float) -> tuple[str, str]:
    """(ok, failed, timed out, refused or not run; the last line that it printed, or why)."""
    if step.missing:
        return "not run", step.missing
    seconds = until - time.monotonic()
    if seconds < 1:
        return "timed out", "the steps before it took its time"
    LOGS.mkdir(parents=True, exist_ok=True)
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


def run_all(todo: list[Step]) -> bool:
    """Run the steps and print each result; True unless one failed or ran out of time."""
    until, lines, good = time.monotonic(), [], True
    for step in todo:
        until += step.limit
        print(f"[gpu] {step.name} ...", flush=True)
        began = time.monotonic()
        status, detail = run(step, until)
        lines.append(f"{step.name:<12}{status:<11}{time.monotonic() - began:>6.1f} s  {detail[:100]}")
        good = good and status not in ("failed", "timed out")
    print(*lines, f"logs: {LOGS}", sep="\n")
    return good


def why_no_hopper() -> str | None:
    try:
        import torch
    except ImportError as error:
        return f"this python has no torch: {error}"
    if not torch.cuda.is_available():
        return "torch sees no GPU"
    return None if torch.cuda.get_device_capability() == (9, 0) else f"{torch.cuda.get_device_name()} is no sm_90"


def run_small(seconds: float = 35) -> None:
    """For the sanitizer: each Case with a CUDA kernel, forward and backward, at one test shape, then at the others."""
    import torch

    from ling_kernels.backend import force
    from tests.cases import CASES, args_of
    from tests.test_ops import outputs_and_grads

    until, cases = time.monotonic() + seconds, [c for c in CASES if "cuda" in c.backends]
    shapes = [[s for s in c.shapes[-2::-1] if 0 not in s.values()] for c in cases]  # the last one is the benchmark's
    for i in range(max(map(len, shapes))):
        for case, found in zip(cases, shapes, strict=True):
            if i < len(found) and (i == 0 or time.monotonic() < until):
                with force("cuda"):
                    outputs_and_grads(case, case.op, args_of(case, found[i], case.dtypes[0]))
                torch.cuda.synchronize()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prebuilt", action="store_true")
    parser.add_argument("--commit")
    parser.add_argument("--small", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.small:
        run_small()
        return 0
    if reason := why_no_hopper():
        print(f"error: make gpu needs a Hopper GPU: {reason}", file=sys.stderr)
        return 1
    return 0 if run_all(steps(not args.prebuilt, args.commit)) else 1


if __name__ == "__main__":
    sys.exit(main())
