"""The share of a model that each rank trains: its experts, and the parameters whose optimizer state it keeps.

Data-parallel ranks hold the same weights. Each parameter has an owner among the ranks that hold it: gradients are
summed on the owner, which alone keeps the optimizer's state and steps, and sends the new weights to the others (ZeRO
stage 1, arXiv 1910.02054, by whole parameters). As no parameter is cut, every optimizer gives the bits of one process,
also Muon, which needs whole matrices, and 8-bit AdamW, whose blocks and random bits follow a parameter.
"""

from collections.abc import Callable
from functools import cached_property

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..model import Ling
from ..nn import Router
from ..ops.grad_norm import grad_norm
from .boxes import EVERYTHING, Part, equal_part
from .exchange import expert_parameters, shard_experts_, sum_counts_
from .official import Parameter, official_keys
from .pipeline import Pipeline
from .ranks import Ranks


class Shares:
    """Divides `model`, whole and equal on all ranks, in place; make its optimizer afterwards.

    Methods are called by every rank together. With one process they do nothing, and `norm` is the plain norm.
    """

    def __init__(self, model: Ling, ranks: Ranks, pipeline: Callable[[], Pipeline] | None = None):
        self.model, self.ranks, self.config = model, ranks, model.config
        self.names = [name for name, _ in model.named_parameters()]
        self.routers = [name for name, module in model.named_modules() if isinstance(module, Router)]
        if ranks.experts is not None:
            shard_experts_(model, ranks.experts)
        self.pipeline = pipeline() if pipeline else None
        self.counted_elsewhere = self.pipeline.held_before() if self.pipeline else set()
        divided = expert_parameters(model) if ranks.ep > 1 else set()
        self.divided = {name for name, p in model.named_parameters() if p in divided}
        # By name, as a parameter may become another object on its way to a GPU: its group, its owner's rank there.
        self.group: dict[str, dist.ProcessGroup | None] = {}
        self.owner: dict[str, int] = {}
        loads = {group: [0] * dist.get_world_size(group) for group in (ranks.replicas, ranks.twins) if group}
        for name, p in model.named_parameters():
            group = self.group[name] = ranks.twins if name in self.divided else ranks.replicas
            load = loads[group] if group else [0]
            # Stages that hold the same weight have its owner at the same place, so that its sums have the same order.
            several = SEVERAL.index(name) % ranks.dp if ranks.pp > 1 and name in SEVERAL else None
            self.owner[name] = load.index(min(load)) if several is None else several
            load[self.owner[name]] += p.numel()

    @cached_property
    def official(self) -> dict[str, Parameter]:
        """The parameters and experts' biases of the whole model."""
        return official_keys(self.config)

    def owns(self, name: str) -> bool:
        group = self.group[name]
        return group is None or dist.get_rank(group) == self.owner[name]

    def shared(self) -> list[tuple[nn.Parameter, int, dist.ProcessGroup]]:
        """Parameters that other ranks hold too, with the owner's rank among all and the group."""
        found = ((p, self.group[name], self.owner[name]) for name, p in self.model.named_parameters())
        return [(p, dist.get_global_rank(group, owner), group) for p, group, owner in found if group is not None]

    def sum_gradients_(self) -> None:
        """Add up every gradient on its owner; the others' are freed. The loss of each rank must be its tokens' share
        of the global loss."""
        shared = [(p, owner, group) for p, owner, group in self.shared() if p.requires_grad]
        for p, _, _ in shared:
            if p.grad is None:  # this rank had no token for it
                p.grad = torch.zeros_like(p)
        wait([dist.reduce(p.grad, owner, group=group, async_op=True) for p, owner, group in shared])
        for p, owner, _ in shared:
            if owner != self.ranks.rank:
                p.grad = None

    def norm(self) -> Tensor:
        """The norm of all gradients after `sum_gradients_`, a scalar that is equal on every rank."""
        named = [(name, p.grad) for name, p in self.model.named_parameters() if name not in self.counted_elsewhere]
        mine = [name for name, grad in named if grad is not None]
        grads = [grad for _, grad in named if grad is not None]
        if self.ranks.world is None:
            return grad_norm(grads)
        device = next(self.model.parameters()).device
        # Squares of fp32 norms are exact in fp64, and so are their roots: parameters with one owner count with the bits
        # that they have in one process.
        squares = torch.zeros(len(self.names), dtype=torch.float64, device=device)
        if mine:
            index = {name: i for i, name in enumerate(self.names)}
            norms = torch.stack(torch._foreach_norm(grads, 2, dtype=torch.float32))
            squares[[index[name] for name in mine]] = norms.double().square()
        dist.all_reduce(squares, group=self.ranks.world)
        return torch.linalg.vector_norm(squares.sqrt().float())

    @torch.no_grad()
    def spread_weights_(self) -> None:
        """Send each parameter from its owner, which has stepped it, to the others."""
        shared = self.shared()
        wait([dist.broadcast(p.detach(), owner, group=group, async_op=True) for p, owner, group in shared])
        torch.autograd.graph.increment_version([p for p, _, _ in shared])  # FP8 copies of them are stale

    def sum_counts_(self) -> Tensor | None:
        """Add up the routers' counts of tokens over the global batch. Returns those of the whole model's layers,
        [MoE layers, E] int64, on every rank; None without MoE layers."""
        if self.ranks.replicas is not None:
            sum_counts_(self.model, self.ranks.replicas)
        if not self.routers:
            return None
        if self.ranks.stages is None:
            return self.model.expert_counts().long()
        here = {name: module for name, module in self.model.named_modules() if isinstance(module, Router)}
        none = torch.zeros(self.config.num_experts, dtype=torch.int64, device=next(self.model.parameters()).device)
        counts = torch.stack([here[name].counts.long() if name in here else none for name in self.routers])
        dist.all_reduce(counts, group=self.ranks.stages)
        return counts

    def part_of(self, name: str) -> Part:
        """Which part of a whole parameter or experts' bias this rank holds."""
        if name not in self.divided:
            return EVERYTHING
        return equal_part(self.ranks.expert_part, self.ranks.ep, self.official[name].shape[0])

    def owned(self) -> set[str]:
        """Names of the parameters and experts' biases that this rank writes to a checkpoint: those whose optimizer
        state it keeps, once of those that several stages hold; biases, which are whole and equal, on the first."""
        biases = [name for name, _ in self.model.named_buffers() if name.endswith("expert_bias")]
        names = {name for name, _ in self.model.named_parameters() if self.owns(name)} - self.counted_elsewhere
        return names.union(biases if self.ranks.replica == 0 else [])


SEVERAL = ("word_embeddings.weight", "lm_head.weight")  # weights that several stages may hold


def wait(works: list) -> None:
    for work in works:
        work.wait()
