"""Low-rank adapters (LoRA, arXiv 2106.09685): x W^T + s (x A^T) B^T in place of x W^T, where W stays as it is.

A [r, K] and B [N, r] are the only parameters that are trained, fp32 whatever W is; for routed experts they are stacked,
[E, r, K] and [E, N, r], and their products are grouped like the weights'. s = alpha / r. B begins with zeros, so that
nothing changes before the first step. Gate and up share one A. Embedding, head, norms and routers have no adapter.

A layer keeps its class's attributes and the names of its parameters; its class becomes one of those below. W may be
FP8 (`to_fp8` before `lora_`): it is read by forward and input gradient alone.
"""

import zlib
from collections.abc import Collection, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from ..errors import InputError
from ..op import expect
from ..ops.dispatch import Plan
from ..ops.grouped_gemm import grouped_gemm
from ..ops.moe import Weight, weights_of_rows
from ..ops.permute import permute
from ..ops.swiglu import swiglu
from ..ops.unpermute import unpermute
from .attention import Attention, expect_not_pinned
from .experts import Experts
from .fp8 import Fp8Experts, Fp8Linear, Fp8MLP
from .fp8_functions import FIELDS, FrozenProduct, product_dtype
from .mlp import MLP
from .norm import RMSNorm

ON = ("attention", "mlp", "experts")  # mlp: of dense layers and shared experts


class Adapter(nn.Module):
    """a [(E,) r, K] and b [(E,) N, r] of a weight [(E,) N, K], on its device."""

    enabled = True

    def __init__(self, weight: Tensor, rank: int, alpha: float):
        super().__init__()
        *E, N, K = weight.shape
        options = dict(dtype=torch.float64 if weight.dtype == torch.float64 else torch.float32, device=weight.device)
        self.a = nn.Parameter(torch.empty(*E, rank, K, **options))
        self.b = nn.Parameter(torch.zeros(*E, N, rank, **options))
        self.scale = alpha / rank

    def forward(self, x: Tensor, plan: Plan | None = None) -> Tensor:
        """x [..., K] -> s (x a^T) b^T [..., N]; with a plan, each expert's rows of x [S, K] by its own a and b."""
        a, b = self.a.to(x.dtype), self.b.to(x.dtype)
        if plan is None:
            return linear(linear(x, a) * self.scale, b)
        return grouped_gemm(grouped_gemm(x, a, plan.offsets) * self.scale, b, plan.offsets)

    def delta(self) -> Tensor:
        """s b a [(E,) N, K], what the adapter adds to the weight."""
        return self.scale * (self.b.detach() @ self.a.detach())


class LoraLinear(nn.Linear):
    """A linear layer without a bias, and its adapter."""

    adapter: Adapter

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        return y + self.adapter(x) if self.adapter.enabled else y


class LoraFp8Linear(Fp8Linear):
    """The same over an FP8 weight."""

    adapter: Adapter

    def takes_fp8_rows(self) -> bool:
        return not self.adapter.enabled and super().takes_fp8_rows()

    def forward(self, x: Tensor, norm: RMSNorm | None = None, dtype: torch.dtype | None = None) -> Tensor:
        if not self.adapter.enabled:
            return super().forward(x, norm, dtype)
        x = x if norm is None else norm(x)
        y = super().forward(x, None, dtype)
        return y + self.adapter(x).to(y.dtype)


class AdaptedFeedForward:
    """MLP or experts, FP8 or not, with adapters of both projections."""

    gate_up_adapter: Adapter
    down_adapter: Adapter

    def forward(self, x: Tensor, *routed) -> Tensor:
        """x [T, H], of experts also a plan and weights -> [T, H]."""
        if not self.gate_up_adapter.enabled:
            return super().forward(x, *routed)  # type: ignore[misc]
        return feed_forward(self, x, *routed)

    def decode_weights(self) -> tuple[Weight, Weight] | None:
        return None if self.gate_up_adapter.enabled else super().decode_weights()  # type: ignore[misc]


class LoraMLP(AdaptedFeedForward, MLP):
    pass


class LoraFp8MLP(AdaptedFeedForward, Fp8MLP):
    pass


class LoraExperts(AdaptedFeedForward, Experts):
    pass


class LoraFp8Experts(AdaptedFeedForward, Fp8Experts):
    pass


KINDS: dict[type, type] = {
    nn.Linear: LoraLinear, Fp8Linear: LoraFp8Linear, MLP: LoraMLP, Fp8MLP: LoraFp8MLP, Experts: LoraExperts,
    Fp8Experts: LoraFp8Experts,
}  # fmt: skip


def feed_forward(module, x: Tensor, plan: Plan | None = None, weights: Tensor | None = None) -> Tensor:
    """What the MLP or the experts `module` compute with adapters on gate_up and down, as `expert_mlp` without them."""
    fold = plan is not None and module.fold_weights
    p = weights_of_rows(weights, plan) if fold and plan is not None else None
    rows, offsets = (x, None) if plan is None else (permute(x, plan), plan.offsets)
    gate_up, down = (getattr(part, "weight", part) for part in (module.gate_up, module.down))
    if isinstance(module, Fp8MLP | Fp8Experts):
        fields, options = module.fp8.fields(gate_up, down), (module.fp8.pow2, product_dtype(x))
        h = FrozenProduct.apply(rows, None, False, offsets, *fields[:FIELDS], *options)
        h = h + module.gate_up_adapter(rows, plan)
        y = FrozenProduct.apply(h, p, True, offsets, *fields[FIELDS:], *options)
        y = y + module.down_adapter(swiglu(h, p, plan=plan), plan)
    else:
        a = swiglu(base_product(rows, gate_up, offsets) + module.gate_up_adapter(rows, plan), p, plan=plan)
        y = base_product(a, down, offsets) + module.down_adapter(a, plan)
    return y if plan is None else unpermute(y, plan, None if fold else weights)


def base_product(x: Tensor, w: Tensor, offsets: Tensor | None) -> Tensor:
    return linear(x, w) if offsets is None else grouped_gemm(x, w, offsets)


def lora_(model: nn.Module, rank: int, alpha: float | None = None, on: Collection[str] = ON, seed: int = 0) -> None:
    """Give layers of `model` adapters, in place, and freeze all its other parameters. Make the optimizer afterwards.

    alpha: by default twice the rank. on: which layers, of ON. seed: of the A, uniform within 1 / sqrt(K) as peft has
    them. Raises InputError for layers that can have no adapter, and where there are none of these.
    """
    expect(rank >= 1 and {*on} <= {*ON}, f"rank of at least 1, on among {', '.join(ON)}", rank, on)
    expect_not_pinned(model, "lora_")
    places = adapted(model, on)
    if not places:
        raise InputError(f"the model has no {' and no '.join(on)} to adapt")
    for name, (layer, _) in places.items():
        if type(layer) not in {*KINDS, *KINDS.values()}:
            raise InputError(f"{name.rpartition('.')[0]}, a {type(layer).__name__}, can have no adapter")
    model.requires_grad_(False)
    for name, (layer, weight) in places.items():
        adapter = Adapter(weight, rank, 2 * rank if alpha is None else alpha)
        if not weight.is_meta:
            adapter.a.data.copy_(drawn(f"{name}.a", adapter.a.shape, seed))
        layer.__class__ = KINDS.get(type(layer), type(layer))
        setattr(layer, name.rpartition(".")[2], adapter)


def adapted(model: nn.Module, on: Collection[str] = ON) -> dict[str, tuple[nn.Module, Tensor]]:
    """By the adapters' names: the layer that an adapter is in, and the weight that it is of."""
    found: dict[str, tuple[nn.Module, Tensor]] = {}
    for name, module in model.named_modules():
        if isinstance(module, Attention) and "attention" in on:
            for part in ("query_key_value", "dense"):
                layer = getattr(module, part)
                found[f"{name}.{part}.adapter"] = layer, layer.weight
        if (isinstance(module, MLP) and "mlp" in on) or (isinstance(module, Experts) and "experts" in on):
            for part in ("gate_up", "down"):
                weight = getattr(module, part)
                found[f"{name}.{part}_adapter"] = module, getattr(weight, "weight", weight)
    return found


def drawn(name: str, shape: torch.Size, seed: int) -> Tensor:
    """The values at the beginning of the parameter a of this name, fp32 on the CPU: the same in every process."""
    generator = torch.Generator().manual_seed(seed ^ zlib.crc32(name.encode()))
    bound = shape[-1] ** -0.5
    return torch.empty(shape).uniform_(-bound, bound, generator=generator)


def adapters(model: nn.Module) -> dict[str, Adapter]:
    return {name: module for name, module in model.named_modules() if isinstance(module, Adapter)}


@contextmanager
def without_adapters(model: nn.Module) -> Iterator[None]:
    """Within it `model` computes what it did before `lora_`: the reference model of DPO and of a KL term."""
    found = adapters(model).values()
    for adapter in found:
        adapter.enabled = False
    try:
        yield
    finally:
        for adapter in found:
            adapter.enabled = True


@torch.no_grad()
def merge_adapters_(model: nn.Module) -> None:
    """Add the adapters to the weights that they are of, rounded once, and take them off. Raises InputError where a
    weight is FP8 itself."""
    base = {kind: of for of, kind in KINDS.items()}
    for name, (layer, weight) in adapted(model).items():
        adapter = getattr(layer, attribute := name.rpartition(".")[2], None)
        if adapter is None:
            continue
        if weight.itemsize == 1:
            raise InputError(f"{name}: its weight is {weight.dtype}, to which nothing can be added")
        weight.copy_(weight.to(adapter.a.dtype) + adapter.delta())
        delattr(layer, attribute)
        if not any(isinstance(child, Adapter) for child in layer.children()):
            layer.__class__ = base[type(layer)]
