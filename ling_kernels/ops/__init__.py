"""The ops: functions over tensors, one noun and one file each. These tables are what `ling_kernels.<name>` offers.

An op has the name of its file: `ling_kernels.ops.rms_norm` is the function; the module is
`importlib.import_module("ling_kernels.ops.rms_norm")`.
"""

import importlib
import sys
from types import ModuleType
from typing import TYPE_CHECKING

EXPORTS = {  # op: the file below ops/ that holds it
    "accept_tokens": "accept_tokens",
    "adamw_8bit": "adamw_8bit",
    "attention": "attention",
    "attention_cells": "attention_cells",
    "attention_decode": "attention_decode",
    "balance_bias_": "balance_bias",
    "cross_entropy": "cross_entropy",
    "decode_inputs": "decode_inputs",
    "dispatch": "dispatch",
    "gemm_fp8": "gemm_fp8",
    "grad_norm": "grad_norm",
    "grouped_gemm": "grouped_gemm",
    "grouped_gemm_fp8": "grouped_gemm_fp8",
    "grouped_gemm_fp8_masked": "grouped_gemm_fp8",
    "grouped_wgrad": "grouped_wgrad",
    "linear_cross_entropy": "linear_cross_entropy",
    "moe": "moe",
    "moe_decode": "moe_decode",
    "permute": "permute",
    "permute_quantize": "permute",
    "qk_norm_attention": "qk_norm_attention",
    "qk_norm_attention_decode": "qk_norm_attention_decode",
    "qk_norm_rope": "qk_norm_rope",
    "quantize": "quantize",
    "quantize_weight": "quantize",
    "rms_norm": "rms_norm",
    "rms_norm_linear": "rms_norm_linear",
    "rms_norm_router": "rms_norm_router",
    "route": "route",
    "router_gemm": "router_gemm",
    "sample": "sample",
    "swiglu": "swiglu",
    "transpose_fp8": "transpose_fp8",
    "unpermute": "unpermute",
}
HELPERS = {  # types and functions that go with the ops: their file
    "KVCache": "attention_decode",
    "Plan": "dispatch",
    "adamw_8bit_state": "adamw_8bit",
    "dequantize": "quantize",
    "rope_tables": "rope_tables",
    "swiglu_backward": "swiglu",
}


class OpsModule(ModuleType):
    """Loads an op's file when its name is first used. The name stays the function when the submodule is imported."""

    __all__ = [*EXPORTS, *HELPERS]  # what a star import takes; here, since type checkers read the block below instead

    def __getattr__(self, name: str):
        file = EXPORTS.get(name) or HELPERS.get(name)
        if file is None:
            raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}")
        value = getattr(importlib.import_module(f".{file}", self.__name__), name)
        setattr(self, name, value)
        return value

    def __setattr__(self, name: str, value) -> None:
        if isinstance(value, ModuleType) and (name in EXPORTS or name in HELPERS):
            value = getattr(value, name)
        super().__setattr__(name, value)

    def __dir__(self) -> list[str]:
        return sorted({*super().__dir__(), *EXPORTS, *HELPERS})


sys.modules[__name__].__class__ = OpsModule

# For type checkers and editors. tests/test_package.py says how this block follows from the tables.
if TYPE_CHECKING:
    from .accept_tokens import accept_tokens as accept_tokens
    from .adamw_8bit import adamw_8bit as adamw_8bit
    from .adamw_8bit import adamw_8bit_state as adamw_8bit_state
    from .attention import attention as attention
    from .attention_cells import attention_cells as attention_cells
    from .attention_decode import KVCache as KVCache
    from .attention_decode import attention_decode as attention_decode
    from .balance_bias import balance_bias_ as balance_bias_
    from .cross_entropy import cross_entropy as cross_entropy
    from .decode_inputs import decode_inputs as decode_inputs
    from .dispatch import Plan as Plan
    from .dispatch import dispatch as dispatch
    from .gemm_fp8 import gemm_fp8 as gemm_fp8
    from .grad_norm import grad_norm as grad_norm
    from .grouped_gemm import grouped_gemm as grouped_gemm
    from .grouped_gemm_fp8 import grouped_gemm_fp8 as grouped_gemm_fp8
    from .grouped_gemm_fp8 import grouped_gemm_fp8_masked as grouped_gemm_fp8_masked
    from .grouped_wgrad import grouped_wgrad as grouped_wgrad
    from .linear_cross_entropy import linear_cross_entropy as linear_cross_entropy
    from .moe import moe as moe
    from .moe_decode import moe_decode as moe_decode
    from .permute import permute as permute
    from .permute import permute_quantize as permute_quantize
    from .qk_norm_attention import qk_norm_attention as qk_norm_attention
    from .qk_norm_attention_decode import qk_norm_attention_decode as qk_norm_attention_decode
    from .qk_norm_rope import qk_norm_rope as qk_norm_rope
    from .quantize import dequantize as dequantize
    from .quantize import quantize as quantize
    from .quantize import quantize_weight as quantize_weight
    from .rms_norm import rms_norm as rms_norm
    from .rms_norm_linear import rms_norm_linear as rms_norm_linear
    from .rms_norm_router import rms_norm_router as rms_norm_router
    from .rope_tables import rope_tables as rope_tables
    from .route import route as route
    from .router_gemm import router_gemm as router_gemm
    from .sample import sample as sample
    from .swiglu import swiglu as swiglu
    from .swiglu import swiglu_backward as swiglu_backward
    from .transpose_fp8 import transpose_fp8 as transpose_fp8
    from .unpermute import unpermute as unpermute
