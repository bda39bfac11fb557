"""Others that decode a whole Ling-2.0: transformers' generate on our very weights, vLLM and SGLang on random ones.

Each function takes the model or its configuration, and returns generate(prompts, new tokens) -> the new tokens of each,
greedily and without an end. transformers has no Ling-2.0, but Glm4Moe, which is the same formula: QK-norm before half
RoPE, grouped sigmoid routing with a bias, one shared expert. Its logits must be ours.
"""

import json
from pathlib import Path

import torch
from torch import nn

from ling_kernels.model import Ling, LingConfig

from . import WRONG, only

CONFIGURATION = """from transformers import PretrainedConfig


class BailingMoeV2Config(PretrainedConfig):
    model_type = "bailing_moe"
"""


def in_transformers(model: Ling) -> nn.Module:
    """Its Glm4Moe with our parameters, not copies of them."""
    from transformers import Glm4MoeConfig, Glm4MoeForCausalLM

    c = model.config
    only(c.num_shared_experts == 1 and c.use_qk_norm, "model without shared expert or QK-norm")
    only(c.rope_scaling is None, "YaRN as ours")
    rope = dict(rope_type="default", rope_theta=c.rope_theta, partial_rotary_factor=c.partial_rotary_factor)
    config = Glm4MoeConfig(
        vocab_size=c.vocab_size, hidden_size=c.hidden_size, intermediate_size=c.intermediate_size,
        num_hidden_layers=c.num_hidden_layers, num_attention_heads=c.num_attention_heads,
        num_key_value_heads=c.num_key_value_heads, head_dim=c.head_dim, rms_norm_eps=c.rms_norm_eps,
        max_position_embeddings=c.max_positions, rope_parameters=rope, moe_intermediate_size=c.moe_intermediate_size,
        num_experts_per_tok=c.num_experts_per_tok, n_shared_experts=1, n_routed_experts=c.num_experts,
        routed_scaling_factor=c.routed_scaling_factor, n_group=c.n_group, topk_group=c.topk_group, use_qk_norm=True,
        first_k_dense_replace=c.first_k_dense_replace, num_mtp_layers=0, pad_token_id=c.pad_token_id,
    )  # fmt: skip
    with torch.device("meta"):
        theirs = Glm4MoeForCausalLM(config)
    theirs.load_state_dict(dict(of_glm(model)), strict=False, assign=True)
    rotary = theirs.model.rotary_emb
    theirs.model.rotary_emb = type(rotary)(config).to(model.lm_head.weight.device)
    assert not any(t.is_meta for t in [*theirs.parameters(), *theirs.buffers()]), "a weight of theirs is not ours"
    return theirs.eval()


def of_glm(model: Ling):
    """(their name, view of our parameter)"""
    c = model.config
    yield from (("model.embed_tokens.weight", model.word_embeddings.weight), ("model.norm.weight", model.norm.weight))
    yield "lm_head.weight", model.lm_head.weight
    for i, layer in enumerate(model.layers):
        own, name = dict(layer.named_parameters()), f"model.layers.{i}."
        rows = c.head_dim * torch.tensor([c.num_attention_heads, *2 * [c.num_key_value_heads]])
        qkv = own["attention.query_key_value.weight"].split(rows.tolist())
        yield from ((f"{name}self_attn.{n}_proj.weight", w) for n, w in zip("qkv", qkv, strict=True))
        yield f"{name}self_attn.o_proj.weight", own["attention.dense.weight"]
        yield from ((f"{name}self_attn.{n[0]}_norm.weight", own[f"attention.{n}_layernorm"]) for n in ("query", "key"))
        for norm in ("input_layernorm", "post_attention_layernorm"):
            yield f"{name}{norm}.weight", own[f"{norm}.weight"]
        if i < c.first_k_dense_replace:
            yield from of_mlp(f"{name}mlp.", layer.mlp)
            continue
        moe = layer.mlp
        yield f"{name}mlp.gate.weight", moe.router.weight
        yield f"{name}mlp.gate.e_score_correction_bias", moe.router.expert_bias
        yield from ((f"{name}mlp.experts.{n}_proj", getattr(moe.experts, n)) for n in ("gate_up", "down"))
        yield from of_mlp(f"{name}mlp.shared_experts.", moe.shared_experts)


def of_mlp(name: str, mlp: nn.Module):
    gate, up = mlp.gate_up.weight.chunk(2)
    yield from ((f"{name}{n}_proj.weight", w) for n, w in (("gate", gate), ("up", up), ("down", mlp.down.weight)))


@torch.inference_mode()
def transformers_generate(model: Ling):
    theirs, device = in_transformers(model), model.lm_head.weight.device
    ids = torch.arange(1, 9, device=device)[None]
    got, want = theirs(ids).logits.float(), model(ids).logits
    off = ((got - want).norm() / want.norm()).item()
    if not off <= WRONG:
        raise ValueError(f"its logits differ from ours by {off:.1e}")

    def generate(prompts: list[list[int]], new: int) -> list[list[int]]:
        ids = torch.tensor(prompts, device=device)
        out = theirs.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=new, min_new_tokens=new, do_sample=False
        )
        return out[:, ids.shape[1] :].tolist()

    return generate


def folder_of(config: LingConfig, fp8: bool, folder: Path) -> Path:
    """A checkpoint's folder without weights: what vLLM and SGLang read before they make random ones."""
    config.to_json(folder / "config.json", fp8=fp8)
    given = json.loads((folder / "config.json").read_text())
    given["auto_map"] = {"AutoConfig": "configuration_bailing_moe_v2.BailingMoeV2Config"}
    (folder / "config.json").write_text(json.dumps(given))
    (folder / "configuration_bailing_moe_v2.py").write_text(CONFIGURATION)
    return folder


def vllm_generate(folder: Path, length: int, running: int):
    from vllm import LLM, SamplingParams

    engine = LLM(
        model=str(folder), skip_tokenizer_init=True, trust_remote_code=True, load_format="dummy", dtype="bfloat16",
        max_model_len=length, max_num_seqs=running, enable_prefix_caching=False,
    )  # fmt: skip

    def generate(prompts: list[list[int]], new: int) -> list[list[int]]:
        asked = SamplingParams(temperature=0.0, max_tokens=new, ignore_eos=True, detokenize=False)
        given = [{"prompt_token_ids": ids} for ids in prompts]
        return [[*out.outputs[0].token_ids] for out in engine.generate(given, asked, use_tqdm=False)]

    return generate


def sglang_generate(folder: Path, length: int, running: int):
    import sglang

    engine = sglang.Engine(
        model_path=str(folder), skip_tokenizer_init=True, trust_remote_code=True, load_format="dummy",
        dtype="bfloat16", context_length=length, max_running_requests=running, disable_radix_cache=True,
    )  # fmt: skip

    def generate(prompts: list[list[int]], new: int) -> list[list[int]]:
        asked = dict(temperature=0.0, max_new_tokens=new, ignore_eos=True)
        return [out["output_ids"] for out in engine.generate(input_ids=prompts, sampling_params=asked)]

    return generate
