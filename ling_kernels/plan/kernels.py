"""Which kernels a model's size runs on a Hopper GPU, and what it loses: `python -m ling_kernels.info --model NAME`."""

import warnings
from collections import Counter
from dataclasses import replace

import torch
from torch._subclasses import FakeTensorMode

from .. import backend as backends
from ..backend import force
from ..model import Ling, LingConfig
from ..model.transformer import Layer
from ..nn import BatchLayout
from ..nn.fp8 import to_fp8
from ..nn.fp8_inference import quantize_for_inference_
from ..op import Choices, explain
from ..ops.attention_decode import KVCache
from ..ops.rope_tables import rope_tables

TOKENS = 4096  # of the training step; the choice of a kernel does not depend on it
REQUESTS = 8  # of the decode step, the most that `moe_decode` supports


def build(kind: type, *args):
    """A module with bf16 parameters; fake ones cannot be cast."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        return kind(*args)
    finally:
        torch.set_default_dtype(before)


def training_step(config: LingConfig, fp8: bool) -> Choices:
    """Forward and backward of one dense and one MoE layer, embedding and loss."""
    model = build(
        Ling, replace(config, num_hidden_layers=2, first_k_dense_replace=1, num_nextn_predict_layers=0)
    )  # fmt: skip
    if fp8:
        to_fp8(model)
    ids = torch.zeros(1, min(TOKENS, config.max_positions), dtype=torch.int64)
    ends = torch.tensor([0, ids.numel()], dtype=torch.int32)
    return explain(lambda: model(ids, labels=ids, cu_seqlens=ends, logits=False, z_loss=1e-3).loss)


@torch.no_grad()
def decode_layer(config: LingConfig, fp8: bool) -> Choices:
    """One MoE layer of a decode step."""
    layer = build(Layer, config, False)
    if fp8:
        to_fp8(layer)
        quantize_for_inference_(layer)
    B, Hkv, D = REQUESTS, config.num_key_value_heads, config.head_dim
    cache = KVCache(*(torch.empty(B, 64, Hkv, D, dtype=torch.bfloat16) for _ in range(2)))
    cos, sin = rope_tables(64, config.rotary_dim, config.rope_theta, None, torch.device("cpu"))
    zeros = torch.zeros(B, dtype=torch.int32)
    batch = BatchLayout(
        cos, sin, positions=zeros, cu_seqlens=zeros[:1], slots=zeros.long(), decoding=B, block_table=zeros[:, None],
        lengths=zeros + 1,
    )  # fmt: skip
    return explain(layer, torch.empty(B, config.hidden_size, dtype=torch.bfloat16), batch, cache)


STEPS = {
    "training, bf16": (training_step, False),
    "training, FP8": (training_step, True),
    "decode layer, bf16": (decode_layer, False),
    "decode layer, FP8": (decode_layer, True),
}


def model_kernels(config: LingConfig) -> dict[str, Choices]:
    """The launchers of each of STEPS on a Hopper GPU for which csrc/ is built, on any machine; nothing is computed."""
    with force("cuda"), FakeTensorMode(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return {name: step(config, fp8) for name, (step, fp8) in STEPS.items()}


def lines(config: LingConfig) -> list[str]:
    """What `info --model` prints: for each step its launchers, and those that csrc/ does not support, with the reason.

    The number of launchers is compared with Ling-mini's, whose sizes csrc/ supports.
    """
    supported, out = model_kernels(LingConfig.mini()), []
    for name, choices in model_kernels(config).items():
        launches, best = launches_of(choices), launches_of(supported[name])
        parts = ", ".join(f"{n} {kind}" for kind, n in launches.most_common())
        more = launches.total() - best.total()
        lost = f"; {more} more than with sizes that csrc/ supports" if more > 0 else ""
        out.append(f"{name:<20}{launches.total()} launchers of this package: {parts}{lost}")
        usual = {(c.name, c.reason) for c in supported[name]}
        fallbacks = dict.fromkeys(c for c in choices if c.reason and (c.name, c.reason) not in usual)
        if name.startswith("decode"):
            out.append("    " + ", ".join(c.name for c in choices if not c.implementation.startswith("composed")))
        out += [f"    {choice}" for choice in fallbacks]
    if backends._C is None:
        out.append(f"not checked: whether 8 rows fit a block's shared memory in moe_decode ({backends._C_missing})")
    return out


def launches_of(choices: Choices) -> Counter:
    """The number of launchers of each implementation."""
    return Counter(c.implementation for c in choices if not c.implementation.startswith("composed"))
