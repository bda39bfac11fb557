"""LingForCausalLM against the official model's results, and its checkpoints against ling_kernels' own."""

import json

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM

import ling_kernels.integrations.transformers as ling_transformers
from ling_kernels.errors import InputError
from ling_kernels.model import Ling, LingConfig, load_model, save_model
from ling_kernels.model.checkpoint import named_views
from ling_kernels.nn.fp8 import to_fp8
from ling_kernels.nn.fp8_inference import quantize_for_inference_
from tests.integrations.official import (
    DATA,
    NAMES,
    TOLERANCE,
    checkpoint,
    expected,
    greedy,
    last_logits_of_left_padded,
)

close = torch.testing.assert_close


def load(folder, **kwargs):
    return AutoModelForCausalLM.from_pretrained(folder, **{"dtype": torch.float32, **kwargs}).eval()


@pytest.fixture(scope="module", params=NAMES)
def official(request, tmp_path_factory):
    """(name, folder, model, expected results)"""
    folder = checkpoint(request.param, tmp_path_factory.mktemp(request.param))
    return request.param, folder, load(folder), expected(request.param)


def gradient_of(model, key):
    """The gradient of a published key."""
    parameters = dict(model.named_parameters())
    if ".experts." in key:
        prefix, _, rest = key.partition(".experts.")
        e, kind, _ = rest.split(".")
        stacked = parameters[f"{prefix}.experts.{'down_proj' if kind == 'down_proj' else 'gate_up_proj'}"].grad[int(e)]
        return stacked if kind == "down_proj" else stacked.chunk(2)[kind == "up_proj"]
    return parameters[key].grad


def test_forward_and_hidden_states(official):
    name, _, model, want = official
    with torch.no_grad():
        out = model(input_ids=want["input_ids"], use_cache=False, output_hidden_states=True)
    close(out.logits, want["logits"], **TOLERANCE)
    for i, state in enumerate(out.hidden_states[1:], 1):
        close(state, want[f"hidden.{i}"], **TOLERANCE)


@pytest.mark.parametrize("recompute", [False, True])
def test_loss_and_gradients(official, recompute):
    """Of mtp1, the gradients that its file has belong to a loss whose MTP targets leave the document; ours do not."""
    name, _, model, want = official
    model.train()
    model.zero_grad()
    if recompute:
        model.gradient_checkpointing_enable()
    out = model(input_ids=want["input_ids"], labels=want["labels"])
    out.loss.backward()
    model.gradient_checkpointing_disable()
    model.eval()
    assert out.logits is None
    if name == "mtp1":
        close(out.mtp_loss, want["loss.mtp_clean"], **TOLERANCE)
        close(out.loss, want["loss.total_clean"], **TOLERANCE)
    else:
        close(out.loss, want["loss.total"], **TOLERANCE)
        for key, gradient in want.items():
            if key.startswith("grad."):
                close(gradient_of(model, key.removeprefix("grad.")), gradient, **TOLERANCE)
    with torch.no_grad():
        evaluated = model(input_ids=want["input_ids"], labels=want["labels"])
    close(evaluated.loss, out.loss.detach())
    close(evaluated.logits, want["logits"], **TOLERANCE)


def test_mtp_gradients_are_our_models(tmp_path):
    want = expected("mtp1")
    model, ours = load(checkpoint("mtp1", tmp_path)).train(), load_model(DATA / "mtp1", torch.float32).train()
    mask = torch.ones_like(want["input_ids"])
    mask[0, :3] = 0  # left padding
    mask[1, -2:] = 0  # right padding
    labels = want["labels"].masked_fill(mask == 0, -100)
    labels[0, 3] = -100  # which transformers would predict from the padding before it
    model(input_ids=want["input_ids"], labels=labels, attention_mask=mask).loss.backward()
    ours(want["input_ids"], labels, mask).loss.backward()
    for key, view in named_views_of_gradients(ours):
        close(gradient_of(model, key), view, rtol=1e-4, atol=1e-6)


def named_views_of_gradients(model):
    """(published key, gradient): the views of a model whose weights are their gradients."""
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(p.grad)
    return [(key, view) for key, view in named_views(model) if "expert_bias" not in key]


def test_generate(official):
    name, _, model, want = official
    assert torch.equal(greedy(model, want["generate.prompt"]), want["generate.greedy"])
    assert torch.equal(greedy(model, want["generate.prompt"], use_cache=False), want["generate.greedy"])
    close(last_logits_of_left_padded(model, want), want["leftpad.logits_last"], **TOLERANCE)


def test_generate_from_left_padded_prompts(official):
    name, _, model, want = official
    long, short = want["generate.prompt"][0], want["generate.prompt"][1, :5]
    batch = torch.stack([long, torch.cat([torch.zeros(3, dtype=torch.long), short])])
    mask = torch.ones_like(batch)
    mask[1, :3] = 0
    both = greedy(model, batch, attention_mask=mask)
    for i, prompt in enumerate((long, short)):
        assert torch.equal(both[i, 8:], greedy(model, prompt[None])[0, len(prompt) :])


@pytest.mark.parametrize("name", ["sdpa", "eager"])
def test_other_implementations_agree(official, name):
    _, folder, model, want = official
    other = load(folder, attn_implementation=name, experts_implementation="eager" if name == "eager" else "grouped_mm")
    assert (other.config._attn_implementation, model.config._attn_implementation) == (name, "ling_kernels")
    mask = torch.ones_like(want["input_ids"])
    mask[0, :3] = 0
    with torch.no_grad():
        a, b = (m(input_ids=want["input_ids"], attention_mask=mask).logits[mask.bool()] for m in (model, other))
    close(a, b, **TOLERANCE)


@pytest.mark.parametrize("implementation", ["ling_kernels", "sdpa"])
@pytest.mark.parametrize("use_cache", [False, True])
def test_packed_documents(official, implementation, use_cache):
    """By position ids, and by cu_seq_lens_q; in a model's forward a cache is the default, in training too."""
    _, folder, _, want = official
    model = load(folder, attn_implementation=implementation)
    ids = want["input_ids"][:1, :20]
    positions = torch.cat([torch.arange(8), torch.arange(12)])[None]
    with torch.no_grad():
        packed = model(input_ids=ids, position_ids=positions, use_cache=use_cache).logits
        apart = torch.cat([model(input_ids=part).logits for part in ids.split([8, 12], 1)], 1)
        close(packed, apart, **TOLERANCE)
        if implementation == "ling_kernels":
            bounds = torch.tensor([0, 8, 20])
            given = model(input_ids=ids, position_ids=positions, cu_seq_lens_q=bounds, use_cache=use_cache).logits
            close(given, packed)


def test_saves_what_was_published(official, tmp_path):
    name, folder, model, want = official
    model.save_pretrained(tmp_path)
    saved, published = load_file(tmp_path / "model.safetensors"), load_file(folder / "model.safetensors")
    assert set(saved) == set(published)
    assert all(torch.equal(saved[key].to(value.dtype), value) for key, value in published.items())
    ours = load_model(tmp_path, torch.float32)
    assert set(saved) == {key for key, _ in named_views(ours)}  # one set of keys, written down twice
    assert ours.config == load_model(DATA / name).config
    with torch.no_grad():
        close(ours(want["input_ids"]).logits, want["logits"], **TOLERANCE)
    content = json.loads((tmp_path / "config.json").read_text())
    assert (content["model_type"], content["architectures"]) == ("bailing_moe", ["BailingMoeV2ForCausalLM"])
    assert content["torch_dtype"] == "float32" and "rope_parameters" not in content


def test_loads_what_ling_kernels_saved(official, tmp_path):
    name, _, _, want = official
    save_model(load_model(DATA / name, torch.float32), tmp_path, torch.float32)
    with torch.no_grad():
        close(load(tmp_path)(input_ids=want["input_ids"]).logits, want["logits"], **TOLERANCE)


def test_bf16_keeps_the_bias_and_the_rotation_in_fp32(official):
    _, folder, _, _ = official
    for model in (load(folder, dtype=torch.bfloat16), load(folder).bfloat16()):
        biases = [b for name, b in model.named_buffers() if name.endswith(("expert_bias", "inv_freq"))]
        assert {b.dtype for b in biases} == {torch.float32} and len(biases) > 1
        key = "model.layers.1.mlp.gate.expert_bias"
        assert torch.equal(model.get_buffer(key), load_file(folder / "model.safetensors")[key])
        assert {p.dtype for p in model.parameters()} == {torch.bfloat16}


def test_fp8_checkpoints_are_dequantised_as_we_do(tmp_path):
    """Where there is no GPU: transformers then reads them as bf16."""
    config = LingConfig(
        vocab_size=128, hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=32, num_experts=16, num_experts_per_tok=4, n_group=4, topk_group=2,
        moe_intermediate_size=128, initializer_range=0.1,
    )  # fmt: skip
    model = Ling(config)
    model.init_weights(torch.Generator().manual_seed(0))
    to_fp8(model.bfloat16())
    quantize_for_inference_(model)
    save_model(model, tmp_path)
    ids = torch.arange(24).view(2, 12)
    with torch.no_grad():
        close(load(tmp_path, dtype=torch.bfloat16)(input_ids=ids).logits.float(), load_model(tmp_path)(ids).logits)


def test_a_new_model_is_initialised():
    config = ling_transformers.LingHfConfig(
        vocab_size=128, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, num_experts=16, num_experts_per_tok=4, n_group=4, topk_group=2,
        moe_intermediate_size=16,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config)
    for name, p in model.named_parameters():
        assert p.mean() == 1 if name.endswith("norm.weight") else 0.015 < p.std() < 0.025, name


@pytest.mark.parametrize("field, value", [
    ("swiglu_limit", 7.0), ("sliding_window", 16), ("layer_types", ["sliding_attention"] * 3), ("use_qkv_bias", True),
    ("hidden_act", "gelu"), ("score_function", "softmax"), ("rope_scaling", {"type": "linear", "factor": 2.0}),
    ("num_experts", 15), ("architectures", ["BailingMoeForCausalLM"]),
])  # fmt: skip
def test_configurations_of_another_formula_are_refused(tmp_path, field, value):
    with pytest.raises(InputError) as error:
        AutoConfig.from_pretrained(checkpoint("base", tmp_path, **{field: value}))
    assert field in str(error.value) and "\n" not in str(error.value)


def test_a_field_that_was_changed_is_checked(tmp_path):
    config = AutoConfig.from_pretrained(checkpoint("base", tmp_path))
    config.rope_scaling = {"type": "linear", "factor": 2.0}
    with pytest.raises(InputError, match="yarn"):
        AutoModelForCausalLM.from_config(config)
    config.rope_scaling, config.use_qk_norm = None, False
    with pytest.raises(InputError, match="use_qk_norm"):
        AutoModelForCausalLM.from_config(config)


def test_a_static_cache_is_refused_in_one_line(official):
    _, _, model, want = official
    with pytest.raises(InputError, match="fixed length"):
        greedy(model, want["generate.prompt"], cache_implementation="static", disable_compile=True)
