"""Policy and preference losses beside those of TRL's trainers: TRL's own methods, on random log-probabilities."""

from collections import defaultdict
from types import SimpleNamespace

import pytest
import torch
from trl import DPOTrainer, GRPOTrainer

from ling_kernels.posttrain import METHODS, policy_loss, preference_loss

LENGTHS = [5, 1, 7, 3]
MASK = torch.arange(7) < torch.tensor(LENGTHS)[:, None]  # [4, 7]


def numbers(seed: int, scale: float) -> torch.Tensor:
    return scale * torch.randn(MASK.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.fixture
def batch() -> dict:
    """Padded [4, 7]: log-probabilities by the policy, by the one that wrote the tokens and by a reference."""
    old = -1 - numbers(0, 1).abs()
    return dict(
        logp=(old + numbers(15, 0.6)).requires_grad_(), old=old, reference=old + numbers(1, 0.2),
        advantages=torch.tensor([1.3, -0.7, 0.4, -1.1], dtype=torch.float64),
    )  # fmt: skip


def one_process() -> SimpleNamespace:
    same = lambda x, **_: x  # noqa: E731
    return SimpleNamespace(gather=same, gather_for_metrics=same, reduce=same, num_processes=1, device="cpu")


def trls_grpo(batch: dict, level: str, loss_type: str, clip: tuple[float, float], beta: float) -> torch.Tensor:
    trainer = SimpleNamespace(
        _get_per_token_logps_and_entropies=lambda *_, **__: (batch["logp"], torch.zeros_like(batch["logp"]), None),
        importance_sampling_level=level, loss_type=loss_type, epsilon_low=clip[0], epsilon_high=clip[1], beta=beta,
        args=SimpleNamespace(delta=None, use_bias_correction_kl=False, steps_per_generation=1),
        top_entropy_quantile=1.0, off_policy_mask_threshold=None, use_vllm=False, aux_loss_enabled=False,
        _entropy_bonus_enabled=False, model=SimpleNamespace(training=True), current_gradient_accumulation_steps=1,
        accelerator=one_process(), _metrics=dict(train=defaultdict(list)),
    )  # fmt: skip
    ids = torch.zeros(MASK.shape, dtype=torch.int64)
    inputs = dict(
        prompt_ids=ids[:, :1], prompt_mask=ids[:, :1] + 1, completion_ids=ids, completion_mask=MASK.long(),
        advantages=batch["advantages"], old_per_token_logps=batch["old"], ref_per_token_logps=batch["reference"],
        num_items_in_batch=MASK.sum(),
    )  # fmt: skip
    loss = GRPOTrainer._compute_loss(trainer, None, inputs)
    assert trainer._metrics["train"]["clip_ratio/region_mean"][0] > 0, "nothing is clipped"
    return loss


def both_widths(clip: float | tuple[float, float]) -> tuple[float, float]:
    return clip if isinstance(clip, tuple) else (clip, clip)


@pytest.mark.parametrize("beta", [0.0, 0.3])
@pytest.mark.parametrize("method, loss_type", [("grpo", "grpo"), ("dapo", "dapo"), ("gspo", "grpo")])
def test_policy_losses(batch, method, loss_type, beta):
    ours = METHODS[method]
    want = trls_grpo(batch, ours["level"], loss_type, both_widths(ours["clip"]), beta)
    logp, old, reference = (batch[name][MASK] for name in ("logp", "old", "reference"))
    divergence = dict(reference_logp=reference, kl=beta) if beta else {}
    got = policy_loss(logp, old, batch["advantages"], torch.tensor(LENGTHS), **ours, **divergence).loss
    torch.testing.assert_close(got, want)
    gradients = [torch.autograd.grad(loss, batch["logp"])[0] for loss in (got, want)]
    assert gradients[1].count_nonzero() > 0
    torch.testing.assert_close(*gradients)


def trls_dpo(batch: dict, beta: float) -> torch.Tensor:
    """Rows 0 and 1 are the chosen answers, 2 and 3 the rejected ones. TRL's models return 0 where there is no label."""

    def model_of(logp):
        rest = dict(entropy=torch.zeros(MASK.shape), mean_logits=torch.zeros(MASK.shape))
        return lambda **_: SimpleNamespace(log_probs=logp * MASK, is_top1=torch.zeros_like(MASK), **rest)

    trainer = SimpleNamespace(
        model=SimpleNamespace(training=True, is_gradient_checkpointing=False), ref_model=model_of(batch["reference"]),
        args=SimpleNamespace(gradient_checkpointing_kwargs=None), accelerator=one_process(), aux_loss_enabled=False,
        ld_alpha=None, precompute_ref_logps=False, f_divergence_type="reverse_kl", beta=beta, use_weighting=False,
        loss_types=["sigmoid"], loss_weights=[1.0], _tp_size=1,
        label_smoothing=0.0, _metrics=dict(train=defaultdict(list)), _total_train_tokens=0,
    )  # fmt: skip
    completion = torch.nn.functional.pad(MASK, (1, 0)).long()  # a prompt of one token before each
    ids = torch.zeros_like(completion)
    inputs = dict(input_ids=ids, attention_mask=ids + 1, completion_mask=completion)
    return DPOTrainer._compute_loss(trainer, model_of(batch["logp"]), inputs, False)


def test_preference_loss(batch):
    want = trls_dpo(batch, 0.4)
    pairs = [0, 2, 1, 3]  # ours has the rejected answer after each chosen one
    logp, reference = (batch[name][pairs][MASK[pairs]] for name in ("logp", "reference"))
    got = preference_loss(logp, reference, torch.tensor(LENGTHS)[pairs], beta=0.4).loss
    torch.testing.assert_close(got, want)
    gradients = [torch.autograd.grad(loss, batch["logp"])[0] for loss in (got, want)]
    assert gradients[1].count_nonzero() == MASK.sum()
    torch.testing.assert_close(*gradients)
