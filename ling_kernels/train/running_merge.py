"""A running merge of the weights of the last steps (WSM), which needs no stored checkpoints.

The weights c_j and the steps are known beforehand: `merge_last` steps, `merge_every` apart, the last of them the run's
last. So the sum of c_j t_j is added up as the run goes on, in fp64 on the host and in the order of
`python -m ling_kernels.train.merge`, whose bits it has. It takes 8 bytes a weight there and in each checkpoint from its
first step on, and is for one process. Other settings on resuming begin a new sum; one whose first step is past cannot
be made any more.
"""

from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor

from ..errors import InputError
from ..model import LingConfig
from ..tokenizer import Tokenizer
from .checkpoint import new_folder
from .merge import named_weights, write_sum
from .saving import MERGE_FILE
from .settings import Settings


def planned(s: Settings) -> dict[int, float]:
    """{step: its weight in the merge}, in order. Raises InputError for weights that are none."""
    weights = named_weights(s.merge_weights, s.merge_last) if s.merge_last else []
    first = s.steps - (s.merge_last - 1) * s.merge_every
    if weights and first < 1:
        raise InputError(f"--merge-last {s.merge_last} with --merge-every {s.merge_every} begins before the first of"
                         f" --steps {s.steps}")  # fmt: skip
    return {first + i * s.merge_every: c for i, c in enumerate(weights)}


class RunningMerge:
    """`total` holds the sum so far by official key; `taken` the steps and weights that are in it."""

    def __init__(self, settings: Settings):
        self.plan = planned(settings)
        self.total: dict[str, Tensor] = {}
        self.taken: list[list[float]] = []  # pairs of step and weight, as JSON has them

    def due(self, step: int) -> bool:
        """Whether the weights after `step` are the next of the merge."""
        return step in self.plan and [s for s, _ in self.taken] == [s for s in self.plan if s < step]

    @torch.no_grad()
    def add(self, step: int, weights: Iterable[tuple[str, Tensor]]) -> None:
        """Add the weights after a step. The tensors of `total` are new ones: a thread may still write the old."""
        c = self.plan[step]
        for key, view in weights:
            one = c * view.detach().to("cpu", torch.float64)
            self.total[key] = self.total[key] + one if self.taken else 0.0 + one
        self.taken.append([step, c])

    @property
    def complete(self) -> bool:
        return bool(self.plan) and len(self.taken) == len(self.plan)

    def restore(self, checkpoint: Path, taken: list[list[float]], step: int) -> str | None:
        """Take up the sum of a checkpoint after `step`; returns a line for the user where it is of another plan."""
        wanted = [[s, c] for s, c in self.plan.items() if s <= step]
        if taken == wanted:
            if taken:
                from safetensors.torch import load_file

                self.total = load_file(checkpoint / MERGE_FILE)
                self.taken = [list(pair) for pair in taken]
            return None
        if wanted:
            return f"merge      none: it would begin with step {min(self.plan)}, and step {step} is done"
        return "merge      begins anew, as the settings have changed" if self.plan else None

    def write(self, out: str | Path, config: LingConfig, tokenizer: Tokenizer, dtype: str = "bf16") -> None:
        """Write the merged model to the new folder `out`, as train.merge does. Raises InputError before it is
        complete."""
        if not self.complete:
            raise InputError(f"{len(self.taken)} of {len(self.plan)} weights are merged so far: there is no merge yet")
        with new_folder(out) as partial:
            write_sum(partial, config, dtype, lambda key, shape: self.total[key])
            tokenizer.save(partial)
