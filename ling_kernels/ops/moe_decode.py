"""The routed layer for the 1 to 8 rows of a decode step, with the norm before it and the residual that it ends with.

    s = x + residual,  y = s + moe(rms_norm(s, norm))

The composition of `rms_norm` and `moe` is its definition, and runs without csrc/. csrc/ needs two launches, both bound
by reading weights: (1) norm and logits, (2) the rest. Sums stay fp32 until y is rounded; only operands that the
definition quantises are quantised, to the same values.
"""

import functools

import torch
from torch import Tensor

from .. import backend as backends
from ..op import E4M3, expect, op, use_cuda
from .moe import Weight, moe
from .quantize import BLOCK
from .rms_norm import rms_norm
from .rms_norm_router import rms_norm_router
from .route import unsupported_size
from .router_gemm import router_gemm

ROWS = 8


def moe_decode(
    x: Tensor,
    router_w: Tensor,
    bias: Tensor,
    w_gate_up: Weight,
    w_down: Weight,
    shared: tuple[Weight, Weight] | None = None,
    num_groups: int = 1,
    group_topk: int = 1,
    topk: int = 8,
    scale: float = 1.0,
    residual: Tensor | None = None,
    norm: Tensor | None = None,
    eps: float = 1e-6,
) -> Tensor:
    """`moe` for the 1 to 8 rows of a decode step: x [T, H] -> y [T, H] in x's dtype. Not differentiable.

    residual [T, H] of x's dtype is added to the result. norm [H] is the weight of an RMSNorm before the layer: then
    s = x + residual (x without one) is normed, and the layer's result is added to s.
    Raises ValueError for operands that do not fit.
    """
    expect(x.ndim == 2 and 1 <= len(x) <= ROWS, "x [1..8, H]", x)
    fits = residual is None or (residual.shape == x.shape and residual.dtype == x.dtype)
    expect(fits, "residual as x", x, residual)
    expect(norm is None or norm.shape == x.shape[1:], "norm [H]", norm, x)
    routing = num_groups, group_topk, topk, scale
    with torch.no_grad():
        if backends.backend(x) == "cuda" and use_cuda(
            "moe_decode", unsupported(x, router_w, bias, w_gate_up, w_down, shared, *routing[:3])
        ):
            return decode_cuda(x, router_w, bias, w_gate_up, w_down, shared, routing, residual, norm, eps)
        s = residual
        if norm is not None:
            h = rms_norm(x, norm, residual, eps)
            x, s = h if residual is not None else (h, x)
        y = moe(x, router_w, bias, w_gate_up, w_down, shared, None, *routing)[0]
        return y if s is None else s + y


def unsupported(x, router_w, bias, w_gate_up, w_down, shared, num_groups, group_topk, topk) -> str | None:
    fp8 = isinstance(w_gate_up, tuple)
    pairs = [(w_gate_up, w_down), *([] if shared is None else [shared])]
    if any(isinstance(w, tuple) != fp8 for pair in pairs for w in pair):
        return "FP8 beside bf16 weights"
    weights = [(gate_up[0], down[0]) if fp8 else (gate_up, down) for gate_up, down in pairs]
    dtype, (T, H) = E4M3 if fp8 else torch.bfloat16, x.shape
    E, F, Fs = len(router_w), weights[0][1].shape[-1], weights[-1][1].shape[-1] if shared else 0
    shapes = [((E, 2 * F, H), (E, H, F)), ((2 * Fs, H), (H, Fs))]
    dense = all(
        w.shape == shape and w.dtype == dtype and w.is_contiguous()
        for pair, shapes_of in zip(weights, shapes, strict=False)
        for w, shape in zip(pair, shapes_of, strict=True)
    )
    scales = all(w[1].is_contiguous() and w[1].dtype == torch.float32 for pair in pairs for w in pair) if fp8 else True
    if x.dtype != torch.bfloat16 or bias.dtype != torch.float32 or bias.shape != (E,):
        return "x that is not bf16, or a bias that is not [E] fp32"
    if not dense or not scales:
        return "weights that are strided, of other shapes than bf16 [E, 2F, H] and [E, H, F], or of other scales"
    if H % BLOCK or F % BLOCK or Fs % BLOCK:
        return "H or F that 128 does not divide"
    if size := unsupported_size(E, num_groups, group_topk, topk):
        return size
    if not fits_shared_memory(T, H, F, Fs, topk, fp8):
        return f"{T} rows of h, {topk} x {F} + {Fs} wide, in a block's shared memory"
    return None


@functools.cache
def fits_shared_memory(T: int, H: int, F: int, Fs: int, topk: int, fp8: bool) -> bool:
    """Whether a block has the shared memory for all rows of h: not for 8 of the widest models' in bf16.

    Without csrc/, as for a question about another machine, it is taken to fit.
    """
    return backends._C is None or backends._C.moe_decode_fits(T, H, F, Fs, topk, fp8)


# torch.compile takes the answer and does not look inside
fits_shared_memory._dynamo_marked_constant = True  # type: ignore[attr-defined]


def decode_cuda(x, router_w, bias, w_gate_up, w_down, shared, routing, residual, norm, eps) -> Tensor:
    if norm is None:
        logits = router_gemm(x, router_w)
    else:
        x, residual, logits = rms_norm_router(x, norm, router_w, residual, eps)
    pairs = [w if isinstance(w, tuple) else (w, None) for w in (w_gate_up, w_down, *(shared or ()))]
    weights = [t for pair in pairs for t in pair] + [None] * (0 if shared else 4)
    columns = routing[2] * w_columns(w_down) + (w_columns(shared[1]) if shared else 0)
    h, y = logits.new_empty(len(x) * columns), x.new_empty(x.shape)
    residual = residual if residual is None else residual.contiguous()
    moe_decode_fwd(x.contiguous(), logits, bias.contiguous(), *weights, residual, h, y, *routing)
    return y


def w_columns(w: Weight) -> int:
    return (w[0] if isinstance(w, tuple) else w).shape[-1]


@op("h", "y", runs="cuda")
def moe_decode_fwd(
    x: Tensor,
    logits: Tensor,
    bias: Tensor,
    w_gate_up: Tensor,
    gate_up_scale: Tensor | None,
    w_down: Tensor,
    down_scale: Tensor | None,
    shared_gate_up: Tensor | None,
    shared_gate_up_scale: Tensor | None,
    shared_down: Tensor | None,
    shared_down_scale: Tensor | None,
    residual: Tensor | None,
    h: Tensor,
    y: Tensor,
    num_groups: int,
    group_topk: int,
    topk: int,
    scale: float,
) -> None:
    """h [T (topk F + Fs)] fp32 is scratch for the results of SwiGLU, between the two halves of the launch."""
    x, logits, bias, w_gate_up, w_down, shared_gate_up, shared_down = map(
        aligned_copy, (x, logits, bias, w_gate_up, w_down, shared_gate_up, shared_down)
    )
    backends._C.moe_decode_fwd(
        x, logits, bias, w_gate_up, gate_up_scale, w_down, down_scale, shared_gate_up, shared_gate_up_scale,
        shared_down, shared_down_scale, residual, h, y, num_groups, group_topk, topk, scale,
    )  # fmt: skip


def aligned_copy(t: Tensor | None) -> Tensor | None:
    """t, or a copy that starts at a multiple of 16 bytes where t does not."""
    return t if t is None or t.data_ptr() % 16 == 0 else t.clone()
