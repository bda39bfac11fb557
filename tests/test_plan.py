"""The memory plan against real tensors; the plan command; contradicting flags; resuming with bf16 masters."""

# ruff: noqa: F811 (fixtures are imported)
import re
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file
from torch._subclasses import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks

from ling_kernels.backend import force
from ling_kernels.errors import InputError
from ling_kernels.generate.plan import main as old_plan_decode
from ling_kernels.model import Ling, LingConfig
from ling_kernels.plan.__main__ import main as plan_command
from ling_kernels.plan.memory import RESERVE, plan_training
from ling_kernels.train import checkpoint as ckpt
from ling_kernels.train.__main__ import main
from ling_kernels.train.optimizer import make_optimizer, to_masters
from ling_kernels.train.prepare.device import refuse_without_fp8
from ling_kernels.train.prepare.room import needed_bytes
from ling_kernels.train.settings import Settings, settings_of
from ling_kernels.train.trainer import apply_fp8_and_recompute
from tests.test_fp8_training import WHOLE, kept_bytes, metrics_of, training, whole  # noqa: F401
from tests.training import one_line_error, text  # noqa: F401

KINDS = {
    "fp32": dict(precision="fp32"),
    "bf16": dict(precision="bf16", optimizer="muon", master="bf16"),
    "fp8": dict(precision="fp8", recompute="norm_act"),
    "lightest": dict(precision="fp8", fp8_weights="kept", master="bf16", optimizer="adamw8bit", recompute="experts"),
    "MTP": dict(precision="bf16", recompute_mtp=True),
    "full": dict(precision="fp8", recompute="full", optimizer="adamw8bit"),
}


def new_model(s: Settings, config: LingConfig):
    model = Ling(config)
    to_masters(model, s.master)
    apply_fp8_and_recompute(model, s)
    return model.train()


def forward(model, s: Settings):
    ids = torch.zeros(s.micro_batch, s.seq_len, dtype=torch.int64)
    cu_seqlens = s.seq_len * torch.arange(len(ids) + 1, dtype=torch.int32)
    with torch.autocast("cpu", torch.bfloat16, enabled=s.precision != "fp32"):
        return model(ids, labels=ids, cu_seqlens=cu_seqlens, logits=False, z_loss=1e-3, target_counts=[64.0] * 2)


def kept_by_the_graph(s: Settings, config: LingConfig) -> int:
    """Bytes that torch's saved-tensor hooks count, without parameters and without FP8 copies that are kept."""
    kept = {}

    def pack(t):
        kept[t.untyped_storage()._cdata] = t.untyped_storage()
        return t

    with FakeTensorMode(), force("triton"):
        model = new_model(s, config)
        with saved_tensors_hooks(pack, lambda t: t):
            out = forward(model, s)
        copies = [c for m in model.modules() if hasattr(m, "fp8") for c in m.fp8.caches if c is not None]
        stay = [*model.parameters(), *model.buffers(), *(t for c in copies for t in c.pair)]
        stay = {t.untyped_storage()._cdata for t in stay}
        assert out.loss.requires_grad
        return sum(storage.nbytes() for at, storage in kept.items() if at not in stay)


@pytest.mark.parametrize("kind", KINDS)
def test_a_plan_equals_a_real_step(kind):
    s = replace(Settings(), batch=4, micro_batch=2, seq_len=64, **KINDS[kind])
    plan = plan_training(WHOLE, s)
    model = new_model(s, WHOLE)
    optimizer = make_optimizer(model, s.optimizer, s.lr, s.weight_decay)
    forward(model, s).loss.backward()
    optimizer.step()
    assert plan.peak_bytes["weights"] == sum(t.nbytes for t in [*model.parameters(), *model.buffers()])
    assert plan.peak_bytes["gradients"] == sum(p.grad.nbytes for p in model.parameters())  # also of two
    assert plan.peak_bytes["optimizer"] == sum(t.nbytes for state in optimizer.state.values() for t in state.values())
    copies = [c for m in model.modules() if hasattr(m, "fp8") for c in m.fp8.caches if c is not None]
    if s.fp8_weights == "kept":
        assert plan.peak_bytes["FP8 weights"] == sum(t.nbytes for c in copies for t in c.pair) > 0
    in_graph = ("activations", "loss") + (() if copies else ("FP8 weights",))
    assert sum(plan.kept_bytes[k] for k in in_graph) == pytest.approx(kept_by_the_graph(s, WHOLE), rel=0.002)
    assert plan.peak == sum(plan.peak_bytes.values()) > sum(plan.kept_bytes.values())


def test_activations_of_a_plan_follow_the_formula():
    """Two more layers of Ling-mini's shape keep what kept_bytes predicts."""
    T = 512
    for recompute in ("none", "experts", "full"):
        s = replace(
            Settings(), seq_len=T, batch=1, micro_batch=1, precision="fp8", fp8_weights="kept", master="bf16",
            optimizer="adamw8bit", recompute=recompute, fp8_wgrad="bf16",
        )  # fmt: skip
        few, more = (
            plan_training(replace(LingConfig.mini(), num_hidden_layers=n, num_experts=64, vocab_size=512), s)
            for n in (2, 4)
        )
        c = replace(LingConfig.mini(), num_experts=64)
        layer = T * sum(kept_bytes(c, "fp8", recompute, "bf16").values()) + (2 * 4 * 65 if recompute != "full" else 0)
        assert more.kept_bytes["activations"] - few.kept_bytes["activations"] == pytest.approx(2 * layer, rel=1e-3)


@pytest.mark.parametrize("kind", KINDS)
def test_the_check_before_a_run_counts_what_the_plan_does(kind):
    """Weights, gradients, optimizer, kept FP8 copies; embedding and head, half of this model, have fp32 moments."""
    config = replace(
        LingConfig.mini(), num_hidden_layers=2, num_experts=32, vocab_size=32768, max_position_embeddings=64
    )  # fmt: skip
    s = replace(Settings(), batch=1, seq_len=64, **KINDS[kind])
    parts = plan_training(config, s).peak_bytes
    kinds = ["weights", "weights", "optimizer"] + ["FP8 weights"] * (s.fp8_weights == "kept")
    assert needed_bytes(config, s) == pytest.approx(sum(parts[k] for k in kinds), rel=0.005)


def test_the_preset_fits(capsys):
    assert main(["--preset", "ling-mini-1gpu", "--plan"]) == 0
    output = capsys.readouterr().out
    assert "17,083,499,776 parameters" in output and "H200 (141 GB) yes" in output
    peak = float(re.search(r"peak +([\d.]+) GB", output)[1])
    assert 100 < peak <= 141 - RESERVE / 1e9
    s = settings_of(dict(preset="ling-mini-1gpu", batch=8))
    assert (s.batch, s.model, s.optimizer, s.master, s.fp8_weights) == (8, "mini", "adamw8bit", "bf16", "kept")


def test_plan_of_train_is_an_alias(capsys):
    shown = []
    for command, argv in ((main, ["--plan"]), (plan_command, ["train"])):
        assert command([*argv, "--model", "tiny", "--batch", "8", "--dp", "2"]) == 0
        shown.append(capsys.readouterr().out)
    assert shown[0] == shown[1] and "the fullest of 2" in shown[0]
    assert plan_command(["decode", "--model", "tiny", "--batch", "3"]) == 0
    step = capsys.readouterr().out
    assert old_plan_decode(["--model", "tiny", "--batch", "3"]) == 0
    assert capsys.readouterr().out == step and "tokens/s at most" in step
    for argv, says in (([], "what"), (["sft"], "sft"), (["train", "--resume", "x"], "--resume")):
        assert plan_command(argv) == 2
        error = capsys.readouterr().err
        assert error.startswith("error: ") and error.count("\n") == 1 and says in error


def test_a_plan_leaves_nothing_behind(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["--plan", "--batch", "2", "--out", "here"]) == 0
    assert not list(tmp_path.iterdir()) and "optimizer" in capsys.readouterr().out
    assert "--resume" in one_line_error(["--plan", "--resume", "x"], capsys)


@pytest.mark.parametrize("argv, says", [
    ("--master bf16 --precision fp8", "--optimizer adamw8bit"), ("--preset none", "--preset"),
    ("--master bf16 --optimizer adamw8bit --precision fp32", "--precision"), ("--optimizer sgd", "--optimizer"),
    ("--fp8-weights sometimes", "--fp8-weights"),
])  # fmt: skip
def test_contradicting_flags(whole, tmp_path, text, argv, says, capsys):
    base = f"--model {whole} --data {text} --out {tmp_path / 'run'} --seq-len 32"
    assert says in one_line_error([*base.split(), *argv.split()], capsys)
    assert not (tmp_path / "run").exists()
    assert "has weights" in one_line_error([*base.split(), "--mtp", "2"], capsys)


def test_a_gpu_without_fp8():
    for capability in ((8, 9), (9, 0), (10, 0)):
        refuse_without_fp8("GPU", capability, None)
    refuse_without_fp8("A100", (8, 0), "torch")
    for capability, forced in (((8, 6), None), ((8, 0), "triton"), ((7, 5), None)):
        with pytest.raises(InputError, match="A100 has no FP8.*LING_BACKEND=torch"):
            refuse_without_fp8("A100", capability, forced)


LIGHT = "--precision fp8 --fp8-weights kept --optimizer adamw8bit"


@pytest.mark.parametrize("flags", [f"{LIGHT} --master bf16", "--precision bf16 --optimizer muon --master bf16"])
def test_a_resumed_run_is_the_same(tmp_path, whole, text, flags):
    """Weights, 8-bit moments, stochastic rounding and Muon's momentum continue to the bit."""
    straight = training(whole, text, tmp_path / "straight", flags, "--steps 6", "--save-every 3")
    half = tmp_path / "straight" / "checkpoints" / "step-000003"
    assert straight[-1]["loss"] < straight[0]["loss"]
    before = load_file(tmp_path / "straight" / "checkpoints" / "step-000006" / "model.safetensors")
    assert main(["--resume", str(half), "--threads", "1"]) == 0
    after = load_file(tmp_path / "straight" / "checkpoints" / "step-000006" / "model.safetensors")
    assert all(torch.equal(before[k], after[k]) for k in before)
    assert [m["loss"] for m in metrics_of(tmp_path / "straight")] == [m["loss"] for m in straight]


def test_resuming_with_another_master(tmp_path, whole, text, capsys):
    """fp32 to bf16 and back; FP8 to bf16 products and back. Another optimizer is refused."""
    run = tmp_path / "run"
    first = training(whole, text, run, LIGHT, "--steps 4")
    for steps, flags in ((6, "--master bf16"), (8, "--master fp32 --fp8-weights each_forward"),
                         (10, "--precision bf16"), (12, "--precision fp8")):  # fmt: skip
        assert main(["--resume", str(run), "--steps", str(steps), *flags.split()]) == 0
    metrics = metrics_of(run)
    assert len(metrics) == 12 and metrics[-1]["loss"] < first[-1]["loss"] < first[0]["loss"]
    state = load_file(ckpt.list_checkpoints(run)[-1] / "optimizer.safetensors")
    for name, dtype in (("lm_head", torch.float32), ("layers.0.attention.dense", torch.uint8)):
        assert {state[key].dtype for key in state if key.endswith((f"{name}.weight.m", f"{name}.weight.v"))} == {dtype}
    assert "--optimizer" in one_line_error(["--resume", str(run), "--steps", "20", "--optimizer", "adamw"], capsys)


def test_bf16_masters_train_as_fp32_ones_do(tmp_path, whole, text):
    runs = [training(whole, text, tmp_path / m, LIGHT, f"--master {m} --steps 10") for m in ("fp32", "bf16")]
    assert runs[1][-1]["loss"] < 0.9 * runs[1][0]["loss"]
    for a, b in zip(*runs, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=0.02)
    weights = load_file(tmp_path / "bf16/checkpoints/step-000010/model.safetensors")
    assert all(torch.equal(w, w.bfloat16().float()) for k, w in weights.items() if "norm" not in k and "gate." not in k)
