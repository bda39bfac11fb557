"""pytest benchmarks/bench_ops.py: every op of the table, forward and backward, on its backends and against every peer
that is here, in GPU time. First what this GPU copies, reads and multiplies.

A row holds the least that any implementation must move and the FLOPs of products; report.py makes percentages of them.
`--grid full` adds Ling's grid to each op's own shape, for the kernels and the peers.
"""

import pytest
import torch

from benchmarks import peers
from benchmarks.clock import RATES, Tick, copies, flush_l2, rate_of, time_calls
from benchmarks.grid import shapes, title
from benchmarks.work import Backward, forward_work, op_of, tensors
from ling_kernels.backend import force
from tests.cases import CASES, args_of, runs

__all__ = ["Tick", "flush_l2"]
pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="times a GPU")


def detached(a):
    if isinstance(a, torch.Tensor):
        return a.detach()
    if isinstance(a, tuple):
        return type(a)(*map(detached, a)) if hasattr(a, "_fields") else tuple(map(detached, a))
    return a


def implementations(case, own_shape: bool) -> list[str]:
    """Backends, then peers; the reference, as it is and compiled, only at the Case's own shape."""
    found = [*(b for b in ("cuda", "triton") if b in case.backends), "torch"]
    found += [f"peer:{name}" for name in peers.of(case)]
    return [by for by in found if own_shape or by not in ("torch", "peer:torch.compile")]


def sweep(full: bool) -> list:
    found = []
    for case in CASES:
        for i, shape in enumerate(shapes(case, full)):
            name = title(case, shape)
            for by in implementations(case, i == 0):
                for which in ("forward", "backward"):
                    if which == "backward" and by.startswith("peer:"):
                        continue
                    marks = () if by.startswith("peer:") or runs(by) else pytest.mark.skip(f"{by} cannot run here")
                    found.append(pytest.param(case, shape, by, which, id=f"{name}-{by}-{which}", marks=marks))
    return found


def pytest_generate_tests(metafunc):
    if "which" in metafunc.fixturenames:
        full = metafunc.config.getoption("--grid", "quick") == "full"
        metafunc.parametrize("case, shape, by, which", sweep(full) if torch.cuda.is_available() else [])


@pytest.fixture(autouse=True)
def enough_memory():
    try:
        yield
    finally:
        torch.cuda.empty_cache()


@pytest.mark.benchmark(timer=Tick, group="rates")
@pytest.mark.parametrize("rate", RATES)
def bench_rate(benchmark, rate):
    call, amount = rate_of(rate)
    time_calls(benchmark, lambda n: [call])
    benchmark.extra_info.update(rate=rate, per_second=amount / benchmark.stats.stats.median)


@pytest.mark.benchmark(timer=Tick, group="ops")
def bench_op(benchmark, case, shape, by, which):
    try:
        args = tuple(args_of(case, shape, case.dtypes[0]))
        if which == "backward" and not any(t.requires_grad for t in tensors(args)):
            pytest.skip("has no gradient")
        info = time_peer(benchmark, case, shape, args, by[5:]) if by.startswith("peer:") else (
            time_ours(benchmark, case, shape, args, by, which)
        )  # fmt: skip
    except torch.OutOfMemoryError:
        pytest.skip("more memory than this GPU has")
    benchmark.extra_info.update(
        case=title(case, shape), op=case.op.__name__, by=by, which=which, shape={k: str(v) for k, v in shape.items()},
        **info,
    )  # fmt: skip


def time_ours(benchmark, case, shape, args, by: str, which: str) -> dict:
    op = op_of(case)
    with force(by):
        if which == "backward":
            backward = Backward(case, shape, args)
            if not backward.outs:
                pytest.skip("has no gradient")
            work = backward.work

            def calls(n):
                others = [] if n == 1 else copies(args, work.bytes)[1:]
                return [backward.run] if n == 1 else [Backward(case, shape, a).run for a in others]

        else:
            args = detached(args)
            work = forward_work(case, shape, args, op(*args, **case.kwargs))

            def calls(n):
                several = [args] if n == 1 else copies(args, work.bytes)
                return [lambda a=a: op(*a, **case.kwargs) for a in several]

        timer = time_calls(benchmark, calls)
    return dict(bytes=work.bytes, flops=work.flops, precision=work.precision, timer=timer)


def reference(case, args, ours):
    """Its result; ours where there is no memory for it, as at the largest shapes of the grid."""
    try:
        with force("torch"):
            return case.ref(*args, **case.kwargs)
    except torch.OutOfMemoryError:
        return ours


def time_peer(benchmark, case, shape, args, name: str) -> dict:
    """A peer's forward on its own layout, made before, where its first result is the reference's up to rounding."""
    args = detached(args)
    try:
        call, alike = peers.prepare(name, case, args)
        theirs, ours = call(), op_of(case)(*args, **case.kwargs)
        error = peers.error(theirs, reference(case, args, ours), alike)
    except torch.OutOfMemoryError:
        raise
    except Exception as reason:  # whatever a foreign library may raise belongs into the report, and ends nothing
        pytest.skip(f"{name}: {type(reason).__name__}: {(str(reason).splitlines() or [''])[0][:150]}")
    work = forward_work(case, shape, args, ours)
    timer = time_calls(benchmark, lambda n: [call])
    return dict(bytes=work.bytes, flops=work.flops, precision=work.precision, timer=timer, error=error)
