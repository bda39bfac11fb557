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
from ..nn import BatchLayout, Experts, MoE
from ..parallel import exchange
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
                if isinstance(moe := layer.mlp, MoE):
                    number = config.num_experts // layout.ep
                    moe.experts = Experts(number, config.hidden_size, config.moe_intermediate_size)
                    moe.exchange = ExpertParallel(moe, layout.ep, self.worst_load)  # type: ignore[assignment]
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

    def forward(  # type: ignore[override]
        self, ids: Tensor, cu_seqlens: Tensor, z_loss: float, **loss
    ) -> LingOutput:
        """The last stage returns a loss; the others return hidden_states [T, H] for the next stage, and the z-loss."""
        if isinstance(self.word_embeddings, StageInput):
            self.word_embeddings.pending = True
        if self.last:
            return super().forward(ids, cu_seqlens=cu_seqlens, z_loss=z_loss, **loss)
        batch = pack(ids, None, cu_seqlens, self.config.max_positions)
        rows = BatchLayout(self.cos, self.sin, batch.positions, batch.cu_seqlens)
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


class EmptyBuffers(torch.autograd.Function):
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


class ExpertParallel(exchange.AllToAll):
    """The exchange of a MoE layer with 1 / ep of its experts on this GPU, without other GPUs: sizes are those of an
    even load, where this GPU receives as many rows as it sends, or of the worst one."""

    fp8 = False
    mark = staticmethod(lambda t: None)  # called with every buffer of the exchange

    def __init__(self, moe: MoE, ep: int, worst_load: bool):
        self.moe, self.ep, self.worst_load = moe, ep, worst_load
        self.num_experts = len(moe.experts.gate_up)  # on this GPU

    def received(self, experts: Tensor, counts: Tensor):
        tokens, topk = experts.shape
        R = self.ep * tokens * min(topk, self.num_experts) if self.worst_load else tokens * topk
        return experts.new_empty(R, 1), counts.new_empty(self.num_experts), ([tokens * topk], [R])

    def send(self, rows: Tensor, sizes: tuple[list[int], list[int]]) -> Tensor:
        self.mark(rows)
        return EmptyBuffers.apply(rows, sum(sizes[1]), self.mark)
