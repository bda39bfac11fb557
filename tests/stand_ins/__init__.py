"""Stand-ins for the packages of benchmarks/peers: their own signatures (of August 2026), computed with torch, one
expert, sequence or row after the other. What a signature here lacks is never passed."""

import sys
from types import ModuleType, SimpleNamespace

import torch
from torch.nn import functional as F

from . import attention, engines, products, routing, rows
from .arithmetic import E4M3, fp8, gate_up, norm


def install(monkeypatch) -> None:
    """All of them, where a real package may be too; undone with the test."""
    for name, functions in PACKAGES.items():
        parts = name.split(".")
        for i in range(1, len(parts) + 1):
            path = ".".join(parts[:i])
            module = sys.modules.get(path)
            if not isinstance(module, StandIn):
                module = StandIn(path)
                monkeypatch.setitem(sys.modules, path, module)
            if i > 1:
                setattr(sys.modules[".".join(parts[: i - 1])], parts[i - 1], module)
        for attribute, function in functions.items():
            setattr(module, attribute, function)
    monkeypatch.setattr(torch.ops, "_C", SimpleNamespace(silu_and_mul=rows.silu_and_mul_out), raising=False)  # vLLM's


class StandIn(ModuleType):
    pass


PACKAGES = {
    "deep_gemm": dict(
        fp8_gemm_nt=products.nt,
        m_grouped_fp8_gemm_nt_contiguous=products.contiguous,
        m_grouped_fp8_gemm_nt_masked=products.masked,
        m_grouped_bf16_gemm_nt_contiguous=products.contiguous_bf16,
    ),
    "flash_attn": dict(flash_attn_varlen_func=attention.fa2, flash_attn_with_kvcache=attention.kv2),
    "flash_attn.cute": dict(flash_attn_varlen_func=attention.fa4),
    "flash_attn_interface": dict(flash_attn_varlen_func=attention.fa3, flash_attn_with_kvcache=attention.kv3),
    "flashinfer": dict(BatchDecodeWithPagedKVCacheWrapper=attention.FlashInferDecode),
    "flashinfer.norm": dict(rmsnorm=rows.rmsnorm, fused_add_rmsnorm=rows.fused_add_rmsnorm),
    "flashinfer.activation": dict(silu_and_mul=rows.silu_and_mul),
    "liger_kernel.ops.rms_norm": dict(LigerRMSNormFunction=rows.LigerRMSNorm),
    "liger_kernel.ops.fused_add_rms_norm": dict(LigerFusedAddRMSNormFunction=rows.LigerAddRMSNorm),
    "liger_kernel.ops.swiglu": dict(LigerSiLUMulFunction=rows.LigerSiLUMul),
    "liger_kernel.ops.cross_entropy": dict(LigerCrossEntropyFunction=rows.LigerCrossEntropy),
    "liger_kernel.ops.fused_linear_cross_entropy": dict(
        LigerFusedLinearCrossEntropyFunction=rows.LigerLinearCrossEntropy
    ),
    "linghe.facade.fp32_gemm": dict(fp32_gemm=lambda input, weight: input.float() @ weight.float().T),
    "linghe.facade.loss": dict(
        softmax_cross_entropy=lambda logits, labels, ignore_index=-100, inplace=False, tp_group=None: F.cross_entropy(
            logits.float(), labels, ignore_index=ignore_index, reduction="none"
        ),
    ),
    "linghe.facade.norm": dict(rms_norm=lambda x, weight, eps=1e-6: norm(x, weight, eps)),
    "linghe.facade.topk": dict(group_topk_score=routing.group_topk_score),
    "linghe.gemm.blockwise_fp8_gemm": dict(triton_tt_fp8_gemm=products.tt),
    "linghe.quant.block": dict(
        triton_block_quant=lambda x, block_size=128, round_scale=False: fp8(x, block_size),
        triton_blockwise_quant=rows.blockwise_quant,
    ),
    "linghe.quant.group": dict(triton_group_quant=lambda x, dtype=E4M3, group_size=128, round_scale=False: fp8(x)),
    "linghe.utils.gather": dict(
        triton_make_row_id_map=routing.row_map, triton_permute_with_mask_map=routing.permute_map
    ),
    "linghe.utils.norm": dict(triton_rms_norm_and_block_quant_forward=rows.norm_quant),
    "linghe.utils.reduce": dict(
        triton_batch_norm=lambda xs, ord=2, norm=True, scalar=True, high_precision=True: torch.cat(xs).float().norm()
    ),
    "linghe.utils.rope": dict(triton_varlen_qk_norm_and_half_rope_forward=rows.norm_rope),
    "linghe.utils.silu": dict(
        triton_weighted_silu_forward=lambda x, weight=None, out=None, asm=False: gate_up(x, weight),
        triton_silu_and_block_quant_forward=rows.silu_quant,
    ),
    "megatron.core.fusions.fused_bias_swiglu": dict(
        bias_swiglu_impl=lambda input, bias, fp8_input_store=False: gate_up(input),
        weighted_bias_swiglu_impl=lambda input, bias, weights, fp8_input_store=False: gate_up(input, weights),
    ),
    "megatron.core.transformer.moe.moe_utils": dict(
        topk_routing_with_score_function=routing.megatron_topk,
        permute=routing.megatron_permute,
        unpermute=routing.megatron_unpermute,
    ),
    "quack": dict(rmsnorm=rows.quack_rmsnorm, cross_entropy=rows.quack_cross_entropy),
    "quack.gemm_interface": dict(gemm=products.quack_gemm),
    "sgl_kernel": dict(
        fp8_blockwise_scaled_mm=products.blockwise,
        rmsnorm=rows.rmsnorm,
        fused_add_rmsnorm=rows.fused_add_rmsnorm,
        silu_and_mul=lambda input, out=None: gate_up(input),
        moe_fused_gate=routing.moe_fused_gate,
        sgl_per_token_group_quant_8bit=rows.group_quant,
    ),
    "sglang": dict(Engine=engines.Engine),
    "sonicmoe.enums": dict(ActivationType=SimpleNamespace(SWIGLU="swiglu")),
    "sonicmoe.functional": dict(moe_general_routing_inputs=routing.general_routing),
    "transformer_engine.pytorch": dict(GroupedLinear=products.GroupedLinear, RMSNorm=rows.TeRMSNorm),
    "transformer_engine.pytorch.permutation": dict(moe_permute=routing.te_permute, moe_unpermute=routing.te_unpermute),
    "transformer_engine.pytorch.router": dict(fused_topk_with_score_function=routing.te_topk),
    "vllm": dict(LLM=engines.LLM, SamplingParams=engines.SamplingParams),
    "vllm._custom_ops": dict(
        rms_norm=rows.vllm_rms_norm, fused_add_rms_norm=rows.fused_add_rmsnorm, cutlass_scaled_mm=products.cutlass
    ),
    "vllm.model_executor.layers.fused_moe.config": dict(fp8_w8a8_moe_quant_config=routing.fp8_config),
    "vllm.model_executor.layers.fused_moe.fused_moe": dict(fused_experts=routing.fused_experts),
    "vllm.model_executor.layers.fused_moe.router.grouped_topk_router": dict(
        fused_grouped_topk=routing.fused_grouped_topk
    ),
    "vllm.model_executor.layers.quantization.utils.fp8_utils": dict(per_token_group_quant_fp8=rows.vllm_group_quant),
}
