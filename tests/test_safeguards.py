"""Safeguards of FP8 training: measured errors are right, layers outside their band are reported and switch to bf16,
spikes are skipped; and a run without such events does not change."""

# ruff: noqa: F811 (fixtures are imported)
import json
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.nn.functional import silu

from ling_kernels.model import Ling, load_model, save_model
from ling_kernels.nn import Experts, Fp8Experts, Fp8Linear, Fp8MLP, RMSNorm, fp8_cache
from ling_kernels.nn.fp8 import to_fp8
from ling_kernels.nn.fp8_cache import Fp8Cache, cache_of
from ling_kernels.ops.dispatch import dispatch
from ling_kernels.ops.quantize import dequantize, quantize_blocks
from ling_kernels.train import checkpoint as ckpt
from ling_kernels.train import trainer as steps
from ling_kernels.train.__main__ import main
from ling_kernels.train.monitor import (
    BANDS,
    MIN_STEPS,
    OWN_BAND_FACTOR,
    OWN_BAND_FLOOR,
    OWN_BAND_SAMPLES,
    WINDOW,
    FP8Monitor,
    fp8_errors,
    spike,
    to_bf16,
)
from ling_kernels.train.optimizer import StepInBackward
from ling_kernels.train.settings import Settings
from ling_kernels.train.trainer import apply_fp8_and_recompute
from tests.test_fp8_training import WHOLE, metrics_of, whole  # noqa: F401
from tests.test_train import snapshot, step_inputs
from tests.training import flags, one_line_error, small, text  # noqa: F401


def of_fp8(x, block=(1, 128)):
    """Underflow and distortion by their definition, in fp64."""
    x = x.detach()
    back = dequantize(*quantize_blocks(x.float(), *block, False)).double()
    x = x.double()
    underflow = ((back == 0) & (x != 0)).sum() / (x != 0).sum()
    return [float(underflow), 1 - float((x * back).sum() / (x.norm() * back.norm()))]


def test_errors_of_known_values():
    x = torch.full((2, 128), 1e-7)
    x[:, 0] = 1
    back = dequantize(*quantize_blocks(x, 1, 128, False))
    assert fp8_errors(x, back).tolist() == pytest.approx([127 / 128, 0], abs=1e-9)
    assert fp8_errors(x, torch.stack([back[0], -back[1]])).tolist()[1] == pytest.approx(1, abs=1e-9)
    assert fp8_errors(x * 0, x * 0).tolist() == [0, 0] and fp8_errors(x, x * 0).tolist() == [1, 1]


def measured(model, *inputs):
    """The monitor's record of one forward and backward with a random gradient, and that gradient."""
    torch.manual_seed(1)
    monitor = FP8Monitor(model, 1)
    with monitor.measuring(1) as record:
        out = model(*inputs)
        dy = torch.randn_like(out)
        out.backward(dy)
    assert record["step"] == 1
    return record["layers"], dy


def close(got, want):
    assert got == pytest.approx(want, rel=0.02, abs=2e-5), (got, want)


def spread(*shape):
    """Values over many orders of magnitude, so that FP8 loses some."""
    return torch.randn(*shape) * torch.randn(*shape).mul(4).exp()


def test_operands_of_linear():
    torch.manual_seed(0)
    model = nn.Sequential(Fp8Linear(256, 128))
    x = spread(2, 100, 256).requires_grad_()
    layers, dy = measured(model, x)
    got, x, dy = layers["0"], x.flatten(0, 1)[:128], dy.flatten(0, 1)[:128]
    assert list(got) == ["w", "x", "xt", "dy", "dyt"] and got["x"][0] > 0.05
    for name, value in [("x", x), ("xt", x.T), ("dy", dy), ("dyt", dy.T)]:
        close(got[name], of_fp8(value))
    close(got["w"], of_fp8(model[0].weight, (128, 128)))
    second = FP8Monitor(model, 1)
    with second.measuring(2) as record:
        model(x := spread(256, 256)).sum().backward()
        model(spread(256, 256)).backward(spread(256, 128))  # another micro batch
    close(record["layers"]["0"]["x"], of_fp8(x[128:]))
    assert record["layers"]["0"]["dy"] == pytest.approx([0, 0], abs=1e-9)
    with second.measuring(3) as record, torch.no_grad():
        model(x)
    assert not record["layers"]  # no training
    with FP8Monitor(model, 2).measuring(3) as record:
        model(x)
    assert not record and not model[0]._forward_hooks
    to_bf16(model, "0")
    with second.measuring(4) as record:
        model(x).sum().backward()
    assert not record  # no FP8 layer


def test_operands_of_linear_with_a_norm():
    torch.manual_seed(0)
    norm, layer, x = RMSNorm(256), Fp8Linear(256, 128, recompute="norm_act"), spread(100, 256)
    nn.init.normal_(norm.weight, std=100)
    with FP8Monitor(nn.ModuleList([layer]), 1).measuring(1) as record:
        layer(x, norm).sum().backward()
    close(record["layers"]["0"]["x"], of_fp8(norm(x)))
    close(record["layers"]["0"]["xt"], of_fp8(padded(norm(x)).T))


def test_operands_inside_mlp():
    torch.manual_seed(0)
    model = nn.Sequential(Fp8MLP(128, 256))
    x = torch.randn(128, 128).mul(4).requires_grad_()
    layers, dy = measured(model, x)
    h = (x @ model[0].gate_up.weight.T).detach().requires_grad_()
    a = silu(h[:, :256]) * h[:, 256:]
    da = dy @ model[0].down.weight
    a.backward(da)
    close(layers["0.down"]["x"], of_fp8(a))
    close(layers["0.down"]["xt"], of_fp8(a.T))
    close(layers["0.down"]["dy"], of_fp8(dy))
    close(layers["0.gate_up"]["dy"], of_fp8(h.grad))
    close(layers["0.gate_up"]["x"], of_fp8(x))


def padded(x):
    return torch.cat([x, x.new_zeros(128 - len(x), x.shape[1])])


def test_operands_of_the_busiest_expert():
    torch.manual_seed(0)
    model = Fp8Experts(4, 128, 128, wgrad="fp8")
    for p in model.parameters():
        nn.init.normal_(p, std=0.1)
    chosen = torch.randint(0, 3, (90, 1), dtype=torch.int32)
    chosen[:50] = 2  # more than for the others, fewer than a block
    plan = dispatch(chosen, chosen.flatten().bincount(minlength=4).int())
    x, p = torch.randn(90, 128).requires_grad_(), spread(90, 1).abs()
    layers, dy = measured(nn.ModuleList([model])[0], x, plan, p)
    mine = (chosen == 2).flatten()
    h = (x[mine] @ model.gate_up[2].T).detach().requires_grad_()
    a = p[mine] * silu(h[:, :128]) * h[:, 128:]
    a.backward(dy[mine] @ model.down[2])
    close(layers[".gate_up"]["x"], of_fp8(x[mine]))
    close(layers[".down"]["x"], of_fp8(a))
    close(layers[".down"]["xt"], of_fp8(padded(a).T))
    close(layers[".down"]["dy"], of_fp8(dy[mine]))
    close(layers[".gate_up"]["dy"], of_fp8(h.grad))
    close(layers[".gate_up"]["dyt"], of_fp8(padded(h.grad).T))
    close(layers[".down"]["w"], of_fp8(model.down[2], (128, 128)))


def record_of(layer, **operands):
    return dict(step=1, layers={layer: operands})


def test_a_layer_is_reported_when_it_leaves_its_band():
    model = nn.Sequential(Fp8Linear(128, 128), Fp8MLP(128, 128))
    good, bad = [0, 1e-3], [2 * BANDS["dy"][0], 1e-3]
    monitor = FP8Monitor(model, 1, patience=2)
    assert not monitor.update(record_of("0", dy=good)) and not monitor.layers_to_disable()
    (left,) = monitor.update(record_of("0", dy=bad))
    assert str(left) == "0: underflow of dy is 0.02, above 0.01"
    assert not monitor.update(record_of("0", dy=good))
    assert len(monitor.update(record_of("0", dy=bad))) == 1 and not monitor.layers_to_disable()  # not in a row
    assert not monitor.update(record_of("0", dy=bad)) and monitor.layers_to_disable() == ["0"]
    resumed = FP8Monitor(model, 1, patience=2, earlier=[record_of("0", dy=bad)])
    assert not resumed.update(record_of("0", dy=bad)) and resumed.layers_to_disable() == ["0"]
    assert "not finite" in str(monitor.update(record_of("1.down", dy=[None, 0]))[0])
    monitor.update(record_of("1.down", dy=[None, 0]))
    to_bf16(model, "0")
    assert monitor.layers_to_disable() == ["1"]


def test_a_layer_gets_limits_from_its_first_samples():
    monitor = FP8Monitor(nn.Sequential(), 1)
    for value in (0.02, 0.03, 0.01):
        assert not monitor.update(record_of("a", w=[value, 0.0]))
    assert OWN_BAND_SAMPLES == 3 and not monitor.update(record_of("a", w=[OWN_BAND_FACTOR * 0.03, OWN_BAND_FLOOR[1]]))
    assert [(x.metric, x.limit) for x in monitor.update(record_of("a", w=[0.091, 1.1 * OWN_BAND_FLOOR[1]]))] == [
        ("underflow", pytest.approx(OWN_BAND_FACTOR * 0.03)), ("distortion", OWN_BAND_FLOOR[1]),
    ]  # fmt: skip


def test_back_to_bf16():
    model = Ling(WHOLE)
    before = {n: (type(m), [id(p) for p in m.parameters()]) for n, m in model.named_modules()}
    made, _ = to_fp8(model)
    for p in model.parameters():
        fp8_cache._caches[p] = Fp8Cache(False)  # as where copies are kept
    for name in made:
        to_bf16(model, name.split()[0])
        to_bf16(model, name.split()[0])
    assert {n: (type(m), [id(p) for p in m.parameters()]) for n, m in model.named_modules()} == before
    still = [n for n, p in model.layers[0].named_parameters() if cache_of(p) is not None]
    assert len(still) == 4 and all("norm" in n for n in still)
    assert all(m.training for m in model.modules()) and type(model.layers[1].mlp.experts) is Experts


def fp8_run(folder, text, run, *more):
    argv = f"--model {folder} --data {text} --out {run} --seq-len 64 --batch 4 --micro-batch 2 --warmup 2 --lr 1e-3"
    options = f"--eval-rows 4 --threads 1 --sample-tokens 0 --precision fp8 {' '.join(more)}"
    assert main([*argv.split(), *options.split()]) == 0


def measurements(run):
    return [json.loads(line) for line in (run / "fp8.jsonl").read_text().splitlines()]


def test_the_monitor_changes_nothing(tmp_path, whole, text):
    for recompute in ("none", "full"):
        plain, watched = tmp_path / recompute, tmp_path / f"watched-{recompute}"
        fp8_run(whole, text, plain, "--steps 4 --recompute", recompute)
        fp8_run(whole, text, watched, "--steps 4 --fp8-watch 2 --fp8-wgrad auto --recompute", recompute)
        assert [m["loss"] for m in metrics_of(plain)] == [m["loss"] for m in metrics_of(watched)]
        assert not (plain / "fp8.jsonl").exists()
    lines, none = measurements(watched), measurements(tmp_path / "watched-none")
    assert [line["step"] for line in lines] == [2, 4] and lines == none
    layers = lines[0]["layers"]
    assert len(layers) == 3 * 2 + 2 + 2 * 4 and list(layers["layers.0.mlp.down"]) == ["w", "x", "xt", "dy", "dyt"]
    assert list(layers["layers.1.mlp.experts.gate_up"]) == ["w", "x", "dy"]  # few rows: their wgrad is in bf16
    values = [v for line in lines for layer in line["layers"].values() for values in layer.values() for v in values]
    assert 1e-4 < max(values) < 0.1
    if (watched / "loss.png").exists():
        assert (watched / "fp8.png").read_bytes()[:4] == b"\x89PNG"


def test_fallback_survives_a_resume(tmp_path, whole, text, capsys):
    """One channel of a layer's input is a million times the others, which FP8 rounds to zero."""
    model = load_model(whole, dtype=torch.float32)
    with torch.no_grad():
        model.layers[1].input_layernorm.weight[0] = 1e6
    save_model(model, tmp_path / "outlier", dtype=torch.float32)
    name, flags = "layers.1.attention.query_key_value", "--fp8-watch 1 --fp8-fallback 2 --save-every 3 --steps"
    capsys.readouterr()
    fp8_run(tmp_path / "outlier", text, tmp_path / "a", flags, "5")
    output = capsys.readouterr().out
    assert f"step 1: outside its band: {name}: underflow of x is" in output
    assert f"step 2: {name} switches to bf16" in output
    assert [name in line["layers"] for line in measurements(tmp_path / "a")] == [True, True, False, False, False]
    for point in ckpt.list_checkpoints(tmp_path / "a"):
        state = json.loads((point / "state.json").read_text())
        assert name in state["in_bf16"] and len(state["recent"]) == state["step"]

    fp8_run(tmp_path / "outlier", text, tmp_path / "b", flags, "3")
    capsys.readouterr()
    assert main(["--resume", str(tmp_path / "b"), "--steps", "5"]) == 0
    assert f"{name} switches" not in capsys.readouterr().out
    assert [m["loss"] for m in metrics_of(tmp_path / "a")] == [m["loss"] for m in metrics_of(tmp_path / "b")]
    assert measurements(tmp_path / "a") == measurements(tmp_path / "b")


def test_spikes():
    rows = [[float(i), 1.0] for i in range(1, MIN_STEPS)]
    assert spike([1e9, 1e9], rows, (2.0, 2.0)) is None  # too few steps to compare with
    rows.append([float(MIN_STEPS), 1.0])
    assert spike([16.9, 1.9], rows, (2.0, 2.0)) is None  # the median is 8.5
    assert spike([17.1, 1.9], rows, (2.0, 2.0)) == "loss 2.01 times the median of 16 steps"
    assert spike([17.1, 1.9], rows, (None, 2.0)) is None
    assert spike([17.1, 1.9], rows, (0, 2.0)) is None
    assert spike([1.0, 2.5], rows, (2.0, 2.0)) == "gradient norm 2.5 times the median of 16 steps"
    small = [[x / 100 for x in row] for row in rows]  # as of text that is learnt by heart
    assert spike([0.9, 0.9], small, (2.0, 2.0)) is None
    assert spike([1.1, 0.9], small, (2.0, 2.0)) == "loss 12.9 times the median of 16 steps"


def test_spikes_are_skipped_unless_told_otherwise():
    assert Settings().spikes == (10, 30)
    assert Settings(step_in_backward=True).spikes == (10, 0) and Settings(spike_loss=0, spike_norm=0).spikes == (0, 0)
    assert Settings(spike_loss=3, spike_norm=4).spikes == (3, 4)


@pytest.mark.parametrize("what, light", [("spike_loss", False), ("spike_norm", False), ("spike_loss", True)])
def test_a_spike_is_skipped(tmp_path, text, what, light):
    model, optimizer, packed, settings, progress = step_inputs(text, tmp_path, **{what: 2.0})
    in_backward = StepInBackward(model, optimizer) if light else None
    step = lambda s: steps.train_step(model, optimizer, packed, s, progress, torch.float32, in_backward)[0]  # noqa: E731
    normal_step = step(settings)
    assert progress.recent == [[normal_step["loss"], normal_step["grad_norm"]]]
    recent = progress.recent = [[v / 3 for v in progress.recent[0]]] * WINDOW
    before = snapshot(model, optimizer)
    spiked = step(settings)
    name = {"spike_loss": "loss", "spike_norm": "gradient norm"}[what]
    assert spiked["spike"].startswith(name) and spiked["spike"].endswith("times the median of 32 steps")
    assert all(map(torch.equal, before, snapshot(model, optimizer)))
    assert spiked["skipped"] == progress.skipped == progress.bad == 1 and progress.recent == recent
    taken = step(replace(settings, **{what: 0}))
    assert "skipped" not in taken and progress.bad == 0 and len(progress.recent) == WINDOW
    assert progress.recent[-1] == [taken["loss"], taken["grad_norm"]]


def test_a_monitor_without_fp8_layers_is_reported():
    settings = Settings(precision="bf16", fp8_watch=2)
    assert "--fp8-watch has nothing" in apply_fp8_and_recompute(Ling(WHOLE), settings)[0]
    assert not apply_fp8_and_recompute(Ling(WHOLE), replace(settings, fp8_watch=0))


def test_bad_input(small, text, tmp_path, capsys):
    argv = f"--model {small} --data {text} --out {tmp_path / 'run'} --seq-len 32".split()
    assert "--fp8-watch" in one_line_error([*argv, "--fp8-fallback", "2"], capsys)
    assert "--spike-loss 1.0: it must be more than 1" in one_line_error([*argv, "--spike-loss", "1"], capsys)
    assert "--spike-norm" in one_line_error([*argv, "--spike-norm", "nan"], capsys)
