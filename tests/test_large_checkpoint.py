"""Ling-1T by its official keys and shapes: all keys against ours, and some layers loaded from sparse files (zeros that
take no disk space) into a model on the meta device."""

import json
import struct
import warnings
from functools import cache
from math import prod

import pytest
import torch

from ling_kernels.errors import InputError
from ling_kernels.gpu import HOPPER
from ling_kernels.model import Ling, LingConfig, load_model
from ling_kernels.model.checkpoint import named_views
from ling_kernels.nn.fp8 import to_fp8
from ling_kernels.nn.fp8_inference import quantize_for_inference_
from ling_kernels.plan.decode import gpus, held_bytes

CONFIG = dict(
    architectures=["BailingMoeV2ForCausalLM"], model_type="bailing_moe", vocab_size=157184, hidden_size=8192,
    intermediate_size=18432, num_hidden_layers=80, first_k_dense_replace=4, num_attention_heads=64,
    num_key_value_heads=8, head_dim=128, rotary_dim=64, num_experts=256, num_experts_per_tok=8, n_group=8,
    topk_group=4, num_shared_experts=1, moe_intermediate_size=2048, use_qk_norm=True, rope_theta=600000,
    max_position_embeddings=32768, num_nextn_predict_layers=0, routed_scaling_factor=2.5,
)  # fmt: skip
SLICE = CONFIG | dict(num_hidden_layers=2, first_k_dense_replace=1, num_experts=16)  # loads in seconds
NORMS = {
    "input_layernorm.weight": (8192,), "post_attention_layernorm.weight": (8192,),
    "attention.query_layernorm.weight": (128,), "attention.key_layernorm.weight": (128,),
}  # fmt: skip
SIZES = {torch.bfloat16: ("BF16", 2), torch.float32: ("F32", 4), torch.float8_e4m3fn: ("F8_E4M3", 1)}


def mlp(name: str, size: int) -> dict[str, tuple]:
    halves = {f"{name}.{half}_proj.weight": (size, 8192) for half in ("gate", "up")}
    return halves | {f"{name}.down_proj.weight": (8192, size)}


def layer(i: int, config: dict, fp8: bool) -> dict[str, tuple]:
    matrices = {"attention.query_key_value.weight": (10240, 8192), "attention.dense.weight": (8192, 8192)}
    rest = {k: (torch.bfloat16, shape) for k, shape in NORMS.items()}
    if i < config["first_k_dense_replace"]:
        matrices |= mlp("mlp", 18432)
    else:
        E = config["num_experts"]
        rest |= {"mlp.gate.weight": (torch.bfloat16, (E, 8192)), "mlp.gate.expert_bias": (torch.float32, (E,))}
        for name in (*(f"experts.{e}" for e in range(E)), "shared_experts"):
            matrices |= mlp(f"mlp.{name}", 2048)
    if fp8:
        rest |= {f"{k}_scale_inv": (torch.float32, (n // 128, m // 128)) for k, (n, m) in matrices.items()}
    rest |= {k: (torch.float8_e4m3fn if fp8 else torch.bfloat16, shape) for k, shape in matrices.items()}
    return {f"model.layers.{i}.{k}": v for k, v in rest.items()}


@cache
def shards(kind: str, fp8: bool) -> dict[str, dict[str, tuple]]:
    """{file: {key: (dtype, shape)}}."""
    config, wide = SLICE if kind == "slice" else CONFIG, torch.bfloat16
    layers = {f"layer-{i}.safetensors": layer(i, config, fp8) for i in range(config["num_hidden_layers"])}
    ends = {"model.word_embeddings.weight": (wide, (157184, 8192)), "lm_head.weight": (wide, (157184, 8192))}
    first, last = ({k: v} for k, v in ends.items())
    return layers | {"first.safetensors": first, "last.safetensors": last | {"model.norm.weight": (wide, (8192,))}}


def write(folder, files: dict) -> None:
    """Write headers and an index, without data."""
    for name, tensors in files.items():
        header, end = {}, 0
        for key, (dtype, shape) in tensors.items():
            kind, size = SIZES[dtype]
            begin, end = end, end + size * prod(shape)
            header[key] = dict(dtype=kind, shape=shape, data_offsets=[begin, end])
        text = json.dumps(header).encode()
        with open(folder / name, "wb") as file:
            file.write(struct.pack("<Q", len(text)) + text)
            file.truncate(8 + len(text) + end)
    index = dict(weight_map={key: name for name, tensors in files.items() for key in tensors})
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text(json.dumps(SLICE))


@pytest.mark.parametrize("fp8", [False, True])
def test_every_tensor_of_ling_1t_is_mapped(tmp_path, fp8):
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    config = LingConfig.from_json(tmp_path / "config.json")
    assert config == LingConfig.one_t(), "rotary_dim gives partial_rotary_factor"
    with torch.device("meta"):
        model = Ling(config).bfloat16()
    if fp8:
        assert not to_fp8(model)[1]
        quantize_for_inference_(model)
    want = {key: value for tensors in shards("all", fp8).values() for key, value in tensors.items()}
    assert {key: (t.dtype, tuple(t.shape)) for key, t in named_views(model)} == want and len(want) > 58_000
    bytes_ = sum(SIZES[dtype][1] * prod(shape) for dtype, shape in want.values())
    bytes_of_parts = held_bytes(config, 1, 0, "fp8" if fp8 else "bf16")
    assert sum(bytes_of_parts.values()) == pytest.approx(bytes_, rel=1e-5)
    assert [gpus(bytes_of_parts, HOPPER[name].memory) for name in ("H100", "H200")] == ([13, 8] if fp8 else [25, 15])


@pytest.mark.parametrize("fp8", [False, True])
def test_some_layers_load(tmp_path, fp8):
    write(tmp_path, shards("slice", fp8))
    assert sum(file.stat().st_size for file in tmp_path.iterdir()) > 6e9
    assert sum(file.stat().st_blocks * 512 for file in tmp_path.iterdir()) < 1e6
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # for unused tensors
        model = load_model(tmp_path, device="meta", fp8=fp8)
    assert model.config.rotary_dim == 64 and len(model.layers) == 2 and not model.mtp
    if fp8:
        with pytest.raises(InputError, match="layer-1.*experts.9.up_proj.weight is FP8 and the checkpoint has no"):
            write(tmp_path, without(shards("slice", True), "model.layers.1.mlp.experts.9.up_proj.weight_scale_inv"))
            load_model(tmp_path, device="meta", fp8=True)


def without(files: dict, key: str) -> dict:
    return {name: {k: v for k, v in tensors.items() if k != key} for name, tensors in files.items()}


def test_a_shard_that_cannot_be_mapped(tmp_path, monkeypatch):
    """For example on a machine whose memory is smaller than the file."""
    import safetensors

    def refuse(*_):
        raise RuntimeError("unable to mmap 26176791467 bytes from file: Cannot allocate memory (12)")

    write(tmp_path, shards("slice", True))
    monkeypatch.setattr(safetensors, "safe_open", refuse)
    with pytest.raises(InputError, match="cannot read .*first.safetensors.*mmap"):
        load_model(tmp_path, device="meta")
