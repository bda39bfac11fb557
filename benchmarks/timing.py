"""Time calls by the GPU's clock with a cold L2, and measure how fast this GPU copies, reads and multiplies."""

from collections.abc import Callable

import torch
from torch import Tensor

SHORT = 20e-6  # seconds: the host needs about as long for a launch, so shorter calls are timed in a CUDA graph
BUDGET = 0.25  # seconds of timed calls per benchmark
L2 = 128 << 20  # bytes: above the 50 to 60 MB that Hopper has
RATES = ("copy", "read", "bf16", "fp8")


class Tick:
    """A timer for pytest-benchmark: the difference of two is the time between two CUDA events, in seconds per call."""

    calls = 1  # calls between two ticks: a CUDA graph holds several

    def __init__(self):
        self.event = torch.cuda.Event(enable_timing=True)
        self.event.record()

    def __sub__(self, start: "Tick") -> float:
        torch.cuda.synchronize()
        return start.event.elapsed_time(self.event) / 1e3 / Tick.calls


def flush_l2() -> None:
    """Overwrite L2. The write also keeps the GPU busy while the host enqueues the call, which hides launch latency."""
    torch.empty(2 * L2, dtype=torch.uint8, device="cuda").zero_()


def seconds_of(call: Callable) -> float:
    """Seconds of one call, after three to warm up."""
    for _ in range(3):
        call()
    flush_l2()
    start = Tick()
    call()
    return Tick() - start


def copies(args, nbytes: int) -> list:
    """args and copies of it (dtypes, strides and requires_grad alike), in all 2 to 64: together larger than L2."""
    return [args, *(copy_of(args) for _ in range(min(63, max(1, L2 // max(nbytes, 1)))))]


def copy_of(a):
    if isinstance(a, Tensor):
        return a.detach().clone().requires_grad_(a.requires_grad)
    if isinstance(a, tuple | list):
        return type(a)(*map(copy_of, a)) if hasattr(a, "_fields") else type(a)(map(copy_of, a))
    return a


def graph_of(make: Callable[[], list[Callable]]) -> tuple[torch.cuda.CUDAGraph, int]:
    """A CUDA graph of make()'s calls in turn, at least 20, and their number. RuntimeError where a call synchronises."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # autograd runs a backward on the stream of its forward, so make() runs here too
        calls = make()
        for call in calls:
            call()
    torch.cuda.current_stream().wait_stream(stream)
    calls *= -(-20 // len(calls))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        for call in calls:
            call()
    return graph, len(calls)


def time_calls(benchmark, call: Callable, several: Callable[[], list[Callable]] | None = None) -> None:
    """Time `call`, each round with a cold L2; extra_info["timer"] says how.

    A call below SHORT is timed in a CUDA graph of several()'s calls, each on other arguments, so that L2 is cold
    without a flush between them. Without a GPU this is pytest-benchmark's own clock and three rounds.
    """
    if not torch.cuda.is_available():
        benchmark.extra_info["timer"] = "host"
        benchmark.pedantic(call, warmup_rounds=1, rounds=3)
        return
    seconds, info = seconds_of(call), benchmark.extra_info
    if seconds < SHORT:
        try:
            graph, Tick.calls = graph_of(several or (lambda: [call]))
            info["timer"] = "graph" if several else "graph, warm L2"
            benchmark.pedantic(graph.replay, setup=flush_l2, warmup_rounds=3, rounds=50)
            return
        except RuntimeError as error:
            torch.cuda.synchronize()
            info["no_graph"] = str(error).splitlines()[0][:200]
        finally:
            Tick.calls = 1
    info["timer"] = "events"
    rounds = max(5, min(50, int(BUDGET / max(seconds, 1e-6))))
    benchmark.pedantic(call, setup=flush_l2, warmup_rounds=2, rounds=rounds)


def rate_call(name: str) -> tuple[Callable, int]:
    """A call that measures the rate `name`, and the bytes that it moves or the FLOPs that it does."""
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
