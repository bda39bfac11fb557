"""SwiGLU: y = silu(gate) * up for x = [gate | up], optionally times one weight per row (the routing probability)."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..backend import backend
from ..op import expect, op, wide
from .dispatch import Plan
from .quantize import BLOCK, quantize_ref


def swiglu(
    x: Tensor,
    weights: Tensor | None = None,
    quantize: bool = False,
    columns: bool = False,
    plan: Plan | None = None,
    pow2: bool = False,
) -> Tensor | tuple[Tensor, ...]:
    """x [..., 2F] -> y [..., F] in x's dtype, computed in fp32. With weights [S] fp32, x is [S, 2F] and y[s] is scaled.

    quantize returns, instead of y, its FP8 rows and scales, y_q [S, F] and y_scale [S, F/128], and with columns also
    its column-wise copy, as `quantize` lays them out for that plan, all taken from y before it is rounded; x must be
    [S, 2F] with F % 128 == 0. Gradients: of y, to x and weights; FP8 carries none. Raises ValueError for another shape.
    """
    expect(x.ndim >= 1 and x.shape[-1] % 2 == 0 and x.is_floating_point(), "x [..., 2F]", x)
    fits = weights is None or (x.ndim == 2 and weights.shape == x.shape[:1])
    expect(fits and (weights is None or weights.dtype in (torch.float32, torch.float64)),
           "weights [S] fp32 for x [S, 2F]", x, weights)  # fmt: skip
    expect(not quantize or (x.ndim == 2 and x.shape[1] % (2 * BLOCK) == 0), "x [S, 2F], F % 128 == 0, for FP8", x)
    expect(quantize or not (columns or pow2), "quantize=True with columns or pow2", quantize, columns, pow2)
    if backend(x) == "torch" or weights is not None or quantize:
        return swiglu_ref(x, weights, quantize, columns, plan, pow2)
    return SwiGLU.apply(x.reshape(-1, x.shape[-1])).view(*x.shape[:-1], x.shape[-1] // 2)


def swiglu_ref(x, weights=None, quantize=False, columns=False, plan=None, pow2=False):
    gate, up = wide(x).chunk(2, -1)
    y = torch.nn.functional.silu(gate) * up
    if weights is not None:
        y = y * weights[:, None]
    return quantize_ref(y, True, columns, plan, pow2) if quantize else y.to(x.dtype)


class SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        x = x.contiguous()
        y = x.new_empty(len(x), x.shape[1] // 2)
        swiglu_fwd(x, y)
        ctx.save_for_backward(x)
        return y

    @staticmethod
    def backward(ctx, dy):
        (x,) = ctx.saved_tensors
        dx = torch.empty_like(x)
        swiglu_bwd(dy.contiguous(), x, dx)
        return dx


@op("y")
def swiglu_fwd(x: Tensor, y: Tensor) -> None:
    S, F = y.shape
    if y.numel():
        swiglu_fwd_kernel[(S, triton.cdiv(F, BLOCK))](x, y, F, BLOCK_F=BLOCK)


@op("dx")
def swiglu_bwd(dy: Tensor, x: Tensor, dx: Tensor) -> None:
    S, F = dy.shape
    if dy.numel():
        swiglu_bwd_kernel[(S, triton.cdiv(F, BLOCK))](dy, x, dx, F, BLOCK_F=BLOCK)


@triton.jit
def load_gate_up(x, s, f, F):
    gate = tl.load(x + s * 2 * F + f, mask=f < F, other=0.0).to(tl.float32)
    return gate, tl.load(x + s * 2 * F + F + f, mask=f < F, other=0.0).to(tl.float32)


@triton.jit
def swiglu_fwd_kernel(x, y, F, BLOCK_F: tl.constexpr):
    s = tl.program_id(0).to(tl.int64)
    f = tl.program_id(1) * BLOCK_F + tl.arange(0, BLOCK_F)
    gate, up = load_gate_up(x, s, f, F)
    tl.store(y + s * F + f, gate * tl.sigmoid(gate) * up, mask=f < F)


@triton.jit
def swiglu_bwd_kernel(dy, x, dx, F, BLOCK_F: tl.constexpr):
    # dup = dy * silu(gate),  dgate = dy * up * sig * (1 + gate * (1 - sig))
    s = tl.program_id(0).to(tl.int64)
    f = tl.program_id(1) * BLOCK_F + tl.arange(0, BLOCK_F)
    gate, up = load_gate_up(x, s, f, F)
    d = tl.load(dy + s * F + f, mask=f < F, other=0.0).to(tl.float32)
    sig = tl.sigmoid(gate)
    tl.store(dx + s * 2 * F + f, d * up * sig * (1 + gate * (1 - sig)), mask=f < F)
    tl.store(dx + s * 2 * F + F + f, d * gate * sig, mask=f < F)
