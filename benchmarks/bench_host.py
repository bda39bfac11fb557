"""pytest benchmarks/bench_host.py: what the host spends, GPU or not: imports, calls up to launches, launches in a step.

A call's cost is the calling thread's CPU time, told as a ratio to torch.nn.functional.rms_norm of one row, which is
timed between its rounds: microseconds depend on the machine and on who else uses it; hence also minima, not medians. On
a CPU nothing is launched: a launch is counted and returns.
"""

import statistics
import subprocess
import sys
import time
from contextlib import nullcontext

import pytest
import torch
from torch.nn import functional as F

from benchmarks.work import op_of, tensors
from ling_kernels.backend import force
from ling_kernels.model import Ling, LingConfig
from tests.cases import CASES, Rand, args_of

GPU = torch.cuda.is_available()
CALLS = 200


class Launches:
    """While open, launches of Triton kernels are counted; without a GPU that is all that becomes of them."""

    def __enter__(self):
        from triton.runtime.jit import JITFunction

        self.count, self.at, self.run = 0, JITFunction, JITFunction.run

        def count(fn, *args, **kwargs):
            self.count += 1
            return self.run(fn, *args, **kwargs) if GPU else None

        JITFunction.run = count
        return self

    def __exit__(self, *_):
        self.at.run = self.run


def per_call(call, calls: int = CALLS) -> float:
    """Seconds that the host is busy with one; the GPU, where there is one, is not waited for."""
    for _ in range(10):
        call()
    torch.cuda.synchronize() if GPU else None
    start = time.thread_time()
    for _ in range(calls):
        call()
    taken = time.thread_time() - start
    torch.cuda.synchronize() if GPU else None
    return taken / calls


@pytest.fixture(scope="module")
def yardstick():
    """torch's own rms_norm of one row."""
    x, w = torch.randn(1, 2048), torch.randn(2048)
    x, w = (x.cuda(), w.cuda()) if GPU else (x, w)
    return lambda: F.rms_norm(x, (2048,), w, 1e-6)


def smallest(name: str):
    """The op's first Case with kernels, and its smallest shape that is not empty."""
    case = next(c for c in CASES if c.op.__name__ == name and "triton" in c.backends)
    sizes = [(s, [t.numel() for t in tensors(args_of(case, s, case.dtypes[0]))]) for s in case.shapes[:4]]
    return case, next(shape for shape, n in sizes if n and all(n))


def with_kernels() -> list[str]:
    return sorted({c.op.__name__ for c in CASES if "triton" in c.backends})


@pytest.mark.parametrize("name", with_kernels())
def bench_call(benchmark, yardstick, name):
    """A public op up to its last launch, forward, without a graph for backward."""
    case, shape = smallest(name)
    args = [a.detach() if torch.is_tensor(a) else a for a in args_of(case, shape, case.dtypes[0])]
    op = op_of(case)
    with force("triton"), torch.no_grad(), Launches() as seen:
        op(*args, **case.kwargs)
        launches = seen.count
    ours, torchs = [], []
    with nullcontext() if GPU else Launches(), force("triton"), torch.no_grad():
        benchmark.pedantic(
            lambda: ours.append(per_call(lambda: op(*args, **case.kwargs))),
            setup=lambda: torchs.append(per_call(yardstick)), warmup_rounds=1, rounds=7,
        )  # fmt: skip
    seconds, unit = min(ours), min(torchs)
    benchmark.extra_info.update(
        host=name, us=seconds * 1e6, ratio=seconds / unit, yardstick_us=unit * 1e6, launched=launches
    )


@pytest.mark.parametrize("package", ["torch", "ling_kernels", "ling_kernels.model"])
def bench_import(benchmark, package):
    """In a process of its own, without what an empty one takes."""
    empty, full = (lambda code=code: subprocess.run([sys.executable, "-c", code], check=True)
                   for code in ("", f"import {package}"))  # fmt: skip
    nothing = statistics.median(timed(empty) for _ in range(3))
    benchmark.pedantic(full, warmup_rounds=1, rounds=3)
    benchmark.extra_info.update(imports=package, seconds=benchmark.stats.stats.median - nothing)


def timed(call) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def bench_launches(benchmark):
    """Triton kernels in one training step of the tiny model; each layer of a big one has as many."""
    config = LingConfig.tiny()
    with torch.device("cuda" if GPU else "cpu"):
        model = Ling(config)
    ids = Rand(torch.float32).ints(0, 256, 2, 64, dtype=torch.int64)
    with force("triton"), Launches() as seen:
        out = model(ids, labels=ids, logits=False)
        forward = seen.count
        out.loss.backward()
    benchmark.pedantic(lambda: None)
    layers = config.num_hidden_layers + config.num_nextn_predict_layers
    benchmark.extra_info.update(
        launches=dict(forward=forward, backward=seen.count - forward), layers=layers, model="tiny", backend="triton"
    )
