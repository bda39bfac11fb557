"""What is in a compiled file, from cuobjdump: the CUDA toolkit's or the one that Triton brings. No GPU needed."""

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
    places = [
        Path(os.environ.get("CUDA_HOME") or "/usr/local/cuda", "bin"),
        *(Path(p, "backends/nvidia/bin") for p in (triton.submodule_search_locations if triton else ())),
    ]
    return next(filter(None, (shutil.which("cuobjdump", path=p) for p in (None, *places))), None)


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
    """The most threads that a block may have, of every kernel that says so by __launch_bounds__."""
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


def names(mangled: list[str]) -> list[str]:
    """As the source has them."""
    said = subprocess.run(["c++filt", *mangled], capture_output=True, text=True, check=True).stdout.splitlines()
    return [short(name) for name in said]


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
