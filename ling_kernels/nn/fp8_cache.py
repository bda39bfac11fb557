"""Caches of tensors computed from a weight, and how they detect that the weight changed."""

import functools
import itertools

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils.weak import WeakIdKeyDictionary

from ..ops.quantize import quantize_weight

_steps = 0  # optimizer steps of this process since the first cache
_numbers = WeakIdKeyDictionary()  # a number for each weight: a new one may have the version and address of an old one
_next_number = itertools.count()
_caches = WeakIdKeyDictionary()  # the Fp8Cache of each weight; not an attribute, which torch.save would write with it


@functools.cache
def watch_optimizers() -> None:
    """Count the steps of all optimizers: a fused one changes weights without raising their `_version`."""

    def count(optimizer, *_) -> None:
        global _steps
        _steps += not getattr(optimizer, "raises_version", False)

    register_optimizer_step_post_hook(count)


def version_of(w: Tensor) -> tuple | None:
    """A value that differs from weight to weight and after every change of w, for caches that called
    `watch_optimizers`. None for a tensor of inference mode, whose changes nobody counts."""
    if w.is_inference():
        return None
    if w not in _numbers:
        _numbers[w] = next(_next_number)
    return _numbers[w], _steps * w.requires_grad, w._version, w.device  # no optimizer changes a frozen one


def reusable(pair: tuple[Tensor, Tensor] | None, w: Tensor) -> bool:
    """Whether a cached pair can be written again and be saved for a backward pass."""
    if pair is None or pair[0].device != w.device:
        return False
    return not pair[0].is_inference() or torch.is_inference_mode_enabled()


class Fp8Cache:
    """The FP8 codes and scales of one weight, at one address, computed again only after the weight changed.

    `cache_of` finds it, so that an optimizer can requantise in its own pass (train/optimizer.py). A copy or a pickle of
    a cache is empty.
    """

    def __init__(self, pow2: bool):
        watch_optimizers()
        self.pow2 = pow2
        self.pair: tuple[Tensor, Tensor] | None = None
        self.version: tuple | None = None
        self.written = False  # by the optimizer's step that is under way

    def __reduce__(self):
        return Fp8Cache, (self.pow2,)

    def __call__(self, w: nn.Parameter) -> tuple[Tensor, Tensor]:
        if not self.is_current(w):
            self.pair = quantize_weight(w, self.pow2, self.pair if reusable(self.pair, w) else None)
            self.mark_current(w)
        _caches[w] = self
        return self.pair

    def is_current(self, w: Tensor) -> bool:
        return reusable(self.pair, w) and self.version is not None and self.version == version_of(w)

    def mark_current(self, w: Tensor) -> None:
        """Mark the cache as up to date with w."""
        self.version = version_of(w)


def cache_of(w: Tensor) -> Fp8Cache | None:
    """The cache that holds a weight's FP8 copy, if one does."""
    return _caches.get(w)


def forget_cache(w: Tensor) -> None:
    """Drop a weight's FP8 copy, so that an optimizer does not update it any more."""
    _caches.pop(w, None)
