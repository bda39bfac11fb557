"""CUDA graphs of a decode pass: one launch replays all its kernels, without host work between them."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..model.sample import SamplingMode


class CudaGraphs:
    """A graph per batch size and SamplingMode, captured on first use; all graphs share one memory pool.

    compute(lanes [B] int64, mode) -> Tensor must accept any lanes, and must not change any state for padding_lane,
    which pads a batch to the next captured size.
    """

    def __init__(
        self,
        compute: Callable[[Tensor, SamplingMode], Tensor],
        padding_lane: int,
        max_batch: int,
        device: torch.device,
    ):
        self.compute, self.padding_lane, self.sizes, self.device = compute, padding_lane, batch_sizes(max_batch), device
        self.captured: dict[tuple[int, SamplingMode], tuple[Tensor, torch.cuda.CUDAGraph, Tensor]] = {}
        self.lanes_of: dict[tuple[int, SamplingMode], list[int]] = {}  # the values of their input tensors
        self.pool = None

    def __call__(self, lanes: Sequence[int], mode: SamplingMode) -> Tensor:
        """compute(lanes, mode) by graph replay; the next call may overwrite the returned tensor."""
        size = next(s for s in self.sizes if s >= len(lanes))
        if (size, mode) not in self.captured:
            self.captured[size, mode] = self.capture(size, mode)
        graph_lanes, graph, output = self.captured[size, mode]
        padded = [*lanes, *[self.padding_lane] * (size - len(lanes))]
        if self.lanes_of.get((size, mode)) != padded:  # as a rule the same requests run as in the last pass
            graph_lanes.copy_(torch.tensor(padded), non_blocking=True)
            self.lanes_of[size, mode] = padded
        graph.replay()
        return output[: len(lanes)]

    def prepare(self, *modes: SamplingMode) -> None:
        """Capture every batch size of these modes."""
        for mode in modes:
            for size in reversed(self.sizes):  # smaller graphs reuse the memory of larger ones
                self([self.padding_lane] * size, mode)

    def capture(self, size: int, mode: SamplingMode) -> tuple[Tensor, torch.cuda.CUDAGraph, Tensor]:
        """(input lanes, graph, output) of a batch size."""
        lanes = torch.full([size], self.padding_lane, device=self.device)
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):  # warm-up: kernels compile and libraries initialise outside a capture
            self.compute(lanes, mode)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self.pool, capture_error_mode="thread_local"):
            output = self.compute(lanes, mode)
        self.pool = graph.pool()
        return lanes, graph, output


def batch_sizes(max_batch: int) -> list[int]:
    """1 to 8, then multiples of 8, then max_batch. Exact sizes up to 8: a padding lane would load extra experts."""
    return [s for s in (*range(1, 8), *range(8, max_batch, 8)) if s < max_batch] + [max_batch]
