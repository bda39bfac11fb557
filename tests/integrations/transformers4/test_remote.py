"""The official model code on transformers 4, before and after `patch`.

By default a stand-in with the same interface runs; the official code itself, with --model-code FOLDER.
"""

import shutil

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM, DynamicCache

from ling_kernels.errors import InputError
from ling_kernels.integrations.transformers import patch, unpatch
from ling_kernels.integrations.transformers.remote import expert_weights, lie_together
from ling_kernels.model import load_model
from tests.integrations.official import NAMES, TOLERANCE, checkpoint, expected, greedy, last_logits_of_left_padded

close = torch.testing.assert_close
CODE = ("configuration_bailing_moe_v2", "modeling_bailing_moe_v2")


@pytest.fixture(scope="module")
def folders(pytestconfig, tmp_path_factory):
    """Checkpoints with the model code beside them, as they are published."""
    folders = {}
    auto_map = {"AutoConfig": f"{CODE[0]}.BailingMoeV2Config",
                "AutoModelForCausalLM": f"{CODE[1]}.BailingMoeV2ForCausalLM"}  # fmt: skip
    for name in NAMES:
        folders[name] = checkpoint(name, tmp_path_factory.mktemp(name), auto_map=auto_map)
        for file in CODE:
            shutil.copy(pytestconfig.getoption("--model-code") / f"{file}.py", folders[name])
    return folders


def load(folder, **kwargs):
    kwargs = {"torch_dtype": torch.float32, "attn_implementation": "eager", **kwargs}
    return AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, **kwargs).eval()


def compare(model, want):
    """Everything that the official model computed: forward, loss, gradients, generation, left padding."""
    model.eval().zero_grad()
    with torch.no_grad():
        close(model(input_ids=want["input_ids"], use_cache=False).logits, want["logits"], **TOLERANCE)
    out = greedy(model, want["generate.prompt"], past_key_values=DynamicCache())
    assert torch.equal(out, want["generate.greedy"])
    close(last_logits_of_left_padded(model, want), want["leftpad.logits_last"], **TOLERANCE)
    out = model.train()(input_ids=want["input_ids"], labels=want["labels"], use_cache=False)
    out.loss.backward()
    close(out.loss.detach(), want["loss.total"], **TOLERANCE)
    if "loss.mtp_hf" in want:
        close(out.mtp_loss[0].detach(), want["loss.mtp_hf"], **TOLERANCE)
    parameters = dict(model.named_parameters())
    for key, value in want.items():
        if key.startswith("grad."):
            close(parameters[key.removeprefix("grad.")].grad, value, **TOLERANCE)
    return out


@pytest.mark.parametrize("name", NAMES)
def test_before_with_and_after_the_patch(folders, name):
    model, want = load(folders[name]), expected(name)
    assert compare(model, want).logits is not None
    attributes = [set(vars(m)) for m in model.modules()]
    assert patch(model) is model
    assert compare(model, want).logits is None
    kinds = {type(m).__name__.removeprefix("BailingMoeV2") for m in model.modules() if "forward" in vars(m)}
    assert kinds == {"RMSNorm", "Gate", "SparseMoeBlock", "Attention", "ForCausalLM"}
    unpatch(model)
    assert [set(vars(m)) for m in model.modules()] == attributes
    assert compare(model, want).logits is not None


def test_left_padded_batch_generates_as_its_prompts_alone(folders):
    model, want = patch(load(folders["base"])), expected("base")
    long, short = want["generate.prompt"][0], want["generate.prompt"][1, :5]
    batch = torch.stack([long, torch.cat([torch.zeros(3, dtype=torch.long), short])])
    mask = torch.ones_like(batch)
    mask[1, :3] = 0
    both = greedy(model, batch, attention_mask=mask)
    for i, prompt in enumerate((long, short)):
        assert torch.equal(both[i, 8:], greedy(model, prompt[None])[0, len(prompt) :])


def test_attentions_are_the_models_own(folders):
    model, want = load(folders["base"]), expected("base")
    with torch.no_grad():
        before = model(input_ids=want["input_ids"], output_attentions=True, use_cache=False).attentions
        after = patch(model)(input_ids=want["input_ids"], output_attentions=True, use_cache=False).attentions
    assert len(after) == 3
    for a, b in zip(after, before, strict=True):
        close(a, b, **TOLERANCE)


def test_experts_lie_together_and_are_saved_as_they_were(folders, tmp_path):
    model = patch(load(folders["base"]))
    experts = model.model.layers[1].mlp.experts
    gate_up, down = expert_weights(experts)
    assert gate_up.data_ptr() == experts[0].gate_proj.weight.data_ptr()  # no copy
    assert torch.equal(gate_up[3], torch.cat([experts[3].gate_proj.weight, experts[3].up_proj.weight]))
    assert torch.equal(down[5], experts[5].down_proj.weight)
    model.save_pretrained(tmp_path)
    saved, published = load_file(tmp_path / "model.safetensors"), load_file(folders["base"] / "model.safetensors")
    assert set(saved) == set(published)
    assert all(torch.equal(saved[key].to(value.dtype), value) for key, value in published.items())
    want = expected("base")
    with torch.no_grad():
        close(load_model(folders["base"], torch.float32)(want["input_ids"]).logits, want["logits"], **TOLERANCE)


def test_a_step_of_the_optimizer_reaches_the_experts(folders):
    """Also where the weights no longer lie together, as after a move."""
    want = expected("base")
    losses = []
    for apart in (False, True):
        model = patch(load(folders["base"])).train()
        if apart:
            for p in model.parameters():
                p.data = p.data.clone()
        weights = [e.down_proj.weight for e in model.model.layers[1].mlp.experts]
        assert lie_together(weights) is not apart
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for _ in range(2):
            loss = model(input_ids=want["input_ids"], labels=want["labels"]).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.detach())
    assert losses[1] < losses[0] - 0.01
    close(torch.stack(losses[:2]), torch.stack(losses[2:]))


def test_an_expert_with_an_adapter_keeps_it(folders):
    class Doubled(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    results = []
    for change in (lambda model: model, patch):
        model, want = change(load(folders["base"])), expected("base")
        for expert in model.model.layers[1].mlp.experts:
            expert.up_proj.__class__ = Doubled
        with torch.no_grad():
            results.append(model(input_ids=want["input_ids"], use_cache=False).logits)
    close(*results, **TOLERANCE)
    assert (results[0] - want["logits"]).abs().max() > 0.1


def test_a_patched_class(folders):
    kind = type(load(folders["base"]))
    patch(kind)
    try:
        model, want = load(folders["base"]), expected("base")
        assert type(model) is kind and not lie_together([e.down_proj.weight for e in model.model.layers[1].mlp.experts])
        compare(model, want)
        patch(model)  # moves the experts' weights
        assert lie_together([e.down_proj.weight for e in model.model.layers[1].mlp.experts])
        compare(model, want)
    finally:
        unpatch(kind)


@pytest.mark.parametrize("field, value", [("use_qk_norm", False), ("score_function", "softmax"), ("swiglu_limit", 7.0)])
def test_what_no_kernel_computes_is_refused(folders, field, value):
    model = load(folders["base"])
    setattr(model.config, field, value)
    with pytest.raises(InputError, match=field):
        patch(model)
    assert not [m for m in model.modules() if "forward" in vars(m)]
