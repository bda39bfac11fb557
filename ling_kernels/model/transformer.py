"""Ling-2.0: pre-norm layers of attention and MLP or mixture of experts, untied embedding and head, MTP layers on top.

    x = word_embeddings(ids);  per layer: x += attention(norm(x)); x += mlp(norm(x));  logits = lm_head(norm(x))

A batch is packed into T rows without padding: everything between embedding and head works on [T, H] and cu_seqlens, and
documents never attend to each other. Shapes: B batch, L length, T rows, H hidden, V vocabulary.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..nn import MLP, Attention, BatchLayout, Experts, MoE, RMSNorm, Router
from ..nn.linear import head_loss, norm_linear
from ..nn.norm import Fp32Buffers
from ..op import expect
from ..ops.attention_decode import KVCache
from ..ops.cross_entropy import cross_entropy
from ..ops.rope_tables import rope_tables
from .config import LingConfig
from .decode import generate, stream
from .mtp import MTP
from .packing import IGNORE, Batch, pack, shift, unpack


@dataclass
class LingOutput:
    """Fields that were not asked for are None."""

    logits: Tensor | None = None  # [B, L, V] fp32; zeros at padding
    loss: Tensor | None = None  # main_loss + mtp_loss_scaling_factor * mtp_loss + z_loss
    main_loss: Tensor | None = None
    mtp_loss: Tensor | None = None  # mean over the MTP layers
    z_loss: Tensor | None = None  # sum over the MoE layers, coefficient included
    mtp_logits: Tensor | None = None  # [MTP layers, B, L, V] fp32
    hidden_states: tuple[Tensor, ...] | None = (
        None  # embedding, every layer (the last after the final norm), MTP layers; [B, L, H]
    )


class Layer(nn.Module):
    """One transformer layer: x += attention(norm(x)); x += mlp(norm(x)), where mlp is an MLP (dense) or an MoE."""

    recompute = False  # activation checkpointing: save only x, and run the forward again in the backward

    def __init__(self, c: LingConfig, dense: bool):
        super().__init__()
        self.input_layernorm = RMSNorm(c.hidden_size, c.rms_norm_eps)
        self.attention = Attention(
            c.hidden_size, c.num_attention_heads, c.num_key_value_heads, c.head_dim, c.rms_norm_eps, c.use_qk_norm
        )
        self.post_attention_layernorm = RMSNorm(c.hidden_size, c.rms_norm_eps)
        if dense:
            self.mlp = MLP(c.hidden_size, c.intermediate_size)
            return
        router = Router(
            c.hidden_size, c.num_experts, c.n_group, c.topk_group, c.num_experts_per_tok, c.routed_scaling_factor
        )
        experts = Experts(c.num_experts, c.hidden_size, c.moe_intermediate_size)
        shared = MLP(c.hidden_size, c.moe_intermediate_size * c.num_shared_experts) if c.num_shared_experts else None
        self.mlp = MoE(router, experts, shared)

    def forward(self, x: Tensor, layout: BatchLayout, cache: KVCache | None = None, z_loss: float | None = None):
        """x [T, H] -> x [T, H], and the router's z-loss or None."""
        if self.recompute and cache is None and torch.is_grad_enabled():
            return checkpoint(
                self.compute, x, layout, None, z_loss, use_reentrant=False, preserve_rng_state=False
            )  # fmt: skip
        return self.compute(x, layout, cache, z_loss)

    def compute(self, x: Tensor, layout: BatchLayout, cache: KVCache | None, z_loss: float | None):
        """`forward` without activation checkpointing. A decode pass uses the fused MoE op if it is supported."""
        attended = self.attention(x, layout, cache, self.input_layernorm)
        chooses = layout.record is None and layout.experts is None  # MoE.decode chooses, and keeps its choice
        if cache is not None and isinstance(self.mlp, MoE) and chooses:
            y = self.mlp.decode(attended, x, self.post_attention_layernorm)
            if y is not None:
                return y, None
        h, x = self.post_attention_layernorm(attended, residual=x)
        if isinstance(self.mlp, MLP):
            return x + self.mlp(h), None
        record = None if layout.record is None else (layout.record, layout.record_cells)
        y, z = self.mlp(h, z_loss, layout.experts, record)
        return x + y, z


class Ling(Fp32Buffers):
    """A model on one device. Parameters have the default dtype; `init_weights` initialises them.

    choose_rows: where several devices share a batch, takes a Batch and returns it with the `rows` of this device. Then
    losses are this device's share of the batch's.
    """

    choose_rows: Callable[[Batch], Batch] | None = None

    def __init__(self, config: LingConfig):
        super().__init__()
        c = self.config = config
        self.word_embeddings = nn.Embedding(c.vocab_size, c.hidden_size)
        self.layers = nn.ModuleList(Layer(c, dense=i < c.first_k_dense_replace) for i in range(c.num_hidden_layers))
        self.norm = RMSNorm(c.hidden_size, c.rms_norm_eps)
        self.lm_head = nn.Linear(c.hidden_size, c.vocab_size, bias=False)
        self.mtp = nn.ModuleList(
            MTP(c.hidden_size, c.rms_norm_eps, Layer(c, dense=False)) for _ in range(c.num_nextn_predict_layers)
        )
        self.register_buffer("cos", None, persistent=False)
        self.register_buffer("sin", None, persistent=False)
        self.reset_buffers()

    def reset_buffers(self) -> None:
        """Compute the RoPE tables and zero the expert counts; call it after `to_empty`."""
        c, device = self.config, self.lm_head.weight.device
        self.cos, self.sin = rope_tables(c.max_positions, c.rotary_dim, c.rope_theta, c.rope_scaling, device)
        for router in self.routers():
            router.counts.zero_()

    @torch.no_grad()
    def init_weights(self, generator: torch.Generator | None = None) -> None:
        """Matrices from N(0, initializer_range^2), norm weights 1, expert biases 0."""
        for p in self.parameters():
            p.normal_(0, self.config.initializer_range, generator=generator) if p.ndim > 1 else p.fill_(1)
        for router in self.routers():
            router.expert_bias.zero_()
        self.reset_buffers()

    def routers(self) -> list[Router]:
        """The routers in layer order, those of MTP layers last."""
        return [m for m in self.modules() if isinstance(m, Router)]

    def expert_counts(self) -> Tensor:
        """[MoE layers, E] int32: tokens per expert over the training forwards since the last `balance_`."""
        return torch.stack([r.counts for r in self.routers()])

    def balance_(self, rate: float) -> None:
        """Update every router's expert bias towards an even load: once per global batch, after the optimizer's step."""
        for router in self.routers():
            router.balance_(rate)

    def recompute_(self, mtp_only: bool = False) -> None:
        """Turn on activation checkpointing of every layer (not of lm_head), or of those of MTP alone."""
        for layer in (self.mtp if mtp_only else self).modules():
            if isinstance(layer, Layer):
                layer.recompute = True

    def backbone(
        self,
        ids: Tensor | None,
        layout: BatchLayout,
        caches: list[KVCache] | None = None,
        z_loss: float | None = None,
        states: list[Tensor] | None = None,
        norm: bool = True,
        x: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """ids [T], or their embeddings x -> hidden state after the final norm [T, H], and the summed z-loss or None.

        norm: False leaves the final norm out, for `logits` to apply it.
        states: a list to append the hidden states to, in the order of LingOutput.hidden_states.
        """
        x, z = self.word_embeddings(ids) if x is None else x, None
        dense = self.config.first_k_dense_replace
        for i, (layer, cache) in enumerate(zip(self.layers, caches or [None] * len(self.layers), strict=True)):
            if states is not None:
                states.append(x)
            x, layer_z = layer(x, layout.of_moe(i - dense) if i >= dense else layout, cache, z_loss)
            z = _add(z, layer_z)
        h = self.norm(x) if norm else x
        if states is not None:
            states.append(h)
        return h, z

    def pack(self, input_ids: Tensor, attention_mask: Tensor | None, cu_seqlens: Tensor | None) -> Batch:
        """The batch of `forward`'s arguments, with the rows of this device where several share it."""
        batch = pack(input_ids, attention_mask, cu_seqlens, self.config.max_positions)
        return batch if self.choose_rows is None else self.choose_rows(batch)

    def next_embeddings(self, batch: Batch, ahead: int) -> Tensor:
        """[T, H], or of this device's rows alone: embeddings of the tokens `ahead` in the same document; past its end
        token 0's, without gradient."""
        ids = batch.here(shift(batch.ids, batch, ahead, fill=-1))
        x = self.word_embeddings(ids.clamp(min=0))
        return torch.where(ids[:, None] < 0, x.detach(), x)

    def forced(self, experts: Tensor | None, input_ids: Tensor, batch: Batch) -> Tensor | None:
        """experts [B, L, M, topk] of `forward` -> [M, T, topk] int32 of this device's rows."""
        if experts is None:
            return None
        moe, topk = len(self.layers) - self.config.first_k_dense_replace, self.config.num_experts_per_tok
        shapes = [(*input_ids.shape, n, topk) for n in (moe, moe + len(self.mtp))]
        contract = f"experts [B, L, M, {topk}] of integers, M {moe} or {moe + len(self.mtp)}"
        expect(experts.shape in shapes and not experts.is_floating_point(), contract, experts, input_ids)
        rows = experts.flatten(0, 1)
        rows = batch.here(rows if batch.indices is None else rows[batch.indices])
        return rows.transpose(0, 1).to(torch.int32).contiguous()

    def logits(self, h: Tensor, norm: bool = False) -> Tensor:
        """h [T, H] -> [T, V] fp32, fp64 for a model in fp64. norm: h has not been through the final norm."""
        dtype = torch.float64 if h.dtype == torch.float64 else torch.float32
        return norm_linear(self.lm_head, h, self.norm if norm else None, dtype)

    def forward(
        self,
        input_ids: Tensor,
        labels: Tensor | None = None,
        attention_mask: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        output_hidden_states: bool = False,
        logits: bool = True,
        z_loss: float | None = None,
        target_counts: list[Tensor | float] | None = None,
        experts: Tensor | None = None,
    ) -> LingOutput:
        """input_ids [B, L] int64 -> LingOutput.

        labels: [B, L], not shifted; -100 is ignored. Position t predicts labels[t + 1], and in the k-th MTP layer
          labels[t + 1 + k], never across the end of a document.
        attention_mask: [B, L], 1 at tokens and 0 at padding, on either side.
        cu_seqlens: [n + 1] int32, the starts of documents in the B * L tokens; default: each row is a document.
        logits: False computes the loss in chunks, without storing the logits.
        z_loss: coefficient of the routers' z-loss.
        target_counts: divisors of the summed main loss and of each MTP layer's loss; default: this batch's number of
          targets.
        experts: [B, L, M, topk] of integers, the experts of each token in the M MoE layers, or in those of the MTP
          layers too: forced, as `route` does, where a rollout's routing is replayed.
        Raises ValueError for mismatched shapes and types, for a mask of other values, and for sequences longer than
        config.max_positions.
        """
        batch = self.pack(input_ids, attention_mask, cu_seqlens)
        expect(labels is None or (labels.shape == input_ids.shape and labels.dtype == torch.int64),
               "labels as input_ids, int64", labels, input_ids)  # fmt: skip
        expect(target_counts is None or len(target_counts) >= 1 + len(self.mtp),
               "target_counts of the main loss and of each MTP layer", target_counts)  # fmt: skip
        z_loss = None if z_loss is None else z_loss * batch.share  # of a mean over this device's rows
        layout = BatchLayout(self.cos, self.sin, batch.here(batch.positions), batch.cu_seqlens)
        layout = layout._replace(experts=self.forced(experts, input_ids, batch))
        states = [] if output_hidden_states else None
        h, z = self.backbone(batch.here(batch.ids), layout, z_loss=z_loss, states=states)

        head_inputs = [h]  # inputs of lm_head: the model's output, then each MTP layer's
        for k, mtp in enumerate(self.mtp, 1):
            of_mtp = layout.of_moe(len(self.layers) - self.config.first_k_dense_replace + k - 1)
            x, mtp_z = mtp(self.next_embeddings(batch, k), head_inputs[-1], of_mtp, z_loss)
            head_inputs.append(x)
            z = _add(z, mtp_z)
        out = LingOutput()
        all_logits = [self.logits(x) for x in head_inputs] if logits else []
        if labels is not None:
            flat = labels.flatten() if batch.indices is None else labels.flatten()[batch.indices]
            losses = []
            for k, x in enumerate(head_inputs):
                all_targets = shift(flat, batch, k + 1, fill=IGNORE)
                targets = batch.here(all_targets)
                total = (
                    cross_entropy(all_logits[k], targets, reduction="sum")
                    if logits
                    else head_loss(self.lm_head, x, targets)
                )
                count = (all_targets != IGNORE).sum() if target_counts is None else target_counts[k]
                losses.append(total / torch.as_tensor(count, device=total.device).clamp(min=1))
            out.loss = out.main_loss = losses[0]
            if len(losses) > 1:
                out.mtp_loss = sum(losses[1:]) / len(losses[1:])
                out.loss = out.loss + self.config.mtp_loss_scaling_factor * out.mtp_loss
            if z_loss is not None:
                out.z_loss = h.new_zeros(()) if z is None else z
                out.loss = out.loss + out.z_loss
        if logits:
            out.logits = unpack(all_logits[0], batch, input_ids.shape)
            if self.mtp:
                out.mtp_logits = torch.stack([unpack(x, batch, input_ids.shape) for x in all_logits[1:]])
        if output_hidden_states:
            out.hidden_states = tuple(unpack(x, batch, input_ids.shape) for x in states + head_inputs[1:])
        return out

    stream, generate = stream, generate


def _add(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    return a if b is None else b if a is None else a + b
