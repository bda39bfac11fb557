"""The sections of docs/performance.md, each from what a results file holds."""

from benchmarks.limits import MODEL, Work, bound, floor, measured, predict
from ling_kernels.gpu import HOPPER, named

PREDICTED = ("H20", "H100")
RESOURCES = {"resources.json": "kernels-resources.md", "resources_cuda.json": "kernels-resources-cuda.md"}


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
    if run.get("steps"):
        told = (f"{name} {step['seconds']:,.0f} s ({step['status']})" for name, step in run["steps"].items())
        lines += [f"Steps of `make gpu`: {', '.join(told)}.", ""]
    if run.get("gpu"):
        lines += of_gpu(run)
    return lines + of_layer(run) + of_steps(run) + of_host(run) + of_left_out(run)


def of_gpu(run: dict) -> list[str]:
    rows, plate = run["benchmarks"], named(run["gpu"])
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
            *(us(predict(seconds, work, plate, HOPPER[g])) for g in also),
        ))  # fmt: skip
    others = [(f"`{r['name']}`", us(r["median_us"] / 1e6), f"{r['TFLOPS']:,.0f} TFLOPS") for r in rows if "TFLOPS" in r]
    head = "op and shape | pass | by | us | speed | of measured | of data sheet | over torch"
    lines += table(head + "".join(f" | {g}, predicted, us" for g in also), cells)
    lines += [f"Predicted: {MODEL}", ""] if also else []
    return lines + (table("others | us | speed", others) if others else [])


def error_of(r: dict) -> str:
    return f" (differs by {r['error']:.1e})" if r.get("error") is not None else ""


def of_layer(run: dict) -> list[str]:
    rows = [r for r in run["benchmarks"] if r.get("layer")]
    if not rows:
        return []
    mine = {(r["layer"], r["which"]): r["least_us"] for r in rows if r["by"] == "ours"}
    cells = []
    for r in rows:
        key = r["layer"], r["which"]
        cells.append((
            *key, r["by"], f"{r['median_us'] / 1e3:,.2f}", f"{r['least_us'] / 1e3:,.2f}",
            f"{r['least_us'] / mine[key]:.2f}x" if key in mine else "", f"{r['tokens_per_s']:,.0f}", f"{r['mfu']:.1%}",
            f"{r['peak_memory'] / 1e9:.1f}" if r.get("peak_memory") else "", f"{r['error']:.1e}",
        ))  # fmt: skip
    head = "layer | pass | by | median, ms | least, ms | least over ours | tokens/s | MFU | GB at most | differs by"
    whose = "of the GPU" if run.get("gpu") else "resident in the whole process"
    note = (
        f"Differs: from the per-expert loop's result or gradient, relative. MFU of {rows[0]['peak']}; memory {whose}."
    )
    return [*table(head, cells), note, ""]


def of_steps(run: dict) -> list[str]:
    lines, plate = [], named(run.get("gpu") or "")
    for r in run["benchmarks"]:
        if r.get("train_step"):
            memory = f", {r['peak_memory'] / 1e9:.1f} GB at most" if r.get("peak_memory") else ""
            lines.append(f"- Training step, {r['train_step']}: {r['median_us'] / 1e3:,.1f} ms, "
                         f"{r['tokens_per_s']:,.0f} tokens/s, MFU {r['mfu']:.1%} of {r['peak']}{memory}.")  # fmt: skip
        if r.get("decode"):
            limit = f", {floor(work_of(r), plate) / r['median_us'] * 1e6:.0%} of the limit" if plate else ""
            started = f", {r['launches_per_layer']:.0f} launches a layer" if r.get("launches_per_layer") else ""
            lines.append(f"- Decoding, {r['decode']}: {r['median_us'] / 1e3:,.2f} ms a step, {r['tokens_per_s']:,.0f} "
                         f"tokens/s{limit}{started}.")  # fmt: skip
    return [*lines, ""] if lines else []


def of_host(run: dict) -> list[str]:
    calls = [r for r in run["benchmarks"] if r.get("host")]
    lines = []
    if calls:
        unit = min(r["yardstick_us"] for r in calls)
        lines += ["What the host spends on a call up to its last launch, CPU time; torch's own rms_norm of one row: "
                  f"{unit:.1f} us.", ""]  # fmt: skip
        lines += table("op | launches | us | over torch's rms_norm", [
            (f"`{r['host']}`", r.get("launched", ""), f"{r['us']:.1f}", f"{r['ratio']:.1f}x")
            for r in sorted(calls, key=lambda r: r["ratio"])
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


def of_limits(rows: list[dict], found: list[dict]) -> list[str]:
    """Of predictions.json, each op's own shapes."""
    if not rows:
        return []
    best = {}
    for run in found:
        for r in run["benchmarks"]:
            plate, key = named(run.get("gpu") or ""), (r.get("case"), r.get("which"))
            if plate and r.get("case") and r["by"] in ("triton", "cuda"):
                here = best.setdefault((plate.name, *key), r["median_us"])
                best[(plate.name, *key)] = min(here, r["median_us"])
    cells = []
    for r in (r for r in rows if not r.get("grid")):
        work = f"{r['bytes'] / 1e6:,.1f}", f"{r['flops'] / 1e9:,.1f}" if r["flops"] else ""
        seen = [(g, best[(g, r["case"], r["which"])]) for g in HOPPER if (g, r["case"], r["which"]) in best]
        told = ", ".join(f"{g} {us(t / 1e6)} us" for g, t in seen) or "not measured"
        limits = (f"{us(r['floor_us'][g] / 1e6)} ({r['bound'][g][0]})" for g in HOPPER)
        cells.append((f"`{r['case']}`", r["which"], *work, *limits, told))
    head = "op and shape | pass | MB | GFLOP | " + " | ".join(f"{g}, us" for g in HOPPER) + " | measured"
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


def of_resources(tables: dict[str, list[dict]]) -> list[str]:
    """Kernels by name of their file."""
    lines, cells = [], []
    for name, kernels in tables.items():
        kinds = {}
        for r in kernels:
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
        lines.append(f"{source(name)}, [all of it]({RESOURCES[name]})")
    if not cells:
        return []
    head = "kernel | by | builds | registers a thread | spilled bytes | shared KB | theoretical occupancy, %"
    return ["## What the compiled kernels take", "", "; ".join(lines) + ". Compiled for sm_90a; no GPU is needed. "
            "A CUDA kernel's shared memory is the static part: what it asks for at launch comes on top, and its "
            "occupancy is then lower.", "", *table(head, cells)]  # fmt: skip


def spread(values: list[int]) -> str:
    low, high = min(values), max(values)
    return f"{low}" if low == high else f"{low} to {high}"


def of_commands(found: list[dict]) -> list[str]:
    """What a stranger waits for; `found` as report.commands gives it."""
    rows = commands_table(found)
    return ["## Commands, each in a fresh clone", "", *rows] if rows else []


def commands_table(found: list[dict], folder: str = "../benchmarks/results") -> list[str]:
    cells = []
    for run in found:
        where = f"{run['machine']}, {run['cores']} cores"
        for c in run["commands"].values():
            parts = [f"{step} {n:,} s" for step, n in c.get("steps", {}).items()]
            if "validation_loss" in c:
                parts.append(f"validation loss {c['validation_loss']:.4f} nats per token")
            told = f"[{run['file']}]({folder}/{run['file']}), commit {run['commit'][:12]}"
            cells.append((f"`{c['command']}`", f"{c['seconds']:,.0f}", where, ", ".join(parts), told))
    return table("command | seconds | on | of which | from", cells) if cells else []
