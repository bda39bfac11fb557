"""linghe's facade for layers in FP8: functions whose results, or gradients, are FP8 tensors of Transformer Engine.

`from ling_kernels.integrations import linghe_block`. cls is the class of those tensors, Float8BlockwiseQTensor, and a
quantizer is its Float8BlockQuantizer, of which only dtype and force_pow_2_scales are read; we import neither. Blocks
are 1 x 128. Where rows belong to experts, Transformer Engine has for each expert a matrix of its own, one after
another, and we have one for all: then the columns' data and the rows' scales are copied expert by expert.
"""

from typing import Any

import torch
from torch import Tensor

from ..op import expect, first_derivative_only, round_up
from ..ops.dispatch import PAD, Plan, exclusive_sum
from ..ops.quantize import quantize
from ..ops.rms_norm import rms_norm
from ..ops.swiglu import swiglu, swiglu_backward
from .transformer_engine import choices_of, plain_rows, rows_of_map, sum_rows, take_rows

ROWS = 16  # linghe pads each expert's rows to a multiple


def block_silu_impl(input: Tensor, quantizer: Any, grad_quantizer: Any, cls: type) -> Tensor:
    """input [S, B, 2F] -> cls of silu(gate) * up [S, B, F]. The gradient to input is a cls too. All views."""
    expect(input.ndim == 3, "input [S, B, 2F]", input)
    return BlockSilu.apply(input, quantizer, grad_quantizer, cls)


def block_batch_weighted_silu_impl(
    input: Tensor,
    weights: Tensor,
    counts: Tensor,
    splits: list[int],
    quantizers: list,
    grad_quantizers: list,
    cls: type,
    is_recomputing: bool | None = None,
) -> Tensor:
    """input [M, 2F], weights [M] or [M, 1] fp32 -> cls of weights * silu(gate) * up [M, F], expert after expert.

    counts [E] int, and splits, the same on the host, are the rows of each expert; their sum is M. is_recomputing False:
    no columns, as the first of two passes wants it. Gradients: to input, a cls, and to weights.
    """
    expect(input.ndim == 2 and sum(splits) == len(input) == weights.numel(), "input [M, 2F] of sum(splits) rows",
           input, weights, sum(splits))  # fmt: skip
    columns = is_recomputing is not False
    return BlockWeightedSilu.apply(input, weights, counts, splits, quantizers[0], grad_quantizers[0], cls, columns)


def block_rms_norm(
    input: Tensor,
    weight: Tensor,
    rms: Tensor | None,
    quantizer: Any,
    cls: type,
    eps: float = 1e-6,
    is_recomputing: bool | None = None,
) -> tuple[Tensor, Tensor]:
    """input [S, B, N], weight [N] -> cls of the normed input, and rms, which the second of two passes gives back.

    We compute the norm again instead of keeping rms, which is a tensor of no elements here. is_recomputing False: no
    columns. Gradients: to input and weight. All views.
    """
    expect(input.ndim == 3, "input [S, B, N]", input)
    y = BlockRMSNorm.apply(input, weight, quantizer, cls, eps, is_recomputing is not False)
    return y, input.new_empty(0, dtype=torch.float32)


def padded_permute(
    tokens: Tensor,
    routing_map: Tensor,
    tokens_per_expert_cuda_tensor: Tensor,
    tokens_per_expert_list: list[int],
    probs: Tensor | None = None,
) -> tuple[Tensor, Tensor | None, Tensor]:
    """tokens [T, H], routing_map and probs [T, E] -> rows [N, H], their probs [N], row_id_map [T, E].

    Each expert's rows are padded with zeros to a multiple of 16. Gradients: to tokens and probs.
    """
    row_id_map, choice = padded_rows(tokens, routing_map, tokens_per_expert_cuda_tensor, tokens_per_expert_list)
    return PaddedPermute.apply(tokens, row_id_map, choice, None), probs_of_rows(probs, choice), row_id_map


def padded_unpermute(
    permuted_tokens: Tensor, row_id_map: Tensor, tokens_per_expert: Tensor, restore_shape: torch.Size
) -> Tensor:
    """The sum of each token's rows, [T, H] as restore_shape. Gradient: to permuted_tokens."""
    return unpermuted(permuted_tokens, row_id_map, restore_shape, None)


def block_padded_permute(
    tokens: Tensor,
    routing_map: Tensor,
    tokens_per_expert_cuda_tensor: Tensor,
    tokens_per_expert_list: list[int],
    quantizers: list,
    cls: type,
    probs: Tensor | None = None,
) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
    """`padded_permute` whose rows are a cls -> rows, probs, row_id_map and row_id_index, here the same tensor."""
    row_id_map, choice = padded_rows(tokens, routing_map, tokens_per_expert_cuda_tensor, tokens_per_expert_list)
    fp8 = cls, quantizers[0], [round_up(n, ROWS) for n in tokens_per_expert_list]
    return PaddedPermute.apply(tokens, row_id_map, choice, fp8), probs_of_rows(probs, choice), row_id_map, row_id_map


def block_padded_unpermute(
    permuted_tokens: Tensor,
    row_id_map: Tensor,
    row_id_index: Tensor,
    tokens_per_expert: Tensor,
    splits: list[int],
    restore_shape: torch.Size,
    quantizers: list,
    cls: type,
) -> Tensor:
    """`padded_unpermute` whose gradient to permuted_tokens is a cls."""
    fp8 = cls, quantizers[0], [round_up(n, ROWS) for n in splits]
    return unpermuted(permuted_tokens, row_id_map, restore_shape, fp8)


def fp8_tensor(
    cls: type, quantizer: Any, shape: torch.Size, source: Tensor, fp8: tuple[Tensor, ...], counts: list[int] | None
) -> Tensor:
    """A cls [..., K] of a shape, from rows and perhaps columns as our ops give them, for a tensor with source's dtype.

    counts: the rows of each expert; None: one matrix, of which all is a view.
    """
    q, scale, *columns = fp8
    rows, K = q.shape
    data = column_scale = None
    if counts is None:
        scale = scale.T
        if columns:
            data = columns[0][:, :rows].unflatten(1, shape[:-1])
            column_scale = columns[1].T
    else:
        ends = torch.tensor(counts).cumsum(0).tolist()
        scale = one_after_another(scale.T, ends, counts).view(rows, -1)
        if columns:
            padded = torch.tensor([round_up(n, PAD) for n in counts]).cumsum(0).tolist()
            starts = [0, *padded]
            lasts = [start + n for start, n in zip(starts, counts, strict=False)]
            data = one_after_another(columns[0], lasts, counts).view(rows, K)
            column_scale = columns[1].T[: starts[-1] // PAD]
    return cls(
        shape=shape,
        dtype=source.dtype,
        fp8_dtype=quantizer.dtype,
        rowwise_data=q.view(shape),
        rowwise_scale_inv=scale,
        columnwise_data=data,
        columnwise_scale_inv=column_scale,
        quantizer=quantizer,
        requires_grad=source.requires_grad,
        is_2D_scaled=False,
    )


def one_after_another(x: Tensor, ends: list[int], counts: list[int]) -> Tensor:
    """x [K, M] -> flat: for each expert the matrix of its columns ends[e] - counts[e] : ends[e]."""
    return torch.cat([x[:, end - n : end].reshape(-1) for end, n in zip(ends, counts, strict=True)])


def plan_of_counts(counts: Tensor, num_rows: int) -> Plan:
    """A plan of rows that are sorted by expert already, counts [E] of each."""
    row = torch.arange(num_rows, dtype=torch.int32, device=counts.device)
    return Plan(exclusive_sum(counts), row[:, None], row, exclusive_sum((counts + PAD - 1) // PAD * PAD))


def padded_rows(tokens, routing_map, counts: Tensor, listed: list[int]) -> tuple[Tensor, Tensor]:
    """`rows_of_map` with each expert's rows from a multiple of 16 on."""
    expect(counts.shape == (len(listed),) == routing_map.shape[1:], "tokens_per_expert [E] twice", counts, routing_map)
    row, _ = rows_of_map(tokens, routing_map, sum(listed))
    gaps = -counts % ROWS
    row = torch.where(row >= 0, row + (gaps.cumsum(0) - gaps).int(), -1)
    return row, choices_of(row, sum(round_up(n, ROWS) for n in listed))


def probs_of_rows(probs: Tensor | None, choice: Tensor) -> Tensor | None:
    if probs is None:
        return None
    return probs.flatten().gather(0, choice.clamp(min=0)).masked_fill(choice < 0, 0)


def unpermuted(rows: Tensor, row_id_map: Tensor, restore_shape: torch.Size, fp8: tuple | None) -> Tensor:
    fits = plain_rows(rows) and tuple(restore_shape) == (len(row_id_map), rows.shape[1])
    expect(
        fits, "permuted_tokens [N, H] and restore_shape (T, H) of row_id_map [T, E]", rows, row_id_map, restore_shape
    )
    return PaddedUnpermute.apply(rows, row_id_map, fp8)


def gathered(x: Tensor, slot: Tensor, choice: Tensor, fp8: tuple | None) -> Tensor:
    """The rows of x that `choice` names, zeros elsewhere; as a cls where fp8 is (cls, quantizer, counts)."""
    rows = take_rows(x, slot, choice).masked_fill((choice < 0)[:, None], 0)
    if fp8 is None:
        return rows
    cls, quantizer, counts = fp8
    plan = plan_of_counts(torch.tensor(counts, device=x.device), len(rows))
    codes = quantize(rows, columns=True, plan=plan, pow2=quantizer.force_pow_2_scales)
    return fp8_tensor(cls, quantizer, rows.shape, x, codes, counts)


class PaddedPermute(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, slot, choice, fp8):
        ctx.save_for_backward(slot)
        return gathered(x, slot, choice, fp8)

    @staticmethod
    @first_derivative_only
    def backward(ctx, dy):
        return sum_rows(dy, *ctx.saved_tensors), None, None, None


class PaddedUnpermute(torch.autograd.Function):
    @staticmethod
    def forward(ctx, y, slot, fp8):
        ctx.save_for_backward(slot)
        ctx.num_rows, ctx.fp8 = len(y), fp8
        return sum_rows(y, slot)

    @staticmethod
    @first_derivative_only
    def backward(ctx, dout):
        (slot,) = ctx.saved_tensors
        return gathered(dout, slot, choices_of(slot, ctx.num_rows), ctx.fp8), None, None


class BlockSilu(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, quantizer, grad_quantizer, cls):
        ctx.save_for_backward(x)
        ctx.fp8 = cls, grad_quantizer
        rows = x.flatten(0, 1)
        y = swiglu(rows, quantize=True, columns=True, pow2=quantizer.force_pow_2_scales)
        return fp8_tensor(cls, quantizer, torch.Size((*x.shape[:2], x.shape[2] // 2)), x, y, None)

    @staticmethod
    @first_derivative_only
    def backward(ctx, dy):
        (x,), (cls, quantizer) = ctx.saved_tensors, ctx.fp8
        pow2 = quantizer.force_pow_2_scales
        dx, _ = swiglu_backward(dy.flatten(0, 1), x.flatten(0, 1), quantize=True, columns=True, pow2=pow2)
        return fp8_tensor(cls, quantizer, x.shape, dy, dx, None), None, None, None


class BlockWeightedSilu(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weights, counts, splits, quantizer, grad_quantizer, cls, columns):
        plan = plan_of_counts(counts, len(x))
        ctx.save_for_backward(x, weights)
        ctx.fp8 = cls, grad_quantizer, splits, plan
        pow2 = quantizer.force_pow_2_scales
        y = swiglu(x, weights.view(-1), quantize=True, columns=columns, plan=plan, pow2=pow2)
        return fp8_tensor(cls, quantizer, y[0].shape, x, y, splits)

    @staticmethod
    @first_derivative_only
    def backward(ctx, dy):
        (x, weights), (cls, quantizer, splits, plan) = ctx.saved_tensors, ctx.fp8
        pow2 = quantizer.force_pow_2_scales
        dx, dw = swiglu_backward(dy, x, weights.view(-1), quantize=True, columns=True, plan=plan, pow2=pow2)
        return fp8_tensor(cls, quantizer, x.shape, dy, dx, splits), dw.view(weights.shape), *[None] * 6


class BlockRMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, quantizer, cls, eps, columns):
        ctx.save_for_backward(x, weight)
        ctx.eps = eps
        rows = x.flatten(0, 1)
        if quantizer.force_pow_2_scales:  # the norm's kernel has no such scales
            y = quantize(rms_norm(rows.float(), weight, None, eps), columns=columns, pow2=True)
        else:
            _, *y = rms_norm(rows, weight, None, eps, quantize=True, columns=columns)
        return fp8_tensor(cls, quantizer, x.shape, x, tuple(y), None)

    @staticmethod
    @first_derivative_only
    def backward(ctx, dy):
        x, weight = (t.detach().requires_grad_() for t in ctx.saved_tensors)
        with torch.enable_grad():
            y = rms_norm(x, weight, eps=ctx.eps)
        return *torch.autograd.grad(y, (x, weight), dy), None, None, None, None
