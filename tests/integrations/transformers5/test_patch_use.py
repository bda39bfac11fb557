"""What users do with a patched model besides running it, and models that `patch` must not break."""

import inspect
import pickle

import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module
from torch import nn
from transformers import AutoModelForCausalLM, BartConfig, BartForConditionalGeneration

from ling_kernels.errors import InputError
from ling_kernels.integrations.transformers import LingHfConfig, patch, unpatch
from ling_kernels.integrations.transformers.functions import experts_forward
from tests.integrations.official import TOLERANCE

from .test_functions import GLM, SIZES, build, experts, routing

close = torch.testing.assert_close
IDS = torch.arange(3, 17).view(2, 7)


def test_a_patched_model_is_pickled_with_its_patch():
    model = patch(build(*GLM)).train()
    again = pickle.loads(pickle.dumps(model))
    out, want = again(input_ids=IDS, labels=IDS), model(input_ids=IDS, labels=IDS)
    assert out.logits is None
    close(out.loss, want.loss, rtol=0, atol=0)
    assert inspect.signature(again.forward) == inspect.signature(build(*GLM).forward)
    assert "forward" not in vars(unpatch(again).model.norm) and "forward" in vars(model.model.norm)


def test_hooks_of_accelerate_stay_around_the_patch():
    """They keep a module's forward as `_old_forward`. They may come before or after the patch, and go meanwhile."""
    model = build(*GLM).eval()
    want, norm = model(IDS).logits, model.model.norm

    def hook(change, *others):
        for module in model.modules():
            change(module, *others)

    def same():
        close(model(IDS).logits, want, **TOLERANCE)

    hook(add_hook_to_module, ModelHook())
    patch(model)
    assert "rms_norm_forward" in str(norm._old_forward)
    same()
    unpatch(model)
    assert norm._old_forward.__func__ is type(norm).forward
    same()
    patch(model)
    hook(remove_hook_from_module)
    assert "rms_norm_forward" in str(norm.forward)
    unpatch(model)
    same()
    patch(model)
    hook(add_hook_to_module, ModelHook())
    unpatch(patch(model))
    assert norm._old_forward.__func__ is type(norm).forward and hasattr(norm, "_hf_hook")
    same()


def test_models_with_one_config_object():
    """Each is patched and unpatched by itself."""
    first = build(*GLM).eval()
    second = type(first)(first.config).eval()
    second.load_state_dict(first.state_dict())
    want, shared = first(IDS).logits, first.config
    assert second.config is shared and second.model.layers[0].self_attn.config is shared

    def chosen(model):
        configs = [model.config, *(m.config for m in model.modules() if hasattr(m, "config"))]
        return {(c._attn_implementation, c._experts_implementation) for c in configs}

    before, ours = chosen(first), {("ling_kernels", "ling_kernels")}
    patch(first)
    assert chosen(first) == ours and chosen(second) == before
    patch(second)
    unpatch(first)
    assert chosen(first) == before and chosen(second) == ours
    close(first(IDS).logits, want, rtol=0, atol=0)
    close(second(IDS).logits, want, **TOLERANCE)
    unpatch(second)
    assert chosen(second) == before and first.config.to_dict() == shared.to_dict() == second.config.to_dict()


@pytest.mark.parametrize("decoded", [7, 4])
def test_a_decoder_attends_to_a_padded_encoder(decoded):
    sizes = dict(encoder_layers=1, decoder_layers=1, encoder_attention_heads=4, decoder_attention_heads=4)
    config = BartConfig(vocab_size=64, d_model=32, encoder_ffn_dim=48, decoder_ffn_dim=48, dropout=0.0, **sizes,
                        pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=2)  # fmt: skip
    model = build(BartForConditionalGeneration, config).eval()
    mask = torch.ones_like(IDS)
    mask[0, :3], mask[1, 5:] = 0, 0

    def results():
        out = model(input_ids=IDS, attention_mask=mask, decoder_input_ids=IDS[:, :decoded]).logits
        return out, model.generate(IDS, attention_mask=mask, max_new_tokens=4, do_sample=False, num_beams=1)

    before = results()
    patch(model)
    assert model.config._attn_implementation == "ling_kernels"
    for a, b in zip(results(), before, strict=True):
        close(a, b, **TOLERANCE)


WRONG = dict(module=nn.Linear(2, 2), kind=nn.Linear, none=None, text="Ling", wrapped=nn.DataParallel(build(*GLM)),
             compiled=torch.compile(build(*GLM)))  # fmt: skip


@pytest.mark.parametrize("model", WRONG.values(), ids=WRONG)
def test_what_is_no_model_of_transformers_is_refused(model):
    for change in (patch, unpatch):
        with pytest.raises(InputError, match="no PreTrainedModel.*patch the model inside"):
            change(model)
    nn.Linear(2, 2)


def test_an_index_beyond_int32_is_of_another_rank():
    x, index, weights = routing()
    assert not experts_forward(experts(), x, index + 2**32, weights).any()


@pytest.mark.parametrize("shape", [(0, 5), (2, 0)])
def test_no_token(shape):
    config = LingHfConfig(**SIZES, moe_intermediate_size=16, num_experts=8, num_experts_per_tok=2, n_group=2,
                          topk_group=1, num_nextn_predict_layers=1)  # fmt: skip
    model = AutoModelForCausalLM.from_config(config)
    ids = torch.zeros(shape, dtype=torch.long)
    assert model.eval()(ids).logits.shape == (*shape, 64)
    loss = model.train()(ids, labels=ids).loss
    loss.backward()
    assert loss == 0 and all(p.grad is None or not p.grad.any() for p in model.parameters())
