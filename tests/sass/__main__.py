"""python -m tests.sass: the clock of kernels' machine code, without a GPU."""

import re
import subprocess
import sys
from argparse import Namespace
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from ling_kernels.commands import Parser, command
from ling_kernels.errors import InputError
from tests import cuobjdump
from tests.sass.decode import Instruction, kernels
from tests.sass.flow import Flow
from tests.sass.regions import between, loops, segments, whole
from tests.sass.walk import walk


@command
def main(argv: Sequence[str] | None = None) -> None:
    parser = Parser("python -m tests.sass", description=__doc__.partition(": ")[2])
    add = parser.add_argument
    add("file", help="a cubin, an object of nvcc, or the built module")
    add("kernel", nargs="?", default="", help="regular expression for names of kernels (default: all)")
    add("--start", help="walk from the last opcode that this regular expression matches")
    add("--end", help="to the last one after it that this one matches")
    add("--without", default="(?!)", help="on a path without opcodes that this one matches")
    add("--least", action="store_true", help="with --start: leave out loads that can be")
    add("--lines", type=int, default=0, metavar="N", help="the N source lines with most instructions")
    add("--opcodes", type=int, default=0, metavar="N", help="the N most frequent opcodes")
    add("--segments", action="store_true", help="cut paths where wgmma is issued (ARRIVE) and waited for (DEPBAR)")
    add("--path", action="store_true", help="print the instructions")
    args = parser.parse_args(argv)
    if bool(args.start) != bool(args.end):
        raise InputError("--start and --end belong together")
    if not Path(args.file).is_file():
        raise InputError(f"there is no file {args.file}")
    if not cuobjdump.tool():
        raise InputError("there is no cuobjdump: it comes with Triton and with the CUDA toolkit")
    try:
        codes = kernels(args.file)
        for pattern in filter(None, (args.kernel, args.start, args.end, args.without)):
            re.compile(pattern)
    except subprocess.CalledProcessError as error:
        raise InputError(f"{args.file} holds no code of sm_90: {error.stderr or error}") from error
    except re.error as error:
        raise InputError(f"{error.pattern!r} is no regular expression: {error}") from error
    found = dict(zip(cuobjdump.names([*codes]), codes.values(), strict=True))
    if not (chosen := [name for name in found if re.search(args.kernel, name)]):
        raise InputError(f"no kernel of {args.file} matches {args.kernel!r}; it has {', '.join(found) or 'none'}")
    for name in chosen:
        print(name)
        for part, path in parts(found[name], args):
            show(part, path, args)


def parts(code: list[Instruction], args: Namespace) -> list[tuple[str, list[Instruction]]]:
    flow = Flow(code, args.without)
    if args.start:
        path = between(flow, args.start, args.end, args.least)
        return [(f"{args.start} .. {args.end}", path)] if path else []
    named = [("whole", whole(flow)), *loops(flow)]
    if args.segments:
        named = [(f"{name}: {cut}", path) for name, path in named for cut, path in segments(path)]
    return named


def show(part: str, path: list[Instruction], args: Namespace) -> None:
    w = walk(path)
    (unit, busy), share = w.busiest, w.share
    cells = [f"{w.instructions} instructions", f"{w.clocks} clocks", f"{w.tensor} tensor", f"{w.bytes} bytes"]
    cells += [f"busiest: {unit} {busy}", "" if share is None else f"share {share:.0%}"]
    names = dict(CALL=w.calls, BSSY=w.branches, early=w.early, pred=w.predicates, spills=w.spills)
    cells += [f"{name} {n}" for name, n in names.items()]
    print(f"  {part:26}", *(f"{cell:>18}" for cell in cells[:5]), *cells[5:], f"from {path[0].address:#x}")
    for n, key in ((args.lines, "line"), (args.opcodes, "opcode")):
        for what, times in Counter(getattr(i, key) for i in path).most_common(n):
            print(f"      {times:6} {what}")
    if args.path:
        print(*(f"      {i}" for i in path), sep="\n")


if __name__ == "__main__":
    sys.exit(main())
