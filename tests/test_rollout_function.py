"""The engine as the rollout of other trainers, in the shape of TRL's rollout_func; TRL itself: tests/integrations."""

import copy
from types import SimpleNamespace

import pytest
import torch

from ling_kernels.errors import InputError
from ling_kernels.generate import Engine
from ling_kernels.model import Ling, LingConfig
from ling_kernels.model.checkpoint import named_views
from ling_kernels.posttrain import Answer, RolloutFunction, answer_logp
from ling_kernels.tokenizer import Tokenizer


@pytest.fixture
def policy() -> Ling:
    m = Ling(LingConfig.tiny())
    m.init_weights(torch.Generator().manual_seed(3))
    return m


def trainer(step: int, temperature: float = 1.0) -> SimpleNamespace:
    return SimpleNamespace(args=SimpleNamespace(temperature=temperature), state=SimpleNamespace(global_step=step))


def test_answers_for_another_trainer(policy):
    """Weights come by official key, once for each step of the trainer."""
    engine = Engine(copy.deepcopy(policy), cache_tokens=4000, record_routing=True)
    call = RolloutFunction(engine, Tokenizer(), 6, seed=1, weights=lambda _: dict(named_views(policy)))
    prompts = ["one two", [dict(role="user", content="three")], "one two"]
    out = call(prompts, trainer(0))
    assert {*out} == {"prompt_ids", "completion_ids", "logprobs", "text", "policy_version", "routing"}
    assert all(len(column) == 3 for column in out.values()) and out["policy_version"] == [1] * 3
    assert out["prompt_ids"][0] == Tokenizer().encode("one two") and len(out["prompt_ids"][1]) > 20
    assert out["completion_ids"][0] != out["completion_ids"][2], "each answer has a seed of its own"
    for answer in zip(*(out[k] for k in ("prompt_ids", "completion_ids", "logprobs")), strict=True):
        want = answer_logp(policy, [Answer(*answer, "", 0)])
        torch.testing.assert_close(torch.tensor(answer[2]), want.detach(), rtol=1e-4, atol=1e-4)
    with torch.no_grad():
        policy.lm_head.weight.mul_(-1)
    assert call(prompts, trainer(0))["policy_version"] == [1] * 3
    assert call(prompts, trainer(1), samples=2)["policy_version"] == [2] * 6
    assert torch.equal(engine.model.lm_head.weight, policy.lm_head.weight)


def test_what_does_not_fit(policy):
    call = RolloutFunction(Engine(policy, cache_tokens=1000), Tokenizer(), 4)
    with pytest.raises(InputError, match="temperature is 0.7"):
        call(["a"], trainer(0, temperature=0.7))
    with pytest.raises(InputError, match="of another model: lm_head.weight differs"):
        call.engine.new_weights({k: t for k, t in named_views(policy) if k != "lm_head.weight"})
    assert "routing" not in call(["a"]) and call([]) == dict.fromkeys(call([]), [])
