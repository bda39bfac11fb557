"""TRL's GRPOTrainer on a transformers model around the engine's own Ling."""

import pytest
import torch
from datasets import Dataset
from transformers import GenerationMixin, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerFast
from transformers.modeling_outputs import BaseModelOutput, CausalLMOutput
from trl import GRPOConfig, GRPOTrainer

from ling_kernels.errors import InputError
from ling_kernels.generate import Engine
from ling_kernels.integrations.trl import PolicyTrainer
from ling_kernels.model import Ling, LingConfig
from ling_kernels.posttrain import METHODS, RolloutFunction, policy_loss, sentence_lengths
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


def inputs_of_a_step() -> dict:
    """What a trainer's loss is called with: answers of one to eight tokens, by a policy a little different."""
    texts = ["No. Yes!", "a; b", "One", "x. y. z."]
    ids = torch.full((4, 8), 46)  # a full stop, in the padding too
    mask = torch.zeros(4, 8, dtype=torch.int64)
    for i, text in enumerate(texts):
        answer = Tokenizer().encode(text)
        ids[i, : len(answer)], mask[i, : len(answer)] = torch.tensor(answer), 1
    noise = torch.randn(4, 8, generator=torch.Generator().manual_seed(15))
    return dict(
        prompt_ids=torch.full((4, 2), 72), prompt_mask=torch.ones(4, 2, dtype=torch.int64), completion_ids=ids,
        completion_mask=mask, advantages=torch.tensor([1.3, -0.7, 0.4, -1.1]), noise=0.5 * noise,
        num_items_in_batch=3 * mask.sum(),
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


@pytest.mark.parametrize("beta", [0.0, 0.3])
@pytest.mark.parametrize("method", METHODS)
def test_losses_of_a_step(tmp_path, ling, method, beta):
    """TRL's own loss by its settings; LPO's, which TRL has not, of the packed tokens. As one of two parts of a step."""
    ours = METHODS[method]
    clip = ours["clip"] if isinstance(ours["clip"], tuple) else (ours["clip"],) * 2
    arguments = settings(
        tmp_path, use_bias_correction_kl=False, gradient_accumulation_steps=2, steps_per_generation=4,
        epsilon=clip[0], epsilon_high=clip[1], loss_type="dapo" if ours["average"] == "tokens" else "grpo",
        importance_sampling_level="token" if method == "lpo" else ours["level"],
    )  # fmt: skip
    model = Policy(Config(vocab_size=320), ling).train()
    trainer = PolicyTrainer(model=model, method=method, tokenizer=Tokenizer(), **arguments)
    trainer.current_gradient_accumulation_steps = 2
    trainer.beta = beta  # in the settings it would have TRL load the reference model from a folder
    step, kept = inputs_of_a_step(), inputs_of_a_step()["completion_mask"].bool()
    with torch.no_grad():
        ids, mask = (torch.cat([step[f"prompt_{x}"], step[f"completion_{x}"]], 1) for x in ("ids", "mask"))
        logp = trainer._get_per_token_logps_and_entropies(model, ids, mask, 8)[0]
    step |= dict(old_per_token_logps=logp - step["noise"], ref_per_token_logps=logp + step["noise"].flip(0))
    got = trainer._compute_loss(model, step)
    if method != "lpo":
        want = GRPOTrainer._compute_loss(trainer, model, step)
    else:
        texts = [row[k].tolist() for row, k in zip(step["completion_ids"], kept, strict=True)]
        lengths = [sentence_lengths(Tokenizer(), text) for text in texts]
        assert [len(n) for n in lengths] == [2, 2, 1, 3]
        logp = trainer._get_per_token_logps_and_entropies(model, ids, mask, 8)[0]
        divergence = dict(reference_logp=step["ref_per_token_logps"][kept], kl=beta) if beta else {}
        want = policy_loss(
            logp[kept], step["old_per_token_logps"][kept], step["advantages"], kept.sum(1),
            sentences=torch.tensor(sum(lengths, [])), **ours, **divergence,
        ).loss * (2 / 3)  # fmt: skip  # its tokens are a third of four parts' tokens, and two parts are a step
    torch.testing.assert_close(got, want)
    of = [p for p in model.parameters() if p.requires_grad]
    gradients = [torch.autograd.grad(loss, of, allow_unused=True) for loss in (got, want)]
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)
    assert max(g.abs().max() for g in gradients[1] if g is not None) > 1e-3
    share = trainer._metrics["train"]["clip_ratio/region_mean"]
    assert 0 < share[0] < 1 and (method != "dapo" or share[0] == pytest.approx(share[1]))


def test_a_training_with_lpo(tmp_path, ling):
    """Answers by the engine, each step of them used twice, so that the ratios of sentences differ from 1."""
    rollout = Rollout(Engine(ling, cache_tokens=4000), Tokenizer(), 6, seed=1)
    before = ling.lm_head.weight.detach().clone()
    trainer = PolicyTrainer(
        model=Policy(Config(vocab_size=320), ling), rollout_func=rollout, tokenizer=Tokenizer(),
        **settings(tmp_path, max_steps=4, num_iterations=2),
    )  # fmt: skip
    trainer.train()
    assert [out["policy_version"] for out in rollout.seen] == [[1] * 4, [2] * 4]
    assert not torch.equal(ling.lm_head.weight, before)
    ratios = [row["ratio"] for row in trainer.state.log_history if "ratio" in row]
    assert ratios[0] == ratios[2] == 1 and ratios[1] != 1 != ratios[3]


def test_what_does_not_fit(tmp_path, ling):
    with pytest.raises(InputError, match="method lpo splits sentences, and needs tokenizer="):
        PolicyTrainer()
    with pytest.raises(InputError, match="method is one of grpo, dapo, gspo, lpo; not 'ppo'"):
        PolicyTrainer(method="ppo")
    model = Policy(Config(vocab_size=320), ling)
    for name, value in dict(top_entropy_quantile=0.5, delta=2.0, entropy_coef=0.1).items():
        with pytest.raises(InputError, match=f"{name}={value}"):
            PolicyTrainer(model=model, method="gspo", **settings(tmp_path, **{name: value}))
    with pytest.raises(InputError, match="beta needs use_bias_correction_kl=False"):
        PolicyTrainer(model=model, method="gspo", **settings(tmp_path, beta=0.1))
    model = Policy(Config(vocab_size=320, output_router_logits=False, router_aux_loss_coef=0.1), ling)
    with pytest.raises(InputError, match="set router_aux_loss_coef=0.0"):
        PolicyTrainer(model=model, method="gspo", **settings(tmp_path))
