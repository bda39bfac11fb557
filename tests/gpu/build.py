"""csrc/ for the virtual GPU: nvcc's host objects and PTX, and a module `_C` that launches that PTX.

Files are kept in ~/.cache/ling_kernels/gpu, shared by clones and by processes; those unused for a week are deleted.
Each is named by a hash of all that it was made from, so that none is ever stale.
"""

import ctypes
import fcntl
import functools
import hashlib
import importlib.machinery
import importlib.util
import os
import re
import shutil
import subprocess
import sysconfig
import tempfile
import time
import types
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

from . import ptx
from .program import CACHE, CALLBACK, Bounded, Emulated, Library, Operations, plain, set_ranges
from .translate import Translator

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
CSRC = ROOT / "csrc"
KEEP = 7 * 24 * 3600  # seconds
# The flags of CMakeLists.txt, but for PTX alone: ptxas is not run.
NVCC = (
    "-O3 -DNDEBUG -std=c++20 --expt-relaxed-constexpr -lineinfo -gencode arch=compute_90a,code=compute_90a -keep -c "
    "-Xcompiler=-fPIC,-fvisibility=hidden"
).split()
LIMITED_API = "0x030A0000"  # of CMakeLists.txt
CXX = "-std=c++20 -O1 -fPIC -fvisibility=hidden -Wall -Wextra -Werror -DLING_DEVICE=kDLCPU".split()


@functools.cache
def includes() -> list[Path]:
    """The header folders of CUDA, DLPack, pybind11 and Python."""
    nvcc = shutil.which("nvcc")
    toolkits = [os.environ.get("CUDA_HOME"), nvcc and Path(nvcc).resolve().parents[1], "/usr/local/cuda"]
    cuda = [Path(t) / "include" for t in toolkits if t]
    return [
        next((p for p in cuda if (p / "cuda_bf16.h").exists()), cuda[-1]),
        Path(os.environ.get("DLPACK_INCLUDE_DIR") or wheel("tvm_ffi") / "include"),
        wheel("pybind11") / "include",
        Path(sysconfig.get_path("include")),
    ]


def wheel(package: str) -> Path:
    spec = importlib.util.find_spec(package)
    return Path(spec.submodule_search_locations[0] if spec else package)


# From the package nvidia-cutlass, as setup.py finds them
CUTLASS = Path(os.environ.get("CUTLASS_INCLUDE_DIR") or wheel("cutlass_library") / "source/include")


@functools.cache
def missing() -> str | None:
    """The program or header without which csrc/ cannot run on the virtual GPU, if any."""
    if program := next((p for p in ("nvcc", "g++") if shutil.which(p) is None), None):
        return program
    headers = zip(includes(), ("cuda_bf16.h", "dlpack/dlpack.h", "pybind11/pybind11.h", "Python.h"), strict=True)
    return next((name for folder, name in headers if not (folder / name).exists()), None)


@functools.cache
def versions() -> str:
    """The compilers and foreign headers, as text without paths: part of every key."""
    compilers = [subprocess.run([c, "--version"], capture_output=True, text=True).stdout for c in ("nvcc", "g++")]
    headers = ("cuda.h", "dlpack/dlpack.h", "pybind11/detail/common.h", "patchlevel.h")
    return "\0".join([*compilers, *((p / name).read_text() for p, name in zip(includes(), headers, strict=True))])


def kept(key: str, suffixes: tuple[str, ...], make: Callable[..., None]) -> list[Path]:
    """Files of the cache named by `key`; where one is missing, make(*paths) writes them all.

    One process makes them, and the others wait for it.
    """
    stem = CACHE / hashlib.sha256(key.encode()).hexdigest()[:24]
    files = [Path(f"{stem}{suffix}") for suffix in suffixes]
    CACHE.mkdir(parents=True, exist_ok=True)
    with open(f"{stem}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not all(f.exists() for f in files):
            parts = [f.with_name(f".{f.name}") for f in files]
            make(*parts)
            for part, file in zip(parts, files, strict=True):
                part.rename(file)
        for file in files:
            os.utime(file)
    return files


def prune() -> None:
    """Delete the files of the cache that nothing has used for a week."""
    for file in CACHE.glob("*"):
        try:
            if time.time() - file.stat().st_mtime > KEEP:
                file.unlink()
        except OSError:  # another process deleted it
            pass


@functools.cache
def read_by(file: Path) -> tuple[Path, ...]:
    """The file and all files of csrc/ that it includes, directly or not."""
    seen, rest = {}, [file]
    while rest:
        file = rest.pop()
        if file in seen:
            continue
        seen[file] = None
        for name in re.findall(r'^#include "(.*)"', file.read_text(), re.M):
            rest += [next((f for f in (CSRC / name, file.parent / name, HERE / "machine" / name) if f.exists()), file)]
    return tuple(seen)


def key_of(file: Path, flags: list[str]) -> str:
    cutlass = [(CUTLASS / "cutlass/version.h").read_text()] if by_cutlass(file) else []
    return "\0".join([file.name, *flags, versions(), *cutlass, *map(Path.read_text, read_by(file))])


def by_cutlass(file: Path) -> bool:
    """Whether it includes headers of CUTLASS."""
    return any("#include <cutlass/" in f.read_text() for f in read_by(file))


def compile_cuda(file: Path, debug: bool = False) -> tuple[Path, Path]:
    """nvcc's host object of a .cu file, and its PTX. debug: with the checks that LING_DEBUG=1 builds in."""
    flags = [*NVCC, *(["-DLING_DEBUG"] if debug else [])]
    name = file.relative_to(ROOT) if file.is_relative_to(ROOT) else file

    def make(object_file, ptx):
        with tempfile.TemporaryDirectory() as tmp:
            folders = [f"-I{CSRC.name}", f"-isystem={includes()[1]}", *[f"-isystem={CUTLASS}"] * by_cutlass(file)]
            run("nvcc", *flags, *folders, f"-keep-dir={tmp}", name, "-o", object_file)
            (made,) = Path(tmp).glob("*.ptx")
            text = made.read_text().replace(f"{ROOT}/", "")  # in .file, of a clone
            # What a failed check prints: the virtual GPU names the line.
            text = re.sub(r"\{[^{}]*call\.uni\s*\(\w+\),\s*vprintf,[^{}]*\}", "", text)
            ptx.write_text(text)

    return tuple(kept(key_of(file, flags), (".o", ".ptx"), make))


def compile_cpp(file: Path, *defines: str) -> Path:
    flags = [*CXX, *defines]
    folders = [f"-I{CSRC.name}", "-Itests/gpu/machine", *(f"-isystem{p}" for p in includes())]
    (object_file,) = kept(
        key_of(file, flags), (".o",), lambda out: run("g++", *flags, *folders, "-c", file.relative_to(ROOT), "-o", out)
    )
    return object_file


def run(*command) -> None:
    """In the clone's root, with relative paths: a hash does not depend on where the clone is."""
    subprocess.run(command, check=True, cwd=ROOT)


def compile_module(name: str, debug: str) -> tuple[Path, list[Path]]:
    """A module: the library that Python loads, and its PTX. `_cutlass_setup` is what `_cutlass` has without CUTLASS,
    `_C_limited` is `_C` by Python's limited API."""
    cutlass = CSRC / "gemm/cutlass"
    own = [f for f in sorted(CSRC.rglob("*.cu")) if f.parent != cutlass]
    sources, bindings, *defines = {
        "_C": (own, CSRC / "bindings.cpp"),
        "_C_limited": (own, CSRC / "bindings.cpp", f"-DPy_LIMITED_API={LIMITED_API}"),
        "_cutlass": (sorted(cutlass.glob("*.cu")), cutlass / "bindings.cpp"),
        "_cutlass_setup": ([cutlass / "setup.cu"], HERE / "cutlass_setup.cpp"),
    }[name]
    with ThreadPoolExecutor(1 if name == "_cutlass" else os.cpu_count()) as pool:  # 4 GB a file of CUTLASS's
        compiled = list(pool.map(lambda f: compile_cuda(f, f.parent.name == debug), sources))
    objects = [o for o, _ in compiled] + [
        compile_cpp(bindings, "-DLING_MODULE=_C_gpu", *defines),
        compile_cpp(HERE / "runtime.cpp"),
    ]
    key = " ".join(o.name for o in objects)
    (so,) = kept(key, (".so",), lambda out: run("g++", "-shared", *objects, "-o", out))
    return so, [ptx for _, ptx in compiled]


class VirtualModule(types.ModuleType):
    """A module of csrc/ on the virtual GPU, compiled when its first function is looked up."""

    def __init__(self, name: str, debug: str):
        super().__init__(name)
        self.__debug = debug

    def __getattr__(self, name: str):
        if name.startswith("__"):
            raise AttributeError(name)
        value = getattr(load_now(self.__name__, self.__debug), name)
        setattr(self, name, value)
        return value

    def __dir__(self) -> list[str]:
        return dir(load_now(self.__name__, self.__debug))


def load(name: str = "_C", debug: str = "") -> VirtualModule:
    """A module of csrc/ on the virtual GPU. debug: a folder of csrc/, built with the checks of LING_DEBUG=1."""
    return VirtualModule(name, debug)


@functools.cache
def load_now(name: str, debug: str) -> Bounded:
    so, files = compile_module(name, debug)
    compile_operations(files)
    return link(so, Library(files))


def compile_operations(files: list[Path]) -> None:
    """Those of all kernels in one go: one kernel after the other, when it is launched, would take minutes."""
    own = [*HERE.glob("*.py"), *HERE.glob("machine/*.h")]
    key = "\0".join([*(f.name for f in files), *(f.read_text() for f in sorted(own))])

    def make(done: Path) -> None:
        modules = [ptx.Module(f.read_text()) for f in files]
        programs = [Translator(m.entry(name), m).program() for m in modules for name in m.heads]
        Operations.addresses({text for program in programs for _, code, *_ in program for text, _ in code})
        done.touch()

    kept(key, (".operations",), make)


def link(so: Path, kernels: Library) -> Bounded:
    """The module in `so`, whose launches run `kernels`."""
    name = f"{so.stem}._C_gpu"  # pybind11 returns the old module for a name that it has seen
    loader = importlib.machinery.ExtensionFileLoader(name, str(so))
    module = importlib.util.module_from_spec(importlib.util.spec_from_loader(name, loader))
    loader.exec_module(module)
    kernels.callback = CALLBACK(kernels.on_launch)
    ctypes.CDLL(str(so)).gpu_on_launch(kernels.callback)
    return Bounded(module, kernels)


class Kernels:
    """The kernels `extern "C"` of a .cu file of the tests: kernels.name(grid, threads, *args, shared=bytes).

    An argument is a tensor, of which the kernel gets the address, or a number.
    """

    def __init__(self, file: Path):
        self._kernels = Library([compile_cuda(file)[1]])

    def __getattr__(self, name: str) -> Callable[..., None]:
        kernel = self._kernels.kernel(name)

        def launch(grid: int, threads: int, *args, shared: int = 0) -> None:
            params = bytearray(kernel.entry.params_size)
            for (v, offset), a in zip(kernel.entry.params, args, strict=True):
                number = a.data_ptr() if hasattr(a, "data_ptr") else a
                params[offset : offset + v.size] = int(number).to_bytes(v.size, "little", signed=number < 0)
            set_ranges(args)
            kernel.launch((grid, 1, 1), (threads, 1, 1), shared, bytes(params))

        return launch


@contextmanager
def broken(kernel: str, change: Callable[[str], str]) -> Iterator[list[str]]:
    """While open, kernels of `_C` whose mangled name contains `kernel` run with changed PTX; yields their names.

    change: an entry's PTX -> wrong PTX.
    """
    kernels, changed = load_now("_C", "")._lib, []
    intact, ready = kernels.kernel, {}

    def find(name: str) -> Emulated:
        if kernel not in name:
            return intact(name)
        if name not in ready:
            file, own = kernels.where[plain(name)]
            text = Path(file).read_text()
            start = text.rindex("\n", 0, text.index(f" {own}("))
            end = text.find(".entry", text.index("{", start))
            end = len(text) if end < 0 else text.rindex("\n", 0, end)
            wrong = change(text[start:end])
            changed.extend([name] if wrong != text[start:end] else [])
            ready[name] = Emulated(ptx.Module(text[:start] + wrong + text[end:]), own)
        return ready[name]

    kernels.kernel = find
    try:
        yield changed
    finally:
        del kernels.kernel
