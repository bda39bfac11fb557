"""The mixture-of-experts layer: sum over the chosen experts of weight * expert(x), plus the shared expert, not scaled.

Where an expert lives is the exchange's business: `Local` keeps all of them here, ling_kernels.parallel brings others.
The routing weight is applied after the down projection, in fp32, as the official model does at inference.
"""

import torch
from torch import Tensor, nn

from ..ops.dispatch import Plan, dispatch
from ..ops.moe import Weight
from ..ops.moe_decode import ROWS, moe_decode
from ..ops.permute import permute
from ..ops.unpermute import unpermute
from .experts import Experts
from .fp8 import Fp8Experts
from .mlp import MLP
from .norm import RMSNorm
from .router import Router


class Local:
    """Every expert is on this device."""

    def dispatch(self, x: Tensor, experts: Tensor, counts: Tensor) -> tuple[Tensor, Plan]:
        """x [T, H] -> rows [S, H] sorted by expert, and the plan that `combine` needs."""
        plan = dispatch(experts, counts)
        return permute(x, plan), plan

    def combine(self, y: Tensor, plan: Plan, weights: Tensor) -> Tensor:
        """y [S, H], weights [T, topk] -> [T, H]."""
        return unpermute(y, plan, weights)


class MoE(nn.Module):
    def __init__(self, router: Router, experts: Experts, shared_experts: MLP | None, exchange=None):
        super().__init__()
        self.router, self.experts, self.shared_experts = router, experts, shared_experts
        self.exchange = exchange or Local()

    def forward(self, x: Tensor, z_loss: float | None = None) -> tuple[Tensor, Tensor | None]:
        """x [T, H] -> y [T, H] and the router's z-loss, None without a coefficient."""
        weights, experts, counts, z = self.router(x, z_loss)
        if isinstance(self.experts, Fp8Experts):  # every expert is here; the weight goes into SwiGLU
            y = self.experts(x, dispatch(experts, counts), weights)
        else:
            rows, plan = self.exchange.dispatch(x, experts, counts)
            y = self.exchange.combine(self.experts(rows, plan.offsets), plan, weights)
        if self.shared_experts is not None:
            y = y + self.shared_experts(x)
        return y, z

    def decodes(self, x: Tensor, residual: Tensor) -> bool:
        """Whether `decode` may take the place of the norm, of forward and of the sum: for few rows and no gradient."""
        if torch.is_grad_enabled() or not 0 < len(x) <= ROWS or type(self.exchange) is not Local:
            return False
        pow2 = any(hasattr(m, "fp8") and m.fp8.pow2 for m in (self.experts, self.shared_experts))
        return not pow2 and x.dtype == residual.dtype

    def decode(self, x: Tensor, residual: Tensor, norm: RMSNorm) -> Tensor:
        """x, residual [T <= 8, H] -> s + forward(norm(s)), s = x + residual; in FP8 too the weights come after down."""
        router, shared = self.router, self.shared_experts
        return moe_decode(
            x, router.weight, router.expert_bias, *operands_of(self.experts),
            None if shared is None else operands_of(shared), **router.limits,
            residual=residual, norm=norm.weight, eps=norm.eps,
        )  # fmt: skip


def operands_of(module: Experts | MLP) -> tuple[Weight, Weight]:
    """gate_up and down, as they are or, of an FP8 module, with their scales."""
    dense = isinstance(module, MLP)
    w = (module.gate_up.weight, module.down.weight) if dense else (module.gate_up, module.down)
    return tuple(module.fp8.quantized(*w)) if hasattr(module, "fp8") else w
