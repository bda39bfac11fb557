"""The 2-norm over all gradients of a model, for clipping: sqrt(sum over tensors of sum(g^2))."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ..op import expect


def grad_norm(grads: Sequence[Tensor]) -> Tensor:
    """grads of any shapes, on one device -> their joint 2-norm, a scalar on that device, without a sync.

    fp32, also for bf16 gradients, or fp64 where a gradient is fp64. 0 without gradients (on the CPU then); NaN or inf
    where a gradient has one. Not differentiable. Raises ValueError for tensors that are not floating point or lie on
    several devices.
    """
    expect(all(g.is_floating_point() for g in grads), "floating-point gradients", *grads)
    devices = {g.device for g in grads}
    expect(len(devices) <= 1, "gradients on one device", *devices)
    return grad_norm_ref(grads)


@torch.no_grad()
def grad_norm_ref(grads):
    if not grads:
        return torch.zeros(())
    # A few launches for all tensors. torch.nn.utils.get_total_norm does the same, but rounds norms of bf16 to bf16.
    dtype = torch.float64 if any(g.dtype == torch.float64 for g in grads) else torch.float32
    return torch.linalg.vector_norm(torch.stack(torch._foreach_norm(list(grads), 2, dtype=dtype)))
