"""The trainer: one global batch after the other on one device, validation, checkpoints, resuming bit for bit."""

import os
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from functools import partial
from math import isfinite
from pathlib import Path

import torch
from torch import nn

from ..errors import Diverged, InputError
from ..parallel.adapters import adapt_
from ..parallel.checkpoints import own_pieces
from ..parallel.pipeline import LOSSES, MicroBatch
from ..parallel.ranks import Ranks
from ..parallel.shares import Shares
from . import checkpoint as ckpt
from .building import apply_fp8_and_recompute, make_model
from .changes import DATA_FOLDER, first_value
from .corpus import open_corpus
from .data.mixture import Rows
from .flags import named_as_in_python
from .monitor import WINDOW, FP8Monitor, ceilings, joined, spike, to_bf16
from .optimizer import StepInBackward, clipped_step, make_optimizer
from .prepare import Run, deterministic, discard, new_run, peak_flops, resumed_run
from .prepare.adapters import alpha_of, layers_of
from .prepare.run import with_faster_threads
from .report import FP8_FILE, Details, read_lines
from .running_merge import RunningMerge
from .saving import Writer, count_sound, export, export_over, kept, snapshot, write
from .schedule import learning_rate, rows_at
from .settings import Settings, to_json
from .validation import bytes_of_tokens, measure


@dataclass
class Progress:
    """Position of a run. With weights, optimizer state and settings it is all that a resumed run needs."""

    step: int = 0  # steps done
    sequences: int = 0  # rows consumed: the position in the stream of rows
    tokens: int = 0
    bad: int = 0  # skipped steps in a row
    skipped: int = 0  # skipped steps in all
    data_start: int = 0  # the value of `sequences` when the present data began
    data_folder: str = DATA_FOLDER  # of the run: where the present data's tokens are
    changes: list[dict] = field(default_factory=list)  # of the settings, see changes.py
    sound: int = 0  # sound steps in a row, see saving.py
    proven: int = 0  # checkpoints up to this step are good
    recent: list[list[float]] = field(default_factory=list)  # loss and gradient norm of the last steps not skipped
    in_bf16: list[str] = field(default_factory=list)  # FP8 layers that the monitor has switched to bf16
    merged: list[list[float]] = field(default_factory=list)  # steps and weights of the running merge so far

    @property
    def row(self) -> int:
        """The next row of the present data."""
        return self.sequences - self.data_start


class Trainer:
    """Trains a Ling-2.0 model on one device; `python -m ling_kernels.train` is a loop over it. A run of ten lines:

        from ling_kernels.train import Settings, Trainer

        trainer = Trainer(Settings(data=("texts/",), steps=200, seq_len=256, batch=8), out="runs/mine")
        while trainer.progress.step < trainer.settings.steps:
            record = trainer.step()
            if record["step"] % 50 == 0:
                print(record["step"], record["loss"], trainer.evaluate()["val_loss"])
                trainer.save()
        trainer.export("runs/mine/model")
        trainer = Trainer.resume("runs/mine", steps=400)  # later, perhaps in another process

    A step takes `settings.batch` rows of `settings.seq_len` tokens: documents packed end to end, ids [rows, seq_len]
    int64 with cu_seqlens [n + 1] int32, so that attention stays within a document. Equal settings give equal bits,
    and a resumed run has the bits of one that was never interrupted. The folder gets settings.json, data/ and
    checkpoints/; metrics.jsonl, expert_load.jsonl, fp8.jsonl and plots are written by the command's loop (`report`).
    With fp8_watch a resumed run reads earlier measurements from fp8.jsonl, so a custom loop should keep a `Report`.

    Args:
      settings: see `Settings`; the help of `python -m ling_kernels.train` describes each. The model's data is tokenised
        into the run's folder. `threads` sets torch's CPU threads for the whole process. eval_every, save_every and
        log_every are used by the command's loop alone.
      out: the run's folder, new or empty; default runs/MODEL-DATE-TIME.
      restart: also accept a folder with a run that stopped before its first checkpoint.

    Attributes: settings, config (LingConfig), tokenizer, device, precision (torch.dtype of autocast), folder, model
    (Ling, fp32 or bf16 weights, in training mode), optimizer, progress (`Progress`), training and held_out
    (`Documents`), details (`Details` of the last step), notes (lines for the user, about
    settings and FP8 layers).

    Raises InputError (a ValueError) for settings, data or a folder that cannot work, before anything is written, and
    for a folder that another process trains in.
    """

    def __init__(self, settings: Settings | None = None, out: str | Path | None = None, *, restart: bool = False):
        settings = Settings() if settings is None else settings
        if not isinstance(settings, Settings):
            raise InputError(f"settings are a {type(settings).__name__}: give Settings(...)")
        if not isinstance(out, str | os.PathLike | None):
            raise InputError(f"out is {out!r}, not a path")
        with named_as_in_python():
            self._start(new_run(settings, out, restart))

    @classmethod
    def resume(cls, run: str | Path, **changes) -> "Trainer":
        """Continue a run from its latest checkpoint, or from the checkpoint folder that `run` names.

        changes: settings with a new value, of those that do not make it another run (settings.CHANGEABLE_ON_RESUME);
        those that differ are listed in the attribute `changes`, and kept in progress.changes with the step. New data
        is read from its beginning.
        Later checkpoints are renamed to superseded-..., and listed in the attribute `superseded`. Raises InputError
        for a run without checkpoint, a damaged checkpoint, .bin files that have changed, and other changes. Texts that
        are gone since are no error, as the run's folder has their tokens.
        """
        with named_as_in_python():
            return cls.of(resumed_run(run, changes))

    @classmethod
    def of(cls, run: Run) -> "Trainer":
        """The trainer of a run that `new_run` or `resumed_run` prepared; errors name flags, as the command does."""
        trainer = cls.__new__(cls)
        trainer._start(run)
        return trainer

    def _start(self, run: Run) -> None:
        s = self.settings = run.settings
        self.config, self.tokenizer, self.folder, self.lock = run.config, run.tokenizer, run.folder, run.lock
        self.device, self.device_name, self.precision = run.device, run.device_name, run.precision
        self.progress, self.details, self.superseded, self.writer = Progress(), Details(), [], Writer()
        ranks = self.ranks = run.ranks
        self.base = run.base
        self.changes, new_data = run.changes, any(change["setting"] == "data" for change in run.changes)
        with deterministic():
            try:
                record = [*(run.state or {}).get("changes", []), *run.changes]
                first = first_value("val_data", record, s.val_data) or ()
                self.corpus = ranks.in_turn(
                    lambda: open_corpus(s, self.tokenizer, self.config.vocab_size, run.tokens, first, ranks.dp)
                )
                self.training, self.held_out = self.corpus.training, self.corpus.held_out
                self.data = self.corpus.about
                ranks.compare(the_data=self.data)
                if run.state and not new_data and run.state["data"] != self.data:
                    raise InputError(f"data: {self.data} is not what the run began with, {run.state['data']}")
                self.model, self.shares = make_model(run)
                notes = apply_fp8_and_recompute(self.model, s)
                if s.lora_rank:
                    notes.append(adapt_(self.shares, s.lora_rank, alpha_of(s), layers_of(s), s.seed))
                s = self.settings = with_faster_threads(run, self.model, lambda rows: accumulate_gradients(
                    self.model, self.corpus.rows, 0, rows, s, self.device, self.precision))  # fmt: skip
                self.notes = [*run.notes, *notes]
            except BaseException:  # also Ctrl-C
                discard(run)
                raise
            self.merge = RunningMerge(s)
            self.optimizer = make_optimizer(self.shares.stepped, s.optimizer, s.lr, s.weight_decay, s.seed)
            if run.checkpoint:
                ckpt.restore(run.checkpoint, self.shares, self.optimizer)
                self.progress = Progress(**{n: run.state[n] for n in asdict(self.progress) if n in run.state})
                if unknown := {*self.progress.in_bf16} - self.shares.modules:
                    raise InputError(f"{run.checkpoint / 'state.json'}: in_bf16 names no layer: {min(unknown)}")
                for name in self.progress.in_bf16:
                    to_bf16(self.model, name)
                self.progress.changes += run.changes
                if line := self.merge.restore(run.checkpoint, self.progress.merged, self.progress.step, self.shares):
                    self.notes.append(line)
                if new_data:  # its losses may be of another size
                    self.progress.data_start, self.progress.recent = self.progress.sequences, []
                    self.progress.data_folder = run.tokens.parent.name
                self.superseded = ranks.from_first(lambda: ckpt.set_aside_later(self.folder, run.checkpoint))
            self.peak, self.peak_source = peak_flops(self.device, self.precision)
        self.rows = self.corpus.rows
        self.bytes_of_tokens = bytes_of_tokens(self.tokenizer)
        self.in_backward = StepInBackward(self.model, self.optimizer) if s.step_in_backward else None
        earlier = [row for row in read_lines(self.folder / FP8_FILE) if row["step"] <= self.progress.step]
        self.monitor = FP8Monitor(self.model, s.fp8_watch, s.fp8_fallback, earlier)

    def step(self) -> dict:
        """Train on the next global batch and return its record, the line of metrics.jsonl:

        step, tokens (so far), lr; loss, main_loss, mtp_loss, z_loss in nats per token; grad_norm; load_violation_max
        and load_violation_mean (busiest expert over the mean, minus 1, over the MoE layers); tokens_per_s; mfu (of
        the peak); for a step that was skipped also `skipped` (their number so far), and `spike` where that was the
        reason; for a mixture also epoch/NAME, the passes through each source so far.

        A step is skipped, nothing changing but the position in the data, where its loss or gradient is not finite or a
        spike. Raises Diverged after max_bad_steps of them in a row; the trainer can still be saved then, with the
        weights of the last step that was taken, and another call goes on with the next batch. Raises InputError after
        the last of settings.steps.
        """
        s, progress, start = self.settings, self.progress, time.perf_counter()
        if progress.step >= s.steps:
            raise InputError(f"all {s.steps} steps are done: save, and Trainer.resume({str(self.folder)!r}, steps=N)")
        with deterministic(), self.monitor.measuring(progress.step + 1) as measured:
            record, counts = train_step(
                self.model, self.optimizer, self.rows, s, progress, self.precision, self.in_backward, self.shares
            )
        seconds = time.perf_counter() - start
        record["tokens_per_s"] = record.pop("step_tokens") / seconds
        record["mfu"] = self.config.flops_per_token(s.seq_len) * record["tokens_per_s"] / (self.peak * self.ranks.size)
        record |= self.corpus.epochs(progress.row)
        self.details = Details(seconds, counts, measured)
        if s.fp8_watch and progress.step % s.fp8_watch == 0:
            self.take_in(measured)
        if self.merge.due(progress.step):
            self.merge.add(progress.step, own_pieces(self.shares))
        count_sound(progress, None if progress.bad else record["main_loss"], self.config.vocab_size)
        if progress.bad >= s.max_bad_steps:
            raise Diverged(f"no sound loss and gradient in {progress.bad} steps up to {progress.step}", record)
        return record

    def take_in(self, measured: dict) -> None:
        """FP8's error in this step; of each stage's layers by its first rank, so that layers switch on all alike."""
        measured = joined(self.ranks.of_stages(measured))
        if not measured:
            return
        self.details.fp8, self.details.out_of_range = measured, self.monitor.update(measured)
        switched = self.ranks.of_stages(self.monitor.layers_to_disable())
        self.details.switched = [name for names in switched for name in names]
        for name in self.details.switched:
            to_bf16(self.model, name)
            self.progress.in_bf16.append(name)

    def evaluate(self) -> dict[str, float]:
        """val_loss, the mean loss of the next token in nats, and val_bpb, in bits per byte, of the held-out rows; and
        val_loss/NAME and val_bpb/NAME of each set of val_data and each source of a mixture."""
        with deterministic():
            return measure(self.model, self.corpus.validation, self.bytes_of_tokens, self.precision, self.shares)

    def save(self, wait: bool = True) -> Path:
        """Write a checkpoint of the steps done so far, and remove others as `settings.keep` says; returns its folder.

        A checkpoint appears whole or not at all. wait=False returns as soon as the tensors are copied to the host, and
        a thread writes them: `writer.wait()` waits for it. Where the host has no memory for a copy, this waits. Raises
        NotSaved (an InputError) where a checkpoint cannot be written; for the one of a thread, the next `save`,
        `writer.poll()` or `writer.wait()` raises it.
        """
        self.writer.wait()
        s, proven, folder = self.settings, self.progress.proven, ckpt.checkpoint_folder(self.folder, self.progress.step)
        self.progress.merged = self.merge.taken
        state = asdict(self.progress) | dict(settings=to_json(s), data=self.data, torch=torch.__version__)
        state |= dict(base=self.base) if s.lora_rank else {}
        moments = ckpt.optimizer_tensors(self.shares.stepped, self.optimizer)
        tensors, wait = snapshot(self.shares, moments, wait)
        tensors.merged = self.merge.part(self.shares)
        keep = partial(kept, keep=s.keep, keep_every=s.keep_every, proven=proven)
        job = partial(write, self.folder, tensors, self.tokenizer, state, keep, self.ranks.in_thread())
        if wait:
            job()
        else:
            self.writer.start(job)
        return folder

    def export(self, folder: str | Path) -> None:
        """Write the model in bf16, adapters merged, and its tokenizer as a Hugging Face folder."""
        if self.settings.fp8_weights == "only":
            export_over(Path(self.settings.model), Path(folder), self.shares, self.tokenizer)
        else:
            export(Path(folder), self.shares, self.tokenizer)


def train_step(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    packed: Rows,
    settings: Settings,
    progress: Progress,
    precision: torch.dtype,
    in_backward: StepInBackward | None = None,
    shares: Shares | None = None,
) -> tuple[dict, torch.Tensor | None]:
    """One global batch: the exact sum of its micro batches' gradients, one step of the optimizer and of the balancing.

    Returns the step's record, and the tokens of each MoE layer and expert (int64). The host waits for the device once,
    for the record. Whether to skip the step is decided on the device, and from the same numbers again on the host.
    """
    device, shares = next(model.parameters()).device, shares or Shares(model, Ranks())
    ranks, step = shares.ranks, progress.step + 1
    rows = rows_at(step, settings.batch, settings.ramp, ranks.dp * ranks.pp * (settings.micro_batch or 1))
    lr = learning_rate(step, **settings.lr_schedule)
    optimizer.zero_grad()
    limits = settings.spikes
    highest_loss, highest_norm = ceilings(progress.recent, limits)

    def usable(loss: torch.Tensor) -> torch.Tensor:
        return loss.isfinite() & (loss.double() <= highest_loss)

    begin = None if in_backward is None else lambda loss: in_backward.begin(lr, usable(loss))
    losses = accumulate_gradients(model, packed, progress.row, rows, settings, device, precision, begin, shares)
    counts = shares.sum_counts_()
    if in_backward is None:
        shares.sum_gradients_()
        norm = shares.norm()
        take_step = usable(losses[0]) & norm.isfinite() & (norm.double() <= highest_norm)
        clipped_step(optimizer, lr, norm, settings.clip, take_step)
        shares.spread_weights_()
    else:
        norm = in_backward.norm()
    violation = torch.zeros(1, device=device) if counts is None else counts.amax(1) / counts.double().mean(1) - 1
    measured = torch.stack([*losses, norm, violation.amax(), violation.mean()]).tolist()
    names = ("loss", "main_loss", "mtp_loss", "z_loss", "grad_norm", "load_violation_max", "load_violation_mean")
    record = dict(zip(names, measured, strict=True))

    finite = isfinite(record["loss"]) and isfinite(record["grad_norm"])
    loss_and_norm = [record["loss"], record["grad_norm"]]
    jump = spike(loss_and_norm, progress.recent, limits) if finite else None
    taken = finite and jump is None
    if taken:
        progress.recent = [*progress.recent[1 - WINDOW :], loss_and_norm]
    # 0 keeps the bias and clears the counts
    model.balance_(settings.balance_rate if taken and not settings.lora_rank else 0.0)
    progress.step = step
    progress.sequences += rows
    progress.tokens += rows * settings.seq_len
    progress.bad = 0 if taken else progress.bad + 1
    progress.skipped += not taken
    record = dict(step=step, **record, lr=lr, tokens=progress.tokens, step_tokens=rows * settings.seq_len)
    record |= {} if taken else dict(skipped=progress.skipped)
    return record | ({} if jump is None else dict(spike=jump)), counts


def accumulate_gradients(
    model: nn.Module, packed: Rows, first: int, rows: int, settings: Settings, device: torch.device,
    precision: torch.dtype, begin: Callable[[torch.Tensor], None] | None = None, shares: Shares | None = None,
) -> torch.Tensor:  # fmt: skip
    """Forward and backward of `rows` rows from row `first` on, in micro batches, which the data-parallel ranks share
    -> [4] fp64 of all rows: loss, main, MTP, z-loss.

    begin is called with the loss before its backward; it needs a single micro batch. Every sum of losses is divided
    by the global batch's number of targets, and the z-loss, a mean over tokens, is weighted by a micro batch's share
    of the rows: any division into micro batches gives the same gradient.
    """
    ranks, pipeline = (shares.ranks, shares.pipeline) if shares else (Ranks(), None)
    micro = settings.micro_batch or rows // ranks.dp
    parts = ranks.share([range(first + i, first + min(i + micro, rows)) for i in range(0, rows, micro)])
    batches = [packed.batch(part) for part in parts]
    here = [sum(b.targets(1 + k) for b in batches) for k in range(1 + len(model.mtp))]
    targets = (ranks.sum_(torch.tensor(here)) // ranks.sharing).tolist()  # ranks that share sequences count the same
    total = torch.zeros(4, device=device, dtype=torch.float64)
    if pipeline is not None:
        with shares.sums_in_backward():
            losses = pipeline.step([MicroBatch.of(b, device) for b in batches], targets, settings.z_loss * micro / rows)
        if losses is not None:  # on the last stage's rank
            total += torch.tensor([losses[name] for name in ("loss", *LOSSES)], device=device)
        return ranks.sum_(total, stages=True)
    for i, batch in enumerate(batches, 1):
        ids, labels, cu_seqlens = batch.to(device)
        with torch.autocast(device.type, torch.bfloat16, enabled=precision == torch.bfloat16):
            out = model(
                ids,
                labels=labels,
                cu_seqlens=cu_seqlens,
                logits=False,
                z_loss=settings.z_loss * len(ids) / rows,
                target_counts=targets,
            )
        if begin is not None:
            begin(out.loss.detach())
        with shares.sums_in_backward() if shares and i == len(batches) else nullcontext():
            out.loss.backward()
        mtp = out.mtp_loss if out.mtp_loss is not None else total.new_zeros(())
        total += torch.stack([x.detach().double() for x in (out.loss, out.main_loss, mtp, out.z_loss)])
    return ranks.sum_(total)
