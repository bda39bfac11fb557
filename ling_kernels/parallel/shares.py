"""The share of a model that each rank trains: its heads, experts, rows of the vocabulary, stages of a pipeline, and the
parameters whose optimizer state it keeps. Also the sums over ranks that a step needs.

Replicas hold the same weights. Each parameter has an owner among the ranks that hold it: gradients are
summed on the owner, which alone keeps the optimizer's state and steps, and sends the new weights to the others (ZeRO
stage 1, arXiv 1910.02054, by whole parameters). As no parameter is cut, every optimizer gives the bits of one process,
also Muon, which needs whole matrices, and 8-bit AdamW, whose blocks and random bits follow a parameter.

With several copies of the optimizer's state (`Ranks.copies`) a parameter has an owner in each, which are at the same
number there. Gradients are summed within each copy, then over its owners, by an all-reduce, which gives all of them the
same bits. They step alike, as random bits follow the parameter, and send weights within their copy alone.
"""

from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from functools import cached_property
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..model import Ling
from ..nn import Exchange, MoE, Router
from ..ops.grad_norm import grad_norm
from .boxes import EVERYTHING, Part, equal_part
from .context import context_parallel_
from .exchange import expert_parameters, shard_experts_
from .official import Parameter, official_keys
from .pipeline import Pipeline
from .ranks import Division, Ranks
from .tensor import tensor_parallel_
from .vocabulary import shard_vocabulary_
from .whole import Stepped, WholeMatrices


class Owners:
    """Chooses an owner for each parameter of a stage of one of `pp`: the one with the least so far."""

    def __init__(self, pp: int):
        self.pp = pp
        self.loads: dict[tuple[Hashable, int], list[int]] = {}  # numbers of elements

    def add(self, name: str, size: int, group: Hashable, members: int) -> int:
        """The number of the owner among the members of a group, of a parameter with so many elements."""
        load = self.loads.setdefault((group, members), [0] * members)
        # Stages that hold the same weight have its owner at the same place, so that its sums have the same order.
        several = VOCABULARY.index(name) % members if self.pp > 1 and name in VOCABULARY else None
        number = load.index(min(load)) if several is None else several
        load[number] += size
        return number


class Shares:
    """Divides `model`, whole and equal on all ranks, in place, as `ranks` say; make its optimizer afterwards.

        shares = Shares(model, ranks)
        loss.backward()  # each rank's loss is its tokens' share of the global loss
        shares.sum_gradients_()
        norm = shares.norm()  # then clip, and step the optimizer: parameters of other owners have no gradient
        shares.spread_weights_()
        shares.sum_counts_()  # so that balance_ sees the global batch

    pipeline: makes the pipeline of the divided model, in place. exchange: see `shard_experts_`. whole: the optimizer,
    made of `stepped`, steps whole matrices where tensor parallelism divides them (whole.py). Methods are called by
    every rank together. With one process they do nothing, and `norm` is the plain norm.
    """

    def __init__(
        self,
        model: Ling,
        ranks: Ranks,
        pipeline: Callable[[], Pipeline] | None = None,
        exchange: str | Callable[[MoE], Exchange] = "bf16",
        whole: bool = False,
    ):
        self.model, self.ranks, self.config, self.whole = model, ranks, model.config, whole
        self.names = [name for name, _ in model.named_parameters()]  # of the whole model's trained ones
        self.modules = {name for name, _ in model.named_modules()}
        self.routers = [name for name, module in model.named_modules() if isinstance(module, Router)]
        # By name, as a parameter may become another object on its way to a GPU: how it is divided, the group of those
        # that hold it too, its owner's rank there.
        self.divided: dict[str, Division] = {}
        self.begun: list[tuple[nn.Parameter, int, Any]] = []  # sums in a copy under way: of what, on which rank
        if ranks.context is not None:
            context_parallel_(model, ranks.context)
        self.cuts: dict[str, Part] = {}  # this rank's parts of weights that tensor parallelism divides
        if ranks.tensor.group is not None:
            self.cuts = tensor_parallel_(model, ranks.tensor.group)
            self.divided |= dict.fromkeys(self.cuts, ranks.tensor)
        if ranks.experts.group is not None:
            shard_experts_(model, ranks.nodes or ranks.experts.group, exchange)
            experts = expert_parameters(model)
            self.divided |= {name: ranks.experts for name, p in model.named_parameters() if p in experts}
        if ranks.vocabulary.group is not None:
            shard_vocabulary_(model, ranks.vocabulary.group)
            self.divided |= dict.fromkeys(VOCABULARY, ranks.vocabulary)
        self.pipeline = pipeline() if pipeline else None
        self.counted_elsewhere = self.pipeline.held_before() if self.pipeline else set()
        self.adapters: set[str] = set()  # of the whole model: nothing else is trained where there are any
        self.choose_owners()

    def choose_owners(self) -> None:
        ranks, owners = self.ranks, Owners(self.ranks.pp)
        self.group: dict[str, dist.ProcessGroup | None] = {}
        self.owner: dict[str, int] = {}
        self.keeper: dict[str, int] = {}  # of the ranks that own a weight's parts, the one with the whole weight
        for name, p in self.model.named_parameters():
            group = self.group[name] = self.divided[name].twins if name in self.divided else ranks.copy
            keepers = ranks.tensor.number if self.whole and name in self.cuts and p.requires_grad else 1
            number = owners.add(name, p.numel(), group, keepers * (dist.get_world_size(group) if group else 1))
            self.owner[name], keeper = divmod(number, keepers)
            if keepers > 1:
                self.keeper[name] = keeper

    def add_adapters_(self, keys: dict[str, Parameter], weights: dict[str, str]) -> None:
        """Take in adapters (adapters.py), which the model has. keys: of the whole model's, by name; weights: the names
        of the weights that this rank's adapters are of, whose rows b divides, and whose columns a."""
        self.adapters, self.names = {*keys}, [*keys]
        self.official.update(keys)
        parts = {adapter: self.cuts[weight] for adapter, weight in weights.items() if weight in self.cuts}
        of_adapters = {f"{adapter}.{'a' if part.dim else 'b'}": part for adapter, part in parts.items()}
        self.cuts |= of_adapters
        self.divided |= dict.fromkeys(of_adapters, self.ranks.tensor)
        if self.ranks.experts.group is not None:
            of_experts = expert_parameters(self.model)
            named = {name for name, p in self.model.named_parameters() if p in of_experts}
            self.divided |= dict.fromkeys(named, self.ranks.experts)
        self.choose_owners()

    @cached_property
    def official(self) -> dict[str, Parameter]:
        """The parameters and experts' biases of the whole model."""
        return official_keys(self.config)

    def owns(self, name: str, replica: int | None = None) -> bool:
        """Whether this rank, or another replica of its stage, sums the parameter's gradient, of the part that it holds;
        `steps` says which rank has the optimizer's state."""
        replica = self.ranks.replica if replica is None else replica
        number = self.divided[name].number if name in self.divided else 1
        return replica % self.ranks.copy_size // number == self.owner[name]

    def steps(self, name: str, replica: int | None = None) -> bool:
        """Whether this rank, or another replica of its stage, has the parameter's optimizer state."""
        part = (self.ranks.replica if replica is None else replica) % self.ranks.tensor.number
        return self.owns(name, replica) and self.keeper.get(name, part) == part

    @cached_property
    def whole_matrices(self) -> WholeMatrices | None:
        if not self.keeper or self.ranks.tensor.group is None:
            return None
        keepers = {name: keeper for name, keeper in self.keeper.items() if self.owns(name)}
        shapes = {name: self.official[name].shape for name in keepers}
        return WholeMatrices(self.model, self.ranks.tensor.group, shapes, keepers, self.cuts)

    @property
    def stepped(self) -> Stepped:
        """The parameters for the optimizer; asked for the first time when the model has its weights, by every rank."""
        return Stepped(self.model, self.whole_matrices.wholes if self.whole_matrices else {})

    def trained(self) -> list[tuple[nn.Parameter, int, dist.ProcessGroup | None]]:
        """Trained parameters, with the owner's rank among all and the group of those in the copy that hold it too."""
        named = ((name, p) for name, p in self.model.named_parameters() if p.requires_grad)
        found = ((p, self.group[name], self.owner[name]) for name, p in named)
        return [(p, dist.get_global_rank(g, owner) if g else self.ranks.rank, g) for p, g, owner in found]

    @contextmanager
    def sums_in_backward(self) -> Iterator[None]:
        """Around the last backward of a step, or a pipeline's step: the sum of a gradient begins once the gradient is
        complete, while the backward goes on; `sum_gradients_` waits for them. They have groups that no backward uses,
        and begin in one order on all ranks of a stage, whatever their data: without a pipeline roughly that in which
        gradients become complete, with one that in which its schedule completes stages. All begin before this ends, so
        that no later message comes between."""
        waiting: dict[Tensor, tuple[int, dist.ProcessGroup | None]] = {p: shared for p, *shared in self.to_sum()}
        complete: set[Tensor] = set()

        def of_weight(p: Tensor) -> None:
            complete.add(p)
            while waiting and (first := next(iter(waiting))) in complete:
                self.begin_sum(first, *waiting.pop(first))

        def of_stage(done: set[nn.Parameter]) -> None:
            for p in [p for p in waiting if p in done]:
                self.begin_sum(p, *waiting.pop(p))

        hooks = []
        if self.pipeline is not None:
            self.pipeline.on_complete = of_stage
        else:
            hooks = [p.register_post_accumulate_grad_hook(of_weight) for p in waiting]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()
            if self.pipeline is not None:
                self.pipeline.on_complete = None
        for p, shared in waiting.items():
            self.begin_sum(p, *shared)

    def to_sum(self) -> list[tuple[nn.Parameter, int, dist.ProcessGroup | None]]:
        """Parameters whose gradients other ranks have, too."""
        return [(p, owner, g) for p, owner, g in self.trained()[::-1] if g is not None or self.ranks.copies > 1]

    def begin_sum(self, p: nn.Parameter, owner: int, group: dist.ProcessGroup | None) -> None:
        if p.grad is None:  # this rank had no token for it
            p.grad = torch.zeros_like(p)
        work = None if group is None else dist.reduce(p.grad, owner, group=group, async_op=True)
        self.begun.append((p, owner, work))

    def sum_over_copies(self) -> None:
        """Sum over the copies what is summed in this one. Not in the backward: sums of two groups would begin in an
        order that depends on time, and NCCL wants one order on all ranks."""
        begun = []
        for p, owner, work in self.begun:
            wait([work])
            if owner == self.ranks.rank and self.ranks.equals is not None:
                begun.append(dist.all_reduce(p.grad, group=self.ranks.equals, async_op=True))
        wait(begun)

    def sum_gradients_(self) -> None:
        """Add up every gradient on its owner, of every copy; the others' are freed. The loss of each rank must be its
        tokens' share of the global loss."""
        if not self.begun:
            for shared in self.to_sum():
                self.begin_sum(*shared)
        self.sum_over_copies()
        for p, owner, _ in self.begun:
            if owner != self.ranks.rank:
                p.grad = None
        self.begun.clear()
        if self.whole_matrices:
            self.whole_matrices.gather_gradients_()

    def norm(self) -> Tensor:
        """The norm of all gradients after `sum_gradients_`, a scalar that is equal on every rank."""
        named = [(name, p.grad) for name, p in self.stepped.named_parameters() if name not in self.counted_elsewhere]
        mine = [name for name, grad in named if grad is not None]
        grads = [grad for _, grad in named if grad is not None]
        if self.ranks.world is None:
            return grad_norm(grads)
        device = next(self.model.parameters()).device
        # Squares of fp32 norms are exact in fp64, and so are their roots: parameters with one owner count with the bits
        # that they have in one process.
        squares = torch.zeros(len(self.names), dtype=torch.float64, device=device)
        if mine and self.ranks.replica < self.ranks.copy_size:  # all copies have the same
            index = {name: i for i, name in enumerate(self.names)}
            norms = torch.stack(torch._foreach_norm(grads, 2, dtype=torch.float32))
            squares[[index[name] for name in mine]] = norms.double().square()
        dist.all_reduce(squares, group=self.ranks.world)
        return torch.linalg.vector_norm(squares.sqrt().float())

    @torch.no_grad()
    def spread_weights_(self) -> None:
        """Send each parameter from its owner, which has stepped it, to the others of the copy."""
        if self.whole_matrices:
            self.whole_matrices.scatter_weights_()
        shared = [(p, owner, group) for p, owner, group in self.trained() if group is not None]
        wait([dist.broadcast(p.detach(), owner, group=group, async_op=True) for p, owner, group in shared])
        torch.autograd.graph.increment_version([p for p, _, _ in shared])  # FP8 copies of them are stale

    def sum_counts_(self) -> Tensor | None:
        """Add up the routers' counts of tokens over the global batch, so that `balance_` moves all ranks' biases alike.
        Returns those of the whole model's layers, [MoE layers, E] int64, on every rank; None without MoE layers."""
        if self.ranks.replicas is not None:
            for router in self.model.routers():
                dist.all_reduce(router.counts, group=self.ranks.replicas)
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
        if name in self.cuts:
            return self.cuts[name]
        division = self.divided[name]
        return equal_part(division.part, division.number, self.official[name].shape[0])

    def state_part_of(self, name: str) -> Part:
        """Which part of a parameter's optimizer state the rank that steps it has."""
        return EVERYTHING if name in self.keeper else self.part_of(name)

    def owned(self, replica: int | None = None) -> set[str]:
        """Names of the parameters and experts' biases that this rank, or another replica of its stage, writes to a
        checkpoint: those that it owns, in turn of the copies, and once of those that several stages hold; biases, which
        are whole and equal, on the first."""
        replica = self.ranks.replica if replica is None else replica
        biases = [name for name, _ in self.model.named_buffers() if name.endswith("expert_bias")]
        named, copies = enumerate(name for name, _ in self.model.named_parameters()), self.ranks.copies
        of_copy = {name for i, name in named if i % copies == replica // self.ranks.copy_size}
        names = {name for name in of_copy if self.owns(name, replica)}
        return (names - self.counted_elsewhere).union(biases if replica == 0 else [])


VOCABULARY = ("word_embeddings.weight", "lm_head.weight")  # which several stages of a pipeline may hold


def wait(works: list) -> None:
    for work in works:
        if work is not None:
            work.wait()
