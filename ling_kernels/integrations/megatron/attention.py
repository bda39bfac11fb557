"""Megatron-core's self-attention with QK-norm and RoPE in one pass by the op `qk_norm_rope`."""

import torch
from megatron.core.models.common.embeddings.yarn_rotary_pos_embedding import (
    _yarn_get_concentration_factor_from_config as yarn_factor,
)
from megatron.core.transformer.attention import SelfAttention
from torch import Tensor

from ...ops.qk_norm_rope import qk_norm_rope

TABLES = "ling_tables"  # an attribute of Megatron's tensor of angles, which it keeps: their cos and sin


class Attention(SelfAttention):
    """Megatron keeps the heads of a key's group together, [q .. q k v]. To the op these are tokens with one key head
    each, so that nothing is copied. Inference, packed sequences and other norms or rotations are Megatron's own."""

    angles: Tensor | None = None

    def forward(self, hidden_states, attention_mask, *args, rotary_pos_emb=None, **others):
        if args or not self.fusible(rotary_pos_emb, others):
            return super().forward(hidden_states, attention_mask, *args, rotary_pos_emb=rotary_pos_emb, **others)
        self.angles = rotary_pos_emb
        try:
            return super().forward(hidden_states, attention_mask, rotary_pos_emb=None, **others)
        finally:
            self.angles = None

    def fusible(self, angles, others: dict) -> bool:
        config, layer = self.config, self.layer_number - 1
        plain = ("qk_layernorm",)
        other = ("rotary_interleaved", "layernorm_zero_centered_gamma", "attention_output_gate", "test_mode",
                 "fused_single_qkv_rope", "flash_decode", "qk_l2_norm", "mrope_section")  # fmt: skip
        return (
            isinstance(angles, Tensor)
            and angles.shape[1:3] == (1, 1)
            and all(getattr(config, name) for name in plain)
            and not any(getattr(config, name, None) for name in other)
            and not (config.no_rope_freq and config.no_rope_freq[layer])
            and config.normalization == "RMSNorm"
            and config.num_query_groups >= self.world_size
            and not any(value is not None for name, value in others.items() if name != "attention_bias")
        )

    def get_query_key_value_tensors(self, hidden_states, key_value_states=None, **options):
        """hidden_states [S, B, H] -> q [S, B, Hq, D], k and v [S, B, Hkv, D], normed and rotated."""
        if self.angles is None:
            return super().get_query_key_value_tensors(hidden_states, key_value_states, **options)
        qkv, _ = self.linear_qkv(hidden_states)
        length, batch, _ = qkv.shape
        groups, dim = self.num_query_groups_per_partition, self.hidden_size_per_attention_head
        rows = qkv.view(length * batch * groups, -1, dim)
        positions = torch.arange(length, dtype=torch.int32, device=qkv.device)
        positions = positions[:, None].expand(length, batch * groups).reshape(-1)
        norms = self.q_layernorm.weight, self.k_layernorm.weight
        parts = qk_norm_rope(rows, *norms, *self.tables(), positions, 1, self.config.layernorm_epsilon)
        q, k, v = (part.view(length, batch, -1, dim) for part in parts)
        return q, k, v

    def tables(self) -> tuple[Tensor, Tensor]:
        """cos and sin [S, R/2] fp32 of the angles [S, 1, 1, R], whose halves are the same."""
        found = getattr(self.angles, TABLES, None)
        if found is None:
            angles = self.angles[:, 0, 0, : self.angles.shape[-1] // 2].float()
            factor = yarn_factor(self.config)
            found = angles.cos() * factor, angles.sin() * factor
            setattr(self.angles, TABLES, found)
        return found
