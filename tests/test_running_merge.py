"""The running merge of the last steps: the bits of merging stored checkpoints, resumed runs, weights, mistakes."""

# ruff: noqa: F811 (fixtures are imported)

import json
import shutil
from dataclasses import replace

import pytest
import torch

from ling_kernels.errors import InputError
from ling_kernels.model import Ling, load_model, named_views, save_model
from ling_kernels.tokenizer import load_tokenizer
from ling_kernels.train import Settings, Trainer, cli
from ling_kernels.train.__main__ import main
from ling_kernels.train.merge import decay_weights, merge, named_weights
from ling_kernels.train.prepare import device
from ling_kernels.train.running_merge import RunningMerge, planned
from tests.cluster import run_jobs
from tests.training import one_line_error, small, text, tiniest  # noqa: F401

PLAN = dict(merge_last=3, merge_every=3, merge_weights="cosine")


@pytest.fixture(autouse=True, scope="module")
def quick_start():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(device, "measured_flops", lambda *_: 1e10)
        patch.setattr(cli, "draw", lambda *_: [])  # plots take seconds
        yield


def settings(small, text, **more):
    return Settings(**dict(
        model=str(small), data=(str(text),), seq_len=32, batch=2, lr=3e-3, warmup=2, steps=9, eval_rows=2, threads=1,
        keep=0, **PLAN,
    ) | more)  # fmt: skip


def finish(trainer):
    while trainer.progress.step < trainer.settings.steps:
        trainer.step()
        if trainer.progress.step % 3 == 0:
            trainer.save()
    return trainer


@pytest.fixture(scope="module")
def run(small, text, tmp_path_factory):
    return finish(Trainer(settings(small, text), tmp_path_factory.mktemp("merging") / "run"))


def weights_of(folder, dtype=torch.float32):
    return {key: view.detach() for key, view in named_views(load_model(folder, dtype))}


def test_it_has_the_bits_of_merging_stored_checkpoints(run, tmp_path):
    assert planned(run.settings) == dict(zip((3, 6, 9), named_weights("cosine", 3), strict=True))
    stored = [run.folder / "checkpoints" / f"step-{step:06d}" for step in (3, 6, 9)]
    for dtype in ("fp32", "bf16"):
        merge(stored, named_weights("cosine", 3), tmp_path / f"stored-{dtype}", dtype)
        kind = dict(fp32=torch.float32, bf16=torch.bfloat16)[dtype]
        run.merge.write(tmp_path / f"running-{dtype}", run.shares, run.tokenizer, kind)
        a, b = (weights_of(tmp_path / f"{name}-{dtype}") for name in ("stored", "running"))
        assert a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)
    last = weights_of(stored[-1])
    assert not torch.equal(a["lm_head.weight"], last["lm_head.weight"])


def test_a_resumed_run_merges_the_same(run, small, text, tmp_path):
    for stop in (6, 7):  # after one that is merged, between two
        folder = tmp_path / f"run-{stop}"
        trainer = Trainer(settings(small, text), folder)
        for _ in range(stop):
            trainer.step()
        trainer.save()
        trainer.lock.close()
        again = finish(Trainer.resume(folder))
        assert again.merge.taken == run.merge.taken and again.merge.complete
        assert all(torch.equal(a.tensor, b.tensor) for a, b in zip(again.merge.total, run.merge.total, strict=True))


def test_a_save_in_a_thread_holds_the_sum_of_its_step(small, text, tmp_path):
    trainer = Trainer(settings(small, text), tmp_path / "run")
    for _ in range(3):
        trainer.step()
    before = [piece.tensor for piece in trainer.merge.total]
    copies = [t.clone() for t in before]
    trainer.save(wait=False)
    for _ in range(3):
        trainer.step()
    assert all(map(torch.equal, before, copies))  # the thread's tensors are not changed
    trainer.writer.wait()
    state = json.loads((tmp_path / "run/checkpoints/step-000003/state.json").read_text())
    assert state["merged"] == trainer.merge.taken[:1] and "merge.safetensors" in state["files"]


JOBS = {
    "dp": "", "experts and vocabulary": "--ep 2 --vocab-parallel 2", "tensor parallel": "--tp 2",
    "a pipeline": "--pp 2 --micro-batch 1",
}  # fmt: skip


@pytest.fixture(scope="module")
def several(text, tmp_path_factory):
    """Runs of two processes, and one of one process that two resume in the middle of the merge."""
    folder = tmp_path_factory.mktemp("several")
    model = Ling(replace(tiniest(), num_attention_heads=4, num_key_value_heads=2))
    model.init_weights(torch.Generator().manual_seed(0))
    save_model(model, folder / "model", dtype=torch.float32)
    plan = "--merge-last 3 --merge-every 1 --merge-weights cosine --steps 3 --save-every 1 --keep 0"
    flags = f"--model {folder / 'model'} --data {text} --seq-len 32 --batch 4 --lr 3e-3 --warmup 1 --eval-rows 2"
    run = [*flags.split(), *plan.split(), "--threads", "1", "--sample-tokens", "0"]
    more = dict(batch=4, steps=3, merge_every=1, warmup=1, save_every=1, sample_tokens=0)
    alone = Trainer(settings(folder / "model", text, **more), folder / "resumed")
    for _ in range(2):
        alone.step()
        alone.save()
    alone.lock.close()
    jobs = [(name, [[*run, *more.split(), "--out", str(folder / name)]] * 2) for name, more in JOBS.items()]
    jobs.append(("resumed", [["--resume", str(folder / "resumed"), "--ep", "2", "--vocab-parallel", "2"]] * 2))
    run_jobs(jobs, folder, 2)
    return folder


@pytest.mark.parametrize("name", [*JOBS, "resumed"])
def test_two_processes_merge_the_bits_of_their_stored_checkpoints(several, name, tmp_path):
    results = [json.loads((several / f"{name}.{rank}").read_text()) for rank in range(2)]
    assert not any(code for code, _, _ in results) and "3 steps" in results[0][1], results
    run = several / name
    stored = [run / "checkpoints" / f"step-00000{step}" for step in (1, 2, 3)]
    merge(stored, named_weights("cosine", 3), tmp_path / "stored", "bf16")
    a, b, last = (weights_of(folder) for folder in (tmp_path / "stored", run / "merged", run / "model"))
    assert a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)
    assert sum(not torch.equal(b[key], last[key]) for key in b) > len(b) / 2
    assert load_tokenizer(run / "merged").vocab_size == load_tokenizer(None).vocab_size


def test_other_settings_begin_another_merge(run, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(run.folder, folder, ignore=shutil.ignore_patterns(".lock"))
    none = Trainer.resume(folder / "checkpoints/step-000006", merge_last=0)  # its merge_every has no effect any more
    none.lock.close()
    longer = Trainer.resume(folder / "checkpoints/step-000006", steps=15)
    assert "begins anew" in longer.notes[-1] and list(longer.merge.plan) == [9, 12, 15] and not longer.merge.taken
    longer.lock.close()
    late = Trainer.resume(folder / "checkpoints/step-000006", steps=12, merge_every=4)
    assert "it would begin with step 4, and step 6 is done" in late.notes[-1]
    for _ in range(2):
        late.step()
    assert not late.merge.taken and not late.merge.complete
    with pytest.raises(InputError, match="0 of 3 weights are merged so far"):
        late.merge.write(tmp_path / "none", late.shares, late.tokenizer)
    late.lock.close()
    none = Trainer.resume(folder / "checkpoints/step-000006", merge_last=0)
    assert not none.merge.plan and not any("merge" in note for note in none.notes)


def test_a_merge_of_before_is_named(small, text, tmp_path, capsys):
    """Weights of a merge that a resumed run does not make again are neither removed nor taken for its own."""
    plan = "--merge-last 2 --merge-every 1 --steps 2 --sample-tokens 0 --threads 1"
    data = f"--model {small} --data {text} --seq-len 32 --batch 2 --warmup 1 --eval-rows 2 --out {tmp_path / 'run'}"
    assert main([*data.split(), *plan.split()]) == 0
    line, folder = "is older than this model", tmp_path / "run" / "merged"
    assert "2 steps" in (out := capsys.readouterr().out) and line not in out
    before = weights_of(folder)
    for flags, stale in (("--steps 4", False), ("--steps 6 --merge-last 0", True), ("--merge-last 3 --steps 7", True)):
        assert main(["--resume", str(tmp_path / "run"), *flags.split()]) == 0
        assert (line in capsys.readouterr().out) == stale, flags
        after = weights_of(folder)
        assert all(torch.equal(before[key], after[key]) for key in before) == stale, flags
        before = after


def test_an_old_checkpoint_has_no_merge():
    merging = RunningMerge(Settings(steps=9, **PLAN))
    assert merging.restore("unused", [], 2, None) is None and merging.due(3) and not merging.due(6)


@pytest.mark.parametrize("x", [0.1, 0.5])
def test_a_moving_average(x):
    """ema:X has the weights of the recursion, and of a decay of the updates."""
    path = torch.randn(6, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    average = path[0]
    for t in path[1:]:
        average = (1 - x) * average + x * t
    c = named_weights(f"ema:{x}", 6)
    torch.testing.assert_close(torch.tensor(c, dtype=torch.float64) @ path, average)
    torch.testing.assert_close(c, decay_weights([sum(c[i:]) for i in range(1, 6)]))


def test_weights_by_name():
    assert named_weights("mean", 4) == named_weights("linear", 4) == pytest.approx([0.25] * 4)
    assert named_weights("0.2,0.3,0.5", 3) == [0.2, 0.3, 0.5]
    for name, number in (("ema", 3), ("ema:1", 3), ("ema:x", 3), ("half", 3), ("0.5,0.6", 2), ("0.5,0.5", 3)):
        with pytest.raises(InputError, match="it must be mean|add up to|checkpoints and 2 weights"):
            named_weights(name, number)


def test_mistakes(small, text, tmp_path, capsys):
    for flags, message in {
        "--merge-last 5 --steps 20": "begins before the first of --steps 20",
        "--merge-last 2 --merge-weights sum": "it must be mean",
        "--merge-last 2 --merge-weights 0.7,0.7": "add up to 1.4",
        "--merge-last 2 --merge-every 0": "it must be at least 1",
        "--merge-weights 1-sqrt": "--merge-weights 1-sqrt needs --merge-last",
        "--merge-every 5": "--merge-every 5 needs --merge-last",
    }.items():
        argv = ["--data", str(text), *flags.split(), "--out", str(tmp_path / "run")]
        assert message in one_line_error(argv, capsys), flags
