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

from torch import Tensor

from ..errors import InputError, one_line
from ..model import Ling, LingConfig
from ..model.checkpoint import named_views
from ..model.weight_files import SHARD_BYTES, save_tensors, write_weights
from ..tokenizer import Tokenizer
from . import checkpoint as ckpt

MERGE_FILE = "merge.safetensors"
GOOD_AFTER = 32  # sound steps in a row after a checkpoint that show that it is good
UNSOUND = 2  # a loss of so many times that of a uniform guess, ln(vocabulary), is not sound


class NotSaved(InputError):
    """A checkpoint could not be written."""


@dataclass
class Snapshot:
    """What a checkpoint holds of the model and the optimizer, in the precision in which they are trained."""

    config: LingConfig
    weights: dict[str, Tensor]  # by official key
    optimizer: dict[str, Tensor]
    random: dict[str, Tensor]
    merged: dict[str, Tensor]  # the running merge, if there is one


def snapshot(model: Ling, moments: dict[str, Tensor], copy: bool, merged: dict[str, Tensor] | None = None) -> Snapshot:
    """The tensors themselves, or copies of them on the host, which later steps do not change. moments: the optimizer's
    state, as `checkpoint.optimizer_tensors` gives it. merged: tensors on the host that no step changes."""

    def on_host(t: Tensor) -> Tensor:
        return t.detach().to("cpu", copy=True).contiguous() if copy else t.detach()

    weights = {key: on_host(view) for key, view in named_views(model)}
    return Snapshot(model.config, weights, {k: on_host(t) for k, t in moments.items()}, ckpt.random_states(),
                    merged or {})  # fmt: skip


def size_of(model: Ling, moments: dict[str, Tensor]) -> int:
    """Bytes of a checkpoint's tensors."""
    tensors = [t for _, t in named_views(model)] + [*moments.values()]
    return sum(t.numel() * t.itemsize for t in tensors)


def room_for_copy(needed: int) -> bool:
    """Whether the host has memory for a copy of `needed` bytes beside the file that is being written."""
    try:
        lines = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
        return int(lines["MemAvailable"].split()[0]) << 10 > needed + min(needed, SHARD_BYTES)
    except (OSError, KeyError, ValueError):  # not Linux
        return True


def write(
    run: Path, tensors: Snapshot, tokenizer: Tokenizer, state: dict, keep: Callable[[list[int]], set[int]]
) -> None:
    """Write the checkpoint of state["step"] and remove those whose steps are not in keep(all steps).

    Raises NotSaved, having removed what was written.
    """
    final = ckpt.checkpoint_folder(run, state["step"])
    partial = final.with_name(f".{final.name}.partial")
    try:
        ckpt.clear_leftovers(run)
        partial.mkdir(parents=True)
        write_files(partial, tensors, tokenizer)
        files = {p.name: [p.stat().st_size, ckpt.checksum(p)] for p in sorted(partial.iterdir())}
        state = state | dict(time=time.time(), files=files)
        (partial / "state.json").write_text(json.dumps(state, indent=2) + "\n")
        for path in [*partial.iterdir(), partial]:
            ckpt.make_durable(path)
        if final.exists():  # damaged, or from before the run went back
            ckpt.remove(final)
        os.rename(partial, final)
        ckpt.make_durable(final.parent)
        found = {ckpt.step_of(c): c for c in ckpt.list_checkpoints(run)}
        for step in found.keys() - keep(sorted(found)) - {state["step"]}:
            ckpt.remove(found[step])
    except (OSError, InputError, MemoryError) as error:
        shutil.rmtree(partial, ignore_errors=True)
        why = getattr(error, "strerror", None) or one_line(str(error)) or type(error).__name__
        raise NotSaved(f"cannot write the checkpoint {final}: {why}") from None


def write_files(folder: Path, tensors: Snapshot, tokenizer: Tokenizer) -> None:
    def on_host(named: dict[str, Tensor]) -> dict[str, Tensor]:
        return {key: t.cpu().contiguous() for key, t in named.items()}

    weights = tensors.weights
    sizes = {key: t.numel() * t.itemsize for key, t in weights.items()}
    write_weights(folder, sizes, lambda keys: on_host({key: weights[key] for key in keys}), SHARD_BYTES)
    tensors.config.to_json(folder / "config.json", fp8=False, dtype=next(iter(weights.values())).dtype)
    tokenizer.save(folder)
    save_tensors(on_host(tensors.optimizer), folder / "optimizer.safetensors")
    save_tensors(tensors.random, folder / "rng.safetensors")
    if tensors.merged:
        save_tensors(tensors.merged, folder / MERGE_FILE)


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
