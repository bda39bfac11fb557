"""Scaling laws against the published table, power laws against known ones, a ladder from plan to prediction."""

import json

import numpy as np
import pytest

from ling_kernels.errors import InputError
from ling_kernels.model import LingConfig
from ling_kernels.plan import ladder
from ling_kernels.plan.__main__ import main
from ling_kernels.plan.power_law import PowerLaw, fit, predict
from ling_kernels.train import scaling
from ling_kernels.train.prepare import device

PUBLISHED = dict(mini=(3.36e-4, 4400), flash=(2.61e-4, 8352), **{"1t": (1.86e-4, 18144)})  # peak lr, rows of 4,096


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_published_table(name):
    """arXiv 2510.22115, table 1. Rates follow from C = 6 N_active tokens within 5 %, and batches from the C that the
    published rates imply; batches at the first C are up to 13 % off."""
    lr, rows = PUBLISHED[name]
    compute = 6 * LingConfig.preset(name).num_active_parameters() * scaling.LING_TOKENS
    assert scaling.peak_lr(compute) == pytest.approx(lr, rel=0.05)
    implied = scaling.compute_of_lr(lr)
    assert scaling.peak_lr(implied) == pytest.approx(lr)
    assert scaling.batch_tokens(implied) / 4096 == pytest.approx(rows, rel=0.05)
    assert scaling.batch_tokens(compute) / 4096 == pytest.approx(rows, rel=0.14)


def test_the_laws_agree_with_one_another():
    for compute in (3e17, 1e20, 1e24):
        flops = scaling.best_flops_per_token(compute)
        assert flops * scaling.best_tokens(compute) == pytest.approx(compute, rel=1e-3)
        assert scaling.compute_of_model(flops) == pytest.approx(compute)


def test_efficiency_leverage():
    """About 7 for Ling-mini-beta (the paper's claim), best at a granularity near 12, growing with the compute and with
    fewer active experts."""
    assert scaling.efficiency_leverage(0.031, 12, 1e22) == pytest.approx(7.24, abs=0.05)
    granularity = np.linspace(2, 40, 400)
    best = granularity[int(np.argmax([scaling.efficiency_leverage(0.031, g, 1e22) for g in granularity]))]
    assert best == pytest.approx(11.3, abs=0.2)
    assert scaling.efficiency_leverage(0.031, 12, 1e24) > scaling.efficiency_leverage(0.031, 12, 1e22)
    assert scaling.efficiency_leverage(0.031, 12, 1e22) > scaling.efficiency_leverage(0.25, 12, 1e22)


LAWS = (scaling.peak_lr, scaling.batch_tokens, scaling.compute_of_lr, scaling.best_flops_per_token, scaling.best_tokens,
        scaling.compute_of_model)  # fmt: skip


@pytest.mark.parametrize("value", [0, -1.0, float("nan"), float("inf"), "1", None])
def test_numbers_for_which_no_law_holds(value):
    for law in LAWS:
        with pytest.raises(InputError, match="is a number above 0"):
            law(value)
    for i in range(3):
        numbers = [0.031, 12, 1e22]
        numbers[i] = value
        with pytest.raises(InputError, match="is a number above 0"):
            scaling.efficiency_leverage(*numbers)
    with pytest.raises(InputError, match="at most 1"):
        scaling.efficiency_leverage(1.5, 12, 1e22)


@pytest.mark.parametrize("law", [PowerLaw(1.5, 40, 0.12), PowerLaw(0.0, 20, 0.05), PowerLaw(2.0, 3e3, 0.25)])
def test_a_known_law_is_recovered(law):
    compute = np.geomspace(1e17, 1e20, 8)
    found = fit(compute, [law(c) for c in compute])
    assert found.b == pytest.approx(law.b, rel=0.05) and found.floor == pytest.approx(law.floor, abs=0.05)
    assert found(1e21) == pytest.approx(law(1e21), rel=2e-3)


def test_the_interval_holds_the_share_of_runs():
    """Of laws with noise of 0.3 %, the next size lies in the interval of 90 % in about nine of ten."""
    law, rng, inside = PowerLaw(1.2, 30, 0.1), np.random.default_rng(0), 0
    compute = np.repeat(np.geomspace(1e17, 1e19, 5), 3)
    for seed in range(8):
        noisy = [law(c) * (1 + 3e-3 * rng.standard_normal()) for c in compute]
        _, middle, (low, high) = predict(compute, noisy, 3e19, seed=seed)
        assert low < middle < high and high - low < 0.1
        inside += low <= law(3e19) * (1 + 3e-3 * rng.standard_normal()) <= high
    assert inside >= 6


def test_what_has_no_law():
    with pytest.raises(InputError, match="three sizes or more"):
        fit([1e9, 1e9, 1e10], [3, 3, 2])
    with pytest.raises(InputError, match="do not fall"):
        fit([1e9, 1e10, 1e11], [2, 3, 4])
    with pytest.raises(InputError, match="not finite"):
        fit([1e9, 1e10, 1e11], [2, float("nan"), 1])


SIZES = "--model tiny --mtp 0 --layers 2 --experts 4 --topk 1 --groups 1 --heads 2 --seq-len 32 --threads 1"


def test_the_plan_follows_the_laws(capsys):
    options = dict(model="tiny", mtp=0, layers=2, experts=4, topk=1, groups=1, heads=2, seq_len=32)
    rungs = ladder.plan_ladder(options, [32, 16, 24, 48], share=0.5)
    assert [r.hidden for r in rungs] == [16, 24, 32, 48]
    for r in rungs:
        s = r.settings
        assert r.tokens == s.steps * s.batch * s.seq_len
        assert r.tokens == pytest.approx(0.5 * scaling.best_tokens(scaling.compute_of_model(r.flops)), rel=0.05)
        assert s.batch * s.seq_len == pytest.approx(scaling.batch_tokens(r.compute), rel=0.2)
        assert s.lr == pytest.approx(scaling.peak_lr(r.compute), rel=1e-2)
    assert main(["ladder", "--hidden", "16", "24", "32", "48", *SIZES.split(), "--plan"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 6


def test_a_small_ladder(tmp_path, capsys, monkeypatch):
    """Trained, predicted and compared; what is trained already is not trained again."""
    monkeypatch.setattr(device, "measured_flops", lambda *_: 1e10)
    rng = np.random.default_rng(0)
    texts = [json.dumps({"text": " ".join(rng.choice(["one", "two", "three", "four"], 40))}) for _ in range(200)]
    (tmp_path / "text.jsonl").write_text("\n".join(texts))
    argv = ["ladder", "--hidden", "8", "16", "24", "32", *SIZES.split(), "--data", str(tmp_path / "text.jsonl"),
            "--steps", "12", "--batch", "4", "--lr", "1e-2", "--warmup", "2", "--eval-rows", "8", "--seeds", "0",
            "--held-out", "--out", str(tmp_path / "out")]  # fmt: skip
    assert main(argv) == 0
    printed = capsys.readouterr().out
    assert "predicted at" in printed and "measured, mean of the seeds" in printed and "hidden 32, seed 0" in printed
    content = json.loads((tmp_path / "out/ladder.json").read_text())
    result, runs = content["result"], content["runs"]
    assert len(content["origin"]["commit"]) >= 7 and content["origin"]["date"].startswith("20")
    assert [r["hidden"] for r in runs] == [8, 16, 24, 32] and all(0 < r["loss"] < 7 for r in runs)
    assert result["measured"] == runs[-1]["loss"]
    assert result["error"] == pytest.approx(result["predicted"] / runs[-1]["loss"] - 1)
    monkeypatch.setattr(ladder, "train_rung", lambda *_: 1 / 0)
    assert main([*argv, "--save-every", "3"]) == 0 and (tmp_path / "out/ladder.png").stat().st_size > 1000
    assert json.loads((tmp_path / "out/ladder.json").read_text())["runs"] == runs
    capsys.readouterr()
    assert main([*argv, "--lr", "2e-2"]) == 2
    assert "holds hidden 8 with lr 0.01, not 0.02: name another --out" in capsys.readouterr().err
    monkeypatch.setattr(ladder, "train_rung", lambda rung, seed, folder: 1.0)
    more = [*argv[:5], "40", *argv[5:]]  # hidden 40 is one more
    assert main(more) == 0 and main(argv) == 0
    again = json.loads((tmp_path / "out/ladder.json").read_text())
    assert again["result"] == result and len(again["runs"]) == 5, "the law of a ladder has its own rungs alone"


def test_a_ladder_that_is_stopped_in_its_first_run_knows_its_settings(tmp_path, monkeypatch):
    options = dict(model="tiny", mtp=0, layers=2, experts=4, topk=1, groups=1, heads=2)
    monkeypatch.setattr(ladder, "train_rung", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        ladder.train_ladder(ladder.plan_ladder(options, [8, 16, 24, 32]), [0], tmp_path, False)
    with pytest.raises(InputError, match="hidden 8 with experts 4, not 8"):
        ladder.train_ladder(ladder.plan_ladder(options | dict(experts=8), [8, 16, 24, 48]), [0], tmp_path, False)


def test_mistakes(capsys, tmp_path):
    for flags, message in {
        "--hidden 16 24 32": "four different sizes",
        "--hidden 16 24 32 32": "four different sizes",
        "--hidden 16 24 32 48 --share 0": "must be more than 0",
        f"--hidden 16 24 32 48 {SIZES}": "--out is missing",
        f"--hidden 16 24 32 48 {SIZES} --seeds 1 1": "different numbers of at least 0",
        f"--hidden 16 24 32 48 {SIZES} --seeds -1": "different numbers of at least 0",
    }.items():
        assert main(["ladder", *flags.split()]) == 2
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1
