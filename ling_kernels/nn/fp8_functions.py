"""The autograd functions behind the FP8 layers of fp8.py, and the weight that they take.

y = x W^T        x in 1 x 128 blocks, W in 128 x 128
dx = dy W        dy in 1 x 128 blocks, W as the forward has it
dW = dy^T x      both in 128 x 1 blocks, along the tokens; or in bf16
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..op import first_derivative_only
from ..ops.deferred import now_or_later
from ..ops.dispatch import Plan
from ..ops.gemm_fp8 import gemm_fp8
from ..ops.grouped_gemm_fp8 import grouped_gemm_fp8
from ..ops.grouped_wgrad import grouped_wgrad
from ..ops.permute import permute, permute_quantize
from ..ops.quantize import quantize
from ..ops.rms_norm import rms_norm
from ..ops.swiglu import swiglu, swiglu_backward
from ..ops.unpermute import unpermute
from .transposed import Transposed


class Fp8Weight(NamedTuple):
    """A weight w [(E,) N, K] in FP8, beside the parameter, which autograd sees as an argument of its own."""

    q: Tensor  # e4m3 as w
    scale: Tensor  # [(E,) N/128, K/128] fp32
    main_grad: Tensor | None  # to add the gradient to
    transposed: Transposed | None  # None: the product transposes by itself
    version: tuple | None  # for `transposed`: another one after every change of w

    @property
    def pair(self) -> tuple[Tensor, Tensor]:
        return self.q, self.scale


FIELDS = len(Fp8Weight._fields)


def product_dtype(x: Tensor) -> torch.dtype:
    """The dtype of a product with x: autocast's where it is on."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype


def product(
    a: tuple[Tensor, Tensor],
    b: tuple[Tensor, Tensor],
    offsets: Tensor | None,
    dtype: torch.dtype,
    transposed: bool = False,
) -> Tensor:
    """a b^T for pairs a = (a_q, a_scale) and b; with offsets, each expert's rows times its own weight."""
    if offsets is None:
        return gemm_fp8(*a, *b, dtype=dtype, transposed=transposed)
    return grouped_gemm_fp8(*a, *b, offsets, dtype=dtype, transposed=transposed)


def input_gradient(dy, w: Fp8Weight, offsets: Tensor | None, dtype: torch.dtype) -> Tensor:
    """dy w, for the pair dy."""
    if w.transposed is None:
        return product(dy, w.pair, offsets, dtype, transposed=True)
    return product(dy, w.transposed(*w.pair, w.version), offsets, dtype)


def weight_gradient(dy, x, plan: Plan | None, dtype: torch.dtype, main_grad: Tensor | None) -> Tensor | None:
    """dy^T x in dtype, for pairs of column-wise FP8 or for bf16 rows; None where it was added to main_grad."""
    accumulate = main_grad is not None
    if isinstance(dy, Tensor):
        if plan is None:
            ends = len(dy) * torch.arange(2, dtype=torch.int32, device=dy.device)
            dw = grouped_wgrad(dy, x, ends, main_grad[None] if accumulate else None, accumulate, dtype=dtype)[0]
        else:
            dw = grouped_wgrad(dy, x, plan.offsets, main_grad, accumulate, dtype=dtype)
    elif plan is None:
        dw = gemm_fp8(dy[0], dy[1], x[0], x[1], main_grad, accumulate, dtype)
    else:
        dw = grouped_wgrad(dy[0], x[0], plan.padded_offsets, main_grad, accumulate, dy[1], x[1], True, dtype)
    return None if accumulate else dw


def quantize_rows(x: Tensor, plan: Plan | None, columns: bool, pow2: bool) -> tuple[tuple, tuple]:
    """x [T, H] -> rows (x_q, x_scale) and columns (xt_q, xt_scale) or (); with a plan, in the order of its rows."""
    if plan is None:
        out = quantize(x, columns=columns, pow2=pow2)
    else:
        out = permute_quantize(x, plan, columns, pow2)
    return out[:2], out[2:]


class Fp8LinearFunction(torch.autograd.Function):
    """y = x W^T, or norm(x) W^T with the weight of a norm: then x is saved, and the norm and its column-wise FP8 are
    computed again in the backward."""

    @staticmethod
    def forward(ctx, x: Tensor, norm_weight: Tensor | None, w: nn.Parameter, *others):
        """others: the fields of w's Fp8Weight, eps, pow2, wgrad and the product's dtype."""
        fp8, (eps, pow2, wgrad, dtype) = Fp8Weight(*others[:FIELDS]), others[FIELDS:]
        recompute_norm = norm_weight is not None
        normed = rms_norm(x, norm_weight, None, eps) if recompute_norm else x
        x_rows, x_columns = quantize_rows(normed, None, wgrad == "fp8" and not recompute_norm, pow2)
        saved = (x, norm_weight) if recompute_norm else (x.to(dtype),) if wgrad == "bf16" else x_columns
        ctx.save_for_backward(*fp8.pair, *saved)
        ctx.fp8, ctx.w_dtype, ctx.x_dtype = fp8._replace(q=None, scale=None), w.dtype, x.dtype
        ctx.pow2, ctx.wgrad, ctx.dtype, ctx.num_others = pow2, wgrad, dtype, len(others)
        ctx.eps = eps if recompute_norm else None
        return product(x_rows, fp8.pair, None, dtype)

    @staticmethod
    @first_derivative_only
    def backward(ctx, dy):
        q, scale, *x = ctx.saved_tensors
        w = ctx.fp8._replace(q=q, scale=scale)
        if ctx.eps is not None:
            with torch.enable_grad():
                inputs = [t.detach().requires_grad_() for t in x]
                normed = rms_norm(*inputs, None, ctx.eps)
            x = normed.detach()
            x = [x.to(ctx.dtype)] if ctx.wgrad == "bf16" else quantize_rows(x, None, ctx.wgrad == "fp8", ctx.pow2)[1]
        rows, columns = quantize_rows(dy, None, ctx.wgrad == "fp8", ctx.pow2)
        dx = dnorm = dw = None
        if ctx.needs_input_grad[0] or ctx.eps is not None:
            dx = input_gradient(rows, w, None, ctx.x_dtype)
        if ctx.wgrad is not None:
            factors = (columns, x) if ctx.wgrad == "fp8" else (dy.contiguous(), x[0])
            number = 1 if ctx.eps is None else 2  # of w among the tensors
            dw = now_or_later(ctx, number, lambda: weight_gradient(*factors, None, ctx.w_dtype, w.main_grad))
        if ctx.eps is not None:
            dx, dnorm = torch.autograd.grad(normed, inputs, dx)
        return dx, dnorm, dw, *[None] * ctx.num_others


class FeedForward(torch.autograd.Function):
    """down(p * silu(gate) * up) for [gate | up] = gate_up(x): of rows, or with a plan of every token's experts.

    The routing weight p is folded into SwiGLU. Hence the backward needs nothing that the down projection or unpermute
    computes, and recomputation leaves these out. recompute says what is saved besides the weights:

      none      x and the activation as column-wise FP8, and h = gate_up(x); with wgrad="bf16" as norm_act
      norm_act  x itself and h: the backward computes the columns of x and the activation again
      experts   x itself: the backward computes h again, too
    """

    @staticmethod
    def forward(ctx, x: Tensor, weights: Tensor | None, gate_up: nn.Parameter, down: nn.Parameter, *others):
        """others: the fields of the two weights' Fp8Weight, pow2, wgrad, recompute, dtype, and the fields of a plan."""
        gate_up_fp8, down_fp8 = Fp8Weight(*others[:FIELDS]), Fp8Weight(*others[FIELDS : 2 * FIELDS])
        pow2, wgrad, recompute, dtype, *plan = others[2 * FIELDS :]
        plan = Plan(*plan) if plan else None
        offsets = None if plan is None else plan.offsets
        keep = recompute == "none" and wgrad == "fp8"
        x_rows, x_columns = quantize_rows(x, plan, keep, pow2)
        h = product(x_rows, gate_up_fp8.pair, offsets, dtype)
        a_q, a_scale, *a_columns = swiglu(h, row_weights(weights, plan), True, keep, plan, pow2)
        y = product((a_q, a_scale), down_fp8.pair, offsets, dtype)
        ctx.save_for_backward(
            weights, *(plan or [None] * 4), *gate_up_fp8.pair, *down_fp8.pair,
            None if keep else x, None if recompute == "experts" else h, *x_columns, *a_columns,
        )  # fmt: skip
        ctx.fp8 = [w._replace(q=None, scale=None) for w in (gate_up_fp8, down_fp8)]
        ctx.w_dtype, ctx.x_dtype, ctx.num_others = gate_up.dtype, x.dtype, len(others)
        ctx.pow2, ctx.wgrad, ctx.dtype = pow2, wgrad, dtype
        return y if plan is None else unpermute(y, plan)

    @staticmethod
    @first_derivative_only
    def backward(ctx, dout):
        saved = ctx.saved_tensors  # once: under checkpointing each access computes them again
        (weights, *plan, gate_up_q, gate_up_scale, down_q, down_scale, x, h), columns = saved[:11], saved[11:]
        plan = None if plan[0] is None else Plan(*plan)
        offsets = None if plan is None else plan.offsets
        gate_up = ctx.fp8[0]._replace(q=gate_up_q, scale=gate_up_scale)
        down = ctx.fp8[1]._replace(q=down_q, scale=down_scale)
        p = row_weights(weights, plan)
        fp8, dtype, pow2 = ctx.wgrad == "fp8", ctx.dtype, ctx.pow2

        def later(weight: int, dy, x, main_grad):
            number = 1 + (weights is not None) + weight  # of gate_up, 0, or down, 1, among the tensors
            return now_or_later(ctx, number, lambda: weight_gradient(dy, x, plan, ctx.w_dtype, main_grad))

        x_columns, a_columns = columns[:2], columns[2:]
        if x is not None and (h is None or fp8):
            x_rows, x_columns = quantize_rows(x, plan, fp8, pow2)
            if h is None:
                h = product(x_rows, gate_up.pair, offsets, dtype)
            del x_rows

        dy_rows, dy_columns = quantize_rows(dout, plan, fp8, pow2)
        da = input_gradient(dy_rows, down, offsets, dtype)
        d_gate_up = d_down = None
        if fp8:
            a_columns = a_columns or swiglu(h, p, True, True, plan, pow2)[2:]
            d_down = later(1, dy_columns, a_columns, down.main_grad)
            (*dh, dh_columns, dh_columns_scale), dp = swiglu_backward(da, h, p, True, True, plan, pow2)
            d_gate_up = later(0, (dh_columns, dh_columns_scale), x_columns, gate_up.main_grad)
        elif ctx.wgrad == "bf16":
            dy, x = dout.to(dtype), x.to(dtype)
            dy, x = (dy.contiguous(), x) if plan is None else (permute(dy, plan), permute(x, plan))
            d_down = later(1, dy, swiglu(h, p), down.main_grad)
            dh, dp = swiglu_backward(da, h, p)
            d_gate_up = later(0, dh, x, gate_up.main_grad)
            dh = quantize(dh, pow2=pow2)
        else:
            dh, dp = swiglu_backward(da, h, p, True, False, None, pow2)
        dx = input_gradient(dh, gate_up, offsets, dtype)
        dweights = None
        if plan is not None:
            dx = unpermute(dx, plan)
            if dp is not None:
                dweights = dp[plan.slot.clamp(min=0).long()].masked_fill(plan.slot < 0, 0)
        return dx.to(ctx.x_dtype), dweights, d_gate_up, d_down, *[None] * ctx.num_others


class FrozenProduct(torch.autograd.Function):
    """x W^T in FP8 for a weight without gradient; with offsets, each expert's rows times its own weight.

    With `activate` of swiglu(x, p) instead, which is quantised before it is rounded, as `FeedForward` does.
    """

    @staticmethod
    def forward(ctx, x: Tensor, p: Tensor | None, activate: bool, offsets: Tensor | None, *others):
        """others: the fields of w's Fp8Weight, pow2 and the product's dtype. Gradients go to x and p."""
        fp8, (pow2, dtype) = Fp8Weight(*others[:FIELDS]), others[FIELDS:]
        rows = swiglu(x, p, quantize=True, pow2=pow2) if activate else quantize(x, pow2=pow2)
        ctx.save_for_backward(offsets, *fp8.pair, *((x, p) if activate else ()))
        ctx.fp8, ctx.x_dtype, ctx.num_others = fp8._replace(q=None, scale=None), x.dtype, len(others)
        ctx.pow2, ctx.activate = pow2, activate
        return product(rows, fp8.pair, offsets, dtype)

    @staticmethod
    @first_derivative_only
    def backward(ctx, dy):
        offsets, q, scale, *activated = ctx.saved_tensors
        dx = dp = None
        if any(ctx.needs_input_grad[:2]):
            w = ctx.fp8._replace(q=q, scale=scale)
            dx = input_gradient(quantize(dy.contiguous(), pow2=ctx.pow2), w, offsets, ctx.x_dtype)
            if ctx.activate:
                dx, dp = swiglu_backward(dx, *activated)
        return dx, dp, None, None, *[None] * ctx.num_others


def row_weights(weights: Tensor | None, plan: Plan | None) -> Tensor | None:
    """weights [T, topk] in the order of the plan's rows, [S]."""
    return None if weights is None or plan is None else weights.flatten()[plan.source.long()]
