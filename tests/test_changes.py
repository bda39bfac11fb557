"""What a resumed run changes: settings of the optimizer, the schedule and the data, and the record of it."""

# ruff: noqa: F811 (fixtures are imported)
import json
import shutil
from dataclasses import replace

import pytest
import torch

from ling_kernels.errors import InputError
from ling_kernels.train import Settings, Trainer
from ling_kernels.train import checkpoint as ckpt
from ling_kernels.train.__main__ import main
from tests.training import one_line_error, small, text  # noqa: F401


@pytest.fixture
def settings(small, text):
    return Settings(
        model=small, data=text, steps=8, seq_len=32, batch=2, eval_rows=1, sample_tokens=0, threads=1, lr=2e-3, warmup=2
    )


def run_of(settings, folder, steps):
    trainer = Trainer(settings, folder)
    for _ in range(steps):
        trainer.step()
    return trainer.save()


def rows_of(trainer, steps=1):
    """The numbers of the rows that the next steps take."""
    rows, batch = [], trainer.rows.batch
    trainer.rows.batch = lambda numbers: (rows.extend(numbers), batch(numbers))[1]
    for _ in range(steps):
        trainer.step()
    return rows


CHANGES = dict(
    lr=1e-4, warmup=0, decay="linear", decay_steps=3, min_lr=1e-5, weight_decay=0.3, clip=0.5, z_loss=0.1,
    balance_rate=0.02, batch=3, micro_batch=1,
)  # fmt: skip


def test_changes_take_effect_and_are_recorded(tmp_path, settings):
    run_of(settings, tmp_path / "run", 3)
    trainer = Trainer.resume(tmp_path / "run", steps=8, **CHANGES)
    assert {c["setting"]: (c["step"], c["old"], c["new"]) for c in trainer.changes} == {
        name: (3, getattr(settings, name), new) for name, new in CHANGES.items()
    }
    assert rows_of(trainer, 3) == list(range(6, 15))  # rows go on where they were
    assert [g["weight_decay"] for g in trainer.optimizer.param_groups] == [0.3, 0.0]
    assert trainer.optimizer.param_groups[0]["lr"] == 1e-4  # step 6 is the first of the decay
    assert trainer.step()["lr"] == pytest.approx(1e-5 + 9e-5 * 2 / 3)
    checkpoint = trainer.save()
    again = Trainer.resume(tmp_path / "run", lr=2e-4)
    assert len(again.progress.changes) == len(CHANGES) + 1 and len(again.changes) == 1
    assert json.loads((checkpoint / "state.json").read_text())["changes"] == trainer.progress.changes
    assert json.loads((tmp_path / "run" / "settings.json").read_text())["lr"] == 2e-4


def test_a_resumed_run_says_its_schedule(tmp_path, settings, capsys):
    """And changes in words: what None stands for in the help, on and off."""
    run_of(settings, tmp_path / "run", 3)
    argv = [
        "--resume",
        str(tmp_path / "run"),
        "--steps",
        "6",
        "--micro-batch",
        "1",
        "--step-in-backward",
        "--batch",
        "1",
    ]
    argv += ["--clip", "0", "--decay", "linear", "--decay-steps", "2", "--min-lr", "1e-4"]
    assert main(argv) == 0
    out = capsys.readouterr().out
    assert (
        out.count("\nschedule   lr 0.002, warm-up 2 steps, linear decay to 0.0001 over the last 2; batch 1 row of 32")
        == 1
    )
    assert "changed    micro-batch: 1 from step 4 on; before: the whole batch\n" in out and "None" not in out
    assert "changed    step-in-backward: on from step 4 on; before: off\n" in out
    assert "<td>the whole batch</td><td>1</td>" in (tmp_path / "run" / "report.html").read_text()


def test_a_batch_ramp_may_change(tmp_path, settings):
    """It counts from the run's first step, also where it begins later; START equal to the batch ends it."""
    run_of(replace(settings, batch=4, batch_ramp="2:4"), tmp_path / "run", 2)
    trainer = Trainer.resume(tmp_path / "run", batch=8, batch_ramp="2:6")
    found = [(c["setting"], c["old"], c["new"]) for c in trainer.changes]
    assert found == [("batch", 4, 8), ("batch_ramp", "2:4", "2:6")]
    assert [len(rows_of(trainer)) for _ in range(5)] == [4, 5, 6, 7, 8]
    trainer = Trainer.resume(tmp_path / "run", batch_ramp="4:1")
    assert len(rows_of(trainer)) == 4 and trainer.progress.row == 8
    with pytest.raises(InputError, match="START must lie between 1 and batch 1"):
        Trainer.resume(tmp_path / "run", batch=1)


def test_a_resume_that_changes_nothing_records_nothing(tmp_path, settings):
    run_of(settings, tmp_path / "run", 1)
    trainer = Trainer.resume(tmp_path / "run", lr=settings.lr, data=settings.data)
    assert trainer.changes == trainer.progress.changes == [] and trainer.progress.data_folder == "data"


def test_other_data_is_read_from_its_beginning(tmp_path, settings, capsys):
    first = run_of(settings, tmp_path / "run", 2)
    (tmp_path / "other.txt").write_text("another text to learn, in one document\n" * 60)
    trainer = Trainer.resume(tmp_path / "run", data=tmp_path / "other.txt")
    trainer.progress.recent = [*trainer.progress.recent]
    assert trainer.progress.recent == [] and trainer.progress.sequences == 4
    assert rows_of(trainer, 2) == [0, 1, 2, 3] and trainer.progress.sequences == 8
    trainer.save()
    trainer.step()
    resumed = Trainer.resume(tmp_path / "run")  # the new data is that of the run
    assert rows_of(resumed) == [4, 5] and resumed.training.tokens < 2500
    assert all(map(torch.equal, trainer.model.parameters(), resumed.model.parameters()))
    back = Trainer.resume(first)  # and the old data is still there
    assert back.progress.row == 4 and rows_of(back) == [4, 5] and back.training.tokens > 2500
    assert main(["--resume", str(tmp_path / "run" / "checkpoints" / "step-000002"), "--steps", "3", "--data",
                 str(tmp_path / "other.txt"), "--lr", "1e-3"]) == 0  # fmt: skip
    shown = capsys.readouterr().out
    assert "changed    lr: 0.001 from step 3 on; before: 0.002\n" in shown and "other.txt" in shown


def test_validation_sets_may_change(tmp_path, settings):
    """They change no bit of the training; a name may stand for another text, and the run may go back to the first."""
    paths = [tmp_path / f"{i}.txt" for i in range(3)]
    for i, path in enumerate(paths):
        path.write_text("a tile of tokens, an expert or two " * (30 + i) + "x" * i)
    settings = replace(settings, val_data=(f"a={paths[0]}",))
    first = run_of(settings, tmp_path / "run", 2)
    shutil.copytree(tmp_path / "run", tmp_path / "other")
    plain = Trainer.resume(tmp_path / "run")
    expected = plain.evaluate(), [plain.step() for _ in range(2)]
    changed = Trainer.resume(tmp_path / "other", val_data=(f"a={paths[1]}", f"b={paths[2]}"), eval_rows=2)
    assert changed.evaluate().keys() == {"val_loss", "val_bpb", "val_loss/a", "val_bpb/a", "val_loss/b", "val_bpb/b"}
    assert changed.evaluate()["val_loss/a"] != expected[0]["val_loss/a"]
    losses = [changed.step() for _ in range(2)]
    assert [r["loss"] for r in losses] == [r["loss"] for r in expected[1]]
    assert {c["setting"] for c in changed.changes} == {"val_data", "eval_rows"}
    changed.save()
    for path in paths:
        path.unlink()  # the run has the tokens
    again = Trainer.resume(tmp_path / "other")
    assert again.evaluate() == changed.evaluate()
    none = Trainer.resume(tmp_path / "other", val_data=None)
    assert none.evaluate().keys() == {"val_loss", "val_bpb"}
    back = Trainer.resume(tmp_path / "other" / "checkpoints" / first.name)
    assert back.evaluate() == expected[0]


def test_what_decides_on_the_training_documents_changes_with_the_data_alone(tmp_path, settings, capsys):
    """holdout, the roles trained on, how text is read; the refusal says why."""
    run_of(settings, tmp_path / "run", 2)
    resume = ["--resume", str(tmp_path / "run")]
    for flag, value, why in (
        ("--holdout", "5", "it decides which documents are trained on: change it together with --data, or leave"),
        ("--train-on", "all", "chats are tokenised with it: change it together with --data"),
        ("--separator", "x", "texts are tokenised with it: change it together with --data"),
        ("--seq-len", "16", "rows of that length: leave --seq-len out"), ("--seed", "3", "the order of the data"),
        ("--optimizer", "muon", "other states"), ("--mtp", "0", "the run's weights: leave --mtp out"),
    ):  # fmt: skip
        assert why in one_line_error([*resume, flag, value], capsys), flag
    (tmp_path / "other.txt").write_text("\n\n".join(f"another text to learn, document {i}" * 9 for i in range(20)))
    trainer = Trainer.resume(tmp_path / "run", data=tmp_path / "other.txt", separator="\n\n", holdout=4, train_on="all")
    assert len(trainer.training) == 15 and len(trainer.held_out) == 5
    trainer.step()


def test_data_that_cannot_be_read_leaves_the_run_as_it_was(tmp_path, settings, capsys):
    run_of(settings, tmp_path / "run", 2)
    (tmp_path / "short.txt").write_text("short")
    error = one_line_error(["--resume", str(tmp_path / "run"), "--data", str(tmp_path / "short.txt")], capsys)
    assert "too small" in error and not (tmp_path / "run" / "data-000002").exists()
    assert Trainer.resume(tmp_path / "run").step()["step"] == 3


@pytest.mark.parametrize("change", [
    dict(data_start=9), dict(data_start=-1), dict(data_folder="../x"), dict(data_folder=1), dict(changes=[3]),
    dict(changes=[{"step": 1}]),
])  # fmt: skip
def test_a_bad_record_is_refused(tmp_path, settings, change):
    checkpoint = run_of(settings, tmp_path / "run", 1)
    state = json.loads((checkpoint / "state.json").read_text())
    assert ckpt.is_progress(state) and not ckpt.is_progress(state | change)
    (checkpoint / "state.json").write_text(json.dumps(state | change))
    with pytest.raises(InputError, match="a value has another type"):
        Trainer.resume(tmp_path / "run")


def test_new_data_that_fails_leaves_that_of_later_checkpoints(tmp_path, settings, text):
    start, run = run_of(settings, tmp_path / "run", 2), tmp_path / "run"
    shutil.copy(text, tmp_path / "other.jsonl")
    trainer = Trainer.resume(start, data=str(tmp_path / "other.jsonl"))
    trainer.step()
    trainer.save()
    del trainer
    (tmp_path / "other.jsonl").unlink()
    (tmp_path / "empty.txt").touch()
    before = (run / "settings.json").read_bytes()
    with pytest.raises(InputError, match="empty"):
        Trainer.resume(start, data=str(tmp_path / "empty.txt"))
    assert (run / "settings.json").read_bytes() == before
    assert Trainer.resume(run).progress.step == 3
    again = Trainer.resume(start, data=str(text.parent))  # the superseded checkpoint keeps its data
    assert again.progress.data_folder == "data-000003" and (run / "data-000002/tokens.bin").is_file()


def test_a_run_that_begins_again_has_the_data_that_it_is_given(tmp_path, settings):
    run = tmp_path / "run"
    first = Trainer(settings, run).training.tokens
    assert Trainer(settings, run, restart=True).training.tokens == first
    (tmp_path / "other.txt").write_text("other words\n" * 200)
    assert Trainer(replace(settings, data=(str(tmp_path / "other.txt"),)), run, restart=True).training.tokens < 2401


def test_a_weight_without_a_path_is_no_data(tmp_path, settings):
    with pytest.raises(InputError, match="no data at =1"):
        Trainer(replace(settings, data=("=1",)), tmp_path / "run")
