"""One GPU of a layout for the memory plan: its part of the model, with communication faked by empty buffers.

Ops, modules and optimizer are those of a run on one GPU; tensors that other GPUs would send are allocated, never
filled.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..model import Ling, LingConfig
from ..model.packing import pack
from ..model.transformer import LingOutput
from ..nn import Experts, MoE, Rows
from ..nn.fp8 import Fp8Experts
from ..ops.dispatch import dispatch
from ..ops.permute import permute
from ..ops.unpermute import unpermute
from ..parallel.layout import Layout


@dataclass(frozen=True)
class Rank:
    """One GPU of a layout. worst_load: every token of the GPUs that share experts chooses as many of this GPU's experts
    as it can; otherwise all experts get equally many tokens."""

    layout: Layout = Layout()
    stage: int = 0
    worst_load: bool = False

    def model(self, config: LingConfig) -> Ling:
        """This GPU's part of the model, on fake tensors: call it under FakeTensorMode."""
        layout = self.layout
        if layout.pp == 1:
            model = Ling(config)
        else:
            model = Stage(layout.part(config, self.stage), self.stage == 0, self.stage == layout.pp - 1)
        if layout.ep > 1:
            for layer in [*model.layers, *(mtp.layer for mtp in model.mtp)]:
                if isinstance(layer.mlp, MoE):
                    layer.mlp = ExpertParallel(layer.mlp, config, layout.ep, self.worst_load)
        return model

    def in_flight(self, micro_batches: int) -> int:
        return self.layout.in_flight(self.stage, micro_batches)

    def shards(self, model: nn.Module) -> dict[nn.Parameter, nn.Parameter]:
        """For each parameter, what this GPU's optimizer updates: the parameter, or its first rows where it is
        sharded."""
        zero, dp, ep = self.layout.zero, self.layout.dp, self.layout.ep
        shards = {}
        for name, p in model.named_parameters():
            gpus = dp // ep if ".mlp.experts." in name else dp
            rows = p.data[: -(-len(p) // gpus)]
            whole = zero == 0 or gpus == 1
            shards[p] = p if whole else nn.Parameter(rows.clone() if zero == 3 else rows)
        return shards


SINGLE_GPU = Rank()


class Stage(Ling):
    """The layers of one of two or more pipeline stages."""

    def __init__(self, part: LingConfig, first: bool, last: bool):
        super().__init__(part)
        self.last = last
        if not first:
            self.word_embeddings = StageInput(self, self.word_embeddings if self.mtp else None)
        if not last:
            self.norm, self.lm_head = nn.Identity(), None

    def forward(self, ids: Tensor, cu_seqlens: Tensor, z_loss: float, **loss) -> LingOutput:
        """The last stage returns a loss; the others return hidden_states [T, H] for the next stage, and the z-loss."""
        if isinstance(self.word_embeddings, StageInput):
            self.word_embeddings.pending = True
        if self.last:
            return super().forward(ids, cu_seqlens=cu_seqlens, z_loss=z_loss, **loss)
        batch = pack(ids, None, cu_seqlens, self.config.max_positions)
        rows = Rows(self.cos, self.sin, batch.positions, batch.cu_seqlens)
        h, z = self.backbone(batch.ids, rows, z_loss=z_loss)
        return LingOutput(hidden_states=(h,), z_loss=z)


class StageInput(nn.Module):
    """Replaces the embedding of a later stage. The first call of a forward returns a buffer for the hidden states of
    the stage before; later calls are the MTP layers' and use their copy of the embedding."""

    def __init__(self, stage: Stage, embedding: nn.Embedding | None):
        super().__init__()
        self.embedding = embedding
        self.pending = True  # the hidden states of this forward have not been handed out
        self.like = [stage.layers[0].attention.query_key_value]  # a list, so that it is not registered as a submodule

    def forward(self, ids: Tensor) -> Tensor:
        if not self.pending:
            return self.embedding(ids)
        self.pending = False
        w = self.like[0].weight
        return torch.empty(len(ids), w.shape[1], dtype=w.dtype, requires_grad=True)


class AllToAll(torch.autograd.Function):
    """x [S, ...] -> received [R, ...]; the gradient goes back. Both are empty buffers, reported to `mark`."""

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


class ExpertParallel(MoE):
    """A MoE layer with 1 / ep of its experts on this GPU. Each slot's row goes to its expert's GPU in the activations'
    precision and comes back. With an even load this GPU receives as many rows as it sends; `received` has the worst."""

    mark = staticmethod(lambda t: None)  # called with every buffer of the exchange

    def __init__(self, moe: MoE, config: LingConfig, ep: int, worst_load: bool):
        experts = Experts(config.num_experts // ep, config.hidden_size, config.moe_intermediate_size)
        super().__init__(moe.router, experts, moe.shared_experts)
        self.ep, self.worst_load = ep, worst_load

    def received(self, tokens: int) -> int:
        """Rows that this GPU receives when each GPU has so many tokens."""
        topk = self.router.limits["topk"]
        return self.ep * tokens * min(topk, len(self.experts.gate_up)) if self.worst_load else tokens * topk

    def forward(self, x: Tensor, z_loss: float | None = None) -> tuple[Tensor, Tensor | None]:
        weights, experts, counts, z = self.router(x, z_loss)
        plan = dispatch(experts, counts)
        R, local = self.received(len(x)), len(self.experts.gate_up)
        sent = permute(x, plan)
        self.mark(sent)
        rows = AllToAll.apply(sent, R, self.mark)
        del sent
        local_plan = dispatch(experts.new_empty(R, 1), counts.new_empty(local))
        if isinstance(self.experts, Fp8Experts):  # SwiGLU multiplies by the routing weight
            p = AllToAll.apply(weights.flatten()[plan.source.long()][:, None], R, self.mark)
            y = self.experts(rows, local_plan, p)
            weights = None
        else:
            y = unpermute(self.experts(permute(rows, local_plan), local_plan.offsets), local_plan)
        del rows
        y = unpermute(AllToAll.apply(y, len(plan.source), self.mark), plan, weights)
        if self.shared_experts is not None:
            y = y + self.shared_experts(x)
        return y, z
