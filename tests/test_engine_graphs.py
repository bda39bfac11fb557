"""Decode passes as CUDA graphs, and that they need nothing from the host."""

import itertools
from dataclasses import replace

import pytest
import torch
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from ling_kernels.backend import force
from ling_kernels.generate import Engine
from ling_kernels.generate.edits import Edits, Masks
from ling_kernels.generate.graphs import batch_sizes
from ling_kernels.model import Ling
from ling_kernels.model.sample import SamplingMode
from ling_kernels.nn.fp8 import to_fp8
from ling_kernels.nn.fp8_inference import quantize_for_inference_
from tests.engines import NO_STOP, make_engine, make_overlapped_engine, model, references


def test_batch_sizes():
    """Exact sizes up to 8, and always the largest batch."""
    assert [batch_sizes(n) for n in (1, 3, 8)] == [[1], [1, 2, 3], [*range(1, 9)]]
    assert batch_sizes(20) == [*range(1, 9), 16, 20]


def test_warm_up():
    """It captures every size and mode once, and changes no lane."""
    e, (prompt, new) = make_overlapped_engine(max_running=3), references()[0]
    e.warm_up()
    assert {size for size, _ in e.forward.graphs.captured} == {1, 2, 3} and len(e.forward.graphs.captured) == 9
    graphs = dict(e.forward.graphs.captured)
    assert list(e.stream(prompt, max_new_tokens=len(new), **NO_STOP)) == new
    assert e.forward.graphs.captured == graphs and not e.forward.lengths[e.forward.padding_lane]
    make_engine().warm_up()


class NoHostData(TorchDispatchMode):
    """Refuses copies of host data to the device."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert "lift_fresh" not in str(func)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", ["base", "mtp1"])
@pytest.mark.parametrize("fp8", [False, True])
def test_a_decode_pass_does_not_synchronise(name, fp8):
    """On fake tensors, which raise when their values are read: so the pass can be captured as a CUDA graph."""
    config = replace(model(name).config, hidden_size=256, moe_intermediate_size=128, intermediate_size=256)
    with FakeTensorMode(), force("triton"), torch.inference_mode():
        m = Ling(config)
        if fp8:
            to_fp8(m)
            quantize_for_inference_(m)
        e = Engine(m, page_size=4, cache_tokens=400, max_running=4, draft=2)
        e.forward.edits, e.forward.masks = Edits(5, e.device), Masks(5, 3, config.vocab_size, e.device)
        bits = itertools.product((False, True), repeat=4)
        modes = (SamplingMode(*others, edited=edited, guided=edited) for *others, edited in bits)
        for mode in modes:
            lanes = torch.zeros(2, dtype=torch.int64)
            with NoHostData():
                output = e.forward.compute(lanes, mode)
            assert output.shape == (2, 6 if mode.guided else 4)
        with pytest.raises(RuntimeError):
            output.tolist()
