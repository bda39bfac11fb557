"""Pictures of docs/performance.md: few and small. None where matplotlib is missing."""

import json
from pathlib import Path

from benchmarks.limits import NAMEPLATE, Work, floor, nameplate

OURS, LIMIT, OTHER = "#2a6fbb", "#8a8f98", "#d1495b"


def draw(runs: list[dict], predictions: Path, folder: Path) -> list[tuple[str, str]]:
    """Title and file name of each picture drawn."""
    try:
        import matplotlib
    except ImportError:
        return []
    matplotlib.use("Agg")
    drawn = []
    gpu = next((r for r in runs if nameplate(r.get("gpu") or "") and any(b.get("case") for b in r["benchmarks"])), None)
    if gpu:
        drawn.append(roofline(gpu["benchmarks"], nameplate(gpu["gpu"]), folder, f"measured on {gpu['gpu']}"))
        drawn += filter(None, [against_peers(gpu, folder), scaling(gpu, folder), breakdown(gpu, folder)])
    elif predictions.exists():
        rows = [r | dict(by="prediction") for r in json.loads(predictions.read_text())["rows"]]
        drawn.append(roofline(rows, NAMEPLATE["H200"], folder, "prediction for H200: the limit, nothing measured"))
    layers = [(r, b) for r in runs if not r.get("gpu") for b in r["benchmarks"] if b.get("moe_layer")]
    if layers:
        drawn.append(bars([b for _, b in layers], folder))
    return drawn


def save(figure, folder: Path, name: str, title: str) -> tuple[str, str]:
    from matplotlib import pyplot as plt

    figure.savefig(folder / name, dpi=110, metadata=dict(Software=None))
    plt.close(figure)
    return title, name


def frame(axes, title: str) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25, linewidth=0.6)
    axes.set_title(title, loc="left", fontsize=10)


def roofline(rows: list[dict], gpu, folder: Path, title: str) -> tuple[str, str]:
    """Every op as a dot: FLOPs per byte, and operations a second. Ops without products count a FLOP per byte."""
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 4.2), layout="constrained")
    for precision, style in (("bf16", "--"), ("fp8", "-")):
        intensity = 0.5, gpu.rate(precision) / gpu.bandwidth, 2**15
        roof = [min(i * gpu.bandwidth, gpu.rate(precision)) / 1e12 for i in intensity]
        axes.plot(intensity, roof, style, color=LIMIT, linewidth=1.2, label=f"{gpu.name}, {precision}, data sheet")
    for r in rows:
        if not r.get("case") or r["by"] not in ("triton", "cuda", "prediction") or not r["bytes"]:
            continue
        work = Work(r["bytes"], r["flops"] or r["bytes"], r["precision"])
        seconds = r["median_us"] / 1e6 if "median_us" in r else floor(work, gpu)
        hollow = r["by"] == "prediction"
        axes.plot(work.flops / work.bytes, work.flops / seconds / 1e12, "o", markersize=4, color=OURS,
                  markerfacecolor="none" if hollow else OURS)  # fmt: skip
    axes.set(xscale="log", yscale="log", xlabel="FLOP per byte (1 where nothing is multiplied)", ylabel="TFLOPS")
    axes.legend(frameon=False, fontsize=8)
    frame(axes, f"roofline, {title}")
    return save(figure, folder, "performance-roofline.png", f"Roofline, {title}")


def against_peers(run: dict, folder: Path) -> tuple[str, str] | None:
    """The fastest of ours over each peer's time, at each op's own shape."""
    from matplotlib import pyplot as plt

    rows = [b for b in run["benchmarks"] if b.get("which") == "forward"]
    ours = {}
    for b in rows:
        if b["by"] in ("triton", "cuda"):
            ours[b["case"]] = min(ours.get(b["case"], float("inf")), b["median_us"])
    pairs = [(f"{b['op']}, {b['by'][5:]}", b["median_us"] / ours[b["case"]]) for b in rows
             if b["by"].startswith("peer:") and b["case"] in ours][:40]  # fmt: skip
    if not pairs:
        return None
    figure, axes = plt.subplots(figsize=(8, 0.25 * len(pairs) + 1.2), layout="constrained")
    axes.barh(range(len(pairs)), [ratio for _, ratio in pairs], color=[OURS if r >= 1 else OTHER for _, r in pairs])
    axes.set_yticks(range(len(pairs)), [name for name, _ in pairs], fontsize=7)
    axes.axvline(1, color=LIMIT)
    axes.set(xlabel="peer's time over ours: above 1, ours is faster")
    frame(axes, f"against peers, {run['gpu']}")
    return save(figure, folder, "performance-peers.png", f"Against peers, {run['gpu']}")


def scaling(run: dict, folder: Path) -> tuple[str, str] | None:
    """Share of the data sheet's limit by the number of tokens or rows, of ops that were timed at three or more."""
    from matplotlib import pyplot as plt

    lines, plate = {}, nameplate(run["gpu"])
    for b in run["benchmarks"]:
        if b.get("which") != "forward" or b["by"] not in ("triton", "cuda"):
            continue
        size = next((int(b["shape"][k]) for k in ("T", "S", "M") if k in b["shape"]), None)
        others = tuple(v for k, v in b["shape"].items() if k not in ("T", "S", "M"))
        if size:
            limit = floor(Work(b["bytes"], b["flops"], b["precision"]), plate) / b["median_us"] * 1e6
            lines.setdefault((b["op"], others, b["by"]), {})[size] = limit
    best = {}
    for (op, _, by), points in sorted(lines.items(), key=lambda pair: len(pair[1])):
        if len(points) >= 3:
            best[f"{op}, {by}"] = points
    if not best:
        return None
    figure, axes = plt.subplots(figsize=(8, 4.2), layout="constrained")
    for name, points in list(best.items())[:16]:
        axes.plot(*zip(*sorted(points.items()), strict=True), "o-", markersize=3, linewidth=1, label=name)
    axes.set(xscale="log", xlabel="tokens or rows", ylabel="share of the limit", ylim=(0, 1.05))
    axes.legend(frameon=False, fontsize=6, ncols=2)
    frame(axes, f"scaling, {run['gpu']}")
    return save(figure, folder, "performance-scaling.png", f"Scaling with tokens, {run['gpu']}")


def breakdown(run: dict, folder: Path) -> tuple[str, str] | None:
    from matplotlib import pyplot as plt

    step = next((b for b in run["benchmarks"] if b.get("breakdown")), None)
    if not step:
        return None
    figure, axes = plt.subplots(figsize=(8, 2.6), layout="constrained")
    left = 0.0
    for name, spent in step["breakdown"].items():
        axes.barh(0, spent / 1e3, left=left, label=name)
        left += spent / 1e3
    axes.set(xlabel="ms of the GPU in one training step", yticks=[])
    axes.legend(frameon=False, fontsize=5, ncols=2)
    frame(axes, step["train_step"])
    return save(figure, folder, "performance-step.png", f"A training step by kernel, {step['train_step']}")


def bars(rows: list[dict], folder: Path) -> tuple[str, str]:
    from matplotlib import pyplot as plt

    names = [*dict.fromkeys(b["by"] for b in rows)]
    tokens = sorted({b["T"] for b in rows})
    figure, axes = plt.subplots(figsize=(7, 3), layout="constrained")
    for i, name in enumerate(names):
        spent = {b["T"]: b["median_us"] / 1e3 for b in rows if b["by"] == name}
        places = [t + (i - (len(names) - 1) / 2) * 0.8 / len(names) for t in range(len(tokens)) if tokens[t] in spent]
        color = OURS if name == "ours" else (OTHER, LIMIT)[i % 2]
        axes.bar(places, [spent[t] for t in tokens if t in spent], 0.8 / len(names), label=name, color=color)
    axes.set_xticks(range(len(tokens)), [f"T = {t}" for t in tokens])
    axes.set(ylabel="ms")
    axes.legend(frameon=False, fontsize=8)
    threads = rows[0].get("threads")
    frame(axes, f"one MoE layer of Ling-mini on a CPU, fp32, {threads} thread(s)")
    return save(figure, folder, "performance-cpu.png", "One MoE layer on a CPU")
