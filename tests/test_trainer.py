"""Trainer in a custom loop: the bits of the command, resuming, errors, and the example of its docstring."""

# ruff: noqa: F811 (fixtures are imported)
import textwrap
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

from ling_kernels.errors import InputError
from ling_kernels.model import load_model
from ling_kernels.train import Diverged, Settings, Trainer, cli
from ling_kernels.train import trainer as module
from ling_kernels.train.__main__ import main
from ling_kernels.train.settings import settings_of
from tests.test_train import SPEED, metrics_of
from tests.training import flags, small, text, uninterrupted  # noqa: F401


def settings_from(flags, **changes) -> Settings:
    options = vars(cli.parser().parse_args(flags))
    no_settings = ("out", "resume", "plan", "layout", "recipe", "source")
    return replace(settings_of({k: v for k, v in options.items() if k not in no_settings}), **changes)


def equal_checkpoints(one, two) -> bool:
    for name in ("model.safetensors", "optimizer.safetensors", "rng.safetensors"):
        a, b = (load_file(folder / name) for folder in (one, two))
        if a.keys() != b.keys() or not all(torch.equal(a[k], b[k]) for k in a):
            return False
    return True


def test_a_custom_loop_has_the_bits_of_the_command(tmp_path, flags, uninterrupted):
    """14 steps: 8, a checkpoint, then 6 in another trainer that resumes; the command's run was never interrupted."""
    trainer = Trainer(settings_from(flags, steps=14), tmp_path / "run")
    records = [trainer.step() for _ in range(8)]
    assert trainer.evaluate().keys() == {"val_loss", "val_bpb"}
    checkpoint = trainer.save()
    assert checkpoint == tmp_path / "run" / "checkpoints" / "step-000008"
    for _ in range(2):  # steps after the checkpoint, which the resumed run takes again
        trainer.step()
    trainer = Trainer.resume(tmp_path / "run", eval_every=0)
    assert trainer.progress.step == 8 and trainer.settings.eval_every == 0
    records += [trainer.step() for _ in range(6)]
    records[-1] |= trainer.evaluate()
    wanted = metrics_of(uninterrupted)
    assert len(wanted) == 14
    for got, want in zip(records, wanted, strict=True):
        assert {k: v for k, v in got.items() if k not in SPEED} == {k: v for k, v in want.items() if k not in SPEED}
    final = trainer.save()
    assert equal_checkpoints(final, uninterrupted / "checkpoints" / "step-000014")
    trainer.export(tmp_path / "model")
    exported, command = (load_model(folder) for folder in (tmp_path / "model", uninterrupted / "model"))
    assert all(map(torch.equal, exported.parameters(), command.parameters()))
    assert main(["--resume", str(tmp_path / "run"), "--steps", "15"]) == 0  # the command continues such a run
    assert [m["step"] for m in metrics_of(tmp_path / "run")] == [15]


def test_the_example_of_the_docstring(tmp_path, monkeypatch, text):
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "a.jsonl").write_text(text.read_text())
    monkeypatch.chdir(tmp_path)
    example = Trainer.__doc__.split("\n\n", 1)[1].split("\n\n    A step takes")[0]
    for longer, shorter in (("200", "4"), ("400", "5"), ("% 50", "% 2")):
        assert longer in example
        example = example.replace(longer, shorter)
    names = {}
    exec(textwrap.dedent(example), names)
    trainer = names["trainer"]
    assert trainer.progress.step == 4 and trainer.settings.steps == 5
    assert load_model(tmp_path / "runs/mine/model").config == trainer.config


def test_errors(tmp_path, flags, uninterrupted, monkeypatch):
    settings = settings_from(flags, steps=3)
    with pytest.raises(InputError, match="not empty"):
        Trainer(settings, uninterrupted)
    with pytest.raises(ValueError, match="^lr -1.0: it must be more than 0"):
        Trainer(replace(settings, lr=-1.0), tmp_path / "run")
    for bad, says in (
        (dict(optimizer="sgd"), "one of adamw, adamw8bit, muon"),
        (dict(steps="3"), "'3'.*a whole number"),
        (dict(steps=None), "a whole number"),
        (dict(steps=2.5), "a whole number"),
        (dict(lr=True), "a number"),
    ):
        with pytest.raises(InputError, match=says):
            Trainer(replace(settings, **bad), tmp_path / "run")
    for bad in ({}, {"steps": 3}, [], "run", 3):
        with pytest.raises(InputError, match="give Settings"):
            Trainer(bad, tmp_path / "run")
    with pytest.raises(InputError, match="out is 3"):
        Trainer(settings, 3)
    with pytest.raises(InputError, match="seed is 0 in the run to resume and 1 here"):
        Trainer.resume(uninterrupted, seed=1)
    with pytest.raises(InputError, match="layers is not given in the run to resume and 3 here"):
        Trainer.resume(uninterrupted, layers=3)
    with pytest.raises(InputError, match="no setting stepz"):
        Trainer.resume(uninterrupted, stepz=20)
    with pytest.raises(InputError, match="no checkpoint"):
        Trainer.resume(tmp_path)
    assert not (tmp_path / "run").exists()
    trainer = Trainer(replace(settings, max_bad_steps=2), tmp_path / "run")
    genuine = module.accumulate_gradients
    monkeypatch.setattr(module, "accumulate_gradients", lambda *args: genuine(*args) * torch.nan)
    assert trainer.step()["skipped"] == 1
    with pytest.raises(Diverged) as error:
        trainer.step()
    assert error.value.record["step"] == error.value.record["skipped"] == 2
