"""The exchange of rows with their experts by DeepEP (github.com/deepseek-ai/DeepEP), where the package is installed.

A row crosses to a rank once, whatever the number of its experts there, and comes with the list of them. The rank's
experts sum its results, in bf16, and DeepEP adds up the ranks' sums. Backward of a dispatch is a combine over the same
routes, and the other way round. Rows travel in bf16, whatever the model's type. Of version 2 this uses ElasticBuffer,
of version 1 Buffer. Its low-latency mode, for decode passes, is Buffer's in both. Written to their documented
interfaces; not run on a GPU.
"""

import importlib
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ..errors import InputError, integer
from ..nn import MoE
from ..op import first_derivative_only
from ..ops.dispatch import Plan, counts_here, dispatch
from .low_latency import expect_decode_pass


def deep_ep(group: dist.ProcessGroup, hidden: int, topk: int, tokens: int) -> Callable[[MoE], "DeepEP"]:
    """For `shard_experts_(model, group, deep_ep(group, ...))`: the exchanges of all layers, over one buffer.

    hidden and topk are the model's; tokens: the most that a rank has in a forward, the same number on every rank.
    Raises InputError where DeepEP is not installed.
    """
    package = imported()
    kind = Elastic if hasattr(package, "ElasticBuffer") else Legacy
    buffer = kind(package, group, hidden, topk, tokens)
    return lambda moe: DeepEP(buffer, group)


def deep_ep_low_latency(
    group: dist.ProcessGroup, hidden: int, experts: int, max_tokens: int
) -> Callable[[MoE], "DeepEPLowLatency"]:
    """As `deep_ep`, by DeepEP's low-latency kernels: for inference, of at most max_tokens tokens a rank and forward,
    the same number on every rank. hidden and experts are the model's; DeepEP has kernels for some hidden sizes alone.
    Raises InputError for fewer than one token, and where DeepEP is not installed.
    """
    max_tokens = integer("max_tokens", max_tokens, 1)
    package, ep = imported(), dist.get_world_size(group)
    size = package.Buffer.get_low_latency_rdma_size_hint(max_tokens, hidden, ep, experts)
    buffer = package.Buffer(group, 0, size, low_latency_mode=True, num_qps_per_rank=experts // ep)
    return lambda moe: DeepEPLowLatency(buffer, package.topk_idx_t, max_tokens)


def imported() -> Any:
    try:
        return importlib.import_module("deep_ep")
    except ImportError as e:
        raise InputError(f"the package deep_ep (github.com/deepseek-ai/DeepEP) cannot be imported: {e}") from None


class ReceivedPlan(Plan):
    """The plan of the tokens received, each with its choices that are here. handle: of the routes back."""

    handle: Any


class SlabPlan(Plan):
    """The plan of slabs. routes: experts [T, topk], weights [T, topk] and DeepEP's handle of this rank's tokens."""

    routes: tuple[Tensor, Tensor, Any]


class DeepEP:
    local = False

    def __init__(self, buffer: "Elastic", group: dist.ProcessGroup):
        self.buffer, self.ep = buffer, dist.get_world_size(group)

    def dispatch(self, x: Tensor, weights: Tensor, experts: Tensor, counts: Tensor) -> tuple[Tensor, Plan, Tensor]:
        rows, here, weights, handle = Dispatch.apply(x.bfloat16(), weights, experts, len(counts), self.buffer)
        plan = ReceivedPlan(*dispatch(here, counts_here(here, len(counts) // self.ep)))
        plan.handle = handle
        return rows.to(x.dtype), plan, weights

    def combine(self, y: Tensor, plan: Plan) -> Tensor:
        return Combine.apply(y.bfloat16(), plan.handle, self.buffer).to(y.dtype)  # type: ignore[attr-defined]


class DeepEPLowLatency:
    """DeepEP gives each expert a slab of ep M rows, M = max_tokens: E M rows of H in bf16 on a rank. The number of rows
    that came stays on the device. The plan gathers these rows, so that the experts compute no others. DeepEP applies
    the routing weights in fp32 when it sums the results, also those of FP8 experts, which otherwise apply them before
    the down projection: their results differ by rounding."""

    local = False

    def __init__(self, buffer: Any, index: torch.dtype, max_tokens: int):
        self.buffer, self.index, self.max_tokens = buffer, index, max_tokens

    def dispatch(self, x: Tensor, weights: Tensor, experts: Tensor, counts: Tensor) -> tuple[Tensor, SlabPlan, None]:
        expect_decode_pass(x, self.max_tokens)
        experts = experts.to(self.index)
        rows, received, handle, *_ = self.buffer.low_latency_dispatch(
            x.bfloat16().contiguous(), experts, self.max_tokens, len(counts), use_fp8=False
        )
        plan = SlabPlan(*plan_of_slabs(received, rows.shape[1]))
        plan.routes = experts, weights, handle
        return rows.flatten(0, 1).to(x.dtype), plan, None

    def combine(self, y: Tensor, plan: SlabPlan) -> Tensor:
        slabs = y.bfloat16().unflatten(0, (len(plan.offsets) - 1, -1))
        return self.buffer.low_latency_combine(slabs, *plan.routes)[0].to(y.dtype)


def plan_of_slabs(counts: Tensor, rows: int) -> Plan:
    """The plan of slabs [E, rows] of which expert e owns the first counts[e] int32 rows, one choice each."""
    expert, row = (torch.arange(n, dtype=torch.int32, device=counts.device) for n in (len(counts), rows))
    return dispatch(torch.where(row < counts[:, None], expert[:, None], -1).view(-1, 1), counts)


class Dispatch(torch.autograd.Function):
    """x [T, H] bf16, weights [T, topk] fp32, experts [T, topk] -> rows [R, H], their experts [R, topk] int32, which are
    numbered from 0 on this rank and -1 elsewhere, their weights, and the handle of their routes."""

    @staticmethod
    def forward(ctx, x, weights, experts, number, buffer):
        rows, here, weights, ctx.handle = buffer.dispatch(x, weights, experts, number)
        ctx.buffer, here = buffer, here.int()
        ctx.mark_non_differentiable(here)
        return rows, here, weights, ctx.handle

    @staticmethod
    @first_derivative_only
    def backward(ctx, d_rows, _, d_weights, __):
        return *ctx.buffer.combine(d_rows.contiguous(), ctx.handle, d_weights.contiguous()), *[None] * 3


class Combine(torch.autograd.Function):
    """y [R, H] bf16, one for each row that came -> their sums [T, H] on the ranks of the tokens."""

    @staticmethod
    def forward(ctx, y, handle, buffer):
        ctx.handle, ctx.buffer = handle, buffer
        return buffer.combine(y.contiguous(), handle)[0]

    @staticmethod
    @first_derivative_only
    def backward(ctx, dy):
        return ctx.buffer.dispatch_again(dy.contiguous(), ctx.handle), None, None


class Elastic:
    """ElasticBuffer of version 2. Received rows are in order of their ranks and tokens (`deterministic`); the host
    waits for their number, once a dispatch."""

    def __init__(self, package, group: dist.ProcessGroup, hidden: int, topk: int, tokens: int):
        self.index = package.topk_idx_t
        self.buffer = package.ElasticBuffer(
            group, num_max_tokens_per_rank=tokens, hidden=hidden, num_topk=topk, deterministic=True
        )

    def dispatch(self, x: Tensor, weights: Tensor, experts: Tensor, number: int) -> tuple[Tensor, Tensor, Tensor, Any]:
        rows, here, weights, handle, _ = self.buffer.dispatch(
            x, topk_idx=experts.to(self.index), topk_weights=weights, num_experts=number
        )
        return rows, here, weights, handle

    def dispatch_again(self, x: Tensor, handle: Any) -> Tensor:
        return self.buffer.dispatch(x, handle=handle)[0]

    def combine(self, y: Tensor, handle: Any, weights: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        summed, weights, _ = self.buffer.combine(y, handle, topk_weights=weights)
        return summed, weights


class Legacy(Elastic):
    """Buffer of version 1, which counts what goes where before."""

    def __init__(self, package, group: dist.ProcessGroup, hidden: int, topk: int, tokens: int):
        self.index, n, row = package.topk_idx_t, dist.get_world_size(group), 2 * hidden
        configs = package.Buffer.get_dispatch_config(n), package.Buffer.get_combine_config(n)
        sizes = (
            max(c.get_nvl_buffer_size_hint(row, n) for c in configs),
            max(c.get_rdma_buffer_size_hint(row, n) for c in configs),
        )
        self.buffer = package.Buffer(group, *sizes)

    def dispatch(self, x: Tensor, weights: Tensor, experts: Tensor, number: int) -> tuple[Tensor, Tensor, Tensor, Any]:
        experts = experts.to(self.index)
        per_rank, per_node, per_expert, in_rank, _ = self.buffer.get_dispatch_layout(experts, number)
        rows, here, weights, _, handle, _ = self.buffer.dispatch(
            x, topk_idx=experts, topk_weights=weights, num_tokens_per_rank=per_rank, num_tokens_per_rdma_rank=per_node,
            num_tokens_per_expert=per_expert, is_token_in_rank=in_rank,
        )  # fmt: skip
        return rows, here, weights, handle
