"""`plan train`: step time, disk and the verdict, against sums by hand for tiny numbers."""

import re
from dataclasses import replace
from pathlib import Path

import pytest

from ling_kernels.gpu import Gpu
from ling_kernels.model import Ling, LingConfig
from ling_kernels.plan import train as plan
from ling_kernels.plan import train_time as time
from ling_kernels.plan.__main__ import main
from ling_kernels.plan.memory import RESERVE
from ling_kernels.plan.step_time import gradient_seconds, moe_layers, step_seconds, timeline_of
from ling_kernels.plan.train import span, verdict
from ling_kernels.plan.train_time import Work, exchange_seconds, layer, once, product, total, unit
from ling_kernels.plan.units import transfer_seconds, unit_times
from ling_kernels.train.optimizer import make_optimizer, to_masters
from ling_kernels.train.prepare.sizes import checkpoint_bytes, checkpoints_at_once, disk_bytes
from ling_kernels.train.settings import Settings

GPU = Gpu("test", 1e9, 1e9, 1e12, 2e12, 1, 1e9)
TINY = replace(LingConfig.tiny(), num_nextn_predict_layers=0)


def flops(works) -> float:
    return sum(w.flops for w in works)


def micro_batch(c, s) -> list[Work]:
    """What a micro batch does on one GPU."""
    dense, mtp = c.first_k_dense_replace, c.num_nextn_predict_layers
    numbers = dict(d=dense, t=c.num_hidden_layers - dense, m=mtp, L=1 + mtp)
    passes = [p for kind, n in numbers.items() for p in [unit(c, s, kind, c.num_experts)] * n]
    return [w for p in passes for w in (*p.forward, *p.backward)]


def test_a_product_by_hand():
    """3 rows, weights [5, 7] of 2 experts: 2 * 3 * 5 * 7 FLOPs each; bytes of x, w, y; dw in fp32, read and written."""
    forward, (dgrad, wgrad) = product("p", 3, 5, 7, groups=2)
    assert {w.flops for w in (*forward, dgrad, wgrad)} == {210.0}
    assert forward[0].bytes == 2 * 3 * 7 + 2 * 70 + 2 * 3 * 5
    assert dgrad.bytes == 2 * 3 * 5 + 2 * 70 + 2 * 3 * 7
    assert wgrad.bytes == 2 * 3 * (5 + 7) + 2 * 4 * 70
    (f8,), (d8, w16) = product("p", 3, 5, 7, fp8=True, wgrad=False, forward="up", grad_bytes=2)
    assert f8 == Work("p forward", 210.0, 3 * 7 + 35 + 2 * 15, "fp8", time.FP8_SHARES["up"]) and d8.precision == "fp8"
    assert w16.precision == "bf16" and w16.share == time.BF16_SHARE and w16.bytes == 2 * 36 + 2 * 2 * 35


def test_seconds_are_the_longest_of_three():
    assert Work("a", 7e10, 1.0).seconds(GPU) == pytest.approx(0.1)  # at 70 % of 1e12 FLOP/s
    assert Work("a", 7e10, 1.0, "fp8", 0.35).seconds(GPU) == pytest.approx(0.1)
    assert Work("a", 1.0, 8.5e7).seconds(GPU) == pytest.approx(0.1)  # at 85 % of 1e9 bytes/s
    assert Work("a", 0, 0).seconds(GPU) == time.LAUNCH


@pytest.mark.parametrize("mtp", [0, 1])
def test_flops_of_a_micro_batch_are_the_models(mtp):
    """Those of MFU: 6 for each active weight and token, norms have none; the backward of attention takes half a product
    more for each of its forward's, as it computes scores again."""
    config = replace(TINY, num_nextn_predict_layers=mtp)
    s = replace(Settings(), batch=4, micro_batch=2, seq_len=32)
    works = micro_batch(config, s)
    attention = sum(w.flops for w in works if w.name == "attention backward")
    layers, H = config.num_hidden_layers + mtp, config.hidden_size
    norms = layers * (2 * H + 2 * config.head_dim) + H + 3 * mtp * H
    assert flops(works) - attention / 5 == pytest.approx(64 * (config.flops_per_token(32) - 6 * norms), rel=1e-9)


def test_recompute_adds_forwards():
    s, levels = replace(Settings(), precision="fp8", seq_len=64), {}
    for level in ("none", "norm_act", "experts", "full"):
        levels[level] = layer(LingConfig.mini(), replace(s, recompute=level), 4096, True, 256)
    none = flops(levels["none"].backward)
    assert flops(levels["norm_act"].backward) == none < flops(levels["experts"].backward)
    c = LingConfig.mini()
    gate_up = 2 * 4096 * c.num_experts_per_tok * 2 * c.moe_intermediate_size * c.hidden_size
    assert flops(levels["experts"].backward) == none + gate_up
    assert flops(levels["full"].backward) == none + flops(levels["full"].forward)


def test_experts_weight_gradients_follow_the_rows():
    """FP8 from 824 rows an expert on: 4096 tokens give 128 each, 32768 give 1024."""
    s = replace(Settings(), precision="fp8")
    for tokens, precision in ((4096, "bf16"), (32768, "fp8")):
        (wgrad,) = [w for w in layer(LingConfig.mini(), s, tokens, True, 256).backward if w.name == "experts up wgrad"]
        assert wgrad.precision == precision


def test_a_step_by_hand():
    """Two micro batches, and the optimizer: 10 elements, weight and gradient of 4 bytes, moments of 8."""
    (optimizer,) = once(Settings(), {"optimizer": 80, "FP8 weights": 0})
    assert optimizer.bytes == 10 * (4 + 4 + 4 + 8 + 8)
    s = replace(Settings(), batch=4, micro_batch=2, seq_len=32)
    one = total(micro_batch(TINY, s), GPU)
    peak = {"optimizer": 80, "FP8 weights": 0, "weights": 40}
    step = step_seconds(TINY, s, timeline_of(TINY, s, GPU), [peak], GPU)
    assert step == pytest.approx(2 * one + optimizer.seconds(GPU))


def test_a_pipeline_by_hand():
    """A dense layer and one with experts; two with experts, and the head, which take longer. The first waits for the
    second's two micro batches, whose inputs and gradients travel once in its sight."""
    s = replace(Settings(), batch=4, micro_batch=2, seq_len=32, pp=2, pipeline="Ett|ttL")
    d, t, L = (unit_times(TINY, s, kind, GPU, 1) for kind in "dtL")
    first, last, travel = d + t, t + t + L, transfer_seconds(TINY, s, near=True)
    timeline = timeline_of(TINY, s, GPU)
    assert first.of("F") < last.total and first.of("B") < last.total
    assert timeline.seconds == pytest.approx(first.total + 2 * last.total + 2 * travel)
    assert timeline.bubble(0) == pytest.approx(1 - 2 * first.total / timeline.seconds)
    assert moe_layers(TINY, s, timeline) == [1, 2]


def test_messages_by_hand():
    """4 GPUs share 16 experts: 3 of 4 rows leave, of 3 MoE layers, 4 times; gradients of all but the experts are
    summed."""
    s = replace(Settings(), batch=2, micro_batch=2, seq_len=16, dp=4, ep=4)
    assert exchange_seconds(TINY, s, 1) == (0, 0) and gradient_seconds(TINY, replace(s, dp=1, ep=1), 3, 10**9) == 0
    experts = 3 * 4 * 3 * TINY.moe_intermediate_size * TINY.hidden_size * 4
    assert 3 * sum(exchange_seconds(TINY, s, 4)) == pytest.approx(4 * 2 * 4 * 32 * 128 * 3 * 0.75 / 450e9)
    assert gradient_seconds(TINY, s, 3, experts + 1000) == pytest.approx(2 * 1000 * 0.75 / 450e9)
    far = gradient_seconds(TINY, replace(s, dp=16), 3, experts + 1000)
    assert far == pytest.approx(2 * (1000 * 15 / 16 + experts * 3 / 4) / 50e9)


def test_shares_are_those_of_the_machine_code():
    page = (Path(__file__).parents[1] / "docs/kernels-predicted.md").read_text()
    shares = {
        name: int(share) / 100 for name, share in re.findall(r"^\| ([^|]+?) \|[^|]*TFLOPS \| (\d+)% \|", page, re.M)
    }
    wanted = time.FP8_SHARES | time.ATTENTION_SHARES
    found = dict(
        up=shares["gate and up with SwiGLU"], down=shares["down"], wgrad=shares["wgrad of gate and up, fp32"],
        dgrad=shares["dgrad of gate and up, weights as stored"], dense=shares["one matrix, 4096 x 7168 x 16384"],
        forward=shares["forward, 1 x 4096"], backward=shares["backward, 1 x 4096"],
    )  # fmt: skip
    assert wanted == found


@pytest.mark.parametrize("optimizer, master", [("adamw", "fp32"), ("adamw8bit", "bf16"), ("muon", "fp32")])
def test_checkpoint_bytes_are_those_of_real_tensors(optimizer, master):
    config = replace(LingConfig.tiny(), vocab_size=512, hidden_size=256, moe_intermediate_size=256)
    s = replace(Settings(), optimizer=optimizer, master=master)
    model = Ling(config)
    to_masters(model, master)
    opt = make_optimizer(model, optimizer, 1e-3, 0.1)
    for p in model.parameters():
        p.grad = p.detach() * 0 + 1
    opt.step()
    state = sum(t.nbytes for of in opt.state.values() for t in of.values())
    weights = sum(p.nbytes for p in model.parameters())
    assert checkpoint_bytes(config, s) == pytest.approx(weights + state, rel=0.002)
    one, exported = checkpoint_bytes(config, s), 2 * config.num_parameters(mtp=True)
    s = replace(s, steps=1000, save_every=100)
    assert disk_bytes(config, s, 4) == 4 * one + exported
    assert checkpoints_at_once(replace(s, keep=3)) == (4, 6) and checkpoints_at_once(replace(s, keep=0)) == (10, 10)
    assert checkpoints_at_once(replace(s, keep=3), step=900) == (1, 1)


def test_the_verdict_looks_at_the_worst_load():
    assert verdict(80e9 - RESERVE, None, 80e9) == "yes" and verdict(80e9, None, 80e9) == "no"
    assert verdict(40e9, 74e9, 80e9) == "yes" and verdict(40e9, 75e9, 80e9) == "with even experts only"


def test_spans():
    assert [span(t) for t in (86400 * 2.5, 5400, 90, 1.5, 0.0123)] == [
        "2.5 days",
        "1.5 h",
        "1.5 min",
        "1.5 s",
        "12.3 ms",
    ]


def test_what_is_printed(capsys):
    argv = ["train", "--model", "tiny", "--steps", "100", "--batch", "4", "--seq-len", "256"]
    assert main(argv) == 0
    out = capsys.readouterr().out
    assert "none yet at the peak; 8.8 MB later" in out and "0.0 MB" not in out and "cost" not in out
    peak, saved = (float(re.search(rf"^{n} +([\d.]+) MB", out, re.M)[1]) for n in ("peak", "saved"))
    assert saved < peak and re.search(r"^time +H20 +H100 +H200$", out, re.M) and "nothing of it measured" in out
    speed = float(re.search(r"^tokens/s .* ([\d,]+)$", out, re.M)[1].replace(",", ""))
    step = float(re.search(r"^step .* ([\d.]+) ms$", out, re.M)[1])
    assert speed == pytest.approx(1024 / step * 1000, rel=0.01)
    assert "batch         1,024 tokens a step: 4 rows of 256\n" in out
    assert "run, 0.000102 B tokens" in out and "for 1 at once and the exported model" in out
    assert main([*argv, "--gpu-hour", "3"]) == 0
    out = capsys.readouterr().out
    hours = float(re.search(r"^1 B tokens .* ([\d.]+) min$", out, re.M)[1]) / 60
    assert float(re.search(r"^cost of 1 B tokens .* ([\d.]+)$", out, re.M)[1]) == pytest.approx(3 * hours, abs=0.01)
    assert "a price is more than 0" in one_line_plan(["train", "--gpu-hour", "0"], capsys)


def test_times_of_gpus_that_have_the_memory(capsys, monkeypatch):
    """Two of three, and none; the words for FP8 weights are no names of settings."""
    argv = "train --model tiny --batch 4 --precision fp8 --fp8-weights kept".split()
    assert main(argv) == 0
    out = capsys.readouterr().out
    assert "quantised once a step, then kept" in out and re.search(r"^time +H20 +H100 +H200$", out, re.M)
    peak = float(re.search(r"^peak +([\d.]+) MB", out, re.M)[1]) * 1e6
    for small, times in (({"H100"}, r"^time +H20 +H200\nstep( +[\d.]+ m?s){2}$"), ({*plan.HOPPER}, "^time +none: ")):
        few = {n: g._replace(memory=peak) if n in small else g for n, g in plan.HOPPER.items()}
        monkeypatch.setattr(plan, "HOPPER", few)
        assert main(argv) == 0
        assert re.search(times, capsys.readouterr().out, re.M)


def one_line_plan(argv, capsys) -> str:
    assert main(argv) == 2
    return capsys.readouterr().err


def test_uneven_experts_in_the_printed_verdict(capsys):
    argv = "train --model mini --mtp 0 --precision bf16 --master bf16 --optimizer adamw8bit --batch 64 --seq-len 4096"
    assert main([*argv.split(), "--micro-batch", "2", "--dp", "8", "--ep", "8"]) == 0
    out = capsys.readouterr().out
    even, worst = (float(re.search(rf"^{n} +([\d.]+) GB", out, re.M)[1]) for n in ("peak", "worst"))
    assert worst > even and "H100 (80 GB) with even experts only, H200 (141 GB) yes" in out
    assert "262,144 tokens a step: 64 rows of 4,096, 8 for each of 8 data parallel processes, 2 in a" in out
    assert "450 GB/s within 8 GPUs" in " ".join(out.split())
