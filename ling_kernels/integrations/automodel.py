"""The experts of NeMo Automodel's models, where their `backend.experts` is torch_mm: grouped GEMMs and SwiGLU.

    import ling_kernels.integrations.automodel as ling_automodel
    ling_automodel.patch()

Automodel has no registry of backends. `patch` replaces the one function, a private one, that its GroupedExperts and
GroupedExpertsDeepEP call for torch_mm; `unpatch` puts it back. MXFP8, other activations than SwiGLU and experts with
biases compute as before.
"""

from typing import Any

import torch
from torch import Tensor

from ..ops.dispatch import exclusive_sum
from ..ops.grouped_gemm import grouped_gemm
from ..ops.swiglu import swiglu
from .versions import require

_experts = require("nemo_automodel.components.moe.experts", "nemo-automodel", ">=0.7,<0.8")
_NAME = "_torch_mm_experts_fwd"
_before = getattr(_experts, _NAME)


def patch() -> None:
    """From now on torch_mm computes with our ops, in models that exist already too."""
    setattr(_experts, _NAME, experts_forward)


def unpatch() -> None:
    setattr(_experts, _NAME, _before)


def experts_forward(
    hidden_states: Tensor,
    gate_and_up_projs: Tensor,
    down_projs: Tensor,
    tokens_per_expert: Tensor,
    permuted_probs: Tensor,
    activation_fn: Any,
    use_mxfp8: bool = False,
) -> Tensor:
    """Rows [R, H] sorted by expert, weights [E, H, 2F] and [E, F, H], numbers of rows [E], routing weights [R, 1],
    which are applied before the down projection -> [R, H]."""
    if use_mxfp8 or activation_fn is not _experts.weighted_bias_swiglu_impl:
        return _before(
            hidden_states, gate_and_up_projs, down_projs, tokens_per_expert, permuted_probs, activation_fn, use_mxfp8
        )
    offsets = exclusive_sum(tokens_per_expert.to(hidden_states.device, torch.int32))
    h = grouped_gemm(hidden_states, gate_and_up_projs.mT, offsets)
    return grouped_gemm(swiglu(h, permuted_probs.flatten().float()), down_projs.mT, offsets)
