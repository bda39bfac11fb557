"""pytest benchmarks/bench_ops.py: every op at its benchmark shape on every backend it has, in GPU time.

GB/s counts each argument and each result once, which is the least that any implementation must move.
"""

import pytest
import torch
from torch import Tensor

from ling_kernels.backend import force
from tests.cases import args_of, sweep

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="times a GPU")


class Tick:
    """A pytest-benchmark timer that reads the GPU's clock: end - start is the time between two CUDA events."""

    def __init__(self):
        self.event = torch.cuda.Event(enable_timing=True)
        self.event.record()

    def __sub__(self, start):
        torch.cuda.synchronize()
        return start.event.elapsed_time(self.event) / 1e3


def flush_l2():
    """Also keeps the GPU busy while the host enqueues, so that launch latency is not measured."""
    torch.empty(256 << 20, dtype=torch.uint8, device="cuda").zero_()


def detached(a):
    if isinstance(a, Tensor):
        return a.detach()
    if isinstance(a, tuple):
        return type(a)(*map(detached, a)) if hasattr(a, "_fields") else tuple(map(detached, a))
    return a


def nbytes(a) -> int:
    if isinstance(a, Tensor):
        return a.nbytes
    return sum(map(nbytes, a)) if isinstance(a, tuple) else 0


@pytest.mark.benchmark(timer=Tick, group="ops")
@pytest.mark.parametrize("case, shape, dtype, backend", sweep(bench=True))
def bench_forward(benchmark, case, shape, dtype, backend):
    try:
        args = detached(tuple(args_of(case, shape, dtype)))
        with force(backend):
            out = benchmark.pedantic(case.op, args, case.kwargs, setup=flush_l2, warmup_rounds=5, rounds=50)
    except torch.OutOfMemoryError:
        torch.cuda.empty_cache()
        pytest.skip("more memory than this GPU has")
    seconds = benchmark.stats.stats.median
    benchmark.extra_info["GB/s"] = (nbytes(args) + nbytes(out)) / seconds / 1e9
    if case.flops:
        benchmark.extra_info["TFLOPS"] = case.flops(**shape) / seconds / 1e12
