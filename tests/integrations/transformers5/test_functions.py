"""The registered functions by themselves, and `patch` of models of other classes."""

import copy
import inspect

import pytest
import torch
from torch import nn
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    Glm4MoeConfig,
    Glm4MoeForCausalLM,
    GptOssConfig,
    GptOssForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)
from transformers.models.glm4_moe.modeling_glm4_moe import Glm4MoeExperts

from ling_kernels.errors import InputError
from ling_kernels.integrations.transformers import patch, unpatch
from ling_kernels.integrations.transformers.functions import attention_forward, attention_mask_of, experts_forward
from tests.integrations.official import TOLERANCE, greedy

close = torch.testing.assert_close
SIZES = dict(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
             num_key_value_heads=2, head_dim=8, pad_token_id=0, bos_token_id=1, eos_token_id=2)  # fmt: skip
MOE = dict(**SIZES, moe_intermediate_size=16, num_experts_per_tok=2)
GLM = Glm4MoeForCausalLM, Glm4MoeConfig(**MOE, n_routed_experts=8, n_group=4, topk_group=2, use_qk_norm=True)
QWEN = Qwen3MoeForCausalLM, Qwen3MoeConfig(**MOE, num_experts=8, norm_topk_prob=True)
DENSE = MistralForCausalLM, MistralConfig(**SIZES, sliding_window=None)


def build(kind, config):
    """A model whose norms are not all ones."""
    torch.manual_seed(0)
    model = kind(copy.deepcopy(config))
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(1, 0.2) if p.ndim == 1 else p.normal_(0, 0.2)
    return model


def experts(num_experts=6):
    torch.manual_seed(0)
    module = Glm4MoeExperts(Glm4MoeConfig(**MOE, n_routed_experts=num_experts))
    module.config._experts_implementation = "eager"
    for p in module.parameters():
        nn.init.normal_(p, std=0.2)
    return module


def routing(T=10, topk=2, E=6):
    index = torch.rand(T, E).argsort(1)[:, :topk]
    return torch.randn(T, 32, requires_grad=True), index, torch.rand(T, topk).requires_grad_()


def test_experts_and_their_gradients():
    module = experts()
    x, index, weights = routing()
    dy = torch.randn(10, 32)
    wanted = [x, weights, *module.parameters()]
    y, reference = experts_forward(module, x, index, weights), module(x, index, weights)
    close(y, reference, **TOLERANCE)
    for a, b in zip(torch.autograd.grad(y, wanted, dy), torch.autograd.grad(reference, wanted, dy), strict=True):
        close(a, b, **TOLERANCE)


def test_choices_of_other_ranks_are_dropped_and_no_row_is_read_for_them():
    module = experts()
    x, index, weights = routing()
    index[3], index[5, 1], index[7, 0] = 6, 6, 9
    with torch.no_grad():
        kept = torch.where(index < 6, weights, 0.0)
        reference = module(x, index.clamp(max=5), kept)
        x[3] = weights[3] = torch.nan
        weights[5, 1] = torch.nan
    y = experts_forward(module, x, index, weights)
    rows = [i for i in range(10) if i != 3]
    close(y[rows], reference[rows], **TOLERANCE)
    assert not y[3].any()
    dx, dw = torch.autograd.grad(y.sum(), [x, weights])
    assert not dx[3].any() and dx[rows].isfinite().all() and not dw[index >= 6].any() and dw.isfinite().all()


def test_no_choice_at_all():
    x, index, weights = routing()
    assert not experts_forward(experts(), x, torch.full_like(index, 6), weights).any()


@pytest.mark.parametrize("name, value", [
    ("has_bias", True), ("is_transposed", True), ("is_concatenated", False), ("has_gate", False),
    ("swiglu_limit", 7.0), ("act_fn", nn.GELU()),
])  # fmt: skip
def test_other_experts_are_refused(name, value):
    module = experts()
    setattr(module, name, value)
    with pytest.raises(InputError, match="GELU" if name == "act_fn" else name):
        experts_forward(module, *routing())


def operands(Lq=7, Lk=7):
    torch.manual_seed(1)
    return torch.randn(2, 4, Lq, 8), torch.randn(2, 2, Lk, 8), torch.randn(2, 2, Lk, 8)


@pytest.mark.parametrize("Lq", [7, 3, 1])
@pytest.mark.parametrize("padded", [False, True])
def test_attention_is_sdpa(Lq, padded):
    """Of the last Lq of 7 tokens; padding on the left of one row and on the right of the other."""
    q, k, v = operands(Lq)
    mask = torch.ones(2, 7, dtype=torch.bool)
    if padded:
        mask[0, :3], mask[1, 6:] = False, False
    out, _ = attention_forward(nn.Identity(), q, k, v, mask if padded else None, scaling=0.3)
    allowed = torch.ones(7, 7, dtype=torch.bool).tril()[None, None, -Lq:] & mask[:, None, None]
    k, v = (t.repeat_interleave(2, 1) for t in (k, v))
    reference = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=allowed, scale=0.3).transpose(1, 2)
    tokens = mask[:, -Lq:]
    close(out[tokens], reference[tokens], **TOLERANCE)
    assert not out[~tokens].any()


@pytest.mark.parametrize("kwargs, message", [
    (dict(sliding_window=4), "sliding_window 4"), (dict(softcap=30.0), "softcap"), (dict(s_aux=torch.ones(4)), "sinks"),
    (dict(dropout=0.1), "dropout 0.1"), (dict(attention_mask=torch.zeros(2, 1, 7, 7)), "4 dimensions"),
])  # fmt: skip
def test_other_attention_is_refused(kwargs, message):
    with pytest.raises(InputError, match=message):
        attention_forward(nn.Identity(), *operands(), **{"attention_mask": None, **kwargs})


def test_masks():
    mask = torch.ones(2, 5, dtype=torch.bool)
    assert attention_mask_of(2, 5, 5) is None and attention_mask_of(2, 5, 5, attention_mask=mask) is None
    mask[0, 0] = False
    assert torch.equal(attention_mask_of(2, 2, 5, 3, attention_mask=mask), mask)
    with pytest.raises(InputError, match="fixed length"):
        attention_mask_of(2, 2, 8, 3, attention_mask=mask)
    with pytest.raises(InputError, match="window"):
        attention_mask_of(2, 5, 5, mask_function=lambda b, h, q, k: q - k < 3)


@pytest.mark.parametrize("kind, config", [GLM, QWEN, DENSE])
def test_a_patched_model_computes_the_same(kind, config):
    """Forward, loss, gradients and generation, before, with and after the patch."""
    model = build(kind, config)
    ids = torch.randint(3, 64, (2, 9))
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    labels = ids.masked_fill(mask == 0, -100)

    def results():
        model.train().zero_grad()
        loss = model(input_ids=ids, attention_mask=mask, labels=labels, num_items_in_batch=12).loss
        loss.backward()
        gradients = [p.grad.clone() for p in model.parameters()]
        with torch.no_grad():
            out = model.eval()(input_ids=ids, attention_mask=mask, labels=labels)
        return [loss.detach(), out.loss, out.logits[mask.bool()], greedy(model, ids, attention_mask=mask), *gradients]

    before, attributes = results(), [set(vars(m)) for m in model.modules()]
    chosen = model.config._attn_implementation, model.config._experts_implementation
    assert patch(model) is model and patch(model) is model  # twice is as once
    assert model.config._attn_implementation == "ling_kernels"
    norms = [m for m in model.modules() if type(m).__name__.endswith("RMSNorm")]
    assert len(norms) >= 5 and all("forward" in vars(m) for m in norms)
    assert "input_ids" in inspect.signature(model.forward).parameters
    for a, b in zip(results(), before, strict=True):
        close(a, b, **TOLERANCE)
    assert unpatch(model) is model
    assert [set(vars(m)) for m in model.modules()] == attributes
    assert (model.config._attn_implementation, model.config._experts_implementation) == chosen
    for a, b in zip(results(), before, strict=True):
        close(a, b, rtol=0, atol=0)
    with pytest.raises(InputError, match="not patched"):
        unpatch(model)


@pytest.mark.parametrize("kind, config", [GLM, QWEN])
def test_packed_documents_of_a_patched_model(kind, config):
    """By position ids, in a forward with its default cache. Without one transformers makes a mask, which is refused."""
    model = patch(build(kind, config)).eval()
    ids, positions = torch.randint(3, 64, (1, 9)), torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4]])
    with torch.no_grad():
        apart = torch.cat([model(input_ids=part).logits for part in ids.split([4, 5], 1)], 1)
        close(model(input_ids=ids, position_ids=positions).logits, apart, **TOLERANCE)
        with pytest.raises(InputError, match="position_ids alone"):
            model(input_ids=ids, position_ids=positions, use_cache=False)


def test_the_loss_in_training_stores_no_logits():
    model = patch(build(*GLM)).train()
    ids = torch.randint(3, 64, (2, 9))
    assert model(input_ids=ids, labels=ids).logits is None
    assert model(input_ids=ids).logits is not None and model.eval()(input_ids=ids, labels=ids).logits is not None


def test_a_patched_class_patches_its_models():
    class Model(Glm4MoeForCausalLM):
        pass

    patch(patch(Model))
    model = build(Model, GLM[1])
    assert model.config._experts_implementation == "ling_kernels"
    unpatch(Model)
    assert build(Model, GLM[1]).config._experts_implementation != "ling_kernels"
    with pytest.raises(InputError, match="Model is not patched"):
        unpatch(Model)


def test_what_no_kernel_computes_is_refused_by_patch():
    oss = GptOssForCausalLM(GptOssConfig(**SIZES, num_local_experts=4, sliding_window=None))
    with pytest.raises(InputError, match="swiglu_limit 7.0"):
        patch(oss)
    oss.config.swiglu_limit = 0.0  # the experts are as they were
    with pytest.raises(InputError, match="has_bias True, is_transposed True, is_concatenated False"):
        patch(oss)
    windowed = MistralForCausalLM(MistralConfig(**SIZES, sliding_window=4))
    with pytest.raises(InputError, match="sliding_window 4"):
        patch(windowed)
    assert not [m for m in [*oss.modules(), *windowed.modules()] if "forward" in vars(m)]


def test_norms_of_another_formula_stay():
    """Gemma's multiply with 1 + weight."""
    config = Gemma2Config(**SIZES, sliding_window=None, attn_logit_softcapping=None, layer_types=["full_attention"] * 2)
    model = patch(build(Gemma2ForCausalLM, config))
    assert not [m for m in model.modules() if type(m).__name__ == "Gemma2RMSNorm" and "forward" in vars(m)]
