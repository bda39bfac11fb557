"""A pipeline of unequal stages on torch.distributed.pipelining, with the layouts of pipeline_layout.py.

A stage passes on its hidden states [T, H] and the losses so far [3], main, MTP and z-loss, so that every stage adds its
routers' z-loss, and losses may be computed in several stages. All ranks have all micro batches. The embedding (E and
m) and the head (several L) may be on several ranks, which then add up its gradient.

torch's runtime runs the stages in the order of schedules.py. Where that splits the backward, the weight gradients of
linear layers and experts are computed later; all others belong to the first part.
"""

from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from typing import TYPE_CHECKING, NamedTuple, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..model import Ling
from ..model.packing import IGNORE, Batch, shift, unpack
from ..nn import BatchLayout
from ..nn.linear import head_loss
from ..ops.deferred import deferring
from .deferred import defer_linear_
from .pipeline_layout import PipelineLayout
from .schedules import Order, check, is_split, schedule_order, step_text
from .torch_schedules import make_schedule

if TYPE_CHECKING:
    from torch.distributed.pipelining import PipelineStage

LOSSES = ("main_loss", "mtp_loss", "z_loss")


class MicroBatch(NamedTuple):
    ids: Tensor  # [rows, seq_len] int64
    cu_seqlens: Tensor  # [documents + 1] int32: where documents start in the flattened ids
    labels: Tensor | None = None  # [rows, seq_len] int64, not shifted; None: ids
    experts: Tensor | None = None  # [rows, seq_len, M, topk] of integers: a choice that is replayed, as `Ling` takes it

    @classmethod
    def of(cls, batch: "HasTensors", device: torch.device) -> "MicroBatch":
        ids, labels, cu_seqlens = batch.to(device)
        return cls(ids, cu_seqlens, labels)


class HasTensors(Protocol):
    """A batch of the trainer."""

    def to(self, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
        """ids, labels and cu_seqlens on the device."""
        ...


class Work(NamedTuple):
    """What the stages of this rank work on in a step."""

    micro_batches: Sequence[MicroBatch]
    target_counts: Sequence[float]  # divisors of the summed losses: main, each MTP layer's
    z_loss: float | None
    losses: dict[int, Tensor]  # by micro batch, [3] fp32; filled by the last stage
    logits: list[Tensor] | None = None  # instead of losses, [rows, seq_len, V] fp32; filled where the first loss is


class Stage(nn.Module):
    """The units of one stage, which are modules of a whole model. `work` is set before each step."""

    work: Work

    def __init__(self, model: Ling, layout: PipelineLayout, stage: int, residual: torch.dtype, precision: torch.dtype):
        super().__init__()
        self.residual, self.precision = residual, precision  # of the hidden states between stages; of autocast
        self.model = [model]  # a list, so that the model does not become this module's child
        self.units = layout.units(stage)
        before, every = "".join(layout.stages[:stage]), "".join(layout.stages)
        self.normed = "m" in before or "L" in before  # the hidden state has been through the final norm
        self.one_loss_each, self.mtp_layers = every.count("L") > 1, every.count("m")

    @property
    def modules_used(self) -> set[str]:
        """Names of the model's modules whose weights this stage uses."""
        names = dict(E=["word_embeddings"], t=["layers.{}"], m=["mtp.{}", "word_embeddings"], L=["lm_head"])
        found = {name.format(i) for unit, i in self.units for name in names[unit]}
        makes_norm = not self.normed and {unit for unit, _ in self.units} & {"m", "L"}
        return found | ({"norm"} if makes_norm else set())

    def forward(self, *inputs: Tensor, index: Tensor) -> Tensor | tuple[Tensor, ...]:
        """inputs: what the stage before returned, for the first stage its number of the micro batch. index [1]: that
        number. Returns hidden states [T, H] and the losses so far [3]; the last stage the loss [1] alone."""
        with torch.autocast(self.model[0].cos.device.type, torch.bfloat16, enabled=self.precision == torch.bfloat16):
            return self.compute(*inputs, index=index)

    def compute(self, *inputs: Tensor, index: Tensor) -> Tensor | tuple[Tensor, ...]:
        """`forward` in the precision of the caller."""
        model, work, number = self.model[0], self.work, int(index)
        ids, cu_seqlens, labels, experts = work.micro_batches[number]
        batch = model.pack(ids, None, cu_seqlens)
        rows = BatchLayout(model.cos, model.sin, batch.here(batch.positions), batch.cu_seqlens)
        rows, dense = rows._replace(experts=model.forced(experts, ids, batch)), model.config.first_k_dense_replace
        z_loss = None if work.z_loss is None else work.z_loss * batch.share
        *hidden, losses = inputs
        if ("E", 0) in self.units:  # a leaf with gradient, since every stage's outputs have one
            losses = torch.zeros(3, dtype=torch.float32, device=ids.device, requires_grad=True)
        normed = self.normed
        for unit, i in self.units:
            z = None
            if unit == "E":
                hidden = [model.word_embeddings(batch.here(batch.ids))]
            elif unit == "t":
                of_layer = rows if i < dense else rows.of_moe(i - dense)
                hidden[0], z = model.layers[i](hidden[0], of_layer, None, z_loss)
            elif not normed:
                hidden[0], normed = model.norm(hidden[0]), True
            if unit == "m":
                of_mtp = rows.of_moe(len(model.layers) - dense + i)
                x, z = model.mtp[i](model.next_embeddings(batch, i + 1), hidden[-1], of_mtp, z_loss)
                hidden.append(x)
            elif unit == "L":
                number_here = 1 if self.one_loss_each else len(hidden)
                targets = batch.ids if labels is None else labels.flatten()
                for k in range(i, i + number_here):
                    losses = losses + self.loss(hidden.pop(0), targets, batch, k)
            if z is not None:
                losses = losses + torch.nn.functional.pad(z.float()[None], (2, 0))
        if hidden:
            return (*(h.to(self.residual) for h in hidden), losses) if self.units else tuple(t.clone() for t in inputs)
        work.losses[number] = losses.detach()
        return (losses * losses.new_tensor([1, model.config.mtp_loss_scaling_factor, 1])).sum()[None]

    def loss(self, x: Tensor, labels: Tensor, batch: Batch, k: int) -> Tensor:
        """The k-th loss of hidden states x [T, H], 0 the next token's: its share of the global loss, at its place in
        [3]."""
        model, work = self.model[0], self.work
        if work.logits is not None:
            if k == 0:
                work.logits.append(unpack(model.logits(x), batch, work.micro_batches[0].ids.shape))
            return x.new_zeros(3, dtype=torch.float32)
        total = head_loss(model.lm_head, x, batch.here(shift(labels, batch, k + 1, fill=IGNORE)))
        share = total / max(work.target_counts[k], 1) / (self.mtp_layers if k else 1)
        return torch.nn.functional.pad(share[None], (1, 1) if k else (0, 2))


class Pipeline:
    """A model's stages of this rank, and the schedule that runs them.

        layout = PipelineLayout.parse("Et|tt|t|mL")
        pipeline = Pipeline(model, layout, "Interleaved1F1B", micro_batches=8, rows=(1, 4096))
        record = pipeline.step(batches, target_counts)  # forward, backward; then clip, and step the optimizer

    Args:
      model: the whole model, equal on all ranks. In place, modules that this rank has no unit of become None, so that
        its parameters keep their names; make the optimizer afterwards.
      schedule: a name among schedules.SCHEDULES, or an order of actions, which also says where the stages are.
      micro_batches: of a step; another step may have another number, but for an order of actions. torch's
        Interleaved1F1B wants a multiple of the ranks.
      rows: (rows, seq_len) of each micro batch, whose sizes are fixed since buffers are made once.
      group: the ranks of the pipeline; default: all.
      precision: of autocast; fp32: none.
      device: where the model will be when it runs; default: where it is.

    Raises InputError for a layout that is not the model's, and for a schedule that does not fit it and the ranks.
    """

    def __init__(
        self, model: Ling, layout: PipelineLayout, schedule: str | Order, micro_batches: int,
        rows: tuple[int, int], group: dist.ProcessGroup | None = None, precision: torch.dtype = torch.float32,
        device: torch.device | None = None,
    ):  # fmt: skip
        layout.check(model.config)
        self.model, self.layout, self.group = model, layout, group or dist.group.WORLD
        self.size, self.rank = dist.get_world_size(self.group), dist.get_rank(self.group)
        self.order_or_name, self.rows = schedule, rows
        order, self.ranks = self.order(micro_batches)
        self.device = device or model.lm_head.weight.device
        self.residual = model.word_embeddings.weight.dtype
        self.shared = self.shared_groups()
        mine = [s for s, r in enumerate(self.ranks) if r == self.rank]
        self.stages = {s: Stage(model, layout, s, self.residual, precision) for s in mine}
        self.keep_own_units()
        self.later: list[Callable[[], None]] = []  # weight gradients of the backward that has just run
        self.incomplete: set[int] = set()  # stages of this rank with weight gradients to come in this step
        self.on_complete: Callable[[set[nn.Parameter]], None] | None = None  # see `complete`
        self.split = is_split(order)
        if self.split:
            for module in (*model.layers, *model.mtp):
                if module is not None:
                    defer_linear_(module)
        self.micro_batches = 0
        self.prepare(micro_batches)

    def order(self, micro_batches: int) -> tuple[Order, list[int]]:
        """The order of so many micro batches, and the rank of each stage."""
        order, stages = self.order_or_name, len(self.layout.stages)
        if isinstance(order, str):
            order = schedule_order(order, self.size, stages, micro_batches)
        return order, check(order, self.size, stages, micro_batches)

    def prepare(self, micro_batches: int) -> None:
        """Make torch's schedule for so many micro batches, where the last one was for another number."""
        if micro_batches == self.micro_batches:
            return
        actions = [[step_text(step) for step in row] for row in self.order(micro_batches)[0]]
        T = rows_here(self.model, self.rows)
        parts = [self.torch_stage(s, stage, T, self.device) for s, stage in self.stages.items()]
        self.schedule = make_schedule(parts, actions, micro_batches, loss_of, self.complete)
        self.micro_batches = micro_batches

    def torch_stage(self, s: int, stage: Stage, T: int, device: torch.device) -> "PipelineStage":
        """Sizes are given: else the runtime finds them by a forward on memory of any values, which counts tokens."""
        from torch.distributed.pipelining import PipelineStage

        last = len(self.ranks) - 1
        with torch.device("meta"):
            inputs = leaves(self.buffers(s - 1, T)) if s else (torch.empty(1, dtype=torch.int64),)
            outputs = leaves(self.buffers(s, T)) if s < last else (torch.empty(1, requires_grad=True),)
        builder = self.take_later if self.split else None
        return PipelineStage(stage, s, last + 1, device, inputs, outputs, group=self.group, dw_builder=builder)

    def buffers(self, s: int, T: int, device: torch.device | None = None) -> tuple[Tensor, ...]:
        """Memory for what stage s sends to the next one of a micro batch with T rows here, or for its gradients."""
        hidden, number = (T, self.model.config.hidden_size), self.layout.hidden_states(s)
        states = [torch.empty(hidden, dtype=self.residual, device=device) for _ in range(number)]
        return (*states, torch.empty(3, device=device))

    def stages_here(self) -> str:
        """The units of this rank's stages."""
        return ", ".join(self.layout.stages[s] or "empty" for s in self.stages)

    def take_later(self) -> Callable[[], None]:
        """The weight gradients that are queued, as torch's runtime asks for them after each backward."""
        taken, self.later[:] = [*self.later], []

        def run() -> None:
            for gradient in taken:
                gradient()

        return run

    def shared_groups(self) -> dict[str, dist.ProcessGroup]:
        """A process group for each weight that several ranks hold. All ranks of the pipeline make them together."""
        mtp = self.model.config.num_nextn_predict_layers > 0
        units = {"word_embeddings.weight": "Em" if mtp else "E", "lm_head.weight": "L"}
        groups = {}
        for name, letters in units.items():
            holders = self.layout.holders(letters, self.ranks)
            if len(holders) > 1:
                members = [dist.get_global_rank(self.group, r) for r in holders]
                group = dist.new_group(members, use_local_synchronization=True)  # other pipelines make their own
                if self.rank in holders:
                    groups[name] = group
        return groups

    def keep_own_units(self) -> None:
        """Set the modules of other ranks' units to None, under their names."""
        model, mine = self.model, self.modules_used(self.stages)
        for name in {"word_embeddings", "norm", "lm_head"} - mine:
            setattr(model, name, None)
        for name, modules in (("layers", model.layers), ("mtp", model.mtp)):
            for i in range(len(modules)):
                if f"{name}.{i}" not in mine:
                    modules[i] = None

    def modules_used(self, stages: Iterable[int]) -> set[str]:
        """Names of the modules whose weights any of these stages of this rank uses."""
        return {name for s in stages for name in self.stages[s].modules_used}

    def complete(self, s: int) -> None:
        """Report to `on_complete` the weights whose gradients are complete with those of stage s: what no stage here
        adds to any more. What other ranks hold too is complete at the end of the step."""
        self.incomplete.discard(s)
        if self.on_complete is None:
            return
        names = self.stages[s].modules_used - self.modules_used(self.incomplete)
        done = {p for name in names for p in self.model.get_submodule(name).parameters()}
        self.on_complete(done - {self.model.get_parameter(name) for name in self.shared})

    def step(
        self, micro_batches: Sequence[MicroBatch], target_counts: Sequence[float], z_loss: float | None = None
    ) -> dict[str, float] | None:
        """Forward and backward of a global batch, gradients added to `grad`. Every rank passes all micro batches.

        target_counts: divisors of the summed main loss and of each MTP layer's, over the global batch. z_loss: its
        coefficient, for one micro batch. Returns the losses on the rank of the last stage, None elsewhere.
        """
        self.prepare(len(micro_batches))
        work = Work(micro_batches, target_counts, z_loss, {})
        for stage in self.stages.values():
            stage.work = work
        self.incomplete = {*self.stages}
        number = torch.arange(self.micro_batches)
        last, is_first = len(self.ranks) - 1 in self.stages, 0 in self.stages
        with deferring(self.later) if self.split else nullcontext():
            self.schedule.step(
                *((number,) if is_first else ()), index=number, target=number if last else None, return_outputs=False
            )
        for name, group in self.shared.items():
            p = self.model.get_parameter(name)
            if not p.requires_grad:
                continue
            if p.grad is None:
                p.grad = torch.zeros_like(p)
            dist.all_reduce(p.grad, group=group)
        if not last:
            return None
        values = torch.stack([work.losses[i] for i in range(self.micro_batches)]).sum(0)
        record = dict(zip(LOSSES, values.tolist(), strict=True))
        scale = self.model.config.mtp_loss_scaling_factor
        return dict(loss=record["main_loss"] + scale * record["mtp_loss"] + record["z_loss"], **record)

    @torch.no_grad()
    def evaluate(self, micro_batches: Sequence[MicroBatch]) -> Tensor:
        """The summed main loss of each micro batch, of any rows, [micro batches] fp64: zeros but on the last stage's
        rank. Forward only, one after the other; every rank passes all micro batches."""
        work = Work(micro_batches, [1.0] * (1 + self.model.config.num_nextn_predict_layers), None, {})
        totals = torch.zeros(len(micro_batches), dtype=torch.float64, device=self.device)
        self.forward(work)
        for number, losses in work.losses.items():
            totals[number] = losses[0]
        return totals

    @torch.no_grad()
    def logits(self, ids: Tensor) -> Tensor:
        """Logits [1, n, V] fp32 of a text, ids [1, n]: zeros where another rank has the rows, or the head of the first
        loss. Every rank calls it."""
        batch = MicroBatch(ids, torch.tensor([0, ids.shape[1]], dtype=torch.int32, device=self.device))
        logits: list[Tensor] = []
        self.forward(Work([batch], [], None, {}, logits))
        return logits[0] if logits else ids.new_zeros(*ids.shape, self.model.config.vocab_size, dtype=torch.float32)

    def forward(self, work: Work) -> None:
        """The forwards of all micro batches, which may be of any rows, one after the other."""
        for number, (ids, *_) in enumerate(work.micro_batches):
            sent: tuple[Tensor, ...] = (torch.tensor([number]),) if 0 in self.stages else ()
            for s, stage in self.stages.items():
                stage.work = work
                if not sent:
                    sent = self.received(s, rows_here(self.model, ids.shape))
                sent = stage(*sent, index=torch.tensor([number]))
                if s < len(self.ranks) - 1 and self.ranks[s + 1] != self.rank:
                    for t in sent:
                        dist.send(t.contiguous(), group=self.group, group_dst=self.ranks[s + 1])
                    sent = ()

    def received(self, s: int, T: int) -> tuple[Tensor, ...]:
        """What stage s gets from the one before, on another rank."""
        tensors = self.buffers(s - 1, T, self.device)
        for t in tensors:
            dist.recv(t, group=self.group, group_src=self.ranks[s - 1])
        return tensors

    def held_before(self) -> set[str]:
        """Names of the weights here that a rank before this one holds too."""
        return {n for n, group in self.shared.items() if dist.get_group_rank(group, dist.get_rank()) > 0}


def rows_here(model: Ling, rows: Sequence[int]) -> int:
    """How many rows of a micro batch this rank computes: fewer than all where ranks share them."""
    batch = model.pack(torch.zeros(rows, dtype=torch.int64), None, torch.tensor([0, rows[0] * rows[1]]).int())
    return len(batch.here(batch.positions))


def leaves(tensors: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """They require gradients, as what a stage receives does."""
    return tuple(t.requires_grad_() for t in tensors)


def loss_of(output: Tensor, target: Tensor) -> Tensor:
    """The last stage's output is its loss, which has seen its targets."""
    return output.sum()
