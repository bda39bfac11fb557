"""TRL's GRPOTrainer with the losses of ling_kernels.posttrain: LPO, whose ratio is a sentence's, beside the others."""

from typing import Any

import torch
from torch import Tensor

from ..errors import InputError
from ..posttrain.padded import padded_policy_loss, sentence_numbers
from ..posttrain.policy import METHODS
from ..tokenizer import Tokenizer
from .versions import require

GRPOTrainer: Any = require("trl", "trl", ">=1.16,<2").GRPOTrainer

# Settings of GRPOConfig that TRL's loss follows and this one does not, with the value that is their absence.
WITHOUT: dict[str, Any] = dict(
    delta=None, off_policy_mask_threshold=None, top_entropy_quantile=1.0, entropy_coef=0.0, use_adaptive_entropy=False,
    use_vllm=False,
)  # fmt: skip


class PolicyTrainer(GRPOTrainer):
    """GRPOTrainer whose loss is `policy_loss`. Arguments are GRPOTrainer's, by keyword, and two:

    method: grpo, dapo, gspo or lpo, as METHODS has them; its level, average and clip take the place of GRPOConfig's
    importance_sampling_level, loss_type and epsilon. tokenizer: ling_kernels' own, which splits sentences; for lpo.
    Raises InputError for settings of TRL's loss that this one does not have.
    """

    def __init__(self, *, method: str = "lpo", tokenizer: Tokenizer | None = None, **kwargs: Any):
        if method not in METHODS:
            raise InputError(f"method is one of {', '.join(METHODS)}; not {method!r}")
        if METHODS[method]["level"] == "sentence" and tokenizer is None:
            raise InputError(f"method {method} splits sentences, and needs tokenizer=")
        args = kwargs.get("args")
        for name, absent in WITHOUT.items():
            if (value := getattr(args, name, absent)) != absent:
                raise InputError(f"{name}={value!r}: the loss of PolicyTrainer does not have it")
        if args is not None and args.beta and args.use_bias_correction_kl:
            raise InputError(
                "beta needs use_bias_correction_kl=False: the loss of PolicyTrainer has no such correction"
            )
        super().__init__(**kwargs)
        if self.aux_loss_enabled:
            raise InputError("set router_aux_loss_coef=0.0: the loss of PolicyTrainer has no term of the router")
        self.method, self.sentence_tokenizer = METHODS[method], tokenizer

    def _compute_loss(self, model: Any, inputs: dict[str, Any]) -> Tensor:
        ids, mask = inputs["completion_ids"], inputs["completion_mask"]
        all_ids, all_mask = (torch.cat([inputs[f"prompt_{x}"], inputs[f"completion_{x}"]], 1) for x in ("ids", "mask"))
        logp = self._get_per_token_logps_and_entropies(model, all_ids, all_mask, ids.shape[1])[0]
        sentences = self.method["level"] == "sentence"
        out = padded_policy_loss(
            logp, inputs.get("old_per_token_logps", logp.detach()), inputs["advantages"],
            mask * inputs.get("tool_mask", 1),
            sentence_numbers=sentence_numbers(self.sentence_tokenizer, ids, mask) if sentences else None,
            reference_logp=inputs["ref_per_token_logps"] if self.beta else None, kl=self.beta,
            total=self.total(inputs), **self.method,
        )  # fmt: skip
        metrics = self._metrics["train" if self.model.training else "eval"]
        for name, value in {"clip_ratio/region_mean": out.clipped, "ratio": out.ratio, "kl": out.kl}.items():
            metrics[name].append(self.accelerator.gather(value).mean().item())
        return out.loss

    def total(self, inputs: dict[str, Any]) -> float | Tensor:
        """The tokens or responses of a step of the optimizer, of which these rows are a part, per process."""
        training = self.model.training
        parts = self.current_gradient_accumulation_steps if training else 1
        if self.method["average"] == "responses":
            return len(inputs["completion_ids"]) * parts
        generated = inputs["num_items_in_batch"].clamp(min=1) / self.accelerator.num_processes
        return generated * parts / self.args.steps_per_generation if training else generated
