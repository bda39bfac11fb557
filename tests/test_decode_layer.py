"""A decode pass launches the kernels that docs/serving.md lists, with the same result as the torch backend."""

import dataclasses
import sys

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from ling_kernels.backend import _C, force
from ling_kernels.generate import Engine, Sampling
from ling_kernels.model import Ling, LingConfig
from ling_kernels.model.sample import SamplingMode
from ling_kernels.model.transformer import Layer
from ling_kernels.nn import BatchLayout
from ling_kernels.nn.fp8 import to_fp8
from ling_kernels.nn.fp8_inference import quantize_for_inference_
from ling_kernels.ops.accept_tokens import accept_tokens_ref
from ling_kernels.ops.attention_decode import KVCache
from ling_kernels.ops.rope_tables import rope_tables
from ling_kernels.ops.sample import sample_ref
from tests.cases import DEVICE, runs

ATTENTION, MOE = "qk_norm_attention_decode_fwd", ["rms_norm_router_fwd", "moe_decode_fwd"]
LAUNCHES = {  # each launcher starts one kernel
    "fp8": ["rms_norm_linear_fwd", ATTENTION, "gemm_fp8_fwd", *MOE],
    "bf16": ["rms_norm_linear_fwd", ATTENTION, "rms_norm_linear_fwd", *MOE],
}


class TorchOperators(TorchDispatchMode):
    """Records torch's own operators that would launch a kernel."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, fn, types, args=(), kwargs=None):
        if fn.namespace != "ling" and not fn.is_view and "empty" not in fn.name():
            self.names.append(fn.name())
        return fn(*args, **(kwargs or {}))


def recorder(launched, name):
    fn = getattr(_C, name)
    return lambda *args: launched.append(name) or fn(*args)


CONFIG = dataclasses.replace(
    LingConfig.tiny(), hidden_size=256, num_attention_heads=2, num_key_value_heads=1, head_dim=128,
    moe_intermediate_size=128, num_hidden_layers=2, first_k_dense_replace=0, num_nextn_predict_layers=0,
)  # fmt: skip


def with_random_weights(module, g, weights):
    for w in module.parameters():
        w.copy_(torch.randn(w.shape, generator=g) / 16 if w.ndim > 1 else 1 + torch.randn(w.shape, generator=g) / 8)
    module = module.to(DEVICE, torch.bfloat16)
    if weights == "fp8":
        to_fp8(module)
        quantize_for_inference_(module)
    return module.eval()


@torch.no_grad()
def layer_and_arguments(n, weights):
    """A layer, x [2 n, H], its layout and cache: n new tokens of each of two sequences."""
    g = torch.Generator().manual_seed(0)
    layer = with_random_weights(Layer(CONFIG, dense=False), g, weights)
    cache = KVCache(*(torch.randn(4, 16, 1, 128, generator=g).to(DEVICE, torch.bfloat16) for _ in range(2)))
    lengths = torch.tensor([20, 9], dtype=torch.int32, device=DEVICE)
    positions = (lengths[:, None] - n + torch.arange(n, device=DEVICE)).flatten()
    table = torch.tensor([[2, 0], [3, 1]], dtype=torch.int32, device=DEVICE)
    slots = (table.gather(1, positions.view(2, n) // 16) * 16 + positions.view(2, n) % 16).flatten().long()
    cos, sin = rope_tables(32, 64, 1e4, None, DEVICE)
    no_prefill = torch.zeros(1, dtype=torch.int32, device=DEVICE)
    rows = BatchLayout(cos, sin, positions, no_prefill, slots, 2 * n, table, lengths)
    return layer, torch.randn(2 * n, 256, generator=g).to(DEVICE, torch.bfloat16), rows, cache


def record(monkeypatch) -> list[str]:
    """The launchers of csrc/ that are called from now on."""
    for module in ("attention_decode", "qk_norm_attention_decode"):  # on a CPU they look at lengths and pages
        monkeypatch.setattr(sys.modules[f"ling_kernels.ops.{module}"], "values_on_host", lambda x: False)
    launched = []
    for name in (n for n in dir(_C) if n.endswith("_fwd")):
        monkeypatch.setattr(_C, name, recorder(launched, name))
    return launched


@pytest.mark.skipif(not runs("cuda"), reason="csrc/ does not run here")
@pytest.mark.parametrize("weights", LAUNCHES)
@pytest.mark.parametrize("n", [1, 3])
@torch.no_grad()
def test_a_decode_layer(n, weights, monkeypatch):
    layer, x, rows, cache = layer_and_arguments(n, weights)
    copies = [KVCache(*(t if t is None else t.clone() for t in cache)) for _ in range(2)]
    with force("torch"):
        want, _ = layer(x, rows, copies[0])
    launched = record(monkeypatch)
    with force("cuda"), TorchOperators() as torch_operators:
        got, _ = layer(x, rows, copies[1])
    assert launched == LAUNCHES[weights] and not torch_operators.names
    assert (got - want).abs().max() <= 2**-5 * want.abs().max()


ALL = Sampling(temperature=0.8, top_k=50, top_p=0.9, min_p=0.01, repetition_penalty=1.2, seed=3)


@pytest.mark.skipif(not runs("cuda"), reason="csrc/ does not run here")
@pytest.mark.parametrize("draft, sampling", [(0, Sampling()), (0, ALL), (2, ALL)], ids=["greedy", "random", "drafts"])
@torch.inference_mode()
def test_a_decode_pass(draft, sampling, monkeypatch):
    """One kernel before the layers, three after them: final norm and lm_head, the choice, the writes."""
    with torch.inference_mode(False), torch.no_grad():
        model = with_random_weights(Ling(CONFIG), torch.Generator().manual_seed(1), "fp8")
    engine = Engine(model, page_size=16, cache_tokens=200, max_running=3, draft=draft)
    engine.forward.graphs = None  # on a GPU: torch's operations read values on the host
    with force("torch"):
        requests = [engine.submit([5, 9, 5, 7, i], sampling, 8, ()) for i in (1, 2)]
        while not all(len(r.tokens) > 7 for r in requests):
            engine.step()
    forward, lanes = engine.forward, torch.tensor([r.lane for r in requests], device=DEVICE)
    mode, logits = SamplingMode.of([sampling]), []
    written = forward.token_ids, forward.lengths, *(t for c in forward.caches for t in c if t is not None)
    before = [t.clone() for t in written]
    logits_of = model.logits
    monkeypatch.setattr(
        model, "logits", lambda *args, **options: logits.append(logits_of(*args, **options)) or logits[-1]
    )
    with force("torch"):
        forward.compute(lanes, mode)
    for t, b in zip(written, before, strict=True):
        t.copy_(b)
    launched = record(monkeypatch)
    with force("cuda"), TorchOperators() as torch_operators:
        got = forward.compute(lanes, mode)
    around = ["decode_inputs_fwd", *LAUNCHES["fp8"] * 2, "rms_norm_linear_fwd", "sample_fwd", "accept_tokens_fwd"]
    assert launched == around and not torch_operators.names
    want, near = logits
    assert (near - want).abs().max() <= 2**-4 * want.abs().max()

    # The layers round differently, which may change a token: what follows must be right for these logits.
    token_ids, lengths = before[:2]
    positions = lengths[lanes, None] - 1 + torch.arange(1 + draft, device=DEVICE)
    tokens = sample_ref(near, forward.sampling, mode[:3], lanes, positions.flatten(), token_ids, forward.seeds)
    output = accept_tokens_ref(tokens.view(2, -1), lanes, positions, token_ids, lengths, draft > 0)
    assert torch.equal(got, output) and all(map(torch.equal, written[:2], (token_ids, lengths)))
