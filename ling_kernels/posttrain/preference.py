"""Direct preference optimisation (DPO, arXiv 2305.18290): of two responses to a prompt the chosen one becomes likelier.

    loss = mean over pairs of -log sigmoid(m),    m = beta ((log pi - log ref)(chosen) - (log pi - log ref)(rejected))

where log pi of a response is the sum over its tokens. With label smoothing e the term of a pair is
-(1 - e) log sigmoid(m) - e log sigmoid(-m), conservative DPO. The log-probabilities come from `answer_logp`, or from
linear_cross_entropy(..., reduction="none").
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from ..errors import InputError
from ..op import upcast
from .policy import check_tensors, sums


class PreferenceLoss(NamedTuple):
    loss: Tensor  # scalar fp32, with the gradient
    margin: Tensor  # mean of m, without gradient
    accuracy: Tensor  # share of the pairs with m above 0, without gradient


def preference_loss(
    logp: Tensor, reference_logp: Tensor, lengths: Tensor, beta: float = 0.1, label_smoothing: float = 0.0
) -> PreferenceLoss:
    """The loss of n pairs, whose 2 n responses lie one after the other, in each pair the chosen one first.

    logp, reference_logp [T] fp32 (others are computed with in fp32): log-probabilities of the responses' tokens by the
    trained policy (with gradient) and by the reference model. lengths [2 n] int64 with sum T. Raises InputError for
    what does not fit.
    """
    check_tensors(logp, dict(logp=logp, reference_logp=reference_logp, lengths=lengths))
    if logp.ndim != 1 or logp.shape != reference_logp.shape:
        raise InputError(f"logp {[*logp.shape]} and reference_logp {[*reference_logp.shape]} are one for each token")
    if lengths.ndim != 1 or not len(lengths) or len(lengths) % 2 or lengths.dtype not in (torch.int64, torch.int32):
        raise InputError(f"lengths [2 n] int64, a chosen and a rejected response of each pair; got {lengths.tolist()}")
    if lengths.device.type == "cpu" and (int(lengths.sum()) != len(logp) or int(lengths.min()) < 0):
        raise InputError(f"lengths {lengths.tolist()} are not those of {len(logp)} tokens")
    if not all(isinstance(x, int | float) for x in (beta, label_smoothing)) or not (
        0 < beta < math.inf and 0 <= label_smoothing < 0.5
    ):
        raise InputError(f"beta is above 0 and label_smoothing from 0 to below 0.5; got {beta} and {label_smoothing}")
    chosen, rejected = sums(upcast(logp) - upcast(reference_logp).detach(), lengths).view(-1, 2).unbind(1)
    m = beta * (chosen - rejected)
    loss = -((1 - label_smoothing) * logsigmoid(m) + label_smoothing * logsigmoid(-m)).mean()
    margin = m.detach()
    return PreferenceLoss(loss, margin.mean(), (margin > 0).to(m.dtype).mean())
