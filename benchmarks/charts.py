"""Pictures of docs/performance.md: few and small. None where matplotlib is missing."""

import json
from pathlib import Path

from benchmarks.limits import Work, floor
from ling_kernels.gpu import HOPPER, named

OURS, LIMIT, OTHER = "#2a6fbb", "#8a8f98", "#d1495b"


def draw(runs: list[dict], predictions: Path, folder: Path) -> list[tuple[str, str]]:
    """Title and file name of each picture drawn."""
    try:
        import matplotlib
    except ImportError:
        return []
    matplotlib.use("Agg")
    drawn = []
    gpu = next((r for r in runs if named(r.get("gpu") or "") and any(b.get("case") for b in r["benchmarks"])), None)
    if gpu:
        drawn.append(roofline(gpu["benchmarks"], named(gpu["gpu"]), folder, f"measured on {gpu['gpu']}"))
        drawn.append(against_peers(gpu, folder))
        drawn.append(scaling(shares(gpu), "share of the limit", gpu["gpu"], folder))
    elif predictions.exists():
        rows = [r | dict(by="prediction") for r in json.loads(predictions.read_text())["rows"]]
        title = "prediction for H200: the limit, nothing measured"
        drawn.append(roofline([r for r in rows if not r.get("grid")], HOPPER["H200"], folder, title))
        grid = [
            (f"{r['op']}, Ling-mini,", {k: v for k, v in r["shape"].items() if k in ("S", "E", "routing")},
             r["floor_us"]["H200"]) for r in rows if r.get("grid")
        ]  # fmt: skip
        drawn.append(scaling(grid, "us", title, folder))
    profiled = next((r for r in runs if any(b.get("breakdown") for b in r["benchmarks"])), None)
    if profiled:
        drawn.append(breakdown(profiled, folder))
    layers = [b for r in runs if not r.get("gpu") for b in r["benchmarks"] if b.get("part") == "MoE layer"]
    if layers:
        drawn.append(bars([b for b in layers if b["which"] == "forward"], folder))
    return [one for one in drawn if one]


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


ROWS = ("T", "S", "M")


def shares(run: dict) -> list[tuple[str, dict, float]]:
    """Op and backend, shape, and the share of the data sheet's limit that a forward reaches."""
    plate, found = named(run["gpu"]), []
    for b in run["benchmarks"]:
        if b.get("which") == "forward" and b["by"] in ("triton", "cuda"):
            limit = floor(Work(b["bytes"], b["flops"], b["precision"]), plate) / b["median_us"] * 1e6
            found.append((f"{b['op']}, {b['by']}", b["shape"], limit))
    return found


def series(points: list[tuple[str, dict, float]], along: tuple[str, ...]) -> dict[str, dict[int, float]]:
    """What differs in one of these sizes alone, where there are three or more: by name and the other sizes."""
    lines = {}
    for name, shape, value in points:
        size = next((int(shape[k]) for k in along if k in shape), None)
        if size is not None and shape.get("routing", "balanced") in ("balanced", ""):
            others = {k: v for k, v in shape.items() if k not in along and k != "routing"}
            key = name + "".join(f" {k}{v}" for k, v in others.items())
            lines.setdefault(key, {})[size] = value
    return {name: points for name, points in lines.items() if len(points) >= 3}


def scaling(points: list[tuple[str, dict, float]], what: str, title: str, folder: Path) -> tuple[str, str] | None:
    """By the number of tokens or rows, and by that of experts: 256, 32 and 4 are one GPU's of 1, 8 and 64."""
    from matplotlib import pyplot as plt

    panels = [(series(points, ROWS), "tokens or rows"), (series(points, ("E",)), "experts on this GPU")]
    panels = [(lines, label) for lines, label in panels if lines]
    if not panels:
        return None
    figure, axes = plt.subplots(1, len(panels), figsize=(5 * len(panels), 4), layout="constrained", squeeze=False)
    for ax, (lines, label) in zip(axes[0], panels, strict=True):
        for name, found in sorted(lines.items(), key=lambda pair: -len(pair[1]))[:10]:
            ax.plot(*zip(*sorted(found.items()), strict=True), "o-", markersize=3, linewidth=1, label=name)
        ax.set(xscale="log", xlabel=label, ylabel=what, yscale="log" if what == "us" else "linear")
        ax.legend(frameon=False, fontsize=5)
        frame(ax, "scaling")
    figure.suptitle(title, fontsize=9)
    return save(figure, folder, "performance-scaling.png", f"Scaling with tokens and with experts, {title}")


def breakdown(run: dict, folder: Path) -> tuple[str, str]:
    """One stacked bar for each profiled call: the share of its time by kernel, on a CPU by op of torch."""
    from matplotlib import pyplot as plt

    by, rows = "kernel" if run.get("gpu") else "op of torch", [b for b in run["benchmarks"] if b.get("breakdown")]
    totals = [sum(r["breakdown"].values()) for r in rows]
    largest = {}  # share of a call's time
    for r, total in zip(rows, totals, strict=True):
        for name, us in r["breakdown"].items():
            largest[name] = max(largest.get(name, 0), us / total)
    names = sorted(largest.keys() - {"others"}, key=largest.get, reverse=True)[:19]
    colors = dict(zip([*names, "others"], plt.get_cmap("tab20").colors, strict=False))
    figure, axes = plt.subplots(figsize=(8, 0.45 * len(rows) + 2.6), layout="constrained")
    left = [0.0] * len(rows)
    for name in colors:
        spent = [sum(us for k, us in r["breakdown"].items() if (k if k in names else "others") == name) for r in rows]
        part = [100 * us / total for us, total in zip(spent, totals, strict=True)]
        axes.barh(range(len(rows)), part, left=left, label=name, color=colors[name], height=0.6)
        left = [a + b for a, b in zip(left, part, strict=True)]
    labels = [f"{called(r)}\n{total / 1e3:,.1f} ms" for r, total in zip(rows, totals, strict=True)]
    axes.set_yticks(range(len(rows)), labels, fontsize=7)
    axes.set(xlabel="% of the time", xlim=(0, 100))
    axes.invert_yaxis()
    figure.legend(*axes.get_legend_handles_labels(), frameon=False, fontsize=6, ncols=4, loc="outside lower center")
    title = f"time by {by}, {run.get('gpu') or run.get('machine', 'CPU')}"
    frame(axes, title)
    return save(figure, folder, "performance-step.png", f"Layers and steps: {title}")


def called(r: dict) -> str:
    if r.get("layer"):
        return f"{r['layer'].split(' of ')[0]}, {r['which']}"
    return f"training step, {r['train_step']}" if r.get("train_step") else f"decode step, {r['decode']}"


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
    frame(axes, f"one MoE layer of Ling-mini on a CPU, forward, fp32, {threads} thread(s)")
    return save(figure, folder, "performance-cpu.png", "One MoE layer on a CPU")
