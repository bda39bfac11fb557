"""Our parts under vLLM's interfaces: a quantization for its MoE layers, its grouped router, its norms."""

import importlib
from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from torch import Tensor
from vllm.model_executor.layers.quantization import register_quantization_config
from vllm.model_executor.layers.quantization.fp8 import Fp8Config, Fp8MoEMethod

from ...ops.rms_norm import rms_norm
from ..serving import NAME, fp8_experts, grouped_topk

ROUTER = "vllm.model_executor.layers.fused_moe.router.grouped_topk_router"


class LingFp8Config(Fp8Config):
    """vLLM's FP8, but for the routed experts of checkpoints with blocks of 128 x 128."""

    @classmethod
    def get_name(cls) -> str:
        return NAME

    @classmethod
    def override_quantization_method(cls, hf_quant_cfg: dict, user_quant: str | None, hf_config=None) -> str | None:
        """Ours for a block-FP8 checkpoint, where the user names it."""
        blocks = hf_quant_cfg.get("quant_method") == "fp8" and hf_quant_cfg.get("weight_block_size") == [128, 128]
        return NAME if user_quant == NAME and blocks else None

    def get_quant_method(self, layer: torch.nn.Module, prefix: str) -> Any:
        method = super().get_quant_method(layer, prefix)
        if type(method) is not Fp8MoEMethod or not fits(method, layer):
            return method
        use_our_router()
        return LingFp8MoEMethod(self, layer)


class LingFp8MoEMethod(Fp8MoEMethod):
    """Weights stay as they are loaded; `moe_kernel` stays None, so that vLLM sends tokens between devices itself."""

    is_monolithic = False  # routing comes first
    supports_eplb = False

    def process_weights_after_loading(self, layer: torch.nn.Module) -> None:
        pass

    def apply(
        self, layer: torch.nn.Module, x: Tensor, topk_weights: Tensor, topk_ids: Tensor, *shared: Any, **others: Any
    ) -> Tensor:
        """x [T, H] -> [T, H]; vLLM itself runs the shared expert beside it."""
        experts = topk_ids
        if layer.expert_map is not None:  # from an expert's number to its number here, -1 elsewhere
            experts = torch.where(topk_ids < 0, -1, layer.expert_map[topk_ids.clamp(min=0).long()])
        scales = layer.w13_weight_scale_inv, layer.w2_weight_scale_inv
        return fp8_experts(x, layer.w13_weight, scales[0], layer.w2_weight, scales[1], topk_weights, experts)


def fits(method: Fp8MoEMethod, layer: torch.nn.Module) -> bool:
    """Whether our experts compute what this layer asks for; otherwise vLLM's own do."""
    activation = getattr(layer, "activation", "silu")
    other = ("apply_router_weight_on_input", "swiglu_limit", "swiglu_alpha", "swiglu_beta")
    return (
        method.weight_block_size == [128, 128]
        and method.weight_scale_refine is None  # tensor parallelism has not cut through a block
        and not method.moe.has_bias
        and getattr(activation, "value", activation) == "silu"
        and not any(getattr(layer, name, None) for name in other)
    )


def use_our_router() -> None:
    """In this process; a second call changes nothing."""
    module: Any = importlib.import_module(ROUTER)
    if not hasattr(module.grouped_topk, NAME):
        module.grouped_topk = router(module.grouped_topk)


def router(stock: Callable) -> Callable:
    @wraps(stock)
    def routed(
        hidden_states: Tensor, gating_output: Tensor, topk: int, renormalize: bool, num_expert_group: int = 0,
        topk_group: int = 0, scoring_func: str = "softmax", routed_scaling_factor: float = 1.0,
        e_score_correction_bias: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        if scoring_func != "sigmoid" or not renormalize or e_score_correction_bias is None or topk == 1:
            return stock(
                hidden_states, gating_output, topk, renormalize, num_expert_group, topk_group, scoring_func,
                routed_scaling_factor, e_score_correction_bias,
            )  # fmt: skip
        groups = num_expert_group, topk_group
        return grouped_topk(gating_output, e_score_correction_bias, topk, *groups, routed_scaling_factor)

    setattr(routed, NAME, True)
    return routed


def connect() -> None:
    register_quantization_config(NAME)(LingFp8Config)
    connect_norms()


def connect_norms() -> None:
    """Offer our norms to vLLM's IR, which takes them where `ir_op_priority` names us. 0.34 removes it."""
    from vllm import ir

    if NAME not in ir.ops.rms_norm.impls:
        ir.ops.rms_norm.register_impl(NAME, supports_args=takes_norm)(norm)
        ir.ops.fused_add_rms_norm.register_impl(NAME, supports_args=takes_add_norm)(add_norm)


def takes_norm(x: Tensor, weight: Tensor | None, epsilon: float, variance_size: int | None = None) -> bool:
    return weight is not None and variance_size is None


def takes_add_norm(
    x: Tensor, x_residual: Tensor, weight: Tensor | None, epsilon: float, variance_size: int | None = None
) -> bool:
    return weight is not None and variance_size is None


def norm(x: Tensor, weight: Tensor | None, epsilon: float, variance_size: int | None = None) -> Tensor:
    return rms_norm(x, weight, None, epsilon)


def add_norm(
    x: Tensor, x_residual: Tensor, weight: Tensor | None, epsilon: float, variance_size: int | None = None
) -> tuple[Tensor, Tensor]:
    return rms_norm(x, weight, x_residual, epsilon)
