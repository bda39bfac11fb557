"""Model and engine on a GPU with each backend's kernels, against the official model."""

from dataclasses import replace

import pytest
import torch

from ling_kernels.backend import force
from ling_kernels.generate import Engine, Sampling
from ling_kernels.model import Ling, LingConfig
from ling_kernels.nn.fp8 import to_fp8
from ling_kernels.nn.fp8_inference import quantize_for_inference_
from tests.cases import DEVICE, runs
from tests.engines import NO_STOP, references
from tests.test_model import NAMES, expected, grads_of, load, near, official_loss

pytestmark = pytest.mark.skipif(DEVICE == "cpu", reason="there is no GPU")
BACKENDS = [pytest.param(b, marks=() if runs(b) else pytest.mark.skip(f"{b} cannot run here"))
            for b in ("torch", "triton", "cuda")]  # fmt: skip
CLOSE = 1e-3  # fp32 with another order of summation than on the CPU


@pytest.fixture(params=BACKENDS)
def backend(request):
    with force(request.param):
        yield request.param


@pytest.mark.parametrize("name", NAMES)
def test_losses_and_gradients_equal_the_official_code(name, backend):
    want, model = expected(name), load(name).to(DEVICE).train()
    ids, labels = want["input_ids"].to(DEVICE), want["labels"].to(DEVICE)
    out = model(ids, labels)
    loss = official_loss(model, out, labels)
    near(out.logits.cpu(), want["logits"], CLOSE)
    near(loss.cpu(), want["loss.total"], CLOSE)
    grads = grads_of(model, loss)
    for key, grad in want.items():
        if key.startswith("grad."):
            near(grads[key.removeprefix("grad.")].cpu(), grad, CLOSE)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("draft", [0, 2])
def test_the_engine_generates_the_official_tokens(name, draft, backend):
    """With CUDA graphs, and passes launched before the host has the last tokens."""
    e = Engine(load(name).to(DEVICE), page_size=16, cache_tokens=640, max_running=3, draft=draft)
    prompts, new = zip(*references(name), strict=True)
    assert e.generate(prompts, max_new_tokens=len(new[0]), **NO_STOP) == list(new)
    for prompt, tokens in zip(prompts, new, strict=True):
        assert list(e.stream(prompt, max_new_tokens=len(tokens), **NO_STOP)) == tokens
    assert e.overlap == (DEVICE == "cuda") == bool(e.forward.graphs and e.forward.graphs.captured)


def tiny(dtype: torch.dtype, fp8: bool) -> Ling:
    sizes = dict(num_hidden_layers=3, num_experts=16, hidden_size=256, intermediate_size=256, moe_intermediate_size=128)
    torch.set_default_dtype(dtype)
    try:
        model = Ling(replace(LingConfig.tiny(), head_dim=128, num_attention_heads=4, num_key_value_heads=2, **sizes))
    finally:
        torch.set_default_dtype(torch.float32)
    model.init_weights(torch.Generator().manual_seed(0))
    model.to(DEVICE)
    if fp8:
        to_fp8(model)
        quantize_for_inference_(model)
    return model.eval()


@pytest.mark.parametrize("fp8", [False, True])
def test_logits_in_low_precision(fp8, backend):
    """bf16 and FP8 weights, prefilled and decoded with a cache: near the torch backend."""
    model, ids = tiny(torch.bfloat16, fp8), torch.randint(0, 256, (3, 20), generator=torch.Generator().manual_seed(1))
    with torch.no_grad(), force("torch"):
        want = model(ids.to(DEVICE)).logits
    logits = []

    def choose(step_logits, ids_so_far):
        logits.append(step_logits)
        return ids[:, ids_so_far.shape[1]].to(DEVICE)

    for _ in model.stream(ids[:, :12].to(DEVICE), 8, choose=choose):
        pass
    for position, got in enumerate(logits, 11):
        assert (got - want[:, position]).norm() < 0.03 * want[:, position].norm()


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(temperature=1.0, top_p=0.9, repetition_penalty=1.2, seed=3)])
def test_graphs_equal_eager_passes(sampling, backend):
    prompt, outputs = list(range(3, 40)), []
    model = tiny(torch.bfloat16, fp8=True)
    for graphs in (True, False):
        e = Engine(model, cache_tokens=2048, max_running=1)
        if not graphs:
            e.forward.graphs = None
        outputs.append(list(e.stream(prompt, sampling=sampling, max_new_tokens=24, **NO_STOP)))
    assert outputs[0] == outputs[1]
