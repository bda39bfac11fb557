"""Expert parallelism for decode passes: an exchange whose sizes are fixed, so that the host never waits and a pass with
it can be a CUDA graph.

A rank may have up to M tokens. One all-gather shows every rank all tokens, their experts and weights, and each computes
the choices of its own experts; one all-to-all of equal parts brings the results back. Which rows are computed is said
by the plan, on the device: experts read rows with a choice of theirs alone, so that empty ones cost no work, but bytes.
In bytes, for ep ranks, N = ep x M x topk choices and b bytes an element (FP8 rows: H + H / 32 in place of b H):

    a rank receives   ep M (b H + 8 topk) of tokens, and N b H of results, which it also sends
    a rank holds      these three, N b H of rows for the experts, and what the experts make of N rows

With `sums` a rank adds up its experts' results for a token first: then N is ep M everywhere but in the experts.
An equal all-to-all of rows in DeepEP's layout, M rows for each pair of a rank and an expert, would send E M b H.
"""

from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.functional import pad

from ..errors import InputError, integer
from ..nn import MoE
from ..ops.dispatch import Plan, dispatch_here
from ..ops.quantize import quantize
from ..ops.unpermute import unpermute
from .collectives import gather, scatter_sum
from .exchange import exact_rows, takes_fp8_rows


def low_latency(
    group: dist.ProcessGroup, max_tokens: int, fp8: bool = False, sums: bool = False
) -> Callable[[MoE], "LowLatency"]:
    """For `shard_experts_(model, group, low_latency(group, max_tokens))`: the exchanges of all layers.

    max_tokens: the most that a rank has in a forward, the same number on every rank. fp8, sums: see `LowLatency`.
    """
    max_tokens = integer("max_tokens", max_tokens, 1)
    return lambda moe: LowLatency(moe, group, max_tokens, fp8, sums)


def expect_decode_pass(x: Tensor, max_tokens: int) -> None:
    """Raise InputError for more rows of x than max_tokens, and where gradients are enabled."""
    if torch.is_grad_enabled():
        raise InputError("the low-latency exchange has no gradients: call the model under torch.no_grad()")
    if len(x) > max_tokens:
        raise InputError(f"{len(x)} tokens in a pass, for which the low-latency exchange has {max_tokens} rows")


class FixedPlan(Plan):
    """The plan of the rows that were received. The attributes are of the tokens here: what `combine` needs."""

    experts: Tensor  # [T, topk]
    weights: Tensor | None  # [T, topk], which `combine` applies


class LowLatency:
    """The exchange of an MoE layer whose experts are divided over the ranks of a group, in order of rank. Every rank
    calls it in every forward, with 0 to max_tokens tokens, without gradients.

    Results have the bits of `AllToAll`, where the grouped GEMM runs with the same tiles: rows of an expert have the
    same order. fp8: tokens travel to FP8 experts in FP8, as by `AllToAll`. sums: a rank sends one row for each token,
    the sum over its experts, in place of topk: they are rounded once more, to the rows' type.
    """

    local = False

    def __init__(self, moe: MoE, group: dist.ProcessGroup, max_tokens: int, fp8: bool = False, sums: bool = False):
        self.moe, self.group, self.max_tokens, self.fp8, self.sums = moe, group, max_tokens, fp8, sums
        self.ep, self.rank = dist.get_world_size(group), dist.get_rank(group)

    def dispatch(
        self, x: Tensor, weights: Tensor, experts: Tensor, counts: Tensor
    ) -> tuple[Tensor, FixedPlan, Tensor | None]:
        """Rows [ep M, H] with topk choices each or, without `sums`, [ep M topk, H] with one; choices of experts
        elsewhere and of rows that hold no token are not routed. Raises InputError for more than max_tokens tokens,
        and where gradients are enabled."""
        expect_decode_pass(x, self.max_tokens)
        folded, number = self.moe.experts.fold_weights, len(counts) // self.ep
        rows, theirs, chosen = self.gathered(x, weights, experts)
        here = chosen - self.rank * number
        if not self.sums:
            topk = here.shape[1]
            rows = rows[:, None].expand(-1, topk, -1).flatten(0, 1)
            here, theirs = here.reshape(-1, 1), theirs.reshape(-1, 1)
        plan = FixedPlan(*dispatch_here(here, number))
        plan.experts, plan.weights = experts, None if folded or self.sums else weights
        return rows, plan, theirs if folded or self.sums else None

    def gathered(self, x: Tensor, weights: Tensor, experts: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """All ranks' x, weights and experts, each [ep M, ..] in order of rank; -1 are experts of rows without a token.

        They travel as the bytes of one row, since a collective of few bytes costs its start alone.
        """
        in_fp8 = self.fp8 and takes_fp8_rows(self.moe.experts)
        parts = [*(quantize(x, pow2=True) if in_fp8 else [x]), weights, experts]
        widths = [part.shape[1] * part.element_size() for part in parts]
        bytes_of = [part.flatten().view(torch.uint8).view(len(x), n) for part, n in zip(parts, widths, strict=True)]
        empty = self.max_tokens - len(x)
        row = gather(pad(torch.cat(bytes_of, 1), (0, 0, 0, empty), value=255), self.group)  # 255: each byte of -1
        *rows, weights, experts = (t.view(part.dtype) for t, part in zip(row.split(widths, 1), parts, strict=True))
        return exact_rows(rows[0], rows[1], x.dtype) if in_fp8 else rows[0], weights, experts

    def combine(self, y: Tensor, plan: FixedPlan) -> Tensor:
        experts = plan.experts
        if self.sums:
            return scatter_sum(y, self.group)[: len(experts)]
        back = torch.empty_like(y, memory_format=torch.contiguous_format)  # [ep, M, topk, H], of each expert's rank
        dist.all_to_all_single(back, y.contiguous(), group=self.group)
        choice = torch.arange(experts.numel(), dtype=torch.int32, device=y.device).view_as(experts)
        rank = experts.div(len(plan.offsets) - 1, rounding_mode="floor")  # -1 stays -1
        places = torch.add(choice, rank, alpha=len(y) // self.ep).clamp(min=0).flatten()
        slot = choice.masked_fill(experts < 0, -1)
        chosen = Plan(plan.offsets, slot, choice.flatten(), plan.padded_offsets)
        return unpermute(back.index_select(0, places), chosen, plan.weights)
