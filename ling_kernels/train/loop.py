"""The loop: one global batch after the other, with everything that may happen in between."""

import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from math import isfinite

import torch
from torch import nn

from ..errors import Diverged
from ..ops.grad_norm import grad_norm
from .data import Packed
from .optimizer import StepInBackward, clipped_step
from .report import Report
from .safeguards import WINDOW, Watch, ceilings, spike, to_bf16
from .schedule import learning_rate, rows_at
from .settings import Settings


@dataclass
class Progress:
    """Where a run stands; with weights, moments and settings this is all that a resumed run needs."""

    step: int = 0  # steps done
    sequences: int = 0  # rows consumed: the position in the stream
    tokens: int = 0
    bad: int = 0  # steps in a row that were skipped
    skipped: int = 0  # steps skipped in all
    recent: list[list[float]] = field(default_factory=list)  # loss and gradient norm of the last steps that were taken
    in_bf16: list[str] = field(default_factory=list)  # FP8 layers that the watch has given up


class Stop:
    """True once a signal has asked to stop; a second one ends the process at once."""

    def __init__(self):
        self.asked = None

    def __bool__(self) -> bool:
        return self.asked is not None

    @contextmanager
    def on_signals(self) -> Iterator["Stop"]:
        def first(number, frame):
            self.asked = signal.Signals(number).name
            for s in (signal.SIGINT, signal.SIGTERM):
                signal.signal(s, signal.SIG_DFL)

        if threading.current_thread() is not threading.main_thread():  # only there may Python handle signals
            yield self
            return
        before = {s: signal.signal(s, first) for s in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield self
        finally:
            for s, handler in before.items():
                signal.signal(s, handler)


def train(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    packed: Packed,
    validation: list,
    settings: Settings,
    progress: Progress,
    report: Report,
    save: Callable[[Progress], None],
    precision: torch.dtype,
    peak: float,
) -> str | None:
    """Train up to settings.steps; `validation` holds batches, `save` writes a checkpoint of what has been done.

    Returns the name of the signal that asked to stop, if one did. Raises Diverged.
    """
    saved = progress.step
    in_backward = StepInBackward(model, optimizer) if settings.step_in_backward else None
    watch = Watch(model, settings.fp8_watch, settings.fp8_fallback, report.measurements())
    with Stop().on_signals() as stop:
        while progress.step < settings.steps and not stop:
            start = time.perf_counter()
            with watch.measuring(progress.step + 1) as operands:
                record, counts = train_step(model, optimizer, packed, settings, progress, precision, in_backward)
            seconds = time.perf_counter() - start
            record["tokens_per_s"] = record.pop("step_tokens") / seconds
            record["mfu"] = model.config.flops_per_token(settings.seq_len) * record["tokens_per_s"] / peak
            validating = progress.step == settings.steps or due(progress.step, settings.eval_every)
            if validating:
                record["val_loss"] = evaluate(model, validation, precision)
            report.step(record, seconds, counts)
            if operands:
                report.operands(operands, watch.judge(operands))
                for name in watch.given_up():
                    to_bf16(model, name)
                    progress.in_bf16.append(name)
                    report.say(f"step {progress.step}: {name} goes on in bf16")
            if progress.bad >= settings.max_bad_steps:
                raise Diverged(f"no sound loss and gradient in {progress.bad} steps up to {progress.step}")
            if due(progress.step, settings.save_every):
                report.expert_load(progress.step)
                save(progress)
                saved = progress.step
            elif validating:
                report.expert_load(progress.step)
        if progress.step != saved:
            report.expert_load(progress.step)
            save(progress)
    return stop.asked


def due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


def train_step(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    packed: Packed,
    settings: Settings,
    progress: Progress,
    precision: torch.dtype,
    in_backward: StepInBackward | None = None,
) -> tuple[dict, torch.Tensor | None]:
    """One global batch: gradients of its micro batches summed exactly, one step of the optimizer and of the balance.

    Returns the step's record and the tokens per MoE layer and expert, int64. The host waits for the device once, for
    the record: whether the optimizer's step is one to be taken is decided on the device, and by the same numbers here.
    """
    device = next(model.parameters()).device
    step = progress.step + 1
    rows = rows_at(step, settings.batch, settings.ramp, settings.micro_batch or 1)
    lr = learning_rate(step, settings.lr, settings.warmup)
    optimizer.zero_grad()
    limits = settings.spike_loss, settings.spike_norm
    highest_loss, highest_norm = ceilings(progress.recent, limits)

    def sound_loss(loss: torch.Tensor) -> torch.Tensor:
        return loss.isfinite() & (loss.double() <= highest_loss)

    begin = None if in_backward is None else lambda loss: in_backward.begin(lr, sound_loss(loss))
    losses = accumulate_gradients(model, packed, progress.sequences, rows, settings, device, precision, begin)
    if in_backward is None:
        norm = grad_norm([p.grad for p in model.parameters() if p.grad is not None])
        sound = sound_loss(losses[0]) & norm.isfinite() & (norm.double() <= highest_norm)
        clipped_step(optimizer, lr, norm, settings.clip, sound)
    else:
        norm = in_backward.norm()
    routed = bool(model.routers())
    counts = model.expert_counts().long() if routed else None
    violation = counts.amax(1) / counts.double().mean(1) - 1 if routed else torch.zeros(1, device=device)
    measured = torch.stack([*losses, norm, violation.amax(), violation.mean()]).tolist()
    names = ("loss", "main_loss", "mtp_loss", "z_loss", "grad_norm", "load_violation_max", "load_violation_mean")
    record = dict(zip(names, measured, strict=True))

    sound = isfinite(record["loss"]) and isfinite(record["grad_norm"])
    judged = [record["loss"], record["grad_norm"]]
    jump = spike(judged, progress.recent, limits) if sound else None
    sound = sound and jump is None
    if sound:
        progress.recent = [*progress.recent[1 - WINDOW :], judged]
    model.balance_(settings.balance_rate if sound else 0.0)  # 0: the bias stays and counting begins anew
    progress.step = step
    progress.sequences += rows
    progress.tokens += rows * settings.seq_len
    progress.bad = 0 if sound else progress.bad + 1
    progress.skipped += not sound
    about = dict(step=step, **record, lr=lr, tokens=progress.tokens, step_tokens=rows * settings.seq_len)
    about |= {} if sound else dict(skipped=progress.skipped)
    return about | ({} if jump is None else dict(spike=jump)), counts


def accumulate_gradients(model, packed, first, rows, settings, device, precision, begin=None) -> torch.Tensor:
    """Forward and backward of the rows from `first` on, in micro batches -> [4] loss, main, MTP and z-loss.

    begin is told the loss before its backward, where there is but one.

    Every sum of losses is divided by the global batch's number of targets, and the z-loss, a mean over tokens, counts
    by a micro batch's share of the rows: so any cut into micro batches gives the same gradient.
    """
    micro = settings.micro_batch or rows
    batches = [packed.batch(range(first + i, first + min(i + micro, rows))) for i in range(0, rows, micro)]
    targets = [sum(b.targets(1 + k) for b in batches) for k in range(1 + len(model.mtp))]
    total = torch.zeros(4, device=device, dtype=torch.float64)
    for batch in batches:
        ids, cu_seqlens = (t.to(device, non_blocking=True) for t in batch)
        with torch.autocast(device.type, torch.bfloat16, enabled=precision == torch.bfloat16):
            out = model(
                ids,
                labels=ids,
                cu_seqlens=cu_seqlens,
                logits=False,
                z_loss=settings.z_loss * len(ids) / rows,
                target_counts=targets,
            )
        if begin is not None:
            begin(out.loss.detach())
        out.loss.backward()
        mtp = out.mtp_loss if out.mtp_loss is not None else total.new_zeros(())
        total += torch.stack([x.detach().double() for x in (out.loss, out.main_loss, mtp, out.z_loss)])
    return total


@torch.no_grad()
def evaluate(model: nn.Module, batches: list, precision: torch.dtype) -> float:
    """The main loss over `batches`: nats per token, every target counted once."""
    device = next(model.parameters()).device
    model.eval()
    total, targets = torch.zeros((), device=device, dtype=torch.float64), 0
    for batch in batches:
        ids, cu_seqlens = (t.to(device, non_blocking=True) for t in batch)
        with torch.autocast(device.type, torch.bfloat16, enabled=precision == torch.bfloat16):
            out = model(ids, labels=ids, cu_seqlens=cu_seqlens, logits=False)
        count = batch.targets()
        total += out.main_loss.double() * count
        targets += count
    model.train()
    return float(total) / max(targets, 1)
