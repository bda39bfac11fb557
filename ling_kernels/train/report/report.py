"""Reports of a run: metrics.jsonl, expert_load.jsonl, fp8.jsonl, samples.jsonl, a progress bar or lines."""

import sys
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

import torch

from ...files import finite
from ..validation import validation_line
from .lines import open_lines
from .loggers import open_loggers

FP8_FILE, SAMPLES = "fp8.jsonl", "samples.jsonl"
SHOWN = 160  # characters of a sample that are printed during training


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
    are cut off.

    A printed line has means over the steps since the line before, at most `log_every` of them; the files have each
    step. wandb: its project; settings: what it shows as the run's configuration.
    """

    def __init__(
        self, run: Path, since: int, steps: int, log_every: int, wandb: str | None = None, settings: dict | None = None
    ):
        self.run, self.since, self.steps, self.log_every = run, since, steps, log_every
        self.metrics = open_lines(run / "metrics.jsonl", since)
        self.load = open_lines(run / "expert_load.jsonl", since)
        self.fp8 = open_lines(run / FP8_FILE, since) if (run / FP8_FILE).exists() else None
        self.samples = open_lines(run / SAMPLES, since) if (run / SAMPLES).exists() else None
        self.bar = progress_bar(since, steps)
        self.loggers = open_loggers(run, since, wandb, settings or {}, self.say)
        self.interval: deque[tuple[dict, float]] = deque(maxlen=log_every)  # records and seconds since the last line
        self.seconds: float | None = None  # of a step, smoothed
        self.counts, self.counted = None, since  # tokens of each MoE layer and expert after step `counted`

    def say(self, text: str) -> None:
        if self.bar is None:
            print(text, flush=True)
        else:
            self.bar.write(text)

    def step(self, record: dict, details: Details) -> None:
        """Report one step."""
        self.metrics.write({k: finite(v) for k, v in record.items()})
        self.loggers.step(record)
        if (counts := details.expert_counts) is not None:
            self.counts = counts if self.counts is None else self.counts + counts
        self.seconds = details.seconds if self.seconds is None else 0.9 * self.seconds + 0.1 * details.seconds
        self.interval.append((record, details.seconds))
        self.show(record)
        if details.fp8:
            self.measurement(details)

    def show(self, record: dict) -> None:
        step, mean = record["step"], means(self.interval)
        speed = f"{mean['tokens_per_s']:,.0f} tok/s  MFU {100 * mean['mfu']:.1f} %"
        if self.bar is not None:
            self.bar.set_postfix_str(f"loss {mean['loss']:.3f}, {speed}", refresh=False)
            self.bar.update(step - self.bar.n)
        elif step % self.log_every == 0 or step in (self.since + 1, self.steps):
            self.say(
                f"step {step:>{len(str(self.steps))}}/{self.steps}  loss {mean['loss']:.4f}"
                f"  next token {mean['main_loss']:.4f}  lr {record['lr']:.1e}  grad norm {mean['grad_norm']:.2f}"
                f"  {speed}  eta {duration(self.seconds * (self.steps - step))}"
            )
            self.interval.clear()
        if "val_loss" in record:
            self.say(f"step {step}: {validation_line(record)}")
        if "skipped" in record:
            self.say(
                f"step {step} skipped, nothing was changed: loss {record['loss']}, gradient norm {record['grad_norm']}"
                f" ({record['skipped']} skipped in all)" + (f"; {record['spike']}" if "spike" in record else "")
            )

    def measurement(self, details: Details) -> None:
        """Write a measurement of the FP8 layers; print a line for each layer that has left its band or uses bf16
        now."""
        step = details.fp8["step"]
        if self.fp8 is None:
            self.fp8 = open_lines(self.run / FP8_FILE, step)
        self.fp8.write(details.fp8)
        for layer in dict.fromkeys(out.layer for out in details.out_of_range):
            found = [out for out in details.out_of_range if out.layer == layer]
            more = f", {len(found) - 1} more" if len(found) > 1 else ""
            self.say(f"step {step}: outside its band: {found[0]}{more}")
        for name in details.switched:
            self.say(f"step {step}: {name} switches to bf16")

    def sample(self, step: int, prompt: str, text: str) -> None:
        """Keep a sample, and print its beginning."""
        if self.samples is None:
            self.samples = open_lines(self.run / SAMPLES, step - 1)
        self.samples.write(dict(step=step, prompt=prompt, text=text))
        self.loggers.text(step, "sample", prompt + text)
        line = " ".join((prompt + text).split())
        self.say(f"step {step}: sample: {line[:SHOWN]}{'...' * (len(line) > SHOWN)}")

    def expert_load(self, step: int) -> None:
        """Write the experts' load since the last such line. Call it before a checkpoint, so that a resumed run loses
        none."""
        if self.counts is not None:
            self.load.write(dict(first=self.counted + 1, step=step, counts=self.counts.tolist()))
        self.counts, self.counted = None, step

    def close(self) -> None:
        self.metrics.close()
        self.load.close()
        for file in (self.fp8, self.samples):
            if file is not None:
                file.close()
        self.loggers.close()
        if self.bar is not None:
            self.bar.close()


class NoReport:
    """The report of a process that writes and prints nothing."""

    def nothing(self, *args: object) -> None:
        pass

    say = step = sample = expert_load = close = nothing


def means(interval: Iterable[tuple[dict, float]]) -> dict[str, float]:
    """Means over records and their seconds: of speed and MFU over the time, of the losses and the gradient norm over
    the steps that were not skipped, where there are any."""
    rows = [*interval]
    seconds = sum(s for _, s in rows)
    sound = [r for r, _ in rows if "skipped" not in r] or [r for r, _ in rows]
    mean = {k: sum(r[k] for r in sound) / len(sound) for k in ("loss", "main_loss", "grad_norm")}
    return mean | {k: sum(r[k] * s for r, s in rows) / seconds for k in ("tokens_per_s", "mfu")}


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
