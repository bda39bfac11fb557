"""Routing, moving rows to their experts and back, and the experts of a layer: linghe, Megatron, SGLang, SonicMoE,
Transformer Engine, vLLM."""

import torch

from ling_kernels.ops.moe import linear
from ling_kernels.ops.route import route
from ling_kernels.ops.router_gemm import router_gemm
from ling_kernels.ops.swiglu import swiglu

from . import only, peer


def by_expert(weights, experts, E: int):
    """[T, topk] each -> the weights as [T, E], whatever their order was."""
    return weights.new_zeros(len(weights), E).scatter(1, experts.long(), weights)


def router(prepare):
    """For Ling's routing: sigmoid scores, a bias that chooses, groups, weights that add up to `scale`."""

    def checked(logits, bias, mask=None, num_groups=8, group_topk=4, topk=8, scale=2.5, z_loss=None):
        only(mask is None and z_loss is None, "mask or z-loss")
        call, to_weights = prepare(logits, bias, num_groups, group_topk, topk, scale)
        E = logits.shape[1]
        return call, lambda theirs, ours: (to_weights(theirs).float(), by_expert(*ours[:2], E))

    return checked


@peer("route", "SGLang", "sgl_kernel")
@router
def sglang_route(logits, bias, num_groups, group_topk, topk, scale):
    import sgl_kernel

    scaled = dict(routed_scaling_factor=scale, apply_routed_scaling_factor_on_output=True)
    return (
        lambda: sgl_kernel.moe_fused_gate(logits, bias, num_groups, group_topk, topk, **scaled),
        lambda theirs: by_expert(*theirs[:2], logits.shape[1]),
    )


@peer("route", "vLLM", "vllm")
@router
def vllm_route(logits, bias, num_groups, group_topk, topk, scale):
    from vllm.model_executor.layers.fused_moe.router.grouped_topk_router import fused_grouped_topk

    return (
        lambda: fused_grouped_topk(
            logits, logits, topk, True, bias, num_expert_group=num_groups, topk_group=group_topk,
            scoring_func="sigmoid", routed_scaling_factor=scale,
        ),
        lambda theirs: by_expert(*theirs[:2], logits.shape[1]),
    )  # fmt: skip


@peer("route", "linghe", "linghe")
@router
def linghe_route(logits, bias, num_groups, group_topk, topk, scale):
    from linghe.facade.topk import group_topk_score

    return lambda: group_topk_score(logits, topk, bias, num_groups, group_topk, scale), lambda theirs: theirs[0]


@peer("route", "Transformer Engine", "transformer_engine.pytorch")
@router
def te_route(logits, bias, num_groups, group_topk, topk, scale):
    from transformer_engine.pytorch.router import fused_topk_with_score_function

    return (
        lambda: fused_topk_with_score_function(logits, topk, False, num_groups, group_topk, scale, "sigmoid", bias),
        lambda theirs: theirs[0],
    )


@peer("route", "Megatron", "megatron.core")
@router
def megatron_route(logits, bias, num_groups, group_topk, topk, scale):
    from megatron.core.transformer.moe.moe_utils import topk_routing_with_score_function

    how = dict(num_groups=num_groups, group_topk=group_topk, scaling_factor=scale, score_function="sigmoid")
    return (
        lambda: topk_routing_with_score_function(logits, topk, expert_bias=bias, **how),
        lambda theirs: theirs[0],
    )


def mask_of(experts, E: int):
    """[T, topk] -> [T, E] bool."""
    only(bool((experts >= 0).all()), "slots that go nowhere")
    mask = torch.zeros(len(experts), E, dtype=torch.bool, device=experts.device).scatter(1, experts.long(), True)
    only(bool((mask.sum(1) == experts.shape[1]).all()), "token that goes to an expert twice")
    return mask


def routing_map(plan):
    """[T, E] bool, and [T, topk] int32 experts."""
    only(bool((plan.slot >= 0).all()), "slots that go nowhere")
    experts = torch.searchsorted(plan.offsets[1:].contiguous(), plan.slot.contiguous(), right=True)
    return mask_of(experts, len(plan.offsets) - 1), experts.int()


@peer("permute", "linghe", "linghe")
def linghe_permute(x, plan):
    from linghe.utils.gather import triton_make_row_id_map, triton_permute_with_mask_map

    rows = triton_make_row_id_map(routing_map(plan)[0])
    return lambda: triton_permute_with_mask_map(x, None, None, rows, plan.slot.numel())[0]


@peer("permute", "Megatron", "megatron.core")
def megatron_permute(x, plan):
    from megatron.core.transformer.moe.moe_utils import permute

    mask = routing_map(plan)[0]
    return lambda: permute(x, mask, num_out_tokens=plan.slot.numel())[0]


@peer("permute", "Transformer Engine", "transformer_engine.pytorch")
def te_permute(x, plan):
    from transformer_engine.pytorch.permutation import moe_permute

    experts = routing_map(plan)[1]
    return lambda: moe_permute(x, experts, plan.slot.numel(), map_type="index")[0]


@peer("unpermute", "Megatron", "megatron.core")
def megatron_unpermute(y, plan, weights=None):
    from megatron.core.transformer.moe.moe_utils import unpermute

    mask, experts = routing_map(plan)
    shape = torch.Size([len(experts), y.shape[1]])
    source = (plan.source // plan.slot.shape[1]).long()
    probs = None if weights is None else by_expert(weights, experts, mask.shape[1])
    return lambda: unpermute(y, source, shape, probs=probs, routing_map=mask)


@peer("unpermute", "Transformer Engine", "transformer_engine.pytorch")
def te_unpermute(y, plan, weights=None):
    from transformer_engine.pytorch.permutation import moe_permute, moe_unpermute

    experts = routing_map(plan)[1]
    x = y.new_zeros(len(experts), y.shape[1])
    rows = moe_permute(x, experts, plan.slot.numel(), map_type="index")[1]
    return lambda: moe_unpermute(y, rows, merging_probs=weights, map_type="index")


def experts_of(prepare):
    """For a peer of the experts alone: router, routing and shared expert are ours, in the time too."""

    def layer(x, router_w, bias, w_gate_up, w_down, shared=None, mask=None, num_groups=8, group_topk=4, topk=8,
              scale=2.5, z_loss=None, fold_weights=False):  # fmt: skip
        only(mask is None and z_loss is None and not fold_weights, "mask, z-loss or weights inside here")
        routed = prepare(x, w_gate_up, w_down)

        def call():
            weights, experts, _ = route(router_gemm(x, router_w), bias, None, num_groups, group_topk, topk, scale)
            y = routed(weights, experts)
            return y if shared is None else y + linear(swiglu(linear(x, shared[0])), shared[1])

        return call

    return layer


@peer("moe", "vLLM's experts", "vllm")
@experts_of
def vllm_experts(x, gate_up, down):
    from vllm.model_executor.layers.fused_moe.config import fp8_w8a8_moe_quant_config
    from vllm.model_executor.layers.fused_moe.fused_moe import fused_experts

    how = {}
    if isinstance(gate_up, tuple):
        (gate_up, up_scale), (down, down_scale) = gate_up, down
        how = dict(quant_config=fp8_w8a8_moe_quant_config(up_scale, down_scale, block_shape=[128, 128]))
    return lambda weights, experts: fused_experts(x, gate_up, down, weights, experts, **how)


@peer("moe", "SonicMoE's experts", "sonicmoe")
@experts_of
def sonic_experts(x, gate_up, down):
    from sonicmoe.enums import ActivationType
    from sonicmoe.functional import moe_general_routing_inputs

    only(not isinstance(gate_up, tuple), "FP8")
    E, rows, H = gate_up.shape
    w1 = gate_up.unflatten(1, (2, rows // 2)).transpose(1, 2).reshape(E, rows, H)  # gate and up by turns
    stream = torch.cuda.current_stream().cuda_stream if x.is_cuda else 0

    def routed(weights, experts):
        T, topk = experts.shape
        tokens = torch.arange(T * topk, dtype=torch.int32, device=x.device) // topk
        return moe_general_routing_inputs(
            x, weights.flatten(), tokens, experts.flatten(), w1.permute(1, 2, 0), None, down.permute(1, 2, 0), None, E,
            stream, ActivationType.SWIGLU, True,
        )[0]  # fmt: skip

    return routed
