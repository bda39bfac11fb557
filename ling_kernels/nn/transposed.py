"""The transpose of an FP8 weight, for an input gradient that reads it along its other dimension.

Bytes kept for each element of a weight, besides its own (scales add 1/4096), and passes over it, which read 1 byte and
write 1:
  on_demand  0. While one weight's input gradient runs, 1 for that weight alone. A pass in every backward.
  kept       1, always at one address, as CUDA graphs want it. A pass in every optimizer step, however many micro
             batches it accumulates.
Ling-mini's routed experts, 15.3e9 elements on one GPU: 0, with 0.54 GB while a layer's gate_up is in use, or 15.3 GB.
"""

from typing import Any

from torch import Tensor

from ..op import expect
from ..ops.transpose_fp8 import transpose_fp8
from .fp8_cache import reusable, version_of, watch_optimizers

KEEP = ("on_demand", "kept")


class Transposed:
    """The transpose of one weight. `transposed(w_q, w_scale)` returns what `transpose_fp8` does, perhaps from a cache.

    A copy or a pickle has an empty cache.
    """

    def __init__(self, keep: str = "on_demand"):
        expect(keep in KEEP, f"keep among {', '.join(KEEP)}", keep)
        watch_optimizers()
        self.keep = keep
        self.pair: tuple[Tensor, Tensor] | None = None
        self.version: Any = None  # of the weight that `pair` was computed from

    def __reduce__(self):
        return Transposed, (self.keep,)

    def __call__(self, w_q: Tensor, w_scale: Tensor, version: Any = None) -> tuple[Tensor, Tensor]:
        """w_q [(E,) N, K] e4m3 and w_scale [(E,) N/128, K/128] -> wt_q [(E,) K, N] and wt_scale, not to be written.

        version: a value that changes whenever the weight does, such as the step, or `version_of` the parameter that w_q
        was quantised from; by default that of w_q itself, which a change through `.data` does not raise.
        """
        if self.keep == "on_demand":
            return transpose_fp8(w_q, w_scale)
        if version is None:
            version = version_of(w_q)
        if not reusable(self.pair, w_q) or version is None or self.version != version:
            self.pair = transpose_fp8(w_q, w_scale, self.pair if reusable(self.pair, w_q) else None)
            self.version = version
        return self.pair
