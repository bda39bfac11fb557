"""The engine as the rollout of other trainers: the shape of TRL's rollout_func, and TRL's GRPOTrainer where it is."""

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


def test_it_is_trls_rollout_func(tmp_path, policy, monkeypatch):
    """GRPOTrainer trains a transformers model around the engine's own Ling; its log-probabilities are the engine's."""
    pytest.importorskip("trl")
    pytest.importorskip("datasets")
    from datasets import Dataset
    from transformers import GenerationMixin, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerFast
    from transformers.modeling_outputs import BaseModelOutput, CausalLMOutput
    from trl import GRPOConfig, GRPOTrainer

    class Config(PretrainedConfig):
        model_type = "ling_of_a_test"

    class Backbone(torch.nn.Module):
        def __init__(self, ling):
            super().__init__()
            self.ling = ling

        def forward(self, input_ids, attention_mask=None, **_):
            out = self.ling(input_ids, attention_mask=attention_mask, logits=False, output_hidden_states=True)
            return BaseModelOutput(last_hidden_state=out.hidden_states[len(self.ling.layers)])

    class Policy(PreTrainedModel, GenerationMixin):
        config_class, base_model_prefix = Config, "backbone"

        def __init__(self, config, ling=None):
            super().__init__(config)
            self.backbone = Backbone(ling)
            self.post_init()

        def _init_weights(self, module):
            pass

        def get_output_embeddings(self):
            return self.backbone.ling.lm_head

        def forward(self, input_ids, attention_mask=None, **_):
            h = self.backbone(input_ids, attention_mask).last_hidden_state
            return CausalLMOutput(logits=self.backbone.ling.lm_head(h))

    Tokenizer().save(tmp_path)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(tmp_path)
    engine = Engine(policy, cache_tokens=4000)
    call, seen = RolloutFunction(engine, Tokenizer(), 6, seed=1), []

    def recorded(prompts, trainer):
        seen.append(call(prompts, trainer))
        policy.train()
        return seen[-1]

    before = policy.lm_head.weight.detach().clone()
    args = GRPOConfig(
        str(tmp_path / "out"), per_device_train_batch_size=4, num_generations=4, max_steps=2, max_completion_length=6,
        temperature=1.0, use_cpu=True, report_to=[], bf16=False, learning_rate=1e-2, logging_steps=1,
        save_strategy="no", gradient_checkpointing=False, beta=0.0,
    )  # fmt: skip
    grpo = GRPOTrainer(
        Policy(Config(vocab_size=320), policy), args=args, processing_class=tokenizer, rollout_func=recorded,
        reward_funcs=lambda completions, **_: [float(len({*c})) for c in completions],
        train_dataset=Dataset.from_dict(dict(prompt=["one", "two", "three", "four"])),
    )  # fmt: skip
    grpo.train()
    assert [out["policy_version"] for out in seen] == [[1] * 4, [2] * 4]
    assert not torch.equal(policy.lm_head.weight, before)
    logs = [row for row in grpo.state.log_history if "reward" in row]
    assert len(logs) == 2 and logs[0]["reward"] > 0
