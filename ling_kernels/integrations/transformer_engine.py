"""Transformer Engine's names for MoE permutation and routing, over our ops.

`from ling_kernels.integrations.transformer_engine import moe_permute_with_probs, moe_unpermute`, for code that imports
them from transformer_engine.pytorch 2.x. Tensors are plain: its FP8 tensors are not taken. Gradients as there. Nothing
is read on the host, but for num_out_tokens = -1. Misuse raises a ValueError in one line.
"""

import torch
from torch import Tensor

from ..errors import InputError
from ..op import E4M3, expect, first_derivative_only, use_reference
from ..ops.dispatch import dispatch
from ..ops.route import route
from ..ops.unpermute import gather_sum, sum_choices


def moe_permute(
    inp: Tensor, routing_map: Tensor, num_out_tokens: int = -1, max_token_num: int = -1, map_type: str = "mask"
) -> tuple[Tensor, Tensor]:
    """`moe_permute_with_probs` without probs -> output, row_id_map. max_token_num is not used."""
    refuse_index_map(map_type)
    row_id_map, choice = rows_of_map(inp, routing_map, num_out_tokens)
    return Permute.apply(inp, row_id_map, choice), row_id_map


def moe_permute_with_probs(
    inp: Tensor, probs: Tensor, routing_map: Tensor, num_out_tokens: int = -1
) -> tuple[Tensor, Tensor, Tensor]:
    """inp [T, H], probs and routing_map [T, E] -> output [N, H], permuted_probs [N], row_id_map.

    routing_map is bool or 0 and 1: the experts of each token, any number of them. Output has each expert's rows in the
    order of tokens, without padding. N is num_out_tokens; -1 counts them, on the host. Rows beyond N are dropped, and
    where fewer are routed the last rows are undefined and their probs 0. row_id_map is for `moe_unpermute` and has a
    layout of our own, [T, E] int32: the row, or -1. A copy, as any permutation.
    """
    expect(probs.shape == routing_map.shape, "probs [T, E] as routing_map", probs, routing_map)
    row_id_map, choice = rows_of_map(inp, routing_map, num_out_tokens)
    permuted = probs.flatten().gather(0, choice.clamp(min=0)) if probs.numel() else probs.new_empty(len(choice))
    return Permute.apply(inp, row_id_map, choice), permuted.masked_fill(choice < 0, 0), row_id_map


def moe_unpermute(
    inp: Tensor,
    row_id_map: Tensor,
    merging_probs: Tensor | None = None,
    restore_shape: torch.Size | None = None,
    map_type: str = "mask",
    probs: Tensor | None = None,
    pad_offsets: Tensor | None = None,
) -> Tensor:
    """inp [N, H], row_id_map from a permute above, merging_probs [T, E] or None (all 1) -> [T, H].

    A token's rows are summed in fp32, experts ascending. probs is the old name of merging_probs. restore_shape may only
    be (T, H), which row_id_map tells already. Gradients: to inp and merging_probs, 0 where nothing is routed.
    """
    refuse_index_map(map_type)
    if pad_offsets is not None or (probs is not None and merging_probs is not None):
        raise InputError("moe_unpermute takes no pad_offsets, and merging_probs or probs, not both")
    weights = merging_probs if probs is None else probs
    ints = row_id_map.ndim == 2 and row_id_map.dtype == torch.int32
    expect(ints and plain_rows(inp), "inp [N, H] and row_id_map [T, E] int32 of our permute", inp, row_id_map)
    expect(weights is None or weights.shape == row_id_map.shape, "merging_probs [T, E]", weights, row_id_map)
    shape = (len(row_id_map), inp.shape[1])
    expect(restore_shape is None or tuple(restore_shape) == shape, f"restore_shape {shape}", restore_shape)
    return Unpermute.apply(inp, weights if weights is None else weights.float(), row_id_map)


def fused_topk_with_score_function(
    logits: Tensor,
    topk: int,
    use_pre_softmax: bool,
    num_groups: int | None,
    group_topk: int | None,
    scaling_factor: float | None,
    score_function: str,
    expert_bias: Tensor | None,
    routing_map_format: str | int = "bytemap",
    topk_indices: Tensor | None = None,
    qb_histogram: Tensor | None = None,
    qb_bin_bounds: Tensor | None = None,
    qb_histogram_mode: str | None = None,
) -> tuple[Tensor, Tensor]:
    """logits [..., E] -> probs [..., E] in logits' dtype, 0 off the chosen experts, and routing_map [..., E] bool.

    score_function "sigmoid" only, for which use_pre_softmax means nothing. With groups a group's score is the sum of
    its topk // group_topk best experts, which must be 2 here. Ties go to the lowest expert. Gradient: to logits.
    """
    if score_function != "sigmoid":
        raise InputError(f"score_function is {score_function!r}; our router has sigmoid")
    if routing_map_format not in ("bytemap", 0):
        raise InputError(f"routing_map_format is {routing_map_format!r}; only 'bytemap' is supported")
    for name, value in dict(topk_indices=topk_indices, qb_histogram=qb_histogram, qb_bin_bounds=qb_bin_bounds,
                            qb_histogram_mode=qb_histogram_mode).items():  # fmt: skip
        if value is not None:
            raise InputError(f"{name} is not supported")
    return dense_route(logits, topk, expert_bias, num_groups, group_topk, scaling_factor)[:2]


def dense_route(
    logits: Tensor,
    topk: int,
    bias: Tensor | None,
    num_groups: int | None,
    group_topk: int | None,
    scale: float | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """`route` with results as wide as the logits [..., E]: probs in their dtype, routing_map bool, counts [E] int32."""
    expect(logits.ndim > 1 and logits.is_floating_point() and logits.dtype != torch.float64,
           "logits [..., E], not fp64", logits)  # fmt: skip
    grouped = bool(num_groups and group_topk and num_groups > 1)
    if grouped and topk // group_topk != 2:
        raise InputError(f"topk // group_topk is {topk // group_topk}; our router adds up the 2 best scores of a group")
    E = logits.shape[-1]
    rows = logits.reshape(-1, E).float()
    bias = rows.new_zeros(E) if bias is None else bias.float()
    groups = (num_groups, group_topk) if grouped else (1, 1)
    weights, experts, counts = route(rows, bias, None, *groups, topk, 1.0 if scale is None else scale)
    chosen = experts.long()
    probs = rows.new_zeros(rows.shape).scatter(1, chosen, weights)
    routed = torch.zeros_like(rows, dtype=torch.bool).scatter_(1, chosen, True)
    return probs.to(logits.dtype).view(logits.shape), routed.view(logits.shape), counts


def refuse_index_map(map_type: str) -> None:
    if map_type != "mask":
        raise InputError(f"map_type is {map_type!r}; only 'mask' is supported; lk.dispatch takes indices")


def plain_rows(x: Tensor) -> bool:
    return x.ndim == 2 and x.is_floating_point() and x.dtype != E4M3


def rows_of_map(inp: Tensor, routing_map: Tensor, num_rows: int) -> tuple[Tensor, Tensor]:
    """The row of each (token, expert), [T, E] int32 or -1, and the inverse, see `choices_of`."""
    fits = plain_rows(inp) and routing_map.ndim == 2 and len(routing_map) == len(inp)
    expect(fits and not routing_map.is_floating_point(), "inp [T, H] and routing_map [T, E] bool", inp, routing_map)
    chosen = routing_map != 0
    experts = torch.arange(routing_map.shape[1], dtype=torch.int32, device=inp.device).where(chosen, -1)
    slot = dispatch(experts, chosen.sum(0, dtype=torch.int32)).slot
    num_rows = int(chosen.sum()) if num_rows < 0 else num_rows
    slot = slot.where(slot < num_rows, -1)
    return slot, choices_of(slot, num_rows)


def choices_of(slot: Tensor, num_rows: int) -> Tensor:
    """[N] int64: t * E + e of each row, -1 where slot [T, E] does not name it."""
    numbers = torch.arange(slot.numel(), device=slot.device)
    rows = slot.where(slot >= 0, num_rows).flatten().long()  # one more row takes those that are not routed
    return numbers.new_full((num_rows + 1,), -1).scatter_(0, rows, numbers)[:-1]


def sum_rows(y: Tensor, slot: Tensor, weights: Tensor | None = None) -> Tensor:
    """out[t] = sum over e of weights[t, e] * y[slot[t, e]]."""
    if use_reference("unpermute", y, weights):
        return sum_choices(y, slot, weights)
    out = y.new_empty(len(slot), y.shape[1])
    gather_sum(y.contiguous(), weights if weights is None else weights.contiguous(), slot.contiguous(), out)
    return out


def take_rows(x: Tensor, slot: Tensor, choice: Tensor) -> Tensor:
    return x.index_select(0, choice.clamp(min=0) // max(slot.shape[1], 1))


class Permute(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, slot, choice):
        ctx.save_for_backward(slot)
        return take_rows(x, slot, choice)

    @staticmethod
    @first_derivative_only
    def backward(ctx, dy):
        return sum_rows(dy, *ctx.saved_tensors), None, None


class Unpermute(torch.autograd.Function):
    @staticmethod
    def forward(ctx, y, weights, slot):
        ctx.save_for_backward(y if weights is not None else None, weights, slot)
        ctx.num_rows = len(y)
        return sum_rows(y, slot, weights)

    @staticmethod
    @first_derivative_only
    def backward(ctx, dout):
        y, weights, slot = ctx.saved_tensors
        choice = choices_of(slot, ctx.num_rows)
        dy, dweights = take_rows(dout, slot, choice), None
        if weights is not None:
            dots = torch.linalg.vecdot(y.float(), dy.float())
            # rows that no token names go to one more element
            dweights = dots.new_zeros(slot.numel() + 1).scatter_(0, choice.where(choice >= 0, slot.numel()), dots)
            dweights = dweights[:-1].view(slot.shape)
            dy = (dy.float() * weights.flatten()[choice.clamp(min=0), None]).to(dy.dtype)
        return dy.masked_fill((choice < 0)[:, None], 0), dweights, None
