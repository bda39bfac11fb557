"""CUDA graphs of a pass: launched as a whole, it no longer waits for the host between its kernels."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .sample import Mode


class Graphs:
    """One for each batch size of `sizes` and Mode, captured when it is first asked for; they share their memory.

    compute(lanes [B] int64, mode) -> a tensor; it must take any lanes, and change nothing for the lane `nobody`, which
    fills a batch up.
    """

    def __init__(self, compute: Callable[[Tensor, Mode], Tensor], nobody: int, largest: int, device: torch.device):
        self.compute, self.nobody, self.sizes, self.device = compute, nobody, sizes(largest), device
        self.captured: dict[tuple[int, Mode], tuple[Tensor, torch.cuda.CUDAGraph, Tensor]] = {}
        self.pool = None

    def __call__(self, lanes: Sequence[int], mode: Mode) -> Tensor:
        """What compute gives for these lanes; the next call may overwrite it."""
        size = next(s for s in self.sizes if s >= len(lanes))
        if (size, mode) not in self.captured:
            self.captured[size, mode] = self.capture(size, mode)
        static, graph, found = self.captured[size, mode]
        static.copy_(torch.tensor([*lanes, *[self.nobody] * (size - len(lanes))]), non_blocking=True)
        graph.replay()
        return found[: len(lanes)]

    def prepare(self, *modes: Mode) -> None:
        """Capture what these modes may need."""
        for mode in modes:
            for size in reversed(self.sizes):  # the smaller find room in the memory of the larger
                self([self.nobody] * size, mode)

    def capture(self, size: int, mode: Mode) -> tuple[Tensor, torch.cuda.CUDAGraph, Tensor]:
        lanes = torch.full([size], self.nobody, device=self.device)
        before = torch.cuda.Stream()
        before.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(before):  # kernels are compiled and libraries set up outside a capture
            self.compute(lanes, mode)
        torch.cuda.current_stream().wait_stream(before)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self.pool, capture_error_mode="thread_local"):
            found = self.compute(lanes, mode)
        self.pool = graph.pool()
        return lanes, graph, found


def sizes(largest: int) -> list[int]:
    """1 to 8, as a lane of nobody would read experts that no other lane may want, and multiples of 8."""
    return [s for s in (*range(1, 8), *range(8, largest, 8)) if s < largest] + [largest]
