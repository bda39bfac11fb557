"""Builds every Triton kernel of the table for Hopper, without a GPU, as the JIT would build it there.

    python -m tests.hopper OUT.json [OP ...]    at the shapes that a Case names in `hopper`; of all ops, or of these

The ops run as always, but a launch does not run: it records its kernel, the types, divisibility by 16 and constants of
its arguments, warps and stages. Then each is compiled for sm_90: cuobjdump reports registers, spills and shared
memory, tests/sass the clocks of its code. Each op runs as on an H200 and as on an H20, whose tiles may differ. Triton's
cache serves repeated builds.
"""

import json
import re
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from multiprocessing import get_context
from pathlib import Path

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

from tests.cuobjdump import resources
from tests.sass.clocks import rows_of
from tests.sass.decode import kernels

SMS = dict(H200=132, H20=78)
OPTIONS = ("num_warps", "num_stages", "num_ctas", "maxnreg", "enable_fp_fusion")
TYPES = {
    torch.float64: "fp64", torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16",
    torch.float8_e4m3fn: "fp8e4nv", torch.float8_e5m2: "fp8e5", torch.int64: "i64", torch.int32: "i32",
    torch.int16: "i16", torch.int8: "i8", torch.uint8: "u8", torch.bool: "i1",
}  # fmt: skip


def specialize(value, constexpr: bool) -> tuple[str, object, bool]:
    """As the JIT sees an argument: its type, its value where that is compiled in, and whether 16 divides it."""
    if constexpr or value is None:
        return "constexpr", value, False
    if isinstance(value, Tensor):
        return "*" + TYPES[value.dtype], None, value.data_ptr() % 16 == 0
    if isinstance(value, bool):
        return "i1", None, False
    if isinstance(value, int):
        if value == 1:
            return "constexpr", 1, False
        return ("i32" if -(2**31) <= value < 2**31 else "i64"), None, value % 16 == 0
    return "fp32", None, False


def bind(fn: JITFunction, args, kwargs) -> tuple[dict, dict, dict]:
    """Of a launch: values by name, what `specialize` makes of each, and the options of the compiler."""
    options = {k: kwargs[k] for k in OPTIONS if k in kwargs}
    values = {p.name: p.default for p in fn.params} | dict(zip((p.name for p in fn.params), args, strict=False))
    values |= {k: v for k, v in kwargs.items() if k not in options}
    return values, {p.name: specialize(values[p.name], p.is_constexpr) for p in fn.params}, options


def source_of(fn: JITFunction, parts: dict) -> ASTSource:
    """What triton.compile takes, of a launch whose arguments are `parts`."""
    signature = {n: kind for n, (kind, _, _) in parts.items()}
    names = list(parts)
    constants = {(names.index(n),): value for n, (kind, value, _) in parts.items() if kind == "constexpr"}
    attrs = {(names.index(n),): [["tt.divisibility", 16]] for n, (_, _, divides) in parts.items() if divides}
    return ASTSource(fn=fn, signature=signature, constexprs=constants, attrs=attrs)


class Launches:
    """While open, every launch of a Triton kernel is recorded in `seen` and nothing runs."""

    def __init__(self):
        self.seen = {}

    def __enter__(self):
        self.run = JITFunction.run

        def record(fn, *args, grid, warmup, **kwargs):
            _, parts, options = bind(fn, args, kwargs)
            key = (fn.__name__, *((n, *map(str, part)) for n, part in parts.items()), *sorted(options.items()))
            self.seen[key] = (fn, parts, options)

        JITFunction.run = record
        return self

    def __exit__(self, *_):
        JITFunction.run = self.run


@contextmanager
def on_gpu(sms: int):
    """While open, every op chooses its tiles as on a GPU with that many SMs."""
    modules = [m for name, m in sys.modules.items() if name.startswith("ling_kernels.ops.")]
    originals = [(m, m.multiprocessors) for m in modules if hasattr(m, "multiprocessors")]
    for module, _ in originals:
        module.multiprocessors = lambda device: sms
    try:
        yield
    finally:
        for module, original in originals:
            module.multiprocessors = original


def launches(only: tuple[str, ...]) -> list[tuple[dict, tuple]]:
    """Every launch at the table's `hopper` shapes: a row of the table, and its kernel, arguments and options."""
    from ling_kernels.backend import force
    from tests.cases import CASES, args_of
    from tests.test_ops import outputs_and_grads

    found = {}
    for case in CASES:
        if not (builds(case) and (not only or case.op.__name__ in only)):
            continue
        for dtype in case.dtypes:
            for shape in case.hopper or case.shapes[:-1]:
                for gpu, sms in SMS.items():
                    with Launches() as recorded, force("triton"), on_gpu(sms):
                        outputs_and_grads(case, case.op, args_of(case, shape, dtype))
                    for key, launch in recorded.seen.items():
                        row, _ = found.setdefault(
                            key, (dict(ops={}, gpus={}, dtype=str(dtype)[6:], shape=shape), launch)
                        )
                        row["ops"][case.op.__name__] = row["gpus"][gpu] = True
    for row, _ in found.values():
        row.update(ops=[*row["ops"]], gpus=[*row["gpus"]])
    return [*found.values()]


def builds(case) -> bool:
    """Whether it has Triton kernels of its own; hopper=None: its kernels all belong to other ops."""
    return "triton" in case.backends and case.hopper is not None


def build(fn: JITFunction, parts: dict, options: dict) -> dict:
    """Compile one launch for sm_90; its resources."""
    built = triton.compile(source_of(fn, parts), target=GPUTarget("cuda", 90, 32), options=options)
    ptx = built.asm["ptx"]
    fixed = {p.name: parts[p.name][1] for p in fn.params if p.is_constexpr}
    return dict(
        kernel=fn.__name__, constants=fixed, **usage(fn.__name__, built.asm["cubin"]),
        shared=built.metadata.shared, warps=built.metadata.num_warps, stages=built.metadata.num_stages,
        wgmma=ptx.count("wgmma.mma_async"), tma=ptx.count("cp.async.bulk.tensor"),
        float_atomics=len(re.findall(r"\b(?:atom|red)\.\S*\.(?:f16|bf16|f32|f64)\S*", ptx)),
        dot="tt.dot" in built.asm["ttir"],
    )  # fmt: skip


def usage(name: str, cubin: bytes) -> dict:
    """Resources, and `clocks`: the rows of tests/sass/clocks.py."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        (found,) = resources(file.name).values()
        (code,) = kernels(file.name).values()
    return dict(registers=found["registers"], spilled=found["spilled"], clocks=rows_of(name, code))


def build_number(i: int) -> dict:
    """Runs in a worker that was forked when LAUNCHES was complete: a launch cannot be pickled."""
    row, launch = LAUNCHES[i]
    try:
        return row | build(*launch)
    except Exception as error:  # the table lists every launch that does not build
        return row | dict(kernel=launch[0].__name__, error=f"{error!r} with {launch[1:]}")


LAUNCHES: list[tuple[dict, tuple]] = []


def main(out: str, *only: str) -> None:
    LAUNCHES.extend(launches(only))
    with ProcessPoolExecutor(2, get_context("fork")) as pool:
        rows = list(pool.map(build_number, range(len(LAUNCHES))))
    Path(out).write_text(json.dumps(dict(triton=triton.__version__, kernels=rows), indent=1) + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
