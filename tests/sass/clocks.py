"""The clocks of every kernel as tables: benchmarks/results/clocks*.json.

The files are budgets: test_csrc_clocks.py and test_compiles_for_hopper.py compare them with fresh tables.
"""

import json
import re
from collections import Counter
from pathlib import Path
from typing import NamedTuple

from tests import cuobjdump
from tests.sass.decode import Instruction, kernels
from tests.sass.flow import Flow
from tests.sass.hazards import highest_registers, touched_in_flight
from tests.sass.regions import between, loops, segments, whole
from tests.sass.walk import walk

CSRC = Path(__file__).parents[2] / "csrc"
MARGIN, SMALL = 0.05, 8  # a budget is kept if no count is above it by more than a share, or by more than a few


class Region(NamedTuple):
    """A part of some kernels, from opcode to opcode: see regions.between."""

    name: str
    kernel: str
    start: str
    end: str
    without: str = "(?!)"
    least: bool = False


WIDE = r"gemm_fp8_kernel<Variant<(?:0|128), .*"  # tiles of 128 x 256
REGIONS = [
    Region("SwiGLU epilogue", WIDE + r"Output\)1", "QGMMA", "STS", least=True),
    Region("bf16 epilogue", WIDE + r"Output\)0", "QGMMA", "STG.E.128", without="STG.E.64", least=True),
    Region("bf16 epilogue, accumulating", WIDE + r"Output\)0", "QGMMA", "STG.E.128", without="STG.E.64"),
    Region("fp32 epilogue, accumulating", WIDE + r"Output\)0", "QGMMA", "STG.E.64", without="STG.E.128|LDG.E.U16"),
]


def within(opcode: str, text: str) -> str:
    """For `without`: the opcode, in lines of csrc/ that hold the text."""
    files = [p for p in sorted(CSRC.rglob("*")) if p.suffix in (".cu", ".cuh")]
    lines = [f"{p.name}:{n}" for p in files for n, line in enumerate(p.read_text().splitlines(), 1) if text in line]
    if not lines:
        raise ValueError(f"no line of csrc/ holds {text!r}")
    return rf"{opcode}\S* (?:{'|'.join(map(re.escape, lines))})$"


# Kernels of a decode step that do what they can before the preceding one has ended. A warp copies rows or their scales.
REGIONS += [
    Region("after the kernel ahead", r"rms_norm_router_kernel<bfloat16, bfloat16, 1>", "ACQBULK", "EXIT"),
    Region("after the kernel ahead", r"gemm_fp8_few_rows_kernel<false>", "ACQBULK", "EXIT",
           without=within("LDG", "= a_scale[m +")),
]  # fmt: skip

# Of kernels with options: opcodes that only the options have. The rows of the kernel and its loops are without them.
OPTIONS = {
    r"gemm_fp8_kernel<|grouped_wgrad_bf16_kernel$": "STG.E.64",  # fp32 results
    # More than 32 sequences, or some without keys
    r"attention_decode_kernel<": "|".join([within("LDG", "int further(int b)"), within("STG", "to.out) + at) = {}")]),
}
SHORT = 32  # loops of fewer instructions have no row


def rows_of(name: str, code: list[Instruction]) -> list[dict]:
    """A row for the kernel, each of its loops, and each section and region of it."""
    flow = Flow(code, next((without for kernel, without in OPTIONS.items() if re.match(kernel, name)), "(?!)"))
    parts = [("whole", whole(flow)), *((part, path) for part, path in loops(flow) if len(path) >= SHORT)]
    rows = []
    for part, path in parts:
        rows.append(row(name, part, path))
        rows += [row(name, f"{part}: {what}", cut, share=None) for what, cut in cuts(part, path)]
    for region in REGIONS:
        if re.match(region.kernel, name):
            path = between(Flow(code, region.without), region.start, region.end, region.least)
            rows += [row(name, region.name, path, share=None)] * bool(path)
    everything = Flow(code)
    calls = sum(i.base == "CALL" for b in everything.reached for i in everything.blocks[b])
    rows[0] |= dict(call_sites=calls, hazards=hazards(everything))
    return rows


def cuts(part: str, path: list[Instruction]) -> list[tuple[str, list[Instruction]]]:
    """Sections of a loop of wgmma that compute something else."""
    pieces = segments(path)
    if part.startswith("around products"):
        return [("before the first issue", pieces[0][1]), ("after the last wait", pieces[-1][1])]
    waited = [piece for what, piece in pieces if "waited" in what]
    return [("after a wait", max(waited, key=len))] if part.startswith("products") and waited else []


PATH_COUNTS = ("instructions", "clocks", "busy", "calls", "branches", "early", "predicates", "spills")
COUNTS = (*PATH_COUNTS, "call_sites", "hazards")  # the budgets; the last two belong to the kernel


def row(kernel: str, part: str, path: list[Instruction], **fixed) -> dict:
    w = walk(path)
    unit, busy = w.busiest
    found = w._asdict() | dict(unit=unit, busy=busy, share=w.share and round(w.share, 2)) | fixed
    return dict(kernel=kernel, part=part) | {k: found[k] for k in ("tensor", "bytes", "unit", "share", *PATH_COUNTS)}


def hazards(flow: Flow) -> int:
    """How often the code breaks a rule of hazards.py, which are about warpgroups."""
    if not any(i.base.endswith("GMMA") or i.base == "USETMAXREG" for block in flow.blocks for i in block):
        return 0
    beyond = [limit for limit, highest in highest_registers(flow, 255).items() if highest >= limit]
    return len(touched_in_flight(flow)) + len(beyond)


def cuda_rows(module: Path) -> list[dict]:
    codes = kernels(module)
    found = zip(cuobjdump.names([*codes]), codes.values(), strict=True)
    return [r for name, code in sorted(found, key=lambda kernel: kernel[0]) for r in rows_of(name, code)]


def triton_rows(table: dict) -> list[dict]:
    """Takes the rows out of tests/hopper.py's table, and names each kernel with what tells its builds apart."""
    rows = []
    for r in table["kernels"]:
        constants = (f"{k} {v}" for k, v in r.get("constants", {}).items() if v not in (None, False))
        name = ", ".join([r["kernel"], r["dtype"], *constants, "/".join(r["gpus"])])
        rows += [found | dict(kernel=name) for found in r.pop("clocks", ())]
    return sorted(rows, key=lambda r: r["kernel"])


def differences(rows: list[dict], budget: list[dict]) -> list[str]:
    """Where fresh rows are worse than the budget, or no longer what it describes. [] if they keep it."""
    fresh, old = keyed(rows), keyed(budget)
    found = [f"{' '.join(map(str, key))}: {'new' if key in fresh else 'gone'}" for key in fresh.keys() ^ old.keys()]
    for key in fresh.keys() & old.keys():
        for count in COUNTS:
            now, then = fresh[key].get(count, 0), old[key].get(count, 0)
            if abs(now - then) > max(SMALL if then else 0, MARGIN * then):
                found.append(f"{key[0]}, {key[1]}: {count} {then} -> {now}, {'worse' if now > then else 'better'}")
    return sorted(found)


def keyed(rows: list[dict]) -> dict[tuple[str, str, int], dict]:
    """By kernel and part; two builds may have one name."""
    found: dict[tuple[str, str, int], dict] = {}
    seen: Counter = Counter()
    for r in rows:
        name = r["kernel"], r["part"]
        found[(*name, seen[name])] = r
        seen[name] += 1
    return found


def text(table: dict) -> str:
    """JSON with a line for each row."""
    rows = ",\n".join(f"  {json.dumps(row)}" for row in table["rows"])
    head = "".join(f" {json.dumps(k)}: {json.dumps(v)},\n" for k, v in table.items() if k != "rows")
    return f'{{\n{head} "rows": [\n{rows}\n ]\n}}\n'
