"""patch(model): the modules of a transformers model compute with our ops; unpatch(model) brings their own back.

Parameters, keys and results stay as they are. Models of version 5 get the registered functions of functions.py, a
forward for their norms, and one with a fused loss for the classes in `LOSSES`. The official code for version 4 gets a
forward for each kind of its modules (remote.py).
"""

import copy
import functools
import sys
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.functional import pad
from transformers import PreTrainedModel
from transformers.modeling_outputs import MoeCausalLMOutputWithPast

from ...errors import InputError
from ...model.config import LingConfig
from ...model.config_json import config_fields
from ...ops.rms_norm import rms_norm_ref
from .functions import NAME, refuse_experts, rms_norm_forward
from .loss import IGNORE, causal_loss, head_fits, shifted
from .names import CACHE
from .remote import bailing_attention_forward, block_forward, gate_forward, lay_out

Patched = TypeVar("Patched")  # a PreTrainedModel, or a class of them

OFFICIAL = "BailingMoeV2"  # names of the official code's classes begin so
KINDS = {"Gate": gate_forward, "SparseMoeBlock": block_forward, "Attention": bailing_attention_forward,
         "SdpaAttention": bailing_attention_forward, "FlashAttention2": bailing_attention_forward}  # fmt: skip
LOSSES = (f"{OFFICIAL}ForCausalLM", "Glm4MoeForCausalLM", "Qwen3MoeForCausalLM")  # whose logits are lm_head's, unscaled
WINDOWS = ("sliding_window", "attention_chunk_size", "attn_logit_softcapping", "swiglu_limit", "swiglu_limits")
BEFORE = "_before_ling_kernels"  # attribute of a patched model or class


def patch(model: Patched) -> Patched:
    """Let a model, or all later instances of a class, compute with our ops, and return it.

    Of a model with weights of its own for each expert, `patch` moves these weights into one tensor: patch it after
    loading, and again after moving it to another device or dtype, or each forward copies them. Raises InputError where
    the configuration asks for a formula that no kernel computes, and where nothing would be replaced.
    """
    expect_model(model)
    return patch_class(model) if isinstance(model, type) else patch_model(model)


def unpatch(model: Patched) -> Patched:
    """Undo `patch`, of a model or of a class, and return it. Instances of the class made meanwhile stay patched."""
    expect_model(model)
    before = model.__dict__.get(BEFORE)
    if before is None:
        raise InputError(f"{getattr(model, '__name__', type(model).__name__)} is not patched")
    if isinstance(model, type):
        model.__init__ = before  # type: ignore[misc]
        delattr(model, BEFORE)
        return model
    for module, forward in before["modules"]:
        attribute = forward_name(module)
        if forward is None and attribute == "forward":
            delattr(module, attribute)
        else:
            setattr(module, attribute, type(module).forward.__get__(module) if forward is None else forward)
    for name, value in (before["implementations"] or {}).items():
        getattr(model, f"set_{name}_implementation")(value)
    del model.__dict__[BEFORE]
    return model


def patch_model(model: Any) -> Any:
    refuse_config(model)
    before = model.__dict__.get(BEFORE) or dict(modules=[], implementations=None)
    if before["implementations"] is None and hasattr(model, "set_experts_implementation"):  # version 5
        own_config(model)
        before["implementations"] = set_implementations(model)
    patched = {id(module) for module, _ in before["modules"]}
    for module in model.modules():
        if type(module).__name__ == f"{OFFICIAL}SparseMoeBlock":
            lay_out(module.experts)
        forward = replacement(module)
        if forward is not None and id(module) not in patched:
            attribute = forward_name(module)
            before["modules"].append((module, module.__dict__.get(attribute)))
            # Neither a method, which pickle would look for in the module's class, nor without the signature there.
            bound = functools.partial(forward, module)
            setattr(module, attribute, functools.update_wrapper(bound, type(module).forward.__get__(module)))
    if not before["modules"] and not before["implementations"]:
        raise InputError(f"{type(model).__name__} has no module that ling_kernels replaces")
    model.__dict__[BEFORE] = before
    return model


def own_config(model: Any) -> None:
    """Give the model a copy of its configuration, in which the functions are chosen: other models may have been made
    with the same object, and must not be switched with this one."""
    copies: dict[int, Any] = {}
    copy.deepcopy(model.config, copies)
    for module in model.modules():
        if id(module.__dict__.get("config")) in copies:
            module.config = copies[id(module.config)]


def expect_model(model: Any) -> None:
    if not (issubclass(model, PreTrainedModel) if isinstance(model, type) else isinstance(model, PreTrainedModel)):
        kind = f"the class {model.__name__}" if isinstance(model, type) else type(model).__name__
        raise InputError(f"{kind} is no PreTrainedModel of transformers; of a wrapped model (PEFT, torch.compile, DDP),"
                         " patch the model inside")  # fmt: skip


def forward_name(module: nn.Module) -> str:
    """The attribute of a module's forward, around which accelerate's hooks stay."""
    return "_old_forward" if hasattr(module, "_hf_hook") else "forward"


def patch_class(kind: Any) -> Any:
    if BEFORE in kind.__dict__:
        return kind
    original = kind.__init__

    @functools.wraps(original)
    def init(self, *args, **kwargs):
        original(self, *args, **kwargs)
        patch(self)

    setattr(kind, BEFORE, original)
    kind.__init__ = init
    return kind


def set_implementations(model: PreTrainedModel) -> dict[str, str]:
    """Choose our registered functions where the model can; returns what was chosen before, by kind."""
    before = {}
    for module in model.modules():
        if hasattr(type(module), "_apply_gate"):
            refuse_experts(module)
            before["experts"] = model.config._experts_implementation
    if type(model)._can_set_attn_implementation():
        before["attn"] = model.config._attn_implementation
    for name in before:
        getattr(model, f"set_{name}_implementation")(NAME)
    return before


def refuse_config(model: PreTrainedModel) -> None:
    """Raise InputError for fields of the configuration that ask for another formula than the kernels compute."""
    config = model.config
    if type(model).__name__.startswith(OFFICIAL):
        content = {k: v for k, v in config.to_dict().items() if v != ""}
        LingConfig(**config_fields(content, {}))
        if not config.use_qk_norm:
            raise InputError("use_qk_norm is False: no kernel rotates heads without their norm")
    windows = [f"{name} {getattr(config, name)}" for name in WINDOWS if getattr(config, name, None)]
    if windows and getattr(config, "use_sliding_window", True):
        raise InputError(f"ling_kernels has no kernel for {', '.join(windows)} of {type(config).__name__}")


def replacement(module: nn.Module) -> Callable[..., Any] | None:
    """The forward that takes the place of a module's own, or None."""
    kind: Any = type(module)
    name = kind.__name__
    if name in LOSSES:
        return fused_loss_forward
    if name.startswith(OFFICIAL) and name.removeprefix(OFFICIAL) in KINDS:
        return KINDS[name.removeprefix(OFFICIAL)]
    return rms_norm_forward if name.endswith("RMSNorm") and is_rms_norm(kind) else None


@functools.cache
def is_rms_norm(kind: Any) -> bool:
    """Whether modules of a class with `weight` and `variance_epsilon` compute x * rstd * weight: tried on two rows, as
    others of that name have 1 + weight, or a bias."""
    with torch.device("cpu"), torch.no_grad():
        probe = kind.__new__(kind)
        nn.Module.__init__(probe)
        generator = torch.Generator().manual_seed(0)
        x, weight = (torch.randn(*shape, generator=generator) for shape in ((2, 8), (8,)))
        probe.weight, probe.variance_epsilon = nn.Parameter(weight), 0.1
        try:
            y = kind.forward(probe, x)
        except Exception:  # it needs more than these
            return False
        return isinstance(y, Tensor) and torch.allclose(y, rms_norm_ref(x, weight, None, 0.1), atol=1e-5)


def fused_loss_forward(self, *args, labels=None, **kwargs):
    """The forward of a language model, which in training computes the loss without logits and returns none.

    MTP losses of the official code keep its targets, which at the end of each row but the last are the next row's.
    """
    config = self.config
    plain = labels is not None and len(args) < 2 and kwargs.get("return_dict", True) is not False
    fits = self.training and plain and head_fits(self.lm_head, config.hidden_size)
    if not fits or kwargs.get("output_router_logits", getattr(config, "output_router_logits", False)):
        return type(self).forward(self, *args, labels=labels, **kwargs)
    items, targets = kwargs.pop("num_items_in_batch", None), kwargs.pop("shift_labels", None)
    kwargs.pop("logits_to_keep", None)
    outputs = self.model(*args, **kwargs)
    targets = shifted(labels) if targets is None else targets
    loss = causal_loss(self.lm_head, outputs.last_hidden_state, targets, items)
    output = getattr(sys.modules[type(self).__module__], "MoEV2CausalLMOutputWithPast", MoeCausalLMOutputWithPast)
    names = (CACHE, "hidden_states", "attentions")
    result = output(**{name: outputs.get(name) for name in names})
    mtp = getattr(outputs, "mtp_hidden_states", None) or []
    losses = []
    for k, hidden in enumerate(mtp, 1):
        flat = pad(shifted(labels, k).flatten(), (0, 1), value=IGNORE)[1:]
        losses.append(causal_loss(self.lm_head, hidden, flat, items))
        loss = loss + config.mtp_loss_scaling_factor * losses[-1]
    if losses:
        result["mtp_loss"] = losses
    result["loss"] = loss
    return result
