"""What one GPU of many would hold, for the plan of memory. Nothing here trains: the package does so on one GPU.

    dp    GPUs that take different rows of a batch
    ep    so many of those share a layer's experts: each has num_experts / ep, and rows go to them and back
    pp    stages, each num_hidden_layers / pp layers; embedding in the first, head and MTP layers in the last
    zero  what is cut up over the dp GPUs (experts: dp / ep), along dimension 0 as FSDP2 does it: 1 the optimizer's
          state, 2 gradients too, 3 weights too (arXiv 1910.02054)

dp x pp GPUs in all. Ops, modules and optimizer are those of a run on one GPU; what it would get from others comes from
nowhere.
"""

from collections.abc import Callable
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor, nn

from ..errors import InputError
from ..model import Ling, LingConfig
from ..model.packing import pack
from ..model.transformer import LingOutput
from ..nn import Experts, MoE, Rows
from ..ops.dispatch import Plan, dispatch
from ..ops.permute import permute
from ..ops.unpermute import unpermute
from .settings import Settings


@dataclass(frozen=True)
class Layout:
    dp: int = 1
    ep: int = 1
    pp: int = 1
    zero: int = 0

    def __str__(self) -> str:
        return ", ".join(f"{f.name}={getattr(self, f.name)}" for f in fields(self))

    @classmethod
    def parse(cls, text: str) -> "Layout":
        """Of "dp=8,ep=8,pp=4,zero=1", in any order; what is left out is 1, or 0 for zero. Raises InputError."""
        known, given = {f.name for f in fields(cls)}, {}
        for part in text.split(","):
            name, _, value = part.strip().partition("=")
            if name not in known or name in given or not (value.isascii() and value.isdecimal()):
                raise InputError(
                    f"--layout {text}: {part.strip()!r} is none of dp=N, ep=N, pp=N, zero=0|1|2|3, each once"
                )
            given[name] = int(value)
            if (name == "zero" and given[name] > 3) or (name != "zero" and given[name] < 1):
                raise InputError(f"--layout {text}: {name} is {'0 to 3' if name == 'zero' else 'at least 1'}")
        return cls(**given)

    def of_rank(self, s: Settings, c: LingConfig) -> Settings:
        """The settings with the rows that one GPU takes. Raises InputError for what cannot be cut up so."""
        said, micro = f"--layout {self}", s.micro_batch or 1
        if s.batch % (micro * self.dp):
            per = f" x --micro-batch {micro}" if s.micro_batch else ""
            raise InputError(f"{said}: --batch {s.batch} is not a multiple of dp {self.dp}{per}")
        if self.dp % self.ep:
            raise InputError(f"{said}: dp {self.dp} is not a multiple of ep {self.ep}; those that share experts take"
                             " different rows")  # fmt: skip
        if c.num_experts % self.ep:
            raise InputError(f"{said}: the {c.num_experts} experts of {s.model} are not a multiple of ep {self.ep}")
        if c.num_hidden_layers % self.pp:
            raise InputError(
                f"{said}: the {c.num_hidden_layers} layers of {s.model} are not a multiple of pp {self.pp}"
            )
        if s.step_in_backward and self != Layout():
            raise InputError(f"{said}: --step-in-backward is for one GPU, others have a part of each gradient")
        if self.zero and s.optimizer == "muon":
            raise InputError(f"{said}: --optimizer muon needs whole matrices, zero=0")
        if self.zero == 3 and s.precision == "fp8" and s.fp8_weights == "kept":
            raise InputError(f"{said}: --fp8-weights kept keeps all of them on every GPU; zero=3 wants each_forward")
        return replace(s, batch=s.batch // self.dp)

    def part(self, c: LingConfig, stage: int) -> LingConfig:
        """The layers of a stage, from 0 on."""
        layers = c.num_hidden_layers // self.pp
        dense = min(max(c.first_k_dense_replace - stage * layers, 0), layers)
        mtp = c.num_nextn_predict_layers if stage == self.pp - 1 else 0
        return replace(c, num_hidden_layers=layers, first_k_dense_replace=dense, num_nextn_predict_layers=mtp)

    def stages(self, c: LingConfig) -> list[int]:
        """Of stages with equal parts the first alone, for it has the most micro batches in flight."""
        first = {}
        for i in range(self.pp):
            first.setdefault((i == 0, i == self.pp - 1, self.part(c, i).first_k_dense_replace), i)
        return list(first.values())


@dataclass(frozen=True)
class Rank:
    """One GPU of a layout. worst: every token of those that share experts has chosen as many of its own as it can."""

    layout: Layout = Layout()
    stage: int = 0
    worst: bool = False

    def model(self, c: LingConfig) -> Ling:
        """Its part of the model, without values; under FakeTensorMode."""
        part, last = self.layout.part(c, self.stage), self.stage == self.layout.pp - 1
        model = Ling(c) if self.layout.pp == 1 else Stage(part, self.stage == 0, last)
        if self.layout.ep > 1:
            for layer in [*model.layers, *(mtp.layer for mtp in model.mtp)]:
                if isinstance(moe := layer.mlp, MoE):
                    moe.experts = Experts(c.num_experts // self.layout.ep, c.hidden_size, c.moe_intermediate_size)
                    moe.exchange = ExpertParallel(moe, self.layout.ep, self.worst)
        return model

    def in_flight(self, micro_batches: int) -> int:
        """Micro batches whose forward has run and whose backward has not, at the most, in the schedule 1F1B."""
        return min(self.layout.pp - self.stage, micro_batches)

    def shards(self, model: nn.Module) -> dict[nn.Parameter, nn.Parameter]:
        """What its optimizer changes of each parameter: the parameter, or the rows that the first GPU has of it."""
        zero, dp, ep = self.layout.zero, self.layout.dp, self.layout.ep
        shards = {}
        for name, p in model.named_parameters():
            among = dp // ep if ".mlp.experts." in name else dp
            rows = p.data[: -(-len(p) // among)]
            whole = zero == 0 or among == 1
            shards[p] = p if whole else nn.Parameter(rows.clone() if zero == 3 else rows)
        return shards


ALONE = Rank()


class Stage(Ling):
    """The layers of one of several stages, which are more than one."""

    def __init__(self, part: LingConfig, first: bool, last: bool):
        super().__init__(part)
        self.last = last
        if not first:
            self.word_embeddings = Received(self, self.word_embeddings if self.mtp else None)
        if not last:
            self.norm, self.lm_head = nn.Identity(), None

    def forward(self, ids: Tensor, cu_seqlens: Tensor, z_loss: float, **loss) -> LingOutput:
        """Of the last stage a loss; of the others hidden_states alone, those [T, H] that the next one gets, and the
        z-loss."""
        if isinstance(self.word_embeddings, Received):
            self.word_embeddings.due = True
        if self.last:
            return super().forward(ids, cu_seqlens=cu_seqlens, z_loss=z_loss, **loss)
        batch = pack(ids, None, cu_seqlens, self.config.max_positions)
        rows = Rows(self.cos, self.sin, batch.positions, batch.cu_seqlens)
        h, z = self.backbone(batch.ids, rows, z_loss=z_loss)
        return LingOutput(hidden_states=(h,), z_loss=z)


class Received(nn.Module):
    """In place of the embedding: first in a forward what comes from the stage before, then MTP's own copy."""

    def __init__(self, stage: Stage, embedding: nn.Embedding | None):
        super().__init__()
        self.embedding, self.due = embedding, True
        self.like = [stage.layers[0].attention.query_key_value]  # in a list: its dtype is wanted, not the module

    def forward(self, ids: Tensor) -> Tensor:
        if not self.due:
            return self.embedding(ids)
        self.due = False
        w = self.like[0].weight
        return torch.empty(len(ids), w.shape[1], dtype=w.dtype, requires_grad=True)


class AllToAll(torch.autograd.Function):
    """x [S, ...] -> [R, ...] from elsewhere, and the gradient back."""

    @staticmethod
    def forward(ctx, x: Tensor, rows: int, mark: Callable[[Tensor], None]) -> Tensor:
        ctx.rows, ctx.mark = len(x), mark
        out = x.new_empty(rows, *x.shape[1:])
        mark(out)
        return out

    @staticmethod
    def backward(ctx, dout: Tensor):
        dx = dout.new_empty(ctx.rows, *dout.shape[1:])
        ctx.mark(dx)
        return dx, None, None


class ReceivedPlan(Plan):
    """The plan of received rows, with the sender's plan and the routing weights that `combine` applies."""

    sent: Plan
    weights: Tensor | None


class ExpertParallel:
    """The exchange of an MoE layer of which 1 / ep of the experts are here, with faked communication.

    A row for every slot goes to its expert's GPU in the activations' precision and comes back. With an even load a GPU
    receives as many rows as it sends; `received` has the worst case.
    """

    local = False
    mark = staticmethod(lambda t: None)  # called with every buffer of the exchange

    def __init__(self, moe: MoE, ep: int, worst: bool):
        self.ep, self.worst = ep, worst
        self.num_experts = len(moe.experts.gate_up)  # here
        self.moe = [moe]  # its experts may become FP8 later; in a list, as an exchange is no module

    def received(self, slots: int, topk: int) -> int:
        """Rows that this GPU receives."""
        return self.ep * slots // topk * min(topk, self.num_experts) if self.worst else slots

    def dispatch(self, x: Tensor, weights: Tensor, experts: Tensor, counts: Tensor):
        sent = dispatch(experts, counts)
        R = self.received(*experts.shape)
        rows = permute(x, sent)
        self.mark(rows)
        rows = AllToAll.apply(rows, R, self.mark)
        plan = ReceivedPlan(*dispatch(experts.new_empty(R, 1), counts.new_empty(self.num_experts)))
        plan.sent, plan.weights = sent, weights
        if self.moe[0].experts.fold_weights:
            slot_weights = weights.flatten()[sent.source.long()][:, None]
            weights, plan.weights = AllToAll.apply(slot_weights, R, self.mark), None
        else:
            weights = None
        return rows, plan, weights

    def combine(self, y: Tensor, plan: ReceivedPlan) -> Tensor:
        return unpermute(AllToAll.apply(y, len(plan.sent.source), self.mark), plan.sent, plan.weights)
