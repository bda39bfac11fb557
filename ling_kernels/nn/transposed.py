"""The transpose of an FP8 weight, for an input gradient that reads it along its other dimension.

Bytes kept for each element of a weight, besides its own (scales add 1/4096), and passes over it, which read 1 byte and
write 1:
  on_demand  0. While one weight's input gradient runs, 1 for that weight alone. A pass in every backward.
  kept       1, always at one address, as CUDA graphs want it. A pass in every optimizer step, however many micro
             batches it accumulates.
Ling-mini's routed experts, 15.3e9 elements on one GPU: 0, with 0.54 GB while a layer's gate_up is in use, or 15.3 GB.
"""

import weakref

from torch import Tensor

from ..op import expect
from ..ops.transpose_fp8 import transpose_fp8
from .fp8_cache import watch_optimizers

KEEP = ("on_demand", "kept")


class Transposed:
    """The transpose of one weight. `transposed(w_q, w_scale)` returns what `transpose_fp8` does, perhaps from a cache.

    A copy or a pickle has an empty cache.
    """

    def __init__(self, keep: str = "on_demand"):
        expect(keep in KEEP, f"keep among {', '.join(KEEP)}", keep)
        watch_optimizers()
        self.keep, self.version = keep, None
        self.pair: tuple[Tensor, Tensor] | None = None
        self.weight: weakref.ref | None = None

    def __reduce__(self):
        return Transposed, (self.keep,)

    def __call__(self, w_q: Tensor, w_scale: Tensor, version=None) -> tuple[Tensor, Tensor]:
        """w_q [(E,) N, K] e4m3 and w_scale [(E,) N/128, K/128] -> wt_q [(E,) K, N] and wt_scale, not to be written.

        version: a value that changes whenever the weight does, such as the step, or `version_of` the parameter that w_q
        was quantised from. Without one, w_q is recognised by its identity and its own `_version`, which a change
        through `.data` does not raise.
        """
        if self.keep == "on_demand":
            return transpose_fp8(w_q, w_scale)
        if version is None:
            current = self.pair is not None and self.weight() is w_q and self.version == w_q._version
        else:
            current = self.pair is not None and self.version == version
        if not current:
            moved = self.pair is None or self.pair[0].device != w_q.device
            self.pair, self.weight = transpose_fp8(w_q, w_scale, None if moved else self.pair), weakref.ref(w_q)
            self.version = w_q._version if version is None else version
        return self.pair
