"""Our ops inside Megatron-core's GPTModel: `apply()` before the model is built, `undo()` to have Megatron's own again.

docs/integrations/megatron.md says what is replaced, and where Megatron's own code still runs.
"""

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

__all__ = ["PARTS", "Attention", "Experts", "Fp8Experts", "apply", "replaced", "undo"]

PARTS = ("experts", "attention", "router", "permutation", "loss", "balance")
MODULES = ("experts", "attention")  # replaced in the specification from which a model is built
GPT, LANGUAGE, MOE = (
    "megatron.core.models.gpt.gpt_model:GPTModel",
    "megatron.core.models.common.language_module.language_module:LanguageModule",
    "megatron.core.transformer.moe",
)
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
        (LANGUAGE, "compute_language_model_loss", loss.language_model_loss),
    ],
    "balance": [
        ("megatron.core.distributed.finalize_model_grads", "get_updated_expert_bias", routing.updated_expert_bias)
    ],
}
_stock: list[tuple[Any, str, Any]] = []  # what `undo` puts back: owner, name, value


def apply(parts: Collection[str] = PARTS, fp8: bool = False) -> None:
    """Replace these parts in this process, for every GPTModel that is built from now on.

    parts: of PARTS. fp8: products of experts, and of Megatron's own linear layers in attention and MLPs, are in block
    FP8; the head, the router and MTP's projection stay. A second call starts from Megatron's own again. Raises
    InputError for another name; building a model raises it for a configuration that our experts do not have.
    """
    unknown = sorted(set(parts) - set(PARTS))
    if unknown:
        raise InputError(f"no part {unknown[0]!r}; parts are {', '.join(PARTS)}")
    undo()
    for part in parts:
        for owner, name, make in FUNCTIONS.get(part, []):
            put(found(owner), name, make)
    modules = [part for part in MODULES if part in parts]
    if modules or fp8:
        put(found(GPT), "__init__", lambda stock: with_modules(stock, modules, fp8))


def undo() -> None:
    """Megatron's own functions and specifications again. A model that was built keeps its modules."""
    while _stock:
        setattr(*_stock.pop())


def put(owner: Any, name: str, make: Callable[[Callable], Callable]) -> None:
    stock = getattr(owner, name)
    _stock.append((owner, name, stock))
    setattr(owner, name, make(stock))


def found(owner: str) -> Any:
    module, _, of = owner.partition(":")
    imported = importlib.import_module(module)
    return getattr(imported, of) if of else imported


def with_modules(stock: Callable, parts: Collection[str], fp8: bool) -> Callable:
    """GPTModel.__init__ with replaced specifications."""
    arguments = signature(stock)

    @wraps(stock)
    def __init__(*args, **kwargs) -> None:
        given = arguments.bind(*args, **kwargs)
        for name in ("transformer_layer_spec", "mtp_block_spec"):
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
