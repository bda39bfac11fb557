"""RMSNorm as a module, and buffers that stay fp32 whatever the module is cast to."""

import torch
from torch import Tensor, nn

from ..ops.rms_norm import rms_norm


class RMSNorm(nn.Module):
    """weight [N]; forward(x [..., N]) -> y, or with a residual (y, x + residual) as the op `rms_norm` does."""

    def __init__(self, size: int, eps: float = 1e-6):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(size)), eps

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor | tuple[Tensor, Tensor]:
        return rms_norm(x, self.weight, residual, self.eps)


class Fp32Buffers(nn.Module):
    """A module whose floating-point buffers follow it to other devices and keep their precision in `.to(bfloat16)`."""

    def _apply(self, fn, recurse=True):
        before = {n: b for n, b in self._buffers.items() if b is not None and b.is_floating_point()}
        super()._apply(fn, recurse)
        for name, b in before.items():
            now = self._buffers[name]
            if now.dtype != b.dtype:
                self._buffers[name] = torch.empty_like(b, device=now.device) if b.is_meta else b.to(now.device)
        return self
