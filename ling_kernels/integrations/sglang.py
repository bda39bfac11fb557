"""A plugin of SGLang, found by its entry point: `--moe-runner-backend ling_kernels` serves a block-FP8 Ling by our ops.

Untested inside SGLang. docs/integrations/sglang.md.
"""

from typing import Any

from torch import Tensor

from ..errors import InputError
from ..ops.rms_norm import rms_norm
from .serving import NAME, fp8_experts, grouped_topk, plug_in

FP8 = "sglang.srt.layers.quantization.fp8.Fp8MoEMethod"
HOOKS = {  # functions of SGLang around which ours run, once our backend is asked for
    f"{FP8}.create_moe_runner": "create_runner",
    f"{FP8}.apply": "apply_experts",
    "sglang.srt.layers.moe.topk.biased_grouped_topk": "route_tokens",
    "sglang.srt.layers.layernorm.RMSNorm.forward_cuda": "norm",
}


def register() -> None:
    """Called by SGLang in every process, perhaps more than once. Changes nothing until our backend is asked for."""
    plug_in("sglang", "0.5.23", connect)


def connect() -> None:
    from sglang.srt.layers.moe.moe_runner.base import DispatchMoeRunnerCore
    from sglang.srt.layers.moe.moe_runner.runner import register_moe_runner_core
    from sglang.srt.layers.moe.utils import resolve_moe_runner_backend
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType
    from sglang.srt.server_args import add_moe_runner_backend_choices

    class Core(DispatchMoeRunnerCore):
        """Routed experts of one layer."""

        @property
        def runner_backend(self):
            return resolve_moe_runner_backend(NAME)

        def run_from_dispatch(self, dispatch_output, quant_info, runner_config, hooks=None):
            from sglang.srt.layers.moe.token_dispatcher.standard import StandardCombineInput

            return StandardCombineInput(hidden_states=experts(dispatch_output, quant_info, runner_config))

    try:
        resolve_moe_runner_backend(NAME)
        return  # by an earlier call
    except ValueError:
        pass
    register_moe_runner_core(NAME, Core)
    add_moe_runner_backend_choices([NAME])
    for target, hook in HOOKS.items():
        HookRegistry.register(target, globals()[hook], HookType.AROUND)


def asked_for() -> bool:
    from sglang.srt.layers.moe.utils import get_moe_runner_backend

    return get_moe_runner_backend().value == NAME


def experts(dispatch_output: Any, quant_info: Any, config: Any) -> Tensor:
    """quant_info is the one that SGLang makes for its Triton runner: weights as they are in the checkpoint."""
    weights, ids, _ = dispatch_output.topk_output
    q = quant_info
    scaled = weights.float() * (config.routed_scaling_factor or 1.0)
    return fp8_experts(dispatch_output.hidden_states, q.w13_weight, q.w13_scale, q.w2_weight, q.w2_scale, scaled, ids)


def create_runner(stock, method: Any, layer: Any, moe_runner_config: Any) -> None:
    """Around Fp8MoEMethod.create_moe_runner."""
    if not asked_for():
        return stock(method, layer, moe_runner_config)
    config = moe_runner_config
    other = ("apply_router_weight_on_input", "no_combine", "gemm1_alpha", "gemm1_clamp_limit", "swiglu_limit")
    wrong = [name for name in other if getattr(config, name, None)]
    if not method.block_quant or list(method.weight_block_size) != [128, 128]:
        wrong.append("weights that are not FP8 in blocks of 128 x 128")
    if config.activation != "silu" or not config.is_gated:
        wrong.append(f"activation {config.activation}")
    if wrong:
        raise InputError(f"--moe-runner-backend {NAME} does not support {', '.join(wrong)}")
    from sglang.srt.layers.moe.moe_runner.runner import MoeRunner
    from sglang.srt.layers.moe.utils import resolve_moe_runner_backend

    method.moe_runner_config = config
    method.runner = MoeRunner(resolve_moe_runner_backend(NAME), config)
    method._owns_moe_runner = True


def apply_experts(stock, method: Any, layer: Any, dispatch_output: Any) -> Any:
    """Around Fp8MoEMethod.apply."""
    runner = getattr(method, "runner", None)
    if runner is None or runner.runner_backend.value != NAME:
        return stock(method, layer, dispatch_output)
    return runner.run(dispatch_output, method.get_triton_quant_info(layer))


def route_tokens(stock, *args, **given) -> tuple[Tensor, Tensor]:
    """Around biased_grouped_topk, whose scores are sigmoids."""
    bias = given.get("correction_bias")
    plain = not args and given.get("renormalize") and not given.get("num_fused_shared_experts")
    if not plain or bias is None or bias.ndim != 1 or given["topk"] == 1 or not asked_for():
        return stock(*args, **given)
    scale = given.get("routed_scaling_factor") if given.get("apply_routed_scaling_factor_on_output") else None
    groups = given.get("num_expert_group") or 1, given.get("topk_group") or 1
    return grouped_topk(given["gating_output"], bias, given["topk"], *groups, scale or 1.0)


def norm(stock, layer: Any, x: Tensor, residual: Tensor | None = None, *args, **given) -> Any:
    """Around RMSNorm.forward_cuda."""
    other = ("variance_size_override", "cast_x_before_out_mul", "fp32_residual", "override_orig_dtype", "_quant_linear")
    added = [*args, *given.values()]  # a second residual, a layer for which to quantise
    special = any(getattr(layer, name, None) for name in other) or any(value is not None for value in added)
    if special or not layer.has_weight or not x.numel() or not asked_for():
        return stock(layer, x, residual, *args, **given)
    return rms_norm(x, layer.weight, residual, layer.variance_epsilon)
