"""Where the parameters of a Ling model are in a torch.distributed.checkpoint folder: under this package's names, under
official keys, or under Megatron-core's."""

import re
from collections.abc import Callable, Collection
from typing import NamedTuple

import torch
from torch import Tensor

from ..model import LingConfig
from ..parallel.official import Parameter

PREFIXES = ("", "model.", "module.")
OPTIMIZERS = ("optimizer.state.", "optim.state.", "state.")  # torch's flattened state, under what trainers call it
VOCABULARY = {"word_embeddings.weight": "embedding.word_embeddings.weight", "lm_head.weight": "output_layer.weight"}
MEGATRON = {  # of a layer; norms with the linear layer after them, as in Transformer Engine, or on their own
    "input_layernorm.weight": ("self_attention.linear_qkv.layer_norm_weight", "input_layernorm.weight"),
    "attention.query_layernorm": ("self_attention.q_layernorm.weight",),
    "attention.key_layernorm": ("self_attention.k_layernorm.weight",),
    "attention.query_key_value.weight": ("self_attention.linear_qkv.weight",),
    "attention.dense.weight": ("self_attention.linear_proj.weight",),
    "post_attention_layernorm.weight": ("pre_mlp_layernorm.weight", "mlp.linear_fc1.layer_norm_weight"),
    "mlp.gate_up.weight": ("mlp.linear_fc1.weight",),
    "mlp.down.weight": ("mlp.linear_fc2.weight",),
    "mlp.router.weight": ("mlp.router.weight",),
    "mlp.router.expert_bias": ("mlp.router.expert_bias",),
    "mlp.experts.gate_up": ("mlp.experts.experts.linear_fc1.weight",),
    "mlp.experts.down": ("mlp.experts.experts.linear_fc2.weight",),
    "mlp.shared_experts.gate_up.weight": ("mlp.shared_experts.linear_fc1.weight",),
    "mlp.shared_experts.down.weight": ("mlp.shared_experts.linear_fc2.weight",),
}


class Source(NamedTuple):
    """The names that a parameter comes from, and how."""

    names: list[str]
    make: Callable[[list[Tensor]], Tensor]


def source_of(name: str, parameter: Parameter, config: LingConfig, there: Collection[str]) -> Source | None:
    """Where a parameter, or an experts' bias, is among the names that are there; None: nowhere."""
    for prefix in PREFIXES:
        if prefix + name in there:
            return Source([prefix + name], lambda tensors: tensors[0])
    keys = [official.key for official in parameter.keys]
    if all(key in there for key in keys):
        return Source(keys, lambda tensors: from_official(parameter, tensors))
    for prefix in PREFIXES:
        for other in megatron_names(name):
            if prefix + other in there:
                return Source([prefix + other], lambda tensors: from_megatron(name, tensors[0], config))
    return None


def from_official(parameter: Parameter, tensors: list[Tensor]) -> Tensor:
    whole = torch.empty(parameter.shape, dtype=tensors[0].dtype)
    for official, t in zip(parameter.keys, tensors, strict=True):
        official.of(whole).copy_(t)
    return whole


def megatron_names(name: str) -> list[str]:
    """Megatron-core's names of one of our parameters."""
    if match := re.fullmatch(r"(layers\.\d+|mtp\.\d+\.layer)\.(.+)", name):
        layer = f"decoder.{match[1]}" if match[1].startswith("layers") else megatron_mtp(match[1])
        return [f"{layer}.{other}" for other in MEGATRON.get(match[2], ())]
    if name.startswith("mtp."):
        return [name.replace("mtp.", "mtp.layers.", 1)]
    return [{"norm.weight": "decoder.final_layernorm.weight", **VOCABULARY}.get(name, name)]


def megatron_mtp(layer: str) -> str:
    """mtp.0.layer -> mtp.layers.0.transformer_layer"""
    return f"mtp.layers.{layer.split('.')[1]}.transformer_layer"


def from_megatron(name: str, t: Tensor, config: LingConfig) -> Tensor:
    """Megatron has the heads of each key's group together, query, key and value, and fills up the vocabulary."""
    if name in VOCABULARY:
        return t[: config.vocab_size]
    if name.endswith("query_key_value.weight"):
        groups, D = config.num_key_value_heads, config.head_dim
        queries = config.num_attention_heads // groups * D
        parts = t.view(groups, -1, t.shape[-1]).split([queries, D, D], 1)
        return torch.cat([part.reshape(-1, t.shape[-1]) for part in parts])
    return t


def moment_of(name: str, parameters: Collection[str]) -> str | None:
    """NAME.KEY of a tensor of the optimizer's state; None for other tensors."""
    for start in OPTIMIZERS:
        for prefix in PREFIXES:
            key = name.removeprefix(start + prefix)
            if key != name and key.rpartition(".")[0] in parameters:
                return key
    return None
