"""docs/scale-out-plans.md says its figures, a fresh simulation gives them, and the sums of a cluster by hand."""

import importlib.util
import json
from dataclasses import replace
from pathlib import Path

import pytest

from ling_kernels.model import LingConfig
from ling_kernels.parallel.pipeline_layout import PipelineLayout
from ling_kernels.plan.cluster import CLUSTERS, NETWORK, Software, cluster_units, plan_step, recipe
from ling_kernels.plan.decode_time import EFFICIENCY
from ling_kernels.plan.train_time import LINKS, exchange_seconds
from ling_kernels.plan.units import Gpus, predicted_units

spec = importlib.util.spec_from_file_location("scale_out_plans", Path(__file__).parents[1] / "docs/scale_out_plans.py")
plans = importlib.util.module_from_spec(spec)
spec.loader.exec_module(plans)
FOUND = json.loads(plans.RESULTS.read_text())
TINY = replace(LingConfig.tiny(), num_nextn_predict_layers=1)
S = replace(recipe(TINY, 16), seq_len=64)


def test_the_page_is_its_figures():
    assert plans.PAGE.read_text() == plans.page(FOUND)
    assert plans.PICTURE.read_bytes()[:4] == b"\x89PNG"


@pytest.mark.parametrize("name", ["mini", "figure 18"])
def test_the_figures_are_fresh(name):
    """Simulated again, with today's times of units; the search is not repeated."""
    case = plans.CASES[name]
    units = case.units()
    for found, with_units in (("cases", units), ("ratios", plans.with_ratios(units))):
        for row in FOUND[found].get(name, []):
            layout = PipelineLayout.parse(row["layout"])
            again = plans.row(row["label"], case.problem(with_units), layout, row["schedule"])
            words = {name: value for name, value in row.items() if isinstance(value, str)}
            assert {name: again.pop(name) for name in words} == words
            assert again == pytest.approx({k: v for k, v in row.items() if k not in words}, rel=1e-9), row["label"]


def test_no_freer_layout_is_slower():
    for rows in (*FOUND["cases"].values(), *FOUND["ratios"].values()):
        seconds = [row["seconds"] for row in rows]
        assert seconds == sorted(seconds, reverse=True)


def test_the_ladder_beside_the_published_one():
    """arXiv 2510.22115, figure 14. The model has another rung gain most than the report: the page says so."""
    rows = [line.split(" | ") for line in plans.PAGE.read_text().splitlines() if line.count("|") == 7]
    table = [row for row in rows if row[0].strip("| ") in {label for label, *_ in plans.LADDER}]
    assert [row[1] for row in table] == ["16.9 %", "23.8 %", "27.1 %", "29.4 %", "31.4 %"]
    assert [row[4] for row in table[1:]] == ["1.41 x", "1.14 x", "1.08 x", "1.07 x"]
    published, predicted = ([float(row[n].split()[0]) for row in table[1:]] for n in (4, 5))
    assert all(gain > 1 for gain in predicted)
    ranks = [[sorted(gains, reverse=True).index(gain) for gain in gains] for gains in (published, predicted)]
    assert ranks == [[0, 1, 2, 3], [2, 0, 1, 3]]


@pytest.mark.parametrize("text, want", [
    ("Et|tt|tt|tt|mL", "Et|(tt|)*3mL"), ("Et|tt|tt|mL", "Et|tt|tt|mL"), ("E|t|t|t|t", "E|(t|)*3t"), ("EtL", "EtL"),
    ("E||||L", "E|(|)*3L"),
])  # fmt: skip
def test_short_layouts_are_the_same(text, want):
    assert plans.short(text) == want and str(PipelineLayout.parse(want)) == text


def test_what_a_rung_changes():
    h800 = CLUSTERS[0]
    base = predicted_units(TINY, S, h800.gpu, 2)
    one = cluster_units(TINY, S, h800, 2, Software(exchange=1.0, fast=False), base)
    assert one["t"].times.exchange == exchange_seconds(TINY, S, 2)[0] * LINKS[True] / h800.nvlink
    assert one["t"].times.exchange_back == 2 * one["t"].times.exchange and one["d"].times.exchange == 0
    assert one["t"].times[:3] == pytest.approx(base["t"].times[:3])
    half = cluster_units(TINY, S, h800, 2, Software(exchange=0.5, fast=False), base)
    assert half["m"].times.exchange == pytest.approx(2 * one["m"].times.exchange)
    fast = cluster_units(TINY, S, h800, 2, Software(exchange=1.0, fast=True), base)
    assert fast["t"].times.exchange_back == 1.5 * one["t"].times.exchange
    assert fast["t"].times.input_gradient < one["t"].times.input_gradient and fast["d"] == one["d"]
    slow = cluster_units(TINY, S, h800, 2, Software(exchange=1.0, passes=1e6, fast=False), base)
    assert slow["d"].times.forward > one["d"].times.forward


def test_a_step_of_a_cluster_by_hand():
    """dp 4, ep 2, one rank: its pipeline is its micro batches one after another; sums and optimizer are added."""
    cluster, gpus, layout = CLUSTERS[1], Gpus(dp=4, ep=2), PipelineLayout.parse("EttttmL")
    units = predicted_units(TINY, S, cluster.gpu, 2)
    step = plan_step(TINY, S, cluster, gpus, layout, "1F1B", units=units)
    each = cluster_units(TINY, S, cluster, 2, Software(), units)
    work = each["d"].times.total + 3 * each["t"].times.total + each["m"].times.total + 2 * each["L"].times.total
    experts = sum(units[k].experts * n for k, n in dict(t=3, m=1).items())
    plain = TINY.num_parameters(mtp=True) - 2 * experts
    sent = 6 * (plain * 3 / 4 + experts / 2)
    passes = 30 * (plain / 4 + experts / 2) / (cluster.gpu.bandwidth * EFFICIENCY)
    assert step.seconds == pytest.approx(4 * work + sent / NETWORK + passes)
    assert step.network == pytest.approx(sent) and step.idle == pytest.approx(0)
    rows = 2 * TINY.num_experts_per_tok * 64 * TINY.hidden_size / 2  # bytes of a micro batch that leave this GPU
    assert step.nvlink == pytest.approx(4 * 4 * 5 * rows)  # 4 micro batches, 4 layers, there and back twice and once
    assert step.mfu == pytest.approx(TINY.flops_per_token(64) * 16 * 64 / step.seconds / 4 / cluster.gpu.bf16)
