"""Weight gradients that are computed after the input gradients of the same backward, as zero-bubble pipelines do.

A backward that knows how computes a weight's gradient through `now_or_later`. Inside `deferring()` that product is
queued, and the backward goes on to the layer before.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

queue: list[Callable[[], None]] | None = None  # no thread-local: on GPUs autograd's own threads run the backward


@contextmanager
def deferring(gradients: list[Callable[[], None]]) -> Iterator[None]:
    """Queue weight gradients in the list; whoever takes them from it calls them, in any order."""
    global queue
    before, queue = queue, gradients
    try:
        yield
    finally:
        queue = before


def now_or_later(ctx, index: int, compute: Callable[[], Tensor | None]) -> Tensor | None:
    """The gradient of the Function's input `index`, counted among its tensors, or None where it is queued.

    compute() returns it, or None where it has added it to the weight's `main_grad` itself. A queued gradient later
    goes where autograd would have sent it, through casts and hooks to `grad`.
    """
    if queue is None or ctx.next_functions[index][0] is None:  # the latter: nobody wants this gradient
        return compute()
    edge = GradientEdge(*ctx.next_functions[index])

    def later() -> None:
        dw = compute()
        if dw is not None:
            torch.autograd.backward((edge,), (dw,))

    queue.append(later)
    return None
