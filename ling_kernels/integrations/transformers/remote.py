"""The modules of the official model code of Ling-2.0 (modeling_bailing_moe_v2.py, for transformers 4.52 to 4.57) on our
ops. Each function takes the place of a module's `forward`, with its arguments and results.

That code keeps every expert as a module of its own. `lay_out` moves their weights into one tensor per projection, of
which each weight stays a view, so that the grouped products read them without a copy.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ...nn.linear import is_plain
from ...ops.dispatch import dispatch_here
from ...ops.moe import expert_mlp
from ...ops.qk_norm_rope import qk_norm_rope
from ...ops.route import route
from ...ops.router_gemm import router_gemm
from .functions import attention_forward


def gate_forward(self: nn.Module, hidden_states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """hidden_states [..., H] -> experts [T, topk] int64, weights [T, topk] fp32, logits [T, E] fp32."""
    logits = router_gemm(hidden_states.reshape(-1, hidden_states.shape[-1]), self.weight)
    weights, experts, _ = route(
        logits, self.expert_bias.to(logits.dtype), num_groups=self.n_group, group_topk=self.topk_group,
        topk=self.top_k, scale=self.routed_scaling_factor,
    )  # fmt: skip
    return experts.long(), weights, logits


def block_forward(self: nn.Module, hidden_states: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """hidden_states [B, L, H] -> [B, L, H], and the router's logits and choices [B, L, ...].

    Experts with adapters, or whose weights are quantised, compute by the module's own forward.
    """
    if not all(is_plain(linear, nn.Linear) for e in self.experts for linear in (e.gate_proj, e.up_proj, e.down_proj)):
        return type(self).forward(self, hidden_states)
    shape = hidden_states.shape[:2]
    experts, weights, logits = self.gate(hidden_states)
    gate_up, down = expert_weights(self.experts)
    plan = dispatch_here(experts, len(gate_up))
    y = expert_mlp(hidden_states.flatten(0, 1), plan, weights, gate_up, down).view_as(hidden_states)
    if self.config.num_shared_experts is not None:
        y = y + self.shared_experts(hidden_states)
    return y, (logits.view(*shape, -1), experts.view(*shape, -1))


def bailing_attention_forward(
    self: nn.Module,
    hidden_states: Tensor,
    attention_mask: Tensor | None = None,
    position_ids: Tensor | None = None,
    past_key_value: Any = None,
    output_attentions: bool = False,
    use_cache: bool = False,
    position_embeddings: tuple[Tensor, Tensor] | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None, Any]:
    """hidden_states [B, L, H] -> [B, L, H]; probabilities are asked of the module's own forward."""
    if output_attentions:
        return type(self).forward(
            self, hidden_states, attention_mask, position_ids, past_key_value, True, use_cache, position_embeddings
        )
    B, L, _ = hidden_states.shape
    qkv = self.query_key_value(hidden_states).flatten(0, 1).unflatten(-1, (-1, self.head_dim))
    cos, sin = (t[..., : t.shape[-1] // 2].flatten(0, 1).float() for t in position_embeddings)
    rows = torch.arange(len(cos), device=qkv.device, dtype=torch.int32).repeat(B * L // len(cos))
    q, k, v = qk_norm_rope(
        qkv, self.query_layernorm.weight, self.key_layernorm.weight, cos, sin, rows, self.num_key_value_heads,
        eps=self.query_layernorm.variance_epsilon,
    )  # fmt: skip
    q, k, v = (t.unflatten(0, (B, L)).transpose(1, 2) for t in (q, k, v))
    if past_key_value is not None:
        k, v = past_key_value.update(k, v, self.layer_idx)
    out, _ = attention_forward(self, q, k, v, padding_of(attention_mask), 1 / math.sqrt(self.head_dim))
    return self.dense(out.flatten(2)), None, past_key_value


def padding_of(mask: Tensor | None) -> Tensor | None:
    """A mask [B, Lk] of tokens, or [B, 1, Lq, Lk] of numbers to add, whose last query sees all tokens -> [B, Lk] bool;
    None where nothing is padding. It is kept at the mask, which all layers share."""
    if mask is None:
        return None
    if not hasattr(mask, "padding_of_ling_kernels"):
        tokens = mask.bool() if mask.ndim == 2 else mask[:, 0, -1] == 0
        mask.padding_of_ling_kernels = None if tokens.all() else tokens  # type: ignore[attr-defined]
    return mask.padding_of_ling_kernels  # type: ignore[attr-defined]


def expert_weights(experts: Sequence[nn.Module]) -> tuple[Tensor, Tensor]:
    """gate_up [E, 2F, H] and down [E, H, F] of experts with gate_proj, up_proj and down_proj."""
    halves = stack([w for e in experts for w in (e.gate_proj.weight, e.up_proj.weight)])
    return halves.view(len(experts), -1, halves.shape[-1]), stack([e.down_proj.weight for e in experts])


def stack(weights: list[Tensor]) -> Tensor:
    """n matrices [N, K] -> [n, N, K]: without a copy where they lie one after the other, as after `lay_out`."""
    return Stack.apply(*weights) if lie_together(weights) else torch.stack(weights)


def lie_together(weights: list[Tensor]) -> bool:
    first, size = weights[0], weights[0].nbytes
    if not all(type(w) is nn.Parameter and w.is_contiguous() and w.device == first.device for w in weights):
        return False
    if first.is_meta or first.untyped_storage().nbytes() < size * len(weights):
        return False
    start, storage = first.data_ptr(), first.untyped_storage().data_ptr()
    same = all(w.untyped_storage().data_ptr() == storage for w in weights)
    return same and all(w.data_ptr() == start + i * size for i, w in enumerate(weights))


class Stack(torch.autograd.Function):
    @staticmethod
    def forward(ctx, *weights):
        first = weights[0].detach()
        return first.as_strided((len(weights), *first.shape), (first.numel(), *first.stride()))

    @staticmethod
    def backward(ctx, gradient):
        return gradient.unbind()


@torch.no_grad()
def lay_out(experts: Sequence[nn.Module]) -> None:
    """Move the experts' weights into one tensor per projection; `expert_weights` then copies nothing. Weights that are
    on no device yet, divided over ranks or quantised stay as they are."""
    for names in (("gate_proj", "up_proj"), ("down_proj",)):
        weights = [getattr(e, name).weight for e in experts for name in names]
        plain = all(type(w) is nn.Parameter and not w.is_meta and w.dtype == weights[0].dtype for w in weights)
        if plain and not lie_together(weights):
            for weight, row in zip(weights, torch.stack([w.detach() for w in weights]), strict=True):
                weight.data = row
