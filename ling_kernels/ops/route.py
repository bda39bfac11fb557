"""Group-limited routing.

s = score(logits), the score function (`scores`: sigmoid), and b = s + bias. A group of E / num_groups experts scores
the sum of its two largest b; the group_topk best groups stay; of their experts the topk with the largest b are chosen,
in that order. The lowest index wins ties at both levels. weight = s[expert] / (sum + 1e-20) * scale: the bias selects
and does not weigh. With topk = 1 the published gate does not divide, or the weight would always be scale:
weight = s[expert] * scale.
z_loss = coefficient * mean(logsumexp(logits)^2). Source: Ling 2.0, arXiv 2510.22115, and its published model code.
"""

import torch
from torch import Tensor

from ..op import expect, first_derivative_only, op, rows_aligned, upcast, use_reference, values_on_host
from .route_kernels import route_bwd_kernel, route_forced_kernel, route_kernel
from .triton_import import triton

SIZES = {(256, 8, 4, 8), (16, 4, 2, 4)}  # (E, num_groups, group_topk, topk) that csrc/ is compiled for


def route(
    logits: Tensor,
    bias: Tensor,
    mask: Tensor | None = None,
    num_groups: int = 1,
    group_topk: int = 1,
    topk: int = 8,
    scale: float = 1.0,
    z_loss: float | None = None,
    experts: Tensor | None = None,
) -> tuple[Tensor, ...]:
    """logits [T, E] fp32, bias [E] fp32, mask [T] bool (False: a padding token, routed nowhere) ->

    weights [T, topk] fp32, experts [T, topk] int32, counts [E] int32, and, given a coefficient z_loss, that loss as a
    scalar. Masked tokens get expert -1, weight 0 and gradient 0, whatever their logits; neither the counts nor the loss
    see them. NaN logits still give topk distinct experts in range. Gradient: to logits, through weights and z_loss.
    experts [T, topk] int32 forces the choice, as when a rollout's routing is replayed: weights are those of the given
    experts from these logits, bias and groups decide nothing. A row is distinct experts, or all -1 for a padding token.
    Without a mask the tensor given is itself the one returned, not a copy.
    Raises ValueError for shapes or sizes that do not fit.
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
    if experts is not None:
        fits = isinstance(experts, Tensor) and experts.shape == (T, topk) and experts.dtype == torch.int32
        expect(fits, "experts [T, topk] int32", experts, logits, topk)
        if values_on_host(experts):
            expect(valid_choices(experts, E), f"rows of distinct experts from 0 to {E - 1}, or of -1 alone", experts)
    if use_reference("route", logits):
        return route_ref(logits, bias, mask, num_groups, group_topk, topk, scale, z_loss, experts)
    if experts is None:
        *routed, lse = Route.apply(logits, bias, mask, num_groups, group_topk, topk, scale, z_loss is not None)
    else:
        experts = experts if mask is None else experts.masked_fill(~mask[:, None], -1)
        weights, counts, lse = RouteForced.apply(logits, experts, scale, z_loss is not None)
        routed = weights, experts, counts
    if z_loss is None:
        return tuple(routed)
    tokens = max(T, 1) if mask is None and experts is None else (routed[1][:, 0] >= 0).sum().clamp(min=1)
    return *routed, z_loss * lse.square().sum() / tokens


def valid_choices(experts: Tensor, E: int) -> bool:
    """Whether each row has distinct experts below E, or -1 alone."""
    lowest, highest = experts.amin(1), experts.amax(1)
    ordered = experts.sort(1).values
    distinct = (ordered[:, 1:] != ordered[:, :-1]).all(1)
    return bool(torch.where(highest < 0, lowest == -1, (lowest >= 0) & (highest < E) & distinct).all())


def route_ref(logits, bias, mask=None, num_groups=1, group_topk=1, topk=8, scale=1.0, z_loss=None, experts=None):
    T, E = logits.shape
    padding = mask
    if experts is not None:
        mask = experts[:, 0] >= 0 if mask is None else mask & (experts[:, 0] >= 0)
    logits = upcast(logits)
    if mask is not None:  # before the formulas, in whose gradient 0 * NaN is NaN
        logits = logits.masked_fill(~mask[:, None], 0)
    if experts is None:
        experts = best_experts(scores(logits.detach()), bias, num_groups, group_topk, topk)
    if padding is not None:
        experts = experts.masked_fill(~padding[:, None], -1)
    # Scores of the chosen alone: a NaN that is not chosen has the gradient 0.
    w = scores(logits.gather(1, experts.clamp(min=0).long() if mask is not None else experts))
    slots = experts.flatten()
    if mask is not None:
        w = w.masked_fill(experts < 0, 0)
        slots = slots.long() % (E + 1)  # -1 % (E + 1) is E
    weights = weights_of(w, scale)
    counts = torch.zeros(E + 1, dtype=torch.int32, device=logits.device)
    counts = counts.index_add(0, slots, torch.ones_like(slots, dtype=torch.int32))[:E]
    out = weights, experts.int(), counts
    return out if z_loss is None else (*out, mean_square_lse(logits, experts[:, 0] >= 0, z_loss))


def scores(logits: Tensor) -> Tensor:
    """The score function, which is defined in three places: here, in route_kernels.py, and in csrc/moe/route.cuh."""
    return logits.sigmoid()


def weights_of(s: Tensor, scale: float) -> Tensor:
    """s [T, topk], the scores of the chosen experts -> their weights."""
    return s * scale if s.shape[1] == 1 else s / (s.sum(-1, keepdim=True) + 1e-20) * scale


@torch.no_grad()
def best_experts(s: Tensor, bias: Tensor, num_groups: int, group_topk: int, topk: int) -> Tensor:
    """s [T, E] scores -> experts [T, topk], the best first: of the group_topk groups whose two best sum highest."""
    T, E = s.shape
    b = (s + bias).nan_to_num(nan=-1e30)  # a NaN loses against every number
    if group_topk < num_groups:
        groups = b.view(T, num_groups, E // num_groups)
        group_score = groups.topk(min(2, E // num_groups)).values.sum(-1)
        losers = lowest_first(group_score, num_groups)[:, group_topk:, None]
        groups.scatter_(1, losers.expand(-1, -1, E // num_groups), -torch.inf)
    return lowest_first(b, topk)


def mean_square_lse(logits: Tensor, routed: Tensor, coefficient: float) -> Tensor:
    """The z-loss, over the tokens that are `routed` [T] bool; 0 where there is none."""
    squares = logits.logsumexp(-1).square()
    return coefficient * squares.masked_fill(~routed, 0).sum() / routed.sum().clamp(min=1)


def lowest_first(x: Tensor, k: int) -> Tensor:
    """Indices of the k largest of each row in descending order; the lowest index wins ties (topk promises nothing)."""
    return x.sort(dim=-1, descending=True, stable=True).indices[..., :k]


class Route(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits, bias, mask, num_groups, group_topk, topk, scale, with_lse):
        logits = logits if logits.stride(1) == 1 else logits.contiguous()
        weights = logits.new_empty(len(logits), topk)
        experts = torch.empty_like(weights, dtype=torch.int32)
        counts = experts.new_empty(logits.shape[1])
        lse = logits.new_empty(len(logits)) if with_lse else None
        bias, mask = bias.contiguous(), mask if mask is None else mask.contiguous().view(torch.uint8)
        route_fwd(logits, bias, mask, experts, weights, counts, lse, num_groups, group_topk, topk, scale)
        ctx.save_for_backward(logits, experts, lse)
        ctx.mark_non_differentiable(experts, counts)
        ctx.scale = scale
        return weights, experts, counts, lse

    @staticmethod
    @first_derivative_only
    def backward(ctx, dweights, dexperts, dcounts, dlse):
        return logits_gradient(ctx, dweights, dlse), *[None] * 7


class RouteForced(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits, experts, scale, with_lse):
        logits = logits if logits.stride(1) == 1 else logits.contiguous()
        experts = experts.contiguous()
        weights = logits.new_empty(experts.shape)
        counts = experts.new_empty(logits.shape[1])
        lse = logits.new_empty(len(logits)) if with_lse else None
        route_forced_fwd(logits, experts, weights, counts, lse, scale)
        ctx.save_for_backward(logits, experts, lse)
        ctx.mark_non_differentiable(counts)
        ctx.scale = scale
        return weights, counts, lse

    @staticmethod
    @first_derivative_only
    def backward(ctx, dweights, dcounts, dlse):
        return logits_gradient(ctx, dweights, dlse), None, None, None


def logits_gradient(ctx, dweights: Tensor, dlse: Tensor | None) -> Tensor:
    logits, experts, lse = ctx.saved_tensors
    dlogits = logits.new_empty(logits.shape)
    dlse = None if lse is None else dlse.contiguous()
    route_bwd(logits, experts, dweights.contiguous(), lse, dlse, dlogits, ctx.scale)
    return dlogits


def config() -> dict:
    """One warp per token, so that reductions need no barrier. Not measured. The same on H200 and H20: the kernel is
    bound by instructions, and SMs of both issue equally many.
    """
    return dict(BLOCK_T=1, num_warps=1)


def unsupported_size(num_experts: int, num_groups: int, group_topk: int, topk: int) -> str | None:
    if (num_experts, num_groups, group_topk, topk) in SIZES:
        return None
    return f"{num_experts} experts in {num_groups} groups, the best {topk} experts of {group_topk} groups"


def unsupported_fwd(logits, bias, mask, experts, weights, counts, lse, num_groups, group_topk, topk, scale):
    size = unsupported_size(logits.shape[1], num_groups, group_topk, topk)
    return size or (None if rows_aligned(logits, bias) else "logits whose rows do not start at multiples of 16 bytes")


@op("experts", "weights", "counts", "lse", cuda=unsupported_fwd)
def route_fwd(
    logits: Tensor,
    bias: Tensor,
    mask: Tensor | None,
    experts: Tensor,
    weights: Tensor,
    counts: Tensor,
    lse: Tensor | None,
    num_groups: int,
    group_topk: int,
    topk: int,
    scale: float,
) -> None:
    """mask [T] uint8; counts are zeroed first; lse [T] is the log-sum-exp of logits, 0 for masked tokens."""
    T, E = logits.shape
    counts.zero_()
    chosen = config()
    if T:
        route_kernel[(triton.cdiv(T, chosen["BLOCK_T"]),)](
            logits, bias, mask, experts, weights, counts, lse, T, logits.stride(0), scale,
            GROUPS=num_groups, PER_GROUP=E // num_groups, GROUP_TOPK=group_topk, TOPK=topk,
            BLOCK_G=triton.next_power_of_2(num_groups), BLOCK_P=triton.next_power_of_2(E // num_groups),
            BLOCK_K=triton.next_power_of_2(topk), **chosen,
        )  # fmt: skip


@op("weights", "counts", "lse")
def route_forced_fwd(
    logits: Tensor, experts: Tensor, weights: Tensor, counts: Tensor, lse: Tensor | None, scale: float
) -> None:
    """experts [T, topk] are given; a row of -1 has weights and lse 0. counts are zeroed first."""
    T, E = logits.shape
    topk = experts.shape[1]
    counts.zero_()
    chosen = config()
    if T:
        route_forced_kernel[(triton.cdiv(T, chosen["BLOCK_T"]),)](
            logits, experts, weights, counts, lse, T, E, logits.stride(0), scale,
            TOPK=topk, BLOCK_K=triton.next_power_of_2(topk), BLOCK_E=triton.next_power_of_2(E), **chosen,
        )  # fmt: skip


def unsupported_bwd(logits, experts, dweights, lse, dlse, dlogits, scale) -> str | None:
    E, topk = logits.shape[1], experts.shape[1]
    if E % 4 or E > 1024 or not 1 < topk <= 32:
        return f"the backward for {E} experts, top-{topk}"
    return None if rows_aligned(logits) else "logits whose rows do not start at multiples of 16 bytes"


@op("dlogits", cuda=unsupported_bwd)
def route_bwd(
    logits: Tensor, experts: Tensor, dweights: Tensor, lse: Tensor | None, dlse: Tensor | None, dlogits: Tensor,
    scale: float,
) -> None:  # fmt: skip
    T, E = logits.shape
    topk = experts.shape[1]
    chosen = config()
    if T:
        route_bwd_kernel[(triton.cdiv(T, chosen["BLOCK_T"]),)](
            logits, experts, dweights, lse, dlse, dlogits, T, E, logits.stride(0), scale,
            TOPK=topk, BLOCK_K=triton.next_power_of_2(topk), BLOCK_E=triton.next_power_of_2(E), **chosen,
        )  # fmt: skip
