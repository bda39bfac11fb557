"""The code of docs/posttraining.md for TRL, as it stands there."""

import re
from pathlib import Path

import torch

from ling_kernels.model import Ling, LingConfig, load_model, save_model
from ling_kernels.model.checkpoint import named_views
from ling_kernels.tokenizer import Tokenizer

PAGE = Path(__file__).parents[3] / "docs/posttraining.md"


def test_the_pages_code_runs(tmp_path, monkeypatch):
    """It trains, and what the engine is given are the trainer's weights."""
    (code,) = (block for block in re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL) if "trl" in block)
    monkeypatch.chdir(tmp_path)
    model = Ling(LingConfig.tiny())
    model.init_weights(torch.Generator().manual_seed(3))
    save_model(model, "runs/base/model")
    Tokenizer().save(Path("runs/base/model"))
    seen: dict = {}
    exec(code, seen)
    trainer, rollout = seen["trainer"], seen["rollout"]
    assert trainer.state.global_step == 2 and rollout.engine.policy_version == 2
    logs = [row for row in trainer.state.log_history if "reward" in row]
    assert len(logs) == 2
    assert all(row["reward_std"] > 0 for row in logs)
    rollout.engine.new_weights(rollout.weights(trainer))
    before, after = (load_model(f"runs/{run}/model", dtype=torch.float32) for run in ("base", "trl"))
    trained = dict(named_views(after))
    for key, weights in named_views(rollout.engine.model):
        torch.testing.assert_close(weights, trained[key], rtol=0, atol=0, msg=key)
    assert not torch.equal(before.lm_head.weight, after.lm_head.weight)
