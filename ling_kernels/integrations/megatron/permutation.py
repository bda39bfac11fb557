"""The row copies of Megatron-core's token dispatchers by the ops `permute` and `unpermute`.

Our router leaves its choices at the routing map (routing.py). A map that another router made, or one that Megatron has
changed by a capacity or by padding, has none, and goes to the stock function.
"""

import inspect
from collections.abc import Callable
from functools import wraps

import torch
from torch import Tensor

from ...ops.dispatch import Plan, dispatch, exclusive_sum
from ...ops.permute import permute
from ...ops.unpermute import unpermute
from .routing import CHOICES


def permute_tokens(stock: Callable) -> Callable:
    """For moe_utils.permute. The sorted indices that it returns are a Plan, which `unpermute_tokens` takes."""
    aligned = "align_size" in inspect.signature(stock).parameters  # since 0.17: two results more

    @wraps(stock)
    def permuted(tokens: Tensor, routing_map: Tensor, probs: Tensor | None = None, *args, **others):
        choices = getattr(routing_map, CHOICES, None)
        if choices is None or others.get("align_size"):
            return stock(tokens, routing_map, probs, *args, **others)
        experts, counts = choices
        plan = dispatch(experts, counts)
        weights = None
        if probs is not None:
            weights = probs.gather(1, experts.long()).flatten().index_select(0, plan.source)
        result = permute(tokens, plan), weights, plan
        return (*result, None, others.get("tokens_per_expert")) if aligned else result

    return permuted


def unpermute_tokens(stock: Callable) -> Callable:
    """For moe_utils.unpermute: the rows of a token are summed in fp32, in an order that is always the same."""

    @wraps(stock)
    def unpermuted(permuted_tokens: Tensor, sorted_indices: Tensor | Plan, *args, **others):
        if not isinstance(sorted_indices, Plan):
            return stock(permuted_tokens, sorted_indices, *args, **others)
        return unpermute(permuted_tokens, sorted_indices)

    return unpermuted


def sort_chunks(stock: Callable) -> Callable:
    """For moe_utils.sort_chunks_by_idxs: without reading the sizes on the host."""

    @wraps(stock)
    def sorted_chunks(
        input: Tensor, split_sizes: Tensor, sorted_idxs: Tensor, probs: Tensor | None = None, fused: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        plan = chunk_plan(len(input), *(t.to(input.device, non_blocking=True) for t in (split_sizes, sorted_idxs)))
        return permute(input, plan), None if probs is None else probs.index_select(0, plan.source)

    return sorted_chunks


def chunk_plan(rows: int, sizes: Tensor, order: Tensor) -> Plan:
    """The plan, of tokens with one choice each, that puts chunks of these sizes [n] into this order [n]."""
    old = exclusive_sum(sizes)[:-1]
    new = torch.empty_like(old).scatter_(0, order, exclusive_sum(sizes[order])[:-1])
    row = torch.arange(rows, dtype=torch.int32, device=sizes.device)
    slot = row + (new - old).repeat_interleave(sizes, output_size=rows)
    source = torch.empty_like(slot).scatter_(0, slot.long(), row)
    bounds = torch.stack([row.new_zeros(()), row.new_full((), rows)])
    return Plan(bounds, slot[:, None], source, bounds)
