"""Engines over the tiny official checkpoints, for tests: as on a CPU, and with the control flow of a GPU."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import cache

import pytest
import torch
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from ling_kernels.backend import force
from ling_kernels.generate import Engine
from ling_kernels.generate.graphs import CudaGraphs
from ling_kernels.generate.logprobs import MOST
from ling_kernels.model import Ling
from ling_kernels.nn.fp8 import to_fp8
from ling_kernels.nn.fp8_inference import quantize_for_inference_
from tests.test_model import expected, load

NO_STOP = dict(stop_token_ids=())


@cache
def model(name="base"):
    return load(name)


@cache
def references(name="base") -> list[tuple[list[int], list[int]]]:
    """[(prompt, the official model's greedy new tokens)]."""
    want = expected(name)
    prompts, greedy = want["generate.prompt"].tolist(), want["generate.greedy"].tolist()
    return [(p, g[len(p) :]) for p, g in zip(prompts, greedy, strict=True)]


@contextmanager
def engine_on_fake_tensors(name: str, fp8: bool) -> Iterator[Engine]:
    """With Triton's kernels; fake tensors raise when their values are read."""
    config = replace(model(name).config, hidden_size=256, moe_intermediate_size=128, intermediate_size=256)
    with FakeTensorMode(), force("triton"), torch.inference_mode():
        m = Ling(config)
        if fp8:
            to_fp8(m)
            quantize_for_inference_(m)
        yield Engine(m, page_size=4, cache_tokens=400, max_running=4, draft=2)


class NoHostData(TorchDispatchMode):
    """Refuses copies of host data to the device."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert "lift_fresh" not in str(func)
        return func(*args, **(kwargs or {}))


class ReplayedGraphs(CudaGraphs):
    """CUDA graphs on a CPU: the same static tensors and padding lanes, with a replay that computes eagerly."""

    def capture(self, size, mode):
        lanes = torch.full([size], self.padding_lane)
        output = self.compute(lanes, mode).clone()
        compute = self.compute

        class Graph:
            def replay(self):
                output.copy_(compute(lanes, mode))

        return lanes, Graph(), output


def make_engine(name="base", **options) -> Engine:
    return Engine(model(name), **dict(page_size=4, cache_tokens=400) | options)


class Memory:
    """A HostBuffer where a copy is complete at once."""

    def __init__(self, forward):
        n = 1 + forward.draft
        self.output, self.copied = torch.full((forward.padding_lane * (2 * n + n * (1 + 2 * MOST)),), -7), self

    def record(self):
        pass

    synchronize = record


def make_overlapped_engine(name="base", **options) -> Engine:
    """With graphs, and tokens that reach the host after the launch of the next pass."""
    e = make_engine(name, **options)
    e.overlap = True
    e.forward.buffers = [Memory(e.forward) for _ in e.forward.buffers]
    e.forward.graphs = ReplayedGraphs(e.forward.compute, e.forward.padding_lane, len(e.scheduler.lanes), e.device)
    return e


@pytest.fixture(params=[make_engine, make_overlapped_engine], ids=["cpu", "overlapped"])
def engine(request):
    return request.param


def drain(engine: Engine) -> None:
    """Step until nothing is left, and check that every page and lane has been released."""
    while engine.step():
        check(engine)
    check(engine)
    pages, scheduler = engine.pages, engine.scheduler
    assert pages.available == pages.count and not any(pages.ref_counts), "every page is released"
    assert len({*scheduler.lanes}) == len(scheduler.lanes) == engine.forward.padding_lane and engine.pending is None


def check(engine: Engine) -> None:
    """Every page is free, evictable or in use, with the right reference count."""
    pages, in_use = engine.pages, [p for r in engine.scheduler.running for p in r.pages]
    assert [in_use.count(p) for p in range(pages.count)] == pages.ref_counts
    unused = [*pages.free, *pages.evictable]
    assert len({*unused}) == len(unused) and not {*unused} & {*in_use}
    assert sorted({*unused, *in_use}) == list(range(pages.count))
    assert set(pages.evictable) <= set(pages.hash_of_page)
    assert {p: h for h, p in pages.page_of_hash.items()} == pages.hash_of_page
    assert not any(r.pages for r in engine.scheduler.waiting)
    for r in engine.scheduler.running:
        assert r.computed < len(r.tokens) and pages.needed(r.computed) <= len(r.pages)
