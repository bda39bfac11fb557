"""python -m ling_kernels.posttrain.dpo: direct preference optimisation of a model, or of adapters over it."""

import json
import os
import sys
import time
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import NamedTuple

import torch

from ..commands import command
from ..errors import Diverged, InputError, warn
from ..files import user_path
from ..tokenizer import Tokenizer
from ..train.data.conversations import conversation, thinking_of
from ..train.data.sources import Position, has_rows, rows
from ..train.data.sources.options import TextOptions
from ..train.prepare.device import deterministic
from ..train.settings import flag
from .command import main_of
from .learner import MAX_BAD, Learner, LearnerSettings
from .preference import preference_loss
from .rollout import Answer

COLUMNS = ("prompt", "chosen", "rejected", "system", "tools", "thinking")  # of a row, that are read


@dataclass(frozen=True)
class DpoSettings(LearnerSettings):
    """Settings of a run, named as the flags of `python -m ling_kernels.posttrain.dpo`."""

    lr: float = flag(5e-6, "learning rate; adapters want about ten times that of all weights", above=0)
    data: str = flag("", "a file of rows with prompt, chosen and rejected", shown="it must be given")
    pairs: int = flag(8, "pairs of a step", least=1)
    max_tokens: int = flag(2048, "tokens of a prompt and an answer; longer pairs are left out", least=2)
    beta: float = flag(0.1, "how much a preference counts against the distance to the reference", above=0)
    label_smoothing: float = flag(0.0, "share of pairs that may be the wrong way round, below 0.5", least=0)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.label_smoothing >= 0.5:
            raise InputError(f"--label-smoothing {self.label_smoothing}: it must be below 0.5")
        if not self.data:
            raise InputError("--data: name a file of rows with prompt, chosen and rejected")
        object.__setattr__(self, "data", os.path.abspath(self.data))  # for runs resumed from another folder


class Pair(NamedTuple):
    chosen: Answer
    rejected: Answer


class Dpo(Learner):
    """Trains a model on pairs of answers; `python -m ling_kernels.posttrain.dpo` is a loop over it.

        run = Dpo(DpoSettings(data="pairs.jsonl", steps=100, lora_rank=8), "runs/sft/model", out="runs/dpo")
        while run.step_done < run.settings.steps:
            print(run.step())
        run.save()

    model: a folder with weights and a tokenizer that has a chat template. out: the run's folder, new or empty. The
    reference is the model of the beginning: a copy, or with lora_rank the model without its adapters. Every epoch has
    each pair once, in an order that follows from the seed. Raises InputError for what cannot work, before anything is
    written.
    """

    kind, key, about = DpoSettings, "dpo", "a run of direct preference optimisation"

    def __init__(self, settings: DpoSettings, model: str | Path, out: str | Path):
        self._begin(settings, Path(model), str(Path(model).absolute()))
        self._new_folder(out)

    @classmethod
    def resume(cls, run: str | Path, steps: int | None = None) -> "Dpo":
        """Continue a run from its latest checkpoint, or from the checkpoint that `run` names, with more `steps`."""
        return cls._resumed(run, steps)

    def _begin(self, settings, folder, source, state=None) -> None:
        super()._begin(settings, folder, source, state)
        s = self.settings
        self.pairs = read_pairs(user_path(s.data, "--data"), self.tokenizer, s.max_tokens)
        self.about_data = dict(pairs=len(self.pairs), checksum=checksum(self.pairs))
        if state and state.get("data") != self.about_data:
            raise InputError(f"--data {s.data} is not what the run began with: its pairs have changed")
        self.make_reference()

    def _state(self) -> dict:
        return dict(data=self.about_data)

    def draw(self) -> list[Pair]:
        """The pairs of the next step, which follow from seed and step."""
        s, number = self.settings, len(self.pairs)
        found = []
        for i in range(self.step_done * s.pairs, (self.step_done + 1) * s.pairs):
            order = list(range(number))
            Random(f"{s.seed} epoch {i // number}").shuffle(order)
            found.append(self.pairs[order[i % number]])
        return found

    def step(self) -> dict:
        """One step; returns its record, the line of metrics.jsonl: loss; margin, the mean of beta times the difference
        of the log-ratios; accuracy, the share of pairs in which it is above 0; grad_norm, lr; tokens so far;
        tokens_per_s and seconds; `skipped` where nothing was changed. Raises Diverged after 5 such steps in a row."""
        s, start = self.settings, time.perf_counter()
        if self.step_done >= s.steps:
            raise InputError(f"all {s.steps} steps are done")
        answers = [answer for pair in self.draw() for answer in pair]
        lengths = torch.tensor([len(a.ids) for a in answers], device=self.device)
        with deterministic():
            reference = self.reference_logp(answers)
            loss = preference_loss(self.logp(self.model, answers), reference, lengths, s.beta, s.label_smoothing)
            measured, sound = self.update(loss, self.step_done + 1)
        self.step_done += 1
        new, seconds = sum(len(a.prompt) + len(a.ids) for a in answers), time.perf_counter() - start
        self.tokens += new
        record = dict(step=self.step_done, **measured, tokens=self.tokens, tokens_per_s=new / seconds, seconds=seconds)
        record |= {} if sound else dict(skipped=1)
        if self.bad >= MAX_BAD:
            raise Diverged(f"no finite loss and gradient in {self.bad} steps up to step {self.step_done}", record)
        return record


def read_pairs(path: Path, tokenizer: Tokenizer, max_tokens: int) -> list[Pair]:
    """The pairs of a file of rows. Raises InputError for rows that are none, and where all are too long."""
    if not has_rows(path):
        raise InputError(f"--data {path}: pairs are rows of a .json, .jsonl, .parquet or .arrow file")
    found, long = [], 0
    for source, row in rows(path, TextOptions(), Position(), COLUMNS, any_of=True):
        pair = pair_of(row, source, tokenizer)
        if max(len(a.prompt) + len(a.ids) for a in pair) > max_tokens:
            long += 1
        else:
            found.append(pair)
    if not found:
        raise InputError(f"--data {path}: no pair of answers" + (f" within {max_tokens} tokens" if long else ""))
    if long:
        warn(f"{path}: {long} of {long + len(found)} pairs are left out, as they have more than {max_tokens} tokens")
    return found


def pair_of(row: dict, source: str, tokenizer: Tokenizer) -> Pair:
    """A row's pair. prompt, chosen and rejected are texts, or messages; without a prompt chosen and rejected are whole
    conversations, which differ in their last message. Raises InputError."""
    if not isinstance(row, dict):
        raise InputError(f"{source}: it is not an object")
    answers = []
    for name in ("chosen", "rejected"):
        messages = [*as_messages(row.get("prompt"), "user"), *as_messages(row.get(name), "assistant")]
        given = {k: row.get(k) for k in ("system", "tools")} | dict(messages=messages)
        found, tools = conversation(given, f"{source}: {name}")
        if found[-1]["role"] != "assistant":
            raise InputError(f"{source}: the last message of {name} is not the assistant's")
        try:
            ids, spans = tokenizer.encode_answers(found, tools, thinking_of(row, source))
        except InputError as error:
            raise InputError(f"{source}: {name}: {error}") from None
        _, first, stop = spans[-1]
        answers.append(Answer(ids[:first], ids[first:stop], [], "stop", 0))
    pair = Pair(*answers)
    if pair.chosen.prompt != pair.rejected.prompt:
        raise InputError(f"{source}: chosen and rejected answer different prompts")
    if pair.chosen.ids == pair.rejected.ids:
        raise InputError(f"{source}: chosen and rejected are the same answer")
    return pair


def as_messages(value, role: str) -> list:
    return value if isinstance(value, list) else [] if value is None else [dict(role=role, content=value)]


def checksum(pairs: Sequence[Pair]) -> int:
    return zlib.crc32(json.dumps([(a.prompt, a.ids) for pair in pairs for a in pair]).encode())


def line(record: dict, steps: int) -> str:
    return (
        f"step {record['step']:>{len(str(steps))}}/{steps}  loss {record['loss']:.4f}  margin {record['margin']:.3f}"
        f"  accuracy {record['accuracy']:.2f}  grad norm {record['grad_norm']:.2f}  {record['seconds']:.1f} s"
    )


@command
def main(argv: Sequence[str] | None = None) -> int:
    about = "Train a model on pairs of answers, of which one is preferred (DPO). docs/posttraining.md explains it."
    return main_of(Dpo, "dpo", about, line, argv)


if __name__ == "__main__":
    sys.exit(main())
