"""config.json as published: the spellings of each field, the values that the code assumes, and RoPE scaling.

The official files are those of Ling-V2 (transformers 4.52); transformers 5 moves the RoPE fields into rope_parameters.
"""

from typing import Any

import torch

from ..errors import InputError

# Fields that select a formula, with the values that mean the formula computed here. null means absent.
ASSUMED: dict[str, tuple] = {
    "model_type": ("bailing_moe", "bailing_moe_v2"),
    "hidden_act": ("silu", "swish"),
    "score_function": ("sigmoid",), "scoring_func": ("sigmoid",), "topk_method": ("noaux_tc",),
    "router_dtype": ("fp32", "float32"), "norm_topk_prob": (True,), "moe_router_enable_expert_bias": (True,),
    "use_rmsnorm": (True,), "norm_head": (False,), "tie_word_embeddings": (False,),
    "use_bias": (False,), "use_qkv_bias": (False,), "attention_bias": (False,), "mlp_bias": (False,),
    "use_sliding_window": (False,), "rope_interleave": (False,), "swiglu_limit": (None,), "swiglu_limits": (None,),
    "attention_dropout": (0,), "embedding_dropout": (0,), "output_dropout": (0,),
}  # fmt: skip
BLOCK_FP8 = dict(activation_scheme="dynamic", fmt="e4m3", quant_method="fp8", weight_block_size=[128, 128])
FP32 = torch.finfo(torch.float32)
ROPE = ("rope_theta", "partial_rotary_factor")  # fields of config.json that transformers 5 moves into rope_parameters
YARN = ("beta_fast", "beta_slow", "attention_factor")  # optional numbers of a YaRN scaling
# What the published classes take where a file lacks a field, as far as it is not the default of LingConfig.
ABSENT = dict(routed_scaling_factor=1.0, partial_rotary_factor=1.0)


def check(condition: bool, message: str) -> None:
    if not condition:
        raise InputError(message)


def is_number(value: Any) -> bool:
    """Whether a JSON value is a number that is finite in fp32, and 0 there only if it is 0."""
    is_one = isinstance(value, int | float) and not isinstance(value, bool)
    return is_one and (value == 0 or FP32.tiny <= abs(value) <= FP32.max)


def is_integer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def config_fields(content: dict, defaults: dict) -> dict:
    """Arguments of LingConfig from the content of a config.json: the fields it gives, and `other` for the rest.

    defaults: the value of every field that may be missing.
    Raises InputError for fields that contradict each other or ask for another formula than the code computes.
    """
    check_assumptions(content)
    check_quantization(content.get("quantization_config"))
    values = ABSENT | {k: v for k, v in content.items() if k in defaults}
    values |= rope_fields(content, defaults)
    used = {*values, "rope_parameters", "rotary_dim", "original_max_position_embeddings"}
    return values | {"other": {k: v for k, v in content.items() if k not in used}}


def check_assumptions(content: dict) -> None:
    """Raise InputError for a field of config.json that asks for another formula than the code computes."""
    for name, accepted in ASSUMED.items():
        value = content.get(name)
        check(value is None or value in accepted, f"{name} is {value!r}: only {accepted[0]!r} is supported")
    names = content.get("architectures") or []
    ours = isinstance(names, list) and all(str(name).startswith("BailingMoeV2") for name in names)
    check(ours, f"architectures is {names!r}: only BailingMoeV2ForCausalLM is supported")
    window = None if content.get("use_sliding_window") is False else content.get("sliding_window")
    check(window is None, f"sliding_window is {window!r}: attention has no window here")
    kinds = content.get("layer_types") or []
    full = isinstance(kinds, list) and all(kind == "full_attention" for kind in kinds)
    check(full, f"layer_types is {kinds!r}: only full_attention is supported")
    one, size = content.get("moe_intermediate_size"), content.get("moe_shared_expert_intermediate_size")
    if size is not None and is_integer(one):
        number = content.get("num_shared_experts", 1)
        sizes = (one, one * number if is_integer(number) else one)
        check(size in sizes, f"moe_shared_expert_intermediate_size is {size!r}, moe_intermediate_size {one}: both must"
              " agree")  # fmt: skip


def check_quantization(content: Any) -> None:
    """Raise InputError for a quantization_config other than FP8 E4M3 with one scale per 128x128 block."""
    if content is not None:
        given = content if isinstance(content, dict) else {}
        ours = "quant_method" in given and all(given.get(k) in (None, v) for k, v in BLOCK_FP8.items())
        check(ours, f"quantization_config is {content!r}: only quant_method fp8 with fmt e4m3, dynamic activations and"
              " weight_block_size [128, 128] is supported")  # fmt: skip


def rope_fields(content: dict, defaults: dict) -> dict:
    """rope_theta, partial_rotary_factor and rope_scaling of a config.json in any of its spellings."""
    full = defaults | content
    found: dict[str, dict] = {name: {name: content[name]} for name in ROPE if name in content}  # by spelling
    if content.get("rotary_dim") is not None:  # as in Ling-1T's config.json
        size, of = content["rotary_dim"], full["head_dim"]
        check(is_integer(size) and is_integer(of) and of > 0, f"rotary_dim is {size!r} of head_dim {of!r}")
        found.setdefault("partial_rotary_factor", {})["rotary_dim"] = size / of
    scalings = []
    for name in ("rope_scaling", "rope_parameters"):
        scaling = content.get(name) or {}
        check(isinstance(scaling, dict), f"{name} is {scaling!r}, neither an object nor null")
        for field in ROPE:
            if field in scaling:
                found.setdefault(field, {})[f"{name}.{field}"] = scaling[field]
        rest = {k: v for k, v in scaling.items() if k not in ROPE}
        length = content.get("original_max_position_embeddings")
        if rest.get("factor") is not None and length is not None:
            inside = rest.setdefault("original_max_position_embeddings", length)
            check(inside == length, f"original_max_position_embeddings is {length!r}, and {inside!r} in {name}")
        if rest:
            scalings.append(canonical_scaling(rest, full["max_position_embeddings"], name))
    values: dict = {}
    for field, given in found.items():
        values[field], *others = given.values()
        several = ", ".join(f"{spelling} {value!r}" for spelling, value in given.items())
        check(all(value == values[field] for value in others), f"{field} has several values: {several}")
    check(scalings[1:] in ([], scalings[:1]), "rope_scaling and rope_parameters contradict each other")
    return values | {"rope_scaling": scalings[0] if scalings else None}


def canonical_scaling(scaling: Any, positions: int, name: str = "rope_scaling") -> dict | None:
    """A RoPE scaling as None (plain), or {"type": "yarn", "factor", "original_max_position_embeddings", ...}.

    The type may be spelled `type` or `rope_type`; the original length defaults to `positions`, the configuration's
    max_position_embeddings, as in transformers. Raises InputError for anything that the code does not compute.
    """
    if not scaling:
        return None
    check(isinstance(scaling, dict), f"{name} is {scaling!r}, neither an object nor null")
    given = {k: v for k, v in scaling.items() if v is not None or k == "original_max_position_embeddings"}
    kinds = [given.pop(key) for key in ("type", "rope_type") if key in given]
    only = "only type yarn with a factor >= 1, or default, is supported"
    check(kinds != [] and all(kind == kinds[0] for kind in kinds), f"{name} {scaling}: {only}")
    if kinds[0] == "default":
        check(not given, f"{name} {scaling}: type default has no other keys")
        return None
    factor = given.pop("factor", None)
    check(kinds[0] == "yarn" and is_number(factor) and 1 <= factor <= 1 << 24, f"{name} {scaling}: {only}")
    length = given.pop("original_max_position_embeddings", positions)
    check(is_integer(length) and length >= 1,
          f"{name} {scaling}: original_max_position_embeddings is not an integer >= 1")  # fmt: skip
    check(given.pop("truncate", True) is True, f"{name} {scaling}: only truncate true is supported")
    numbers = {k: given.pop(k) for k in YARN if k in given}
    check(not given, f"{name} {scaling}: {', '.join(map(str, given))} is not supported")
    check(all(is_number(v) and 0 < v <= 1 << 24 for v in numbers.values()),
          f"{name} {scaling}: {', '.join(YARN)} are numbers > 0")  # fmt: skip
    return {"type": "yarn", "factor": factor, "original_max_position_embeddings": length, **numbers}
