"""python -m benchmarks.report: docs/performance.md and README.md's block, from benchmarks/results/*.json.

Every number comes from pytest-benchmark's JSON and every table names its file; the limits are computed (a minute).
Results of a tree with uncommitted changes, of an unknown commit or of a throttled GPU say so.
"""

import json
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path

from benchmarks.work import CASES, Work, fake_work, title
from ling_kernels.commands import command
from ling_kernels.errors import InputError
from ling_kernels.files import atomic_write
from ling_kernels.gpu import HOPPER, Gpu, find_gpu

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks/results"
PAGE, README = ROOT / "docs/performance.md", ROOT / "README.md"
SUSTAINED = 0.55  # share of the data sheet's bf16 rate that a Hopper GPU reaches under its power limit


def cut(text: str, name: str, page: str = "the page") -> tuple[str, str, str]:
    """The text up to <!-- name -->, the block up to <!-- /name -->, and the rest. InputError without both marks."""
    begin, end = f"<!-- {name} -->\n", f"<!-- /{name} -->\n"
    if text.count(begin) != 1 or text.count(end) != 1 or text.index(begin) > text.index(end):
        raise InputError(f"{page} needs one {begin.strip()} and after it one {end.strip()}, on lines of their own")
    first, last = text.index(begin) + len(begin), text.index(end)
    return text[:first], text[first:last], text[last:]


def fill(page: Path, blocks: Mapping[str, str]) -> None:
    """Replace these blocks of the page, by name."""
    text = page.read_text()
    for name, block in blocks.items():
        before, _, after = cut(text, name, page.name)
        text = before + block + after
    with atomic_write(page) as partial:
        partial.write_text(text)


def table(head: str, rows: Iterable[tuple]) -> list[str]:
    lines = [f"| {head} |", f"|{'---|' * len(head.split(' | '))}", *(f"| {' | '.join(map(str, r))} |" for r in rows)]
    return [*lines, ""]


def us(seconds: float) -> str:
    value = seconds * 1e6
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


class Run:
    """One results file."""

    def __init__(self, path: Path):
        try:
            found = json.loads(path.read_text())
            self.machine, commit = found["machine_info"], found["commit_info"]
            self.rows = [b["extra_info"] | dict(us=b["stats"]["median"] * 1e6, min_us=b["stats"]["min"] * 1e6)
                         for b in found["benchmarks"]]  # fmt: skip
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise InputError(f"{path} is not a result of pytest-benchmark: {error!r}") from None
        self.path, self.date, self.commit = path, found["datetime"][:10], commit["id"]
        self.gpu: Gpu | None = find_gpu(self.machine.get("gpu") or "")
        self.name = self.machine.get("gpu") or f"CPU, {self.machine['machine']}"
        self.rates = {r["rate"]: r["per_second"] for r in self.of("rate")}
        self.doubts = []
        if commit.get("dirty") or commit["id"] == "unversioned":
            self.doubts.append(f"commit {commit['id']}, with changes that are not committed")
        if self.gpu and self.rates.get("bf16", self.gpu.bf16) < SUSTAINED * self.gpu.bf16:
            self.doubts.append(f"throttled: {self.rates['bf16'] / 1e12:.0f} TFLOP/s in bf16")
        if not self.machine.get("gpu") and self.machine["load"] > self.machine["cores"] / 2:
            load, cores = self.machine["load"], self.machine["cores"]
            self.doubts.append(f"other programs used this CPU (load {load} on {cores} cores): compare ratios only")

    def of(self, key: str) -> list[dict]:
        return [r for r in self.rows if r.get(key) is not None]

    def link(self, folder: str) -> str:
        return f"[{self.path.name}]({folder}{self.path.name})"

    def measured(self) -> Gpu | None:
        """The GPU with the rates that the run measured in place of the data sheet's."""
        if not self.gpu or not {"copy", "bf16"} <= {*self.rates}:
            return None
        bf16, bandwidth = self.rates["bf16"], max(self.rates["copy"], self.rates.get("read", 0))
        fp8 = self.rates.get("fp8", bf16 * self.gpu.fp8 / self.gpu.bf16)
        return self.gpu._replace(bandwidth=bandwidth, bf16=bf16, fp8=fp8)


def runs(results: Path = RESULTS) -> list[Run]:
    """GPUs first. Tables and plans lie in the same folder and are no runs."""
    tables = ("resources", "clocks", "counters", "scale_out_plans")
    found = [Run(path) for path in sorted(results.glob("*.json")) if not path.name.startswith(tables)]
    return sorted(found, key=lambda run: run.gpu is None)


def share(r: dict, gpu: Gpu | None) -> str:
    """Of the least time that this GPU needs for the row's work."""
    return f"{Work(r['bytes'], r['flops'], r['precision']).seconds(gpu) / r['us'] * 1e6:.0%}" if gpu else ""


def speed(r: dict, gpu: Gpu | None) -> str:
    if gpu and Work(r["bytes"], r["flops"], r["precision"]).bound(gpu) == "compute":
        return f"{r['flops'] / r['us'] / 1e6:,.0f} TFLOP/s"
    return f"{r['bytes'] / r['us'] / 1e3:,.0f} GB/s"


def of_run(run: Run) -> list[str]:
    m = run.machine
    about = {
        "commit": run.commit,
        "python": m["python_version"],
        **{k: m.get(k) for k in ("torch", "triton", "cuda", "threads")},
    }
    lines = [f"## {run.name}", "", f"{run.link('../benchmarks/results/')}, {run.date}: "
             + ", ".join(f"{k} {v}" for k, v in about.items() if v is not None) + ".", ""]  # fmt: skip
    lines += [f"**Note**: {doubt}." for doubt in run.doubts] + [""] * bool(run.doubts)
    if m.get("clocks"):
        lines += ["Clocks before the run: " + ", ".join(f"{k} {v}" for k, v in m["clocks"].items()) + ".", ""]
    if run.gpu and run.rates:
        sheet = {k: getattr(run.gpu, "bandwidth" if k in ("copy", "read") else k) for k in run.rates}
        lines += table("rate | measured, 1e12/s | data sheet | share", [
            (k, f"{v / 1e12:.2f}", f"{sheet[k] / 1e12:.2f}", f"{v / sheet[k]:.0%}") for k, v in run.rates.items()
        ])  # fmt: skip
    return lines + of_ops(run) + of_layers(run) + of_steps(run) + of_host(run) + of_peers(run)


def of_ops(run: Run) -> list[str]:
    rows = run.of("case")
    if not rows:
        return []
    reference = {(r["case"], r["name"]): r["us"] for r in rows if r["by"] == "torch"}
    cells = []
    for r in sorted(rows, key=lambda r: (r["case"], r["name"] != "forward", r["us"])):
        over = reference.get((r["case"], r["name"]))
        by = r["by"] + (f" (error {r['error']:.0e})" if r.get("error") is not None else "")
        cells.append((f"`{r['case']}`", r["name"], by, us(r["us"] / 1e6), speed(r, run.gpu), share(r, run.measured()),
                      share(r, run.gpu), f"{over / r['us']:.1f}x" if over else ""))  # fmt: skip
    head = "op and shape | pass | by | us | speed | of measured rates | of the data sheet | over torch"
    return table(head, cells)


def of_layers(run: Run) -> list[str]:
    rows = run.of("layer")
    ours = {(r["layer"], r["name"]): r["min_us"] for r in rows if r["by"] == "ours"}
    cells = [
        (r["layer"], r["name"], r["by"], f"{r['us'] / 1e3:,.2f}", f"{r['min_us'] / ours[r['layer'], r['name']]:.2f}x",
         f"{r['tokens_per_s']:,.0f}", f"{r['mfu']:.1%}", f"{r['error']:.0e}" if r["error"] else "") for r in rows
    ]  # fmt: skip
    if not cells:
        return []
    head = "layer | pass | by | median, ms | least over ours | tokens/s | MFU | error"
    return [*table(head, cells), "Error: of the result, or of x's gradient, against the loop over experts, relative. "
            f"MFU of the peak, {rows[0]['peak']}.", ""]  # fmt: skip


def of_steps(run: Run) -> list[str]:
    ours = {r["step"]: r["min_us"] for r in run.of("step") if r["by"] == "ours"}
    lines = [f"- {r['step'][0].upper()}{r['step'][1:]}, {r['by']}: {r['us'] / 1e3:,.1f} ms (least over ours "
             f"{r['min_us'] / ours[r['step']]:.2f}x), {r['tokens_per_s']:,.0f} tokens/s, MFU {r['mfu']:.1%} of "
             f"the peak, {r['peak']}." for r in run.of("step")]  # fmt: skip
    for r in run.of("decode"):
        by = f", {r['by']}" if r.get("by") else ""
        more = f", {share(r, run.gpu)} of the limit" if run.gpu else ""
        more += f", {r['kernels_per_layer']:.1f} kernels a layer" if r["kernels_per_layer"] else ""
        lines.append(
            f"- Decoding, {r['decode']}{by}: {r['us'] / 1e3:,.2f} ms a step, {r['tokens_per_s']:,.0f} tokens/s{more}."
        )
    beside = run.of("beside")
    if beside:
        lines.append(
            "- The decode steps above were timed one after the other, transformers' without `generate` around them, "
            "and what else ran then differed: they are no comparison. Those below were taken in turn."
        )
    for r in beside:
        lines.append(
            f"- A decode step between two of transformers' `generate`, {r['beside']}: {r['ours_ms']:,.2f} ms, and "
            f"{r['generate_ms']:,.2f} ms for `generate`'s; the median ratio of neighbours is {r['ratio']:.2f}."
        )
    for r in run.of("serve"):
        ms = ", ".join(f"{k.removesuffix('_ms').replace('_', ' ')} {r[k]:.0f} ms" for k in r if k.endswith("_ms"))
        lines.append(f"- Serving, {r['serve']}: {r['requests_per_s']:.2f} requests/s, {r['tokens_per_s']:,.0f} "
                     f"tokens/s; time to the first token and between tokens: {ms}.")  # fmt: skip
    return [*lines, ""] if lines else []


def of_host(run: Run) -> list[str]:
    calls = sorted(run.of("host"), key=lambda r: r["ratio"])
    lines = []
    if calls:
        lines += ["The host's CPU time for a call up to its last launch, over that of torch's rms_norm of one row "
                  f"({min(r['torch_us'] for r in calls):.1f} us); the least of 7 rounds.", ""]  # fmt: skip
        lines += table("op | launches | over torch's rms_norm", [
            (f"`{r['host']}`", r["launches"], f"{r['ratio']:.1f}x") for r in calls
        ])  # fmt: skip
    return lines


def of_peers(run: Run) -> list[str]:
    cells = [(f"`{k}`", v.replace("|", "/")) for k, v in run.machine.get("peers", {}).items()]
    if not cells or not run.gpu:
        return []
    return ["Peers (benchmarks/peers.py), and why some are not timed:", "", *table("module | version or reason", cells)]


def measured(results: Path = RESULTS) -> str:
    """docs/performance.md's block of results."""
    found, lines = runs(results), []
    if not any(run.gpu for run in found):
        lines += ["**On a GPU: not measured.** No results file of a GPU is here yet.", ""]
    for run in found:
        lines += of_run(run)
    return "\n".join(lines)


def limits() -> str:
    """The block of docs/performance.md with the least time of every Case at its benchmark shape; computed, no GPU."""
    cells = []
    for case in CASES:
        for name, work in fake_work(case, case.shapes[-1]).items():
            least = (f"{us(work.seconds(gpu))} ({work.bound(gpu)[0]})" for gpu in HOPPER.values())
            flops = f"{work.flops / 1e9:,.1f}" if work.flops else ""
            cells.append((f"`{title(case, case.shapes[-1])}`", name, f"{work.bytes / 1e6:,.1f}", flops, *least))
    return "\n".join(table("op and shape | pass | MB | GFLOP | " + " | ".join(f"{g}, us" for g in HOPPER), cells))


def short(results: Path = RESULTS) -> str:
    """README.md's block: each op's fastest row on each GPU, and the GPUs without results."""
    lines, found = [], runs(results)
    for run in (run for run in found if run.gpu):
        ops = {}
        for r in sorted(run.of("case"), key=lambda r: r["us"]):
            if r["name"] == "forward" and r["by"] in ("cuda", "triton"):
                ops.setdefault(r["op"], r)
        lines += [
            f"{run.name}, {run.date}, {run.link('benchmarks/results/')}" + "".join(f"; {d}" for d in run.doubts),
            "",
        ]
        cells = [(f"`{op}`", f"`{r['case']}`", r["by"], us(r["us"] / 1e6), share(r, run.gpu)) for op, r in ops.items()]
        lines += table("op | at | by | us | of the data sheet", sorted(cells))
    missing = [name for name in HOPPER if name not in [run.gpu.name for run in found if run.gpu]]
    if missing:
        lines += [f"Speed on {', '.join(missing)}: **not measured**.", ""]
    lines.append(
        "What each op needs at least, by bytes and FLOPs, and all results: [docs/performance.md](docs/performance.md)."
    )
    return "\n".join(lines) + "\n"


def write(with_limits: bool = False, results: Path = RESULTS) -> None:
    fill(PAGE, dict(measured=measured(results), **(dict(limits=limits()) if with_limits else {})))
    fill(README, dict(performance=short(results)))
    print(f"wrote {PAGE.relative_to(ROOT)} and {README.name}'s block")


def main() -> int:
    write(with_limits=True)
    return 0


if __name__ == "__main__":
    sys.exit(command(main)())
