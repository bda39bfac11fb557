"""The routed feed-forward layer: every token through the topk experts that its router chose, plus the shared expert.

y = sum over k of weight[k] * expert_k(x) + shared(x), expert(x) = down(silu(gate(x)) * up(x)).
The composition below is the definition on every backend: its parts have their references and their kernels.
"""

from functools import partial
from typing import TypeAlias

import torch
from torch import Tensor

from ..op import E4M3, autocast, expect
from .dispatch import Plan, dispatch, expect_plan
from .gemm_fp8 import gemm_fp8
from .grouped_gemm import grouped_gemm
from .grouped_gemm_fp8 import grouped_gemm_fp8
from .permute import permute
from .quantize import quantize
from .route import route
from .router_gemm import router_gemm
from .swiglu import swiglu
from .unpermute import unpermute

Weight: TypeAlias = Tensor | tuple[Tensor, Tensor]  # as it is, or e4m3 with one scale per 128 x 128


def moe(
    x: Tensor,
    router_w: Tensor,
    bias: Tensor,
    w_gate_up: Weight,
    w_down: Weight,
    shared: tuple[Weight, Weight] | None = None,
    mask: Tensor | None = None,
    num_groups: int = 1,
    group_topk: int = 1,
    topk: int = 8,
    scale: float = 1.0,
    z_loss: float | None = None,
    experts: Tensor | None = None,
) -> tuple[Tensor, ...]:
    """x [T, H], router_w [E, H], bias [E] fp32, w_gate_up [E, 2F, H], w_down [E, H, F] -> y [T, H], counts [E] int32.

    shared is (w_gate_up [2Fs, H], w_down [H, Fs]) of the shared expert, which no weight scales. mask [T] bool: False
    for padding, which router and experts do not read; the shared expert does. z_loss, a coefficient, appends that loss.
    experts [T, topk] int32 forces the choice of experts. The routing arguments are `route`'s. The routing weights are
    applied after the down projection, in fp32, as in the official inference code.
    A weight may be FP8, a pair (w_q, w_scale) as `quantize_weight` returns it; it gets no gradient and passes none on.
    SwiGLU of the fp32 gate_up product is quantised for the down product.
    Otherwise gradients go to x, router_w and all weights. Raises ValueError for operands that do not fit, and where x
    wants a gradient through FP8 experts.
    """
    E, H = router_w.shape if router_w.ndim == 2 else (0, 0)
    expect(x.ndim == 2 and x.shape[1] == H and E > 0 and x.dtype != E4M3, "x [T, H] and router_w [E, H]", x, router_w)
    fp8 = isinstance(w_gate_up, tuple)
    expect(fp8 == isinstance(w_down, tuple), "both expert weights FP8 or neither", type(w_gate_up), type(w_down))
    gate_up, down = (w[0] if isinstance(w, tuple) else w for w in (w_gate_up, w_down))
    fits = gate_up.ndim == down.ndim == 3 and gate_up.shape == (E, 2 * down.shape[2], H) and down.shape[:2] == (E, H)
    expect(fits, "w_gate_up [E, 2F, H] and w_down [E, H, F]", gate_up, down, router_w)
    expect(not (fp8 and torch.is_grad_enabled() and x.requires_grad), "no gradient to x where weights are FP8", x)

    expect(mask is None or (mask.shape == x.shape[:1] and mask.dtype == torch.bool), "mask [T] bool", mask, x)
    weights, experts, counts, *z = route(
        router_gemm(routed_rows(x, experts, mask), router_w),
        bias,
        mask,
        num_groups,
        group_topk,
        topk,
        scale,
        z_loss,
        experts,
    )
    (x,) = autocast(x)
    y = expert_mlp(x, dispatch(experts, counts), weights, w_gate_up, w_down)
    if shared is not None:
        expect_shared(x, *shared)
        y = y + linear(swiglu(linear(x, shared[0])), shared[1])
    return y, counts, *z


def expect_shared(x: Tensor, *shared: Weight) -> None:
    """Check the weights of a shared expert for x [T, H]."""
    gate_up, down = (w[0] if isinstance(w, tuple) else w for w in shared)
    fits = gate_up.ndim == down.ndim == 2 and (len(down), 2 * down.shape[1]) == (x.shape[1], len(gate_up))
    expect(fits and gate_up.shape[1] == len(down), "shared weights [2Fs, H] and [H, Fs]", gate_up, down, x)
    dtypes = torch.is_autocast_enabled(x.device.type) or all(isinstance(w, tuple) or w.dtype == x.dtype for w in shared)
    expect(dtypes, "shared weights in FP8 or in x's dtype", gate_up, down, x)


def routed_rows(x: Tensor, experts: Tensor | None, mask: Tensor | None = None) -> Tensor:
    """x [T, H] for the router, with 0 in rows that are masked or whose forced experts are -1.

    There the router's gradient is 0, and 0 * NaN would be NaN.
    """
    if experts is not None:
        expect(experts.ndim == 2 and len(experts) == len(x), "experts [T, topk] int32", experts, x)
        mask = experts[:, 0] >= 0 if mask is None else mask & (experts[:, 0] >= 0)
    return x if mask is None else x.masked_fill(~mask[:, None], 0)


def expert_mlp(
    x: Tensor, plan: Plan, weights: Tensor | None, w_gate_up: Weight, w_down: Weight, fold_weights: bool = False
) -> Tensor:
    """Every token through its experts: x [T, H], a plan of T tokens, weights [T, topk] fp32 or None (all 1) -> [T, H].

    w_gate_up [E, 2F, H] and w_down [E, H, F], as `moe` takes them. fold_weights=False applies the routing weights after
    the down projection, in fp32; True folds them into SwiGLU, as the official training code does. They differ by
    rounding. Gradients as `moe`'s.
    """
    expect_plan(plan, T=len(x))
    fits = weights is None or (weights.shape == plan.slot.shape and weights.dtype in (torch.float32, torch.float64))
    expect(fits, "weights [T, topk] fp32", weights, plan.slot)
    folded = weights_of_rows(weights, plan) if fold_weights else None
    if isinstance(w_gate_up, tuple):
        # The GEMM gathers its rows of x. Without folded weights it writes only the quantised SwiGLU.
        x_q, x_scale = quantize(x)
        product = partial(grouped_gemm_fp8, x_q, x_scale, w_gate_up[0], w_gate_up[1], plan.offsets, plan)
        h = product(swiglu=True) if folded is None else swiglu(product(dtype=x.dtype), folded, True, plan=plan)
        h = grouped_gemm_fp8(h[0], h[1], w_down[0], w_down[1], plan.offsets, dtype=x.dtype)
    else:
        h = grouped_gemm(permute(x, plan), w_gate_up, plan.offsets)
        h = grouped_gemm(swiglu(h, folded, plan=plan), w_down, plan.offsets)
    return unpermute(h, plan, None if fold_weights else weights)


def weights_of_rows(weights: Tensor | None, plan: Plan) -> Tensor | None:
    """weights [T, topk] in the order of the plan's rows, [S], with their gradient."""
    if weights is None:
        return None
    # a choice not routed here has no gradient, whatever its row holds
    return weights.masked_fill(plan.slot < 0, 0).flatten()[plan.source.long()]


def linear(x: Tensor, w: Weight) -> Tensor:
    """x w^T, in FP8 where w is."""
    if isinstance(w, tuple):
        return gemm_fp8(*quantize(x), *w, dtype=x.dtype)
    return torch.nn.functional.linear(x, w)
