"""The counters as tables: benchmarks/results/counters.json, which are budgets, and docs/kernels-counters.md."""

import re
from collections import Counter
from pathlib import Path
from typing import NamedTuple

from .counters import CLASSES

ROOT = Path(__file__).parents[2]
LIMITS = dict(wavefronts=1.05, sectors=1.10)  # over the least, of a kernel's lines without exceptions
MARGIN, SMALL = 0.05, 64  # a budget is kept if no count is above it by more than a share, or by more than a few
SHARE = 0.02  # of a kernel's passes: lines that waste less are not listed
BUDGETS = ("instructions", "sectors", "wavefronts", "bulk_bytes", "macs", "moved")


class Exempt(NamedTuple):
    """Lines that may take more: a kind of LIMITS, patterns of the kernel and of the line, as `label` writes it."""

    kind: str
    kernel: str
    line: str
    reason: str

    def matches(self, kind: str, kernel: str, line: str) -> bool:
        return kind == self.kind and bool(re.search(self.kernel, kernel) and re.search(self.line, line))


TWO = "8 values of fp32 in a lane are two requests, each for half of a sector"
ONCE = "queries, once a block: 32 bytes of a lane are two requests"
EXEMPT = [
    Exempt("sectors", "qk_norm_rope|attention_fwd|attention_decode", r"(cos|sin) = load<", TWO),
    Exempt("sectors", "rms_norm_.*float", "common.cuh", TWO),
    Exempt("sectors", "route_fwd", "four = load<4>", TWO),
    Exempt("sectors", "route_", "logits", "gathers the logits of chosen experts"),
    Exempt("sectors", "rms_norm_fwd", "y_scale", "scales of 128 columns each, which lie in different rows"),
    Exempt("sectors", "dispatch_place", "source|offsets", "scatters tokens to their experts' rows"),
    Exempt("wavefronts", "dispatch_place", "warp_found", "counts by expert"),
    Exempt("sectors", "Variant<0, 2, .Scales.1", "store.cuh.*old", "adds to bf16 in place: 16 bytes of each of 8 rows"),
    Exempt("sectors", "Variant<64, 1, .*Weights.1", "lane_scales", "scales of weights, which lie in different rows"),
    Exempt("sectors", "attention_decode_kernel", "load_queries", ONCE),
    Exempt("wavefronts", "attention_decode_kernel", "load_queries", ONCE),
    Exempt("sectors", "attention_decode_kernel", "scales", "scales of keys: 4 bytes of a head for each"),
    Exempt("wavefronts", "moe_decode", "all", "partial sums of the warps, once a round"),
]


def label(source: str) -> str:
    """A "file:line" with the text of the line for its number, which edits elsewhere move."""

    def text(m):
        file = next((f for f in (ROOT / m[1], ROOT / "ling_kernels/ops" / m[1]) if f.exists()), None)
        lines = file.read_text().split("\n") if file else []
        return f"{m[1]}: {' '.join(lines[int(m[2]) - 1].split())}" if 0 < int(m[2]) <= len(lines) else m[0]

    return re.sub(r"([\w./]+):(\d+)", text, source)


def wasteful(lines: dict[str, Counter]) -> list[list]:
    """Lines beyond LIMITS: kind, label, passes, the fewest possible; those first that waste most."""
    found = []
    for kind, limit in LIMITS.items():
        total = sum(c[kind] for c in lines.values())
        for source, c in lines.items():
            done, least = c[kind], c[f"least_{kind}"]
            if done > limit * least and done - least > SHARE * total:
                found.append([kind, label(source), done, least])
    return sorted(found, key=lambda f: f[3] - f[2])


def reason(row: dict, kind: str, line: str) -> str | None:
    """Why a line may take more, if it may."""
    return next((e.reason for e in EXEMPT if e.matches(kind, row["kernel"], line)), None)


def counted(row: dict, kind: str) -> tuple[int, int]:
    """Passes and the fewest possible of the lines without exceptions."""
    free = [(done, least) for k, line, done, least in row["lines"] if k == kind and reason(row, k, line)]
    return row[kind] - sum(done for done, _ in free), row[f"least_{kind}"] - sum(least for _, least in free)


def faults(rows: list[dict]) -> list[str]:
    """Kernels beyond a limit, by more than SHARE of their passes."""
    found = []
    for row in rows:
        for kind, limit in LIMITS.items():
            done, least = counted(row, kind)
            if done > limit * least and done - least > SHARE * row[kind]:
                lines = [line for k, line, *_ in row["lines"] if k == kind and not reason(row, k, line)]
                found.append(
                    f"{row['op']}: {row['kernel']}: {done / max(least, 1):.2f} times the fewest {kind}, "
                    f"allowed are {limit}: {'; '.join(lines) or 'everywhere'}"
                )
    return found


def differences(rows: list[dict], budget: list[dict]) -> list[str]:
    """Where fresh rows are worse than the budget, or no longer what it describes. [] if they keep it."""
    fresh, old = ({(r["op"], r["kernel"]): r for r in part} for part in (rows, budget))
    found = [f"{' '.join(key)}: {'new' if key in fresh else 'gone'}" for key in fresh.keys() ^ old.keys()]
    for key in fresh.keys() & old.keys():
        for count in BUDGETS:
            now, then = fresh[key][count], old[key][count]
            if abs(now - then) > max(SMALL, MARGIN * then):
                found.append(f"{' '.join(key)}: {count} {then} -> {now}, {'worse' if now > then else 'better'}")
    return sorted(found)


PAGE = """\
# Counters of the kernels

Made by `make tables`, without a GPU: nvcc {cuda}'s PTX of csrc/ ran on the virtual GPU
([verification.md](verification.md)) at Ling-mini's widths, with few rows and random data. Nothing here is time. A test
compares a part of these numbers with fresh ones, with a margin of {margin:.0%}; `python -m benchmarks.profile OP`
prints them by source line.

| column | |
|---|---|
| instr | warp instructions of PTX, in thousands; repetitions of a wait that fails do not count |
| fp32, int, ... | their classes, in percent; other: barriers, fences, votes |
| lanes | mean active lanes |
| sectors | of 32 bytes, in requests to global memory, over the fewest that the bytes of a request fill |
| wavefronts | passes over the banks of shared memory, over the fewest; see below |
| TMA | KB of boxes |
| MACs | of tensor cores, over those that the op asks for: padding, and the other half of causal tiles |
| moved | bytes of sectors and boxes, over those that are read and written, each once; L1 and L2 serve the rest |

In a pass each bank of 4 bytes gives one word, and lanes that want the same word share it. Requests of 8 and 16 bytes a
lane go by halves and quarters of a warp. Limits are {wavefronts:.2f} for wavefronts and {sectors:.2f} for sectors, but
for the lines named below.

"""


def page(table: dict) -> str:
    heads = ["op", "kernel", "instr", *CLASSES, "lanes", "sectors", "wavefronts", "TMA", "MACs", "moved"]
    text = PAGE.format(cuda=table["cuda"], margin=MARGIN, **LIMITS) + line_of(heads) + line_of(["---"] * len(heads))
    for r in table["rows"]:
        n = r["instructions"]
        cells = [r["op"], f"`{r['kernel']}`", f"{n / 1000:.1f}", *(round(100 * r[c] / n) or "" for c in CLASSES)]
        cells += [
            f"{r['lanes'] / n:.1f}",
            over(r, "sectors", "least_sectors"),
            over(r, "wavefronts", "least_wavefronts"),
        ]
        cells += [round(r["bulk_bytes"] / 1024) or "", over(r, "macs", "macs_owed"), over(r, "moved", "owed")]
        text += line_of(cells)
    text += "\n## Lines beyond the limits\n\n| kernel | line | | why it may |\n|---|---|---|---|\n"
    seen = {}
    for r in table["rows"]:
        for kind, line, done, least in r["lines"]:
            why = reason(r, kind, line) or "its kernel is within the limit"
            seen.setdefault((r["kernel"], line, kind), f"{done / least:.2f} {kind} | {why}")
    for (kernel, line, _), rest in seen.items():
        text += line_of([f"`{kernel}`", f"`{line.replace('|', '&#124;')}`", *rest.split(" | ")])
    return text


def line_of(cells: list) -> str:
    return f"| {' | '.join(map(str, cells))} |\n"


def over(row: dict, count: str, least: str) -> str:
    return f"{row[count] / row[least]:.2f}" if row[least] else ""
