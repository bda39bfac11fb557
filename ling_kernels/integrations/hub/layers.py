"""Layers for `kernelize` of the package `kernels`: each replaces the forward of a module of the user's.

They have no state and no constructor. The annotations say which members a module must have. On a CPU the torch
references run.
"""

import torch
from torch import Tensor, nn

from ...ops.dispatch import Plan, counts_here, dispatch
from ...ops.moe import expert_mlp
from ...ops.permute import permute
from ...ops.quantize import quantize
from ...ops.rms_norm import rms_norm
from ...ops.route import route
from ...ops.router_gemm import router_gemm
from ...ops.swiglu import swiglu


class RMSNorm(nn.Module):
    """hidden_states [..., N] -> normed, computed in fp32 and rounded once."""

    can_torch_compile: bool = True
    weight: Tensor  # [N]
    variance_epsilon: float

    def forward(self, hidden_states: Tensor) -> Tensor:
        return rms_norm(hidden_states, self.weight, eps=self.variance_epsilon)


class Router(nn.Module):
    """hidden_states [..., H] -> topk_idx [T, top_k] int64, topk_weight [T, top_k] fp32, logits [T, E] fp32.

    The gate of the published Ling-2.0 code: group-limited, sigmoid, with a bias that selects and does not weigh.
    """

    can_torch_compile: bool = True
    weight: Tensor  # [E, H]
    expert_bias: Tensor  # [E]
    n_group: int
    topk_group: int
    top_k: int
    routed_scaling_factor: float

    def forward(self, hidden_states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        logits = router_gemm(hidden_states.flatten(0, -2), self.weight)
        bias, scale = self.expert_bias.float(), self.routed_scaling_factor
        weights, experts, _ = route(logits, bias, None, self.n_group, self.topk_group, self.top_k, scale)
        return experts.long(), weights, logits


class Experts(nn.Module):
    """hidden_states [..., H], top_k_index and top_k_weights [.., top_k] -> [..., H], as the experts of transformers 5.

    An index that is not in 0..E-1 stands for an expert on another device: it adds nothing, and no row of it is read.
    """

    can_torch_compile: bool = True
    gate_up_proj: Tensor  # [E, 2F, H], the gate's rows first
    down_proj: Tensor  # [E, H, F]

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        x, topk = hidden_states.flatten(0, -2), top_k_index.shape[-1]
        plan = plan_of(top_k_index.reshape(-1, topk), len(self.gate_up_proj))
        y = expert_mlp(x, plan, top_k_weights.reshape(-1, topk).float(), self.gate_up_proj, self.down_proj)
        return y.view_as(hidden_states)


class Permute(nn.Module):
    """x [T, H], experts [T, topk] of num_experts -> the rows of every choice sorted by expert, and their plan."""

    can_torch_compile: bool = True

    def forward(self, x: Tensor, experts: Tensor, num_experts: int) -> tuple[Tensor, Plan]:
        plan = plan_of(experts, num_experts)
        return permute(x, plan), plan


class SiluAndMul(nn.Module):
    """x [..., 2F], the gate's half first -> silu(gate) * up [..., F]."""

    can_torch_compile: bool = True

    def forward(self, x: Tensor) -> Tensor:
        return swiglu(x)


class Quantize(nn.Module):
    """x [M, K], K % 128 == 0 -> e4m3 [M, K], and a scale per 1 x 128, [M, K/128] fp32."""

    can_torch_compile: bool = True
    has_backward: bool = False

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return quantize(x)


def plan_of(experts: Tensor, num_experts: int) -> Plan:
    """The dispatch plan of experts [T, topk]; indices outside 0..num_experts-1 are routed nowhere."""
    here = torch.where((experts >= 0) & (experts < num_experts), experts, -1).int()
    return dispatch(here, counts_here(here, num_experts))
