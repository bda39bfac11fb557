"""CUDA graphs that run side by side on two streams, for tests of kernels whose blocks share counters or barriers."""

from collections.abc import Callable

import torch
from torch import Tensor


def replayed_side_by_side(run: Callable[[], tuple[Tensor, ...]]) -> list[tuple[Tensor, ...]]:
    """Capture run() three times in each of two graphs, replay both 20 times on two streams -> the six last results."""
    graphs = []
    for _ in range(2):
        graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()
        with torch.cuda.graph(graph):
            results = [run() for _ in range(3)]
        graphs.append((graph, results, stream))
    torch.cuda.synchronize()
    for _ in range(20):
        for graph, _, stream in graphs:
            with torch.cuda.stream(stream):
                graph.replay()
    torch.cuda.synchronize()
    return [result for _, results, _ in graphs for result in results]
