"""Where the experts of an MoE layer live: an exchange sends rows to their experts' devices and brings results back."""

from typing import Protocol, runtime_checkable

from torch import Tensor

from ..ops.dispatch import Plan, dispatch


@runtime_checkable
class Exchange(Protocol):
    """What `MoE` asks of an exchange. Shapes: T tokens here, R rows received here (T where all experts are local).

    local: every expert is on this device, so that a decode step may run as one kernel (`moe_decode`).
    """

    local: bool

    def dispatch(
        self, x: Tensor, weights: Tensor, experts: Tensor, counts: Tensor
    ) -> tuple[Tensor, Plan, Tensor | None]:
        """x [T, H], weights and experts [T, topk], counts [E] -> rows [R, H], a plan of them, their weights [R, k].

        An exchange over several devices returns a plan with one choice for each row, topk = 1. It returns weights=None
        if it applies the routing weights itself in `combine`, in fp32, after the down projection.
        """
        ...

    def combine(self, y: Tensor, plan: Plan) -> Tensor:
        """y [R, H], the experts' results for the rows of that plan -> [T, H], summed over a token's experts."""
        ...


class Local:
    """Every expert is on this device: rows stay as they are, and the experts permute and sum them."""

    local = True

    def dispatch(self, x: Tensor, weights: Tensor, experts: Tensor, counts: Tensor) -> tuple[Tensor, Plan, Tensor]:
        return x, dispatch(experts, counts), weights

    def combine(self, y: Tensor, plan: Plan) -> Tensor:
        return y
