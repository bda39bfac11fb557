"""Group-limited sigmoid routing.

s = sigmoid(logits) and b = s + bias. A group of E / num_groups experts scores the sum of its two largest b; the
group_topk best groups stay; of their experts the topk with the largest b are chosen, in that order. The lowest index
wins ties at both levels. weight = s[expert] / (sum + 1e-20) * scale: the bias selects and does not weigh.
z_loss = coefficient * mean(logsumexp(logits)^2). Source: Ling 2.0, arXiv 2510.22115, and its published model code.
"""

import torch
from torch import Tensor

from ..backend import _C, backend
from ..op import expect, op, wide

KERNEL = (256, 8, 4, 8)  # experts, groups, groups kept, experts kept: what the CUDA kernel is made for


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
    fits = E > 0 and bias.shape == (E,) and logits.dtype == bias.dtype
    expect(fits and logits.dtype in (torch.float32, torch.float64), "logits [T, E] and bias [E], fp32", logits, bias)
    expect(mask is None or (mask.shape == (T,) and mask.dtype == torch.bool), "mask [T] bool", mask)
    per_group = E // max(num_groups, 1)
    expect(num_groups >= 1 and E % num_groups == 0 and 1 <= group_topk <= num_groups
           and 1 <= topk <= group_topk * per_group,
           "num_groups that divides E, group_topk <= num_groups, topk <= group_topk * E / num_groups",
           E, num_groups, group_topk, topk)  # fmt: skip
    fits = mask is None and (E, num_groups, group_topk, topk) == KERNEL and logits.dtype == torch.float32
    if backend(logits) != "cuda" or not fits:
        return route_ref(logits, bias, mask, num_groups, group_topk, topk, scale, z_loss)
    routed = Route.apply(logits, bias, scale)
    return routed if z_loss is None else (*routed, mean_square_lse(logits, None, z_loss))


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
    routed = weights, experts, counts
    return routed if z_loss is None else (*routed, mean_square_lse(logits, mask, z_loss))


def mean_square_lse(logits: Tensor, mask: Tensor | None, coefficient: float) -> Tensor:
    """The z-loss; 0 where no token counts."""
    squares = logits.logsumexp(-1).square()
    if mask is None:
        return coefficient * squares.sum() / max(len(logits), 1)
    return coefficient * squares.masked_fill(~mask, 0).sum() / mask.sum().clamp(min=1)


def lowest_first(x: Tensor, k: int) -> Tensor:
    """Indices of the k largest of each row in descending order; the lowest index wins ties (topk promises nothing)."""
    return x.sort(dim=-1, descending=True, stable=True).indices[..., :k]


class Route(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits, bias, scale):
        weights = logits.new_empty(len(logits), KERNEL[-1])
        experts = torch.empty_like(weights, dtype=torch.int32)
        counts = experts.new_zeros(logits.shape[1])
        route_fwd(logits, bias, experts, weights, counts, scale)
        ctx.save_for_backward(logits, experts)
        ctx.mark_non_differentiable(experts, counts)
        ctx.scale = scale
        return weights, experts, counts

    @staticmethod
    def backward(ctx, dweights, *_):
        # With z = sum + 1e-20:  ds = scale / z * (dw - sum(s * dw) / z),  dlogits = ds * s * (1 - s)
        logits, experts = ctx.saved_tensors
        experts = experts.long()
        s = logits.gather(1, experts).sigmoid()
        z = s.sum(-1, keepdim=True) + 1e-20
        ds = ctx.scale / z * (dweights - (s * dweights).sum(-1, keepdim=True) / z)
        return torch.zeros_like(logits).scatter_(1, experts, ds * s * (1 - s)), None, None


@op("experts", "weights", "counts")
def route_fwd(logits: Tensor, bias: Tensor, experts: Tensor, weights: Tensor, counts: Tensor, scale: float) -> None:
    """counts are added to."""
    _C.route(rows_of_16_bytes(logits), rows_of_16_bytes(bias), experts, weights, counts, scale)


def rows_of_16_bytes(x: Tensor) -> Tensor:
    """x, or a copy where its rows do not start at multiples of 16 bytes, which the kernel reads at once."""
    fits = x.stride(-1) == 1 and x.data_ptr() % 16 == 0 and (x.ndim == 1 or x.stride(0) % 4 == 0)
    return x if fits else x.clone(memory_format=torch.contiguous_format)
