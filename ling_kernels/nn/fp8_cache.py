"""Caches of tensors computed from a weight, and how they detect that the weight changed."""

import functools
import weakref

from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from ..ops.quantize import quantize_weight

_steps = 0  # optimizer steps of this process since the first cache


@functools.cache
def watch_optimizers() -> None:
    """Count the steps of all optimizers: a fused one changes weights without raising their `_version`."""

    def count(optimizer, *_) -> None:
        global _steps
        _steps += not getattr(optimizer, "raises_version", False)

    register_optimizer_step_post_hook(count)


def version_of(w: Tensor) -> tuple:
    """A value that differs after every change of w, for caches that called `watch_optimizers`."""
    return _steps, w._version, w.device


class Fp8Cache:
    """The FP8 codes and scales of one weight, at one address, computed again only after the weight changed.

    The weight's attribute `fp8` is its cache, so that an optimizer can requantise in its own pass
    (train/optimizer.py). A copy or a pickle of a cache is empty.
    """

    def __init__(self, pow2: bool):
        watch_optimizers()
        self.pow2 = pow2
        self.pair: tuple[Tensor, Tensor] | None = None
        self.weight: weakref.ref | None = None
        self.version: tuple | None = None
        self.written = False  # by the optimizer's step that is under way

    def __reduce__(self):
        return Fp8Cache, (self.pow2,)

    def __call__(self, w: nn.Parameter) -> tuple[Tensor, Tensor]:
        if not self.is_current(w):
            moved = self.pair is None or self.pair[0].device != w.device
            self.pair = quantize_weight(w, self.pow2, None if moved else self.pair)
            self.mark_current(w)
        w.fp8 = self
        return self.pair

    def is_current(self, w: Tensor) -> bool:
        return self.pair is not None and self.weight() is w and self.version == version_of(w)

    def mark_current(self, w: Tensor) -> None:
        """Mark the cache as up to date with w."""
        self.weight, self.version = weakref.ref(w), version_of(w)
