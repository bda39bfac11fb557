"""Layers whose matrix products run in FP8, forward and backward: Fp8Linear, Fp8MLP and Fp8Experts.

All operands are e4m3 with fp32 scales; products accumulate in fp32. Each module is one autograd.Function over the ops
(fp8_functions.py), so that only bf16 or fp32 tensors enter and leave it. A tensor that is needed in two directions is
read once and quantised once. The parameters stay bf16 or fp32, the masters: every forward quantises them, or the
optimizer's step does so once.

A weight's gradient goes to `weight.grad` as usual. Where the parameter has an attribute `main_grad`, fp32 or bf16 of
its shape, the product adds to that in its epilogue instead and autograd gets none: hooks on the gradient do not run.
docs/fp8.md has the recompute levels and the bytes that each saves.
"""

import torch
from torch import Tensor, nn

from ..op import expect, explaining
from ..ops.dispatch import Plan
from ..ops.moe import Weight
from ..ops.quantize import BLOCK, quantize_weight
from ..ops.rms_norm_linear import rms_norm_linear
from .attention import Attention, expect_not_pinned
from .experts import Experts
from .fp8_cache import Fp8Cache, version_of
from .fp8_functions import FeedForward, Fp8LinearFunction, Fp8Weight, product, product_dtype
from .linear import FusedLinear
from .mlp import MLP
from .norm import RMSNorm
from .transposed import KEEP, Transposed

WGRAD = ("auto", "fp8", "bf16")
RECOMPUTE = ("none", "norm_act", "experts", "full")
TRANSPOSED = ("direct", *KEEP)
WEIGHTS = ("each_forward", "kept")
FP8_ROWS = 824  # rows per expert from which FP8 weight gradients are faster on an H200, by roofline


def fits(weight: Tensor) -> bool:
    """Whether a weight [(E,) N, K] can be FP8: 128 must divide N and K."""
    return weight.shape[-1] % BLOCK == weight.shape[-2] % BLOCK == 0


def uncached() -> bool:
    """Whether nothing may be cached: a compiler traces, or `explain` runs."""
    return torch.compiler.is_compiling() or explaining()


class Fp8Weights:
    """How a module's weights are quantised and transposed, and how their gradients are computed.

    pow2: scales are powers of two.
    wgrad: the product for weight gradients, "fp8" or "bf16". "auto" takes bf16 only for experts of fewer than 824 rows
      on the average, where reading and writing the gradient takes most of the time.
    transposed: how the input gradient reads a weight. "direct": the GEMM transposes; csrc/'s reads the forward's
      weight, Triton's transposes a copy. The others: see nn.Transposed. A kept transpose is computed again after a step
      of any torch.optim.Optimizer, and after a change that raises the parameter's `_version`; a compiled graph keeps
      none.
    weights: "each_forward" quantises the weights in every forward; "kept" caches them, as a kept transpose is.
    """

    def __init__(
        self, number: int, pow2: bool = False, wgrad: str = "auto", transposed: str = "direct",
        weights: str = "each_forward",
    ):  # fmt: skip
        expect(wgrad in WGRAD, f"wgrad among {', '.join(WGRAD)}", wgrad)
        expect(transposed in TRANSPOSED, f"transposed among {', '.join(TRANSPOSED)}", transposed)
        expect(weights in WEIGHTS, f"weights among {', '.join(WEIGHTS)}", weights)
        self.pow2, self.wgrad = pow2, wgrad
        self.caches = [Fp8Cache(pow2) if weights == "kept" else None for _ in range(number)]
        self.transposed = [None if transposed == "direct" else Transposed(transposed) for _ in range(number)]

    def quantized(self, *weights: nn.Parameter) -> list[tuple[Tensor, Tensor]]:
        """Each weight's codes and scales, from its cache where there is one."""
        caches = [None if isinstance(c, Fp8Cache) and uncached() else c for c in self.caches]
        return [
            quantize_weight(w, self.pow2) if cache is None else cache(w)
            for w, cache in zip(weights, caches, strict=True)
        ]

    def decode_weights(self, gate_up: nn.Parameter, down: nn.Parameter) -> tuple[Weight, Weight] | None:
        """Both as the op `moe_decode` takes them; None for scales that are powers of two, which it cannot run."""
        if self.pow2:
            return None
        first, second = self.quantized(gate_up, down)
        return first, second

    def fields(self, *weights: nn.Parameter) -> list:
        """The fields of an Fp8Weight for each weight, flat: autograd sees only tensors passed directly as arguments."""
        flat = []
        for w, pair, transposed in zip(weights, self.quantized(*weights), self.transposed, strict=True):
            transposed = None if uncached() else transposed
            version = None if transposed is None else version_of(w)
            flat += Fp8Weight(*pair, getattr(w, "main_grad", None), transposed, version)
        return flat

    def wgrad_for(self, *weights: nn.Parameter, rows: int | None = None) -> str | None:
        """The kind of product for the weights' gradients; None where none of them requires one.

        rows: per expert, on the average; None for a dense layer.
        """
        if not (torch.is_grad_enabled() and any(w.requires_grad for w in weights)):
            return None
        if self.wgrad == "auto":
            return "bf16" if rows is not None and rows < FP8_ROWS else "fp8"
        return self.wgrad


class Fp8Linear(FusedLinear):
    """nn.Linear without a bias, in_features and out_features multiples of 128; options: Fp8Weights'.

    Above recompute "none", the backward computes a norm before this layer again, if this layer applies it.
    """

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

    def takes_fp8_rows(self) -> bool:
        """Without gradients, and where rows are quantised as `quantize` does by itself."""
        return not (self.fp8.pow2 or torch.is_grad_enabled())

    def forward_fp8(self, rows: tuple[Tensor, Tensor], dtype: torch.dtype) -> Tensor:
        (w,) = self.fp8.quantized(self.weight)
        return product(rows, w, None, dtype)

    def forward(self, x: Tensor, norm: RMSNorm | None = None, dtype: torch.dtype | None = None) -> Tensor:
        """x [..., K], or norm(x) where there is one -> [..., N] in dtype, by default x's, or autocast's."""
        *batch, K = x.shape
        rows, dtype = x.reshape(-1, K), product_dtype(x) if dtype is None else dtype
        if norm is not None and self.takes_fp8_rows():
            (w,) = self.fp8.quantized(self.weight)
            return rms_norm_linear(rows, norm.weight, w, norm.eps, dtype).view(*batch, self.out_features)
        if norm is not None and (self.recompute == "none" or torch.compiler.is_compiling()):
            rows, norm = norm(rows), None
        norm_weight, eps = (None, None) if norm is None else (norm.weight, norm.eps)
        options = eps, self.fp8.pow2, self.fp8.wgrad_for(self.weight), dtype
        y = Fp8LinearFunction.apply(rows, norm_weight, self.weight, *self.fp8.fields(self.weight), *options)
        return y.view(*batch, self.out_features)


class Fp8MLP(MLP):
    """MLP with sizes that are multiples of 128. recompute: a level of FeedForward; "experts" is "norm_act" here."""

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

    def plain(self) -> MLP:
        """The MLP of these sizes that is not FP8, without memory."""
        with torch.device("meta"):
            return MLP(*self.down.weight.shape)

    def forward(self, x: Tensor) -> Tensor:
        """x [T, H] -> [T, H]."""
        weights = self.gate_up.weight, self.down.weight
        options = self.fp8.pow2, self.fp8.wgrad_for(*weights), self.recompute, product_dtype(x)
        return FeedForward.apply(x, None, *weights, *self.fp8.fields(*weights), *options)

    def decode_weights(self) -> tuple[Weight, Weight] | None:
        return self.fp8.decode_weights(self.gate_up.weight, self.down.weight)


class Fp8Experts(Experts):
    """Experts with sizes that are multiples of 128. The routing weight is always folded into SwiGLU."""

    def __init__(self, num_experts: int, hidden_size: int, intermediate_size: int, recompute: str = "none", **options):
        super().__init__(num_experts, hidden_size, intermediate_size, fold_weights=True)
        expect(fits(self.down), "sizes that are multiples of 128", hidden_size, intermediate_size)
        self.fp8, self.recompute = Fp8Weights(2, **options), level(recompute)

    @classmethod
    def of(cls, experts: Experts, **options) -> "Fp8Experts":
        with torch.device("meta"):
            new = cls(*experts.down.shape, **options)
        new.gate_up, new.down = experts.gate_up, experts.down
        return new.train(experts.training)

    def forward(self, x: Tensor, plan: Plan, weights: Tensor | None) -> Tensor:
        """x [T, H], a plan of T tokens, weights [T, topk] fp32 or None (all 1) -> [T, H], summed over the experts."""
        w = self.gate_up, self.down
        wgrad = self.fp8.wgrad_for(*w, rows=plan.source.shape[0] // len(self.gate_up))
        options = self.fp8.pow2, wgrad, self.recompute, product_dtype(x)
        return FeedForward.apply(x, weights, *w, *self.fp8.fields(*w), *options, *plan)

    def decode_weights(self) -> tuple[Weight, Weight] | None:
        return self.fp8.decode_weights(self.gate_up, self.down)


def level(recompute: str) -> str:
    """The recompute level inside a module: "full" recomputes whole layers from outside, so a module may keep all."""
    expect(recompute in RECOMPUTE, f"recompute among {', '.join(RECOMPUTE)}", recompute)
    return "none" if recompute == "full" else recompute


def to_fp8(model: nn.Module, recompute: str = "none", **options) -> tuple[list[str], list[str]]:
    """Replace attention's linear layers, MLPs and experts of `model` by FP8 layers over the same parameters, in place.

    Returns the names of the replaced layers, and of those that stay because 128 does not divide a size, each with its
    sizes. An MLP or an expert is FP8 as a whole or not at all. Embedding, norms, head, router and MTP's projection
    stay as they are. Raises InputError for a model that batch_invariant_ has pinned.
    """
    expect_not_pinned(model, "to_fp8")
    replaced, left = [], []
    for name, module in [*model.named_modules()]:
        kinds: dict[str, type[Fp8Linear] | type[Fp8MLP] | type[Fp8Experts]]
        if isinstance(module, Attention):
            kinds = {"query_key_value": Fp8Linear, "dense": Fp8Linear}
        else:
            kinds = {n: KINDS[type(m)] for n, m in module.named_children() if type(m) in KINDS}
        for child, kind in kinds.items():
            old = getattr(module, child)
            if isinstance(old, kind):
                continue
            weights = [*old.parameters()]
            possible = all(fits(w) for w in weights)
            if possible:
                setattr(module, child, kind.of(old, recompute=recompute, **options))
            shapes = ", ".join("x".join(map(str, w.shape)) for w in weights)
            (replaced if possible else left).append(f"{name}.{child} {shapes}".lstrip("."))
    return replaced, left


KINDS: dict[type, type[Fp8MLP] | type[Fp8Experts]] = {MLP: Fp8MLP, Experts: Fp8Experts}
