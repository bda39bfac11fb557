"""Overrides of torchtitan's MoE layers and RMSNorm: one function each, for --override.imports.

    --override.imports ling_kernels.integrations.torchtitan.experts,ling_kernels.integrations.torchtitan.router

Parameters keep their names and shapes, so checkpoints are torchtitan's. Only torchtitan's own classes are replaced, no
subclasses. A module that gets a DTensor, as with tensor parallelism, computes as before and warns.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..errors import InputError, warn
from ..ops.dispatch import Plan, dispatch, exclusive_sum
from ..ops.grouped_gemm import grouped_gemm
from ..ops.permute import permute
from ..ops.rms_norm import rms_norm
from ..ops.route import route
from ..ops.swiglu import swiglu
from ..ops.unpermute import unpermute
from .versions import require

require("torchtitan", "torchtitan", ">=0.3,<0.4")

from torch.distributed.tensor import DTensor  # noqa: E402
from torchtitan.config import derive, override  # noqa: E402
from torchtitan.models.common.moe import GroupedExperts, TokenChoiceTopKRouter  # noqa: E402
from torchtitan.models.common.nn_modules import RMSNorm  # noqa: E402
from torchtitan.models.common.token_dispatcher import AllToAllTokenDispatcher  # noqa: E402


class Experts(GroupedExperts):
    """One grouped GEMM for each of the three weights, in bf16 as in torchtitan, and a fused SwiGLU in fp32."""

    @dataclass(kw_only=True, slots=True)
    class Config(GroupedExperts.Config):
        pass

    def forward(self, x_RD: Tensor, num_tokens_per_expert_E: Tensor) -> Tensor:
        """x_RD [R, D] sorted by expert and the experts' numbers of rows [E] -> [R, D]."""
        weights = (self.w1_EFD, self.w3_EFD, self.w2_EDF)
        gate, up, down = ((w.to_local() if isinstance(w, DTensor) else w).bfloat16() for w in weights)
        offsets = exclusive_sum(num_tokens_per_expert_E.to(torch.int32))
        x = x_RD.bfloat16()
        h = swiglu(torch.cat([grouped_gemm(x, gate, offsets), grouped_gemm(x, up, offsets)], -1))
        return grouped_gemm(h, down, offsets).type_as(x_RD)


class Router(TokenChoiceTopKRouter):
    """The gate is torchtitan's; scores, groups, selection and weights are one kernel."""

    @dataclass(kw_only=True, slots=True)
    class Config(TokenChoiceTopKRouter.Config):
        pass

    def forward(self, x_BLD: Tensor, expert_bias_E: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """x_BLD [B, L, D] -> weights [B, L, K] fp32, experts [B, L, K] int64 in descending order, scores [B, L, E]."""
        if isinstance(x_BLD, DTensor):
            warn("ling_kernels: the router gets a DTensor; torchtitan's own runs")
            return super().forward(x_BLD, expert_bias_E)
        with torch.autocast(device_type=x_BLD.device.type, dtype=torch.float32):
            logits = self.gate(x_BLD).float()
        rows = logits.flatten(0, -2)
        bias = rows.new_zeros(self.num_experts) if expert_bias_E is None else expert_bias_E.float()
        groups = self.num_expert_groups or 1
        kept = self.num_limited_groups if self.num_expert_groups else 1
        weights, experts, _ = route(rows, bias, None, groups, kept, self.top_k, self.route_scale)
        shape = *x_BLD.shape[:-1], self.top_k
        return weights.view(shape), experts.long().view(shape), logits.sigmoid()


class Dispatcher(AllToAllTokenDispatcher):
    """Without expert parallelism: the sort by expert, and a deterministic sum of each token's rows in fp32."""

    @dataclass(kw_only=True, slots=True)
    class Config(AllToAllTokenDispatcher.Config):
        pass

    def dispatch(
        self,
        x_TD: Tensor,
        topk_scores_TK: Tensor,
        topk_expert_ids_TK: Tensor,
        num_local_tokens_per_expert_E: Tensor,
    ) -> tuple[Tensor, Tensor, Any]:
        if self.ep_mesh is not None:
            return super().dispatch(x_TD, topk_scores_TK, topk_expert_ids_TK, num_local_tokens_per_expert_E)
        plan = dispatch(topk_expert_ids_TK.to(torch.int32), num_local_tokens_per_expert_E.to(torch.int32))
        return permute(x_TD, plan), num_local_tokens_per_expert_E, (plan, topk_scores_TK.float())

    def combine(self, routed_output_RD: Tensor, metadata: Any, x_TD: Tensor) -> Tensor:
        if self.ep_mesh is not None:
            return super().combine(routed_output_RD, metadata, x_TD)
        plan, scores = metadata
        return unpermute(routed_output_RD, Plan(*plan), scores).type_as(x_TD)


class Norm(RMSNorm):
    """Reductions in fp32, whatever the dtype of the input."""

    @dataclass(kw_only=True, slots=True)
    class Config(RMSNorm.Config):
        pass

    def forward(self, x: Tensor) -> Tensor:
        """x [..., N] -> y [..., N] in x's dtype."""
        if isinstance(x, DTensor) or isinstance(self.weight, DTensor):
            warn("ling_kernels: RMSNorm gets a DTensor; torch's own runs")
            return super().forward(x)
        return rms_norm(x, self.weight, eps=self.eps)


@override(target=GroupedExperts.Config, description="ling_kernels: grouped GEMMs and SwiGLU of experts", exact=True)
def experts(cfg: Any) -> Any:
    return derive(cfg, Experts.Config)


@override(target=TokenChoiceTopKRouter.Config, description="ling_kernels: group-limited routing", exact=True)
def router(cfg: Any) -> Any:
    """Raises InputError for a router with another formula than `route`."""
    wrong = [
        f"{name} {getattr(cfg, name)!r}"
        for name, right in (("score_func", "sigmoid"), ("route_norm", True), ("_debug_force_load_balance", False))
        if getattr(cfg, name) != right
    ]
    wrong += ["top_k 1"] * (cfg.top_k == 1)
    if cfg.num_expert_groups and cfg.num_limited_groups is None:
        wrong.append("groups without num_limited_groups")
    if wrong:
        raise InputError(f"ling_kernels has no router with {', '.join(wrong)}; leave out the override `router`")
    return derive(cfg, Router.Config)


@override(target=AllToAllTokenDispatcher.Config, description="ling_kernels: sorts and sums of tokens", exact=True)
def dispatcher(cfg: Any) -> Any:
    return derive(cfg, Dispatcher.Config)


@override(target=RMSNorm.Config, description="ling_kernels: RMSNorm", exact=True)
def norm(cfg: Any) -> Any:
    """Raises InputError for a norm without weights."""
    if not cfg.elementwise_affine:
        raise InputError("ling_kernels has no RMSNorm without weights; leave out the override `norm`")
    return derive(cfg, Norm.Config)
