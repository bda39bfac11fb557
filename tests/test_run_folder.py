"""The folder of a run: who may use it, what it can lose, and where a run ends."""

# ruff: noqa: F811 (fixtures are imported)
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from ling_kernels.errors import Diverged, InputError
from ling_kernels.files import lock_folder
from ling_kernels.train import Settings, Trainer
from ling_kernels.train import checkpoint as ckpt
from ling_kernels.train import trainer as module
from ling_kernels.train.settings import from_json, to_json
from tests.training import one_line_error, small, text  # noqa: F401

HOLD = """
import sys, time
from pathlib import Path
from ling_kernels.files import lock_folder
lock = lock_folder(Path(sys.argv[1]))
print("locked", flush=True)
time.sleep(600)
"""


@pytest.fixture
def settings(small, text):
    return Settings(
        model=small, data=text, steps=np.int64(2), seq_len=32, batch=2, eval_rows=1, sample_tokens=0, threads=1
    )


def run_of(settings, folder) -> Trainer:
    trainer = Trainer(settings, folder)
    trainer.step()
    trainer.save()
    trainer.writer.wait()
    return trainer


def test_a_folder_belongs_to_one_process(tmp_path, settings, capsys):
    run = tmp_path / "run"
    run_of(settings, run)
    with subprocess.Popen([sys.executable, "-c", HOLD, run], stdout=subprocess.PIPE, text=True) as other:
        try:
            assert other.stdout.readline() == "locked\n"
            error = one_line_error(["--resume", str(run)], capsys)
            assert f"{run} is in use by another process, {other.pid}" in error
            shutil.rmtree(run / "checkpoints")
            argv = ["--out", str(run), "--resume", "auto", "--model", settings.model, "--data", *settings.data,
                    "--seq-len", "32"]  # fmt: skip
            assert "is in use by another process" in one_line_error(argv, capsys)
            with pytest.raises(InputError, match="in use"):
                Trainer(settings, run, restart=True)
        finally:
            os.kill(other.pid, signal.SIGKILL)
    assert Trainer(settings, run, restart=True).progress.step == 0


def test_one_process_may_open_a_run_twice(tmp_path, settings):
    trainer = run_of(settings, tmp_path / "run")
    second = Trainer.resume(tmp_path / "run")
    assert second.lock is trainer.lock
    second.step()


def test_a_lock_ends_with_its_object(tmp_path):
    taken = f"import sys; sys.argv[1] = {str(tmp_path)!r}" + HOLD.replace("time.sleep(600)", "")
    lock = lock_folder(tmp_path)
    assert subprocess.run([sys.executable, "-c", taken, ""], capture_output=True).returncode == 1
    del lock
    assert subprocess.run([sys.executable, "-c", taken, ""], capture_output=True).returncode == 0


def test_a_refused_run_leaves_an_empty_folder_empty(tmp_path, settings, capsys):
    data = tmp_path / "short.txt"
    data.write_text("short")
    (tmp_path / "run").mkdir()
    assert "too small" in one_line_error(["--data", str(data), "--out", str(tmp_path / "run")], capsys)
    assert not [*(tmp_path / "run").iterdir()]


def test_a_run_resumes_without_its_texts(tmp_path, settings, capsys):
    for name in ("a.txt", "texts/b.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("words that are gone tomorrow\n" * 50)
    data = (tmp_path / "a.txt", tmp_path / "texts")
    run_of(Settings(**to_json(settings) | dict(data=data, holdout=2)), tmp_path / "run")
    (tmp_path / "a.txt").unlink()
    shutil.rmtree(tmp_path / "texts")
    trainer = Trainer.resume(tmp_path / "run")
    trainer.step()
    trainer.save()
    (tmp_path / "run" / "data" / "tokens.bin").unlink()
    assert "there is no data at" in one_line_error(["--resume", str(tmp_path / "run"), "--steps", "3"], capsys)


def test_there_is_no_step_after_the_last(tmp_path, settings):
    trainer = Trainer(settings, tmp_path / "run")
    trainer.step()
    trainer.step()
    with pytest.raises(InputError, match="all 2 steps are done.*Trainer.resume"):
        trainer.step()
    trainer.save()
    longer = Trainer.resume(tmp_path / "run", steps=3)
    assert longer.step()["step"] == 3


def test_a_diverged_run_can_be_saved_and_goes_on(tmp_path, settings, monkeypatch):
    trainer = Trainer(Settings(**to_json(settings) | dict(steps=4, max_bad_steps=1)), tmp_path / "run")
    genuine = module.accumulate_gradients
    monkeypatch.setattr(module, "accumulate_gradients", lambda *args: genuine(*args) * torch.nan)
    weights = [p.detach().clone() for p in trainer.model.parameters()]
    with pytest.raises(Diverged):
        trainer.step()
    trainer.save()
    monkeypatch.undo()
    resumed = Trainer.resume(tmp_path / "run")
    assert all(map(torch.equal, weights, resumed.model.parameters()))
    for t in (trainer, resumed):
        assert t.step()["step"] == 2 and t.progress.bad == 0
    assert all(map(torch.equal, trainer.model.parameters(), resumed.model.parameters()))


def test_a_file_in_the_place_of_a_folder_is_one_line(tmp_path, small, text, capsys):
    """Nothing is trained for checkpoints that cannot be written."""
    argv = ["--model", str(small), "--data", str(text), "--seq-len", "32", "--steps", "1", "--threads", "1"]
    run = tmp_path / "run"
    run.mkdir()
    (run / "settings.json").write_text("{}")
    (run / "checkpoints").write_text("a file")
    for resume in (["--resume", "auto", "--out", str(run)], ["--resume", str(run)], ["--out", str(run)]):
        assert f"{run / 'checkpoints'} is not a folder" in one_line_error([*argv, *resume], capsys)
    assert {p.name for p in run.iterdir()} <= {"settings.json", "checkpoints", ".lock"}
    file = tmp_path / "file"
    file.write_text("a file")
    assert f"--out {file} is a file" in one_line_error([*argv, "--resume", "auto", "--out", str(file)], capsys)
    assert "it is a file" in one_line_error([*argv, "--resume", str(file)], capsys)
    assert f"{tmp_path} is not empty: name a new folder" in one_line_error([*argv, "--out", str(tmp_path)], capsys)


def test_settings_take_paths_and_numpys_numbers(tmp_path):
    s = Settings(model=tmp_path, data=Path("a.txt"), tokenizer=Path("t"), steps=np.int32(3), lr=np.float32(0.5),
                 step_in_backward=np.bool_(True), mtp=np.int64(1), clip=0)  # fmt: skip
    assert s.model == str(tmp_path) and s.data == ("a.txt",) and s.tokenizer == "t" and s.steps == 3
    assert [type(v) for v in (s.steps, s.lr, s.step_in_backward, s.mtp, s.clip)] == [int, float, bool, int, int]
    assert from_json(to_json(s)) == s
    assert Settings(data=["a", Path("b")]).data == ("a", "b")


@pytest.mark.parametrize("name, value, says", [
    ("data", 3, "data 3: it must be a path or several"), ("data", [1], "a path or several"),
    ("data", b"x", "a path or several"), ("model", 3, "model 3: it must be text"), ("model", None, "text"),
    ("steps", "3", "steps '3': it must be a whole number"), ("steps", np.float64(2), "a whole number"),
    ("steps", True, "a whole number"), ("warmup", 10**30, "at most 63 bits"),
    ("lr", "1", "lr '1': it must be a number"), ("lr", np.bool_(True), "a number"),
    ("step_in_backward", 1, "step_in_backward 1: it must be True or False"), ("optimizer", 8, "text"),
    ("spike_loss", "x", "a number"), ("batch_ramp", 4, "text"),
    ("data", "", "a path or several"), ("data", ["a", ""], "a path or several"), ("model", "", "text"),
])  # fmt: skip
def test_settings_of_other_types_are_refused(tmp_path, name, value, says):
    with pytest.raises(InputError, match=says):
        Settings(**{name: value})
    with pytest.raises(InputError, match=says):
        Trainer.resume(one_checkpoint(tmp_path), **{name: value})


def one_checkpoint(folder) -> Path:
    checkpoint = folder / "checkpoints" / "step-000001"
    checkpoint.mkdir(parents=True)
    (checkpoint / "state.json").write_text('{"settings": {}, "step": 1, "data": {}, "files": {}}')
    return folder


def test_errors_name_settings_as_their_caller_does(tmp_path, settings, small, text, capsys):
    for changes, flags in (
        (dict(seq_len=4096), "--seq-len 4096"), (dict(batch=6, micro_batch=4), "--batch 6 --micro-batch 4"),
        (dict(fp8_fallback=1), "--fp8-fallback 1"), (dict(text_field="body"), "--text-field body"),
    ):  # fmt: skip
        with pytest.raises(InputError) as error:
            Trainer(Settings(**to_json(settings) | changes), tmp_path / "python")
        message = str(error.value)
        assert "--" not in message and [*changes][-1] in message
        argv = ["--model", str(small), "--data", str(text), "--out", str(tmp_path / "command"), "--seq-len", "32"]
        assert flags.split()[-2] in one_line_error([*argv, *flags.split()], capsys)


@pytest.mark.parametrize("name, content, says", [
    ("optimizer.safetensors", None, "neither optimizer.safetensors nor"),
    ("optimizer.safetensors", b"\1\0\0", "header too small"),
    ("optimizer.safetensors", "rng.safetensors", "of other parameters than the model's"),
    ("rng.safetensors", None, "no states of random number generators"),
    ("rng.safetensors", "optimizer.safetensors", "no states of random number generators: 'cpu'"),
    ("model.safetensors", b"", "cannot read"),
    ("config.json", b"{", "not readable JSON"),
    ("tokenizer.json", None, "there is no tokenizer"),
])  # fmt: skip
def test_a_checkpoint_that_was_changed_is_one_line(tmp_path, settings, capsys, name, content, says):
    """Also where state.json has the checksums of the changed files. content: bytes, a file's, or none."""
    run_of(settings, tmp_path / "run")
    (checkpoint,) = (tmp_path / "run" / "checkpoints").iterdir()
    content = (checkpoint / content).read_bytes() if isinstance(content, str) else content
    (checkpoint / name).unlink()
    if content is not None:
        (checkpoint / name).write_bytes(content)
    assert "is damaged: " in one_line_error(["--resume", str(tmp_path / "run")], capsys)
    state = json.loads((checkpoint / "state.json").read_text())
    state["files"] = {p.name: [p.stat().st_size, ckpt.checksum(p)] for p in checkpoint.iterdir() if p.suffix != ".json"}
    (checkpoint / "state.json").write_text(json.dumps(state))
    assert says in one_line_error(["--resume", str(tmp_path / "run")], capsys)


@pytest.mark.parametrize("key, shape", [("exp_avg", [3]), ("exp_avg_sq", []), ("step", [2])])
def test_moments_of_another_shape_are_one_line(tmp_path, settings, capsys, key, shape):
    """torch's fused AdamW reads past the end of such a tensor."""
    run_of(settings, tmp_path / "run")
    (checkpoint,) = (tmp_path / "run" / "checkpoints").iterdir()
    tensors = load_file(file := checkpoint / "optimizer.safetensors")
    name = next(name for name in tensors if name.endswith(f"weight.{key}"))
    save_file(tensors | {name: torch.ones(shape)}, file)
    state = json.loads((checkpoint / "state.json").read_text())
    state["files"][file.name] = [file.stat().st_size, ckpt.checksum(file)]
    (checkpoint / "state.json").write_text(json.dumps(state))
    line = one_line_error(["--resume", str(tmp_path / "run"), "--steps", "9"], capsys)
    assert f"the optimizer's {name} is {shape}, the parameter [" in line


def test_numbers_of_processes_that_the_run_has(tmp_path, settings, capsys):
    """A resumed run that other processes cannot divide says which numbers are not of the command line."""
    run_of(settings, tmp_path / "run")
    (checkpoint,) = (tmp_path / "run" / "checkpoints").iterdir()
    state = json.loads((checkpoint / "state.json").read_text())
    state["settings"] |= dict(ep=2, dp=4)
    (checkpoint / "state.json").write_text(json.dumps(state))
    resume = ["--resume", str(tmp_path / "run"), "--steps", "9"]
    assert one_line_error(resume, capsys).endswith("; the run to resume has --dp 4: give other numbers\n")
    line = one_line_error([*resume, "--dp", "1"], capsys)
    assert line.endswith("; the run to resume has --ep 2: give other numbers\n")
    assert "the run to resume has" not in one_line_error([*resume, "--dp", "1", "--ep", "3"], capsys)
