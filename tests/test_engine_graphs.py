"""Decode passes as CUDA graphs, and that they need nothing from the host."""

import itertools

import pytest
import torch

from ling_kernels.generate.edits import Edits, Masks
from ling_kernels.generate.graphs import batch_sizes
from ling_kernels.model.sample import SamplingMode
from tests.engines import NO_STOP, NoHostData, engine_on_fake_tensors, make_engine, make_overlapped_engine, references


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


@pytest.mark.parametrize("name", ["base", "mtp1"])
@pytest.mark.parametrize("fp8", [False, True])
def test_a_decode_pass_does_not_synchronise(name, fp8):
    """On fake tensors, which raise when their values are read: so the pass can be captured as a CUDA graph."""
    with engine_on_fake_tensors(name, fp8) as e:
        e.forward.edits, e.forward.masks = Edits(5, e.device), Masks(5, 3, e.config.vocab_size, e.device)
        bits = itertools.product((False, True), repeat=4)
        modes = (SamplingMode(*others, edited=edited, guided=edited) for *others, edited in bits)
        for mode in modes:
            lanes = torch.zeros(2, dtype=torch.int64)
            with NoHostData():
                output = e.forward.compute(lanes, mode)
            assert output.shape == (2, 6 if mode.guided else 4)
        with pytest.raises(RuntimeError):
            output.tolist()
