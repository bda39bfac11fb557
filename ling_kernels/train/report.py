"""What a run tells while it trains: metrics.jsonl, expert_load.jsonl, fp8.jsonl, TensorBoard, a bar or plain lines."""

import json
import math
import sys
import time
from pathlib import Path

import torch

from ..errors import InputError
from ..files import whole

FP8 = "fp8.jsonl"


class Report:
    """Everything that is written per step. `since` is the step to go on from: later lines are cut off."""

    def __init__(self, run: Path, since: int, steps: int, log_every: int):
        self.run, self.steps, self.log_every = run, steps, log_every
        self.metrics = open_lines(run / "metrics.jsonl", since)
        self.load = open_lines(run / "expert_load.jsonl", since)
        self.fp8 = open_lines(run / FP8, since) if (run / FP8).exists() else None
        self.board = tensorboard(run, since)
        self.bar = progress_bar(since, steps)
        self.seconds = None  # a step takes, smoothed
        self.counts, self.counted = None, since  # tokens per MoE layer and expert since that step

    def say(self, text: str) -> None:
        if self.bar is None:
            print(text, flush=True)
        else:
            self.bar.write(text)

    def step(self, record: dict, seconds: float, counts: torch.Tensor | None) -> None:
        """One step's record, and its tokens per MoE layer and expert: into the files and onto the screen."""
        write_line(self.metrics, {k: finite(v) for k, v in record.items()})
        if self.board is not None:
            for name, value in record.items():
                if name != "step" and isinstance(value, int | float) and math.isfinite(value):
                    self.board.add_scalar(name, value, record["step"])
        if counts is not None:
            self.counts = counts if self.counts is None else self.counts + counts
        self.seconds = seconds if self.seconds is None else 0.9 * self.seconds + 0.1 * seconds
        self.show(record)

    def show(self, record: dict) -> None:
        step, loss = record["step"], record["loss"]
        speed = f"{record['tokens_per_s']:,.0f} tok/s  MFU {100 * record['mfu']:.1f} %"
        if self.bar is not None:
            self.bar.set_postfix_str(f"loss {loss:.3f}, {speed}", refresh=False)
            self.bar.update(step - self.bar.n)
        elif step % self.log_every == 0 or step == self.steps:
            left = time.strftime("%H:%M:%S", time.gmtime(self.seconds * (self.steps - step)))
            self.say(
                f"step {step:>{len(str(self.steps))}}/{self.steps}  loss {loss:.4f}"
                f"  next token {record['main_loss']:.4f}  lr {record['lr']:.1e}  grad norm {record['grad_norm']:.2f}"
                f"  {speed}  eta {left}"
            )
        if "val_loss" in record:
            self.say(f"step {step}: validation loss {record['val_loss']:.4f} nats per token")
        if "skipped" in record:
            self.say(
                f"step {step} skipped, nothing was changed: loss {loss}, gradient norm {record['grad_norm']}"
                f" ({record['skipped']} skipped in all)" + (f"; {record['spike']}" if "spike" in record else "")
            )

    def measurements(self) -> list[dict]:
        """What `operands` has written, oldest first."""
        return read_lines(self.run / FP8)

    def operands(self, record: dict, leaving: list) -> None:
        """What FP8 makes of the layers' operands, and which have left their band, a line for each layer."""
        if self.fp8 is None:
            self.fp8 = open_lines(self.run / FP8, record["step"])
        write_line(self.fp8, record)
        for layer in dict.fromkeys(left.layer for left in leaving):
            which = [left for left in leaving if left.layer == layer]
            more = f", {len(which) - 1} more" if len(which) > 1 else ""
            self.say(f"step {record['step']}: outside its band: {which[0]}{more}")

    def expert_load(self, step: int) -> None:
        """A line for the steps since the line before; called before a checkpoint, so that a resumed run loses none."""
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
    """A file of JSON lines to append to, with the lines of steps up to `since` kept; a torn last line is dropped."""
    kept = [json.dumps(row) + "\n" for row in read_lines(path) if row["step"] <= since]
    with whole(path) as partial:
        partial.write_text("".join(kept))
    return open(path, "a", buffering=1)  # whole lines reach the file at once


def read_lines(path: Path) -> list[dict]:
    rows = []
    if path.is_file():
        for line in path.read_text().splitlines():
            try:
                rows.append(json.loads(line))
            except ValueError:  # torn by a kill
                break
    return rows


def write_line(file, record: dict) -> None:
    try:
        file.write(json.dumps(record) + "\n")
    except OSError as error:
        raise InputError(f"cannot write {file.name}: {error.strerror}") from None


def finite(value):
    """JSON has no NaN: None instead."""
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
