"""The transpose of an FP8 weight, which dgrad reads along its other dimension: made when needed, kept as long as asked.

Bytes kept for each element of a weight, besides its own (scales add 1/4096), and passes over it, which read 1 byte and
write 1:
  on_demand  0. While one weight's dgrad runs, 1 for that weight alone. A pass in every backward.
  per_step   1, from a step's first backward to the next step's, or to `drop()`. A pass in every optimizer step, however
             many micro-batches it accumulates.
  kept       1, always at one address, as CUDA graphs want it. A pass in every optimizer step.
Ling-mini's routed experts, 15.3e9 elements on one GPU: 0, with 0.54 GB while a layer's gate_up is in use, or 15.3 GB.
"""

import weakref

from torch import Tensor

from ..op import expect
from ..ops.transpose_fp8 import transpose_fp8

KEEP = ("on_demand", "per_step", "kept")


class Transposed:
    """Of one weight. `transposed(w_q, w_scale)` in a backward gives what `transpose_fp8` does, perhaps made earlier."""

    def __init__(self, keep: str = "on_demand"):
        expect(keep in KEEP, f"keep among {', '.join(KEEP)}", keep)
        self.keep = keep
        self.drop()

    def __call__(self, w_q: Tensor, w_scale: Tensor, version: int | None = None) -> tuple[Tensor, Tensor]:
        """w_q [(E,) N, K] e4m3 and w_scale [(E,) N/128, K/128] -> wt_q [(E,) K, N] and wt_scale, not to be written.

        version: a number that changes whenever the weight does, such as the step, or `_version` of the parameter that
        w_q was quantised from. Without one, w_q is known by itself and its own `_version`, which a change through
        `.data` does not raise.
        """
        if self.keep == "on_demand":
            return transpose_fp8(w_q, w_scale)
        same = self.made is not None and (
            self.version == version if version is not None else self.of() is w_q and self.version == w_q._version
        )
        if not same:
            out = self.made if self.keep == "kept" else None
            self.drop()  # before its successor is made
            self.made, self.of = transpose_fp8(w_q, w_scale, out), weakref.ref(w_q)
            self.version = w_q._version if version is None else version
        return self.made

    def drop(self) -> None:
        """Forget it; a caller that still holds it keeps it alive."""
        self.made, self.of, self.version = None, None, None
