"""What is replaced in Megatron-core, and how it is put back."""

import dataclasses
import importlib
from collections.abc import Callable, Collection
from functools import partial, wraps
from inspect import signature
from typing import Any

from ...errors import InputError
from ..versions import require

require("megatron.core", "megatron-core", ">=0.16,<0.20")

from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules  # noqa: E402
from megatron.core.transformer.mlp import MLPSubmodules  # noqa: E402
from megatron.core.transformer.moe.moe_layer import MoESubmodules  # noqa: E402

from . import loss, permutation, routing  # noqa: E402
from .attention import Attention  # noqa: E402
from .experts import Experts, Fp8Experts  # noqa: E402
from .linear import KINDS  # noqa: E402

PARTS = ("experts", "attention", "router", "permutation", "loss", "balance")
MODULES = ("experts", "attention")  # replaced in the specification from which a model is built
GPT, HYBRID, LANGUAGE, MOE = (
    "megatron.core.models.gpt.gpt_model:GPTModel",
    "megatron.core.models.hybrid.hybrid_model:HybridModel",
    "megatron.core.models.common.language_module.language_module:LanguageModule",
    "megatron.core.transformer.moe",
)
MODELS = {GPT: ("transformer_layer_spec", "mtp_block_spec"), HYBRID: ("hybrid_stack_spec",)}  # their specifications
# Functions, by the name under which their caller finds them: of a module, or of a class as module:class.
FUNCTIONS: dict[str, list[tuple[str, str, Callable[[Callable], Callable]]]] = {
    "router": [
        (f"{MOE}.router", "router_gating_linear", routing.router_logits),
        (f"{MOE}.router", "topk_routing_with_score_function", routing.topk_routing),
    ],
    "permutation": [
        (f"{MOE}.token_dispatcher", "permute", permutation.permute_tokens),
        (f"{MOE}.token_dispatcher", "unpermute", permutation.unpermute_tokens),
        (f"{MOE}.token_dispatcher", "sort_chunks_by_idxs", permutation.sort_chunks),
    ],
    "loss": [
        (GPT, "_postprocess", loss.postprocess),
        (HYBRID, "forward", loss.postprocess),
        (LANGUAGE, "compute_language_model_loss", loss.language_model_loss),
    ],
    "balance": [
        ("megatron.core.distributed.finalize_model_grads", "get_updated_expert_bias", routing.updated_expert_bias)
    ],
}
_stock: list[tuple[Any, str, Any]] = []  # what `undo` puts back: owner, name, value


def apply(parts: Collection[str] = PARTS, fp8: bool = False) -> None:
    """Replace these parts in this process, for every GPTModel and HybridModel that is built from now on.

    parts: of PARTS. fp8: products of experts, and of Megatron's own linear layers in attention and MLPs, are in block
    FP8; the head, the router and MTP's projection stay. A second call starts from Megatron's own again. Raises
    InputError for another name; building a model raises it for a configuration that our experts do not have.
    """
    if isinstance(parts, str):
        raise InputError(f"parts is the text {parts!r}: give a list of names, such as {parts.split(',')}")
    unknown = sorted(set(parts) - set(PARTS))
    if unknown:
        raise InputError(f"no part {unknown[0]!r}; parts are {', '.join(PARTS)}")
    undo()
    for part in parts:
        for owner, name, make in FUNCTIONS.get(part, []):
            put(owner, name, make)
    modules = [part for part in MODULES if part in parts]
    if modules or fp8:
        for model, specs in MODELS.items():
            put(model, "__init__", partial(with_modules, specs=specs, parts=modules, fp8=fp8))


def undo() -> None:
    """Megatron's own functions and specifications again. A model that was built keeps its modules."""
    while _stock:
        setattr(*_stock.pop())


def put(path: str, name: str, make: Callable[[Callable], Callable]) -> None:
    owner = found(path)
    if owner is None:
        return
    stock = getattr(owner, name)
    _stock.append((owner, name, stock))
    setattr(owner, name, make(stock))


def found(path: str) -> Any:
    """A module or a class; None for HybridModel in a version without it."""
    module, _, of = path.partition(":")
    try:
        imported = importlib.import_module(module)
    except ModuleNotFoundError:
        if path == HYBRID:
            return None
        raise
    return getattr(imported, of) if of else imported


def with_modules(stock: Callable, specs: Collection[str], parts: Collection[str], fp8: bool) -> Callable:
    """A model's __init__ with replaced specifications."""
    arguments = signature(stock)

    @wraps(stock)
    def __init__(*args, **kwargs) -> None:
        given = arguments.bind(*args, **kwargs)
        for name in specs:
            if name in given.arguments:
                given.arguments[name] = replaced(given.arguments[name], parts, fp8)
        stock(*given.args, **given.kwargs)

    return __init__


def replaced(spec: Any, parts: Collection[str] = MODULES, fp8: bool = False) -> Any:
    """A copy of a specification (ModuleSpec, TransformerBlockSubmodules, ...) with our modules in it."""
    again = partial(replaced, parts=parts, fp8=fp8)
    if spec is SelfAttention and "attention" in parts:
        return Attention
    if isinstance(spec, partial):
        return partial(again(spec.func), *map(again, spec.args), **{k: again(v) for k, v in spec.keywords.items()})
    if isinstance(spec, list | tuple):
        return type(spec)(map(again, spec))
    if dataclasses.is_dataclass(spec) and not isinstance(spec, type):
        fields = {field.name: getattr(spec, field.name) for field in dataclasses.fields(spec) if field.init}
        if isinstance(spec, MoESubmodules) and "experts" in parts:
            fields["experts"] = Fp8Experts if fp8 else Experts
        if fp8 and isinstance(spec, SelfAttentionSubmodules | MLPSubmodules):
            fields = {
                name: KINDS.get(value, value) if isinstance(value, type) else value for name, value in fields.items()
            }
        return dataclasses.replace(spec, **{name: again(value) for name, value in fields.items()})
    return spec
