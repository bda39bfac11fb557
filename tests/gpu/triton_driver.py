"""Triton on the virtual GPU: its own compiler makes PTX for sm_90a, as the JIT would on a Hopper GPU, and that runs.

Warps, stages and tiles are those that an op chooses on a Hopper GPU. PTX is kept beside that of csrc/ (build.py).
"""

import functools
import hashlib
import importlib.util
import json
import shutil
import struct
from contextlib import contextmanager
from typing import NamedTuple

import torch
import triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

from tests.hopper import bind, source_of

from . import ptx
from .build import kept
from .program import Emulated, set_ranges

PACK = dict(i1="?", i8="b", i16="h", i32="i", i64="q", u8="B", u16="H", u32="I", u64="Q", fp32="f", fp64="d")


class Compiled(NamedTuple):
    kernel: Emulated
    warps: int
    shared: int  # bytes
    scratch: int  # bytes a program of global memory, for tensor maps that the kernel makes


class Launcher:
    """Runs launches. patch(kernel's name, PTX) -> PTX, where a test wants another text."""

    def __init__(self):
        self.patch, self.ready = None, {}

    def run(self, fn, *args, grid, warmup, **kwargs):
        values, parts, options = bind(fn, args, kwargs)
        key = (fn.cache_key, self.patch, *((n, *map(str, part)) for n, part in parts.items()), *sorted(options.items()))
        if key not in self.ready:
            self.ready[key] = self.compile(fn, parts, options)
        kernel, warps, shared, scratch_size = self.ready[key]
        grid = (*(grid(values) if callable(grid) else grid), 1, 1)[:3]
        if not all(grid):
            return
        scratch = torch.empty(scratch_size * grid[0] * grid[1] * grid[2] + 128, dtype=torch.uint8)
        scratch = scratch[-scratch.data_ptr() % 128 :]
        given = [pack(kind, values[n]) for n, (kind, _, _) in parts.items() if kind != "constexpr"]
        given += [struct.pack("Q", scratch.data_ptr())] * (len(kernel.entry.params) - len(given))  # and for profiles
        params = bytearray(kernel.entry.params_size)
        for (_, offset), data in zip(kernel.entry.params, given, strict=True):
            params[offset : offset + len(data)] = data
        set_ranges([*values.values(), scratch])
        kernel.launch(grid, (32 * warps, 1, 1), shared, bytes(params))

    def compile(self, fn, parts, options) -> Compiled:
        key = json.dumps([triton.__version__, fn.cache_key, str(parts), sorted(options.items())])
        (file,) = kept(key, (".triton",), lambda out: out.write_text(json.dumps(compile_ptx(fn, parts, options))))
        text, *sizes = json.loads(file.read_text())
        module = ptx.Module(self.patch(fn.__name__, text) if self.patch else text)
        (name,) = module.heads
        return Compiled(Emulated(module, name), *sizes)


def pack(kind: str, value) -> bytes:
    return struct.pack("Q", value.data_ptr()) if kind.startswith("*") else struct.pack(PACK[kind], value)


def compile_ptx(fn, parts, options) -> tuple[str, int, int, int]:
    """PTX, warps, shared memory and scratch memory, by Triton's compiler without ptxas."""
    with without_ptxas():
        built = triton.compile(source_of(fn, parts), target=GPUTarget("cuda", 90, 32), options=options)
    m = built.metadata
    return built.asm["ptx"], m.num_warps, m.shared, m.global_scratch_size


@contextmanager
def without_ptxas():
    def hook(backend=None, stages=None, *_):
        if stages is None:
            return "ptx", hashlib.sha256(b"ptx").hexdigest()  # of Triton's own cache: apart from what ptxas built
        stages["cubin"] = lambda text, metadata: b""

    before, knobs.runtime.add_stages_inspection_hook = knobs.runtime.add_stages_inspection_hook, hook
    try:
        yield
    finally:
        knobs.runtime.add_stages_inspection_hook = before


LAUNCHER = Launcher()


@functools.cache
def install() -> None:
    """From now on every launch of a Triton kernel in this process runs on the virtual GPU."""
    JITFunction.run = lambda fn, *args, **kwargs: LAUNCHER.run(fn, *args, **kwargs)


def missing() -> str | None:
    """What Triton lacks to run on the virtual GPU, if anything."""
    if shutil.which("g++") is None:
        return "g++"
    if importlib.util.find_spec("triton.backends.nvidia") is None:
        return "Triton's compiler for NVIDIA GPUs"
    return (
        None
        if hasattr(knobs.runtime, "add_stages_inspection_hook")
        else f"Triton 3.6 or newer (it is {triton.__version__})"
    )
