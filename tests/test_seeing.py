"""What a user sees of a run: printed lines, samples, TensorBoard and wandb."""

# ruff: noqa: F811 (fixtures are imported)
import json
import re
import sys
import types
import warnings
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from ling_kernels.commands import command
from ling_kernels.errors import warn
from ling_kernels.train import Settings
from ling_kernels.train.__main__ import main
from ling_kernels.train.report import Details, Report, loggers, read_lines
from ling_kernels.train.validation import validation_set
from tests.test_data import documents_of
from tests.test_train import SPEED, metrics_of
from tests.training import flags, one_line_error, small, text, uninterrupted  # noqa: F401


def record(step, loss, speed, **more):
    return dict(step=step, loss=loss, main_loss=loss - 1, grad_norm=2 * loss, lr=1e-3, tokens_per_s=speed,
                mfu=speed / 1e4, tokens=step, **more)  # fmt: skip


def test_a_line_has_means_over_its_interval(tmp_path, capsys):
    """Speed over the time: 100 tokens/s for 3 s and 500 for 1 s are 200 for 4. Losses over the steps not skipped."""
    report = Report(tmp_path, since=4, steps=9, log_every=4)
    for step, loss, speed, seconds, more in (
        (5, 3.0, 50, 1, {}),
        (6, 4.0, 100, 3, {}),
        (7, float("nan"), 500, 1, dict(skipped=1)),
        (8, 6.0, 200, 1, {}),
        (9, 9.0, 70, 1, {}),
    ):
        report.step(record(step, loss, speed, **more), Details(seconds))
    report.close()
    lines = [line for line in capsys.readouterr().out.splitlines() if "eta" in line]
    assert [line.split("  ")[0] for line in lines] == ["step 5/9", "step 8/9", "step 9/9"]
    assert "loss 3.0000" in lines[0] and " 50 tok/s" in lines[0]
    assert "loss 5.0000  next token 4.0000" in lines[1] and "grad norm 10.00  200 tok/s  MFU 2.0 %" in lines[1]
    assert "loss 9.0000" in lines[2] and " 70 tok/s  MFU 0.7 %" in lines[2]
    kept = read_lines(tmp_path / "metrics.jsonl")  # each step's own
    assert [m["tokens_per_s"] for m in kept] == [50, 100, 500, 200, 70] and kept[2]["loss"] is None


def test_a_warning_of_a_command_is_one_line(tmp_path, capsys):
    """Of this package or of another, without file and line in it."""

    @command
    def main():
        warnings.warn("two\nlines", stacklevel=1)
        warn("of ling_kernels")

    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = lambda *args: sys.stderr.write(warnings.formatwarning(*args))  # pytest has another
        assert main() == 0
    assert capsys.readouterr().err == "warning: two lines\nwarning: of ling_kernels\n"


def test_a_warning_in_python_names_the_users_line():
    """Not the package's, however deep it comes from."""
    with pytest.warns(UserWarning, match="only 8 tokens") as caught:
        validation_set(None, [documents_of(9)], Settings(seq_len=16))
    assert caught[0].filename == __file__


def test_a_single_bad_interval_is_shown(tmp_path, capsys):
    report = Report(tmp_path, since=0, steps=9, log_every=1)
    report.step(record(1, float("inf"), 50, skipped=1), Details(1.0))
    assert "loss inf" in capsys.readouterr().out


def test_samples_during_training_change_nothing(tmp_path, flags, uninterrupted, capsys):
    """Losses and weights are those of a run without samples, to the bit; also after going back to a checkpoint."""
    run = tmp_path / "run"
    assert main([*flags, "--out", str(run), "--steps", "8", "--save-every", "4", "--sample-every", "3"]) == 0
    out = capsys.readouterr().out
    assert re.findall(r"^step (\d+): sample: ", out, re.M) == ["3", "6"] and "A sample that continues" in out
    assert main(["--resume", str(run / "checkpoints" / "step-000004"), "--steps", "14", "--sample-every", "5"]) == 0
    samples = [json.loads(line) for line in (run / "samples.jsonl").read_text().splitlines()]
    assert [s["step"] for s in samples] == [3, 5, 10, 14]
    assert len({s["prompt"] for s in samples}) == 1 and samples[0].keys() == {"step", "prompt", "text"}
    assert f"{samples[-1]['text']}\n" in capsys.readouterr().out
    for got, want in zip(metrics_of(run), metrics_of(uninterrupted), strict=True):
        assert {k: v for k, v in got.items() if k not in SPEED} == {k: v for k, v in want.items() if k not in SPEED}
    for name in ("model", "optimizer", "rng"):
        one, two = (load_file(r / "checkpoints" / "step-000014" / f"{name}.safetensors") for r in (run, uninterrupted))
        assert all(torch.equal(one[k], two[k]) for k in one)


class Board:
    def __init__(self, *args, fail=None):
        self.scalars_of, self.texts, self.closed, self.fail = {}, [], False, fail

    def scalars(self, step, values):
        if step == self.fail:
            raise OSError(28, "No space left on device")
        self.scalars_of[step] = values

    def text(self, step, name, text):
        self.texts.append((step, name))

    def close(self):
        self.closed = True


@pytest.mark.parametrize("fail", [None, 2])
def test_loggers_get_every_number(tmp_path, flags, monkeypatch, capsys, fail):
    """A logger that fails is dropped with one line, and training goes on."""
    board = Board(fail=fail)
    monkeypatch.setattr(loggers, "installed", lambda package: True)
    monkeypatch.setattr(loggers, "TensorBoard", lambda run, since: board)
    assert main([*flags, "--out", str(tmp_path), "--steps", "3", "--sample-every", "1"]) == 0
    out = capsys.readouterr().out
    assert {"loss", "lr", "load_violation_max"} <= board.scalars_of[1].keys() and "step" not in board.scalars_of[1]
    assert out.count("No space left") == (fail is not None)
    if fail is None:
        assert "val_loss" in board.scalars_of[3] and board.closed and board.texts == [(1, "sample"), (2, "sample")]
    else:
        assert board.scalars_of.keys() == {1} and metrics_of(tmp_path)[-1]["step"] == 3


def test_wandb(tmp_path, flags, monkeypatch, capsys):
    """A resumed run goes on under its id; numbers come with the run's own step."""
    calls, logged = [], []

    class Run:
        define_metric = finish = staticmethod(lambda *args, **options: calls.append((args, options)))
        log = staticmethod(logged.append)

    def init(**options):
        calls.append(options)
        return Run

    wandb = types.SimpleNamespace(init=init, Html=lambda text, inject: text)
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    monkeypatch.setattr("ling_kernels.train.prepare.checks.installed", lambda package: True)
    argv = [*flags, "--out", str(tmp_path), "--steps", "2", "--wandb", "ling", "--sample-every", "1"]
    assert main(argv) == 0
    assert main(["--resume", str(tmp_path), "--steps", "3"]) == 0  # the project is the run's
    starts = [c for c in calls if isinstance(c, dict)]
    assert len(starts) == 2 and starts[0]["id"] == starts[1]["id"] and starts[0]["project"] == "ling"
    assert starts[0]["config"]["seq_len"] == 48 and starts[0]["dir"] == tmp_path
    assert [row["step"] for row in logged if "loss" in row] == [1, 2, 3]
    assert any("<pre>" in row.get("sample", "") for row in logged)
    wandb.init = lambda **options: 1 / 0
    capsys.readouterr()
    assert "WANDB_MODE=offline" in one_line_error(["--resume", str(tmp_path), "--steps", "4"], capsys)


def test_wandb_that_is_not_installed(tmp_path, flags, monkeypatch, capsys):
    """Nor is a folder that wandb left in the working directory."""
    (tmp_path / "wandb").mkdir()
    monkeypatch.syspath_prepend(str(tmp_path))
    if loggers.installed("wandb"):
        pytest.skip("wandb is installed")
    error = one_line_error([*flags, "--out", str(tmp_path / "run"), "--wandb", "ling"], capsys)
    assert "pip install wandb" in error and not (tmp_path / "run").exists()
    assert "--sample-tokens is 0" in one_line_error([*flags, "--sample-every", "2", "--sample-tokens", "0"], capsys)


def test_the_pages_loop_of_ones_own_writes_the_files(tmp_path, monkeypatch):
    page = (Path(__file__).parents[1] / "docs" / "training.md").read_text()
    (code,) = [block.partition("```")[0] for block in page.split("```python\n")[1:] if "Report(" in block]
    monkeypatch.chdir(tmp_path)
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "a.txt").write_text("a text to learn, in one document\n" * 500)
    exec(code.replace('data="texts", steps=20', 'data="texts", steps=2, seq_len=32, batch=1, sample_tokens=0'), {})
    run = tmp_path / "runs" / "mine"
    assert len(read_lines(run / "metrics.jsonl")) == 2 and len(read_lines(run / "expert_load.jsonl")) == 1
    assert "</html>" in (run / "report.html").read_text() and (run / "checkpoints" / "step-000002").is_dir()
