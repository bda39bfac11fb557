"""Launches PTX on the virtual GPU: compiles the operations that are new, runs kernels, reports counters."""

import ctypes
import functools
import hashlib
import importlib.machinery
import importlib.util
import os
import re
import subprocess
import sys
import time
from pathlib import Path

from . import ptx
from .translate import CLASSES, PRELUDE, Translator, function, symbol

MACHINE = Path(__file__).parent / "machine"
CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ling_kernels/gpu"

FLAGS = (
    "-std=c++20 -O2 -march=native -ffp-contract=off -fno-strict-aliasing -fno-trapping-math -fno-math-errno "
    "-Wno-psabi -Wno-ignored-attributes -fPIC -shared -fvisibility=hidden"
).split()
ELEMENTS = ("e4m3", "e5m2", "bf16", "f16", "tf32")
SITE = ("runs", "lanes", "units", "ideal", "useful", "failed")
U64 = ctypes.c_uint64


class BlockCode(ctypes.Structure):
    _fields_ = [(n, ctypes.c_int) for n in ("first", "count", "line", "next", "target", "predicate", "negated")] + [
        ("classes", ctypes.c_int * 8)
    ]


class Instruction(ctypes.Structure):
    _fields_ = [("run", ctypes.c_void_p), ("operands", ctypes.c_void_p)]


class SiteInfo(ctypes.Structure):
    _fields_ = [("line", ctypes.c_int), ("text", ctypes.c_char_p), ("bytes", ctypes.c_int)]


class Kernel(ctypes.Structure):
    _fields_ = [
        ("name", ctypes.c_char_p), ("blocks", ctypes.c_int), ("sites", ctypes.c_int),
        ("block", ctypes.POINTER(BlockCode)), ("code", ctypes.POINTER(Instruction)), ("site", ctypes.POINTER(SiteInfo)),
        *((n, ctypes.c_size_t) for n in ("registers", "params", "shared", "local")),
    ]  # fmt: skip


def compiled(stem: str, text: str) -> Path:
    """C++ as a shared library of the cache, named by its content; its source lies beside it."""
    headers = "".join(h.read_text() for h in sorted(MACHINE.glob("*.h")))
    so = CACHE / f"{stem}-{hashlib.sha256((text + headers + ' '.join(FLAGS)).encode()).hexdigest()[:16]}.so"
    if not so.exists():
        CACHE.mkdir(parents=True, exist_ok=True)
        source, part = so.with_suffix(f".{os.getpid()}.cpp"), so.with_suffix(f".{os.getpid()}")
        source.write_text(text)
        subprocess.run(["g++", *FLAGS, f"-I{MACHINE}", source, "-o", part], check=True)
        source.rename(so.with_suffix(".cpp"))
        part.rename(so)
    return so


@functools.cache
def library():
    lib = ctypes.CDLL(str(compiled("machine", (MACHINE / "emu.cpp").read_text())), mode=ctypes.RTLD_GLOBAL)
    lib.emu_launch.restype = ctypes.c_char_p
    lib.emu_check_races(int(os.environ.get("RACES", 0)))
    return lib


def plain(name: str) -> str:
    """A mangled name without what nvcc makes of an anonymous namespace in a certain build."""
    return re.sub(r"\d+_GLOBAL__N__[0-9a-f]{8}_\d+_\w+?_cu_[0-9a-f]{8}", "12_GLOBAL__N_1", name)


class Operations:
    """The functions that instructions are made of, compiled when first met: libraries of the cache, shared by all kernels."""

    seconds = 0.0
    known = {}  # symbol: its address

    @classmethod
    def addresses(cls, texts) -> dict[str, int]:
        library()
        stamp = (
            "operations"
            + hashlib.sha256((PRELUDE + (MACHINE / "emu.h").read_text() + " ".join(FLAGS)).encode()).hexdigest()[:8]
        )
        if not cls.known:
            for so in CACHE.glob(f"{stamp}-*.so"):
                cls.load(so)
        missing = sorted({symbol(t): t for t in texts if symbol(t) not in cls.known}.items())
        if missing:
            begin = time.time()
            cls.load(compiled(stamp, PRELUDE + "".join(function(t) for _, t in missing)))
            cls.seconds += time.time() - begin
        return cls.known

    @classmethod
    def load(cls, so):
        lib = ctypes.CDLL(str(so))
        for name in re.findall(r"^OP (op_\w+)", so.with_suffix(".cpp").read_text(), re.M):
            cls.known[name] = ctypes.cast(getattr(lib, name), ctypes.c_void_p).value


class Emulated:
    """One entry, ready to run."""

    def __init__(self, module: ptx.Module, name: str):
        begin = time.time()
        self.entry, self.module = module.entry(name), module
        translator = Translator(self.entry, module)
        program = translator.program()
        texts = {t for _, code, *_ in program for t, _ in code}
        known = Operations.addresses(texts)
        run = {t: known[symbol(t)] for t in texts}
        flat = [(run[t], operands) for _, code, *_ in program for t, operands in code]
        values = [v for _, operands in flat for v in operands]
        self.operands = (ctypes.c_int64 * (len(values) + 1))(*values)
        self.code, at = (Instruction * (len(flat) + 1))(), ctypes.addressof(self.operands)
        for i, (f, operands) in enumerate(flat):
            self.code[i].run, self.code[i].operands = f, at
            at += 8 * len(operands)
        self.blocks_, first = (BlockCode * len(program))(), 0
        for i, (line, code, following, target, predicate, negated, counts) in enumerate(program):
            self.blocks_[i] = BlockCode(
                first, len(code), line, following, target, predicate, negated, (ctypes.c_int * 8)(*counts)
            )
            first += len(code)
        self.site_info = (SiteInfo * (len(translator.sites) + 1))(
            *((line, text.encode(), size) for line, text, size in translator.sites)
        )
        self.kernel = Kernel(
            name.encode(), len(program), len(translator.sites), self.blocks_, self.code, self.site_info, translator.size,
            self.entry.params_size, translator.static_shared, translator.local_size,
        )  # fmt: skip
        self.translated = time.time() - begin
        self.reset()

    def reset(self):
        k = self.kernel
        self.runs, self.lanes = (U64 * k.blocks)(), (U64 * k.blocks)()
        self.sites, self.totals = (U64 * (len(SITE) * k.sites + 1))(), (U64 * 6)()
        self.launches, self.seconds, self.blocks = 0, 0.0, 0

    def launch(self, grid, block, dynamic, params: bytes, cooperative=False, seed=None, counting=True):
        seed = int(os.environ.get("LING_HOST_SEED", 0)) if seed is None else seed
        three = ctypes.c_uint32 * 3
        counts = (self.runs, self.lanes) if counting else (None, None)
        begin = time.time()
        error = library().emu_launch(
            ctypes.byref(self.kernel), three(*grid), three(*block), dynamic, params, U64(seed), int(cooperative), *counts,
            self.sites, self.totals,
        )  # fmt: skip
        self.seconds += time.time() - begin
        self.launches += 1
        self.blocks += grid[0] * grid[1] * grid[2]
        if error:
            raise RuntimeError(error.decode())

    # -- what was counted
    def classes(self) -> dict:
        """Warp instructions by class, and lanes that were active in them on average."""
        total, lanes, n = [0] * 8, 0, 0
        for i in range(self.kernel.blocks):
            info = self.kernel.block[i]
            size = sum(info.classes)
            for c in range(8):
                total[c] += self.runs[i] * info.classes[c]
            lanes += self.lanes[i] * size
            n += self.runs[i] * size
        return dict(zip(CLASSES, total, strict=True)) | dict(
            warp_instructions=n, lane_instructions=lanes, active=lanes / n if n else 0
        )

    def by_site(self) -> list[dict]:
        out = []
        for i in range(self.kernel.sites):
            info = self.kernel.site[i]
            values = dict(zip(SITE, self.sites[len(SITE) * i : len(SITE) * (i + 1)], strict=True))
            out.append(dict(line=info.line, text=info.text.decode()) | values)
        return out


class Library:
    """Kernels by their plain names, of files of PTX; compiled when first launched."""

    def __init__(self, files):
        self.modules = {f: None for f in map(str, files)}
        self.where = {}
        for f in self.modules:
            for name in re.findall(r"\.entry\s+([\w$]+)\s*\(", Path(f).read_text()):
                self.where.setdefault(plain(name), (f, name))
        self.ready = {}
        self.error = None
        self.counting = True

    def kernel(self, name: str) -> Emulated:
        name = plain(name)
        if name not in self.ready:
            f, own = self.where[name]
            self.modules[f] = self.modules[f] or ptx.Module(Path(f).read_text())
            self.ready[name] = Emulated(self.modules[f], own)
            if os.environ.get("NAMES"):  # of what was launched
                print(name, file=open(os.environ["NAMES"], "a"))
        return self.ready[name]

    @staticmethod
    def globals_of(k):
        at = k.module.global_addresses()
        spans = [(at[v.name], at[v.name] + v.size) for v in k.module.globals]
        n = len(spans)
        return n, (U64 * n)(*(s[0] for s in spans)), (U64 * n)(*(s[1] for s in spans))

    def on_launch(self, name, grid, block, dynamic, args, cooperative):
        try:
            k = self.kernel(name.decode())
            library().emu_more_ranges(*self.globals_of(k))
            params = bytearray(k.entry.params_size)
            for i, (v, offset) in enumerate(k.entry.params):
                params[offset : offset + v.size] = ctypes.string_at(args[i], v.size)
            k.launch(grid[:3], block[:3], dynamic, bytes(params), cooperative, counting=self.counting)
        except BaseException as e:  # nothing may pass through C++
            self.error = e
            return 1
        return 0


class Bounded:
    """The module, whose kernels may touch the tensors they were given and nothing else."""

    def __init__(self, module, lib: Library, bounds=True):
        self._module, self._lib, self._bounds = module, lib, bounds

    def __getattr__(self, name):
        f = getattr(self._module, name)
        if not callable(f) or not name.endswith(("fwd", "bwd")) and "_" not in name:
            return f

        def call(*args, **kwargs):
            set_ranges(args if self._bounds else ())
            self._lib.error = None
            try:
                return f(*args, **kwargs)
            except RuntimeError as e:
                if self._lib.error:
                    raise self._lib.error from None
                raise e

        return call


def tensors(args):
    import torch

    for a in args:
        if isinstance(a, torch.Tensor):
            yield a
        elif isinstance(a, (tuple, list)):
            yield from tensors(a)


def set_ranges(args):
    """A tensor's own elements from the first to the last, which may be less than its storage."""
    spans = []
    for i, t in enumerate(tensors(args)):
        if t.numel():
            low = t.data_ptr()
            last = sum((n - 1) * s for n, s in zip(t.shape, t.stride(), strict=True))
            spans.append((low, low + (last + 1) * t.element_size(), f"tensor {i} {tuple(t.shape)}"))
    n = len(spans)
    names = (ctypes.c_char_p * n)(*(s[2].encode() for s in spans))
    library().emu_ranges(n, (U64 * n)(*(s[0] for s in spans)), (U64 * n)(*(s[1] for s in spans)), names)


CALLBACK = ctypes.CFUNCTYPE(
    ctypes.c_int, ctypes.c_char_p, ctypes.POINTER(ctypes.c_uint32), ctypes.POINTER(ctypes.c_uint32), ctypes.c_uint32,
    ctypes.POINTER(ctypes.c_void_p), ctypes.c_int,
)  # fmt: skip


def module(files, so: Path, bounds=True) -> Bounded:
    """`so`: nvcc's host objects and bindings linked with the virtual GPU's runtime; files: the PTX of csrc/."""
    lib = Library(files)
    loader = importlib.machinery.ExtensionFileLoader("_C_ptx", str(so))
    found = importlib.util.module_from_spec(importlib.util.spec_from_loader("_C_ptx", loader))
    loader.exec_module(found)
    raw = ctypes.CDLL(str(so))
    lib.callback = CALLBACK(lib.on_launch)
    raw.ptxemu_on_launch(lib.callback)
    return Bounded(found, lib, bounds)


def report(lib: Library, file=sys.stdout):
    for name, k in lib.ready.items():
        if not k.launches:
            continue
        c = k.classes()
        print(
            f"== {name[:150]}\n   {k.launches} launches, {k.blocks} blocks, {k.seconds:.3f} s, {c['warp_instructions']:,} warp instructions, "
            f"{c['active']:.1f} lanes active, {c['lane_instructions'] / max(k.seconds, 1e-9) / 1e6:.0f} M lane-instructions/s",
            file=file,
        )
        print("   " + ", ".join(f"{n} {c[n]:,}" for n in CLASSES if c[n]), file=file)
        macs = {e: int(n) for e, n in zip(ELEMENTS, k.totals[:5], strict=True) if n}
        if macs or k.totals[5]:
            print(f"   MACs {macs}, TMA bytes {k.totals[5]:,}", file=file)
        for s in k.by_site():
            s = dict(s)
            if s["ideal"] and s["units"] > 1.05 * s["ideal"]:
                what = "wavefronts" if "shared" in s["text"] or "matrix" in s["text"] else "sectors"
                print(
                    f"   line {s['line']:6} {s['units'] / s['ideal']:5.2f}x ideal {what} ({s['units']:,} for {s['runs']:,} requests, {s['lanes'] / s['runs']:.0f} lanes): {s['text'][:90]}",
                    file=file,
                )
            if s["failed"]:
                print(
                    f"   line {s['line']:6} {s['failed']:,} failed of {s['runs']:,} polls: {s['text'][:80]}", file=file
                )


def cpp_total():
    return Operations.seconds
