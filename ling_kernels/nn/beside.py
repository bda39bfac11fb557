"""Work beside other work: on a second stream of a GPU."""

from collections.abc import Callable

import torch
from torch import Tensor


def beside(fn: Callable[[Tensor], Tensor], x: Tensor) -> Callable[[], Tensor]:
    """Start fn(x); the function that is returned waits for its result.

    On a GPU fn's kernels run on a second stream, in the backward too, as autograd uses the forward's streams. Elsewhere
    fn has run when this returns.
    """
    stream = second_stream(x)
    if stream is None:
        y = fn(x)
        return lambda: y
    stream.wait_stream(torch.cuda.current_stream(x.device))
    with torch.cuda.stream(stream):
        y = fn(x)
    x.record_stream(stream)  # also for the backward, which reads it there: its memory is not given away before

    def wait() -> Tensor:
        current = torch.cuda.current_stream(x.device)
        current.wait_stream(stream)
        y.record_stream(current)
        return y

    return wait


_streams: dict[torch.device, torch.cuda.Stream] = {}


def second_stream(x: Tensor) -> torch.cuda.Stream | None:
    """One for each GPU; None elsewhere, and where a compiler traces."""
    if not x.is_cuda or torch.compiler.is_compiling():
        return None
    if x.device not in _streams:
        _streams[x.device] = torch.cuda.Stream(x.device)
    return _streams[x.device]
