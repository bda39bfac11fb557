"""What the trainings of this room share: the model or its adapters, updates, checkpoints, the run's folder."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from functools import partial
from math import isfinite
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from ..errors import InputError
from ..files import atomic_write, lock_folder, read_json, user_path
from ..model import Ling, load_model
from ..nn.lora import without_adapters
from ..ops.grad_norm import grad_norm
from ..parallel.adapters import adapt_, write_adapter
from ..parallel.ranks import Ranks
from ..parallel.shares import Shares
from ..tokenizer import load_tokenizer
from ..train import checkpoint as ckpt
from ..train.building import apply_fp8_and_recompute
from ..train.optimizer import OPTIMIZERS, clipped_step, make_optimizer
from ..train.prepare.adapters import alpha_of, base_model, check_needs_rank, layers_of
from ..train.prepare.device import choose_device
from ..train.prepare.run import make_folder
from ..train.saving import export, kept, snapshot, write
from ..train.schedule import learning_rate
from ..train.settings import FIELDS, Settings, flag
from ..train.values import check_bounds, plain
from .rollout import Answer, answer_logp

SETTINGS = "settings.json"
MAX_BAD = 5  # skipped updates in a row that stop the run


def as_trainer(name: str) -> Any:
    """The field of a setting that is the trainer's."""
    return field(default=FIELDS[name].default, metadata=FIELDS[name].metadata)


@dataclass(frozen=True)
class LearnerSettings:
    """Settings that all have, named as their flags."""

    steps: int = flag(100, "steps of the whole run", least=1)
    optimizer: str = flag("adamw", "the trainer's", choices=OPTIMIZERS)
    lr: float = flag(2e-4, "learning rate", above=0)
    warmup: int = flag(5, "updates until the learning rate is reached", least=0)
    weight_decay: float = flag(0.0, "on matrices and embeddings", least=0)
    clip: float = flag(1.0, "gradient norm above which gradients are scaled down; 0: never", least=0)
    lora_rank: int = as_trainer("lora_rank")
    lora_alpha: float | None = as_trainer("lora_alpha")
    lora_on: str = as_trainer("lora_on")
    seed: int = flag(0, "seed of the data's order and of all that is drawn", least=0)
    save_every: int = flag(50, "steps between checkpoints; 0: only at the end", least=0)
    keep: int = flag(2, "checkpoints to keep; 0: all", least=0)
    device: str = flag("auto", "auto uses a GPU where torch finds one", choices=("auto", "cpu", "cuda"))
    precision: str = as_trainer("precision")

    def __post_init__(self) -> None:
        for f in fields(self):
            if (value := getattr(self, f.name)) is not f.default:
                object.__setattr__(self, f.name, plain(f, value))
        check_bounds(self)
        check_needs_rank(self)


class Learner:
    """A model with an optimizer, on one device. Weights, and adapters, are fp32 and computed with in the precision of
    the settings, by the trainer's FP8 layers in fp8. Subclasses call `_begin`, then `_new_folder` or, through
    `_resumed`, take up a checkpoint."""

    kind: ClassVar[type[LearnerSettings]]
    key: ClassVar[str]  # of the settings in a checkpoint's state.json
    about: ClassVar[str]  # what it is, in messages
    settings: Any

    def _begin(self, settings: LearnerSettings, folder: Path, source: str, state: dict | None = None) -> None:
        """folder: of the weights, a model's or a checkpoint. source: the model that the run began with."""
        s = self.settings = settings
        self.source = source
        self.trainer = Settings(device=s.device, precision=s.precision)
        self.device, self.device_name, self.precision = choose_device(self.trainer)
        self.base = base_model(source, s.lora_rank, state)[1] if s.lora_rank else {}
        self.tokenizer = load_tokenizer(folder)
        start = source if s.lora_rank else folder
        self.model = load_model(start, dtype=torch.float32, device=self.device).train()
        self.shares = Shares(self.model, Ranks())  # of one process
        self.notes = apply_fp8_and_recompute(self.model, self.trainer)
        if s.lora_rank:
            self.notes.append(adapt_(self.shares, s.lora_rank, alpha_of(s), layers_of(s), s.seed))
        self.optimizer = make_optimizer(self.model, s.optimizer, s.lr, s.weight_decay, s.seed)
        self.step_done = self.tokens = self.bad = 0

    def _new_folder(self, out: str | Path) -> None:
        self.folder, _ = make_folder(out, self.source, restart=False, again="--resume")
        self.lock = lock_folder(self.folder)
        self._write_settings()

    @classmethod
    def _resumed(cls, run: str | Path, steps: int | None, **begin):
        """One that continues from a run's latest checkpoint, or from the checkpoint that `run` names; from its first
        step on where it stopped before its first checkpoint."""
        path, checkpoint = user_path(run), None
        if (path / SETTINGS).is_file() and not ckpt.list_checkpoints(path):
            folder, saved = path.resolve(), read_json(path / SETTINGS)
            state = {"source": saved.pop("model", ""), "step": 0, cls.key: saved}
        else:
            folder, checkpoint = ckpt.locate(str(run))
            state = ckpt.read_state(checkpoint)
        if not isinstance(state.get(cls.key), dict):
            raise InputError(f"{checkpoint} is no checkpoint of {cls.about}")
        try:
            settings = cls.kind(**state[cls.key] | ({} if steps is None else dict(steps=steps)))
        except TypeError as error:
            raise InputError(f"{checkpoint or path}: settings that this version does not know: {error}") from None
        if settings.steps < state["step"]:
            raise InputError(f"--steps {settings.steps}: {checkpoint} has done {state['step']} already")
        learner = cls.__new__(cls)
        weights, known = (checkpoint, state) if checkpoint else (user_path(state["source"]), None)
        learner._begin(settings, weights, state["source"], known, **begin)
        learner.folder, learner.lock = folder, lock_folder(folder)
        if checkpoint:
            ckpt.restore(checkpoint, learner.shares, learner.optimizer)
            learner.step_done, learner.tokens, learner.bad = state["step"], state["tokens"], state["bad"]
            ckpt.set_aside_later(folder, checkpoint)
        learner._write_settings()
        return learner

    def _write_settings(self) -> None:
        with atomic_write(self.folder / SETTINGS) as path:
            path.write_text(json.dumps(asdict(self.settings) | dict(model=self.source)) + "\n")

    def make_reference(self, wanted: bool = True) -> None:
        """Keep the model of the beginning: a copy, or the model without its adapters."""
        self.reference: Ling | None = None
        if wanted and not self.settings.lora_rank:
            self.reference = load_model(self.source, dtype=torch.float32, device=self.device).requires_grad_(False)
            apply_fp8_and_recompute(self.reference, self.trainer)

    @torch.no_grad()
    def reference_logp(self, answers: Sequence[Answer]) -> Tensor:
        """The log-probabilities of the answers by the model of the beginning."""
        if self.reference is not None:
            return self.logp(self.reference, answers)
        with without_adapters(self.model):
            return self.logp(self.model, answers)

    def logp(self, model: Ling, answers: Sequence[Answer]) -> Tensor:
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == torch.bfloat16):
            return answer_logp(model, answers)

    def step(self) -> dict:
        """The next step; returns its record."""
        raise NotImplementedError

    def update(self, out: NamedTuple, number: int) -> tuple[dict, bool]:
        """Backward of out.loss and step `number` of the optimizer, which changes nothing where loss or gradient is not
        finite. Returns the fields of `out`, which are scalars, with grad_norm; whether the step was taken."""
        s, loss = self.settings, out[0]
        self.optimizer.zero_grad()
        loss.backward()
        self.model.balance_(0.0)  # the biases of the experts stay as they are
        norm = grad_norm([p.grad for p in self.model.parameters() if p.grad is not None])
        lr = learning_rate(number, s.lr, s.warmup)
        clipped_step(self.optimizer, lr, norm, s.clip, loss.detach().isfinite() & norm.isfinite())
        measured = dict(zip((*out._fields, "grad_norm"), torch.stack([*out, norm]).tolist(), strict=True))
        sound = isfinite(measured[out._fields[0]]) and isfinite(measured["grad_norm"])
        self.bad = 0 if sound else self.bad + 1
        return measured | dict(lr=lr), sound

    def _state(self) -> dict:
        """What a subclass adds to a checkpoint's state.json."""
        return {}

    def save(self) -> Path:
        """Write a checkpoint of the steps done so far; returns its folder. Raises NotSaved."""
        state = {"step": self.step_done, "tokens": self.tokens, "bad": self.bad, self.key: asdict(self.settings)}
        state |= dict(source=self.source, torch=torch.__version__) | (dict(base=self.base) if self.base else {})
        state |= self._state()
        tensors, _ = snapshot(self.shares, ckpt.optimizer_tensors(self.model, self.optimizer), wait=True)
        keep = partial(kept, keep=self.settings.keep, keep_every=0, proven=self.step_done)
        write(self.folder, tensors, self.tokenizer, state, keep, self.shares.ranks)
        return ckpt.checkpoint_folder(self.folder, self.step_done)

    def export(self, folder: str | Path) -> None:
        """Write the model in bf16, adapters merged, and its tokenizer as a Hugging Face folder."""
        export(Path(folder), self.shares, self.tokenizer)

    def export_adapter(self, folder: str | Path) -> None:
        """Write the adapters of the last checkpoint as peft reads them."""
        last, s = ckpt.list_checkpoints(self.folder)[-1], self.settings
        write_adapter(last, Path(folder), self.source, s.lora_rank, alpha_of(s), self.base)

    def close(self) -> None:
        """End what runs beside this process."""
