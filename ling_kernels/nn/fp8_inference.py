"""FP8 weights alone, for inference: the bf16 or fp32 parameters that they were quantised from are gone."""

import torch
from torch import Tensor, nn

from ..op import E4M3
from ..ops.quantize import BLOCK, quantize_weight
from .fp8 import Fp8Experts, Fp8Linear, Fp8MLP

# The buffer beside a weight that holds its scales. They multiply; checkpoints use this name all the same.
SCALES = "_scale_inv"


class FixedFp8:
    """A weight that is FP8 itself, in the place of an Fp8Cache."""

    def __init__(self, owner: nn.Module, scales: str):
        self.owner, self.scales = owner, scales

    def __call__(self, w: nn.Parameter) -> tuple[Tensor, Tensor]:
        return w, getattr(self.owner, self.scales)


@torch.no_grad()
def quantize_for_inference_(model: nn.Module) -> None:
    """The weights of the FP8 layers of `model` become e4m3 parameters without gradient, with buffers of fp32 scales.

    On the meta device they get sizes and no values. From then on `.to(dtype)` would spoil them, and torch.compile does
    not take them.
    """
    for module in [*model.modules()]:
        for i, (owner, name) in enumerate(weights_of(module)):
            w = getattr(owner, name)
            if w.is_meta:
                *E, N, K = w.shape
                q = w.new_empty(w.shape, dtype=E4M3)
                scale = w.new_empty(*E, N // BLOCK, K // BLOCK, dtype=torch.float32)
            else:
                q, scale = quantize_weight(w, module.fp8.pow2)
            setattr(owner, name, nn.Parameter(q, requires_grad=False))
            owner.register_buffer(name + SCALES, scale)
            module.fp8.caches[i] = FixedFp8(owner, name + SCALES)


def weights_of(module: nn.Module) -> list[tuple[nn.Module, str]]:
    """Owner and name of each weight of an FP8 layer."""
    if isinstance(module, Fp8Linear):
        return [(module, "weight")]
    if isinstance(module, Fp8MLP):
        return [(module.gate_up, "weight"), (module.down, "weight")]
    return [(module, "gate_up"), (module, "down")] if isinstance(module, Fp8Experts) else []
