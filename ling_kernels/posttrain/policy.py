"""Losses of reinforcement learning over the log-probabilities of tokens: one formula, with GRPO, LPO, GSPO as cases.

    J = sum over units u of  weight_u min(r_u A, clip(r_u, 1 - low, 1 + high) A),     loss = -J
    r_u = exp(mean over the tokens of u of log pi - log pi_old)

A unit is a token, a sentence or a whole response; A is the advantage of its response. Its weight is the number of its
tokens over those of all responses (average="tokens") or over those of its response and the number of responses
(average="responses"). A unit without tokens, and a response without any, counts for nothing.

    GRPO (arXiv 2402.03300)   level="token",    average="responses"
    DAPO (arXiv 2503.14476)   level="token",    average="tokens"
    GSPO (arXiv 2507.18071)   level="sequence", average="responses"
    LPO  (arXiv 2510.22115)   level="sentence", average="tokens", clip=0.03

In TRL `level` is importance_sampling_level, without "sentence"; average="responses" is loss_type "grpo", and "tokens"
is "dapo".

`logp` comes without logits of the whole batch in memory from ling_kernels.linear_cross_entropy:

    logp = -linear_cross_entropy(hidden, lm_head, targets, reduction="none")
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..errors import InputError
from ..op import upcast

LEVELS = ("token", "sentence", "sequence")
AVERAGES = ("tokens", "responses")
# Ranges of a token's probability in training over that in the rollout; `icepop` has their sources.
ICEPOP = {"ring": (0.5, 5.0), "narrow": (0.5, 2.0)}

# What policy_loss takes for each method of the table above; DAPO's and GSPO's clips are their papers'.
METHODS: dict[str, dict[str, Any]] = dict(
    grpo=dict(level="token", average="responses", clip=0.2),
    dapo=dict(level="token", average="tokens", clip=(0.2, 0.28)),
    gspo=dict(level="sequence", average="responses", clip=(3e-4, 4e-4)),
    lpo=dict(level="sentence", average="tokens", clip=0.03),
)


class PolicyLoss(NamedTuple):
    loss: Tensor  # scalar fp32, with the gradient
    clipped: Tensor  # share of the weight whose ratio is clipped, without gradient
    ratio: Tensor  # weighted mean of the ratios, without gradient
    kl: Tensor  # weighted mean of the tokens' divergence from the reference model; 0 without one


def policy_loss(
    logp: Tensor,
    old_logp: Tensor,
    advantages: Tensor,
    lengths: Tensor,
    level: str = "token",
    average: str = "tokens",
    clip: float | tuple[float, float] = 0.2,
    sentences: Tensor | None = None,
    token_weights: Tensor | None = None,
    reference_logp: Tensor | None = None,
    kl: float = 0.0,
) -> PolicyLoss:
    """The loss of n responses whose tokens lie one response after the other.

    logp, old_logp [T] fp32 (others are computed with in fp32): log-probabilities of the responses' tokens by the
    trained policy (with gradient) and by the one that wrote them. advantages [n], lengths [n] int64 with sum T.
    sentences [K] int64: lengths of the sentences, in order, none across two responses (`sentence_lengths` gives them);
    for level "sentence". clip: one width, or below and above. token_weights [T] >= 0 (`icepop` gives them): a token's
    share in the weight of its unit; one of 0 is left out, of its unit's ratio too. reference_logp [T] and kl: kl times
    the mean of exp(d) - d - 1, d = reference - logp, is added. Raises InputError for what does not fit.
    """
    low, high = widths(clip)
    check(logp, old_logp, advantages, lengths, level, average, sentences, token_weights, reference_logp, kl)
    logp, old_logp = upcast(logp), upcast(old_logp)
    tokens = torch.ones_like(logp) if token_weights is None else token_weights.detach().to(logp.dtype)
    owner = torch.repeat_interleave(torch.arange(len(lengths), device=logp.device), lengths, output_size=len(logp))
    weights = of_tokens = tokens * token_shares(tokens, owner, lengths, average)
    change = (logp - old_logp.detach()).masked_fill(tokens == 0, 0)
    if level != "token":
        units = lengths if level == "sequence" else sentences
        counted = sums((tokens > 0).to(logp.dtype), units)
        change = sums(change, units) / counted.clamp(min=1)
        first = units.cumsum(0) - units
        owner = torch.searchsorted(lengths.cumsum(0), first, right=True).clamp(max=len(lengths) - 1)
        weights = sums(of_tokens, units)
    ratio, advantage = change.exp(), advantages.detach().to(logp.dtype)[owner]
    clipped = ratio.detach().clamp(1 - low, 1 + high)
    cut = clipped * advantage < ratio.detach() * advantage
    # Where the ratio has no gradient it is left out of the graph: one that overflows would give 0 x inf.
    live = change.masked_fill(cut | (advantage == 0), 0).exp()
    loss = -(weights * (torch.where(cut, clipped, live) * advantage)).sum()
    with torch.no_grad():
        total = weights.sum().clamp(min=torch.finfo(weights.dtype).tiny)
        share = (weights * cut).sum() / total
        mean_ratio = (weights * ratio).sum() / total
    divergence = logp.new_zeros(())
    if reference_logp is not None:
        d = (reference_logp.detach() - logp).masked_fill(tokens == 0, 0)
        divergence = ((d.exp() - d - 1) * of_tokens).sum()
        loss = loss + kl * divergence
    return PolicyLoss(loss, share, mean_ratio, divergence.detach())


def token_shares(tokens: Tensor, of_response: Tensor, lengths: Tensor, average: str) -> Tensor:
    """What a token of weight 1 counts: 1 over all tokens, or over those of its response and the responses' number.

    Tokens of weight 0 are counted too: they are part of the batch, and leaving one out must not raise the others.
    """
    if average == "tokens":
        return torch.full_like(tokens, 1 / max(len(tokens), 1))
    return 1 / (lengths.clamp(min=1)[of_response].to(tokens.dtype) * max(len(lengths), 1))


def sums(x: Tensor, lengths: Tensor) -> Tensor:
    """x [T] -> its sums over neighbours, [len(lengths)]; in order, hence the same each time."""
    return torch.segment_reduce(x, "sum", lengths=lengths, initial=0) if len(lengths) else x[:0]


def icepop(train_logp: Tensor, rollout_logp: Tensor, limits: str | tuple[float, float] = "ring") -> Tensor:
    """Token weights against the mismatch of trainer and rollout engine: k inside the limits, otherwise 0.

    train_logp, rollout_logp [T] of the same policy and tokens by the two; k = exp(train - rollout). limits: below and
    above, or a name of ICEPOP. Without gradient. IcePop is of Ring-1T's report "Every Step Evolves", arXiv 2510.18855;
    "ring", 0.5 to 5, is what rllm gives as the paper's defaults (rllm-org/rllm, pull request 741), "narrow", 0.5 to 2,
    the default of arcee-ai/NeMo-RL (pull request 24).
    """
    if isinstance(limits, str) and limits not in ICEPOP:
        raise InputError(f"limits is one of {', '.join(ICEPOP)} or two numbers; not {limits!r}")
    low, high = ICEPOP[limits] if isinstance(limits, str) else icepop_limits(limits)
    check_tensors(train_logp, dict(train_logp=train_logp, rollout_logp=rollout_logp))
    if train_logp.shape != rollout_logp.shape:
        raise InputError(f"train_logp {[*train_logp.shape]} and rollout_logp {[*rollout_logp.shape]} are of one shape")
    k = (train_logp - rollout_logp).detach().exp()
    return torch.where((k >= low) & (k <= high), k, torch.zeros_like(k))


def icepop_limits(limits: Any) -> tuple[float, float]:
    pair = tuple(limits) if isinstance(limits, tuple | list) else ()
    if len(pair) != 2 or not all(isinstance(limit, int | float) for limit in pair) or not pair[0] <= pair[1]:
        raise InputError(f"limits are two numbers, below and above; not {limits!r}")
    return pair


def group_advantages(rewards: Tensor, eps: float = 1e-6) -> Tensor:
    """rewards [groups, G] -> (reward - mean) / std of each group, [groups, G] fp32; 0 where all rewards are equal, NaN
    where one is. std is that of the group itself: the mean is over G, not G - 1."""
    if not isinstance(rewards, Tensor):
        raise InputError(f"rewards are {type(rewards).__name__}, not a tensor")
    if rewards.ndim != 2 or rewards.shape[0] < 1 or rewards.shape[1] < 2:
        raise InputError(f"rewards [groups, G] with a group at least and G of at least 2; got {[*rewards.shape]}")
    rewards = rewards.double()  # in fp32 the mean of equal rewards may be another number than each
    centred = rewards - rewards.mean(1, keepdim=True)
    std = centred.square().mean(1, keepdim=True).sqrt()
    return torch.where(std <= eps, torch.zeros_like(centred), centred / std.clamp(min=eps)).float()


def widths(clip: Any) -> tuple[float, float]:
    """The widths of a clip, below and above 1."""
    pair = tuple(clip) if isinstance(clip, tuple | list) else (clip, clip)
    if len(pair) != 2 or not all(isinstance(width, int | float) and width >= 0 for width in pair):  # NaN is not >= 0
        raise InputError(f"clip is a number of at least 0, or two of them; not {clip!r}")
    return pair


def check_tensors(logp: Any, given: dict[str, Any]) -> None:
    for name, t in given.items():
        if t is None and name in ("token_weights", "reference_logp", "sentences"):
            continue
        if not isinstance(t, Tensor):
            raise InputError(f"{name} is {type(t).__name__}, not a tensor")
        if t.device != logp.device:
            raise InputError(f"{name} is on {t.device}, logp on {logp.device}")


def check(logp, old_logp, advantages, lengths, level, average, sentences, token_weights, reference_logp, kl) -> None:
    if level not in LEVELS:
        raise InputError(f"level is one of {', '.join(LEVELS)}; not {level!r}")
    if average not in AVERAGES:
        raise InputError(f"average is one of {', '.join(AVERAGES)}; not {average!r}")
    rows = dict(logp=logp, old_logp=old_logp, token_weights=token_weights, reference_logp=reference_logp)
    check_tensors(logp, rows | dict(advantages=advantages, lengths=lengths, sentences=sentences))
    for name, t in rows.items():
        if t is not None and (t.ndim != 1 or t.shape != logp.shape):
            raise InputError(f"{name} has shape {[*t.shape]}; logp has {[*logp.shape]}, one number for each token")
        if t is not None and not t.is_floating_point():
            raise InputError(f"{name} is {t.dtype}, not of floating-point numbers")
    if lengths.ndim != 1 or advantages.shape != lengths.shape:
        raise InputError(f"advantages {[*advantages.shape]} and lengths {[*lengths.shape]} are one for each response")
    if (sentences is None) != (level != "sentence"):
        raise InputError("level 'sentence', and it alone, takes sentences")
    if not isinstance(kl, int | float) or not 0 <= kl < float("inf"):
        raise InputError(f"kl is a number of at least 0; not {kl!r}")
    if (reference_logp is None) != (kl == 0):
        raise InputError("kl and reference_logp go together")
    for name, of in (("lengths", lengths), ("sentences", sentences)):
        if of is None:
            continue
        if of.ndim != 1:
            raise InputError(f"{name} have shape {[*of.shape]}, not one dimension")
        if of.dtype not in (torch.int64, torch.int32):
            raise InputError(f"{name} are {of.dtype}, not int64")
        if of.device.type == "cpu" and (of < 0).any():
            raise InputError(f"{name} have {int(of.min())}, which is below 0")
        if of.device.type == "cpu" and int(of.sum()) != len(logp):
            raise InputError(f"{name} add up to {int(of.sum())}, and there are {len(logp)} tokens")
    if logp.device.type == "cpu":  # elsewhere the host would wait for the values
        if not advantages.isfinite().all():
            raise InputError(f"advantages have {advantages[~advantages.isfinite()][0].item()}: is a reward not finite?")
        if token_weights is not None and not ((token_weights >= 0) & token_weights.isfinite()).all():
            raise InputError("token_weights have a number that is negative or not finite")
    if sentences is not None and sentences.device.type == "cpu":
        ends = set(sentences.cumsum(0).tolist())
        if crossed := [e for e in lengths.cumsum(0).tolist() if e and e not in ends]:
            raise InputError(f"a sentence crosses the end of a response, at token {crossed[0]}")
