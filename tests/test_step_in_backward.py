"""Steps taken in the backward: the bits of the ordinary step, fewer gradients, and gradients that are not finite."""

# ruff: noqa: F811 (fixtures are imported)
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

from ling_kernels.model import Ling
from ling_kernels.plan.memory import plan_training
from ling_kernels.train.__main__ import main
from ling_kernels.train.optimizer import StepInBackward, make_optimizer, to_masters
from ling_kernels.train.settings import Settings
from ling_kernels.train.trainer import apply_fp8_and_recompute
from tests.test_fp8_training import WHOLE, metrics_of, training, whole  # noqa: F401
from tests.training import one_line_error, text  # noqa: F401

LIGHT = "--precision fp8 --fp8-weights kept --optimizer adamw8bit --master bf16"


def saved(run, step):
    folder = run / "checkpoints" / f"step-{step:06d}"
    return {n + k: t for n in ("model", "optimizer") for k, t in load_file(folder / f"{n}.safetensors").items()}


@pytest.mark.parametrize("flags", [LIGHT, "--precision bf16 --recompute full", "--optimizer muon --master bf16"
                                   " --precision bf16"])  # fmt: skip
def test_the_same_bits_as_the_ordinary_step(tmp_path, whole, text, flags):
    """Weights, moments, losses and norms; also where a run resumes without --step-in-backward."""
    runs = [tmp_path / "ordinary", tmp_path / "in_backward"]
    flags += " --steps 4 --save-every 2 --clip 0 --seq-len 32 --batch 2 --eval-rows 1 --sample-tokens 0"
    metrics = [training(whole, text, run, flags, more) for run, more in zip(runs, ("", "--step-in-backward"))]  # noqa: B905
    assert metrics[0][-1]["loss"] < metrics[0][0]["loss"]
    for key in ("loss", "grad_norm", "val_loss"):
        assert [m.get(key) for m in metrics[0]] == [m.get(key) for m in metrics[1]]
    want = saved(runs[0], 4)
    assert all(torch.equal(want[k], v) for k, v in saved(runs[1], 4).items())
    half = runs[1] / "checkpoints" / "step-000002"
    assert main(["--resume", str(half), "--no-step-in-backward", "--threads", "1"]) == 0
    assert all(torch.equal(want[k], v) for k, v in saved(runs[1], 4).items())
    assert metrics_of(runs[1])[-1]["loss"] == metrics[0][-1]["loss"]


def trained(s, poison=None):
    """A model after one step in the backward, its weights before, and the peak bytes of gradients."""
    model = Ling(WHOLE)
    model.init_weights(torch.Generator().manual_seed(0))
    to_masters(model, s.master)
    apply_fp8_and_recompute(model.train(), s)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    peak = 0

    def count(p):
        nonlocal peak
        peak = max(peak, sum(q.grad.nbytes for q in model.parameters() if q.grad is not None))

    for p in model.parameters():
        p.register_post_accumulate_grad_hook(count)
    in_backward = StepInBackward(model, make_optimizer(model, s.optimizer, 1e-2, 0.1))
    if poison and poison != "loss":
        model.get_parameter(poison).register_hook(lambda g: torch.full_like(g, torch.inf))
    ids = torch.arange(2 * s.seq_len).view(2, -1)
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(ids, labels=ids, logits=False).loss
    in_backward.begin(1e-2, loss.isfinite() & (poison != "loss"))
    if poison != "loss":
        loss.backward()
    return model, before, peak, in_backward


@pytest.mark.parametrize("kind, master", [("adamw", "fp32"), ("adamw8bit", "bf16"), ("muon", "bf16")])
def test_a_gradient_that_is_not_finite_stops_the_step(kind, master):
    s = replace(Settings(), seq_len=20, precision="bf16", optimizer=kind, master=master)
    model, before, _, in_backward = trained(s, "layers.1.attention.dense.weight")
    same = {n for n, p in model.named_parameters() if torch.equal(p, before[n])}
    assert "lm_head.weight" not in same and "layers.1.mlp.experts.down" not in same
    assert {"layers.1.attention.dense.weight", "word_embeddings.weight", "layers.0.mlp.down.weight"} <= same
    assert not in_backward.norm().isfinite() and all(p.grad is None for p in model.parameters())
    assert all(torch.isfinite(t).all() for state in in_backward.optimizer.state.values() for t in state.values())


def test_hooks_are_removed():
    """By garbage collection and by remove(); the next one on the same model works."""
    model = Ling(WHOLE)
    model.init_weights(torch.Generator().manual_seed(0))
    ids = torch.arange(20)[None]

    def backward():
        model.zero_grad()
        model(ids, labels=ids, logits=False).loss.backward()
        return sum(p.grad is not None for p in model.parameters())

    total = backward()
    for way in ("collected", "removed"):
        in_backward = StepInBackward(model, make_optimizer(model, "adamw", 1e-2, 0.1))
        in_backward.begin(1e-2, torch.tensor(True))
        assert backward() == 0 and in_backward.norm() > 0, way
        if way == "removed":
            in_backward.remove()
        else:
            del in_backward
        assert backward() == total > 30, way


def test_a_loss_that_is_not_finite_changes_nothing():
    model, before, _, in_backward = trained(replace(Settings(), seq_len=20, optimizer="adamw8bit"), "loss")
    for p in model.parameters():
        p.grad = torch.ones_like(p)
        in_backward.on_gradient(p)
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())


@pytest.mark.parametrize("precision", ["bf16", "fp8"])
def test_gradients_in_the_plan(precision):
    """One parameter has its gradient at a time; an expert's two weights get their gradients together."""
    s = replace(Settings(), batch=2, seq_len=64, precision=precision, optimizer="adamw8bit", clip=0)
    ordinary, light = plan_training(WHOLE, s), plan_training(WHOLE, replace(s, step_in_backward=True))
    _, _, peak, _ = trained(replace(s, step_in_backward=True))
    model = Ling(WHOLE)
    assert peak == max(p.nbytes for p in model.parameters())
    together = sum(p.nbytes for p in model.layers[1].mlp.experts.parameters())
    assert light.peak_bytes["gradients"] <= together < 0.5 * ordinary.peak_bytes["gradients"]
    assert light.kept_bytes == ordinary.kept_bytes and light.peak < ordinary.peak
    assert light.peak_bytes["optimizer"] == ordinary.peak_bytes["optimizer"]


@pytest.mark.parametrize("flags, says", [
    ("--batch 4 --micro-batch 2 --clip 0", "--micro-batch 2"), ("--batch 4", "--clip 1.0"),
    ("--clip 0 --spike-norm 3", "--spike-norm 3"), ("--clip -1", "--clip"), ("--clip nan", "--clip"),
])  # fmt: skip
def test_contradicting_flags(flags, says, capsys, tmp_path):
    argv = ["--step-in-backward", "--out", str(tmp_path / "run"), *flags.split()]
    assert says in one_line_error(argv, capsys) and not (tmp_path / "run").exists()
    if "micro" in says:
        error = one_line_error(["--plan", "--step-in-backward", "--clip", "0", "--dp", "2", "--batch", "8"], capsys)
        assert "for one process" in error


def test_muon_keeps_its_master(tmp_path, whole, text, capsys):
    training(whole, text, tmp_path / "run", "--steps 1 --optimizer muon --master bf16 --precision bf16 --eval-every 0")
    argv = ["--resume", str(tmp_path / "run"), "--steps", "2", "--master", "fp32"]
    assert "muon keeps other states" in one_line_error(argv, capsys)
