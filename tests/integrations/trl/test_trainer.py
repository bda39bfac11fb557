"""TRL's GRPOTrainer on a transformers model around the engine's own Ling."""

import pytest
import torch
from datasets import Dataset
from transformers import GenerationMixin, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerFast
from transformers.modeling_outputs import BaseModelOutput, CausalLMOutput
from trl import GRPOConfig, GRPOTrainer

from ling_kernels.generate import Engine
from ling_kernels.model import Ling, LingConfig
from ling_kernels.posttrain import RolloutFunction
from ling_kernels.tokenizer import Tokenizer


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


@pytest.fixture
def ling() -> Ling:
    model = Ling(LingConfig.tiny())
    model.init_weights(torch.Generator().manual_seed(3))
    return model


class Rollout(RolloutFunction):
    """Keeps what it has returned."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.seen = []

    def __call__(self, prompts, trainer):
        self.seen.append(super().__call__(prompts, trainer))
        self.engine.model.train()
        return self.seen[-1]


def settings(folder, **changes) -> dict:
    """Arguments of a trainer, without model and rollout: four answers of six tokens to a prompt in each step."""
    Tokenizer().save(folder)
    args = GRPOConfig(
        str(folder / "out"), per_device_train_batch_size=4, num_generations=4, max_completion_length=6,
        temperature=1.0, use_cpu=True, report_to=[], bf16=False, learning_rate=1e-2, logging_steps=1,
        save_strategy="no", gradient_checkpointing=False, **dict(max_steps=2, beta=0.0) | changes,
    )  # fmt: skip
    return dict(
        args=args, processing_class=PreTrainedTokenizerFast.from_pretrained(folder),
        reward_funcs=lambda completions, **_: [float(len({*c})) for c in completions],
        train_dataset=Dataset.from_dict(dict(prompt=["one", "two", "three", "four"])),
    )  # fmt: skip


def test_rollout_function(tmp_path, ling):
    rollout = Rollout(Engine(ling, cache_tokens=4000), Tokenizer(), 6, seed=1)
    before = ling.lm_head.weight.detach().clone()
    grpo = GRPOTrainer(Policy(Config(vocab_size=320), ling), rollout_func=rollout, **settings(tmp_path))
    grpo.train()
    assert [out["policy_version"] for out in rollout.seen] == [[1] * 4, [2] * 4]
    assert not torch.equal(ling.lm_head.weight, before)
    logs = [row for row in grpo.state.log_history if "reward" in row]
    assert len(logs) == 2 and logs[0]["reward"] > 0
