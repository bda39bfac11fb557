"""Routers, permutations and experts of the peers."""

from types import SimpleNamespace

import torch

from .arithmetic import gate_up, wide


def chosen(logits, bias, groups, group_topk, topk, scale):
    """[T, E] weights, 0 where an expert is not chosen; and which are."""
    score = logits.sigmoid()
    biased = (score + bias).unflatten(1, (groups, -1))
    best = biased.topk(min(2, biased.shape[2]), -1)[0].sum(-1).topk(group_topk, -1)[1]
    allowed = torch.zeros(len(logits), groups).scatter(1, best, 1).bool()[..., None]
    mask = torch.zeros_like(score).scatter(1, biased.masked_fill(~allowed, -torch.inf).flatten(1).topk(topk)[1], 1)
    return score * mask / (score * mask).sum(1, keepdim=True) * scale, mask.bool()


def in_another_order(weights, mask):
    """[T, topk] weights and experts, the last expert first."""
    experts = torch.stack([row.nonzero()[:, 0].flip(0) for row in mask])
    return weights.gather(1, experts), experts.int()


def moe_fused_gate(input_tensor, bias, num_expert_group, topk_group, topk, num_fused_shared_experts=0,
                   routed_scaling_factor=0, apply_routed_scaling_factor_on_output=False):  # fmt: skip
    scale = routed_scaling_factor if apply_routed_scaling_factor_on_output else 1
    return in_another_order(*chosen(input_tensor, bias, num_expert_group, topk_group, topk, scale))


def fused_grouped_topk(hidden_states, gating_output, topk, renormalize, e_score_correction_bias, num_expert_group=0,
                       topk_group=0, scoring_func="softmax", routed_scaling_factor=1.0):  # fmt: skip
    assert scoring_func == "sigmoid" and renormalize and len(hidden_states) == len(gating_output)
    how = num_expert_group, topk_group, topk, routed_scaling_factor
    return in_another_order(*chosen(gating_output, e_score_correction_bias, *how))


def group_topk_score(x, topk, expert_bias=None, num_groups=32, group_topk=4, scaling_factor=1.0,
                     score_function="sigmoid"):  # fmt: skip
    return *chosen(x, expert_bias, num_groups, group_topk, topk, scaling_factor), None


def te_topk(logits, topk, use_pre_softmax, num_groups, group_topk, scaling_factor, score_function, expert_bias):
    assert score_function == "sigmoid" and not use_pre_softmax
    return chosen(logits, expert_bias, num_groups, group_topk, topk, scaling_factor)


def megatron_topk(logits, topk, use_pre_softmax=False, num_groups=None, group_topk=None, scaling_factor=None,
                  score_function="softmax", expert_bias=None, fused=False):  # fmt: skip
    return te_topk(logits, topk, use_pre_softmax, num_groups, group_topk, scaling_factor, score_function, expert_bias)


def row_map(routing_map, multiple_of=1):
    places = routing_map.T.flatten().cumsum(0).view(routing_map.T.shape).T - 1
    return torch.where(routing_map, places, -1).int()


def permute_map(inp, scale, probs, row_id_map, num_out_tokens, contiguous=True, tokens_per_expert=None):
    out = inp.new_empty(num_out_tokens, inp.shape[1])
    token, expert = torch.where(row_id_map >= 0)
    out[row_id_map[token, expert].long()] = inp[token]
    return out, None, None


def megatron_permute(tokens, routing_map, probs=None, num_out_tokens=None, fused=False):
    sources = torch.where(routing_map.T)[1]
    assert num_out_tokens == len(sources)
    return tokens[sources], None, sources, None, None


def megatron_unpermute(permuted_tokens, sorted_indices, restore_shape, probs=None, routing_map=None, fused=False):
    weights = 1 if probs is None else probs.T[routing_map.T][:, None]
    out = torch.zeros(restore_shape).index_add_(0, sorted_indices, permuted_tokens.float() * weights)
    return out.to(permuted_tokens.dtype)


def te_permute(inp, routing_map, num_out_tokens, max_token_num=-1, map_type="mask"):
    assert map_type == "index" and routing_map.dtype == torch.int32 and num_out_tokens == routing_map.numel()
    order = routing_map.flatten().long().argsort(stable=True)
    return inp[order // routing_map.shape[1]], order


def te_unpermute(inp, row_id_map, merging_probs=None, restore_shape=None, map_type="mask"):
    assert map_type == "index"
    topk = merging_probs.shape[1]
    weights = merging_probs.flatten()[row_id_map][:, None]
    out = torch.zeros(len(row_id_map) // topk, inp.shape[1])
    return out.index_add_(0, row_id_map // topk, inp.float() * weights).to(inp.dtype)


def experts(x, tokens, ids, weights, w1, w2):
    """w1 [E, 2F, H] with all gates first."""
    out = torch.zeros(x.shape)
    for t, e, weight in zip(tokens.tolist(), ids.tolist(), weights.tolist(), strict=True):
        out[t] += weight * (gate_up(x[t, None].float() @ w1[e].float().T) @ w2[e].float().T)[0]
    return out.to(x.dtype)


def fused_experts(hidden_states, w1, w2, topk_weights, topk_ids, inplace=False, activation="silu",
                  apply_router_weight_on_input=False, quant_config=None):  # fmt: skip
    if quant_config:
        assert quant_config.block_shape == [128, 128]
        w1, w2 = wide(w1, quant_config.w1_scale), wide(w2, quant_config.w2_scale)
    tokens = torch.arange(topk_ids.numel()) // topk_ids.shape[1]
    return experts(hidden_states, tokens, topk_ids.flatten(), topk_weights.flatten(), w1, w2)


def fp8_config(w1_scale, w2_scale, a1_scale=None, a2_scale=None, per_act_token_quant=False, per_out_ch_quant=False,
               block_shape=None):  # fmt: skip
    return SimpleNamespace(w1_scale=w1_scale, w2_scale=w2_scale, block_shape=block_shape)


def general_routing(x, router_scores, token_indices, expert_indices, w1, b1, w2, b2, E, stream_id, activation_type,
                    is_inference_mode_enabled=False):  # fmt: skip
    assert activation_type == "swiglu" and b1 is b2 is None and w1.shape[2] == w2.shape[2] == E
    assert token_indices.diff().min() >= 0
    by_turns = w1.permute(2, 0, 1)
    first_gates = torch.cat([by_turns[:, ::2], by_turns[:, 1::2]], 1)
    return experts(x, token_indices, expert_indices, router_scores, first_gates, w2.permute(2, 0, 1)), None
