"""The clocks of every kernel as tables: benchmarks/results/clocks*.json, docs/kernels-clocks.md.

The files are budgets: tests/test_sass.py compares them with fresh tables, with a margin.
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
from tests.sass.regions import between, loops, segments
from tests.sass.walk import EARLY, JUMP, LATENCIES, OTHERWISE, Walk, walk

MARGIN, SMALL = 0.05, 8  # a budget is kept if no count is above it by more than a share, or by more than a few


class Region(NamedTuple):
    """A part of some kernels, from opcode to opcode: see regions.between."""

    name: str
    kernel: str
    start: str
    end: str
    without: str = "(?!)"
    least: bool = False


WIDE = r"gemm_fp8_kernel<Variant<0, .*"  # tiles of 128 x 256
REGIONS = [
    Region("SwiGLU epilogue", WIDE + r"Output\)1", "QGMMA", "STS", least=True),
    Region("bf16 epilogue", WIDE + r"Output\)0", "QGMMA", "STG.E.128", without="STG.E.64", least=True),
    Region("bf16 epilogue, accumulating", WIDE + r"Output\)0", "QGMMA", "STG.E.128", without="STG.E.64"),
    Region("fp32 epilogue, accumulating", WIDE + r"Output\)0", "QGMMA", "STG.E.64", without="STG.E.128|LDG.E.U16"),
]
# Of kernels with options: opcodes that only the options have. The rows of the kernel and its loops are without them.
OPTIONS = {r"gemm_fp8_kernel<|grouped_wgrad_bf16_kernel$": "STG.E.64|LDG.E.U16"}  # fp32 results; accumulating
SHORT = 32  # loops of fewer instructions have no row


def rows_of(name: str, code: list[Instruction]) -> list[dict]:
    """A row for the kernel, each of its loops, and each region of it."""
    flow = Flow(code, next((without for kernel, without in OPTIONS.items() if re.match(kernel, name)), "(?!)"))
    named = [("whole", flow.whole())]
    for part, path in loops(flow):
        if len(path) >= SHORT:
            named.append((part, path))
        if part.startswith("products"):
            waited = [section for what, section in segments(path) if "waited" in what]
            named.append((f"{part}: after a wait", max(waited, key=len, default=[])))
    for region in REGIONS:
        if re.match(region.kernel, name):
            named.append((region.name, between(Flow(code, region.without), region.start, region.end, region.least)))
    everything = Flow(code)
    calls = sum(i.base == "CALL" for b in everything.reached for i in everything.blocks[b])
    rows = [dict(kernel=name, part=part, **columns(walk(path))) for part, path in named if path]
    return [rows[0] | dict(calls=calls, hazards=hazards(everything)), *rows[1:]]


COUNTS = ("instructions", "clocks", "busy", "branches", "early", "predicates", "spills", "calls", "hazards")  # budgets


def columns(w: Walk) -> dict:
    row = w._asdict() | dict(zip(("unit", "busy"), w.busiest, strict=True), share=w.share and round(w.share, 2))
    return {k: row[k] for k in ("tensor", "bytes", "unit", "share", *COUNTS[:-2])}


def hazards(flow: Flow) -> int:
    """How often the code breaks a rule of hazards.py, which are about warpgroups."""
    if not any(i.base.endswith("GMMA") or i.base == "USETMAXREG" for block in flow.blocks for i in block):
        return 0
    beyond = [limit for limit, highest in highest_registers(flow, 255).items() if highest >= limit]
    return len(touched_in_flight(flow)) + len(beyond)


def cuda_rows(module: Path) -> list[dict]:
    codes = kernels(module)
    found = zip(cuobjdump.names([*codes]), codes.values(), strict=True)
    return [row for name, code in sorted(found, key=lambda kernel: kernel[0]) for row in rows_of(name, code)]


def triton_rows(table: dict) -> list[dict]:
    """Takes the rows out of tests/hopper.py's table, and names each kernel with what tells its builds apart."""
    rows = []
    for r in table["kernels"]:
        constants = (f"{k} {v}" for k, v in r.get("constants", {}).items() if v not in (None, False))
        name = ", ".join([r["kernel"], r["dtype"], *constants, "/".join(r["gpus"])])
        rows += [row | dict(kernel=name) for row in r.pop("clocks", ())]
    return sorted(rows, key=lambda row: row["kernel"])


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
    for row in rows:
        name = row["kernel"], row["part"]
        found[(*name, seen[name])] = row
        seen[name] += 1
    return found


def text(table: dict) -> str:
    """JSON with a line for each row."""
    rows = ",\n".join(f"  {json.dumps(row)}" for row in table["rows"])
    head = "".join(f" {json.dumps(k)}: {json.dumps(v)},\n" for k, v in table.items() if k != "rows")
    return f'{{\n{head} "rows": [\n{rows}\n ]\n}}\n'


PAGE = """\
# Clocks of the kernels on Hopper

Made by `make tables`, without a GPU, from the machine code that nvcc {cuda} and Triton {triton} built for sm_90.
**Nothing here is measured.** A walk follows one warp along the usual path: each loop once, no slow path of a division,
the options of a kernel switched off. It knows each instruction's scheduling fields, and assumes the latencies below. It
does not see:

- other warps, which hide one another's waits and compete for the scheduler: bounded by the share below;
- memory that is busy, misses of the instruction cache, bank conflicts of registers and of shared memory;
- waits for other warps and for TMA: everybody counts as having come already;
- the tensor cores' time, which has a column of its own; a warp alone takes both, two warpgroups hide one in the other;
- power, which lowers the clock.

`python -m tests.sass FILE KERNEL` walks a cubin, an object of nvcc or the built module: from opcode to opcode, by
source line, with the instructions. The tables are budgets: a test compares them with fresh ones, with a margin of
{margin:.0%}.

| column | of one warp on its way through the part |
|---|---|
| instr | instructions: slots of its scheduler |
| clocks | of this warp alone, without tensor time |
| tensor | clocks of the scheduler's tensor core, at wgmma's rate |
| bytes | of global memory, if every lane has its own; without TMA |
| busiest | the scheduler (issue) or one of its units: fma, integer, special, shared; clocks for which it is busy |
| share | of these clocks in those that the tensor core, or memory at 4.8 TB/s, needs: above 100 % they must wait |
| BSSY | sections whose lanes may diverge |
| early | loads that one of the next {early} instructions waits for |
| pred | P2R, R2P, PLOP3: predicates that are packed or combined |

A row is a kernel from start to end ("whole"), or a loop, called after its work: products (wgmma), mma (mma.sync), tiles
(TMA loads), copies (cp.async), loads, stores; "around": with another one within. "After a wait": the longest section
from a wait for wgmma to the next issue. Loops of fewer than {short} instructions are left out, here also kernels of f16
and f32. Nothing spills. No register of a wgmma is touched between its issue and the wait for it, and none is beyond
setmaxnreg's limit.

| latency of | clocks | from |
|---|---|---|
{latencies}
| a jump that is taken, besides its stall | {jump} | assumed |
| any other instruction that sets a scoreboard | {otherwise} | assumed |

An SM has four schedulers; each issues one instruction a clock. A warp's instruction keeps a unit busy for 32 lanes over
its width: fma 1 clock (IMAD 2), integer and logic 2, special functions 8, shared memory 128 bytes a clock and SM (CUDA
Programming Guide, throughput of native arithmetic instructions, compute capability 9.0).

"""
HEAD = """\
| kernel | part | instr | clocks | tensor | bytes | busiest | share | BSSY | early | pred |
|---|---|---|---|---|---|---|---|---|---|---|
"""


def page(cuda: dict, triton: dict) -> str:
    latencies = "\n".join(f"| {', '.join(names.split())} | {n} | {source} |" for names, n, source in LATENCIES)
    numbers = dict(margin=MARGIN, early=EARLY, short=SHORT, jump=JUMP, otherwise=OTHERWISE)
    head = PAGE.format(cuda=cuda["cuda"], triton=triton["triton"], latencies=latencies, **numbers)
    return head + "## csrc/\n\n" + lines(cuda["rows"]) + "\n## Triton\n\n" + lines(triton["rows"])


def lines(rows: list[dict]) -> str:
    shown, before = [], ""
    for r in rows:
        if re.search(r"__half|float|\b(?:long|int)\b|float16|float32", r["kernel"]):
            continue
        share = "" if r["share"] is None else f"{r['share']:.0%}"
        name, before = "" if r["kernel"] == before else f"`{r['kernel']}`", r["kernel"]
        cells = [name, r["part"], r["instructions"], r["clocks"], r["tensor"] or "", r["bytes"] or ""]
        cells += [f"{r['unit']} {r['busy']}", share, *(r[k] or "" for k in ("branches", "early", "predicates"))]
        shown.append(f"| {' | '.join(map(str, cells))} |\n")
    return HEAD + "".join(shown)
