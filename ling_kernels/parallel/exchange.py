"""Expert parallelism: each process of a group holds E / ep experts of every layer, and rows travel to their experts.

Ranks take different tokens. A row for every choice of an expert goes to the expert's rank by an all-to-all whose sizes
follow the routing, no row is dropped or padded, and its result comes back the same way. The sizes are read on the host,
once a layer and forward.
"""

from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from ..errors import InputError
from ..nn import Exchange, Experts, MoE
from ..op import E4M3, first_derivative_only
from ..ops.dispatch import Plan, counts_here, dispatch
from ..ops.permute import permute, permute_quantize
from ..ops.quantize import BLOCK
from ..ops.unpermute import unpermute
from .collectives import Send, Sizes, exchanged

EXCHANGES = ("bf16", "fp8")  # how rows travel to their experts by all-to-all: as they are, or in FP8
OVER_BUFFERS = ("deepep", "symmetric")  # deep_ep.py and symmetric.py, for a number of tokens that is given before


class ReceivedPlan(Plan):
    """The plan of the rows received: R tokens with one choice each. The attributes are what `combine` needs."""

    sent: Plan  # of the tokens here
    sizes: Sizes
    weights: Tensor | None  # routing weights [T, topk] that are applied after the rows have come back
    crossing: tuple[Plan, Sizes]  # of the rows between nodes, by `ByNodes`


class AllToAll:
    """The exchange of an MoE layer whose experts are divided over the ranks of a process group, in order of rank.

    moe: the layer, with this rank's experts; it may become FP8 later. Results and gradients have the bits of one
    process with all experts, except that gradients of weights sum rows in the order of their ranks.

    fp8: rows travel to FP8 experts in FP8, gradients and results as they are. The experts' scales must be powers of
    two: those quantise the received rows to the same numbers again, so that results and gradients of the
    inputs keep the bits of one process. Weight gradients are of the rows that were received, rounded to FP8.
    """

    local = False

    def __init__(self, moe: MoE, group: dist.ProcessGroup, fp8: bool = False):
        self.moe, self.group, self.fp8 = moe, group, fp8
        self.ep = dist.get_world_size(group)

    def dispatch(
        self, x: Tensor, weights: Tensor, experts: Tensor, counts: Tensor
    ) -> tuple[Tensor, ReceivedPlan, Tensor | None]:
        sent = dispatch(experts, counts)
        in_fp8 = self.fp8 and takes_fp8_rows(self.moe.experts)
        owners, received, sizes = self.received(experts, counts)
        plan = ReceivedPlan(*dispatch(owners, received))
        plan.sent, plan.sizes, plan.weights = sent, sizes, weights
        rows = SendFp8.apply(x, *sent, sizes, self.group) if in_fp8 else self.send(permute(x, sent), sizes)
        if not self.moe.experts.fold_weights:
            return rows, plan, None
        plan.weights = None
        return rows, plan, self.send(weights.flatten()[sent.source.long()][:, None], sizes)

    def combine(self, y: Tensor, plan: ReceivedPlan) -> Tensor:
        there, here = plan.sizes
        return unpermute(with_unrouted(self.send(y, (here, there)), plan.sent), plan.sent, plan.weights)

    def send(self, rows: Tensor, sizes: Sizes) -> Tensor:
        return Send.apply(rows, *sizes, self.group)

    def received(self, experts: Tensor, counts: Tensor) -> tuple[Tensor, Tensor, Sizes]:
        """Which rows come here: each one's expert [R, 1] int32, counts [E / ep] int32, and rows to and from each rank.

        Rows arrive by rank, and by expert within a rank.
        """
        theirs, sizes = self.exchanged(experts, counts)
        owner = torch.arange(theirs.shape[1], dtype=torch.int32, device=counts.device).repeat(self.ep)
        owners = owner.repeat_interleave(theirs.flatten(), output_size=sum(sizes[1]))
        return owners[:, None], theirs.sum(0).int(), sizes

    def exchanged(self, experts: Tensor, counts: Tensor) -> tuple[Tensor, Sizes]:
        """How many rows each expert here gets from each rank, [ep, E / ep], and rows to and from each rank."""
        return exchanged(counts.view(self.ep, -1), experts.numel(), self.group)


class ByNodes:
    """The exchange in two stages, for ranks on several nodes: a token crosses to a node once, whatever the number of
    its experts there, and is spread inside that node. Ling's group limit lets a token choose experts of at most 4 of 8
    groups.

    mesh: nodes x ranks of a node; rank l of node i holds the experts of part i x (ranks of a node) + l, and exchanges
    rows with the ranks l of the other nodes. Rows arrive as by `AllToAll` over all ranks. Their results are summed in
    each node first, and these sums rounded to the rows' type: once more than by `AllToAll`. fp8: as there.
    """

    local = False

    def __init__(self, moe: MoE, mesh: DeviceMesh, fp8: bool = False):
        self.nodes, self.between, self.fp8 = mesh.size(0), mesh.get_group(0), fp8
        self.inside = AllToAll(moe, mesh.get_group(1), fp8)

    def dispatch(
        self, x: Tensor, weights: Tensor, experts: Tensor, counts: Tensor
    ) -> tuple[Tensor, ReceivedPlan, Tensor | None]:
        number = len(counts) // self.nodes  # of experts of a node
        node = experts.div(number, rounding_mode="floor")  # -1 stays -1
        every = torch.arange(self.nodes, dtype=torch.int32, device=x.device)
        crosses = (node[:, :, None] == every).any(1)  # [T, nodes]
        crossing = dispatch(torch.where(crosses, every, -1), crosses.sum(0, dtype=torch.int32))
        _, sizes = exchanged(crosses.sum(0, dtype=torch.int32)[:, None], crosses.numel(), self.between)
        source = crossing.source[: sum(sizes[0])].long()
        token, to = source // self.nodes, source[:, None] % self.nodes
        chosen = node[token] == to  # which choices of a row are on the node to which it goes
        there = torch.where(chosen, experts[token] - to * number, -1).int()
        weights = permute(weights, crossing)
        rows = (
            SendFp8.apply(x, *crossing, sizes, self.between)
            if self.fp8 and takes_fp8_rows(self.inside.moe.experts)
            else Send.apply(permute(x, crossing), *sizes, self.between)
        )
        here, weights = (Send.apply(t, *sizes, self.between) for t in (there, weights))
        rows, plan, weights = self.inside.dispatch(rows, weights, here, counts_here(here, number))
        plan.crossing = crossing, sizes
        return rows, plan, weights

    def combine(self, y: Tensor, plan: ReceivedPlan) -> Tensor:
        crossing, (there, here) = plan.crossing
        rows = Send.apply(self.inside.combine(y, plan), here, there, self.between)
        return unpermute(with_unrouted(rows, crossing), crossing)


class SendFp8(torch.autograd.Function):
    """x [T, H] -> the rows [R, H] that arrive here when every rank sends those of its plan, in FP8: H + H / 32 bytes a
    row, e4m3 and its fp32 scales, powers of two.

    Rows have x's dtype, in which code times scale is exact. The gradient returns as it is.
    """

    @staticmethod
    def forward(ctx, x: Tensor, offsets, slot, source, padded_offsets, sizes: Sizes, group: dist.ProcessGroup):
        plan = Plan(offsets, slot, source, padded_offsets)
        ctx.save_for_backward(*plan)
        ctx.sizes, ctx.group = sizes, group
        q, scale = permute_quantize(x, plan, pow2=True)
        # torch's collectives on CPUs do not know float8
        q, scale = (Send.apply(t.contiguous(), *sizes, group) for t in (q.view(torch.uint8), scale))
        return exact_rows(q.view(E4M3), scale, x.dtype)

    @staticmethod
    @first_derivative_only
    def backward(ctx, gradient: Tensor):
        plan = Plan(*ctx.saved_tensors)
        there, here = ctx.sizes
        return unpermute(with_unrouted(Send.apply(gradient, here, there, ctx.group), plan), plan), *[None] * 6


def exact_rows(q: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """q [R, H] e4m3, scale [R, H/128], powers of two -> code times scale [R, H], which is exact in dtype."""
    return (q.to(dtype).unflatten(1, (-1, BLOCK)) * scale.to(dtype)[..., None]).flatten(1)


def takes_fp8_rows(experts: nn.Module) -> bool:
    """Whether rows can travel to them in FP8: not to bf16 experts, to which a layer may have switched. Raises
    InputError for FP8 experts with scales of any value."""
    fp8 = getattr(experts, "fp8", None)
    if fp8 is not None and not fp8.pow2:
        raise InputError("rows can travel in FP8 to FP8 experts with scales that are powers of two (pow2) alone")
    return fp8 is not None


def with_unrouted(rows: Tensor, plan: Plan) -> Tensor:
    """rows [routed choices, H] -> [S, H]: choices that are not routed have rows at the end, which are never read."""
    unrouted = len(plan.source) - len(rows)
    return nn.functional.pad(rows, (0, 0, 0, unrouted)) if unrouted else rows


def shard_experts_(
    model: nn.Module, group: dist.ProcessGroup | DeviceMesh, exchange: str | Callable[[MoE], Exchange] = "bf16"
) -> None:
    """Keep this rank's experts of every MoE layer of `model`, in place, and exchange rows over `group`: a process
    group, or a mesh of nodes x ranks of a node, for the exchange `ByNodes`.

    Every rank must have the same weights before. Rank r of ep keeps experts r E / ep up to (r + 1) E / ep; router, bias
    and counts stay those of all experts. Call it before an optimizer is made, and before or after `to_fp8`. exchange:
    "fp8" sends rows to their experts in FP8, see `AllToAll`; a function makes another exchange for a layer, as the one
    that `deep_ep.deep_ep` returns. Raises InputError where ep does not divide the experts; the forward raises it for
    "fp8" and FP8 experts without pow2 scales.
    """
    if isinstance(exchange, str) and exchange not in EXCHANGES:
        raise InputError(f"exchange {exchange!r}: it must be one of {', '.join(EXCHANGES)}")
    if isinstance(group, DeviceMesh):
        ep, rank = group.size(), dist.get_rank(group.get_group(0)) * group.size(1) + dist.get_rank(group.get_group(1))
    else:
        ep, rank = dist.get_world_size(group), dist.get_rank(group)
    kind = ByNodes if isinstance(group, DeviceMesh) else AllToAll
    for name, moe in model.named_modules():
        if not isinstance(moe, MoE):
            continue
        number = len(moe.experts.gate_up)
        if number % ep:
            raise InputError(f"{name} has {number} experts, which {ep} ranks cannot share equally")
        first = rank * number // ep
        for weight in ("gate_up", "down"):
            p = getattr(moe.experts, weight)
            part = p.detach()[first : first + number // ep].clone()
            setattr(moe.experts, weight, nn.Parameter(part, requires_grad=p.requires_grad))
        made = exchange(moe) if callable(exchange) else kind(moe, group, exchange == "fp8")  # type: ignore[arg-type]
        moe.exchange = made  # type: ignore[assignment]


def expert_parameters(model: nn.Module) -> set[nn.Parameter]:
    """The parameters of all experts."""
    return {p for m in model.modules() if isinstance(m, Experts) for p in m.parameters()}
