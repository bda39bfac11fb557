"""Machine code of sm_90: instructions with their scheduling fields, as nvdisasm prints them.

An instruction has 128 bits. Bits 105 to 121 hold what the compiler tells the scheduler (Jia et al. 2018, "Dissecting
the NVIDIA Volta GPU Architecture via Microbenchmarking", section 2.1; sm_90 has kept it):

    105-108  stall  clocks before the warp's next instruction may issue
    110-112  sets   the scoreboard that is busy until the result is written; 7: none
    113-115  frees  the scoreboard that is busy until the operands have been read; 7: none
    116-121  waits  the scoreboards that must not be busy, one bit each

A scoreboard stands for results whose latency the compiler does not know: memory, special functions, shuffles.
"""

import importlib.util
import re
import subprocess
import tempfile
from functools import cache, lru_cache
from pathlib import Path
from typing import NamedTuple

from tests import cuobjdump

LANES = 32


class Instruction(NamedTuple):
    address: int  # bytes from the kernel's start
    guard: str  # the predicate under which it runs, e.g. "!P1"; "" without one
    base: str  # e.g. "LDG"
    opcode: str  # with its modifiers, e.g. "LDG.E.128"
    operands: str
    stall: int
    sets: int | None
    frees: int | None
    waits: tuple[int, ...]
    targets: tuple[int, ...]  # addresses that a branch may jump to
    line: str  # "file:line" of the source; "" where the code has no line numbers

    @property
    def modifiers(self) -> list[str]:
        return self.opcode.split(".")[1:]

    def __str__(self) -> str:
        guard = f"@{self.guard} " if self.guard else ""
        return f"{self.address:#06x} {guard}{self.opcode} {self.operands}".rstrip()


@cache
def nvdisasm() -> str | None:
    """nvdisasm of the installed Triton, which every environment of this package has."""
    triton = importlib.util.find_spec("triton")
    found = [Path(p, "backends/nvidia/bin/nvdisasm") for p in (triton.submodule_search_locations if triton else ())]
    return next((str(p) for p in found if p.exists()), None)


def kernels(file: Path | str) -> dict[str, list[Instruction]]:
    """{mangled name: code} of every kernel in a cubin, or in an object or module that nvcc built."""
    with tempfile.TemporaryDirectory() as tmp:
        cubins = [Path(file).resolve()]
        if cubins[0].read_bytes()[18:20] != b"\xbe\x00":  # ELF's machine: EM_CUDA is 190
            subprocess.run(
                [cuobjdump.tool(), "-xelf", "all", *cubins], cwd=tmp, check=True, capture_output=True, text=True
            )
            cubins = sorted(Path(tmp).glob("*.cubin"))
        found = {}
        for cubin in cubins:
            found |= parse(disassemble(cubin))
        return found


def disassemble(cubin: Path | str) -> str:
    return subprocess.run([nvdisasm(), "-c", "-hex", "-g", cubin], capture_output=True, text=True, check=True).stdout


SECTION = re.compile(r"\.section\s+\.text\.([^,\s]+)")
LABEL = re.compile(r"([.$\w]+):\s*$")
LINE = re.compile(r'//## File "(?:[^"]*/)?([^"/]+)", line (\d+)')
CODE = re.compile(r"/\*([0-9a-f]{4,})\*/\s+(.*?)\s*;\s*/\* 0x([0-9a-f]{16}) \*/")
HIGH = re.compile(r"^\s*/\* 0x([0-9a-f]{16}) \*/")
PARTS = re.compile(r"(?:@(!?U?P[T\d]) +)?(\S+)\s*(.*)")
JUMP = re.compile(r"`\(([^)]+)\)")
TABLE = re.compile(r'BRANCH_TARGETS ([^"]+)"')  # of an indirect branch, from nvdisasm's data flow analysis


def parse(text: str) -> dict[str, list[Instruction]]:
    """{mangled name: code} from the output of nvdisasm -c -hex -g."""
    sections, rows, labels, line, low = {}, None, {}, "", None
    for text_line in text.splitlines():
        if found := CODE.search(text_line):
            low = found
        elif low and (found := HIGH.match(text_line)):
            rows.append((int(low[1], 16), low[2], int(found[1], 16) >> 41, line))  # bit 105 of 128 is bit 41 of 64
            low = None
        elif found := LINE.search(text_line):
            line = f"{found[1]}:{found[2]}"
        elif found := LABEL.match(text_line.strip()):
            labels[found[1]] = rows[-1][0] + 16 if rows else 0
        elif found := SECTION.search(text_line):
            rows, labels, line = [], {}, ""
            sections[found[1]] = rows, labels
    return {name: [instruction(*row, labels) for row in rows] for name, (rows, labels) in sections.items() if rows}


def instruction(address: int, text: str, control: int, line: str, labels: dict[str, int]) -> Instruction:
    guard, opcode, operands = PARTS.match(text).groups()
    names = [name for found in TABLE.findall(operands) for name in re.split(r"[,\s]+", found)] or JUMP.findall(operands)
    targets = tuple(labels[name] for name in names if name in labels)
    operands = re.sub(r'\(\*".*?"\*\)', "", operands).strip()
    base = opcode.partition(".")[0]
    return Instruction(address, guard or "", base, opcode, operands, **fields(control), targets=targets, line=line)


def fields(control: int) -> dict:
    """The scheduling fields; bit 0 of `control` is bit 105 of the instruction."""
    sets, frees = control >> 5 & 7, control >> 8 & 7
    return dict(
        stall=control & 15,
        sets=None if sets == 7 else sets,
        frees=None if frees == 7 else frees,
        waits=tuple(i for i in range(6) if control >> 11 + i & 1),
    )


WIDTHS = {"128": 16, "64": 8, "U16": 2, "S16": 2, "U8": 1, "S8": 1}
GLOBAL = {"LDG", "STG", "LD", "ST", "LDGSTS", "ATOM", "ATOMG", "RED"}
TILES = {"UTMALDG", "UTMASTG", "UTMAREDG", "UBLKCP"}  # their size is not in the instruction


def width(i: Instruction) -> int:
    """Bytes that one lane moves by a load or store."""
    if i.base in ("LDSM", "STSM"):  # 1, 2 or 4 matrices of 8 x 8 elements of 16 bits
        return 4 * int(i.modifiers[-1]) if i.modifiers[-1].isdigit() else 4
    return next((WIDTHS[m] for m in i.modifiers if m in WIDTHS), 4)


def global_bytes(i: Instruction) -> int:
    """Bytes of global memory that a warp moves, if each lane has its own; 0 for TMA, whose size is elsewhere."""
    return width(i) * LANES if i.base in GLOBAL else 0


def tensor_clocks(i: Instruction) -> int:
    """Clocks for which a scheduler's tensor core is busy.

    wgmma of 64 x N x K: N / 2 for every type, since K halves as its elements double (4096 multiply-adds of 8 bits an SM
    and clock). mma.sync of a warp at the same rate, which it does not reach on Hopper.
    """
    if i.base.endswith("GMMA"):
        return int(re.search(r"64x(\d+)x\d+", i.opcode)[1]) // 2
    return (2 if i.modifiers[0] == "1688" else 4) if i.base.endswith("MMA") else 0


@lru_cache(1 << 16)
def registers(i: Instruction) -> frozenset[int]:
    """Numbers of all vector registers that it reads or writes; an operand of several is named by its first."""
    touched: set[int] = set()
    for place, part in enumerate(i.operands.split(",")):
        for number, suffix in REGISTER.findall(part):
            wide = 2 if ".64" in suffix else 1
            touched.update(range(int(number), int(number) + max(wide, span(i, place, part))))
    return frozenset(touched)


REGISTER = re.compile(r"(?<![A-Z])R(\d+)((?:\.\w+)*)")


def results(i: Instruction) -> frozenset[int]:
    """Numbers of the vector registers that it writes: its first operand that is no predicate."""
    parts = [part.strip() for part in i.operands.split(",")]
    place = next((k for k, part in enumerate(parts) if not re.fullmatch(r"!?U?P[T\d]", part)), 0)
    found = re.fullmatch(r"R(\d+)(?:\.\w+)*", parts[place])
    if not found or i.base.endswith("SETP"):  # a comparison writes predicates alone, a store begins with its address
        return frozenset()
    return frozenset(range(int(found[1]), int(found[1]) + span(i, place, parts[place])))


def span(i: Instruction, place: int, part: str) -> int:
    """How many registers the operand at `place` has."""
    if i.base.endswith("GMMA"):  # accumulators first; A is the second, in registers or a descriptor
        columns = int(re.search(r"64x(\d+)x\d+", i.opcode)[1])
        return 4 if place == 1 else columns // (4 if i.modifiers[1] == "F16" else 2)
    if i.base == "HMMA":
        return (4, 4, 2, 4)[place] if i.modifiers[0] == "16816" else (4, 2, 1, 4)[place]
    if i.base in ("LDG", "STG", "LD", "ST", "LDS", "STS", "LDSM", "STSM", "LDL", "STL", "LDC"):
        return 1 if "[" in part else max(1, width(i) // 4)
    if i.base == "IMAD" and "WIDE" in i.modifiers:
        return 2 if place in (0, len(i.operands.split(",")) - 1) else 1
    if i.base == "CS2R":
        return 1 if "32" in i.modifiers else 2
    return 2 if i.base in ("DADD", "DMUL", "DFMA") else 1
