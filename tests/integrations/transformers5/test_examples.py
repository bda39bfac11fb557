"""The scripts in examples/ that need transformers run, and what they show holds."""

import torch

from ling_kernels.model import load_model
from ling_kernels.nn import Router
from tests.test_examples import run


def test_huggingface_trainer(monkeypatch, tmp_path):
    """The loss falls, the routers' bias follows the load that they counted, and load_model reads what is saved."""
    monkeypatch.chdir(tmp_path)
    seen = run(monkeypatch, "huggingface_trainer")
    assert seen["losses"][-1] < seen["losses"][0] - 1 and seen["losses"][0] > 4  # 5.77 is a uniform guess among 320
    routers = [module for module in seen["model"].modules() if isinstance(module, Router)]
    assert routers and all(router.expert_bias.any() and not router.counts.any() for router in routers)
    seen["trainer"].save_model("saved")
    weights = load_model(tmp_path / "saved", dtype=torch.float32).word_embeddings.weight
    assert torch.equal(weights, seen["model"].model.word_embeddings.weight)


def test_transformers_moe(monkeypatch):
    seen = run(monkeypatch, "transformers_moe")
    blocks = [m for m in seen["model"].modules() if isinstance(m, seen["Block"])]
    assert len(blocks) == seen["replaced"] == 1
    assert blocks[0].moe.router.counts.sum() == seen["ids"].numel() * 2  # tokens x experts per token: it ran
    for before, after in zip(seen["before"], seen["after"], strict=True):
        assert before.abs().max() > 0.1
        torch.testing.assert_close(after, before, rtol=1e-4, atol=1e-5)
