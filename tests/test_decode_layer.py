"""A decode layer launches the kernels that docs/serving.md lists, with the same result as the torch backend."""

import dataclasses
import sys

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from ling_kernels.backend import _C, force
from ling_kernels.model import LingConfig
from ling_kernels.model.transformer import Layer
from ling_kernels.nn import BatchLayout
from ling_kernels.nn.fp8 import to_fp8
from ling_kernels.nn.fp8_inference import quantize_for_inference_
from ling_kernels.ops.attention_decode import KVCache
from ling_kernels.ops.rope_tables import rope_tables
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


@torch.no_grad()
def layer_and_arguments(n, weights):
    """A layer, x [2 n, H], its layout and cache: n new tokens of each of two sequences."""
    c = dataclasses.replace(
        LingConfig.tiny(), hidden_size=256, num_attention_heads=2, num_key_value_heads=1, head_dim=128,
        moe_intermediate_size=128,
    )  # fmt: skip
    g = torch.Generator().manual_seed(0)
    layer = Layer(c, dense=False)
    for w in layer.parameters():
        w.copy_(torch.randn(w.shape, generator=g) / 16 if w.ndim > 1 else 1 + torch.randn(w.shape, generator=g) / 8)
    layer = layer.to(DEVICE, torch.bfloat16)
    if weights == "fp8":
        to_fp8(layer)
        quantize_for_inference_(layer)
    cache = KVCache(*(torch.randn(4, 16, 1, 128, generator=g).to(DEVICE, torch.bfloat16) for _ in range(2)))
    lengths = torch.tensor([20, 9], dtype=torch.int32, device=DEVICE)
    positions = (lengths[:, None] - n + torch.arange(n, device=DEVICE)).flatten()
    table = torch.tensor([[2, 0], [3, 1]], dtype=torch.int32, device=DEVICE)
    slots = (table.gather(1, positions.view(2, n) // 16) * 16 + positions.view(2, n) % 16).flatten().long()
    cos, sin = rope_tables(32, 64, 1e4, None, DEVICE)
    no_prefill = torch.zeros(1, dtype=torch.int32, device=DEVICE)
    rows = BatchLayout(cos, sin, positions, no_prefill, slots, 2 * n, table, lengths)
    return layer.eval(), torch.randn(2 * n, 256, generator=g).to(DEVICE, torch.bfloat16), rows, cache


@pytest.mark.skipif(not runs("cuda"), reason="csrc/ does not run here")
@pytest.mark.parametrize("weights", LAUNCHES)
@pytest.mark.parametrize("n", [1, 3])
@torch.no_grad()
def test_a_decode_layer(n, weights, monkeypatch):
    layer, x, rows, cache = layer_and_arguments(n, weights)
    copies = [KVCache(*(t if t is None else t.clone() for t in cache)) for _ in range(2)]
    with force("torch"):
        want, _ = layer(x, rows, copies[0])
    for module in ("attention_decode", "qk_norm_attention_decode"):  # on a CPU they look at lengths and pages
        monkeypatch.setattr(sys.modules[f"ling_kernels.ops.{module}"], "values_on_host", lambda x: False)
    launched = []
    for name in (n for n in dir(_C) if n.endswith("_fwd")):
        monkeypatch.setattr(_C, name, recorder(launched, name))
    with force("cuda"), TorchOperators() as torch_operators:
        got, _ = layer(x, rows, copies[1])
    assert launched == LAUNCHES[weights] and not torch_operators.names
    assert (got - want).abs().max() <= 2**-5 * want.abs().max()
