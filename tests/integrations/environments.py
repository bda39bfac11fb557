"""Virtual environments for the tests of the integrations, and the command that makes them and runs the tests.

`make test-integrations`, or `python -m tests.integrations.environments NAME ... [-- FLAGS OF PYTEST]` for some of them.
An environment sees the packages of the Python that makes it (torch, triton, numpy, pytest) behind its own. It is kept
in ~/.cache/ling_kernels/environments under a hash of its pins, of the Python and of the packages it sees.
"""

import fcntl
import hashlib
import importlib.metadata
import os
import shlex
import shutil
import subprocess
import sys
import time
import venv
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).parents[2]
TESTS = Path(__file__).parent

# By name of the folder of tests. Requirements of pip; those with flags are installed by a call of their own, after the
# others. A package that pins another torch gets --no-deps, and what it needs is listed beside it.
ENVIRONMENTS = {
    "transformers5": ["transformers==5.23.0", "accelerate==1.15.0"],
    "transformers4": ["transformers==4.56.2", "accelerate==1.15.0"],
    "megatron": ["einops==0.8.1", "psutil==7.2.2", "--no-deps --ignore-requires-python megatron-core==0.19.2"],
    "megatron16": ["einops==0.8.1", "psutil==7.2.2", "--no-deps megatron-core==0.16.1"],
    "titan": ["tyro==1.0.16", "einops==0.8.1", "--no-deps torchtitan==0.3.0 spmd_types==0.2.3"],
    "trainers": [
        *("transformers==5.23.0", "einops==0.8.1", "accelerate==1.15.0"),
        "--no-deps llamafactory==0.9.5 nemo-automodel==0.7.0",
    ],
    "trl": ["transformers==5.23.0", "accelerate==1.15.0", "trl==1.16.0"],
    "hub": ["kernels==0.17.2"],
    "lm_eval": ["lm_eval[api]==0.4.13", "transformers==5.23.0", "accelerate==1.15.0"],
    "clients": [
        *("openai==3.57.0", "litellm==1.110.2", "langchain-openai==1.7.4", "llm==0.36", "guidellm==0.8.1"),
        *("lm_eval==0.4.13", "transformers==5.23.0", "llguidance==1.9.1"),
        "opentelemetry-exporter-otlp-proto-http==1.45.2",
    ],
}

KEEP = 30 * 24 * 3600  # seconds: an environment that no run has used for so long is deleted
AT_ONCE = 2  # environments: what two cores and 24 GB of memory allow
SEEN = os.pathsep.join(path for path in sys.path if path.endswith("site-packages"))  # in order, the venv's first
VARIABLE = "LING_TEST_PACKAGES"  # folders of packages that an environment sees behind its own


def cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ling_kernels/environments"


def prune() -> None:
    """Delete the environments that no run has used for KEEP seconds, of this clone or another."""
    for marker in cache().glob("*/complete"):
        if time.time() - marker.stat().st_mtime > KEEP:
            marker.unlink()  # first: without it the rest is not used
            shutil.rmtree(marker.parent, ignore_errors=True)


def digest(requirements: list[str]) -> str:
    """Names an environment. What pip installs depends on the packages that are there already."""
    seen = sorted({f"{d.name}=={d.version}" for d in importlib.metadata.distributions() if d.name != "ling_kernels"})
    parts = [sys.version, *sorted(requirements), "", *seen]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]


def make(name: str) -> Path:
    """The Python of an environment, made where there is none. Raises SystemExit with one line where pip fails."""
    requirements = ENVIRONMENTS[name]
    folder = cache() / digest(requirements)
    python = folder / "bin/python"
    folder.parent.mkdir(parents=True, exist_ok=True)
    with open(folder.with_suffix(".lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # another clone may be making it
        if (folder / "complete").exists():
            os.utime(folder / "complete")
            return python
        print(f"[integrations] making {name} in {folder}", flush=True)
        shutil.rmtree(folder, ignore_errors=True)
        venv.create(folder, symlinks=True)
        packages = next(folder.glob("lib/python*/site-packages"))
        # Without a default: another clone may use the environment later, when this one's packages are gone.
        seen = f"filter(None, os.environ.get({VARIABLE!r}, '').split({os.pathsep!r}))"
        line = f"import os, site; list(map(site.addsitedir, {seen}))"
        (packages / "outer.pth").write_text(line + "\n")
        plain = [r for r in requirements if not r.startswith("-")]
        for group in [plain] * bool(plain) + [shlex.split(r) for r in requirements if r.startswith("-")]:
            install(name, python, group)
        (folder / "complete").touch()
    return python


def install(name: str, python: Path, arguments: list[str]):
    """pip, held to the torch that is there: none is ever installed."""
    kept = [f"{p}=={importlib.metadata.version(p)}" for p in ("torch", "triton") if importlib.metadata.version(p)]
    constraints = python.parents[1] / "constraints.txt"
    constraints.write_text("\n".join(kept) + "\n")
    command = [python, "-m", "pip", "install", "-q", "-c", constraints, *arguments]
    result = subprocess.run(command, capture_output=True, text=True, env=variables())
    if result.returncode:
        lines = [line for line in result.stderr.splitlines() if line.strip()] or ["pip failed"]
        reason = next((line[7:] for line in lines if line.startswith("ERROR: ")), lines[-1])
        raise SystemExit(
            f"error: environment {name}: pip cannot install {shlex.join(arguments)}: {reason} (no network?)"
        )


def variables() -> dict[str, str]:
    """Of a process in an environment: this tree's package, one thread, no network for models and data sets."""
    fixed = {VARIABLE: SEEN, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    return {**os.environ, **fixed, "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}


def run(name: str, flags: list[str]) -> int:
    """Make an environment and run its tests. Prints pytest's report in one piece; returns its exit code."""
    try:
        python = make(name)
    except SystemExit as error:
        print(error, file=sys.stderr)
        return 2
    # Not tests/conftest.py: it puts the virtual GPU's build of csrc/ in the place of ling_kernels._C.
    command = [python, "-m", "pytest", "-p", "no:benchmark", "-p", "no:cacheprovider", f"--confcutdir={TESTS}"]
    command += [TESTS / name, *flags]
    result = subprocess.run(
        command, cwd=ROOT, env=variables(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    print(f"[integrations] {name}\n{result.stdout}", flush=True)
    return result.returncode


def main(arguments: list[str]) -> int:
    split = arguments.index("--") if "--" in arguments else len(arguments)
    names, flags = arguments[:split], arguments[split + 1 :]
    if unknown := set(names) - set(ENVIRONMENTS):
        raise SystemExit(f"error: no environment {min(unknown)}; there are {', '.join(ENVIRONMENTS)}")
    names = names or [name for name in ENVIRONMENTS if list((TESTS / name).glob("test_*.py"))]
    prune()
    with ThreadPoolExecutor(AT_ONCE) as pool:
        codes = list(pool.map(lambda name: run(name, flags), names))
    failed = [name for name, code in zip(names, codes, strict=True) if code]
    print(f"[integrations] {len(names) - len(failed)} of {len(names)} environments passed", *failed)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
