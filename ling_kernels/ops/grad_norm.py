"""The 2-norm over all gradients of a model, for clipping: sqrt(sum over tensors of sum(g^2))."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ..op import expect, upcast


def grad_norm(grads: Sequence[Tensor]) -> Tensor:
    """grads of any shapes, on one device -> their joint 2-norm, a scalar fp32 on that device, without a sync.

    bf16 gradients are accumulated in fp32. 0 without gradients (on the CPU then); NaN or inf where one is in them. Not
    differentiable. Raises ValueError for tensors that are not floating point or lie on several devices.
    """
    expect(all(g.is_floating_point() for g in grads), "floating-point gradients", *grads)
    devices = {g.device for g in grads}
    expect(len(devices) <= 1, "gradients on one device", *devices)
    return grad_norm_ref(grads)


@torch.no_grad()
def grad_norm_ref(grads):
    if not grads:
        return torch.zeros(())
    # a few launches for all; torch.nn.utils.get_total_norm, which is this, would round norms of bf16 tensors to bf16
    norms = torch._foreach_norm(list(grads), 2, dtype=upcast(grads[0].new_empty(0)).dtype)
    return torch.linalg.vector_norm(torch.stack(norms))
