"""Megatron-core's router by the op `route`, and its balance bias without a drift of the mean.

Functions here take the stock function that they replace, which still does what our op does not: another score
function, or another count of experts a group.
"""

from collections.abc import Callable
from functools import wraps

import torch
from torch import Tensor

from ...ops.route import route
from ...ops.router_gemm import router_gemm

CHOICES = "ling_choices"  # an attribute of a routing map: its experts [T, topk] and counts [E], int32, for `permute`


def topk_routing(stock: Callable) -> Callable:
    """For megatron.core.transformer.moe.moe_utils.topk_routing_with_score_function."""

    @wraps(stock)
    def routing(
        logits: Tensor, topk: int, use_pre_softmax=False, num_groups=None, group_topk=None, scaling_factor=None,
        score_function="softmax", expert_bias=None, fused=False, router_replay=None, **others,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        same_groups = not group_topk or topk // group_topk == 2  # a group's score is the sum of its two best
        if score_function != "sigmoid" or not same_groups or logits.dtype == torch.float64 or any_given(others):
            return stock(
                logits, topk, use_pre_softmax, num_groups, group_topk, scaling_factor, score_function, expert_bias,
                fused, router_replay, **others,
            )  # fmt: skip
        wide = logits.float()
        bias = wide.new_zeros(wide.shape[1]) if expert_bias is None else expert_bias.float()
        groups, best = (num_groups, group_topk) if group_topk else (1, 1)

        def chosen(*_, **__) -> tuple[None, Tensor]:
            return None, route(wide.detach(), bias, None, groups, best, topk)[1].long()

        experts = None
        if router_replay is not None:  # records these choices, or gives those of an earlier run
            experts = router_replay.get_replay_topk(wide.detach(), topk, num_groups, group_topk, chosen)[1].int()
        weights, experts, counts = route(wide, bias, None, groups, best, topk, scaling_factor or 1.0, None, experts)
        index = experts.long()
        probs = torch.zeros_like(logits).scatter(1, index, weights.type_as(logits))
        routing_map = torch.zeros_like(logits, dtype=torch.bool).scatter(1, index, True)
        setattr(routing_map, CHOICES, (experts, counts))
        return probs, routing_map

    return routing


def any_given(options: dict) -> bool:
    return any(value is not None and value is not False for value in options.values())


def router_logits(stock: Callable) -> Callable:
    """For moe_utils.router_gating_linear: input [..., H], weight [E, H] -> logits [..., E], fp32."""

    @wraps(stock)
    def logits(inp: Tensor, weight: Tensor, bias: Tensor | None, router_dtype: torch.dtype) -> Tensor:
        if bias is not None or router_dtype != torch.float32 or inp.dtype == torch.float64:
            return stock(inp, weight, bias, router_dtype)
        return router_gemm(inp.reshape(-1, inp.shape[-1]), weight).view(*inp.shape[:-1], -1)

    return logits


def updated_expert_bias(stock: Callable) -> Callable:
    """For megatron.core.transformer.moe.moe_utils.get_updated_expert_bias: the mean of the bias does not change."""

    @wraps(stock)
    def updated(tokens_per_expert: Tensor, expert_bias: Tensor, expert_bias_update_rate: float, *group, **groups):
        bias = stock(tokens_per_expert, expert_bias, expert_bias_update_rate, *group, **groups)
        # By now tokens_per_expert holds the sums over the ranks: stock reduces it in place.
        sign = (tokens_per_expert.mean(-1, keepdim=True) - tokens_per_expert).sign()
        return bias - expert_bias_update_rate * sign.mean(-1, keepdim=True)

    return updated
