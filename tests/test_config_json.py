"""config.json: every published spelling gives the same configuration, and other formulas are refused in one line."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from ling_kernels.errors import InputError
from ling_kernels.generate import Engine
from ling_kernels.generate.cli import stop_token_ids
from ling_kernels.model import Ling, LingConfig, load_model, save_model
from ling_kernels.tokenizer import load_tokenizer
from tests.training import tiniest

BASE = json.loads((Path(__file__).parent / "data/base/config.json").read_text()) | dict(
    head_dim=32
)  # theta 10000, rotary 16 of 32
YARN = dict(type="yarn", factor=4.0, original_max_position_embeddings=32)
ROPE = ("rope_theta", "partial_rotary_factor", "rope_scaling")


@pytest.fixture
def read(tmp_path):
    """read(changes) -> the configuration of BASE with changes; a field that is ... is left out."""

    def config(changes: dict) -> LingConfig:
        content = {k: v for k, v in (BASE | changes).items() if v is not ...}
        (tmp_path / "config.json").write_text(json.dumps(content))
        return LingConfig.from_json(tmp_path / "config.json")

    return config


WITHOUT = dict.fromkeys(ROPE, ...)
PLAIN = {
    "transformers 4": {},
    "type default": dict(rope_scaling=dict(type="default")),
    "rope_type default": dict(rope_scaling=dict(rope_type="default", type=None)),
    "empty": dict(rope_scaling={}, rope_parameters=None),
    "rotary_dim": dict(partial_rotary_factor=..., rotary_dim=16),
    "rotary_dim beside the factor": dict(rotary_dim=16),
    "transformers 5": WITHOUT
    | dict(rope_parameters=dict(rope_type="default", rope_theta=10000.0, partial_rotary_factor=0.5)),
    "transformers 5, no type": WITHOUT | dict(rope_parameters=dict(rope_theta=10000.0, partial_rotary_factor=0.5)),
    "transformers 5 beside 4": dict(rope_parameters=dict(rope_type="default", rope_theta=10000.0)),
    "no window": dict(sliding_window=None, use_sliding_window=False, layer_types=["full_attention"] * 2),
    "an unused window": dict(sliding_window=4096, use_sliding_window=False),
    "another name": dict(hidden_act="swish", model_type="bailing_moe_v2", router_dtype="float32"),
}
STRETCHED = {
    "type": dict(rope_scaling=YARN),
    "rope_type": dict(rope_scaling=dict(YARN, type=None, rope_type="yarn")),
    "both": dict(rope_scaling=dict(YARN, rope_type="yarn", beta_fast=None)),
    "an integer factor": dict(rope_scaling=dict(YARN, factor=4, truncate=True)),
    "theta inside": dict(rope_scaling=dict(YARN, rope_theta=10000.0)),
    "the length outside": dict(rope_scaling=dict(type="yarn", factor=4.0), original_max_position_embeddings=32),
    "the length by default": dict(rope_scaling=dict(type="yarn", factor=4.0), max_position_embeddings=32),
    "transformers 5": WITHOUT
    | dict(rope_parameters=dict(YARN, rope_type="yarn", rope_theta=10000.0, partial_rotary_factor=0.5)),
    "both files": dict(rope_scaling=YARN, rope_parameters=dict(YARN, rope_theta=10000.0)),
}
STRETCHED["transformers 5"]["rope_parameters"].pop("type")


@pytest.mark.parametrize("how", PLAIN)
def test_plain_rope(read, how):
    config = read(PLAIN[how])
    assert (config.rope_theta, config.rotary_dim, config.rope_scaling) == (10000.0, 16, None)
    assert config == read({})


@pytest.mark.parametrize("how", STRETCHED)
def test_yarn(read, how):
    config = read(STRETCHED[how])
    assert (config.rope_theta, config.rotary_dim, config.rope_scaling) == (10000.0, 16, YARN)
    assert config.max_positions == 128


def test_every_rotary_dim_is_exact(read):
    for size in range(2, 129, 2):
        assert read(dict(head_dim=128, rotary_dim=size, partial_rotary_factor=...)).rotary_dim == size
        assert read(dict(head_dim=98, rotary_dim=min(size, 98), partial_rotary_factor=...)).rotary_dim == min(size, 98)


def test_missing_fields_are_those_of_the_published_classes(read):
    """configuration_bailing_moe_v2.py has routed_scaling_factor 1.0; modeling_bailing_moe_v2.py rotates whole heads
    where there is no partial_rotary_factor."""
    config = read(dict(routed_scaling_factor=..., partial_rotary_factor=...))
    assert config.routed_scaling_factor == 1.0 and config.rotary_dim == config.head_dim == 32
    everything = read(dict.fromkeys(BASE, ...))
    assert everything == replace(LingConfig.mini(), routed_scaling_factor=1.0, partial_rotary_factor=1.0)


def test_written_config_is_read_again(tmp_path):
    """rope_scaling in a constructor takes the same spellings; what transformers 5 wrote is not repeated beside it."""
    config = replace(LingConfig.tiny(), rope_scaling=dict(rope_type="yarn", factor=2), eos_token_id=[257, 260])
    assert config.rope_scaling == dict(type="yarn", factor=2, original_max_position_embeddings=1024)
    config = replace(config, other=dict(attention_dropout=0.0))
    config.to_json(tmp_path / "config.json")
    assert LingConfig.from_json(tmp_path / "config.json") == config
    LingConfig.from_json(tmp_path / "config.json").to_json(tmp_path / "again.json")
    assert (tmp_path / "again.json").read_bytes() == (tmp_path / "config.json").read_bytes()
    (tmp_path / "config.json").write_text(
        json.dumps(BASE | dict(rope_theta=5e5) | dict(rope_parameters=dict(rope_theta=5e5)))
    )
    LingConfig.from_json(tmp_path / "config.json").to_json(tmp_path / "config.json")
    written = json.loads((tmp_path / "config.json").read_text())
    assert written["rope_theta"] == 5e5 and "rope_parameters" not in written


REFUSED = [
    *(dict([pair]) for pair in dict(
        score_function="softmax", norm_topk_prob=False, hidden_act="gelu", use_bias=True, use_qkv_bias=True,
        attention_bias=True, mlp_bias=True, use_rmsnorm=False, moe_router_enable_expert_bias=False, model_type="llama",
        sliding_window=128, use_sliding_window=True, tie_word_embeddings=True, router_dtype="bf16",
        layer_types=["full_attention", "sliding_attention"], architectures=["LlamaForCausalLM"], norm_head=True,
        moe_shared_expert_intermediate_size=64, attention_dropout=0.1, scoring_func="softmax",
        swiglu_limit=7.0, swiglu_limits=[7.0, None],
    ).items()),
    *(dict(quantization_config=value) for value in (
        dict(quant_method="gptq", bits=4), dict(quant_method="fp8", weight_block_size=[64, 64]), {}, "fp8",
        dict(quant_method="fp8", fmt="e5m2"), dict(quant_method="fp8", activation_scheme="static"),
    )),
    *(dict(rope_scaling=value) for value in (
        "yarn", ["yarn"], True, dict(type="linear", factor=2.0), dict(factor=2.0), dict(type="yarn"),
        dict(YARN, factor="4"), dict(YARN, factor=0.5), dict(YARN, factor=True), dict(YARN, factor=float("inf")),
        dict(YARN, factor=1e7), dict(YARN, factor=1e308),
        dict(YARN, original_max_position_embeddings=None), dict(YARN, rope_type="linear"),
        dict(YARN, original_max_position_embeddings="32"), dict(YARN, truncate=False), dict(YARN, mscale=1.0),
        dict(YARN, beta_fast="32"), dict(YARN, rope_theta=5.0), dict(type="default", factor=2.0),
        dict(full_attention=YARN), dict(type=["yarn"], factor=2.0), dict(YARN, attention_factor=0),
        dict(YARN, attention_factor=1e308),
    )),
    dict(original_max_position_embeddings=16, rope_scaling=YARN),
    dict(rope_parameters=dict(rope_theta=600000.0)), dict(rope_parameters=YARN, rope_scaling=dict(YARN, factor=2.0)),
    dict(rope_parameters=dict(rope_type="default"), rope_scaling=YARN), dict(rope_parameters=3),
    dict(rotary_dim=8), dict(rotary_dim="16", partial_rotary_factor=...),
    *(dict(partial_rotary_factor=value) for value in (None, 1.5, 1e308)),
    *(dict(rope_theta=value) for value in (None, "10000", 0, -1, float("nan"), True, 10**400)),
    *(dict(rms_norm_eps=value) for value in (None, "1e-6", 0, -1e-6, float("nan"), [], 1e-300, 1e300)),
    *(dict(routed_scaling_factor=value) for value in (None, "2.5", 0, float("inf"))),
    *(dict(hidden_size=value) for value in (None, True, 64.0, 1 << 40)), dict(max_position_embeddings=1 << 30),
    *(dict(eos_token_id=value) for value in ([], "1", [1, None], [1, "2"], -1, [-1], 1.0, {}, True)),
    dict(pad_token_id="0"), dict(use_qk_norm=None), dict(mtp_loss_scaling_factor=-1), dict(initializer_range=None),
]  # fmt: skip


@pytest.mark.parametrize("changes", REFUSED, ids=lambda c: " ".join(f"{k}={v}" for k, v in c.items())[:60])
def test_other_formulas_and_bad_values_are_refused_in_one_line(read, tmp_path, changes):
    with pytest.raises(InputError) as refused:
        read(changes)
    message = str(refused.value)
    assert message.startswith(f"{tmp_path / 'config.json'}: ") and "\n" not in message
    assert any(name in message for name in changes), "the message names the field"


@pytest.mark.parametrize("content", [b"{", b"[]", b"\xff", b"[" * 100_000, b'{"vocab_size": ' + b"9" * 5000 + b"}"])
def test_files_that_are_not_json_objects(tmp_path, content):
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(InputError, match="config.json"):
        LingConfig.from_json(tmp_path / "config.json")


def test_null_means_absent(read):
    names = ("score_function", "norm_topk_prob", "use_bias", "sliding_window", "layer_types", "quantization_config")
    assert read(dict.fromkeys(names)) == read({})
    assert read(dict(eos_token_id=None, pad_token_id=None)).eos_token_ids == ()


def test_every_end_token_is_kept_and_ends_a_text(tmp_path):
    """Read, saved, and in the defaults of the engine and of the command line."""
    model = Ling(replace(tiniest(), eos_token_id=[257, 300]))
    model.init_weights(torch.Generator().manual_seed(0))
    save_model(model, tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["eos_token_id"] == [257, 300]
    loaded = load_model(tmp_path, dtype=torch.float32)
    assert loaded.config.eos_token_ids == (257, 300)
    assert Engine(loaded).submit([1, 2]).stop_token_ids == {257, 300}
    assert {257, 300} <= stop_token_ids(loaded.config, load_tokenizer(), tmp_path)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": null}')
    assert None not in stop_token_ids(loaded.config, load_tokenizer(), tmp_path)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": "x"}')
    with pytest.raises(InputError, match="generation_config.json: eos_token_id"):
        stop_token_ids(loaded.config, load_tokenizer(), tmp_path)


def test_generate_stops_at_any_of_several_end_tokens():
    model = Ling(tiniest()).eval()
    model.init_weights(torch.Generator().manual_seed(0))
    tokens = iter([[5, 7], [9, 1], [2, 8], [3, 3]])

    def choose(logits, ids):
        return torch.tensor(next(tokens))

    out = model.generate(torch.ones(2, 3, dtype=torch.long), 4, choose=choose, eos_token_id=[7, 9])
    assert out[:, 3:].tolist() == [[5, 9], [7, 7]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("key", ["torch_dtype", "dtype"])
def test_the_type_of_the_saved_weights(tmp_path, dtype, key):
    """Both spellings that a file may have are those of the weights beside it, not of the checkpoint they came from."""
    model = Ling(replace(tiniest(), other={key: "float64"}))
    model.init_weights(torch.Generator().manual_seed(0))
    save_model(model, tmp_path, dtype=dtype)
    written = json.loads((tmp_path / "config.json").read_text())
    assert {written[k] for k in ("torch_dtype", key)} == {str(dtype).removeprefix("torch.")}


def test_a_long_value_is_cut_out_of_the_message(read):
    with pytest.raises(InputError, match="architectures is .* is supported") as refused:
        read(dict(architectures="x" * 3000 + "\n" + "y" * 3000))
    assert len(str(refused.value)) < 1000 and "\n" not in str(refused.value)


def test_more_layers_than_can_be_built_are_refused(read):
    assert read(dict(num_hidden_layers=1024)).num_hidden_layers == 1024
    for layers in (1025, 1 << 20):
        with pytest.raises(InputError, match="num_hidden_layers"):
            read(dict(num_hidden_layers=layers))
