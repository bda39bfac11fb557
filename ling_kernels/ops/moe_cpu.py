"""The routed layer of a decode step on a CPU in fp32: `moe` without checks, gradients and a plan, in few calls.

With the few rows of a step the calls take longer than the arithmetic. The sums over a token's experts run in the order
of the experts, and `moe`'s in the order of the choices: the results differ by rounding.
"""

import torch
from torch import Tensor
from torch.nn.functional import grouped_mm, linear

from .route import best_experts, scores, weights_of
from .swiglu import silu_product


def moe_cpu(
    x: Tensor,
    router_w: Tensor,
    bias: Tensor,
    w_gate_up: Tensor,
    w_down: Tensor,
    shared: tuple[Tensor, Tensor] | None,
    num_groups: int,
    group_topk: int,
    topk: int,
    scale: float,
) -> Tensor:
    """y [T, H] of `moe` with these arguments, for T > 0."""
    s = scores(linear(x, router_w))
    experts = best_experts(s, bias, num_groups, group_topk, topk)
    weights = weights_of(s.gather(1, experts), scale).flatten()
    chosen, order = experts.flatten().sort(stable=True)
    token = order // topk  # of each row, expert by expert
    counts = torch.bincount(chosen, minlength=router_w.shape[0])
    used = [(e, n) for e, n in enumerate(counts.tolist()) if n]
    h = silu_product(products(x.index_select(0, token), w_gate_up, counts, used))
    y = products(h, w_down, counts, used).mul_(weights.index_select(0, order)[:, None])
    total = torch.zeros_like(x) if shared is None else linear(silu_product(linear(x, shared[0])), shared[1])
    return total.index_add_(0, token, y)


def products(a: Tensor, b: Tensor, counts: Tensor, used: list[tuple[int, int]]) -> Tensor:
    """a [S, K], b [E, N, K] -> [S, N]: the next counts[e] rows times b[e]; used: the experts with rows, and how many.

    grouped_mm calls a product for every expert, also for those without rows.
    """
    if 2 * len(used) > counts.shape[0]:
        return grouped_mm(a, b.mT, offs=counts.cumsum(0, dtype=torch.int32))
    parts = torch.split_with_sizes(a, [n for _, n in used])
    return torch.cat([linear(part, b[e]) for part, (e, _) in zip(parts, used, strict=True)])
