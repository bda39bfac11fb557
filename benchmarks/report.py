"""python -m benchmarks.report: docs/performance.md and its pictures from benchmarks/results/*.json.

    --readme          also README.md, between <!-- commands --> or <!-- performance --> and the end of it
    --compare OLD NEW fail where a median on one GPU, or a ratio of the host's, or a kernel's resources grew too much
    --resources       the same for the tables of registers in the working tree against the commit's
    --host            the same for calls' ratios to torch's own op, timed now, against the committed ones

Nothing is typed: a number stands here because a file has it, and every table names its file. Results of a changed tree,
of an unknown commit or of a GPU far below its clocks are refused, unless --force, which the page then says.
"""

import argparse
import json
import sys
from pathlib import Path

from benchmarks import charts, compare, sections
from benchmarks.blocks import fill
from benchmarks.sections import share, table, us, work_of
from ling_kernels.errors import InputError, command
from ling_kernels.files import whole
from ling_kernels.gpu import HOPPER, named

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks/results"
PAGE, README = ROOT / "docs/performance.md", ROOT / "README.md"
SUSTAINED = 0.55  # of the data sheet's matrix rate: a Hopper GPU under its power limit still multiplies so fast


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
    plate = named(run.get("gpu") or "")
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


def commands(results: Path, force: bool) -> list[dict]:
    """What benchmarks.commands timed, with the name of its file, but for changed trees."""
    found = [load(path) | dict(file=path.name) for path in sorted(results.glob("commands-*.json"))]
    return [run for run in found if force or not refusal(run)]


def page(results: Path, force: bool, pictures: list[tuple[str, str]]) -> str:
    found, predictions = runs(results, force), results / "predictions.json"
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
        lines += sections.of_run(run)
    lines += sections.of_commands(commands(results, force))
    lines += sections.of_limits(load(predictions)["rows"] if predictions.exists() else [], found)
    tables = {name: results / name for name in sections.RESOURCES}
    lines += sections.of_resources({name: load(path)["kernels"] for name, path in tables.items() if path.exists()})
    return "\n".join(lines).rstrip() + "\n"


def short(results: Path, force: bool) -> str:
    """What README.md tells: each op's faster backend at its own shape on the GPUs that ran; what a CPU told."""
    lines, seen = [], set()
    for run in runs(results, force):
        plate, file = named(run.get("gpu") or ""), f"[{run['file']}](benchmarks/results/{run['file']})"
        if plate and run["benchmarks"]:
            seen.add(plate.name)
            lines += [f"{run['gpu']}, from {file}:", "", *of_ops(run, plate)]
        mine = {(r["layer"], r["which"]): r for r in run["benchmarks"] if r.get("layer") and r["by"] == "ours"}
        others = [r for r in run["benchmarks"] if (r.get("layer"), r.get("which")) in mine and r["by"] != "ours"]
        cells = [
            (r["layer"], r["which"], f"{mine[r['layer'], r['which']]['least_us'] / 1e3:,.1f} ms", r["by"],
             f"{r['least_us'] / mine[r['layer'], r['which']]['least_us']:.2f}x") for r in others
        ]  # fmt: skip
        if cells:
            lines += [f"{run.get('gpu') or run['machine']}, least of several calls, from {file}:", ""]
            lines += table("layer | pass | ours | against | its time over ours", cells)
    missing = [name for name in HOPPER if name not in seen]
    if missing:
        lines += [f"Speed on {', '.join(missing)}: **not measured**.", ""]
    return "\n".join([*lines, "What every op must take at least, and all of this: "
                      "[docs/performance.md](docs/performance.md).\n"])  # fmt: skip


def of_ops(run: dict, plate) -> list[str]:
    ops = {}
    for r in sorted((r for r in run["benchmarks"] if r.get("case")), key=lambda r: r["median_us"]):
        if r["which"] == "forward" and r["by"] in ("cuda", "triton"):
            ops.setdefault(r["op"], r)
    return table("op | case | by | us | of data sheet", [
        (f"`{op}`", f"`{r['case']}`", r["by"], us(r["median_us"] / 1e6), share(work_of(r), r["median_us"] / 1e6, plate))
        for op, r in sorted(ops.items())
    ])  # fmt: skip


def waits(results: Path, force: bool) -> str:
    """What README.md tells of its two commands."""
    found = commands(results, force)
    shown = next((c["shown"] for run in found for c in run["commands"].values() if "shown" in c), None)
    lines = ["The first prints", "", "```", *shown, "```", ""] if shown else []
    rows = sections.commands_table(found, "benchmarks/results") or ["How long they take: not timed (`make times`).", ""]
    return "\n".join([*lines, *rows])


BLOCKS = dict(commands=waits, performance=short)  # of README.md


def write(results: Path = RESULTS, force: bool = False) -> None:
    pictures = charts.draw(runs(results, force), results / "predictions.json", PAGE.parent)
    with whole(PAGE) as partial:
        partial.write_text(page(results, force, pictures))
    print(f"wrote {PAGE.relative_to(ROOT)}" + "".join(f", {name}" for _, name in pictures))


def write_readme(results: Path = RESULTS, readme: Path = README, force: bool = False) -> None:
    fill(readme, {name: block(results, force) for name, block in BLOCKS.items()})


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--readme", action="store_true")
    parser.add_argument("--compare", nargs=2, type=Path, metavar=("OLD", "NEW"))
    parser.add_argument("--resources", action="store_true")
    parser.add_argument("--host", action="store_true")
    parser.add_argument("--force", action="store_true", help="also what would be refused")
    args = parser.parse_args()
    if args.compare:
        return compare.tell(compare.worse(*map(load, args.compare)))
    if args.resources or args.host:
        found = compare.against_commit(ROOT, args.results) if args.resources else []
        return compare.tell(found + (compare.host_against_commit(ROOT, args.results) if args.host else []))
    write(args.results, args.force)
    if args.readme:
        write_readme(args.results, force=args.force)
    return 0


if __name__ == "__main__":
    sys.exit(command(main)())
