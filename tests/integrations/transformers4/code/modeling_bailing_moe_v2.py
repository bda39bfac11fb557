"""A stand-in for the official model code of Ling-2.0, with the names, arguments and results of its modules.

Written anew, in plain torch, for these tests alone: they compare it with the official results before it is patched.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import DynamicCache, GenerationMixin, PreTrainedModel
from transformers.modeling_attn_mask_utils import _prepare_4d_causal_attention_mask
from transformers.modeling_outputs import MoeCausalLMOutputWithPast, MoeModelOutputWithPast
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from .configuration_bailing_moe_v2 import BailingMoeV2Config


@dataclass
class MoEV2CausalLMOutputWithPast(MoeCausalLMOutputWithPast):
    mtp_loss: Any = None
    mtp_logits: Any = None


class BailingMoeV2RMSNorm(nn.Module):
    def __init__(self, size, eps):
        super().__init__()
        self.weight, self.variance_epsilon = nn.Parameter(torch.ones(size)), eps

    def forward(self, hidden_states):
        x = hidden_states.float()
        y = x * (x.square().mean(-1, keepdim=True) + self.variance_epsilon).rsqrt()
        return self.weight * y.to(hidden_states.dtype)


class BailingMoeV2RotaryEmbedding(nn.Module):
    def __init__(self, config):
        super().__init__()
        kind = (config.rope_scaling or {}).get("type", "default")
        inv_freq, self.attention_scaling = ROPE_INIT_FUNCTIONS[kind](config, None)
        self.register_buffer("inv_freq", inv_freq, persistent=False)

    def forward(self, x, position_ids):
        angle = position_ids[..., None].float() * self.inv_freq
        angle = torch.cat([angle, angle], -1)
        return tuple((t * self.attention_scaling).to(x.dtype) for t in (angle.cos(), angle.sin()))


class BailingMoeV2MLP(nn.Module):
    def __init__(self, config, intermediate_size):
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, intermediate_size, bias=False)
        self.down_proj = nn.Linear(intermediate_size, config.hidden_size, bias=False)

    def forward(self, x):
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class BailingMoeV2Gate(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.n_group, self.topk_group, self.top_k = config.n_group, config.topk_group, config.num_experts_per_tok
        self.routed_scaling_factor = config.routed_scaling_factor
        self.weight = nn.Parameter(torch.randn(config.num_experts, config.hidden_size))
        self.register_buffer("expert_bias", torch.zeros(config.num_experts))

    def forward(self, hidden_states):
        logits = F.linear(hidden_states.flatten(0, -2).float(), self.weight.float())
        scores = logits.sigmoid()
        groups = (scores + self.expert_bias).unflatten(1, (self.n_group, -1))
        best = groups.topk(2).values.sum(-1).topk(self.topk_group).indices
        dropped = torch.ones(groups.shape[:2], dtype=torch.bool).scatter(1, best, False)
        experts = groups.masked_fill(dropped[..., None], -torch.inf).flatten(1).topk(self.top_k).indices
        weights = scores.gather(1, experts)
        return experts, weights / weights.sum(-1, keepdim=True) * self.routed_scaling_factor, logits


class BailingMoeV2SparseMoeBlock(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config = config
        size = config.moe_intermediate_size
        self.experts = nn.ModuleList(BailingMoeV2MLP(config, size) for _ in range(config.num_experts))
        self.gate = BailingMoeV2Gate(config)
        self.shared_experts = BailingMoeV2MLP(config, size * config.num_shared_experts)

    def forward(self, hidden_states):
        experts, weights, logits = self.gate(hidden_states)
        rows = hidden_states.flatten(0, 1)
        y = torch.zeros_like(rows)
        for e, expert in enumerate(self.experts):
            token, k = (experts == e).nonzero(as_tuple=True)
            y = y.index_add(0, token, expert(rows[token]) * weights[token, k, None])
        L = hidden_states.shape[:2]
        y = y.view_as(hidden_states) + self.shared_experts(hidden_states)
        return y, (logits.unflatten(0, L), experts.unflatten(0, L))


class BailingMoeV2Attention(nn.Module):
    def __init__(self, config, layer_idx):
        super().__init__()
        self.config, self.layer_idx, self.head_dim, self.is_causal = config, layer_idx, config.head_dim, True
        self.num_heads, self.num_key_value_heads = config.num_attention_heads, config.num_key_value_heads
        heads = self.num_heads + 2 * self.num_key_value_heads
        self.query_key_value = nn.Linear(config.hidden_size, heads * self.head_dim, bias=False)
        self.query_layernorm = BailingMoeV2RMSNorm(self.head_dim, config.rms_norm_eps)
        self.key_layernorm = BailingMoeV2RMSNorm(self.head_dim, config.rms_norm_eps)
        self.dense = nn.Linear(self.num_heads * self.head_dim, config.hidden_size, bias=False)

    def forward(
        self, hidden_states, attention_mask=None, position_ids=None, past_key_value=None, output_attentions=False,
        use_cache=False, position_embeddings=None, **kwargs,
    ):  # fmt: skip
        heads = self.query_key_value(hidden_states).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
        q, k, v = heads.split([self.num_heads, self.num_key_value_heads, self.num_key_value_heads], 1)
        cos, sin = (t[:, None] for t in position_embeddings)
        q, k = rotated(self.query_layernorm(q), cos, sin), rotated(self.key_layernorm(k), cos, sin)
        if past_key_value is not None:
            k, v = past_key_value.update(k, v, self.layer_idx)
        k, v = (t.repeat_interleave(self.num_heads // self.num_key_value_heads, 1) for t in (k, v))
        probabilities = (q @ k.mT * self.head_dim**-0.5 + attention_mask).softmax(-1)
        out = self.dense((probabilities @ v).transpose(1, 2).flatten(2))
        return out, probabilities if output_attentions else None, past_key_value


def rotated(x, cos, sin):
    x, rest = x.split([cos.shape[-1], x.shape[-1] - cos.shape[-1]], -1)
    a, b = x.chunk(2, -1)
    return torch.cat([x * cos + torch.cat([-b, a], -1) * sin, rest], -1)


class BailingMoeV2DecoderLayer(nn.Module):
    def __init__(self, config, layer_idx):
        super().__init__()
        dense = layer_idx < config.first_k_dense_replace
        self.attention = BailingMoeV2Attention(config, layer_idx)
        self.mlp = BailingMoeV2MLP(config, config.intermediate_size) if dense else BailingMoeV2SparseMoeBlock(config)
        self.input_layernorm = BailingMoeV2RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = BailingMoeV2RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, x, **kwargs):
        attended, probabilities, _ = self.attention(self.input_layernorm(x), **kwargs)
        x = x + attended
        y = self.mlp(self.post_attention_layernorm(x))
        return x + (y[0] if isinstance(y, tuple) else y), probabilities


class BailingMoeV2MTPLayer(BailingMoeV2DecoderLayer):
    def __init__(self, config, layer_idx):
        super().__init__(config, layer_idx)
        for name in ("enorm", "hnorm", "final_layernorm"):
            setattr(self, name, BailingMoeV2RMSNorm(config.hidden_size, config.rms_norm_eps))
        self.eh_proj = nn.Linear(2 * config.hidden_size, config.hidden_size, bias=False)

    def forward(self, embeddings, x, **kwargs):
        x, probabilities = super().forward(
            self.eh_proj(torch.cat([self.enorm(embeddings), self.hnorm(x)], -1)), **kwargs
        )
        return self.final_layernorm(x), probabilities


class BailingMoeV2PreTrainedModel(PreTrainedModel):
    config_class = BailingMoeV2Config
    base_model_prefix = "model"
    _supports_sdpa = True


class BailingMoeV2Model(BailingMoeV2PreTrainedModel):
    def __init__(self, config):
        super().__init__(config)
        self.word_embeddings = nn.Embedding(config.vocab_size, config.hidden_size)
        mtp = [BailingMoeV2MTPLayer] * config.num_nextn_predict_layers
        kinds = [BailingMoeV2DecoderLayer] * config.num_hidden_layers + mtp
        self.layers = nn.ModuleList(kind(config, i) for i, kind in enumerate(kinds))
        self.norm = BailingMoeV2RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.rotary_emb = BailingMoeV2RotaryEmbedding(config)

    def forward(
        self, input_ids=None, attention_mask=None, position_ids=None, past_key_values=None, use_cache=None,
        output_attentions=None, **kwargs,
    ):  # fmt: skip
        x = self.word_embeddings(input_ids)
        use_cache = self.config.use_cache if use_cache is None else use_cache
        cache = DynamicCache() if use_cache and past_key_values is None else past_key_values
        past = 0 if cache is None else cache.get_seq_length()
        if position_ids is None:
            position_ids = torch.arange(past, past + x.shape[1])[None]
        common = dict(
            attention_mask=_prepare_4d_causal_attention_mask(attention_mask, x.shape[:2], x, past),
            position_ids=position_ids, past_key_value=cache, output_attentions=output_attentions, use_cache=use_cache,
            position_embeddings=self.rotary_emb(x, position_ids),
        )  # fmt: skip
        attentions = ()
        for layer in self.layers[: self.config.num_hidden_layers]:
            x, probabilities = layer(x, **common)
            attentions += (probabilities,)
        last = x = self.norm(x)
        out = MoeModelOutputWithPast(last, cache, attentions=attentions if output_attentions else None)
        out.mtp_hidden_states = []
        for layer in self.layers[self.config.num_hidden_layers :]:
            input_ids = F.pad(input_ids, (0, 1))[:, 1:]
            x, _ = layer(self.word_embeddings(input_ids), x, **common)
            out.mtp_hidden_states.append(x)
        return out


class BailingMoeV2ForCausalLM(BailingMoeV2PreTrainedModel, GenerationMixin):
    def __init__(self, config):
        super().__init__(config)
        self.model = BailingMoeV2Model(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)

    def forward(
        self, input_ids=None, attention_mask=None, position_ids=None, past_key_values=None, labels=None, use_cache=None,
        output_attentions=None, return_dict=None, **kwargs,
    ):  # fmt: skip
        out = self.model(input_ids, attention_mask, position_ids, past_key_values, use_cache, output_attentions)
        logits = [self.lm_head(x).float() for x in (out.last_hidden_state, *out.mtp_hidden_states)]
        losses = []
        for k, of in enumerate(logits if labels is not None else []):
            targets = F.pad(labels, (0, k), value=-100)[:, k:].flatten()
            targets = F.pad(targets, (0, 1), value=-100)[1:]  # of the flattened batch, also at the end of a row
            if not k:
                targets = F.pad(labels, (0, 1), value=-100)[:, 1:].flatten()
            losses.append(F.cross_entropy(of.flatten(0, 1), targets))
        loss = losses[0] + self.config.mtp_loss_scaling_factor * sum(losses[1:]) if losses else None
        return MoEV2CausalLMOutputWithPast(
            loss=loss, mtp_loss=losses[1:] or None, logits=logits[0], mtp_logits=logits[1:] or None,
            past_key_values=out.past_key_values, attentions=out.attentions,
        )  # fmt: skip
