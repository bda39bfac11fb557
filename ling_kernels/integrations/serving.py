"""What the plugins of serving engines share: block-FP8 experts and the group-limited router, over the engines' tensors.

The engines have Ling's own layouts: w13 [E, 2F, H], the gate's rows first, w2 [E, H, F], scales of 128 x 128 blocks.
"""

import importlib.util
from collections.abc import Callable

import torch
from torch import Tensor

from ..errors import warn
from ..ops.dispatch import counts_here, dispatch
from ..ops.moe import expert_mlp
from ..ops.route import route

NAME = "ling_kernels"  # of our backend in an engine


def plug_in(engine: str, versions: str, connect: Callable[[], None]) -> None:
    """connect() where the engine is installed. An engine of another version gets a warning and none of our parts, as a
    plugin must not stop a server."""
    if importlib.util.find_spec(engine) is None:
        return
    try:
        connect()
    except (ImportError, AttributeError) as error:
        warn(f"ling_kernels was written for {engine} {versions}; this one differs ({error}), so it runs without us")


def fp8_experts(
    x: Tensor, w13: Tensor, w13_scale: Tensor, w2: Tensor, w2_scale: Tensor, weights: Tensor, experts: Tensor
) -> Tensor:
    """x [T, H] through experts [T, topk] of the E here, weighted by weights [T, topk] -> [T, H] in x's dtype.

    Numbers outside 0..E-1 are of experts elsewhere: no row is read for them. Rows of x are quantised in 1 x 128 blocks.
    """
    here = torch.where(experts < len(w13), experts, -1).clamp(min=-1).int()
    plan = dispatch(here, counts_here(here, len(w13)))
    return expert_mlp(x, plan, weights.float(), (w13, w13_scale), (w2, w2_scale))


def grouped_topk(
    logits: Tensor, bias: Tensor, topk: int, num_groups: int, group_topk: int, scale: float
) -> tuple[Tensor, Tensor]:
    """Sigmoid scores, normalised weights: logits [T, E] -> weights [T, topk] fp32 times scale, experts [T, topk]."""
    return route(logits.float(), bias.float(), None, num_groups, group_topk, topk, scale)[:2]
