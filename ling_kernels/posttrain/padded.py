"""policy_loss for trainers with padded rows, [B, L] instead of one response after the other."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..errors import InputError
from ..tokenizer import Tokenizer
from .policy import METHODS, PolicyLoss, policy_loss
from .sentences import sentence_lengths

# The averages of policy_loss by verl's names.
VERLS_AVERAGES = {"token-mean": "tokens", "seq-mean-token-mean": "responses"}


def padded_policy_loss(
    logp: Tensor,
    old_logp: Tensor,
    advantages: Tensor,
    mask: Tensor,
    *,
    sentence_numbers: Tensor | None = None,
    token_weights: Tensor | None = None,
    reference_logp: Tensor | None = None,
    total: float | Tensor | None = None,
    average: str = "tokens",
    **options: Any,
) -> PolicyLoss:
    """`policy_loss` of B responses, one in each row, of the tokens where mask is not 0; the others may hold anything.

    logp, old_logp, token_weights, reference_logp, mask [B, L]. advantages [B], or [B, L] with one number in each row.
    sentence_numbers [B, L] int64, of each token's sentence in its row (`sentence_numbers` gives them). total: what the
    sum over tokens (average="tokens") or over responses ("responses") is divided by, where these rows are a part of a
    batch; default the tokens and the rows here. options: of `policy_loss`. Raises InputError for what does not fit.
    """
    check_rows(logp, dict(old_logp=old_logp, mask=mask, sentence_numbers=sentence_numbers,
                          token_weights=token_weights, reference_logp=reference_logp))  # fmt: skip
    kept = mask.bool()
    lengths = kept.sum(1)
    rows = dict(token_weights=token_weights, reference_logp=reference_logp)
    out = policy_loss(
        logp[kept], old_logp[kept], one_for_each_row(advantages, kept), lengths, average=average,
        sentences=None if sentence_numbers is None else runs(sentence_numbers, kept),
        **{name: None if t is None else t[kept] for name, t in rows.items()}, **options,
    )  # fmt: skip
    if total is None:
        return out
    here = lengths.sum() if average == "tokens" else len(lengths)
    return out._replace(loss=out.loss * (here / total))


def sentence_numbers(tokenizer: Tokenizer, ids: Tensor, mask: Tensor) -> Tensor:
    """ids, mask [B, L] -> [B, L] int64: in each row the number of each token's sentence, from 0; 0 where mask is 0."""
    numbers = torch.zeros_like(ids, dtype=torch.int64)
    for row, kept, out in zip(ids, mask.bool(), numbers, strict=True):
        lengths = torch.tensor(sentence_lengths(tokenizer, row[kept].tolist()), dtype=torch.int64)
        out[kept] = torch.repeat_interleave(torch.arange(len(lengths)), lengths).to(out.device)
    return numbers


def verl_policy_loss(method: str) -> Callable[..., tuple[Tensor, dict[str, float]]]:
    """A method of METHODS but "lpo" as a function for verl's `register_policy_loss`: loss and metrics.

    loss_agg_mode is "token-mean" or "seq-mean-token-mean" and takes the place of the method's average. What the loss is
    divided by comes from config.global_batch_info, as verl sets it for a part of a batch. verl gives these functions no
    token ids, hence no sentences: for LPO call `padded_policy_loss` where the ids are. Raises InputError.
    """
    if method not in METHODS or METHODS[method]["level"] == "sentence":
        raise InputError(f"method is one of {', '.join(m for m in METHODS if m != 'lpo')}; not {method!r}")

    def loss(old_log_prob, log_prob, advantages, response_mask, loss_agg_mode="token-mean", config=None,
             rollout_is_weights=None):  # fmt: skip
        if loss_agg_mode not in VERLS_AVERAGES:
            raise InputError(f"loss_agg_mode is one of {', '.join(VERLS_AVERAGES)}; not {loss_agg_mode!r}")
        average, batch = VERLS_AVERAGES[loss_agg_mode], getattr(config, "global_batch_info", {})
        total = batch.get("batch_num_tokens" if average == "tokens" else "global_batch_size")
        if total is None and average == "responses":
            total = response_mask.any(1).sum().clamp(min=1)  # verl leaves out rows without tokens
        if total is not None:
            total = total / batch.get("dp_size", 1)
        out = padded_policy_loss(
            log_prob, old_log_prob, advantages, response_mask, token_weights=rollout_is_weights, total=total,
            **METHODS[method] | dict(average=average),
        )  # fmt: skip
        return out.loss, {"actor/pg_clipfrac": out.clipped.item(), "actor/ratio": out.ratio.item()}

    return loss


def one_for_each_row(advantages: Tensor, kept: Tensor) -> Tensor:
    """advantages [B] or [B, L] -> [B]. A row without tokens has 0."""
    if advantages.ndim == 1:
        return advantages
    check_rows(kept, dict(advantages=advantages))
    first = advantages.masked_fill(~kept, 0).gather(1, kept.int().argmax(1, keepdim=True))
    if ((advantages != first) & kept).any():
        raise InputError("advantages differ within a response: all its tokens have one")
    return first[:, 0]


def runs(numbers: Tensor, kept: Tensor) -> Tensor:
    """Lengths of the runs of one number, in each row, over the kept tokens."""
    row = torch.arange(len(numbers), device=numbers.device)[:, None].expand_as(numbers)
    row, numbers = row[kept], numbers[kept]
    begins = numbers.new_ones(len(numbers) + 1, dtype=torch.bool)  # and the end
    begins[1:-1] = (row[1:] != row[:-1]) | (numbers[1:] != numbers[:-1])
    return begins.nonzero()[:, 0].diff()


def check_rows(of: Tensor, given: dict[str, Tensor | None]) -> None:
    if of.ndim != 2:
        raise InputError(f"rows are [B, L]; got {[*of.shape]}")
    for name, t in given.items():
        if t is not None and t.shape != of.shape:
            raise InputError(f"{name} has shape {[*t.shape]}, not {[*of.shape]}")
