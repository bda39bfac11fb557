"""python -m benchmarks.report: docs/performance.md and its pictures from benchmarks/results/*.json.

    --readme          also README.md, between <!-- performance --> and <!-- /performance -->
    --compare OLD NEW fail where a median on one GPU, or a ratio of the host's, or a kernel's resources grew too much
    --resources       the same for the tables of registers in the working tree against the commit's

Nothing is typed: a number stands here because a file has it, and every table names its file. Results of a changed tree,
of an unknown commit or of a GPU far below its clocks are refused, unless --force, which the page then says.
"""

import argparse
import json
import sys
from pathlib import Path

from benchmarks import charts, compare
from benchmarks.limits import MODEL, NAMEPLATE, Work, bound, floor, measured, nameplate, predict
from ling_kernels.errors import InputError, command
from ling_kernels.files import whole

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks/results"
PAGE, README = ROOT / "docs/performance.md", ROOT / "README.md"
MARKS = "<!-- performance -->", "<!-- /performance -->"
SUSTAINED = 0.55  # of the data sheet's matrix rate: a Hopper GPU under its power limit still multiplies so fast
PREDICTED = ("H20", "H100")


def load(path: Path) -> dict:
    try:
        return json.loads(path.read_text())
    except (OSError, json.JSONDecodeError) as error:
        raise InputError(f"{path} is no results file: {error}") from None


def is_dirty(commit: str) -> bool:
    return not commit or commit.endswith("-dirty") or commit.startswith("unknown")


def refusal(run: dict) -> str | None:
    """Why these numbers are nobody's: None where they are sound."""
    if is_dirty(run.get("commit", "")):
        return f"commit {run.get('commit') or 'unknown'}: nobody can check out what was measured"
    plate = nameplate(run.get("gpu") or "")
    rates = {r["rate"]: r["per_second"] for r in run.get("benchmarks", []) if r.get("rate")}
    if plate and "bf16" in rates and rates["bf16"] < SUSTAINED * plate.bf16:
        return f"throttled: {rates['bf16'] / 1e12:.0f} TFLOPS in bf16, below {SUSTAINED:.0%} of the data sheet's"
    return None


def runs(results: Path, force: bool) -> list[dict]:
    """What was measured, GPUs first, with the name of its file; a refused one has nothing but its reason."""
    found = []
    for path in sorted(results.glob("*.json")):
        run = load(path)
        if "benchmarks" not in run:
            continue
        reason = refusal(run)
        if reason and not (force or run.get("forced")):
            run = dict(benchmarks=[], gpu=run.get("gpu"))
        found.append(run | dict(file=path.name, reason=reason))
    return sorted(found, key=lambda run: run.get("gpu") is None)


def table(head: str, rows: list) -> list[str]:
    columns = head.split(" | ")
    lines = [f"| {head} |", f"|{'---|' * len(columns)}"]
    return [*lines, *(f"| {' | '.join(map(str, cells))} |" for cells in rows), ""]


def source(name: str) -> str:
    return f"[{name}](../benchmarks/results/{name})"


def us(seconds: float) -> str:
    value = seconds * 1e6
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def work_of(r: dict) -> Work:
    return Work(r["bytes"], r["flops"], r["precision"])


def speed(work: Work, seconds: float, gpu) -> str:
    if bound(work, gpu) == "compute":
        return f"{work.flops / seconds / 1e12:,.0f} TFLOPS"
    return f"{work.bytes / seconds / 1e9:,.0f} GB/s"


def share(work: Work, seconds: float, gpu) -> str:
    return f"{floor(work, gpu) / seconds:.0%}" if gpu else "not measured"


def of_run(run: dict) -> list[str]:
    """The sections of one run."""
    where = run.get("gpu") or run.get("machine", "a CPU")
    lines = [f"## Measured: {where}", ""]
    if not run["benchmarks"]:
        return [*lines, f"{source(run['file'])} is refused: {run['reason'] or 'it has no rows'}.", ""]
    about = {k: run.get(k) for k in ("commit", "date", "python", "torch", "triton", "cuda", "threads", "cores", "load")}
    lines += [f"{source(run['file'])}: " + ", ".join(f"{k} {v}" for k, v in about.items() if v is not None) + ".", ""]
    if run.get("load", 0) > run.get("cores", 1) / 2:
        lines += [f"The machine was shared: a load of {run['load']} on {run['cores']} cores before this began.", ""]
    if run["reason"]:
        lines += [f"**Forced**: {run['reason']}.", ""]
    if run.get("gpu"):
        lines += of_gpu(run)
    return lines + of_layer(run) + of_steps(run) + of_host(run) + of_left_out(run)


def of_gpu(run: dict) -> list[str]:
    rows, plate = run["benchmarks"], nameplate(run["gpu"])
    rates = {r["rate"]: r["per_second"] for r in rows if r.get("rate")}
    lines = []
    if plate and rates:
        names = dict(copy="bandwidth", read="bandwidth", bf16="bf16", fp8="fp8")
        lines += ["What this GPU reaches, measured first; percentages below are of this and of the data sheet.", ""]
        lines += table("rate | measured | data sheet | share", [
            (k, f"{v / 1e12:.2f} T{'B' if names[k] == 'bandwidth' else 'FLOP'}/s",
             f"{getattr(plate, names[k]) / 1e12:.2f}", f"{v / getattr(plate, names[k]):.0%}") for k, v in rates.items()
        ])  # fmt: skip
    clocks = run.get("clocks", [])
    clocks = [
        c for c in (clocks if isinstance(clocks, list) else [clocks, run.get("clocks_after")]) if isinstance(c, dict)
    ]
    if clocks:
        lines += ["Clocks before and after: " + "; ".join(f"{c.get('clocks.sm')}" for c in clocks) + ".", ""]
    timed = [r for r in rows if r.get("case") and r.get("which")]
    if not timed or not plate:
        return lines
    real, references = measured(run["gpu"], rows), {(r["case"], r["which"]): r for r in timed if r["by"] == "torch"}
    also = PREDICTED if plate.name == "H200" else ()
    cells = []
    for r in sorted(timed, key=lambda r: (r["case"], r["which"] != "forward", r["median_us"])):
        work, seconds = work_of(r), r["median_us"] / 1e6
        reference = references.get((r["case"], r["which"]))
        cells.append((
            f"`{r['case']}`", r["which"], r["by"].removeprefix("peer:") + error_of(r), us(seconds),
            speed(work, seconds, plate), share(work, seconds, real), share(work, seconds, plate),
            f"{reference['median_us'] / r['median_us']:.1f}x" if reference else "",
            *(us(predict(seconds, work, plate, NAMEPLATE[g])) for g in also),
        ))  # fmt: skip
    others = [(f"`{r['name']}`", us(r["median_us"] / 1e6), f"{r['TFLOPS']:,.0f} TFLOPS") for r in rows if "TFLOPS" in r]
    head = "op and shape | pass | by | us | speed | of measured | of data sheet | over torch"
    lines += table(head + "".join(f" | {g}, predicted, us" for g in also), cells)
    lines += [f"Predicted: {MODEL}", ""] if also else []
    return lines + (table("others | us | speed", others) if others else [])


def error_of(r: dict) -> str:
    return f" (differs by {r['error']:.1e})" if r.get("error") is not None else ""


def of_layer(run: dict) -> list[str]:
    rows = [r for r in run["benchmarks"] if r.get("moe_layer")]
    mine = {r["moe_layer"]: r["least_us"] for r in rows if r["by"] == "ours"}
    lines = table("MoE layer | by | median, ms | least, ms | least over ours | differs from the loop by", [
        (r["moe_layer"], r["by"], f"{r['median_us'] / 1e3:,.2f}", f"{r['least_us'] / 1e3:,.2f}",
         f"{r['least_us'] / mine[r['moe_layer']]:.2f}x" if r["moe_layer"] in mine else "",
         f"{r['error']:.1e}") for r in rows
    ])  # fmt: skip
    return lines if rows else []


def of_steps(run: dict) -> list[str]:
    lines, plate = [], nameplate(run.get("gpu") or "")
    for r in run["benchmarks"]:
        if r.get("train_step"):
            memory = f", {r['peak_memory'] / 1e9:.1f} GB at most" if r.get("peak_memory") else ""
            lines.append(f"- Training step, {r['train_step']}: {r['median_us'] / 1e3:,.1f} ms, "
                         f"{r['tokens_per_s']:,.0f} tokens/s, MFU {r['mfu']:.1%} of {r['peak']}{memory}.")  # fmt: skip
        if r.get("decode"):
            limit = f", {floor(work_of(r), plate) / r['median_us'] * 1e6:.0%} of the limit" if plate else ""
            lines.append(f"- Decoding, {r['decode']}: {r['median_us'] / 1e3:,.2f} ms a step, {r['tokens_per_s']:,.0f} "
                         f"tokens/s{limit}.")  # fmt: skip
    return [*lines, ""] if lines else []


def of_host(run: dict) -> list[str]:
    calls = [r for r in run["benchmarks"] if r.get("host")]
    lines = []
    if calls:
        lines += [f"What the host spends on a call up to its launch; torch's own rms_norm of one row: "
                  f"{calls[0]['yardstick_us']:.1f} us.", ""]  # fmt: skip
        lines += table("op | us | over torch's rms_norm", [
            (f"`{r['host']}`", f"{r['us']:.1f}", f"{r['ratio']:.1f}x") for r in sorted(calls, key=lambda r: r["ratio"])
        ])  # fmt: skip
    for r in run["benchmarks"]:
        if r.get("imports"):
            lines.append(f"- `import {r['imports']}`: {max(r['seconds'], 0):.2f} s more than an empty process.")
        if r.get("launches"):
            n = r["launches"]
            lines.append(f"- Triton kernels in a step of the {r['model']} model, {r['layers']} layers: {n['forward']} "
                         f"forward, {n['backward']} backward.")  # fmt: skip
    return [*lines, ""] if lines else []


def of_left_out(run: dict) -> list[str]:
    lines = []
    if run.get("peers"):
        lines += ["<details><summary>Peers: which are here, and why the others are not</summary>", ""]
        lines += table("package | version, or why not", [(k, v.replace("|", "/")) for k, v in run["peers"].items()])
        lines += ["</details>", ""]
    if run.get("left_out"):
        lines += ["<details><summary>Not timed, and why</summary>", ""]
        reasons = {}
        for name, why in run["left_out"].items():
            reasons.setdefault((name.split("[")[0], why.replace("|", "/")), []).append(name)
        lines += table("benchmark | how many | reason", [(f"`{k}`", len(v), why) for (k, why), v in reasons.items()])
        lines += ["</details>", ""]
    return lines if run.get("complete", True) else [*lines, "The run was stopped; the next one goes on.", ""]


def of_limits(results: Path, found: list[dict]) -> list[str]:
    path = results / "predictions.json"
    if not path.exists():
        return []
    best = {}
    for run in found:
        for r in run["benchmarks"]:
            plate, key = nameplate(run.get("gpu") or ""), (r.get("case"), r.get("which"))
            if plate and r.get("case") and r["by"] in ("triton", "cuda"):
                here = best.setdefault((plate.name, *key), r["median_us"])
                best[(plate.name, *key)] = min(here, r["median_us"])
    cells = []
    for r in load(path)["rows"]:
        work = f"{r['bytes'] / 1e6:,.1f}", f"{r['flops'] / 1e9:,.1f}" if r["flops"] else ""
        seen = [(g, best[(g, r["case"], r["which"])]) for g in NAMEPLATE if (g, r["case"], r["which"]) in best]
        told = ", ".join(f"{g} {us(t / 1e6)} us" for g, t in seen) or "not measured"
        limits = (f"{us(r['floor_us'][g] / 1e6)} ({r['bound'][g][0]})" for g in NAMEPLATE)
        cells.append((f"`{r['case']}`", r["which"], *work, *limits, told))
    head = "op and shape | pass | MB | GFLOP | " + " | ".join(f"{g}, us" for g in NAMEPLATE) + " | measured"
    return [
        "## Prediction: what every op must take at least", "",
        f"{source('predictions.json')}. Not a measurement: bytes over the data sheet's bandwidth or FLOPs over its",
        "rate, whichever takes longer (m: memory, c: compute). Each argument and each result counts once; weights of",
        "experts without rows do not; a backward counts what it must read again. No kernel is faster.",
        "", *table(head, cells),
    ]  # fmt: skip


def occupancy(threads: int, registers: int, shared: int) -> float:
    """Of an sm_90's 64 warps, by registers (256 a warp at once), shared memory (1 KB a block besides) and blocks."""
    warps = -(-threads // 32)
    by_registers = 65536 // (max(-(-registers * 32 // 256) * 256, 256) * warps)
    by_shared = (228 << 10) // (shared + 1024)
    return min(by_registers, by_shared, 64 // warps, 32) * warps / 64


def of_resources(results: Path) -> list[str]:
    lines, cells = [], []
    for name, page in (
        ("resources.json", "kernels-resources.md"),
        ("resources_cuda.json", "kernels-resources-cuda.md"),
    ):
        path = results / name
        if not path.exists():
            continue
        kinds = {}
        for r in load(path)["kernels"]:
            if "error" not in r:
                kinds.setdefault(r["kernel"].split("<")[0], []).append(r)
        for kernel, rows in sorted(kinds.items()):
            full = [occupancy(r["threads"] if "threads" in r else 32 * r["warps"], r["registers"], r["shared"])
                    for r in rows if r.get("threads", True)]  # fmt: skip
            cells.append((
                f"`{kernel}`", "Triton" if name == "resources.json" else "CUDA", len(rows),
                spread([r["registers"] for r in rows]), max(r["spilled"] for r in rows),
                spread([round(r["shared"] / 1024) for r in rows]),
                spread([round(100 * o) for o in full]) if full else "",
            ))  # fmt: skip
        lines.append(f"{source(name)}, [all of it]({page})")
    if not cells:
        return []
    head = "kernel | by | builds | registers a thread | spilled bytes | shared KB | theoretical occupancy, %"
    return ["## What the compiled kernels take", "", "; ".join(lines) + ". Compiled for sm_90a; no GPU is needed. "
            "A CUDA kernel's shared memory is the static part: what it asks for at launch comes on top, and its "
            "occupancy is then lower.", "", *table(head, cells)]  # fmt: skip


def spread(values: list[int]) -> str:
    low, high = min(values), max(values)
    return f"{low}" if low == high else f"{low} to {high}"


def page(results: Path, force: bool, pictures: list[tuple[str, str]]) -> str:
    found = runs(results, force)
    lines = [
        "# Performance", "",
        "Made by `python -m benchmarks.report` from [benchmarks/results](../benchmarks/results); do not edit. `make",
        "bench` times what a machine can and makes it anew, `make bench QUICK=1` in at most 8 minutes. Medians; random",
        "data; the GPU's clock; a cold L2, by a flush before each call or, below 20 us, by other arguments for each of",
        "the calls of a CUDA graph. CPU times depend on who else uses the machine; only their ratios tell.", "",
    ]  # fmt: skip
    if not any(run.get("gpu") and run["benchmarks"] for run in found):
        lines += ["**On a GPU: not measured.** No results file of a GPU is here yet.", ""]
    for title, name in pictures:
        lines += [f"![{title}]({name})", ""]
    for run in found:
        lines += of_run(run)
    return "\n".join([*lines, *of_limits(results, found), *of_resources(results)]).rstrip() + "\n"


def short(results: Path, force: bool) -> str:
    """What README.md tells: each op's default backend at its own shape, or that nothing is measured."""
    cells = []
    for run in runs(results, force):
        plate = nameplate(run.get("gpu") or "")
        forward = [
            r for r in run["benchmarks"] if plate and r.get("which") == "forward" and r["by"] in ("cuda", "triton")
        ]
        ops = {}
        for r in sorted(forward, key=lambda r: r["median_us"]):
            ops.setdefault(r["case"].split("#")[0].split("-")[0], r)
        cells += [(f"`{op}`", f"`{r['case']}`", plate.name, r["by"], us(r["median_us"] / 1e6),
                   share(work_of(r), r["median_us"] / 1e6, plate), f"[{run['file']}](benchmarks/results/{run['file']})")
                  for op, r in sorted(ops.items())]  # fmt: skip
    if not cells:
        return "Speed on a GPU: **not measured**. What every op must take at least, and what CPUs can tell: " \
               "[docs/performance.md](docs/performance.md).\n"  # fmt: skip
    return "\n".join(table("op | case | GPU | by | us | of data sheet | from", cells))


def write(results: Path = RESULTS, force: bool = False) -> None:
    pictures = charts.draw(runs(results, force), results / "predictions.json", PAGE.parent)
    with whole(PAGE) as partial:
        partial.write_text(page(results, force, pictures))
    print(f"wrote {PAGE.relative_to(ROOT)}" + "".join(f", {name}" for _, name in pictures))


def write_readme(results: Path = RESULTS, readme: Path = README, force: bool = False) -> None:
    text, (begin, end) = readme.read_text(), MARKS
    if text.count(begin) != 1 or text.count(end) != 1 or text.index(begin) > text.index(end):
        raise InputError(f"{readme.name} needs one {begin} and after it one {end}")
    before, after = text.split(begin)[0], text.split(end)[1]
    with whole(readme) as partial:
        partial.write_text(f"{before}{begin}\n{short(results, force)}{end}{after}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--readme", action="store_true")
    parser.add_argument("--compare", nargs=2, type=Path, metavar=("OLD", "NEW"))
    parser.add_argument("--resources", action="store_true")
    parser.add_argument("--force", action="store_true", help="also what would be refused")
    args = parser.parse_args()
    if args.compare:
        return compare.tell(compare.worse(*map(load, args.compare)))
    if args.resources:
        return compare.tell(compare.against_commit(ROOT, args.results))
    write(args.results, args.force)
    if args.readme:
        write_readme(args.results, force=args.force)
    return 0


if __name__ == "__main__":
    sys.exit(command(main)())
