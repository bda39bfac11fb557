"""Reports of a run: metrics.jsonl, expert_load.jsonl, fp8.jsonl, TensorBoard, a progress bar or lines; and its
plots."""

import json
import math
import sys
from dataclasses import dataclass, field
from pathlib import Path

import torch

from ..errors import InputError
from ..files import atomic_write
from ..model.config_json import is_integer

FP8_FILE = "fp8.jsonl"
TRAIN, VALID, GREY = "#2a6fbb", "#d1495b", "#8a8f98"  # colours
LAST = 0.1  # share of the run, at its end, whose load the heatmap shows
METRICS, OPERANDS = ("underflow", "distortion"), ("x", "w", "dy", "xt", "dyt")  # of fp8.jsonl, see monitor.py


@dataclass
class Details:
    """What a report shows of a step besides its record."""

    seconds: float = 0.0
    expert_counts: torch.Tensor | None = None  # [MoE layers, experts] int64: tokens of each expert
    fp8: dict = field(default_factory=dict)  # FP8Monitor's record; empty where nothing was measured
    out_of_range: list = field(default_factory=list)  # monitor.OutOfRange
    switched: list[str] = field(default_factory=list)  # layers that use bf16 from the next step on


class Report:
    """Writes the files in the run's folder and prints. Lines of steps after `since`, from a run that went on further,
    are cut off."""

    def __init__(self, run: Path, since: int, steps: int, log_every: int):
        self.run, self.steps, self.log_every = run, steps, log_every
        self.metrics = open_lines(run / "metrics.jsonl", since)
        self.load = open_lines(run / "expert_load.jsonl", since)
        self.fp8 = open_lines(run / FP8_FILE, since) if (run / FP8_FILE).exists() else None
        self.board = tensorboard(run, since)
        self.bar = progress_bar(since, steps)
        self.seconds: float | None = None  # of a step, smoothed
        self.counts, self.counted = None, since  # tokens of each MoE layer and expert after step `counted`

    def say(self, text: str) -> None:
        if self.bar is None:
            print(text, flush=True)
        else:
            self.bar.write(text)

    def step(self, record: dict, details: Details) -> None:
        """Report one step."""
        write_line(self.metrics, {k: finite(v) for k, v in record.items()})
        if self.board is not None:
            for name, value in record.items():
                if name != "step" and isinstance(value, int | float) and math.isfinite(value):
                    self.board.add_scalar(name, value, record["step"])
        if (counts := details.expert_counts) is not None:
            self.counts = counts if self.counts is None else self.counts + counts
        self.seconds = details.seconds if self.seconds is None else 0.9 * self.seconds + 0.1 * details.seconds
        self.show(record)
        if details.fp8:
            self.measurement(details)

    def show(self, record: dict) -> None:
        step, loss = record["step"], record["loss"]
        speed = f"{record['tokens_per_s']:,.0f} tok/s  MFU {100 * record['mfu']:.1f} %"
        if self.bar is not None:
            self.bar.set_postfix_str(f"loss {loss:.3f}, {speed}", refresh=False)
            self.bar.update(step - self.bar.n)
        elif step % self.log_every == 0 or step == self.steps:
            self.say(
                f"step {step:>{len(str(self.steps))}}/{self.steps}  loss {loss:.4f}"
                f"  next token {record['main_loss']:.4f}  lr {record['lr']:.1e}  grad norm {record['grad_norm']:.2f}"
                f"  {speed}  eta {duration(self.seconds * (self.steps - step))}"
            )
        if "val_loss" in record:
            self.say(f"step {step}: validation loss {record['val_loss']:.4f} nats per token")
        if "skipped" in record:
            self.say(
                f"step {step} skipped, nothing was changed: loss {loss}, gradient norm {record['grad_norm']}"
                f" ({record['skipped']} skipped in all)" + (f"; {record['spike']}" if "spike" in record else "")
            )

    def measurement(self, details: Details) -> None:
        """Write a measurement of the FP8 layers; print a line for each layer that has left its band or uses bf16
        now."""
        step = details.fp8["step"]
        if self.fp8 is None:
            self.fp8 = open_lines(self.run / FP8_FILE, step)
        write_line(self.fp8, details.fp8)
        for layer in dict.fromkeys(out.layer for out in details.out_of_range):
            found = [out for out in details.out_of_range if out.layer == layer]
            more = f", {len(found) - 1} more" if len(found) > 1 else ""
            self.say(f"step {step}: outside its band: {found[0]}{more}")
        for name in details.switched:
            self.say(f"step {step}: {name} switches to bf16")

    def expert_load(self, step: int) -> None:
        """Write the experts' load since the last such line. Call it before a checkpoint, so that a resumed run loses
        none."""
        if self.counts is not None:
            write_line(self.load, dict(first=self.counted + 1, step=step, counts=self.counts.tolist()))
        self.counts, self.counted = None, step

    def close(self) -> None:
        self.metrics.close()
        self.load.close()
        if self.fp8 is not None:
            self.fp8.close()
        if self.board is not None:
            self.board.close()
        if self.bar is not None:
            self.bar.close()


def open_lines(path: Path, since: int):
    """Open a file of JSON lines to append to. Keeps the lines of steps up to `since`; drops those that are damaged."""
    kept = [json.dumps(row) + "\n" for row in read_lines(path) if row["step"] <= since]
    try:
        with atomic_write(path) as partial:
            partial.write_text("".join(kept))
        return open(path, "a", buffering=1)  # whole lines reach the file at once
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror}") from None


def read_lines(path: Path) -> list[dict]:
    """The records of a file of JSON lines, each with its step. Leaves out damaged lines, such as an incomplete last one
    of a process that was killed."""
    rows = []
    if path.is_file():
        for line in path.read_bytes().splitlines():
            try:
                row = json.loads(line)
            except (ValueError, RecursionError):
                continue
            if isinstance(row, dict) and is_integer(row.get("step")):
                rows.append(row)
    return rows


def write_line(file, record: dict) -> None:
    try:
        file.write(json.dumps(record) + "\n")
    except OSError as error:
        raise InputError(f"cannot write {file.name}: {error.strerror}") from None


def finite(value):
    """None instead of NaN and infinity, which JSON lacks."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


def tensorboard(run: Path, since: int):
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        return None
    return SummaryWriter(run / "tensorboard", purge_step=since + 1)


def progress_bar(since: int, steps: int):
    if not sys.stderr.isatty():
        return None
    try:
        from tqdm import tqdm
    except ImportError:
        return None
    return tqdm(initial=since, total=steps, unit=" steps", dynamic_ncols=True)


def duration(seconds: float) -> str:
    """H:MM:SS, with the days before it from one day on."""
    days, rest = divmod(int(seconds), 86400)
    clock = f"{rest // 3600:02}:{rest // 60 % 60:02}:{rest % 60:02}"
    return f"{days}d {clock}" if days else clock


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
    axes.plot(steps, losses, color=TRAIN, alpha=0.3, linewidth=0.8, label="training, each step")
    axes.plot(steps, smooth(losses), color=TRAIN, linewidth=1.6, label="training, smoothed")
    if validation:
        axes.plot(*zip(*validation, strict=True), "o-", color=VALID, markersize=4, linewidth=1.4, label="validation")
        step, value = validation[-1]
        axes.annotate(f"{value:.3f}", (step, value), (7, -4), textcoords="offset points", color=VALID)
    axes.set(xlabel="step", ylabel="loss of the next token, nats", xlim=(0, 1.07 * steps[-1]))
    axes.set_title(f"{metrics[-1]['tokens']:,} tokens", loc="right", fontsize=9, color=GREY)
    return finish(figure, [axes], path)


def draw_load(metrics: list[dict], load: list[dict], layers: list[str], path: Path) -> Path:
    """Above: tokens of each expert over its layer's mean, at the end of the run. Below: the imbalance by step."""
    import numpy as np
    from matplotlib import pyplot as plt

    last = load[-1]["step"]
    recent = [row for row in load if row["step"] > last * (1 - LAST)] or load[-1:]
    counts = np.sum([row["counts"] for row in recent], axis=0, dtype=np.float64)
    share = counts / np.maximum(counts.mean(1, keepdims=True), 1)
    rows, columns = share.shape
    height = min(max(0.34 * rows, 1.2), 12)
    figure, (top, bottom) = plt.subplots(
        2, figsize=(9, height + 3.4), height_ratios=[height, 2.2], layout="constrained"
    )
    image = top.imshow(share, aspect="auto", cmap="RdBu_r", vmin=0, vmax=2, interpolation="nearest")
    top.set_yticks(range(rows), layers)
    top.set(xlabel="expert")
    steps = f"steps {recent[0]['first']} to {last}"
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
        bottom.plot(steps, values, color=color, alpha=0.25, linewidth=0.8)
        bottom.plot(steps, smooth(values), color=color, linewidth=1.6, label=label)
    bottom.set(xlabel="step", ylabel="busiest expert / mean - 1", xlim=(0, None), ylim=(0, None))
    return finish(figure, [bottom], path)


def draw_fp8(measured: list[dict], path: Path) -> Path:
    """Layers against steps: underflow above, distortion below, a column for each operand; grey: not measured."""
    import numpy as np
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


def finish(figure, with_legend: list, path: Path) -> Path:
    from matplotlib import pyplot as plt

    for axes in with_legend:
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.25, linewidth=0.6)
        axes.legend(frameon=False, fontsize=9)
    figure.savefig(path, dpi=130)
    plt.close(figure)
    return path
