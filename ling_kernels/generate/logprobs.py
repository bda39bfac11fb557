"""Log-probabilities of tokens under the model, before temperature, truncation and penalties."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..ops.cross_entropy import logsumexp

MOST = 20  # alternatives of a token; a pass computes as many for every row, so that its result has one shape


class TokenLogprob(NamedTuple):
    token: int
    logprob: float  # natural logarithm
    top: list[tuple[int, float]]  # the likeliest tokens at its position and theirs, the likeliest first


def score(logits: Tensor, tokens: Tensor) -> Tensor:
    """logits [R, V], tokens [R] int64, of which a negative one counts as 0 -> [R, 1 + 2 K] int64, K = min(20, V).

    A row has the log-probabilities of its token and of the K likeliest, as the bits of fp32, then those K tokens: so
    that tokens and scores of a pass go to the host in one copy.
    """
    logits = logits.float()
    best, top = logits.topk(min(MOST, logits.shape[1]), dim=-1)
    chosen = logits.gather(1, tokens.clamp(min=0)[:, None])
    logprobs = torch.cat([chosen, best], 1) - logsumexp(logits)[:, None]
    return torch.cat([logprobs.view(torch.int32).long(), top], 1)


def read_scores(scores: Tensor, tokens: Sequence[int], alternatives: int) -> list[TokenLogprob]:
    """The rows of `score`, on the host, of these tokens."""
    K = scores.shape[1] // 2
    logprobs, top = scores[:, : 1 + K].int().contiguous().view(torch.float32).tolist(), scores[:, 1 + K :].tolist()
    return [
        TokenLogprob(token, logprob, [*zip(ids, best, strict=True)][:alternatives])
        for token, (logprob, *best), ids in zip(tokens, logprobs, top, strict=True)
    ]
