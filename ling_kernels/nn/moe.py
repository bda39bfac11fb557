"""The mixture-of-experts layer: sum over the chosen experts of weight * expert(x), plus the shared expert, not scaled.

    router -> exchange.dispatch -> experts -> exchange.combine

is the one data flow, for bf16 and FP8 experts, on one device (`Local`) or with an exchange over several.
"""

import torch
from torch import Tensor, nn

from ..op import expect, few_calls_on_cpu
from ..ops.moe_cpu import moe_cpu
from ..ops.moe_decode import ROWS, moe_decode
from .beside import beside
from .exchange import Exchange, Local
from .experts import Experts
from .mlp import MLP
from .norm import RMSNorm
from .router import Router


class MoE(nn.Module):
    """router and experts of E experts, a shared expert or None, and the exchange that brings rows to the experts."""

    def __init__(
        self, router: Router, experts: Experts, shared_experts: MLP | None, exchange: Exchange | None = None
    ):  # fmt: skip
        super().__init__()
        self.router, self.experts, self.shared_experts = router, experts, shared_experts
        self.exchange = Local() if exchange is None else exchange

    def __setattr__(self, name: str, value) -> None:
        if name == "exchange":  # wherever it is set: an incomplete one would fail in the first forward or decode step
            expect(isinstance(value, Exchange), "an exchange with `local`, `dispatch` and `combine`", value)
        super().__setattr__(name, value)

    def forward(
        self, x: Tensor, z_loss: float | None = None, experts: Tensor | None = None,
        record: tuple[Tensor, Tensor] | None = None,
    ) -> tuple[Tensor, Tensor | None]:  # fmt: skip
        """x [T, H] -> y [T, H] and the router's z-loss, None without a coefficient.

        experts [T, topk] int32 forces the choice of experts, as `route` does. record: a tensor [cells, topk] of
        integers, and the cells [T] in which the rows' choices are written.
        """
        weights, experts, counts, z = self.router(x, z_loss, experts)
        if record is not None:
            record[0][record[1]] = experts.to(record[0].dtype)
        shared = None  # rows that travel leave time for the shared expert
        if self.shared_experts is not None and not self.exchange.local:
            shared = beside(self.shared_experts, x)
        rows, plan, weights = self.exchange.dispatch(x, weights, experts, counts)
        y = self.exchange.combine(self.experts(rows, plan, weights), plan)
        if self.shared_experts is not None:
            y = y + (self.shared_experts(x) if shared is None else shared())
        return y, z

    def decode(self, x: Tensor, residual: Tensor | None = None, norm: RMSNorm | None = None) -> Tensor | None:
        """x, residual [T, H] -> s + forward(norm(s)), s = x + residual, by the op `moe_decode` or on a CPU `moe_cpu`;
        forward(x) without residual and norm.

        None if they cannot run: more than 8 rows (not on a CPU), gradients, an exchange that is not local, or modules
        replaced by subclasses or adapters. In FP8 too the routing weights are applied after down.
        """
        if torch.is_grad_enabled() or x.shape[0] == 0 or not self.exchange.local:
            return None
        if residual is not None and residual.dtype != x.dtype:
            return None
        parts = [self.experts] if self.shared_experts is None else [self.experts, self.shared_experts]
        weights = [m.decode_weights() if isinstance(m, (Experts, MLP)) else None for m in parts]
        if None in weights:
            return None
        router, shared = self.router, weights[1] if len(weights) > 1 else None
        args = router.weight, router.expert_bias, *weights[0], shared
        if few_calls_on_cpu(x, router.weight, *weights[0], *(shared or ())):
            h, s = (x, residual) if norm is None else norm(x, residual)
            y = moe_cpu(h, *args, **router.limits)
            return y if s is None else s + y
        if x.shape[0] > ROWS:
            return None
        normed = {} if norm is None else dict(norm=norm.weight, eps=norm.eps)
        return moe_decode(x, *args, **router.limits, residual=residual, **normed)
