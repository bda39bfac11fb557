"""Writing checkpoints: tensors are copied to the host, then written in a thread of their own while training goes on.

A checkpoint is written under another name, synced to the disk and renamed: it is complete or absent. A failure leaves
no file behind, and the checkpoints before it are untouched.
"""

import json
import os
import shutil
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from math import log
from pathlib import Path

import torch
from torch import Tensor

from ..errors import InputError, OtherRank
from ..model import LingConfig, save_model
from ..model.weight_files import SHARD_BYTES, WeightReader, remove_weights, save_tensors
from ..parallel.adapters import merging
from ..parallel.boxes import whole_box
from ..parallel.checkpoints import OwnPart, collect_, failing_together, own_part, write_files
from ..parallel.ranks import Ranks
from ..parallel.shares import Shares
from ..tokenizer import Tokenizer
from . import checkpoint as ckpt
from .merge import write_sum

GOOD_AFTER = 32  # sound steps in a row after a checkpoint that show that it is good
UNSOUND = 2  # a loss of so many times that of a uniform guess, ln(vocabulary), is not sound


class NotSaved(InputError):
    """A checkpoint could not be written."""


class OtherNotSaved(NotSaved, OtherRank):
    """The same, on a process other than rank 0, which reports it."""


def not_saved(what: str, error: InputError) -> NotSaved:
    return (OtherNotSaved if isinstance(error, OtherRank) else NotSaved)(f"cannot write {what}: {error}")


@dataclass
class Snapshot:
    """What this process writes of a checkpoint, in the precision in which it is trained."""

    config: LingConfig
    part: OwnPart
    random: dict[str, Tensor]
    merged: OwnPart | None = None  # the running merge, which no step changes


def snapshot(shares: Shares, moments: dict[str, Tensor], wait: bool) -> tuple[Snapshot, bool]:
    """The tensors themselves where the caller waits for the write; otherwise copies on the host, which later steps do
    not change, or the tensors where a process has no memory for copies: True then, as all must wait for the write.

    moments: the optimizer's state, as `checkpoint.optimizer_tensors` gives it.
    """
    part = own_part(shares, moments)
    wait = shares.ranks.any(wait or not room_for_copy(part.bytes()))
    return Snapshot(shares.config, part if wait else part.on_host(), ckpt.random_states()), wait


def room_for_copy(needed: int) -> bool:
    """Whether the host has memory for a copy of `needed` bytes, by each of its processes, beside the file that is being
    written."""
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))  # torchrun's, of this machine
    try:
        lines = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
        free = int(lines["MemAvailable"].split()[0]) << 10
        return free > processes * (needed + min(needed, SHARD_BYTES))
    except (OSError, KeyError, ValueError):  # not Linux
        return True


def write(
    run: Path,
    tensors: Snapshot,
    tokenizer: Tokenizer,
    state: dict,
    keep: Callable[[list[int]], set[int]],
    ranks: Ranks,
) -> None:
    """Write the checkpoint of state["step"] and remove those whose steps are not in keep(all steps). Every process
    calls it; rank 0 completes the checkpoint when all have written their files.

    Raises NotSaved on all processes where one failed; what was written is removed.
    """
    final = ckpt.checkpoint_folder(run, state["step"])
    partial = final.with_name(f".{final.name}.partial")
    try:
        with failing_together(ranks):
            if ranks.first:
                ckpt.clear_leftovers(run)
                partial.mkdir(parents=True)
        with failing_together(ranks):
            if not partial.is_dir():
                raise InputError(f"{partial.parent} is not on a file system that all machines share")
        collect_(tensors.part, ranks)
        names = write_files(partial, tensors.part, ranks)
        if tensors.merged is not None:
            collect_(tensors.merged, ranks)
            names += write_files(partial, tensors.merged, ranks, optimizer=False)
        with failing_together(ranks):
            if ranks.first:
                names += write_rest(partial, tensors, tokenizer)
            files = {name: [(partial / name).stat().st_size, ckpt.checksum(partial / name)] for name in names}
            for name in names:
                ckpt.make_durable(partial / name)
        everyone = ranks.exchange(files)
        with failing_together(ranks):
            if ranks.first:
                all_files = {name: found for theirs in everyone for name, found in theirs.items()}
                complete(run, partial, final, state | dict(time=time.time(), files=all_files))
                remove_others(run, state["step"], keep)
    except InputError as error:
        if ranks.first:
            shutil.rmtree(partial, ignore_errors=True)
        raise not_saved(f"the checkpoint {final}", error) from None


def write_rest(folder: Path, tensors: Snapshot, tokenizer: Tokenizer) -> list[str]:
    """Rank 0's own files but its tensors; returns their names."""
    there = {*folder.iterdir()}
    dtype = next((t.dtype for t in tensors.part.weights.values()), torch.float32)
    tensors.config.to_json(folder / "config.json", fp8=False, dtype=dtype)
    tokenizer.save(folder)
    save_tensors(tensors.random, folder / "rng.safetensors")
    return sorted(path.name for path in {*folder.iterdir()} - there)


def complete(run: Path, partial: Path, final: Path, state: dict) -> None:
    """The last file, and the checkpoint's name."""
    (partial / "state.json").write_text(json.dumps(state, indent=2) + "\n")
    for path in (partial / "state.json", partial):
        ckpt.make_durable(path)
    if final.exists():  # damaged, or from before the run went back
        ckpt.remove(final)
    os.rename(partial, final)
    ckpt.make_durable(final.parent)


def remove_others(run: Path, step: int, keep: Callable[[list[int]], set[int]]) -> None:
    found = {ckpt.step_of(c): c for c in ckpt.list_checkpoints(run)}
    for other in found.keys() - keep(sorted(found)) - {step}:
        ckpt.remove(found[other])


def export(folder: Path, shares: Shares, tokenizer: Tokenizer) -> None:
    """Write the model in bf16, adapters added to the weights, and its tokenizer as a Hugging Face folder, each process
    its part. Raises InputError on all processes where one failed."""
    if shares.ranks.size == 1 and not shares.adapters:
        save_model(shares.model, folder)
        tokenizer.save(folder)
        return
    export_part(folder, own_part(shares, {}, base=True).on_host(torch.bfloat16, merging(shares)), shares, tokenizer)


def export_over(base: Path, folder: Path, shares: Shares, tokenizer: Tokenizer) -> None:
    """The same where this process has the weights in FP8 alone: those of `base`, with the adapters added."""
    merged = merging(shares)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with WeightReader(base) as reader:
            write_sum(
                folder, shares.config, "bf16", lambda key, _: merged(key, w := reader.wide(key), whole_box(w.shape))
            )
        tokenizer.save(folder)
    except OSError as error:
        raise InputError(f"cannot write {folder}: {error}") from None


def export_part(folder: Path, part: OwnPart, shares: Shares, tokenizer: Tokenizer, dtype=torch.bfloat16) -> None:
    """The same with other weights, which are on the host in dtype; each process's part."""
    ranks = shares.ranks
    partial = folder.with_name(f".{folder.name}.partial")
    try:
        with failing_together(ranks):
            if ranks.first:
                shutil.rmtree(partial, ignore_errors=True)
                partial.mkdir(parents=True)
        collect_(part, ranks)
        names = ranks.exchange(write_files(partial, part, ranks, optimizer=False))
        with failing_together(ranks):
            if ranks.first:
                shares.config.to_json(partial / "config.json", fp8=False, dtype=dtype)
                tokenizer.save(partial)
                folder.mkdir(exist_ok=True)
                for path in sorted(partial.iterdir()):
                    ckpt.make_durable(path)
                    os.replace(path, folder / path.name)
                remove_weights(folder, [name for theirs in names for name in theirs])
                partial.rmdir()
    except InputError as error:
        if ranks.first:
            shutil.rmtree(partial, ignore_errors=True)
        raise type(error)(f"cannot write the checkpoint to {folder}: {error}") from None


class Writer:
    """Runs one write at a time in a thread. What it raises is raised by the next `wait` or `poll`."""

    def __init__(self) -> None:
        self.thread: threading.Thread | None = None
        self.error: BaseException | None = None

    def start(self, job: Callable[[], None]) -> None:
        """Begin a write; waits for the one before, whose error it raises."""
        self.wait()

        def run() -> None:
            try:
                job()
            except BaseException as error:
                self.error = error

        self.thread = threading.Thread(target=run, name="checkpoint")
        self.thread.start()

    def poll(self) -> None:
        """Raise the error of a write that has ended."""
        if self.thread is not None and not self.thread.is_alive():
            self.wait()

    def wait(self) -> None:
        if self.thread is not None:
            self.thread.join()
            self.thread = None
        error, self.error = self.error, None
        if error is not None:
            raise error


def count_sound(progress, loss: float | None, vocab_size: int) -> None:
    """Take in a step: the main loss of a step that was taken, None for a skipped one. `progress.proven` becomes the
    last step that GOOD_AFTER sound steps in a row have followed."""
    sound = loss is not None and loss <= UNSOUND * log(vocab_size)
    progress.sound = progress.sound + 1 if sound else 0
    if progress.sound >= GOOD_AFTER:
        progress.proven = progress.step - GOOD_AFTER


def last_good(steps: list[int], proven: int) -> int | None:
    """The last checkpoint's step that is good: that GOOD_AFTER sound steps in a row have followed."""
    return max((s for s in steps if s <= proven), default=None)


def kept(steps: list[int], keep: int, keep_every: int, proven: int) -> set[int]:
    """Which of the checkpoints' steps, ascending, stay: the last `keep` (0: all), every `keep_every`-th step's, the
    last good one, and the first after it, which may become good."""
    if not keep:
        return set(steps)
    candidates = [s for s in steps if s > proven][:1]
    often = [s for s in steps if keep_every and s % keep_every == 0]
    return {*steps[-keep:], *often, *candidates} | {s for s in [last_good(steps, proven)] if s is not None}
