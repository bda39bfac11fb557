"""python -m tests.sass: the clock of kernels' machine code, without a GPU."""

import argparse
import re
import sys
from collections import Counter
from pathlib import Path

from tests import cuobjdump
from tests.sass.decode import Instruction, kernels
from tests.sass.flow import Flow
from tests.sass.regions import between, loops, segments
from tests.sass.walk import walk


def main() -> int:
    parser = argparse.ArgumentParser("python -m tests.sass", description=__doc__)
    add = parser.add_argument
    add("file", help="a cubin, an object of nvcc, or the built module")
    add("kernel", nargs="?", default="", help="regular expression for names of kernels (default: all)")
    add("--start", help="walk from the last opcode that this regular expression matches")
    add("--end", help="to the last one after it that this one matches")
    add("--without", default="(?!)", help="on a path without opcodes that this one matches")
    add("--lines", type=int, default=0, metavar="N", help="the N source lines with most instructions")
    add("--opcodes", type=int, default=0, metavar="N", help="the N most frequent opcodes")
    add("--segments", action="store_true", help="cut paths where wgmma is issued (ARRIVE) and waited for (DEPBAR)")
    add("--path", action="store_true", help="print the instructions")
    args = parser.parse_args()
    if bool(args.start) != bool(args.end):
        parser.error("--start and --end belong together")
    if not Path(args.file).is_file():
        parser.error(f"there is no file {args.file}")
    codes = kernels(args.file)
    for name, code in zip(cuobjdump.names([*codes]), codes.values(), strict=True):
        if re.search(args.kernel, name):
            print(name)
            for part, path in parts(code, args):
                show(part, path, args)
    return 0


def parts(code: list[Instruction], args: argparse.Namespace):
    flow = Flow(code)
    if args.start:
        path = between(flow, args.start, args.end, args.without)
        return [(f"{args.start} .. {args.end}", path)] if path else []
    named = [("whole", flow.whole()), *loops(flow)]
    if args.segments:
        named = [(f"{name}: {cut}", path) for name, path in named for cut, path in segments(path)]
    return named


def show(part: str, path: list[Instruction], args: argparse.Namespace) -> None:
    w = walk(path)
    share = "" if w.slots() is None else f"{w.slots():.0%}"
    busy = max(w.units, key=lambda unit: w.units[unit])
    print(
        f"  {part:24} {w.instructions:6} instructions {w.clocks:7} clocks {w.tensor:6} tensor {w.bytes:6} bytes "
        f"slots {share:>6}  {busy} {w.units[busy]}  CALL {w.calls} BSSY {w.branches} early {w.early} "
        f"predicates {w.predicates} spills {w.spills}  {path[0].address:#x}-{path[-1].address:#x}"
    )
    for n, key in ((args.lines, "line"), (args.opcodes, "opcode")):
        for what, times in Counter(getattr(i, key) for i in path).most_common(n):
            print(f"      {times:6} {what}")
    if args.path:
        print(*(f"      {i}" for i in path), sep="\n")


if __name__ == "__main__":
    sys.exit(main())
