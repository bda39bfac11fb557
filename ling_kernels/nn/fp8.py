"""Layers whose matrix products run in FP8, forward and backward: Fp8Linear, Fp8MLP and Fp8Experts.

    y = x W^T        x in 1 x 128 blocks, W in 128 x 128
    dx = dy W        dy in 1 x 128 blocks, W as the forward has it
    dW = dy^T x      both in 128 x 1 blocks, along the tokens; or in bf16

All e4m3 with fp32 scales, products accumulated in fp32. Each module is one autograd.Function over the ops, so that only
wide tensors cross its border. Whatever is quantised in two directions is read once and never quantised twice. The
parameters stay what they were, bf16 or fp32: the masters, of which FP8 copies are made in every forward, or once in an
optimizer's step and kept.

A weight's gradient goes to `weight.grad` as usual. Where the parameter has an attribute `main_grad`, fp32 or bf16 of
its shape, the product adds to that in its epilogue instead and autograd gets none: hooks on the gradient do not run.
docs/fp8.md has the recompute levels and the bytes that each keeps.
"""

import torch
from torch import Tensor, nn

from ..op import expect
from ..ops.dispatch import Plan
from ..ops.gemm_fp8 import gemm_fp8
from ..ops.grouped_gemm_fp8 import grouped_gemm_fp8
from ..ops.grouped_wgrad import grouped_wgrad
from ..ops.permute import permute, permute_quantize
from ..ops.quantize import BLOCK, quantize, quantize_weight
from ..ops.rms_norm import rms_norm
from ..ops.swiglu import swiglu, swiglu_backward
from ..ops.unpermute import unpermute
from .attention import Attention
from .copies import Fp8Copy, version_of
from .experts import Experts
from .mlp import MLP
from .norm import RMSNorm
from .transposed import KEEP, Transposed

WGRAD = ("auto", "fp8", "bf16")
RECOMPUTE = ("none", "norm_act", "experts", "full")
TRANSPOSED = ("direct", *KEEP)
WEIGHTS = ("each_forward", "kept")
FP8_ROWS = 824  # rows per expert from which the roofline of an H200 has FP8's weight gradient ahead of bf16's


def fits(weight: Tensor) -> bool:
    """Whether a weight [(E,) N, K] can be FP8: its blocks of 128 x 128 must be whole."""
    return weight.shape[-1] % BLOCK == weight.shape[-2] % BLOCK == 0


class Fp8Weights:
    """How a module's weights are quantised, transposed for dgrad, and get their gradients.

    pow2: scales are powers of two.
    wgrad: the products that give weights their gradients, "fp8" or "bf16"; "auto" takes bf16 only for experts of fewer
      than 824 rows on the average, where reading and writing the gradient is what takes the time.
    transposed: "direct" leaves it to the GEMM, of which csrc/'s reads the forward's weight and Triton's transposes it
      on demand; the others are nn.Transposed's. A transpose that is kept is made anew after a step of any
      torch.optim.Optimizer and after a change that raises the parameter's `_version`; a compiled graph keeps none.
    weights: "each_forward" quantises them there; "kept" keeps the copies, which are made anew as transposes are.
    """

    def __init__(
        self, number: int, pow2: bool = False, wgrad: str = "auto", transposed: str = "direct",
        weights: str = "each_forward",
    ):  # fmt: skip
        expect(wgrad in WGRAD, f"wgrad among {', '.join(WGRAD)}", wgrad)
        expect(transposed in TRANSPOSED, f"transposed among {', '.join(TRANSPOSED)}", transposed)
        expect(weights in WEIGHTS, f"weights among {', '.join(WEIGHTS)}", weights)
        self.pow2, self.wgrad = pow2, wgrad
        self.copies = [Fp8Copy(pow2) if weights == "kept" else None for _ in range(number)]
        self.transposed = [None if transposed == "direct" else Transposed(transposed) for _ in range(number)]

    def quantized(self, *weights: nn.Parameter) -> list[tuple[Tensor, Tensor]]:
        """Each weight's codes and scales, of its copy where one is kept."""
        kept = [None] * len(weights) if torch.compiler.is_compiling() else self.copies
        return [
            quantize_weight(w, self.pow2) if copy is None else copy(w) for w, copy in zip(weights, kept, strict=True)
        ]

    def arguments(self, *weights: nn.Parameter) -> list:
        """Of `Fp8Weight` for each weight, flat: autograd sees tensors only where they are arguments themselves."""
        flat = []
        for w, made, transposed in zip(weights, self.quantized(*weights), self.transposed, strict=True):
            if torch.compiler.is_compiling():
                transposed = None
            version = None if transposed is None else version_of(w)
            flat += [w, *made, getattr(w, "main_grad", None), transposed, version]
        return flat

    def wgrad_for(self, *weights: nn.Parameter, rows: int | None = None) -> str | None:
        """rows: per expert; None for a product of all rows with one weight. None: nobody wants the gradient."""
        if not (torch.is_grad_enabled() and any(w.requires_grad for w in weights)):
            return None
        if self.wgrad == "auto":
            return "bf16" if rows is not None and rows < FP8_ROWS else "fp8"
        return self.wgrad


def product_dtype(x: Tensor) -> torch.dtype:
    """Of a product with x: autocast's where it is on."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype


def product(a, b, offsets: Tensor | None, dtype: torch.dtype, transposed: bool = False) -> Tensor:
    """Pairs a = (a_q, a_scale) and b; with offsets, of each expert's rows with its weight."""
    if offsets is None:
        return gemm_fp8(*a, *b, dtype=dtype, transposed=transposed)
    return grouped_gemm_fp8(*a, *b, offsets, dtype=dtype, transposed=transposed)


def input_gradient(dy, w, kept: tuple, offsets: Tensor | None, dtype: torch.dtype) -> Tensor:
    """dy w; kept: the module's Transposed or None, and the version of w."""
    transposed, version = kept
    if transposed is None:
        return product(dy, w, offsets, dtype, transposed=True)
    return product(dy, transposed(*w, version), offsets, dtype)


def weight_gradient(dy, x, plan: Plan | None, dtype: torch.dtype, main_grad: Tensor | None) -> Tensor | None:
    """dy^T x of pairs, the column-wise copies, or of wide rows, in dtype; None where it was added to main_grad."""
    accumulate = main_grad is not None
    if isinstance(dy, Tensor):
        if plan is None:
            ends = len(dy) * torch.arange(2, dtype=torch.int32, device=dy.device)
            dw = grouped_wgrad(dy, x, ends, main_grad[None] if accumulate else None, accumulate, dtype=dtype)[0]
        else:
            dw = grouped_wgrad(dy, x, plan.offsets, main_grad, accumulate, dtype=dtype)
    elif plan is None:
        dw = gemm_fp8(*dy, *x, main_grad, accumulate, dtype)
    else:
        dw = grouped_wgrad(dy[0], x[0], plan.padded_offsets, main_grad, accumulate, dy[1], x[1], True, dtype)
    return None if accumulate else dw


def quantize_rows(x: Tensor, plan: Plan | None, columns: bool, pow2: bool) -> tuple[tuple, tuple]:
    """x [T, H] -> rows (x_q, x_scale) and columns (xt_q, xt_scale) or (); of its slots where there is a plan."""
    if plan is None:
        out = quantize(x, columns=columns, pow2=pow2)
    else:
        out = permute_quantize(x, plan, columns, pow2)
    return out[:2], out[2:]


class Fp8LinearFunction(torch.autograd.Function):
    """norm_weight: x is normed first, and kept as it came; the norm, and its column-wise FP8, are made again."""

    @staticmethod
    def forward(ctx, x, norm_weight, w, w_q, w_scale, main_grad, transposed, version, eps, pow2, wgrad, dtype):
        again = norm_weight is not None
        normed = rms_norm(x, norm_weight, None, eps) if again else x
        x_rows, x_columns = quantize_rows(normed, None, wgrad == "fp8" and not again, pow2)
        kept = (x, norm_weight) if again else (x.to(dtype),) if wgrad == "bf16" else x_columns
        ctx.save_for_backward(w_q, w_scale, *kept)
        ctx.main_grad, ctx.kept, ctx.w_dtype, ctx.x_dtype = main_grad, (transposed, version), w.dtype, x.dtype
        ctx.pow2, ctx.wgrad, ctx.eps, ctx.dtype = pow2, wgrad, eps if again else None, dtype
        return product(x_rows, (w_q, w_scale), None, dtype)

    @staticmethod
    def backward(ctx, dy):
        w_q, w_scale, *x = ctx.saved_tensors
        if ctx.eps is not None:
            with torch.enable_grad():
                given = [t.detach().requires_grad_() for t in x]
                normed = rms_norm(*given, None, ctx.eps)
            x = normed.detach()
            x = [x.to(ctx.dtype)] if ctx.wgrad == "bf16" else quantize_rows(x, None, ctx.wgrad == "fp8", ctx.pow2)[1]
        rows, columns = quantize_rows(dy, None, ctx.wgrad == "fp8", ctx.pow2)
        dx = dnorm = dw = None
        if ctx.needs_input_grad[0] or ctx.eps is not None:
            dx = input_gradient(rows, (w_q, w_scale), ctx.kept, None, ctx.x_dtype)
        if ctx.wgrad == "fp8":
            dw = weight_gradient(columns, x, None, ctx.w_dtype, ctx.main_grad)
        elif ctx.wgrad == "bf16":
            dw = weight_gradient(dy.contiguous(), x[0], None, ctx.w_dtype, ctx.main_grad)
        if ctx.eps is not None:
            dx, dnorm = torch.autograd.grad(normed, given, dx)
        return dx, dnorm, dw, *[None] * 9


class FeedForward(torch.autograd.Function):
    """down(p * silu(gate) * up) for [gate | up] = gate_up(x): of rows, or with a plan of every token's experts.

    The routing weight p is folded into SwiGLU. Hence nothing that the down projection or unpermute makes is needed in
    the backward, and where the rest is made again, these are not. recompute says what is kept besides the weights:

      none      x and the activation as column-wise FP8, and h = gate_up(x); with wgrad="bf16" as norm_act
      norm_act  x as it came, h: the columns of x and the activation are made again
      experts   x as it came: so is h
    """

    @staticmethod
    def forward(
        ctx, x, weights, offsets, slot, source, padded_offsets,
        gate_up, gate_up_q, gate_up_scale, gate_up_main_grad, gate_up_transposed, gate_up_version,
        down, down_q, down_scale, down_main_grad, down_transposed, down_version, pow2, wgrad, recompute, dtype,
    ):  # fmt: skip
        plan = None if offsets is None else Plan(offsets, slot, source, padded_offsets)
        keep = recompute == "none" and wgrad == "fp8"
        x_rows, x_columns = quantize_rows(x, plan, keep, pow2)
        h = product(x_rows, (gate_up_q, gate_up_scale), offsets, dtype)
        p = None if plan is None else weights.flatten()[source.long()]
        a_q, a_scale, *a_columns = swiglu(h, p, True, keep, plan, pow2)
        y = product((a_q, a_scale), (down_q, down_scale), offsets, dtype)
        ctx.save_for_backward(
            weights, offsets, slot, source, padded_offsets, gate_up_q, gate_up_scale, down_q, down_scale,
            None if keep else x, None if recompute == "experts" else h, *x_columns, *a_columns,
        )  # fmt: skip
        ctx.kept = (gate_up_transposed, gate_up_version), (down_transposed, down_version)
        ctx.main_grads, ctx.w_dtype, ctx.x_dtype = (gate_up_main_grad, down_main_grad), gate_up.dtype, x.dtype
        ctx.pow2, ctx.wgrad, ctx.dtype = pow2, wgrad, dtype
        return y if plan is None else unpermute(y, plan)

    @staticmethod
    def backward(ctx, dout):
        saved = ctx.saved_tensors  # once: under checkpointing each access makes them again
        (weights, *plan, gate_up_q, gate_up_scale, down_q, down_scale, x, h), columns = saved[:11], saved[11:]
        plan = None if plan[0] is None else Plan(*plan)
        offsets = None if plan is None else plan.offsets
        p = None if plan is None else weights.flatten()[plan.source.long()]
        fp8, dtype, pow2, w_dtype = ctx.wgrad == "fp8", ctx.dtype, ctx.pow2, ctx.w_dtype

        x_columns, a_columns = columns[:2], columns[2:]
        if x is not None and (h is None or fp8):
            x_rows, x_columns = quantize_rows(x, plan, fp8, pow2)
            if h is None:
                h = product(x_rows, (gate_up_q, gate_up_scale), offsets, dtype)
            del x_rows

        dy_rows, dy_columns = quantize_rows(dout, plan, fp8, pow2)
        da = input_gradient(dy_rows, (down_q, down_scale), ctx.kept[1], offsets, dtype)
        d_gate_up = d_down = None
        if fp8:
            a_columns = a_columns or swiglu(h, p, True, True, plan, pow2)[2:]
            d_down = weight_gradient(dy_columns, a_columns, plan, w_dtype, ctx.main_grads[1])
            (*dh, dh_columns, dh_columns_scale), dp = swiglu_backward(da, h, p, True, True, plan, pow2)
            d_gate_up = weight_gradient((dh_columns, dh_columns_scale), x_columns, plan, w_dtype, ctx.main_grads[0])
        elif ctx.wgrad == "bf16":
            dy, x = dout.to(dtype), x.to(dtype)
            dy, x = (dy.contiguous(), x) if plan is None else (permute(dy, plan), permute(x, plan))
            d_down = weight_gradient(dy, swiglu(h, p), plan, w_dtype, ctx.main_grads[1])
            dh, dp = swiglu_backward(da, h, p)
            d_gate_up = weight_gradient(dh, x, plan, w_dtype, ctx.main_grads[0])
            dh = quantize(dh, pow2=pow2)
        else:
            dh, dp = swiglu_backward(da, h, p, True, False, None, pow2)
        dx = input_gradient(dh, (gate_up_q, gate_up_scale), ctx.kept[0], offsets, dtype)
        dweights = None
        if plan is not None:
            dx = unpermute(dx, plan)
            dweights = dp[plan.slot.clamp(min=0).long()].masked_fill(plan.slot < 0, 0)
        nothing = [None] * 5
        return dx.to(ctx.x_dtype), dweights, *nothing[:4], d_gate_up, *nothing, d_down, *nothing, *nothing[:4]


class Fp8Linear(nn.Linear):
    """nn.Linear without a bias, in_features and out_features multiples of 128; options: Fp8Weights'.

    Above recompute "none" a norm before it is made again in the backward, where it is left to this layer to apply.
    """

    takes_norm = True

    def __init__(
        self, in_features: int, out_features: int, device=None, dtype=None, recompute: str = "none", **options
    ):  # fmt: skip
        super().__init__(in_features, out_features, bias=False, device=device, dtype=dtype)
        expect(fits(self.weight), "in_features and out_features that are multiples of 128", in_features, out_features)
        self.fp8, self.recompute = Fp8Weights(1, **options), level(recompute)

    @classmethod
    def of(cls, linear: nn.Linear, **options) -> "Fp8Linear":
        """With the parameter of `linear`."""
        expect(linear.bias is None, "a linear layer without a bias", linear)
        new = cls(linear.in_features, linear.out_features, device="meta", **options)
        new.weight = linear.weight
        return new.train(linear.training)

    @property
    def takes_rows(self) -> bool:
        """Whether `product` serves: rows are quantised as `quantize` does by itself, and nobody wants a gradient."""
        return not (self.fp8.pow2 or torch.is_grad_enabled())

    def product(self, rows: tuple[Tensor, Tensor], dtype: torch.dtype) -> Tensor:
        """x [M, K] as the pair (x_q, x_scale) -> [M, N] in dtype."""
        (w,) = self.fp8.quantized(self.weight)
        return product(rows, w, None, dtype)

    def forward(self, x: Tensor, norm: RMSNorm | None = None) -> Tensor:
        """x [..., K], or norm(x) where there is one -> [..., N] in x's dtype, autocast's where it is on."""
        if norm is not None and self.takes_rows:
            _, *rows = rms_norm(x.flatten(0, -2), norm.weight, None, norm.eps, quantize=True)
            return self.product(rows, product_dtype(x)).unflatten(0, x.shape[:-1])
        if norm is not None and (self.recompute == "none" or torch.compiler.is_compiling()):
            x, norm = norm(x), None
        norm_weight, eps = (None, None) if norm is None else (norm.weight, norm.eps)
        options = eps, self.fp8.pow2, self.fp8.wgrad_for(self.weight), product_dtype(x)
        y = Fp8LinearFunction.apply(x.flatten(0, -2), norm_weight, *self.fp8.arguments(self.weight), *options)
        return y.unflatten(0, x.shape[:-1])


class Fp8MLP(MLP):
    """MLP, its sizes multiples of 128; recompute: FeedForward's levels but "experts", which recomputes no dense h."""

    def __init__(self, hidden_size: int, intermediate_size: int, recompute: str = "none", **options):
        super().__init__(hidden_size, intermediate_size)
        expect(fits(self.down.weight), "sizes that are multiples of 128", hidden_size, intermediate_size)
        self.fp8, self.recompute = Fp8Weights(2, **options), level(recompute)
        if self.recompute == "experts":
            self.recompute = "norm_act"

    @classmethod
    def of(cls, mlp: MLP, **options) -> "Fp8MLP":
        with torch.device("meta"):
            new = cls(*mlp.down.weight.shape, **options)
        new.gate_up, new.down = mlp.gate_up, mlp.down
        return new.train(mlp.training)

    def forward(self, x: Tensor) -> Tensor:
        """x [T, H] -> [T, H]."""
        weights = self.gate_up.weight, self.down.weight
        options = self.fp8.pow2, self.fp8.wgrad_for(*weights), self.recompute, product_dtype(x)
        return FeedForward.apply(x, *[None] * 5, *self.fp8.arguments(*weights), *options)


class Fp8Experts(Experts):
    """Experts, their sizes multiples of 128, from a token's row to the weighted sum of its experts."""

    def __init__(self, num_experts: int, hidden_size: int, intermediate_size: int, recompute: str = "none", **options):
        super().__init__(num_experts, hidden_size, intermediate_size)
        expect(fits(self.down), "sizes that are multiples of 128", hidden_size, intermediate_size)
        self.fp8, self.recompute = Fp8Weights(2, **options), level(recompute)

    @classmethod
    def of(cls, experts: Experts, **options) -> "Fp8Experts":
        with torch.device("meta"):
            new = cls(*experts.down.shape, **options)
        new.gate_up, new.down = experts.gate_up, experts.down
        return new.train(experts.training)

    def forward(self, x: Tensor, plan: Plan, weights: Tensor) -> Tensor:
        """x [T, H], a plan of T tokens, weights [T, topk] fp32 -> [T, H]."""
        w = self.gate_up, self.down
        wgrad = self.fp8.wgrad_for(*w, rows=plan.source.shape[0] // len(self.gate_up))
        options = self.fp8.pow2, wgrad, self.recompute, product_dtype(x)
        return FeedForward.apply(x, weights, *plan, *self.fp8.arguments(*w), *options)


def level(recompute: str) -> str:
    """Of a module: "full" recomputes whole layers from outside, and then a module keeps all it likes."""
    expect(recompute in RECOMPUTE, f"recompute among {', '.join(RECOMPUTE)}", recompute)
    return "none" if recompute == "full" else recompute


def to_fp8(model: nn.Module, recompute: str = "none", **options) -> tuple[list[str], list[str]]:
    """Attention's linear layers, MLPs and experts of `model` become FP8 layers over the same parameters, in place.

    Returns the names of those layers, and of those that stay as they are since a size is no multiple of 128, each with
    its sizes. An MLP and an expert are FP8 as a whole or not at all. Embedding, norms, head, router and MTP's
    projection are none of them.
    """
    made, left = [], []
    for name, module in [*model.named_modules()]:
        if isinstance(module, Attention):
            found = {"query_key_value": Fp8Linear, "dense": Fp8Linear}
        else:
            found = {n: KINDS[type(m)] for n, m in module.named_children() if type(m) in KINDS}
        for child, kind in found.items():
            old = getattr(module, child)
            if isinstance(old, kind):
                continue
            weights = [*old.parameters()]
            shapes = ", ".join("x".join(map(str, w.shape)) for w in weights)
            if all(fits(w) for w in weights):
                setattr(module, child, kind.of(old, recompute=recompute, **options))
            (made if all(fits(w) for w in weights) else left).append(f"{name}.{child} {shapes}".lstrip("."))
    return made, left


KINDS = {MLP: Fp8MLP, Experts: Fp8Experts}
