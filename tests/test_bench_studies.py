"""The studies of FP8 training and of the FP8 cache, short; their pages show their committed results."""

import json
from dataclasses import replace
from functools import partial

import pytest
import torch

from benchmarks.report import cut
from benchmarks.studies import cache, fp8, rl
from tests.test_model import DATA, expected, load


def test_fp8_trains_and_measures(tmp_path, monkeypatch):
    monkeypatch.setattr(fp8, "SAVE_EVERY", 20)
    monkeypatch.setattr(fp8, "SEEDS", (0,))
    monkeypatch.setattr(fp8, "RUNS", [("fp8", True, 0), ("bf16", True, 0)])
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        results, settings = tmp_path / "results", replace(fp8.SETTINGS, steps=40, eval_rows=8, warmup=10)
        fp8.train_all(results, tmp_path, settings)
        fp8.measure_all(results, tmp_path)
    finally:
        torch.set_num_threads(threads)
    runs = {name: json.loads((results / f"{name}-norm-0.json").read_text()) for name in ("fp8", "bf16")}
    in_fp8, in_bf16 = (run["losses"] for run in runs.values())
    assert len(in_fp8) == 40 and in_fp8 != in_bf16 and in_fp8[-1] < 0.8 * in_fp8[0]
    assert runs["fp8"]["data"] == runs["bf16"]["data"] and runs["fp8"]["val_loss"] < in_fp8[0]
    assert abs(sum(in_fp8[-10:]) / sum(in_bf16[-10:]) - 1) < 0.01

    by_step = json.loads((results / "operands.json").read_text())["norm"]["0"]
    assert list(by_step) == ["20", "40"] and len(by_step["40"]) == 4 + 2 + 4
    for operands in by_step["40"].values():
        assert list(operands) == ["w", "x", "xt", "dy", "dyt"]
        assert all(1e-4 < distortion < 1e-3 for _, distortion in operands.values())
    errors = json.loads((results / "gradients.json").read_text())["errors"]["0"]
    assert len(errors) == 4 + 1 + 2
    for layer in errors.values():
        for name, error in layer["fp8"].items():
            assert 3 * layer["bf16"][name] < error < 0.06 and 1e-3 < layer["bf16"][name] < 6e-3, name

    difference = fp8.apart({f"{k}-norm-0": v for k, v in runs.items()}, "fp8-norm-0", "bf16-norm-0")
    assert f"| FP8 | {difference:+.2%} |" in fp8.tables(*fp8.load(results))
    written = (results / "fp8-norm-0.json").stat().st_mtime_ns
    fp8.train_all(results, tmp_path, settings)  # a run with a results file is not repeated
    assert (results / "fp8-norm-0.json").stat().st_mtime_ns == written


def test_logits_through_the_cache_are_those_without():
    model, ids = load("base"), expected("base")["generate.greedy"][:2]
    with torch.inference_mode():
        want = model(ids).logits
    assert torch.allclose(cache.logits_through(model, ids, torch.float32), want, atol=1e-4)
    rows = {(r["model"], r["cache"]): r for r in cache.measure(DATA / "base", ids)}
    assert list(rows) == cache.VARIANTS and rows["fp32", "fp32"]["error"] == 0 and rows["fp32", "fp32"]["same"] == 1
    assert 0 < rows["fp32", "bf16"]["error"] < rows["fp32", "e4m3"]["error"] < 0.2


def test_comparison_of_logits():
    truth = torch.randn(2, 3, 5, generator=torch.Generator().manual_seed(0))
    ids = torch.tensor([[1, 2, 3], [4, 0, 1]])
    same = cache.compare(truth + 7, truth, ids)
    assert same["error"] < 1e-6 and abs(same["kl"]) < 1e-6 and same["same"] == 1
    want = torch.nn.functional.cross_entropy(truth[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    assert same["nats"] == pytest.approx(want.item())
    other = cache.compare(truth.flip(-1), truth, ids)
    assert other["kl"] > 0.1 and other["same"] < 1 and other["error"] > 0.5


def test_pages_show_the_results():
    assert fp8.tables(*fp8.load(fp8.RESULTS)) == cut(fp8.PAGE.read_text(), "study_fp8")[1]
    found = json.loads(cache.RESULTS.read_text())
    assert cache.block(found) == cut(cache.PAGE_OF_RESULTS.read_text(), "study_cache")[1]


def test_rules_of_balancing():
    """Quantile balancing gives an even load at once; the sign rule moves by its rate, with a mean of 0 or without."""
    from benchmarks.studies import balance
    from ling_kernels.nn import Router

    generator = torch.Generator().manual_seed(0)
    router = Router(8, 16, topk=4)
    scores = (torch.randn(4096, 16, generator=generator) + 2 * torch.arange(16) / 16).sigmoid()

    def load(bias):
        return (scores + bias).topk(4).indices.flatten().bincount(minlength=16)

    router.counts.copy_(load(router.expert_bias))
    even = router.counts.double().mean()
    assert router.counts.max() > 1.5 * even
    for _ in range(8):
        router.expert_bias.copy_(balance.quantile(router, scores))
    assert load(router.expert_bias).max() < 1.05 * even and router.expert_bias.mean().abs() < 1e-6
    router.expert_bias.zero_()
    plain, centred = balance.sign(router, scores), balance.zero_mean(router, scores)
    assert plain.abs().max() == pytest.approx(balance.RATE) and centred.mean().abs() < 1e-8
    torch.testing.assert_close(plain - plain.mean(), centred)
    assert (plain[router.counts > even] < 0).all()


def test_a_short_study_of_balancing(tmp_path, monkeypatch):
    """One seed of two rules, through to the results and the picture."""
    from benchmarks.studies import balance

    text = tmp_path / "text.jsonl"
    text.write_text("".join(f'{{"text": "words and {i} more words"}}\n' for i in range(600)))
    before, study = balance.settings, balance.study
    short = dict(data=(str(text),), hidden=16, seq_len=32, batch=2, warmup=1, eval_rows=4)
    monkeypatch.setattr(balance, "settings", lambda seed, steps: replace(before(seed, steps), **short))
    monkeypatch.setattr(balance, "study", lambda *args: study(*args, steps=6))
    monkeypatch.setattr(balance, "SEEDS", (0,))
    monkeypatch.setattr(balance, "LAST", 3)
    monkeypatch.setattr(balance, "RULES", {name: balance.RULES[name] for name in ("none", "zero mean")})
    for name in ("RESULTS", "PLOT"):
        monkeypatch.setattr(balance, name, tmp_path / getattr(balance, name).name)
    assert balance.main() == 0
    found = json.loads(balance.RESULTS.read_text())
    none, centred = found["rows"]
    assert found["commit"] and [row["rule"] for row in found["rows"]] == ["none", "zero mean"]
    assert none["worst"][0] == centred["worst"][0] and none["worst"] != centred["worst"], "a bias acts from step 2 on"
    for row in found["rows"]:
        pairs = [*zip(row["mean"], row["worst"], strict=True)]
        assert len(pairs) == 6 and all(0 < mean <= worst <= 3 for mean, worst in pairs)
        assert 0 < row["val_loss"] < 7
        assert [sum(layer) / 16 for layer in row["load"]] == pytest.approx([1, 1], abs=1e-3)
    assert balance.PLOT.stat().st_size > 1000


def test_a_short_study_of_reinforcement_learning(monkeypatch):
    """One seed, from a start of a few steps."""
    monkeypatch.setattr("ling_kernels.posttrain.start.EXAMPLES", 60)
    monkeypatch.setattr(rl, "LoopSettings", partial(rl.LoopSettings, prompts=2, samples=2, new_tokens=8))
    run = rl.study("arithmetic", 0, steps=8, start_steps=3)
    assert (run["task"], run["seed"], run["start_steps"], len(run["steps"])) == ("arithmetic", 0, 3, 8)
    assert all(step.keys() == {*rl.KEPT} and step["mismatch_max"] < 1e-3 for step in run["steps"])
    assert all(0 < step["answer_tokens"] <= 8 for step in run["steps"])
    rewards = [step["reward"] for step in run["steps"]]
    assert rl.quarters(run)[:2] == (sum(rewards[:2]) / 2, sum(rewards[-2:]) / 2) and run["seconds"]["loop"] > 0


def test_a_short_study_of_merging(tmp_path, monkeypatch):
    from benchmarks.studies import merging
    from ling_kernels.train.prepare import device

    monkeypatch.setattr(device, "measured_flops", lambda *_: 1e10)
    (tmp_path / "text.jsonl").write_text("".join(f'{{"text": "words and {i} more words"}}\n' for i in range(300)))
    before = merging.settings
    monkeypatch.setattr(merging, "NUMBERS", (2,))
    monkeypatch.setattr(merging, "EVERY", 2)
    short = dict(data=(tmp_path / "text.jsonl",), hidden=16, seq_len=32, batch=2, warmup=1, eval_rows=4)
    monkeypatch.setattr(merging, "settings", lambda seed, **more: before(seed, **short | more))
    losses = merging.study(0, tmp_path, steps=6)
    assert losses.keys() == {"last", "mean, 2", "1-sqrt, 2", "ema:0.2, 2", "decayed"}
    assert len({*losses.values()}) == 5 and all(0 < loss < 7 for loss in losses.values())


def test_the_page_of_reinforcement_learning_has_its_results():
    runs = json.loads(rl.RESULTS.read_text())["runs"]
    assert [(r["task"], r["seed"]) for r in runs] == [(task, seed) for task in rl.START_STEPS for seed in rl.SEEDS]
    assert rl.rows(runs) == cut(rl.PAGE.read_text(), "rl-study")[1]
    for run in runs:
        first, last, spread = rl.quarters(run)
        assert last - first > spread > 0, (run["task"], run["seed"])
    four = dict(steps=[dict(reward=r) for r in (0, 1, 9, 9, 9, 9, 5, 7)])
    assert rl.quarters(four) == (0.5, 6, pytest.approx(2**0.5))
