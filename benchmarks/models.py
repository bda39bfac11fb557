"""Models and layers with random weights at their real sizes, and other implementations that take the same weights."""

import dataclasses
import functools
import time
from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ling_kernels.model import Ling, LingConfig
from ling_kernels.model.transformer import Layer
from ling_kernels.nn.fp8 import to_fp8
from ling_kernels.nn.fp8_inference import SCALES, quantize_for_inference_
from ling_kernels.op import E4M3
from ling_kernels.ops.route import route

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
MINI = dataclasses.replace(LingConfig.mini(), num_hidden_layers=1, first_k_dense_replace=0)
CODE_STD = 64  # of random e4m3 codes, which reach 448


@functools.lru_cache(maxsize=1)
@torch.no_grad()
def random_model(name: str, precision: str) -> Ling:
    """A preset without MTP layers, as load_model gives one in fp32, bf16 or fp8. Weights are drawn on the device, an
    expert at a time: Ling-flash in FP8 fits the GPU that serves it."""
    config = dataclasses.replace(LingConfig.preset(name), num_nextn_predict_layers=0)
    with torch.device("meta"):
        model = Ling(config)
    model.to(torch.float32 if precision == "fp32" else torch.bfloat16)
    if precision == "fp8":
        to_fp8(model)
        quantize_for_inference_(model)
    model, generator = model.to_empty(device=DEVICE), torch.Generator(DEVICE).manual_seed(0)
    for w in model.parameters():
        if w.ndim < 2:
            w.fill_(1)
            continue
        for part in w if w.ndim == 3 else (w,):
            x = torch.randn(part.shape, generator=generator, device=DEVICE)
            part.copy_(CODE_STD * x if w.dtype == E4M3 else config.initializer_range * x)
    for key, buffer in model.named_buffers():
        if key.endswith(SCALES):
            buffer.fill_(config.initializer_range / CODE_STD)
    for router in model.routers():
        router.expert_bias = torch.zeros_like(router.expert_bias, dtype=torch.float32)
    model.reset_buffers()
    model.name = f"{name} {precision}"
    return model.eval()


@functools.lru_cache(maxsize=1)
def random_layer(experts: int, dtype: torch.dtype) -> nn.Module:
    """The MoE layer of Ling-mini with so many experts, weights of a size that keeps activations near 1."""
    layer = Layer(dataclasses.replace(MINI, num_experts=experts), dense=False).mlp.to(DEVICE, dtype).eval()
    layer.router.expert_bias = layer.router.expert_bias.float()
    generator = torch.Generator(DEVICE).manual_seed(0)
    with torch.no_grad():
        for w in layer.parameters():
            w.normal_(0, w.shape[-1] ** -0.5, generator=generator) if w.ndim > 1 else w.fill_(1)
    return layer


def prompts(vocab_size: int, batch: int, length: int, seed: int = 0) -> list[list[int]]:
    return torch.randint(0, vocab_size, (batch, length), generator=torch.Generator().manual_seed(seed)).tolist()


@torch.inference_mode()
def experts_used(model: Ling, texts: list[list[int]], tail: int = 16) -> float | None:
    """How many experts of a layer the last tokens of the texts use together, the mean over the layers; None without
    routers. Random weights do not route evenly, so it is counted, on the last `tail` tokens of each text."""
    texts, used = [t[-tail:] for t in texts], []
    ends = torch.tensor([len(t) for t in texts]).cumsum(0)
    last = (ends - 1).to(DEVICE)
    hooks = [
        r.register_forward_hook(lambda _, __, out: used.append(len(out[1][last].unique()))) for r in model.routers()
    ]
    try:
        cu_seqlens = torch.cat([torch.zeros(1), ends]).to(DEVICE, torch.int32)
        model(torch.tensor([sum(texts, [])], device=DEVICE), cu_seqlens=cu_seqlens, logits=False)
    finally:
        for hook in hooks:
            hook.remove()
    return sum(used) / len(used) if used else None


def layer_call(by: str, moe: nn.Module) -> tuple[Callable, list[Tensor]]:
    """A function of x [T, H] that computes the MoE layer, and the weights that have gradients."""
    others = dict(loop=loop_over_experts, transformers=transformers_moe)
    return others[by](moe) if by in others else (lambda x: moe(x)[0], [*moe.parameters()])


def pass_of(fn: Callable, weights: list[Tensor], x: Tensor, backward: bool) -> Callable[[], Tensor]:
    """A call without arguments: fn(x), or with `backward` the gradient of x, with those of the weights computed too."""
    if not backward:
        return torch.inference_mode()(lambda: fn(x))
    x, leaves = x.detach().requires_grad_(), [w for w in weights if w.requires_grad]
    dy = torch.randn(x.shape, generator=torch.Generator(DEVICE).manual_seed(2), device=DEVICE).to(x.dtype)
    return lambda: torch.autograd.grad(fn(x), [x, *leaves], dy, allow_unused=True)[0]


def layer_flops(experts: int, T: int) -> float:
    """Of a forward: two for each weight that a token meets."""
    routed = 3 * MINI.hidden_size * MINI.moe_intermediate_size * (MINI.num_experts_per_tok + MINI.num_shared_experts)
    return 2 * T * (routed + experts * MINI.hidden_size)


def loop_over_experts(moe: nn.Module) -> tuple[Callable, list[Tensor]]:
    """The MoE layer as the official modeling code computes it: expert after expert, on the tokens that chose it."""
    leaf = [w.detach().requires_grad_() for w in (moe.router.weight, moe.shared_experts.gate_up.weight)]
    router, bias = leaf[0], moe.router.expert_bias
    experts = [
        (a.detach().requires_grad_(), b.detach().requires_grad_())
        for a, b in zip(moe.experts.gate_up, moe.experts.down, strict=True)
    ]
    experts.append((leaf[1], moe.shared_experts.down.weight.detach().requires_grad_()))

    def expert(x, w1, w2):
        gate, up = F.linear(x, w1).chunk(2, -1)
        return F.linear(F.silu(gate) * up, w2)

    def call(x):
        weights, chosen, counts = route(F.linear(x.float(), router.float()), bias, **moe.router.limits)[:3]
        y = torch.zeros_like(x, dtype=torch.float32)
        for e, n in enumerate(counts.tolist()):
            if n:
                token, k = torch.where(chosen == e)
                y = y.index_add(0, token, expert(x[token], *experts[e]).float() * weights[token, k, None])
        return y.to(x.dtype) + expert(x, *experts[-1])

    return call, [router, *(w for pair in experts for w in pair)]


def transformers_moe(moe: nn.Module) -> tuple[Callable, list[Tensor]]:
    """transformers' eager MoE layer of BailingHybrid, Ling-2.0's successor, on our weights; run with 5.23 and 5.24."""
    from transformers.models.bailing_hybrid.configuration_bailing_hybrid import BailingHybridConfig
    from transformers.models.bailing_hybrid.modeling_bailing_hybrid import BailingHybridMoE

    experts, shared = moe.experts, moe.shared_experts
    E, H, intermediate = experts.down.shape
    config = BailingHybridConfig(
        hidden_size=H, moe_intermediate_size=intermediate, num_local_experts=E, num_experts_per_tok=8, n_group=8,
        topk_group=4, n_shared_experts=1, routed_scaling_factor=2.5, norm_topk_prob=True, hidden_act="silu",
    )  # fmt: skip
    config._experts_implementation = "eager"
    with torch.device("meta"):
        theirs = BailingHybridMoE(config)
    gate, up = shared.gate_up.weight.chunk(2)
    weights = {
        "gate.weight": moe.router.weight.float(), "gate.e_score_correction_bias": moe.router.expert_bias,
        "experts.gate_up_proj": experts.gate_up, "experts.down_proj": experts.down,
        "shared_experts.gate_proj.weight": gate, "shared_experts.up_proj.weight": up,
        "shared_experts.down_proj.weight": shared.down.weight,
    }  # fmt: skip
    theirs.load_state_dict(weights, assign=True)
    theirs.eval()
    return lambda x: theirs(x[None])[0], []


def transformers_model(ling: Ling) -> nn.Module:
    """A copy of a model without MTP layers as transformers' Glm4Moe, whose layers compute the same, with torch's
    scaled_dot_product_attention and grouped_mm; run with 5.24."""
    from transformers import Glm4MoeConfig, Glm4MoeForCausalLM

    c = ling.config
    config = Glm4MoeConfig(
        vocab_size=c.vocab_size, hidden_size=c.hidden_size, intermediate_size=c.intermediate_size,
        num_hidden_layers=c.num_hidden_layers, num_attention_heads=c.num_attention_heads,
        num_key_value_heads=c.num_key_value_heads, head_dim=c.head_dim, moe_intermediate_size=c.moe_intermediate_size,
        n_routed_experts=c.num_experts, num_experts_per_tok=c.num_experts_per_tok, n_group=c.n_group,
        topk_group=c.topk_group, n_shared_experts=c.num_shared_experts, routed_scaling_factor=c.routed_scaling_factor,
        first_k_dense_replace=c.first_k_dense_replace, use_qk_norm=c.use_qk_norm, rms_norm_eps=c.rms_norm_eps,
        rope_parameters=dict(
            rope_type="default", rope_theta=c.rope_theta, partial_rotary_factor=c.partial_rotary_factor
        ),
        max_position_embeddings=c.max_position_embeddings, pad_token_id=None, use_cache=False,
        attn_implementation="sdpa", experts_implementation="grouped_mm",
    )  # fmt: skip
    theirs = Glm4MoeForCausalLM(config).to(ling.lm_head.weight)
    theirs.load_state_dict({key: w.detach().clone() for key, w in as_glm(ling).items()})
    return theirs


def transformers_decode(ling: Ling, texts: list[list[int]]) -> Callable[[], None]:
    """A greedy decode step of `transformers_model` with transformers' own cache; the first call reads the texts."""
    from transformers import DynamicCache

    theirs = transformers_model(ling).eval()
    ids, cache = torch.tensor(texts, device=DEVICE), DynamicCache(config=theirs.config)

    @torch.inference_mode()
    def step() -> None:
        nonlocal ids
        logits = theirs(ids, past_key_values=cache, use_cache=True, logits_to_keep=1).logits
        ids = logits[:, -1:].argmax(-1)

    return step


def generate_between(
    ling: Ling, texts: list[list[int]], new: int, step: Callable[[], object]
) -> list[tuple[float, ...]]:
    """CPU seconds of `step` and of the next step of transformers' `generate` on `transformers_model`, greedy, `new`
    times: both meet the same load of the machine, and the ratio of two neighbours is what counts."""
    from transformers import StoppingCriteriaList

    theirs, ids, pairs = transformers_model(ling).eval(), torch.tensor(texts, device=DEVICE), []

    def after_each_step(ids: Tensor, scores: Tensor, **_) -> Tensor:
        pairs.append([time.process_time()])
        step()
        pairs[-1].append(time.process_time())
        return torch.zeros(len(ids), dtype=torch.bool, device=ids.device)

    theirs.generate(
        ids, max_new_tokens=new + 1, min_new_tokens=new + 1, do_sample=False, use_cache=True, pad_token_id=0,
        eos_token_id=None, stopping_criteria=StoppingCriteriaList([after_each_step]),
    )  # fmt: skip
    return [(end - began, after[0] - end) for (began, end), after in pairwise(pairs)]


def as_glm(ling: Ling) -> dict[str, Tensor]:
    """The weights under the names of Glm4Moe."""

    def halves(name: str, w: Tensor) -> dict[str, Tensor]:
        gate, up = w.chunk(2)
        return {f"{name}.gate_proj.weight": gate, f"{name}.up_proj.weight": up}

    out = {"model.embed_tokens.weight": ling.word_embeddings.weight, "model.norm.weight": ling.norm.weight}
    out["lm_head.weight"] = ling.lm_head.weight
    c = ling.config
    kv = c.num_key_value_heads * c.head_dim
    for i, layer in enumerate(ling.layers):
        name, attention, mlp = f"model.layers.{i}", layer.attention, layer.mlp
        q, k, v = attention.query_key_value.weight.split([c.num_attention_heads * c.head_dim, kv, kv])
        out |= {
            f"{name}.input_layernorm.weight": layer.input_layernorm.weight,
            f"{name}.post_attention_layernorm.weight": layer.post_attention_layernorm.weight,
            f"{name}.self_attn.q_proj.weight": q, f"{name}.self_attn.k_proj.weight": k,
            f"{name}.self_attn.v_proj.weight": v, f"{name}.self_attn.o_proj.weight": attention.dense.weight,
            f"{name}.self_attn.q_norm.weight": attention.query_layernorm,
            f"{name}.self_attn.k_norm.weight": attention.key_layernorm,
        }  # fmt: skip
        if i < c.first_k_dense_replace:
            out |= halves(f"{name}.mlp", mlp.gate_up.weight) | {f"{name}.mlp.down_proj.weight": mlp.down.weight}
            continue
        shared = mlp.shared_experts
        out |= halves(f"{name}.mlp.shared_experts", shared.gate_up.weight) | {
            f"{name}.mlp.shared_experts.down_proj.weight": shared.down.weight,
            f"{name}.mlp.gate.weight": mlp.router.weight,
            f"{name}.mlp.gate.e_score_correction_bias": mlp.router.expert_bias,
            f"{name}.mlp.experts.gate_up_proj": mlp.experts.gate_up,
            f"{name}.mlp.experts.down_proj": mlp.experts.down,
        }  # fmt: skip
    return out
