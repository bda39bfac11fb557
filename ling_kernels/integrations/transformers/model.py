"""Ling-2.0 as a model of transformers 5.

Modules have the published names, so that a checkpoint needs no renaming; only the experts are stacked.
Shapes: B batch, L length of the new tokens, H hidden, V vocabulary.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import pad
from transformers import DynamicCache, GenerationMixin, PreTrainedModel
from transformers import initialization as init
from transformers.masking_utils import create_causal_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import MoeCausalLMOutputWithPast, MoeModelOutputWithPast
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.glm4_moe.modeling_glm4_moe import Glm4MoeExperts, eager_attention_forward
from transformers.utils.generic import can_return_tuple, merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from ...errors import InputError
from ...nn import RMSNorm, Router
from ...nn.norm import Fp32Buffers
from ...ops.qk_norm_rope import qk_norm_rope
from ...ops.rope_tables import rope_frequencies
from ...ops.swiglu import swiglu
from .config import LingHfConfig
from .functions import NAME, documents_of, same_document
from .loss import IGNORE, causal_loss, shifted
from .names import CACHE


class Rope(NamedTuple):
    """The rotation of each of the B L rows: cos and sin [P, R/2] fp32, and the row of the tables that each takes."""

    cos: Tensor
    sin: Tensor
    rows: Tensor  # [B L] int32


class LingRotaryEmbedding(Fp32Buffers):
    """position_ids [1 or B, L] of a batch of B -> Rope."""

    def __init__(self, config: LingHfConfig):
        super().__init__()
        self.ling = config.ling()
        inv_freq, self.attention_scaling = self.frequencies()
        self.register_buffer("inv_freq", inv_freq, persistent=False)

    def frequencies(self) -> tuple[Tensor, float]:
        return rope_frequencies(self.ling.rotary_dim, self.ling.rope_theta, self.ling.rope_scaling)

    @torch.no_grad()
    def forward(self, position_ids: Tensor, batch_size: int) -> Rope:
        angle = position_ids.flatten()[:, None].float() * self.inv_freq
        rows = torch.arange(len(angle), device=angle.device, dtype=torch.int32)
        rows = rows if len(position_ids) == batch_size else rows.repeat(batch_size)
        return Rope(angle.cos() * self.attention_scaling, angle.sin() * self.attention_scaling, rows)


class LingAttention(nn.Module):
    """Norm of query and key heads and rotation in one kernel; then the chosen attention function."""

    is_causal = True

    def __init__(self, config: LingHfConfig, layer_idx: int):
        super().__init__()
        self.config, self.layer_idx, self.head_dim = config, layer_idx, config.head_dim
        self.num_kv_heads = config.num_key_value_heads
        self.num_key_value_groups = config.num_attention_heads // self.num_kv_heads
        heads = config.num_attention_heads + 2 * self.num_kv_heads
        self.query_key_value = nn.Linear(config.hidden_size, heads * self.head_dim, bias=False)
        self.query_layernorm = RMSNorm(self.head_dim, config.rms_norm_eps)
        self.key_layernorm = RMSNorm(self.head_dim, config.rms_norm_eps)
        self.dense = nn.Linear(config.num_attention_heads * self.head_dim, config.hidden_size, bias=False)

    def forward(
        self, x: Tensor, mask: Any, rope: Rope, cache: Any = None, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None]:
        """x [B, L, H] -> [B, L, H], and the probabilities where the chosen function returns them."""
        B, L, _ = x.shape
        qkv = self.query_key_value(x).flatten(0, 1).unflatten(-1, (-1, self.head_dim))
        norms = self.query_layernorm.weight, self.key_layernorm.weight
        rows = qk_norm_rope(qkv, *norms, *rope, self.num_kv_heads, eps=self.query_layernorm.eps)
        q, k, v = (t.unflatten(0, (B, L)).transpose(1, 2) for t in rows)
        if cache is not None:
            k, v = cache.update(k, v, self.layer_idx)
        function = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention_forward)
        out, probabilities = function(self, q, k, v, mask, scaling=self.head_dim**-0.5, dropout=0.0, **kwargs)
        return self.dense(out.flatten(2)), probabilities


class LingMLP(nn.Module):
    """down_proj(silu(gate_proj(x)) * up_proj(x)). The layers stay apart, as adapters and sharded loading want them."""

    def __init__(self, hidden_size: int, intermediate_size: int):
        super().__init__()
        self.gate_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.up_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.down_proj = nn.Linear(intermediate_size, hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(swiglu(torch.cat([self.gate_proj(x), self.up_proj(x)], -1)))


class LingMoE(nn.Module):
    """Router, experts by the chosen experts function, and the shared expert."""

    def __init__(self, config: LingHfConfig):
        super().__init__()
        c = config
        self.gate = Router(
            c.hidden_size, c.num_experts, c.n_group, c.topk_group, c.num_experts_per_tok, c.routed_scaling_factor
        )
        self.experts = Glm4MoeExperts(config)
        size = c.moe_intermediate_size * c.num_shared_experts
        self.shared_experts = LingMLP(c.hidden_size, size) if size else None

    def forward(self, x: Tensor) -> Tensor:
        """x [B, L, H] -> [B, L, H]."""
        rows = x.flatten(0, 1)
        weights, experts, _, _ = self.gate(rows)
        y = self.experts(rows, experts.long(), weights).view_as(x)
        return y if self.shared_experts is None else y + self.shared_experts(x)


class LingLayer(GradientCheckpointingLayer):
    """x += attention(norm(x)); x += mlp(norm(x))."""

    def __init__(self, config: LingHfConfig, layer_idx: int):
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.attention = LingAttention(config, layer_idx)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        dense = layer_idx < config.first_k_dense_replace
        self.mlp = LingMLP(config.hidden_size, config.intermediate_size) if dense else LingMoE(config)

    def forward(self, x: Tensor, mask: Any, rope: Rope, cache: Any = None, **kwargs: Any) -> Tensor:
        attended, _ = self.attention(self.input_layernorm(x), mask, rope, cache, **kwargs)
        h, x = self.post_attention_layernorm(attended, residual=x)
        return x + self.mlp(h)


class LingDecoderLayer(LingLayer):
    """A layer of the model itself."""


class LingMTPLayer(LingLayer):
    """A layer of multi-token prediction, trained with the model. `generate` does not use it."""

    def __init__(self, config: LingHfConfig, layer_idx: int):
        super().__init__(config, layer_idx)
        self.enorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.hnorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.eh_proj = nn.Linear(2 * config.hidden_size, config.hidden_size, bias=False)
        self.final_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, x: Tensor, mask: Any, rope: Rope, next_embeddings: Tensor, **kwargs: Any) -> Tensor:  # type: ignore[override]
        """x, the hidden state after the final norm, and next_embeddings [B, L, H] -> hidden state [B, L, H]."""
        x = self.eh_proj(torch.cat([self.enorm(next_embeddings), self.hnorm(x)], -1))
        return self.final_layernorm(super().forward(x, mask, rope, **kwargs))


class LingPreTrainedModel(PreTrainedModel):
    config_class = LingHfConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _input_embed_layer = "word_embeddings"
    _no_split_modules = ["LingDecoderLayer", "LingMTPLayer"]
    _skip_keys_device_placement = ["past_key_values", "cache"]
    _supports_flash_attn = _supports_sdpa = _supports_flex_attn = _supports_attention_backend = True
    _can_record_outputs = {"hidden_states": LingDecoderLayer, "attentions": LingAttention}

    @classmethod
    def _can_set_experts_implementation(cls) -> bool:
        return True  # transformers looks for its decorator in the text of this file

    @torch.no_grad()
    def _init_weights(self, module: nn.Module):
        super()._init_weights(module)
        if isinstance(module, Router):
            init.normal_(module.weight, std=self.config.initializer_range)
            init.zeros_(module.expert_bias)
            init.zeros_(module.counts)
        elif isinstance(module, Glm4MoeExperts):
            for p in module.parameters():
                init.normal_(p, std=self.config.initializer_range)
        elif isinstance(module, LingRotaryEmbedding):
            init.copy_(module.inv_freq, module.frequencies()[0])


class LingModel(LingPreTrainedModel):
    """Embedding, layers and final norm; the MTP layers follow the others in `layers`."""

    def __init__(self, config: LingHfConfig):
        super().__init__(config)
        if not config.use_qk_norm:
            raise InputError(
                "use_qk_norm is False: this class has no kernel for it; ling_kernels.model.load_model reads it"
            )
        self.word_embeddings = nn.Embedding(config.vocab_size, config.hidden_size)
        layers, mtp = config.num_hidden_layers, config.num_nextn_predict_layers
        kinds = [LingDecoderLayer] * layers + [LingMTPLayer] * mtp
        self.layers = nn.ModuleList(kind(config, i) for i, kind in enumerate(kinds))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.rotary_emb = LingRotaryEmbedding(config)
        self.gradient_checkpointing = False
        self.post_init()

    def prepare(
        self, x: Tensor, attention_mask: Any, position_ids: Tensor | None, cache: Any, kwargs: dict[str, Any]
    ) -> tuple[Any, Rope, Tensor, dict[str, Any]]:
        """The mask, rotation and position ids of embeddings x [B, L, H]; kwargs with the documents of packed rows."""
        given, past = position_ids, 0 if cache is None else cache.get_seq_length()
        if position_ids is None:
            position_ids = torch.arange(past, past + x.shape[1], device=x.device)[None]
        rope = self.rotary_emb(position_ids, len(x))
        documents = kwargs.get("cu_seq_lens_q")
        if documents is None and attention_mask is None and isinstance(past, int) and past == 0:
            documents = documents_of(given, len(x))
        if documents is not None and self.config._attn_implementation == NAME:
            return None, rope, position_ids, kwargs | {"cu_seq_lens_q": documents}
        known = {CACHE: cache if documents is None else None}  # with a cache transformers looks for no documents
        mask = create_causal_mask(
            config=self.config, inputs_embeds=x, attention_mask=attention_mask, position_ids=given, **known
        )
        return mask, rope, position_ids, kwargs

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Any = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Any,
    ) -> MoeModelOutputWithPast:
        """input_ids or inputs_embeds -> last_hidden_state [B, L, H], after the final norm, and the cache."""
        if (input_ids is None) == (inputs_embeds is None):
            raise InputError("give either input_ids or inputs_embeds")
        cache = kwargs.pop("cache", None) if past_key_values is None else past_key_values
        if use_cache and cache is None:
            cache = DynamicCache(config=self.config)
        x = self.word_embeddings(input_ids) if inputs_embeds is None else inputs_embeds
        mask, rope, _, kwargs = self.prepare(x, attention_mask, position_ids, cache, kwargs)
        for layer in self.layers[: self.config.num_hidden_layers]:
            x = layer(x, mask, rope, cache=cache, **kwargs)
        return MoeModelOutputWithPast(last_hidden_state=self.norm(x), **{CACHE: cache})

    def mtp(
        self, hidden: Tensor, input_ids: Tensor | None, inputs_embeds: Tensor | None, attention_mask: Any,
        position_ids: Tensor | None, kwargs: dict[str, Any],
    ) -> list[tuple[Tensor, Tensor]]:  # fmt: skip
        """hidden [B, L, H] of `forward` -> of each MTP layer its hidden state, and [1 or B, L] whether it has a target.

        The k-th layer gets the embeddings of the tokens k later in the row. At a document's end these are not its own:
        there is no target, nor does a position that has one attend there.
        """
        x = self.word_embeddings(input_ids) if inputs_embeds is None else inputs_embeds
        mask, rope, position_ids, kwargs = self.prepare(x, attention_mask, position_ids, None, kwargs)
        states = []
        for k, layer in enumerate(self.layers[self.config.num_hidden_layers :], 1):
            hidden = layer(hidden, mask, rope, next_embeddings=pad(x, (0, 0, 0, k))[:, k:], **kwargs)
            states.append((hidden, has_target(position_ids, k + 1, attention_mask)))
        return states


def has_target(position_ids: Tensor, ahead: int, attention_mask: Any) -> Tensor:
    """[1 or B, L]: whether a token, and the one `ahead` later in its row, are tokens of the same document.

    position_ids [1 or B, L]; attention_mask [B, L]: 0 at padding.
    """
    same = same_document(position_ids, ahead)
    if isinstance(attention_mask, Tensor) and attention_mask.ndim == 2:
        mask = attention_mask.bool()
        same = same & mask & pad(mask, (0, ahead))[:, ahead:]
    return same


@dataclass
class LingOutputWithPast(MoeCausalLMOutputWithPast):
    """logits is None where `labels` are given in training; mtp_loss is the mean over the MTP layers."""

    mtp_loss: Tensor | None = None


class LingForCausalLM(LingPreTrainedModel, GenerationMixin):
    """Ling-2.0 with its head, loading and saving the published checkpoints."""

    _tied_weights_keys = None
    _fsdp_plan = {"lm_head": "keep_full_weight"}

    def __init__(self, config: LingHfConfig):
        super().__init__(config)
        self.model = LingModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Any = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        num_items_in_batch: Tensor | int | None = None,
        **kwargs: Any,
    ) -> LingOutputWithPast:
        """labels [B, L] int64, not shifted, -100 ignored (or shift_labels, shifted) -> the loss; else logits [B, L, V].

        loss: the main one, plus mtp_loss_scaling_factor times the mean over the MTP layers, whose targets stay inside a
        document. In training no logits are stored, and none are returned. logits_to_keep: the last so many, 0 for all,
        or the indices of some.
        """
        targets = kwargs.pop("shift_labels", None)  # in no signature: the Trainer would take it for a second label
        outputs = self.model(
            input_ids=input_ids, attention_mask=attention_mask, position_ids=position_ids,
            past_key_values=past_key_values, inputs_embeds=inputs_embeds, use_cache=use_cache, **kwargs,
        )  # fmt: skip
        hidden, loss, mtp_loss = outputs.last_hidden_state, None, None
        targets = shifted(labels) if targets is None and labels is not None else targets
        if targets is not None:
            loss = causal_loss(self.lm_head, hidden, targets, num_items_in_batch)
        if targets is not None and self.config.num_nextn_predict_layers:
            states = self.model.mtp(hidden, input_ids, inputs_embeds, attention_mask, position_ids, kwargs)
            later = [torch.where(inside, shifted(targets, k), IGNORE) for k, (_, inside) in enumerate(states, 1)]
            losses = [
                causal_loss(self.lm_head, h, t, num_items_in_batch) for (h, _), t in zip(states, later, strict=True)
            ]
            mtp_loss = torch.stack(losses).mean()
            loss = loss + self.config.mtp_loss_scaling_factor * mtp_loss
        logits = None
        if targets is None or not self.training:
            rows = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
            logits = self.lm_head(hidden[:, rows])
        return LingOutputWithPast(
            loss=loss, logits=logits, mtp_loss=mtp_loss, hidden_states=outputs.hidden_states,
            attentions=outputs.attentions, **{CACHE: outputs[CACHE] if CACHE in outputs else None},
        )  # fmt: skip
