"""Plots of a run from its files: loss, load of the experts, FP8 measurements."""

from pathlib import Path

import numpy as np

from ..monitor import METRICS, OPERANDS
from .lines import read_lines
from .report import FP8_FILE

TRAIN, VALID, GREY = "#2a6fbb", "#d1495b", "#8a8f98"  # colours
FEW = 20  # steps: so few have dots, as a line of one point shows nothing
LAST = 0.1  # share of the run, at its end, whose load the heatmap shows


def draw(run: Path, layers: list[str]) -> list[Path]:
    """Draw loss.png, expert_load.png and fp8.png from the run's files; returns those that had data, none without
    matplotlib. layers: names of the MoE layers."""
    try:
        import matplotlib
    except ImportError:
        return []
    matplotlib.use("Agg")
    metrics = [m for m in read_lines(run / "metrics.jsonl") if m.get("main_loss") is not None]
    load = read_lines(run / "expert_load.jsonl")
    plots = []
    if metrics:
        plots.append(draw_loss(metrics, run / "loss.png"))
    if metrics and load and layers:
        plots.append(draw_load(metrics, load, layers, run / "expert_load.png"))
    if measured := read_lines(run / FP8_FILE):
        plots.append(draw_fp8(measured, run / "fp8.png"))
    return plots


def draw_loss(metrics: list[dict], path: Path) -> Path:
    from matplotlib import pyplot as plt

    steps = [m["step"] for m in metrics]
    losses = [m["main_loss"] for m in metrics]
    validation = [(m["step"], m["val_loss"]) for m in metrics if m.get("val_loss") is not None]
    figure, axes = plt.subplots(figsize=(8, 4.5), layout="constrained")
    axes.plot(steps, losses, **dots(steps), color=TRAIN, alpha=0.3, linewidth=0.8, label="training, each step")
    axes.plot(steps, smooth(losses), **dots(steps), color=TRAIN, linewidth=1.6, label="training, smoothed")
    if validation:
        axes.plot(*zip(*validation, strict=True), "o-", color=VALID, markersize=4, linewidth=1.4, label="validation")
        step, value = validation[-1]
        axes.annotate(f"{value:.3f}", (step, value), (7, -4), textcoords="offset points", color=VALID)
    axes.set(xlabel="step", ylabel="loss of the next token, nats", xlim=(0, 1.07 * steps[-1]))
    axes.set_title(f"{metrics[-1]['tokens']:,} tokens", loc="right", fontsize=9, color=GREY)
    return finish(figure, [axes], path)


def draw_load(metrics: list[dict], load: list[dict], layers: list[str], path: Path) -> Path:
    """Above: tokens of each expert over its layer's mean, at the end of the run. Below: the imbalance by step."""
    from matplotlib import pyplot as plt

    counts, first, last = recent_load(load)
    share = counts / np.maximum(counts.mean(1, keepdims=True), 1)
    rows, columns = share.shape
    height = min(max(0.34 * rows, 1.2), 12)
    figure, (top, bottom) = plt.subplots(
        2, figsize=(9, height + 3.4), height_ratios=[height, 2.2], layout="constrained"
    )
    image = top.imshow(share, aspect="auto", cmap="RdBu_r", vmin=0, vmax=2, interpolation="nearest")
    top.set_yticks(range(rows), layers)
    top.set(xlabel="expert")
    steps = f"steps {first} to {last}"
    top.set_title(f"tokens per expert over the layer's mean, {steps}", loc="left", fontsize=10)
    figure.colorbar(image, ax=top, ticks=[0, 0.5, 1, 1.5, 2], pad=0.01).ax.set_yticklabels(
        ["0", "0.5", "1", "1.5", "2 or more"]
    )
    if columns <= 32:
        top.set_xticks(range(columns))
    steps = [m["step"] for m in metrics if "load_violation_max" in m]
    for key, color, label in (
        ("load_violation_max", VALID, "worst layer"),
        ("load_violation_mean", TRAIN, "mean of layers"),
    ):
        values = [m[key] for m in metrics if key in m]
        bottom.plot(steps, values, **dots(steps), color=color, alpha=0.25, linewidth=0.8)
        bottom.plot(steps, smooth(values), **dots(steps), color=color, linewidth=1.6, label=label)
    bottom.set(xlabel="step", ylabel="busiest expert / mean - 1", xlim=(0, None), ylim=(0, None))
    return finish(figure, [bottom], path)


def recent_load(load: list[dict]) -> tuple[np.ndarray, int, int]:
    """[MoE layers, experts] tokens over the last steps of the run; the first and the last of these steps."""
    last = load[-1]["step"]
    recent = [row for row in load if row["step"] > last * (1 - LAST)] or load[-1:]
    return np.sum([row["counts"] for row in recent], axis=0, dtype=np.float64), recent[0]["first"], last


def draw_fp8(measured: list[dict], path: Path) -> Path:
    """Layers against steps: underflow above, distortion below, a column for each operand; grey: not measured."""
    from matplotlib import pyplot as plt
    from matplotlib.colors import LogNorm

    steps = [row["step"] for row in measured]
    layers = list(dict.fromkeys(layer for row in measured for layer in row["layers"]))
    height = min(max(0.2 * len(layers), 1.6), 14)
    shape, size = (len(METRICS), len(OPERANDS)), (3 + 2.4 * len(OPERANDS), 2 * height + 1.4)
    figure, grid = plt.subplots(*shape, figsize=size, layout="constrained", sharex=True, sharey=True, squeeze=False)
    nothing = [np.nan] * len(METRICS)
    for i, (metric, least, most) in enumerate(zip(METRICS, (1e-5, 1e-4), (1, 0.1), strict=True)):
        for axes, operand in zip(grid[i], OPERANDS, strict=True):
            values = [[row["layers"].get(layer, {}).get(operand, nothing)[i] for row in measured] for layer in layers]
            shown = np.clip(np.array(values, dtype=float), least, most)
            image = axes.imshow(shown, aspect="auto", norm=LogNorm(least, most), interpolation="nearest")
            axes.set_facecolor("#d8dade")
            axes.set_title(f"{metric} of {operand}", loc="left", fontsize=9)
        figure.colorbar(image, ax=list(grid[i]), pad=0.01)
    every = -(-len(layers) // 40)
    for axes in grid[:, 0]:
        axes.set_yticks(range(0, len(layers), every), layers[::every], fontsize=7)
    at = sorted({round(k * (len(steps) - 1) / 3) for k in range(4)})
    for axes in grid[-1]:
        axes.set_xticks(at, [steps[k] for k in at])
        axes.set_xlabel("step")
    figure.savefig(path, dpi=130)
    plt.close(figure)
    return path


def smooth(values: list[float], keep: float = 0.9) -> list[float]:
    """Exponential moving average, corrected for its start."""
    total, weight, out = 0.0, 0.0, []
    for value in values:
        total, weight = keep * total + (1 - keep) * value, keep * weight + (1 - keep)
        out.append(total / weight)
    return out


def dots(steps: list[int]) -> dict:
    """Options of a line, which has dots where it has few points."""
    return dict(marker=".", markersize=5) if len(steps) <= FEW else {}


def finish(figure, with_legend: list, path: Path) -> Path:
    from matplotlib import pyplot as plt

    for axes in with_legend:
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.25, linewidth=0.6)
        axes.legend(frameon=False, fontsize=9)
        axes.xaxis.get_major_locator().set_params(integer=True)  # there is no half a step
    figure.savefig(path, dpi=130)
    plt.close(figure)
    return path
