"""make gpu-pack: csrc/ compiled here for a GPU machine that has little time.

The kernels' objects depend on neither Python nor torch. They, the headers that bindings.cpp includes, and CUDA's static
runtime go into build/gpu-pack (24 MB, ignored by git). On the GPU machine `link` compiles bindings.cpp for its Python
and links: seconds, and a C++ compiler is all that it needs.
"""

import hashlib
import json
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from ling_kernels.commands import command
from ling_kernels.errors import InputError

ROOT = Path(__file__).parents[1]
PACK = ROOT / "build/gpu-pack"
OBJECTS = ROOT / f"build/editable-{sys.implementation.cache_tag}/CMakeFiles/_C.dir/csrc"
BINDINGS = [*(ROOT / "csrc").glob("*.cpp")]


def sources_hash() -> str:
    """Of all that the objects are compiled from."""
    files = [ROOT / "CMakeLists.txt", *sorted(p for p in (ROOT / "csrc").rglob("*") if p.is_file())]
    return hashlib.sha256(b"".join(p.read_bytes() for p in files)).hexdigest()[:16]


def nvcc_release(nvcc: str | None) -> str | None:
    out = subprocess.run([nvcc, "--version"], capture_output=True, text=True).stdout if nvcc else ""
    found = re.search(r"release (\d+\.\d+)", out)
    return found and found[1]


def build() -> None:
    if not shutil.which("nvcc"):
        raise InputError("make gpu-pack needs nvcc on PATH")
    if subprocess.run([sys.executable, "setup.py", "-q", "build_ext", "--inplace"], cwd=ROOT).returncode:
        raise InputError("csrc/ did not build, see the messages above")


def pack(into: Path = PACK, objects: Path = OBJECTS) -> Path:
    """Collect what `link` needs from a finished build."""
    import setup  # needs setuptools, which `link` does not

    shutil.rmtree(into, ignore_errors=True)
    (into / "objects").mkdir(parents=True)
    for source in sorted((ROOT / "csrc").rglob("*.cu")):
        if source.parent.name != "cutlass":
            shutil.copy(objects / f"{source.relative_to(ROOT / 'csrc')}.o", into / "objects" / f"{source.stem}.o")
    cache = (objects.parents[2] / "CMakeCache.txt").read_text()
    shutil.copy(re.search(r"CUDA_cudart_static_LIBRARY:FILEPATH=(.*)", cache)[1], into)
    dlpack = setup.headers("DLPACK_INCLUDE_DIR", "tvm_ffi", "include", "dlpack/dlpack.h")
    cuda = re.search(r"DETAILS_CUDAToolkit:INTERNAL=\[(.*?)\]", cache)[1]
    roots = [setup.wheel("pybind11", "include"), dlpack, Path(cuda)]
    folders = [ROOT / "csrc", *roots, sysconfig.get_path("include")]
    rule = subprocess.check_output(["g++", "-std=c++20", "-M", *(f"-I{f}" for f in folders), *BINDINGS], text=True)
    for header in map(Path, re.findall(r"\S+\.(?:h|hpp)\b", rule)):
        for root in (r for r in roots if header.is_relative_to(r)):
            copy = into / "include" / header.relative_to(root)
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(header, copy)
    about = dict(sources=sources_hash(), nvcc=nvcc_release(shutil.which("nvcc")))
    (into / "pack.json").write_text(json.dumps(about))
    return into


def why_not(nvcc: str | None, pack: Path = PACK) -> str | None:
    """Why the pack cannot be linked here, or None."""
    if not (pack / "pack.json").is_file():
        return f"there is no {pack.relative_to(ROOT) if pack.is_relative_to(ROOT) else pack}: make gpu-pack"
    about = json.loads((pack / "pack.json").read_text())
    if about["sources"] != sources_hash():
        return "the pack's objects are of another csrc/: make gpu-pack"
    if nvcc and nvcc_release(nvcc) != about["nvcc"]:
        return f"the pack's objects are of nvcc {about['nvcc']}, this machine has {nvcc_release(nvcc)}"
    return None if shutil.which("g++") else "there is no g++"


def link(pack: Path = PACK, out: Path | None = None) -> Path:
    """ling_kernels/_C for this Python."""
    if reason := why_not(shutil.which("nvcc"), pack):
        raise InputError(reason)
    out = out or ROOT / f"ling_kernels/_C{sysconfig.get_config_var('EXT_SUFFIX')}"
    flags = ["-std=c++20", "-O2", "-fPIC", "-fvisibility=hidden", "-shared", "-Wl,--exclude-libs,ALL"]
    folders = [ROOT / "csrc", pack / "include", sysconfig.get_path("include")]
    inputs = [*BINDINGS, *sorted((pack / "objects").iterdir()), pack / "libcudart_static.a"]
    libraries = ["-lpthread", "-ldl", "-lrt"]
    if subprocess.run(["g++", *flags, *(f"-I{f}" for f in folders), *inputs, *libraries, "-o", out]).returncode:
        raise InputError("the pack does not link here, see the messages above")
    return out


def main() -> int:
    if sys.argv[1:] == ["link"]:
        print(f"linked {link()}")
    else:
        build()
        print(f"packed csrc/ into {pack().relative_to(ROOT)}")
    return 0


if __name__ == "__main__":
    sys.exit(command(main)())
