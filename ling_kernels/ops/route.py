"""Group-limited sigmoid routing.

s = sigmoid(logits) and b = s + bias. A group of E / num_groups experts scores the sum of its two largest b; the
group_topk best groups stay; of their experts the topk with the largest b are chosen, in that order. The lowest index
wins ties at both levels. weight = s[expert] / (sum + 1e-20) * scale: the bias selects and does not weigh.
z_loss = coefficient * mean(logsumexp(logits)^2). Source: Ling 2.0, arXiv 2510.22115, and its published model code.
"""

import torch
from torch import Tensor

from ..op import expect, wide


def route(
    logits: Tensor,
    bias: Tensor,
    mask: Tensor | None = None,
    num_groups: int = 8,
    group_topk: int = 4,
    topk: int = 8,
    scale: float = 2.5,
    z_loss: float | None = None,
) -> tuple[Tensor, ...]:
    """logits [T, E] fp32, bias [E] fp32, mask [T] bool (False: a padding token, routed nowhere) ->

    weights [T, topk] fp32, experts [T, topk] int32, counts [E] int32, and, given a coefficient z_loss, that loss as a
    scalar. Masked tokens get expert -1 and weight 0, and neither the counts nor the loss see them. NaN logits still
    give topk distinct experts in range. Gradient: to logits, through weights and z_loss. Raises ValueError for shapes
    or sizes that do not fit.
    """
    T, E = logits.shape if logits.ndim == 2 else (0, 0)
    expect(E > 0 and bias.shape == (E,) and logits.dtype == bias.dtype == torch.float32,
           "logits [T, E] and bias [E], fp32", logits, bias)  # fmt: skip
    expect(mask is None or (mask.shape == (T,) and mask.dtype == torch.bool), "mask [T] bool", mask)
    per_group = E // max(num_groups, 1)
    expect(num_groups >= 1 and E % num_groups == 0 and 1 <= group_topk <= num_groups
           and 1 <= topk <= group_topk * per_group,
           "num_groups that divides E, group_topk <= num_groups, topk <= group_topk * E / num_groups",
           E, num_groups, group_topk, topk)  # fmt: skip
    return route_ref(logits, bias, mask, num_groups, group_topk, topk, scale, z_loss)


def route_ref(logits, bias, mask=None, num_groups=8, group_topk=4, topk=8, scale=2.5, z_loss=None):
    T, E = logits.shape
    logits = wide(logits)
    s = logits.sigmoid()
    with torch.no_grad():
        b = (s + bias).nan_to_num(nan=-1e30)  # a NaN loses against every number
        groups = b.view(T, num_groups, E // num_groups)
        group_score = groups.sort(-1, descending=True).values[..., :2].sum(-1)
        best = lowest_first(group_score, group_topk)
        keep = torch.zeros_like(group_score, dtype=torch.bool).scatter_(1, best, True)
        experts = lowest_first(groups.masked_fill(~keep[..., None], -torch.inf).flatten(1), topk)
    w = s.gather(1, experts)
    weights = w / (w.sum(-1, keepdim=True) + 1e-20) * scale
    experts = experts.int()
    if mask is not None:
        weights = weights.masked_fill(~mask[:, None], 0)
        experts = experts.masked_fill(~mask[:, None], -1)
    counts = torch.zeros(E + 1, dtype=torch.int32, device=logits.device)
    chosen = experts.flatten().long()
    counts = counts.index_add(0, chosen % (E + 1), torch.ones_like(chosen, dtype=torch.int32))[:E]  # -1 % (E+1) is E
    if z_loss is None:
        return weights, experts, counts
    squares = logits.logsumexp(-1).square()
    if mask is not None:
        squares = squares.masked_fill(~mask, 0)
    tokens = T if mask is None else mask.sum()
    return weights, experts, counts, z_loss * squares.sum() / torch.as_tensor(tokens, device=logits.device).clamp(min=1)


def lowest_first(x: Tensor, k: int) -> Tensor:
    """Indices of the k largest of each row in descending order; the lowest index wins ties, as topk does not promise."""
    return x.sort(dim=-1, descending=True, stable=True).indices[..., :k]
