"""Expert parallelism: each process of a group holds E / ep experts of every layer, and rows travel to their experts.

Ranks take different tokens. A row for every choice of an expert goes to the expert's rank by an all-to-all whose sizes
follow the routing, no row is dropped or padded, and its result comes back the same way. The sizes are read on the host,
once a layer and forward.
"""

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..errors import InputError
from ..nn import Experts, MoE
from ..ops.dispatch import Plan, dispatch
from ..ops.grad_norm import grad_norm
from ..ops.permute import permute
from ..ops.unpermute import unpermute


class ReceivedPlan(Plan):
    """The plan of the rows received: R tokens with one choice each. The attributes are what `combine` needs."""

    sent: Plan  # of the tokens here
    sizes: tuple[list[int], list[int]]  # rows sent to, and received from, each rank
    weights: Tensor | None  # routing weights [T, topk] that are applied after the rows have come back


class AllToAll:
    """The exchange of an MoE layer whose experts are divided over the ranks of a process group, in order of rank.

    moe: the layer, with this rank's experts; it may become FP8 later. Results and gradients have the bits of one
    process with all experts, except that gradients of weights sum rows in the order of their ranks.
    """

    local = False

    def __init__(self, moe: MoE, group: dist.ProcessGroup):
        self.moe, self.group = moe, group
        self.ep = dist.get_world_size(group)

    def dispatch(
        self, x: Tensor, weights: Tensor, experts: Tensor, counts: Tensor
    ) -> tuple[Tensor, ReceivedPlan, Tensor | None]:
        sent = dispatch(experts, counts)
        owners, received, sizes = self.received(experts, counts)
        plan = ReceivedPlan(*dispatch(owners, received))
        plan.sent, plan.sizes, plan.weights = sent, sizes, weights
        rows = self.send(permute(x, sent), sizes)
        if not self.moe.experts.fold_weights:
            return rows, plan, None
        plan.weights = None
        return rows, plan, self.send(weights.flatten()[sent.source.long()][:, None], sizes)

    def combine(self, y: Tensor, plan: ReceivedPlan) -> Tensor:
        there, here = plan.sizes
        y = self.send(y, (here, there))
        if unrouted := len(plan.sent.source) - len(y):  # choices that are not routed have rows at the end, never read
            y = nn.functional.pad(y, (0, 0, 0, unrouted))
        return unpermute(y, plan.sent, plan.weights)

    def received(self, experts: Tensor, counts: Tensor) -> tuple[Tensor, Tensor, tuple[list[int], list[int]]]:
        """Which rows come here: each one's expert [R, 1] int32, counts [E / ep] int32, and rows to and from each rank.

        Rows arrive by rank, and by expert within a rank.
        """
        mine = counts.view(self.ep, -1)
        theirs = torch.empty_like(mine)
        dist.all_to_all_single(theirs, mine, group=self.group)
        owner = torch.arange(mine.shape[1], dtype=torch.int32, device=counts.device).repeat(self.ep)
        to, from_ = torch.stack([mine.sum(1), theirs.sum(1)]).tolist()
        owners = owner.repeat_interleave(theirs.flatten(), output_size=sum(from_))
        return owners[:, None], theirs.sum(0).int(), (to, from_)

    def send(self, rows: Tensor, sizes: tuple[list[int], list[int]]) -> Tensor:
        """rows [S, ...] -> [R, ...], sizes as `received` gives them; rows past their sum stay here."""
        return Send.apply(rows, *sizes, self.group)


class Send(torch.autograd.Function):
    """An all-to-all with given sizes; the gradient takes the way back."""

    @staticmethod
    def forward(ctx, rows: Tensor, to: list[int], from_: list[int], group: dist.ProcessGroup) -> Tensor:
        ctx.to, ctx.from_, ctx.group, ctx.length = to, from_, group, len(rows)
        out = rows.new_empty(sum(from_), *rows.shape[1:])
        dist.all_to_all_single(out, rows[: sum(to)].contiguous(), from_, to, group=group)
        return out

    @staticmethod
    def backward(ctx, gradient: Tensor):  # type: ignore[override]
        out = gradient.new_zeros(ctx.length, *gradient.shape[1:])
        part = out[: sum(ctx.to)]
        dist.all_to_all_single(part, gradient.contiguous(), ctx.to, ctx.from_, group=ctx.group)
        return out, None, None, None


def shard_experts_(model: nn.Module, group: dist.ProcessGroup) -> None:
    """Keep this rank's experts of every MoE layer of `model`, in place, and exchange rows over `group`.

    Every rank must have the same weights before. Rank r of ep keeps experts r E / ep up to (r + 1) E / ep; router, bias
    and counts stay those of all experts. Call it before an optimizer is made, and before or after `to_fp8`. Raises
    InputError where ep does not divide the experts.
    """
    ep, rank = dist.get_world_size(group), dist.get_rank(group)
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
        moe.exchange = AllToAll(moe, group)  # type: ignore[assignment]


def expert_parameters(model: nn.Module) -> set[nn.Parameter]:
    """The parameters that differ from rank to rank under expert parallelism."""
    return {p for m in model.modules() if isinstance(m, Experts) for p in m.parameters()}


def sum_gradients_(model: nn.Module, group: dist.ProcessGroup) -> None:
    """Add up the gradients that every rank has a part of: all but the experts', which have seen all ranks' tokens.

    The loss of each rank must be its tokens' share of the global loss: their sum over the number of all tokens.
    """
    experts = expert_parameters(model)
    for p in model.parameters():
        if p not in experts and p.requires_grad:
            if p.grad is None:  # this rank had no token for it
                p.grad = torch.zeros_like(p)
            dist.all_reduce(p.grad, group=group)


def sum_counts_(model: nn.Module, group: dist.ProcessGroup) -> None:
    """Add up the routers' counts of tokens, so that `balance_` sees the global batch and moves all ranks' biases
    alike."""
    for moe in model.modules():
        if isinstance(moe, MoE):
            dist.all_reduce(moe.router.counts, group=group)


def global_norm(model: nn.Module, group: dist.ProcessGroup) -> Tensor:
    """The norm of all gradients after `sum_gradients_`, a scalar that is equal on every rank: experts of all ranks
    count, and each other parameter once."""
    experts = expert_parameters(model)
    grads = [(p in experts, p.grad) for p in model.parameters() if p.grad is not None]
    dense = grad_norm([g for is_expert, g in grads if not is_expert])
    return (dense.square() + sum_of_squares([g for is_expert, g in grads if is_expert], dense.device, group)).sqrt()


def sum_of_squares(grads: Sequence[Tensor], device: torch.device, group: dist.ProcessGroup) -> Tensor:
    """The sum over all ranks' gradients of their squares, a scalar on `device`; a rank may have none."""
    squares = grad_norm(grads).square().to(device)
    dist.all_reduce(squares, group=group)
    return squares
