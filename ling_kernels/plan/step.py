"""Forwards and backwards of a step up to its peak, for the memory plan: those of a process without pipeline, and those
of a pipeline's stages in the order of its schedule."""

from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Protocol

import torch
from torch import Tensor

from ..ops.deferred import deferring
from ..parallel.pipeline import MicroBatch, Pipeline, Work, leaves, loss_of, rows_here
from ..parallel.schedules import Action
from ..parallel.shares import Shares
from ..train.settings import Settings

EXCHANGE = "exchange"  # a kind of bytes: what travels to and from other processes


class Counts(Protocol):
    now: Counter  # live bytes by kind

    def mark(self, t: Tensor, kind: str) -> None:
        """Count a tensor's storage as of another kind."""
        ...

    def mark_gradient(self, p: Tensor) -> None:
        """Count a parameter's gradient as one."""
        ...


def micro_batches(shares: Shares, s: Settings) -> tuple[int, int]:
    """Number of micro batches of a step of this process, and the rows of each."""
    rows = s.batch // shares.ranks.dp
    micro = s.micro_batch or rows
    return rows // micro, micro


def tokens(micro: int, s: Settings) -> tuple[Tensor, Tensor]:
    """ids [micro, seq_len] and cu_seqlens of a micro batch with a document in each row."""
    ids = torch.zeros(micro, s.seq_len, dtype=torch.int64)
    return ids, s.seq_len * torch.arange(micro + 1, dtype=torch.int32)


def run_micro_batches(shares: Shares, s: Settings, tracker: Counts) -> Counter:
    """Run two micro batches, or all where there is one -> live bytes after the last forward. Gradients accumulate from
    the second backward on."""
    model, (number, micro) = shares.model, micro_batches(shares, s)
    for _ in range(min(2, number)):
        ids, cu_seqlens = tokens(micro, s)
        targets = [float(ids.numel())] * (1 + len(model.mtp))
        with torch.autocast("cpu", torch.bfloat16, enabled=s.precision != "fp32"):
            out = model(ids, labels=ids, cu_seqlens=cu_seqlens, logits=False, z_loss=s.z_loss, target_counts=targets)
        kept = tracker.now.copy()
        out.loss.backward()
        del out, ids, cu_seqlens
    return kept


def run_stages(shares: Shares, s: Settings, tracker: Counts) -> Counter:
    """Run this rank's actions up to its peak -> live bytes after the forward with most micro batches in flight."""
    assert shares.pipeline is not None
    number, micro = micro_batches(shares, s)
    run = StageRun(shares.pipeline, [MicroBatch(*tokens(micro, s)) for _ in range(number)], s.z_loss, tracker)
    row = [action for step in run.pipeline.order(number)[0][run.pipeline.rank] for action in step]
    first, between = to_peak(row)
    run.sent = [run.memory(run.results_stage(action)) for action in between if run.is_sent(action)]
    most, kept = 0, Counter()
    for action in first:
        run.act(action)
        if action.kind == "F" and run.in_flight >= most:
            most, kept = run.in_flight, tracker.now.copy()
    return kept


class StageRun:
    """The stages of a rank, whose actions are run one by one, as torch's runtime runs them; nothing is sent.

    That runtime has memory for what each micro batch receives from the first step on, and keeps what it sends until the
    step ends.
    """

    def __init__(self, pipeline: Pipeline, batches: Sequence[MicroBatch], z_loss: float, tracker: Counts):
        self.pipeline, self.tracker, self.last = pipeline, tracker, len(pipeline.ranks) - 1
        counts = [float(batches[0].ids.numel())] * (1 + pipeline.model.config.num_nextn_predict_layers)
        for stage in pipeline.stages.values():
            stage.work = Work(batches, counts, z_loss, {})
        self.T, every = rows_here(pipeline.model, pipeline.rows), range(len(batches))
        self.inputs = {(i, m): leaves(self.memory(i - 1)) for i in pipeline.stages if i for m in every}
        self.gradients = {(i, m): self.memory(i) for i in pipeline.stages if i < self.last for m in every}
        self.outputs: dict[tuple[int, int], tuple[Tensor, ...]] = {}
        self.later: dict[tuple[int, int], Callable[[], None]] = {}
        self.sent: list[tuple[Tensor, ...]] = []

    @property
    def in_flight(self) -> int:
        """Micro batches of all stages here whose backward is not done."""
        return len(self.outputs) + len(self.later)

    def memory(self, i: int) -> tuple[Tensor, ...]:
        """For what stage i sends to the next one, or for its gradients."""
        return self.travelling(self.pipeline.buffers(i, self.T))

    def travelling(self, tensors: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        for t in tensors:
            self.tracker.mark(t, EXCHANGE)
        return tensors

    def results_stage(self, action: Action) -> int:
        """The stage between which and the next one the results of an action travel."""
        return action.stage - (action.kind != "F")

    def is_sent(self, action: Action) -> bool:
        """Whether another rank needs what an action gives."""
        i = self.results_stage(action)
        other = i + 1 if action.kind == "F" else i
        return action.kind != "W" and 0 <= i < self.last and other not in self.pipeline.stages

    def act(self, action: Action) -> None:
        kind, i, m = action
        if kind == "F":
            self.forward(i, m)
        elif kind == "W":
            self.later.pop((i, m))()
        else:
            with deferring(self.pipeline.later) if self.pipeline.split else nullcontext():
                self.backward(i, m)
            weights = self.pipeline.take_later()
            if kind == "B":
                weights()
            else:
                self.later[i, m] = weights
        if kind in "BW" and self.pipeline.split:  # gradients that come without their hooks
            for p in self.pipeline.model.parameters():
                self.tracker.mark_gradient(p)

    def forward(self, i: int, m: int) -> None:
        number = torch.tensor([m])
        out = self.pipeline.stages[i](*(self.inputs[i, m] if i else (number,)), index=number)
        self.outputs[i, m] = out if isinstance(out, tuple) else (loss_of(out, out),)
        if i + 1 in self.pipeline.stages:
            self.inputs[i + 1, m] = leaves(tuple(t.detach() for t in out))

    def backward(self, i: int, m: int) -> None:
        outputs, inputs = self.outputs.pop((i, m)), self.inputs.get((i, m), ())
        torch.autograd.backward(outputs, self.gradients[i, m] if i < self.last else None)
        if self.is_sent(Action("F", i, m)):
            self.sent.append(self.travelling(outputs))
        gradients = tuple(t.grad for t in inputs)
        if self.is_sent(Action("B", i, m)):
            self.sent.append(self.travelling(gradients))  # type: ignore[arg-type]
        elif i:
            self.gradients[i - 1, m] = gradients  # type: ignore[assignment]
        for t in inputs:
            t.grad = None


def to_peak(row: Sequence[Action]) -> tuple[Sequence[Action], Sequence[Action]]:
    """A rank's actions up to the first moment when most micro batches are in flight after all stages have their
    gradients, and the backward that follows; and those from there to the last such moment."""
    in_flight, begin, seen = [], 0, set()
    for n, (kind, stage, _) in enumerate(row):
        in_flight.append((in_flight[-1] if n else 0) + (kind == "F") - (kind in "BW"))
        if kind in "BW" and stage not in seen:
            seen.add(stage)
            begin = n
    most = max(in_flight[begin:])
    peaks = [n for n in range(begin, len(row)) if in_flight[n] == most]
    end = next((n for n in range(peaks[0] + 1, len(row)) if row[n].kind in "BI"), len(row) - 1)
    return row[: end + 1], row[peaks[0] + 1 : peaks[-1] + 1]
