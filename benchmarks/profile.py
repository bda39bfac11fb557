"""Counters of the kernels of csrc/ at Ling-mini's widths and few rows, from the virtual GPU: no GPU is needed.

    python -m benchmarks.profile [OP ...] [--lines 12] [--backend triton]

Prints for each kernel, and for its source lines with the most instructions or passes: instructions by class, mean
active lanes, sectors and wavefronts over the fewest possible, bytes of TMA, MACs over those that the op asks for, bytes
moved over the bytes of memory touched, repeated waits. tests/gpu/counters.py says what these are.
"""

import math
import re
import shutil
import sys
from collections import Counter
from collections.abc import Iterator

import torch

from tests import conftest, cuobjdump  # noqa: F401  conftest puts the virtual GPU under ling_kernels
from tests.gpu import build, triton_driver
from tests.gpu.counters import CLASSES, by_line, counting, of_lines
from tests.gpu.counters_page import LIMITS, label, wasteful
from tests.gpu.program import Emulated
from tests.pack import nvcc_release

from benchmarks.work import Backward, Point, evaluate, title  # isort: skip
from ling_kernels.backend import force  # isort: skip
from ling_kernels.commands import Parser, command  # isort: skip
from ling_kernels.errors import InputError  # isort: skip
from tests.cases import CASES, Case, args_of  # isort: skip

POINT = Point("mini", 40, 64)  # a pass of 40 tokens; a 64th of the experts
WIDEST = dict(N=3072, K=3072, H=2048, F=512, Hq=16)
LONGER = dict(q=(200, 70), lengths=(500, 70))  # sequences of several tiles
OTHERS = dict(  # ops for which the table names no such shape
    balance_bias_=dict(E=256),
    moe_decode=dict(T=2, E=256, H=2048, F=128, groups=8, group_topk=4, topk=8, Fs=512, fp8=True),
)
Row = dict[str, object]


def shapes(case: Case) -> list[dict]:
    """With Ling-mini's widths and few rows: the largest and the smallest in the table. [] where other ops do it all."""
    found = [OTHERS[case.op.__name__]] if case.op.__name__ in OTHERS else [
        *((case.ling and case.ling(POINT)) or ()),
        *(s for s in case.hopper or () if all(s.get(k, 0) <= n for k, n in WIDEST.items())),
    ]  # fmt: skip
    found = [s | {k: v for k, v in LONGER.items() if k in s} | (dict(P=512) if "R" in s else {}) for s in found]
    found.sort(key=lambda s: math.prod(n for n in s.values() if isinstance(n, int)))
    return [found[-1], *([found[0]] if len(found) > 1 else [])] if found else []


def profiles(only: tuple[str, ...] = (), backend: str = "cuda") -> Iterator[tuple[Row, dict[str, Counter]]]:
    """For each kernel of each op, a row of counts, and counts by source line. Of all ops, or of these."""
    for case in CASES:
        if backend not in case.backends or only and case.op.__name__ not in only:
            continue
        seen = set()
        for shape in shapes(case):
            for phase, macs, kernels in phases(case, shape, backend):
                for row, lines in rows(kernels, macs, backend):
                    if (phase, row["kernel"]) not in seen:  # else it was there at the larger shape
                        yield dict(op=title(case, shape) + phase) | row, lines
                    seen.add((phase, row["kernel"]))


def phases(case: Case, shape: dict, backend: str) -> Iterator[tuple[str, float, list[Emulated]]]:
    """The kernels of forward and backward, and the MACs that these ask for."""
    macs = evaluate(case.flops, shape) / 2
    torch.manual_seed(0)
    with force("torch"):
        args = args_of(case, shape, case.dtypes[0])
    with force(backend), counting() as kernels:
        call = Backward(case, shape, args)
    yield "", macs, kernels
    if call.outs:
        with force(backend), counting() as kernels:
            call.run()
        yield ", backward", macs * case.backward_flops, kernels


def rows(kernels: list[Emulated], macs: float, backend: str) -> Iterator[tuple[Row, dict[str, Counter]]]:
    names = cuobjdump.names([k.entry.name for k in kernels])
    total = sum(sum(k.totals[:5]) for k in kernels)
    for kernel, name in zip(kernels, names, strict=True):
        if kernel.entry.name.startswith("_Z") == (backend == "cuda"):
            lines, (*by_type, owed) = by_line(kernel), kernel.totals
            share = macs * sum(by_type) / total if total else 0
            found = of_lines(lines) | dict(owed=owed, macs=sum(by_type), macs_owed=round(share))
            yield dict(kernel=name) | found | dict(lines=wasteful(lines)), lines


def show(row: Row, lines: dict[str, Counter], n: int) -> None:
    """A kernel, and its n lines with the most instructions or wasted passes."""
    print(f"\n{row['op']}: {row['kernel']}\n    {summary(row)}")
    waste = {s: c["instructions"] + 8 * sum(c[k] - c[f"least_{k}"] for k in LIMITS) for s, c in lines.items()}
    for source in sorted(lines, key=waste.__getitem__, reverse=True)[:n]:
        number = ", ".join(re.findall(r":(\d+)", source))
        print(f"  {number:>10} {label(source)[:110]}\n{'':12} {summary(lines[source])}")


def summary(c) -> str:
    """Of a row, or of the counts of a line."""
    n = c["instructions"]
    parts = [f"{n} instructions", *(f"{c[k]} {k}" for k in CLASSES if c[k])]
    parts += [f"{c['lanes'] / n:.1f} lanes"] if n else []
    parts += [f"{c[k]} {k} ({c[k] / max(c[f'least_{k}'], 1):.2f})" for k in LIMITS if c[k]]
    parts += [f"{c[k]} {name}" for k, name in (("bulk_bytes", "bytes of TMA"), ("polls", "failed waits")) if c[k]]
    if "macs" in c and c["macs"]:
        parts.append(f"{c['macs']} MACs" + (f" ({c['macs'] / c['macs_owed']:.2f})" if c["macs_owed"] else ""))
    return ", ".join([*parts, *([f"{c['moved']} bytes moved ({c['moved'] / c['owed']:.2f})"] if "moved" in c else [])])


def table() -> dict:
    """What benchmarks/results/counters.json has."""
    return dict(cuda=nvcc_release(shutil.which("nvcc")), rows=[row for row, _ in profiles()])


@command
def main(argv: list[str]) -> int:
    parser = Parser(prog="python -m benchmarks.profile", description=__doc__.split("\n")[0])
    parser.add_argument("op", nargs="*", help="all by default")
    parser.add_argument("--lines", type=int, default=12, help="of the source, for each kernel")
    parser.add_argument("--backend", choices=("cuda", "triton"), default="cuda")
    options = parser.parse_args(argv)
    known = {case.op.__name__ for case in CASES if options.backend in case.backends and shapes(case)}
    if unknown := set(options.op) - known:
        raise InputError(f"no kernels of {', '.join(sorted(unknown))}; there are {', '.join(sorted(known))}")
    if torch.cuda.is_available():
        raise InputError("there is a GPU: ncu counts there")
    if missing := build.missing() if options.backend == "cuda" else triton_driver.missing():
        raise InputError(f"the virtual GPU needs {missing}")
    for row, lines in profiles(tuple(options.op), options.backend):
        show(row, lines, options.lines)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
