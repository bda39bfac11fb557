"""Resources and code in a compiled file, by cuobjdump: the CUDA toolkit's, or the one in Triton. No GPU needed."""

import importlib.util
import os
import re
import shutil
import subprocess
from functools import cache
from pathlib import Path


@cache
def tool() -> str | None:
    triton = importlib.util.find_spec("triton")
    folders = [
        Path(os.environ.get("CUDA_HOME") or "/usr/local/cuda", "bin"),
        *(Path(p, "backends/nvidia/bin") for p in (triton.submodule_search_locations if triton else ())),
    ]
    return next(filter(None, (shutil.which("cuobjdump", path=p) for p in (None, *folders))), None)


def dump(what: str, file: Path | str) -> str:
    return subprocess.run([tool(), what, file], capture_output=True, text=True, check=True).stdout


def resources(file: Path | str) -> dict[str, dict[str, int]]:
    """registers, spilled bytes and static shared memory of every kernel in a cubin or a module, by mangled name."""
    found = {}
    for name, line in re.findall(r"Function (\S+?):\s+(.*)", dump("-res-usage", file)):
        n = {k: int(v) for k, v in re.findall(r"(REG|STACK|LOCAL|SHARED):(\d+)", line)}
        found[name] = dict(registers=n["REG"], spilled=n["STACK"] + n["LOCAL"], shared=n["SHARED"])
    return found


def threads(file: Path | str) -> dict[str, int]:
    """The largest block of every kernel that has __launch_bounds__."""
    sections = re.split(r"^\.nv\.info\.", dump("-elf", file), flags=re.M)[1:]
    limits = {s.split()[0]: re.search(r"EIATTR_MAX_THREADS\s+.*\s+Value:\s*(.*)", s) for s in sections}
    return {name: product(found[1].split()) for name, found in limits.items() if found}


def product(numbers: list[str]) -> int:
    x, y, z = (int(n, 16) for n in numbers)
    return x * y * z


def code(file: Path | str) -> dict[str, str]:
    """The machine code of every kernel."""
    parts = re.split(r"^\s*Function : (\S+)$", dump("-sass", file), flags=re.M)[1:]
    return dict(zip(parts[::2], parts[1::2], strict=True))


MEMORY = r"\b(?:LDG|LDGSTS|LD|STG|ST|ATOM|ATOMG|RED|UTMALDG|UTMASTG|UBLKCP)(?:\.\S+)?\s"


def instructions(code: str) -> dict[str, int]:
    """How often instructions of each kind occur; early: accesses to global memory before griddepcontrol.wait."""

    def count(pattern):
        return len(re.findall(rf"\b(?:{pattern})", code))

    return dict(
        qgmma=count("QGMMA"), hgmma=count("HGMMA"), mma=count("HMMA"),
        tma_loads=count("UTMALDG"), tma_stores=count("UTMASTG"),
        wide_loads=count(r"LDG\.\S*128|LDGSTS\.\S*128|UTMALDG|UBLKCP"), loads=count(r"LDG|UTMALDG|UBLKCP"),
        wide_stores=count(r"STG\.\S*128|UTMASTG"), stores=count("STG|UTMASTG"),
        float_atomics=count(r"(?:RED|ATOM)\w*\.\S*(?:F16|BF16|F32|F64)"),
        waits=count("ACQBULK"), early=len(re.findall(MEMORY, code.split("ACQBULK")[0])),
    )  # fmt: skip


def names(mangled: list[str]) -> list[str]:
    """Names of kernels as in the source."""
    output = subprocess.run(["c++filt", *mangled], capture_output=True, text=True, check=True).stdout
    return [short(name) for name in output.splitlines()]


def short(name: str) -> str:
    """kernel<template arguments>, without namespaces and parameters."""
    name = re.sub(r"cutlass::device_kernel<([\w:]+)>", r"\1", name.replace("(anonymous namespace)::", ""))
    name = re.sub(r"^void |\w+::|__nv_|\(\w+\)(?=\d|true|false)", "", name).replace("> >", ">>")
    depth = 0
    for i, c in enumerate(name):
        depth += (c == "<") - (c == ">")
        if c == "(" and depth == 0:
            return name[:i]
    return name
