"""The training command: the loss falls, runs resume bit for bit, experts are balanced, bad steps are skipped."""

# ruff: noqa: F811 (fixtures are imported)
import json
import os
import re
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from ling_kernels.model import Ling, load_model, save_model
from ling_kernels.tokenizer import load_tokenizer
from ling_kernels.train import checkpoint as ckpt
from ling_kernels.train import sampling
from ling_kernels.train import trainer as steps
from ling_kernels.train.__main__ import main
from ling_kernels.train.data import Packed, open_tokens
from ling_kernels.train.data.tokenise import write_tokens
from ling_kernels.train.optimizer import adamw
from ling_kernels.train.prepare import device as prepare
from ling_kernels.train.prepare.checks import check
from ling_kernels.train.prepare.models import model_config
from ling_kernels.train.report import report
from ling_kernels.train.settings import RECIPES, Settings, settings_of
from tests.training import flags, one_line_error, small, text, tiniest, uninterrupted  # noqa: F401

SPEED = {"tokens_per_s", "mfu"}  # may differ between equal runs


def metrics_of(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def same_training(a, b):
    """Assert that two runs have equal metrics, except for their speed, and equal final checkpoints, to the bit."""
    for one, two in zip(metrics_of(a), metrics_of(b), strict=True):
        assert {k: v for k, v in one.items() if k not in SPEED} == {k: v for k, v in two.items() if k not in SPEED}
    last = [ckpt.list_checkpoints(run)[-1] for run in (a, b)]
    assert last[0].name == last[1].name
    for name in ("model.safetensors", "optimizer.safetensors", "rng.safetensors"):
        one, two = (load_file(c / name) for c in last)
        assert one.keys() == two.keys() and all(torch.equal(one[k], two[k]) for k in one), name
    one, two = ([json.loads(line) for line in (run / "expert_load.jsonl").read_text().splitlines()] for run in (a, b))
    assert np.array_equal(*(np.sum([row["counts"] for row in rows], axis=0) for rows in (one, two)))


def test_loss_falls_and_everything_is_written(tmp_path, small, text, capsys):
    run = tmp_path / "run"
    argv = f"--model {small} --data {text} --out {run} --steps 80 --seq-len 64 --batch 8 --warmup 5 --lr 1e-2"
    assert main([*argv.split(), "--eval-every", "40", "--sample-tokens", "40", "--threads", "1"]) == 0
    out = capsys.readouterr().out
    metrics = metrics_of(run)
    assert [m["step"] for m in metrics] == list(range(1, 81))
    assert metrics[-1]["tokens"] == 80 * 8 * 64
    assert metrics[0]["main_loss"] > 5 and metrics[-1]["main_loss"] < 2
    assert metrics[-1]["mtp_loss"] < metrics[0]["mtp_loss"] - 1
    assert [m["step"] for m in metrics if "val_loss" in m] == [40, 80] and metrics[-1]["val_loss"] < 2
    m = metrics[7]
    assert m["loss"] == pytest.approx(m["main_loss"] + 0.1 * m["mtp_loss"] + m["z_loss"], rel=1e-6)
    assert set(m) >= {"lr", "grad_norm", "tokens_per_s", "mfu", "load_violation_max", "load_violation_mean"}
    assert load_model(run / "model").config.hidden_size == 32
    assert load_tokenizer(run / "model").vocab_size == load_tokenizer(None).vocab_size
    for shown in ("checkpoints/step-000080", "model", "loss.png", "expert_load.png", "ling_kernels.generate"):
        assert str(run / shown) in out or shown in out
    assert "A sample that continues" in out and "validation loss" in out
    if (run / "loss.png").exists():
        assert all((run / p).read_bytes()[:4] == b"\x89PNG" for p in ("loss.png", "expert_load.png"))
    counts = [json.loads(line) for line in (run / "expert_load.jsonl").read_text().splitlines()]
    assert [(c["first"], c["step"]) for c in counts] == [(1, 40), (41, 80)]
    assert np.sum(counts[0]["counts"]) == 2 * 2 * 40 * 8 * 64  # MoE layers (with MTP's), experts a token, tokens


def start(argv):
    return subprocess.Popen([sys.executable, "-m", "ling_kernels.train", *argv], stdout=subprocess.PIPE, text=True)


def test_an_interrupted_run_resumes_bit_for_bit(tmp_path, flags, uninterrupted, capsys):
    run = tmp_path / "run"
    process = start([*flags, "--out", str(run), "--steps", "14", "--save-every", "4"])
    for line in process.stdout:
        if line.startswith("step  6/14"):
            process.send_signal(signal.SIGTERM)
            break
    output = process.stdout.read()
    assert process.wait() == 75
    stopped = len(metrics_of(run))
    assert 6 <= stopped < 14, "the signal came too late for this test"
    assert (
        f"stopped by SIGTERM after step {stopped}" in output
        and f"--resume {os.path.relpath(run)}" in output
        or str(run) in output
    )
    assert ckpt.list_checkpoints(run)[-1].name == f"step-{stopped:06d}"
    assert main(["--resume", str(run), "--threads", "1"]) == 0
    same_training(run, uninterrupted)


def test_a_killed_run_resumes_bit_for_bit_from_its_last_checkpoint(tmp_path, flags, uninterrupted):
    run = tmp_path / "run"
    process = start([*flags, "--out", str(run), "--steps", "14", "--save-every", "4"])
    for line in process.stdout:
        if line.startswith("step 10/14"):
            process.kill()
            break
    process.stdout.read()
    process.wait()
    with open(run / "metrics.jsonl", "a") as file:
        file.write('{"step": 11, "lo')  # a line that the kill cut off
    assert ckpt.list_checkpoints(run)[-1].name in ("step-000004", "step-000008")  # the thread may not be done with 8
    assert main(["--resume", "auto", "--out", str(run)]) == 0
    same_training(run, uninterrupted)


def test_going_back_to_an_earlier_checkpoint_loses_nothing(tmp_path, flags, uninterrupted, capsys):
    run = tmp_path / "run"
    assert main([*flags, "--out", str(run), "--steps", "8", "--save-every", "4"]) == 0
    assert main(["--resume", str(run / "checkpoints" / "step-000004"), "--steps", "6"]) == 0
    assert {p.name for p in (run / "checkpoints").iterdir()} == {
        "step-000004", "step-000006", "superseded-step-000008",
    }  # fmt: skip
    assert [m["step"] for m in metrics_of(run)] == list(range(1, 7))
    assert "superseded-step-000008" in capsys.readouterr().out
    assert main(["--resume", str(run), "--steps", "14"]) == 0  # a finished run continues with more steps
    last = [load_file(ckpt.list_checkpoints(r)[-1] / "model.safetensors") for r in (run, uninterrupted)]
    assert all(torch.equal(last[0][k], last[1][k]) for k in last[0])


def test_a_second_signal_stops_at_once(tmp_path, flags):
    run = tmp_path / "run"
    process = start([*flags, "--out", str(run), "--steps", "100000"])
    for line in process.stdout:
        if line.startswith("step      2/"):
            break
    os.kill(process.pid, signal.SIGSTOP)  # both signals arrive before it can act on the first
    process.send_signal(signal.SIGINT)
    process.send_signal(signal.SIGTERM)
    os.kill(process.pid, signal.SIGCONT)
    process.stdout.read()
    assert process.wait() in (-signal.SIGTERM, -signal.SIGINT, 75)


def skewed(folder):
    """A model in which most tokens choose the same experts: all embeddings and three experts share a direction."""
    model = Ling(tiniest())
    model.init_weights(torch.Generator().manual_seed(0))
    common = torch.randn(32, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        model.word_embeddings.weight += 0.02 * common
        for router in model.routers():
            router.weight *= 10
            router.weight[[0, 3, 4]] += 0.2 * common
    save_model(model, folder, dtype=torch.float32)
    return folder


def test_balancing_lowers_the_load_violation(tmp_path, text):
    model = skewed(tmp_path / "model")
    argv = f"--model {model} --data {text} --steps 60 --seq-len 48 --batch 8 --lr 1e-12 --eval-rows 1 --sample-tokens 0"
    first, last = {}, {}
    for rate in ("0", "0.02"):
        run = tmp_path / f"rate{rate}"
        assert main([*argv.split(), "--out", str(run), "--balance-rate", rate, "--threads", "1"]) == 0
        violation = [m["load_violation_mean"] for m in metrics_of(run)]
        first[rate], last[rate] = violation[0], np.mean(violation[-5:])
    assert first["0"] == first["0.02"] > 1
    assert last["0"] > 0.9 * first["0"] and last["0.02"] < 0.5 * first["0.02"]
    bias = load_file(tmp_path / "rate0.02" / "model" / "model.safetensors")["model.layers.1.mlp.gate.expert_bias"]
    assert bias[[0, 3]].max() < 0 and abs(bias.mean()) < 1e-6


def step_inputs(text_file, folder, **changes):
    """Model, optimizer, rows, settings and progress for train_step. Rows differ in their number of targets, so that
    wrong weights of losses are seen."""
    tokenizer = load_tokenizer(None)
    lines = [json.loads(line)["text"] for line in text_file.read_text().splitlines()]
    write_tokens([[line[:3] if i % 5 else line[:40]] for i, line in enumerate(lines)], tokenizer, folder / "t.bin")
    docs = open_tokens([folder / "t.bin"], 320, tokenizer.eos_id)
    model = Ling(tiniest())
    model.init_weights(torch.Generator().manual_seed(0))
    settings = Settings(**(dict(seq_len=48, batch=8, lr=1e-2, warmup=0, z_loss=0.1) | changes))
    optimizer = adamw(model.train(), settings.lr, settings.weight_decay)
    return model, optimizer, Packed(docs, settings.seq_len, 0), settings, steps.Progress()


def test_accumulation_is_exact(tmp_path, text):
    results = {}
    for micro in (8, 4, 3, 1):
        model, optimizer, packed, settings, progress = step_inputs(text, tmp_path, micro_batch=micro)
        targets = [packed.batch([r]).targets() for r in range(8)]
        assert len(set(targets)) > 3
        with torch.no_grad():  # else all losses are near ln 320, and weighting them matters little
            model.lm_head.weight *= 30
        losses = steps.accumulate_gradients(model, packed, 0, 8, settings, torch.device("cpu"), torch.float32)
        results[micro] = losses, torch.cat([p.grad.flatten() for p in model.parameters()])
    for micro in (4, 3, 1):
        torch.testing.assert_close(results[micro][0], results[8][0], rtol=1e-6, atol=0)
        error = (results[micro][1] - results[8][1]).norm() / results[8][1].norm()
        assert error < 1e-6, (micro, float(error))


def test_the_ramp_moves_the_position_in_the_stream(tmp_path, text):
    model, optimizer, packed, settings, progress = step_inputs(text, tmp_path, batch_ramp="2:3", micro_batch=2)
    firsts, batch = [], packed.batch
    packed.batch = lambda rows: (firsts.extend(rows), batch(rows))[1]
    for _ in range(5):
        steps.train_step(model, optimizer, packed, settings, progress, torch.float32)
    assert firsts == list(range(2 + 4 + 6 + 8 + 8)) and progress.sequences == 28 and progress.tokens == 28 * 48


def snapshot(model, optimizer):
    moments = [m for p in optimizer.state.values() for m in p.values()]
    return [t.clone() for t in [*model.state_dict().values(), *moments]]


@pytest.mark.parametrize("poison", ["loss", "gradient"])
def test_a_step_that_is_not_finite_changes_nothing(tmp_path, text, monkeypatch, poison):
    model, optimizer, packed, settings, progress = step_inputs(text, tmp_path)
    step = lambda: steps.train_step(model, optimizer, packed, settings, progress, torch.float32)  # noqa: E731
    step()
    genuine = steps.accumulate_gradients

    def poisoned(*args):
        losses = genuine(*args)
        if poison == "loss":
            return losses * torch.nan
        model.norm.weight.grad[0] = torch.inf
        return losses

    before = snapshot(model, optimizer)
    monkeypatch.setattr(steps, "accumulate_gradients", poisoned)
    record, _ = step()
    assert all(map(torch.equal, before, snapshot(model, optimizer)))
    assert record["skipped"] == progress.skipped == progress.bad == 1 and progress.step == 2
    assert not model.expert_counts().any()  # the next step counts anew
    monkeypatch.setattr(steps, "accumulate_gradients", genuine)
    record, _ = step()
    assert "skipped" not in record and progress.bad == 0 and progress.skipped == 1 and progress.sequences == 24
    assert not all(map(torch.equal, before, snapshot(model, optimizer)))


def test_a_run_stops_after_bad_steps_in_a_row(tmp_path, flags, monkeypatch, capsys):
    genuine, calls = steps.accumulate_gradients, []

    def poisoned(*args):
        calls.append(1)
        return genuine(*args) * (torch.nan if len(calls) == 2 or len(calls) > 4 else 1)

    monkeypatch.setattr(steps, "accumulate_gradients", poisoned)
    argv = [*flags, "--out", str(tmp_path / "run"), "--steps", "50", "--save-every", "3", "--max-bad-steps", "3"]
    assert main(argv) == 1
    out, err = capsys.readouterr()
    assert err.count("\n") == 1 and "3 steps up to 7" in err and "step-000006" in err
    assert "step 2 skipped" in out and "step 7 skipped" in out and "step 3 skipped" not in out
    metrics = metrics_of(tmp_path / "run")  # strict JSON: a NaN is null
    assert [m["step"] for m in metrics if m["loss"] is None] == [2, 5, 6, 7] and metrics[-1]["skipped"] == 4


@pytest.mark.parametrize("damage", ["truncated", "changed", "missing", "state"])
def test_a_damaged_checkpoint_is_named_and_the_one_before_offered(tmp_path, flags, uninterrupted, damage, capsys):
    assert main([*flags, "--out", str(tmp_path), "--steps", "8", "--save-every", "4"]) == 0
    newest = tmp_path / "checkpoints" / "step-000008"
    path = newest / ("state.json" if damage == "state" else "optimizer.safetensors")
    content = bytearray(path.read_bytes())
    if damage == "missing":
        path.unlink()
    elif damage == "changed":
        content[-1] ^= 1
        path.write_bytes(content)
    else:
        path.write_bytes(content[: len(content) // 2])
    capsys.readouterr()
    error = one_line_error(["--resume", str(tmp_path)], capsys)
    assert str(newest) in error and path.name in error
    offer = re.search(r"--resume (\S+)", error)[1]
    assert offer == str(tmp_path / "checkpoints" / "step-000004")
    assert main(["--resume", offer, "--steps", "14"]) == 0
    last = [load_file(ckpt.list_checkpoints(r)[-1] / "model.safetensors") for r in (tmp_path, uninterrupted)]
    assert all(torch.equal(last[0][k], last[1][k]) for k in last[0])


def test_a_terminal_gets_a_progress_bar(tmp_path, flags, monkeypatch, capsys):
    pytest.importorskip("tqdm")
    monkeypatch.setattr(report.sys.stderr, "isatty", lambda: True, raising=False)
    assert main([*flags, "--out", str(tmp_path), "--steps", "3"]) == 0
    out, err = capsys.readouterr()
    assert "3/3" in err and "MFU" in err and "tok/s" in err and "step 1/3" not in out


def test_duration():
    assert [report.duration(s) for s in (0, 59.9, 3661, 86399)] == ["00:00:00", "00:00:59", "01:01:01", "23:59:59"]
    assert report.duration(100_000 * 10) == "11d 13:46:40" and report.duration(86400) == "1d 00:00:00"


def test_sample_without_held_out_text(tmp_path, small, text):
    """Documents of only an end token are skipped; where there are no others, the end token is the prompt."""
    tokenizer, settings = load_tokenizer(None), Settings(sample_tokens=5)
    model = load_model(small, dtype=torch.float32)
    end = tokenizer.eos_id
    for ids, prompt in (([end, end, 65, 66, end], "AB"), ([end, end], "")):
        np.array(ids, np.uint16).tofile(tmp_path / "t.bin")
        (tmp_path / "t.json").write_text(json.dumps(dict(dtype="uint16", eos_id=end, vocab_size=320)))
        docs = open_tokens([tmp_path / "t.bin"], 320, end)
        start, continuation = sampling.sample(model, tokenizer, docs, settings)
        assert start == prompt and isinstance(continuation, str)


@pytest.mark.parametrize("name", RECIPES)
def test_recipes_are_settings(name):
    recipe = RECIPES[name]
    assert recipe.keys() - {"default_for"} == {"about", "settings"} and recipe["about"]
    settings = settings_of(dict(model=recipe["default_for"]) if "default_for" in recipe else dict(preset=name))
    assert {k: getattr(settings, k) for k in recipe["settings"]} == recipe["settings"]
    check(settings, model_config(settings)[0])


def test_per_step_means_kept(capsys):
    """The old name of --fp8-transposed kept, as a flag and in the settings of an old run."""
    assert settings_of(dict(fp8_transposed="per_step")).fp8_transposed == "kept"
    assert capsys.readouterr().err.count("deprecated") == 1
    assert Settings(fp8_transposed="per_step").fp8_transposed == "kept"
    assert settings_of({}, dict(fp8_transposed="per_step", steps=3)) == Settings(fp8_transposed="kept", steps=3)


def test_peak_of_known_gpus(monkeypatch):
    for name, peak in (("NVIDIA H200", 989.4e12), ("NVIDIA H20", 148e12), ("NVIDIA H100 80GB HBM3", 989.4e12),
                       ("NVIDIA H20-3e", 148e12), ("NVIDIA H100 PCIe", 756e12)):  # fmt: skip
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda _, name=name: name)
        assert prepare.peak_flops(torch.device("cuda"), torch.bfloat16)[0] == peak
    peak, source = prepare.peak_flops(torch.device("cpu"), torch.float32)
    assert 1e8 < peak < 1e15 and "measured" in source


def test_weight_decay_spares_vectors():
    model = Ling(tiniest())
    decayed, spared = adamw(model, 1e-3, 0.1).param_groups
    assert decayed["weight_decay"] == 0.1 and spared["weight_decay"] == 0
    assert decayed["betas"] == (0.9, 0.95) and decayed["eps"] == 1e-8
    norms = {id(p) for name, p in model.named_parameters() if "norm" in name}
    assert norms == {id(p) for p in spared["params"]}
    assert len(decayed["params"]) + len(norms) == len(list(model.parameters()))
