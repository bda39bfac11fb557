"""Programs of the virtual GPU: compiles the operations that are new, launches kernels, counts what they did."""

import ctypes
import functools
import hashlib
import math
import os
import pickle
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from . import ptx
from .translate import Translator

MACHINE = Path(__file__).parent / "machine"
CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ling_kernels/gpu"
MARCH = os.environ.get("LING_GPU_MARCH", "native")  # g++'s -march; x86-64-v3 is AVX2
FLAGS = (
    "-std=c++20 -O2 -ffp-contract=off -fno-strict-aliasing -fno-trapping-math -fno-math-errno -fwrapv -Wno-psabi "
    "-Wno-ignored-attributes -fPIC"
).split()
PRELUDE = """#include "operations.h"
#define R(T, i) (*(T*)(regs + (i)))
#define OP extern "C" __attribute__((visibility("default"))) void
#define BEGIN const Special& sr = base(w).sr; const Pred& M = *(const Pred*)wide; (void)sr, (void)M;
"""
SITE = ("sectors", "least_sectors", "wavefronts", "least_wavefronts", "bulk_bytes", "polls")
# What a launch checks, does as Hopper's tensor cores do, or takes for ordered as CUTLASS does
RACES, INIT_FENCES, UNINITIALISED, NARROW_SUMS, WARPGROUPS = 1, 2, 4, 8, 16
U64 = ctypes.c_uint64
three = ctypes.c_uint32 * 3


def setting(name: str, default: int) -> int:
    """LING_GPU_SEED: 0 runs blocks and warps in order, others shuffle. LING_GPU_RACES: what is checked, see above.

    LING_GPU_THREADS: host threads that run blocks where nothing is checked. LING_GPU_COUNT=1: counters.py reads.
    """
    return int(os.environ.get(f"LING_GPU_{name}", default))


def structure(name_: str, **fields):
    return type(name_, (ctypes.Structure,), dict(_fields_=list(fields.items())))


BasicBlock = structure(
    "BasicBlock", **dict.fromkeys("first count line next target predicate negated".split(), ctypes.c_int)
)
Operation = structure("Operation", run=ctypes.c_void_p, operands=ctypes.c_void_p)
Site = structure("Site", line=ctypes.c_int, text=ctypes.c_char_p, source=ctypes.c_char_p, bytes=ctypes.c_int)
Kernel = structure(
    "Kernel", name=ctypes.c_char_p, blocks=ctypes.c_int, sites=ctypes.c_int, block=ctypes.POINTER(BasicBlock),
    code=ctypes.POINTER(Operation), site=ctypes.POINTER(Site),
    **dict.fromkeys("registers params shared local".split(), ctypes.c_size_t), pool=ctypes.c_int,
)  # fmt: skip
Request = structure(
    "Request", kernel=ctypes.POINTER(Kernel), grid=three, block=three, cluster=three, dynamic=ctypes.c_uint32,
    params=ctypes.c_char_p, seed=U64, **dict.fromkeys("cooperative overlaps checks threads".split(), ctypes.c_int),
    **dict.fromkeys("block_runs block_lanes sites totals".split(), ctypes.POINTER(U64)),
)  # fmt: skip


@functools.cache
def processor() -> str:
    """What -march=native stands for here."""
    try:
        return next(x for x in Path("/proc/cpuinfo").read_text().splitlines() if x.startswith("flags"))
    except (OSError, StopIteration):
        return ""


def compiled(stem: str, sources: dict[str, str]) -> Path:
    """C++ files (name: text) as a shared library of the cache, named by its content; their text lies beside it."""
    if shutil.which("g++") is None:
        raise FileNotFoundError("the virtual GPU needs g++")
    headers = "".join(h.read_text() for h in sorted(MACHINE.glob("*.h")))
    flags = [*FLAGS, f"-march={MARCH}"]
    key = "\0".join([*sources.values(), headers, *flags, processor()])
    so = CACHE / f"{stem}-{hashlib.sha256(key.encode()).hexdigest()[:16]}.so"
    if not so.exists():
        CACHE.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=CACHE) as tmp, ThreadPoolExecutor(os.cpu_count()) as pool:
            for name, text in sources.items():
                Path(tmp, name).write_text(text)
            command = ["g++", *flags, f"-I{MACHINE}", "-c"]
            run = functools.partial(subprocess.run, check=True, cwd=tmp)
            list(pool.map(lambda name: run([*command, name, "-o", f"{name}.o"]), sources))
            run(["g++", "-shared", "-pthread", *(f"{name}.o" for name in sources), "-o", "all.so"])
            Path(tmp, "all.cpp").write_text("".join(sources.values()))
            Path(tmp, "all.cpp").rename(so.with_suffix(".cpp"))
            Path(tmp, "all.so").rename(so)
    return so


@functools.cache
def library() -> ctypes.CDLL:
    sources = {f.name: f.read_text() for f in sorted(MACHINE.glob("*.cpp"))}
    lib = ctypes.CDLL(str(compiled("machine", sources)), mode=ctypes.RTLD_GLOBAL)
    lib.gpu_launch.restype = ctypes.c_char_p
    return lib


class Operations:
    """The functions that instructions are made of, compiled when first met: libraries of the cache for all kernels."""

    known: dict[str, int] = {}  # symbol: address

    @staticmethod
    @functools.cache
    def symbol(text: str) -> str:
        return "op_" + hashlib.sha256(text.encode()).hexdigest()[:16]

    @classmethod
    def addresses(cls, texts: Iterable[str]) -> dict[str, int]:
        library()
        key = "\0".join([PRELUDE, (MACHINE / "operations.h").read_text(), (MACHINE / "lanes.h").read_text(),
                         (MACHINE / "simd.h").read_text(), *FLAGS, MARCH, processor()])  # fmt: skip
        stem = "operations-" + hashlib.sha256(key.encode()).hexdigest()[:8]
        if not cls.known:
            for so in CACHE.glob(f"{stem}-*.so"):
                cls.load(so)
        missing = sorted({cls.symbol(t): t for t in texts if cls.symbol(t) not in cls.known}.items())
        if missing:
            function = (
                "OP {}(Warp& w, char* regs, const int64_t* s, uint32_t m, const int32_t* wide) {{ BEGIN\n  {}\n}}\n"
            )
            cls.load(compiled(stem, {"operations.cpp": PRELUDE + "".join(function.format(*item) for item in missing)}))
        return cls.known

    @classmethod
    def load(cls, so: Path):
        lib = ctypes.CDLL(str(so))
        for name in re.findall(r"^OP (op_\w+)", so.with_suffix(".cpp").read_text(), re.MULTILINE):
            cls.known[name] = ctypes.cast(getattr(lib, name), ctypes.c_void_p).value


def translated(module: ptx.Module, name: str) -> tuple:
    """An entry without its code; the texts of its operations; blocks, whose instructions number them; sites; sizes.

    Kept in the cache, but for entries with addresses of this process.
    """
    names = "ptx flow syntax translate translate_arithmetic translate_memory translate_tensor".split()
    files = [Path(__file__).with_name(f"{f}.py").read_text() for f in names]
    key = hashlib.sha256("\0".join([name, module.text, *files]).encode()).hexdigest()[:24]
    file = CACHE / f"{key}.program"
    if file.exists():
        return pickle.loads(file.read_bytes())
    entry = module.entry(name)
    translator = Translator(entry, module)
    program, number = translator.program(), {}
    for _, code, *_ in program:
        code[:] = [(number.setdefault(text, len(number)), operands) for text, operands in code]
    entry.blocks, entry.registers, entry.labels = [], {}, {}
    sizes = translator.size, translator.shared_size, translator.local_size
    result = entry, list(number), program, translator.sites, sizes
    if not translator.has_addresses:
        CACHE.mkdir(parents=True, exist_ok=True)
        part = file.with_suffix(f".{os.getpid()}")
        part.write_bytes(pickle.dumps(result))
        part.rename(file)
    return result


class Emulated:
    """One entry of a module, ready to run. Raises NotImplementedError for PTX that the machine does not know."""

    def __init__(self, module: ptx.Module, name: str):
        self.module = module
        self.entry, texts, program, sites, sizes = translated(module, name)
        known = Operations.addresses(texts)
        functions = [known[Operations.symbol(t)] for t in texts]
        flat = [instruction for _, code, *_ in program for instruction in code]
        values = [v for _, operands in flat for v in operands]
        self.operands = (ctypes.c_int64 * (len(values) + 1))(*values)
        self.code, at = (Operation * (len(flat) + 1))(), ctypes.addressof(self.operands)
        for operation, (text, operands) in zip(self.code, flat, strict=False):
            operation.run, operation.operands = functions[text], at
            at += 8 * len(operands)
        self.basic_blocks, first = (BasicBlock * len(program))(), 0
        for i, (line, code, *rest) in enumerate(program):
            self.basic_blocks[i] = BasicBlock(first, len(code), line, *rest)
            first += len(code)
        self.site_info = (Site * (len(sites) + 1))(*(Site(n, t.encode(), src.encode(), b) for n, t, src, b in sites))
        self.kernel = Kernel(
            name.encode(), len(program), len(sites), self.basic_blocks, self.code, self.site_info, sizes[0],
            self.entry.params_size, *sizes[1:], 0,
        )  # fmt: skip
        self.reset()

    counted: dict["Emulated", None] = {}  # those that count launches

    def reset(self):
        """Sets all counters to zero."""
        Emulated.counted.pop(self, None)
        k = self.kernel
        self.runs, self.lanes = (U64 * (k.blocks + 1))(), (U64 * (k.blocks + 1))()
        self.sites = (U64 * (len(SITE) * (k.sites + 1)))()
        # MACs of e4m3, e5m2, bf16, f16, tf32; bytes of global memory that launches read, and that they wrote, once each
        self.totals = (U64 * 6)()

    def launch(self, grid, block, dynamic: int, params: bytes, cooperative=False, seed=None, cluster=None,
               overlaps=False, checks=None):  # fmt: skip
        """Runs a grid of blocks; raises RuntimeError for what the machine finds wrong. params: as PTX lays them out."""
        cluster = cluster or (*self.entry.directives.get("reqnctapercluster", ()), 1, 1, 1)[:3]
        if error := self.refused(grid, block, dynamic, cluster):
            raise RuntimeError(error)
        if setting("COUNT", 0) and self not in Emulated.counted:
            self.reset()  # launches that do not count have added to the totals
        # Blocks run one after another, which hides what they hand over too early: not where they wait or hand over.
        together = cooperative or (".acq_rel.gpu" in self.module.text and math.prod(grid) <= 64)
        if not overlaps:
            del HELD[:-1]
        request = Request(
            ctypes.pointer(self.kernel), three(*grid), three(*block), three(*cluster), dynamic, params,
            setting("SEED", 0) if seed is None else seed, int(together), int(overlaps),
            setting("RACES", RACES) if checks is None else checks, setting("THREADS", 1),
            *((self.runs, self.lanes, self.sites) if setting("COUNT", 0) else (None, None, None)), self.totals,
        )  # fmt: skip
        error = library().gpu_launch(ctypes.byref(request))
        if setting("COUNT", 0):
            Emulated.counted[self] = None
        if error:
            raise RuntimeError(error.decode())

    def refused(self, grid, block, dynamic: int, cluster) -> str:
        """Why a GPU would not run such a launch, or ""; sets the registers that a thread begins with."""
        d, threads, shared = self.entry.directives, math.prod(block), self.kernel.shared + dynamic
        limit = math.prod(d.get("maxntid", d.get("reqntid", [1024])))
        if threads > limit or "reqntid" in d and threads != limit:
            return f"{threads} threads a block; the kernel was compiled for {limit}"
        if shared > 227 << 10:
            return f"{shared} bytes of shared memory a block: a GPU has {227 << 10}"
        if any(g % c for g, c in zip(grid, cluster, strict=True)) or math.prod(cluster) > 16:
            return f"a grid of {tuple(grid)} blocks in clusters of {tuple(cluster)}"
        self.kernel.pool = 0
        if "maxntid" in d or "reqntid" in d or "maxnreg" in d:  # as ptxas divides 65,536 registers
            blocks = max(d.get("minnctapersm", [1])[0], 1)
            share = 65536 // (-(-limit // 128) * 128 * blocks) // 8 * 8
            self.kernel.pool = d.get("maxnreg", [min(share, 255)])[0]
        return ""


def plain(name: str) -> str:
    """A mangled name without what nvcc makes of an anonymous namespace in a certain build."""
    return re.sub(r"\d+_GLOBAL__N__[0-9a-f]{8}_\d+_\w+?_cu_[0-9a-f]{8}", "12_GLOBAL__N_1", name)


class Library:
    """Kernels by their plain names, of files of PTX; translated when first launched."""

    def __init__(self, files: Iterable[Path]):
        self.modules = dict.fromkeys(map(str, files))
        self.where = {}
        for f in self.modules:
            for name in re.findall(r"\.entry\s+([\w$]+)\s*\(", Path(f).read_text()):
                self.where.setdefault(plain(name), (f, name))
        self.ready, self.error = {}, None

    def kernel(self, name: str) -> Emulated:
        name = plain(name)
        if name not in self.ready:
            file, own = self.where[name]
            self.modules[file] = self.modules[file] or ptx.Module(Path(file).read_text())
            self.ready[name] = Emulated(self.modules[file], own)
        return self.ready[name]

    def on_launch(self, name, grid, block, dynamic, args, attributes: int) -> int:
        """A launch of the host's. attributes: 1 cooperative, 2 overlaps the kernel ahead; bits 8 to 31: the cluster."""
        try:
            k = self.kernel(name.decode())
            addresses = k.module.global_addresses()
            add_ranges([(addresses[v.name], addresses[v.name] + v.size, v.name) for v in k.module.globals])
            params = bytearray(k.entry.params_size)
            for i, (v, offset) in enumerate(k.entry.params):
                params[offset : offset + v.size] = ctypes.string_at(args[i], v.size)
            cluster = [attributes >> 8 * i & 255 for i in (1, 2, 3)]
            k.launch(
                grid[:3], block[:3], dynamic, bytes(params), attributes & 1,
                cluster=cluster if all(cluster) else None, overlaps=attributes & 2,
            )  # fmt: skip
        except BaseException as e:  # nothing may pass through C++
            self.error = e
            return 1
        return 0


class Bounded:
    """The module, whose kernels may touch the tensors they were given and nothing else."""

    def __init__(self, module, lib: Library):
        self._module, self._lib = module, lib

    def __dir__(self) -> list[str]:
        return dir(self._module)

    def __getattr__(self, name: str):
        function = getattr(self._module, name)
        if not callable(function) or "_" not in name:
            return function

        def call(*args, **kwargs):
            set_ranges([args, *kwargs.values()])
            self._lib.error = None
            try:
                return function(*args, **kwargs)
            except RuntimeError as e:
                if self._lib.error:
                    raise self._lib.error from None
                raise e

        return call


def tensors(args) -> Iterator[torch.Tensor]:
    for a in args:
        if isinstance(a, torch.Tensor):
            yield a
        elif isinstance(a, (tuple, list)):
            yield from tensors(a)


HELD: list = []  # memory of the launches that may overlap the next one, so that no new tensor takes it over


def set_ranges(args):
    """Launches may touch these tensors' own elements, from the first to the last; without tensors, all memory."""
    spans = []
    HELD.append([t.untyped_storage() for t in tensors(args)])
    for i, t in enumerate(tensors(args)):
        if t.numel():
            last = sum((n - 1) * s for n, s in zip(t.shape, t.stride(), strict=True))
            spans.append((t.data_ptr(), t.data_ptr() + (last + 1) * t.element_size(), f"tensor {i} {tuple(t.shape)}"))
    apart = []  # views of the same memory count as one
    for low, high, name in sorted(spans):
        if apart and low < apart[-1][1]:
            apart[-1] = apart[-1][0], max(high, apart[-1][1]), f"{apart[-1][2]} and {name}"
        else:
            apart.append((low, high, name))
    add_ranges(apart, replace=True)


def add_ranges(spans: list[tuple[int, int, str]], replace: bool = False):
    n = len(spans)
    names = (ctypes.c_char_p * n)(*(s[2].encode() for s in spans))
    library().gpu_ranges(n, (U64 * n)(*(s[0] for s in spans)), (U64 * n)(*(s[1] for s in spans)), names, int(replace))


CALLBACK = ctypes.CFUNCTYPE(
    ctypes.c_int, ctypes.c_char_p, ctypes.POINTER(ctypes.c_uint32), ctypes.POINTER(ctypes.c_uint32), ctypes.c_uint32,
    ctypes.POINTER(ctypes.c_void_p), ctypes.c_int,
)  # fmt: skip
