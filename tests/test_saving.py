"""Checkpoints: written whole or not at all, in a thread or not; which of them stay; what a full disk costs."""

# ruff: noqa: F811 (fixtures are imported)
import errno
import json
import os
import random
import shutil
import signal
import threading
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

from ling_kernels.parallel import checkpoints
from ling_kernels.train import Settings, Trainer, saving
from ling_kernels.train import checkpoint as ckpt
from ling_kernels.train import trainer as module
from ling_kernels.train.__main__ import main
from ling_kernels.train.prepare import room
from ling_kernels.train.prepare.sizes import checkpoints_at_once
from ling_kernels.train.report import open_lines, read_lines
from ling_kernels.train.saving import GOOD_AFTER, NotSaved, count_sound, kept, last_good
from tests.training import flags, one_line_error, small, text, tiniest, uninterrupted  # noqa: F401

FULL = OSError(errno.ENOSPC, "No space left on device")


@pytest.fixture
def settings(small, text):
    return Settings(
        model=small, data=text, steps=9, seq_len=32, batch=2, eval_rows=1, sample_tokens=0, threads=1, keep=1
    )


@pytest.fixture
def trainer(tmp_path, settings):
    trainer = Trainer(settings, tmp_path / "run")
    trainer.step()
    return trainer


def contents(checkpoint):
    files = {p.name: p.read_bytes() for p in checkpoint.iterdir()}
    state = json.loads(files.pop("state.json"))
    return files, {k: v for k, v in state.items() if k != "time"}


def names(run):
    return sorted(p.name for p in (run / "checkpoints").iterdir())


def test_a_thread_writes_the_same_bytes(trainer, monkeypatch):
    """Of the step at which it was called, although later steps change the tensors before it writes."""
    expected = contents(trainer.save())
    go_on, genuine = threading.Event(), saving.write_files
    monkeypatch.setattr(saving, "write_files", lambda *args: (go_on.wait(60), genuine(*args))[1])
    checkpoint = trainer.save(wait=False)
    trainer.step()
    go_on.set()
    trainer.writer.wait()
    assert contents(checkpoint) == expected


def test_without_memory_for_a_copy_the_caller_waits(trainer, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(saving, "room_for_copy", lambda needed: needed < 0)
        checkpoint = trainer.save(wait=False)
    assert trainer.writer.thread is None and ckpt.damage_of(checkpoint) is None
    assert not saving.room_for_copy(1 << 60) and saving.room_for_copy(1 << 10)


def test_masters_are_saved_in_their_precision(tmp_path, settings):
    trainer = Trainer(replace(settings, master="bf16", optimizer="adamw8bit", precision="bf16"), tmp_path / "run")
    trainer.step()
    saved = load_file(trainer.save() / "model.safetensors")
    types = {key: t.dtype for key, t in saved.items()}
    assert types["lm_head.weight"] == torch.bfloat16 and types["model.norm.weight"] == torch.float32
    assert {t for k, t in types.items() if k.endswith(("gate.weight", "expert_bias"))} == {torch.float32}
    resumed = Trainer.resume(tmp_path / "run")
    assert all(map(torch.equal, trainer.model.parameters(), resumed.model.parameters()))
    assert trainer.step()["loss"] == resumed.step()["loss"]


class Killed(BaseException):
    pass


@pytest.mark.parametrize("moment", [
    (checkpoints, "save_tensors"), (saving, "save_tensors"), (ckpt, "checksum"), (ckpt, "make_durable"), (os, "rename"),
], ids=lambda moment: f"{moment[0].__name__.rpartition('.')[2]}.{moment[1]}")  # fmt: skip
@pytest.mark.parametrize("how", ["killed", "full"])
def test_what_ends_a_save_leaves_the_checkpoint_before(trainer, monkeypatch, moment, how):
    first = trainer.save()
    trainer.step()
    with monkeypatch.context() as patch:

        def fail(*_, **__):
            raise Killed if how == "killed" else FULL

        patch.setattr(*moment, fail)
        with pytest.raises(Killed if how == "killed" else NotSaved, match=None if how == "killed" else "No space left"):
            trainer.save()
    if how == "full":
        assert names(trainer.folder) == ["step-000001"]  # nothing half-written fills the disk
    assert ckpt.locate(str(trainer.folder)) == (trainer.folder, first) and ckpt.read_state(first)["step"] == 1
    trainer.step()
    trainer.save()
    assert names(trainer.folder) == ["step-000001", "step-000003"]  # the first may become good; no leftovers


@pytest.mark.parametrize("at", [3, 6])
def test_a_full_disk_is_one_line_and_the_next_save_tries_again(tmp_path, flags, uninterrupted, monkeypatch, at, capsys):
    genuine, run = saving.save_tensors, tmp_path / "run"
    full = lambda path: f"step-{at:06d}" in str(path)  # noqa: E731

    def save_tensors(tensors, path):
        path.write_bytes(b"x" * 1000)
        if full(path):
            raise OSError("Error while serializing: I/O error: No space left on device (os error 28)")
        genuine(tensors, path)

    monkeypatch.setattr(saving, "save_tensors", save_tensors)
    code = main([*flags, "--out", str(run), "--steps", "6", "--save-every", "3", "--keep", "0"])
    out, err = capsys.readouterr()
    if at == 3:
        assert code == 0 and err == "" and names(run) == ["step-000006"]
        assert out.count("cannot write the checkpoint") == 1
    else:  # the last one is tried twice
        assert code == 1 and err.count("\n") == 1 and "No space left" in err and names(run) == ["step-000003"]
    monkeypatch.undo()
    assert main(["--resume", str(run), "--steps", "14", "--keep", "1"]) == 0
    last = [load_file(ckpt.list_checkpoints(r)[-1] / "model.safetensors") for r in (run, uninterrupted)]
    assert all(torch.equal(last[0][k], last[1][k]) for k in last[0])


def test_files_that_the_system_refuses_to_write(tmp_path, flags, capsys):
    """By a limit of their size, which the libraries that write them meet as they meet a full disk."""
    resource = pytest.importorskip("resource")
    run, limits = tmp_path / "run", resource.getrlimit(resource.RLIMIT_FSIZE)
    argv = [*flags, "--out", str(run), "--steps", "4", "--save-every", "2", "--eval-every", "2"]
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        code = main(argv)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    out, err = capsys.readouterr()
    assert code == 1 and err.count("File too large") == err.count("\n") == 1
    assert out.count("File too large") == 2 and out.count("; training goes on") == 1 and names(run) == []
    (run / "checkpoints" / ".step-000002.partial").write_text("no folder")
    assert main([*argv, "--resume", "auto"]) == 0 and names(run) == ["step-000002", "step-000004"]


def test_the_exported_model_that_cannot_be_written_is_one_line(tmp_path, flags, monkeypatch, capsys):
    (tmp_path / "run").mkdir()
    monkeypatch.setattr(saving, "save_model", lambda *_: (_ for _ in ()).throw(saving.InputError("cannot write: full")))
    assert main([*flags, "--out", str(tmp_path / "run"), "--steps", "1"]) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "cannot write: full; the weights are in " in error and "step-000001" in error


def test_which_checkpoints_stay():
    steps = list(range(10, 101, 10))
    assert kept(steps, 0, 0, 0) == set(steps)
    assert kept(steps, 2, 0, 85) == {80, 90, 100}  # 80 is the last good one, 90 the next that may be
    assert kept(steps, 2, 0, 200) == {90, 100}
    assert kept(steps, 1, 40, 55) == {40, 50, 60, 80, 100}
    assert kept(steps, 1, 0, 0) == {10, 100}
    assert kept([7], 3, 0, 0) == {7}
    assert last_good(steps, 55) == 50 and last_good(steps, 9) is None


def test_a_checkpoint_is_good_after_sound_steps():
    progress = module.Progress()
    losses = [5.0] * GOOD_AFTER + [None] + [5.0] * (GOOD_AFTER - 1) + [12.0, 5.0]
    proven = []
    for progress.step, loss in enumerate(losses, 1):  # noqa: B020
        count_sound(progress, loss, 320)  # ln(320) = 5.77
        proven.append(progress.proven)
    assert set(proven) == {0} and progress.sound == 1
    for progress.step in range(len(losses) + 1, len(losses) + 2 * GOOD_AFTER):
        count_sound(progress, 5.0, 320)
    assert progress.proven == len(losses) + GOOD_AFTER - 1


def test_a_diverged_run_is_repaired_from_the_checkpoint_that_it_names(tmp_path, flags, capsys, monkeypatch):
    monkeypatch.setattr(saving, "GOOD_AFTER", 6)
    argv = [*flags, "--out", str(tmp_path), "--steps", "16", "--save-every", "2", "--keep", "1", "--lr", "1e-3"]
    assert main(argv) == 0
    assert [c.name for c in ckpt.list_checkpoints(tmp_path)] == ["step-000010", "step-000014", "step-000016"]
    again = ["--resume", str(tmp_path), "--steps", "30"]
    assert main([*again, "--lr", "1e6", "--max-bad-steps", "3", "--clip", "0", "--spike-loss", "2"]) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "the last good checkpoint is" in error
    named = error.split("the last good checkpoint is ")[1].split(": --resume")[0]
    assert main(["--resume", named, "--lr", "1e-3", "--clip", "1", "--steps", "18"]) == 0
    last = [json.loads(row) for row in (tmp_path / "metrics.jsonl").read_text().splitlines()][-1]
    assert last["step"] == 18 and last["main_loss"] < 6 and "skipped" not in last


def test_resume_auto_falls_back(tmp_path, flags, capsys):
    assert main([*flags, "--out", str(tmp_path), "--steps", "4", "--save-every", "2"]) == 0
    (tmp_path / "checkpoints" / "step-000004" / "optimizer.safetensors").write_bytes(b"x")
    one_line_error(["--resume", str(tmp_path), "--steps", "5"], capsys)
    assert main(["--resume", "auto", "--out", str(tmp_path), "--steps", "5"]) == 0
    out = capsys.readouterr().out
    assert "step-000004 is damaged: optimizer.safetensors has" in out and "resuming from step-000002" in out
    assert names(tmp_path) == ["step-000002", "step-000004", "step-000005", "superseded-step-000004"]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_while_tokenising_leaves_nothing(tmp_path, flags, monkeypatch, number, capsys):
    genuine = module.open_corpus

    def interrupted(*args):
        (tmp_path / "run" / "data").mkdir()
        (tmp_path / "run" / "data" / "tokens.bin").write_bytes(b"x")
        signal.raise_signal(number)
        return genuine(*args)

    with monkeypatch.context() as patch:
        patch.setattr(module, "open_corpus", interrupted)
        assert main([*flags, "--out", str(tmp_path / "run"), "--steps", "2"]) == 75
    assert "stopped before the first step" in capsys.readouterr().err and not (tmp_path / "run").exists()
    assert main([*flags, "--out", str(tmp_path / "run"), "--steps", "2"]) == 0


def test_a_disk_without_room_is_one_line_before_the_run(tmp_path, flags, monkeypatch, capsys):
    """The small model has 66,464 parameters of 12 bytes in a checkpoint, and 2 in the exported model."""
    argv = [*flags, "--out", str(tmp_path / "run"), "--steps", "200", "--save-every", "50", "--keep", "2"]
    s = Settings(steps=200, save_every=50, keep=2)
    usage, free = shutil.disk_usage(tmp_path), 0
    monkeypatch.setattr(room.shutil, "disk_usage", lambda path: usage._replace(free=free))
    free = (4 * 12 + 2) * 66464  # all four, in whatever order
    room.check_disk(tiniest(), s, tmp_path)
    free = (3 * 12 + 2) * 66464
    with pytest.warns(UserWarning, match="there may be 4 checkpoints of 797.6 kB .* need 3.3 MB, .* has 2.5 MB"):
        room.check_disk(tiniest(), s, tmp_path)
    free -= 1
    assert "3 checkpoints of 797.6 kB and the model at the end need 2.5 MB" in one_line_error(argv, capsys)
    usage = usage._replace(total=0)  # a tmpfs without a limit
    room.check_disk(tiniest(), s, tmp_path)
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    assert f"cannot write to {tmp_path}: Permission denied" in one_line_error(argv, capsys)
    flags_of = type("statvfs", (), dict(f_flag=os.ST_RDONLY))
    monkeypatch.setattr(os, "statvfs", lambda path: flags_of)
    assert f"cannot write to {tmp_path}: Read-only file system" in one_line_error(argv, capsys)
    assert not (tmp_path / "run").exists()


def checkpoints_of(saves, keep, keep_every, proven):
    """The most checkpoints at once, where a save at step `saves` finds proven(step) good."""
    there, most = [], 0
    for step in saves:
        most = max(most, len(there) + 1)
        there = sorted(kept([*there, step], keep, keep_every, proven(step)))
    return most


@pytest.mark.parametrize("every", [1, 7, 10, 16, 20, 31, 32, 40, 200])
@pytest.mark.parametrize("keep", [0, 1, 2, 3, 5])
@pytest.mark.parametrize("keep_every", [0, 3])
def test_the_disk_check_counts_what_there_is(every, keep, keep_every):
    """Against a run that saves: of sound steps; of any steps, stopped at any of them."""
    steps, rng = max(30 * every, 100) + 1, random.Random(every)
    s = Settings(steps=steps, save_every=every, keep=keep, keep_every=keep_every * every)
    saves = [*range(every, steps, every), steps]
    usual, most = checkpoints_at_once(s)
    sound = checkpoints_of(saves, keep, s.keep_every, lambda step: max(step - GOOD_AFTER, 0))
    assert sound <= usual <= sound + bool(keep_every) * min(keep + 3, 5)
    if not keep_every:
        assert usual == sound
    worst = 0
    for _ in range(300):
        stops = rng.sample(range(1, steps), rng.randrange(3))
        good = sorted(rng.choices(range(steps), k=3))
        proven = lambda step, good=good: max((g for g in good if g <= step - GOOD_AFTER), default=0)  # noqa: E731
        worst = max(worst, checkpoints_of(sorted({*saves, *stops}), keep, s.keep_every, proven))
    assert worst <= most + (2 if keep == 0 else 0)  # a stop adds one for ever with --keep 0
    if not keep_every and keep and every > 1:
        assert worst == most


def test_the_disk_check_of_a_resumed_run():
    s = Settings(steps=400, save_every=100, keep=2)
    assert checkpoints_at_once(s, 210, [100, 200, 210]) == (4, 5)
    assert checkpoints_at_once(s, 400, [300, 400]) == (2, 2)  # nothing is left to save
    many = [*range(10, 210, 10)]
    assert checkpoints_at_once(s, 200, many) == (21, 21)  # they are removed after the next one is written
    assert checkpoints_at_once(Settings(steps=400, save_every=100, keep=0), 200, [100, 200]) == (4, 4)


def test_lines_of_a_full_disk_are_written_later(tmp_path, capsys):
    lines = open_lines(tmp_path / "a.jsonl", 0)

    class Full:
        room = 5

        def write(self, content):
            if not self.room:
                raise FULL
            return genuine.write(content[: self.room])

        def close(self):
            genuine.close()

        def fileno(self):
            return genuine.fileno()

    genuine, lines.file = lines.file, Full()
    lines.write(dict(step=1))
    lines.file.room = 0
    lines.write(dict(step=2))
    lines.write(dict(step=3))
    assert capsys.readouterr().out.count("No space left on device; its lines are kept") == 1
    lines.file.room = 7
    lines.write(dict(step=4))
    lines.close()
    assert read_lines(tmp_path / "a.jsonl") == [dict(step=n) for n in (1, 2, 3, 4)]


def test_a_run_whose_folder_is_removed_goes_on(tmp_path, flags, monkeypatch, capsys):
    """In a new one, with what comes after; resumed it has the bits of the first steps too."""
    run, step = tmp_path / "run", Trainer.step

    def removing(trainer):
        if trainer.progress.step == 3:
            trainer.writer.wait()  # a removal while it renames its folder could fail
            shutil.rmtree(run)
        return step(trainer)

    monkeypatch.setattr(Trainer, "step", removing)
    assert main([*flags, "--out", str(run), "--steps", "6", "--save-every", "2", "--eval-every", "6"]) == 0
    assert f"warning: {run / 'metrics.jsonl'} was removed" in capsys.readouterr().out
    assert [row["step"] for row in read_lines(run / "metrics.jsonl")] == [4, 5, 6]
    assert names(run) == ["step-000004", "step-000006"] and "</html>" in (run / "report.html").read_text()
    assert main(["--resume", str(run), "--steps", "7"]) == 0


def test_a_run_killed_before_its_first_checkpoint_says_how_to_begin_again(tmp_path, flags, capsys):
    argv = [*flags, "--out", str(tmp_path), "--steps", "1"]
    (tmp_path / "settings.json").write_text("{}")
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / ".tokens.bin.partial").write_bytes(b"x")
    assert f"--resume auto --out {tmp_path} begins its run again" in one_line_error(argv, capsys)
    assert main([*argv, "--resume", "auto"]) == 0
    assert f"--resume {tmp_path} continues its run" in one_line_error(argv, capsys)
