"""FP8 copies of weights, kept from one change of a weight to the next, and how a change is known."""

import weakref

from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from ..ops.quantize import quantize_weight

_steps = 0


@register_optimizer_step_post_hook
def _count_step(optimizer, *_) -> None:
    """A fused optimizer changes weights without raising their `_version`, unless it says otherwise."""
    global _steps
    _steps += not getattr(optimizer, "raises_version", False)


def version_of(w: Tensor) -> tuple:
    """Another one after every change of w."""
    return _steps, w._version, w.device


class Fp8Copy:
    """The FP8 copy of one weight, kept at one address from one change of the weight to the next. The weight's attribute
    `fp8` is this, so that an optimizer can requantise in its own pass: see train/optimizer.py."""

    def __init__(self, pow2: bool):
        self.pow2, self.made, self.of, self.version = pow2, None, None, None
        self.written = False  # by the optimizer's step that is under way

    def __call__(self, w: nn.Parameter) -> tuple[Tensor, Tensor]:
        if not self.up_to_date(w):
            moved = self.made is None or self.made[0].device != w.device
            self.made = quantize_weight(w, self.pow2, None if moved else self.made)
            self.is_of(w)
        w.fp8 = self
        return self.made

    def up_to_date(self, w: Tensor) -> bool:
        return self.made is not None and self.of() is w and self.version == version_of(w)

    def is_of(self, w: Tensor) -> None:
        """What was made is of w as it is now."""
        self.of, self.version = weakref.ref(w), version_of(w)
