"""make gpu: everything that only a Hopper GPU can tell, in ten minutes, with the active python and without a network.

Builds csrc/ where there is an nvcc, runs the tests on the GPU, times the ops, looks for faulty memory accesses and
races with compute-sanitizer, and writes benchmarks/results/<gpu>-<date>.json. A step that fails is reported and the
others still run. Each has a limit, and the time that one leaves over is its successors'. Logs: build/gpu/.
"""

import argparse
import datetime
import importlib.util
import json
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).parents[1]
STAMP = ROOT / "build/commit"  # `make stamp` writes it, for a machine without the repository's history
LOGS = ROOT / "build/gpu"
TIMES = LOGS / "benchmarks.json"
REFUSED = r"[Dd]evice not supported|[Nn]ot permitted|[Ii]nsufficient p|Unable to (?:find|attach|initialize)"


@dataclass
class Step:
    name: str
    command: list
    limit: float  # seconds
    env: dict = field(default_factory=dict)
    without: str | None = None  # why it cannot run here, if so
    refused: str | None = None  # words of a tool that this machine does not let work, which is no failure


def steps(build: bool) -> list[Step]:
    python = [sys.executable]
    pytest = [*python, "-m", "pytest", "-q", "-rf", "-p", "no:cacheprovider", "--durations=5"]
    parallel = ["-n", str(min(8, os.cpu_count()))] if importlib.util.find_spec("xdist") else []
    timed = [f"--benchmark-json={TIMES}"] if importlib.util.find_spec("pytest_benchmark") else []
    nvcc, sanitizer = tool("nvcc"), tool("compute-sanitizer")
    no_nvcc = None if nvcc else "there is no nvcc"
    selftest = LOGS / "selftest"
    compile_it = (
        f"'{nvcc}' -std=c++20 -gencode arch=compute_90a,code=sm_90a -Icsrc tests/host/selftest.cu -o {selftest}"
    )
    found = [
        Step("build", [*python, "setup.py", "-q", "build_ext", "--inplace"], 150, without=no_nvcc),
        Step("load", [*python, "-c", "import ling_kernels._C as C; print(C.__file__, C.device_count())"], 10),
        Step("tests", [*pytest, *parallel, "-p", "no:benchmark", "tests/test_ops.py",
              "tests/test_cutlass_on_gpu.py", "tests/test_generate.py"], 115),
        Step("model", [*pytest, "-p", "no:benchmark", "tests/test_model_on_gpu.py"], 45),
        Step("moe_decode", [*pytest, "-p", "no:benchmark", "tests/test_moe_decode_on_gpu.py"], 30),
        Step("benchmarks", [*pytest, *timed, "benchmarks"], 100,
             without=None if timed else "pytest-benchmark is not installed"),
        Step("selftest", ["sh", "-c", f"{compile_it} && '{selftest}'"], 30, without=no_nvcc),
    ]  # fmt: skip
    for kind in ("memcheck", "racecheck"):
        command = [sanitizer, "--tool", kind, "--error-exitcode", "9", *python, __file__, "--small"]
        alone = dict(PYTORCH_NO_CUDA_MEMORY_CACHING="1")  # every tensor in an allocation of its own
        without = None if sanitizer else "there is no compute-sanitizer"
        found.append(Step(kind, command, 50, alone, without, REFUSED))
    return found if build else found[1:]


def tool(name: str) -> str | None:
    return shutil.which(name) or shutil.which(name, path=Path(os.environ.get("CUDA_HOME") or "/usr/local/cuda", "bin"))


def run(step: Step, until: float) -> dict:
    """What became of the step: status is ok, failed, timed out, refused or not run."""
    if step.without:
        return dict(status="not run", seconds=0, detail=step.without)
    if time.monotonic() > until - 1:
        return dict(status="timed out", seconds=0, detail="the steps before it took its time")
    LOGS.mkdir(parents=True, exist_ok=True)
    log, began = LOGS / f"{step.name}.log", time.monotonic()
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"OMP_NUM_THREADS": "1"} | step.env
    env["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), env.get("PYTHONPATH")]))
    try:
        with log.open("w") as out:
            process = subprocess.Popen(
                step.command, cwd=ROOT, env=env, stdout=out, stderr=subprocess.STDOUT, start_new_session=True
            )
            late = False
            try:
                process.wait(until - time.monotonic())
            except subprocess.TimeoutExpired:
                late = True
                end(process)
    except OSError as error:
        return dict(status="failed", seconds=0, detail=str(error))
    said = log.read_text(errors="replace")
    status = "timed out" if late else "ok" if process.returncode == 0 else "failed"
    if status != "ok" and step.refused and re.search(step.refused, said):
        status = "refused"
    detail = said.strip()[-3000:] if status != "ok" else "\n".join(said.strip().splitlines()[-1:])
    return dict(status=status, seconds=round(time.monotonic() - began, 1), detail=detail)


def end(process: subprocess.Popen) -> None:
    """Interrupt it and all that it started, so that pytest still writes what it has; then kill."""
    for sig, patience in ((signal.SIGINT, 20), (signal.SIGKILL, 8)):
        try:
            os.killpg(process.pid, sig)
            process.wait(patience)
        except (ProcessLookupError, subprocess.TimeoutExpired):
            continue


def run_all(todo: list[Step], report: dict, out: Path) -> bool:
    """Runs the steps, writes the report after each; whether all went well."""
    until = time.monotonic()
    for step in todo:
        until += step.limit
        print(f"[gpu] {step.name} ...", flush=True)
        report["steps"][step.name] = result = run(step, until)
        print(f"[gpu] {step.name}: {result['status']}, {result['seconds']} s", flush=True)
        if step.name == "benchmarks":
            report.update(clocks_after=clocks(), benchmarks=times())
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(report, indent=1) + "\n")
    print()
    for name, result in report["steps"].items():
        last = (result["detail"].splitlines() or [""])[-1]
        print(f"{name:<12}{result['status']:<11}{result['seconds']:>6} s  {last[:100]}")
    print(f"\n{out}")
    return not any(r["status"] in ("failed", "timed out") for r in report["steps"].values())


def times() -> list[dict]:
    """Of pytest-benchmark's report, what a table needs."""
    if not TIMES.exists():
        return []
    return [
        dict(name=b["name"], median_us=b["stats"]["median"] * 1e6, iqr_us=b["stats"]["iqr"] * 1e6,
             rounds=b["stats"]["rounds"], **b["extra_info"])
        for b in json.loads(TIMES.read_text()).get("benchmarks", [])
    ]  # fmt: skip


def commit() -> str:
    """With -dirty where anything has changed but what a run itself writes, or the next slice of it could not go on."""
    git = dict(cwd=ROOT, capture_output=True, text=True)
    told = [f":(exclude){path}" for path in ("benchmarks/results", "docs", "README.md")]
    try:
        last = subprocess.run(["git", "rev-parse", "HEAD"], check=True, **git).stdout.strip()
        changed = subprocess.run(["git", "diff", "--quiet", "HEAD", "--", ".", *told], **git).returncode
        return last + ("-dirty" if changed else "")
    except (OSError, subprocess.SubprocessError):
        return STAMP.read_text().strip() if STAMP.exists() else "unknown: no make stamp where the history is"


def origin() -> dict:
    """What every results file says of where it comes from; needs no torch."""
    date = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
    return dict(commit=commit(), date=date, python=platform.python_version())


def clocks() -> dict | str:
    """Read, never set."""
    fields = "driver_version clocks.sm clocks.mem clocks.max.sm clocks.max.mem power.draw power.limit temperature.gpu"
    command = ["nvidia-smi", "--query-gpu=" + fields.replace(" ", ","), "--format=csv,noheader"]
    try:
        said = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout
    except (OSError, subprocess.SubprocessError) as error:
        return str(error)
    return dict(zip(fields.split(), map(str.strip, said.splitlines()[0].split(",")), strict=False))


def no_hopper() -> str | None:
    try:
        import torch
    except ImportError as error:
        return f"this python has no torch: {error}"
    if not torch.cuda.is_available():
        return "torch sees no GPU"
    major, minor = torch.cuda.get_device_capability()
    return (
        None if (major, minor) == (9, 0) else f"{torch.cuda.get_device_name()} is sm_{major}{minor}, not a Hopper GPU"
    )


def new_report() -> dict:
    import torch
    import triton

    properties = torch.cuda.get_device_properties(0)
    return origin() | dict(
        gpu=properties.name, sms=properties.multi_processor_count, torch=torch.__version__, cuda=torch.version.cuda,
        triton=triton.__version__, clocks=clocks(), steps={},
    )  # fmt: skip


def small(seconds: float = 35) -> None:
    """Ops that have a kernel in csrc/, forward and backward, at the tests' shapes: all at one, then all at another."""
    import torch

    from ling_kernels.backend import force
    from tests.cases import CASES, args_of
    from tests.test_ops import outputs_and_grads

    until, cases = time.monotonic() + seconds, [c for c in CASES if "cuda" in c.backends]
    shapes = [[s for s in c.shapes[-2::-1] if 0 not in s.values()] for c in cases]  # the last is the benchmark's
    done = 0
    for i in range(max(map(len, shapes))):
        for case, of_case in zip(cases, shapes, strict=True):
            if i < len(of_case) and (i == 0 or time.monotonic() < until):
                with force("cuda"):
                    outputs_and_grads(case, case.op, args_of(case, of_case[i], case.dtypes[0]))
                torch.cuda.synchronize()
                done += 1
    print(f"{done} of {sum(map(len, shapes))} calls, of {len(cases)} cases")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prebuilt", action="store_true", help="use the ling_kernels/_C that is there")
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks/results", help="folder of the report")
    parser.add_argument("--small", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.small:
        return small()
    if reason := no_hopper():
        print(f"error: make gpu needs a Hopper GPU: {reason}", file=sys.stderr)
        return 1
    report = new_report()
    gpu = re.sub(r"\W+", "-", report["gpu"].lower())
    date = report["date"][:16].replace(":", "")
    return 0 if run_all(steps(not args.prebuilt), report, args.results / f"{gpu}-{date}.json") else 1


if __name__ == "__main__":
    sys.exit(main())
