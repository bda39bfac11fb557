"""The study of the FP8 cache: what it compares, and that docs/serving.md shows its results."""

import json

import pytest
import torch

from benchmarks import study_cache as study
from benchmarks.blocks import cut
from tests.test_model import DATA, expected, load


def test_through_the_cache_as_without_it():
    model, ids = load("base"), expected("base")["generate.greedy"][:2]
    with torch.inference_mode():
        want = model(ids).logits
    assert torch.allclose(study.logits_through(model, ids, torch.float32), want, atol=1e-4)


def test_rows():
    ids = expected("base")["generate.greedy"][:2]
    rows = {(r["model"], r["cache"]): r for r in study.measure(DATA / "base", ids)}
    assert list(rows) == study.VARIANTS and rows["fp32", "fp32"]["error"] == 0 and rows["fp32", "fp32"]["same"] == 1
    assert 0 < rows["fp32", "bf16"]["error"] < rows["fp32", "e4m3"]["error"] < 0.2


def test_what_is_compared():
    truth = torch.randn(2, 3, 5, generator=torch.Generator().manual_seed(0))
    ids = torch.tensor([[1, 2, 3], [4, 0, 1]])
    same = study.compare(truth + 7, truth, ids)
    assert same["error"] < 1e-6 and abs(same["kl"]) < 1e-6 and same["same"] == 1
    want = torch.nn.functional.cross_entropy(truth[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    assert same["nats"] == pytest.approx(want.item())
    other = study.compare(truth.flip(-1), truth, ids)
    assert other["kl"] > 0.1 and other["same"] < 1 and other["error"] > 0.5


def test_page():
    page = study.PAGE_OF_RESULTS.read_text()
    assert study.table(json.loads(study.RESULTS.read_text())) == cut(page, "study_cache")[1]
