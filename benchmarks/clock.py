"""Seconds on a GPU, by its own clock, and the rates that this very GPU reaches."""

from collections.abc import Callable

import torch
from torch import Tensor

SHORT = 20e-6  # seconds; below, one launch at a time measures the launch
SPENT = 0.25  # seconds of calls per benchmark
L2 = 128 << 20  # bytes: more than Hopper's L2


class Tick:
    """A pytest-benchmark timer that reads the GPU's clock: end - start is the time between two CUDA events."""

    calls = 1  # of what is timed, between the two: a CUDA graph holds several

    def __init__(self):
        self.event = torch.cuda.Event(enable_timing=True)
        self.event.record()

    def __sub__(self, start) -> float:
        torch.cuda.synchronize()
        return start.event.elapsed_time(self.event) / 1e3 / Tick.calls


def flush_l2():
    """Also keeps the GPU busy while the host enqueues, so that launch latency is not measured."""
    torch.empty(2 * L2, dtype=torch.uint8, device="cuda").zero_()


def once(call: Callable) -> float:
    """Seconds of one call after a few others."""
    for _ in range(3):
        call()
    flush_l2()
    start = Tick()
    call()
    return Tick() - start


def copies(args, bytes_: int) -> list:
    """The arguments, as often as L2 cannot hold them, 2 to 64 times; strides and all."""
    return [args] + [copied(args) for _ in range(min(63, max(1, L2 // max(bytes_, 1))))]


def copied(a):
    if isinstance(a, Tensor):
        return a.detach().clone().requires_grad_(a.requires_grad)
    if isinstance(a, tuple | list):
        return type(a)(*map(copied, a)) if hasattr(a, "_fields") else type(a)(map(copied, a))
    return a


def graph_of(calls: Callable[[None], list[Callable]]) -> tuple[torch.cuda.CUDAGraph, int]:
    """At least 20 of them, in turn, as one CUDA graph, and how many. Raises RuntimeError where one asks the host."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # also made here: a backward runs where its forward ran
        found = calls(None)
        for call in found:
            call()
    torch.cuda.current_stream().wait_stream(stream)
    found *= -(-20 // len(found))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        for call in found:
            call()
    return graph, len(found)


def time_calls(benchmark, calls: Callable[[int | None], list[Callable]], rounds: int = 50) -> str:
    """Time calls(1)[0], each round with a cold L2; a short one many times in a CUDA graph. Returns how.

    calls(None) gives several, on arguments of their own, which a graph takes in turn so that L2 is cold without a
    flush between.
    """
    Tick.calls = 1
    one = calls(1)[0]
    seconds = once(one)
    if seconds < SHORT:
        try:
            graph, Tick.calls = graph_of(calls)
        except RuntimeError as error:
            torch.cuda.synchronize()
            benchmark.extra_info["no_graph"] = str(error).splitlines()[0][:200]
        else:
            try:
                benchmark.pedantic(graph.replay, setup=flush_l2, warmup_rounds=3, rounds=rounds)
            finally:
                Tick.calls = 1
            return "graph"
    rounds = max(5, min(rounds, int(SPENT / max(seconds, 1e-6))))
    benchmark.pedantic(one, setup=flush_l2, warmup_rounds=2, rounds=rounds)
    return "events"


def rate_of(name: str) -> tuple[Callable, int]:
    """A call, and how many bytes it moves or FLOPs it does: what the limits of this GPU are measured with."""
    if name in ("copy", "read"):
        x = torch.randn(1 << 30, device="cuda", dtype=torch.bfloat16)
        if name == "read":
            return lambda: x.view(torch.int32).amax(), x.nbytes
        y = torch.empty_like(x)
        return lambda: y.copy_(x), 2 * x.nbytes
    n = 8192
    a, b = (torch.randn(n, n, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    if name == "fp8":
        a, b = a.to(torch.float8_e4m3fn), b.to(torch.float8_e4m3fn).T
        one = torch.ones((), device="cuda")
        return lambda: torch._scaled_mm(a, b, one, one, out_dtype=torch.bfloat16, use_fast_accum=True), 2 * n**3
    return lambda: a @ b, 2 * n**3


RATES = ("copy", "read", "bf16", "fp8")
