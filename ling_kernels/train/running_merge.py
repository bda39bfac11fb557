"""A running merge of the weights of the last steps (WSM), which needs no stored checkpoints.

The weights c_j and the steps are known beforehand: `merge_last` steps, `merge_every` apart, the last of them the run's
last. So the sum of c_j t_j is added up as the run goes on, in fp64 on the host and in the order of
`python -m ling_kernels.train.merge`, whose bits it has. It takes 8 bytes a weight there and in each checkpoint from its
first step on; of several processes each merges the weights that it writes to a checkpoint. Other settings on resuming
begin a new sum; one whose first step is past cannot be made any more.
"""

from collections.abc import Sequence
from pathlib import Path

import torch

from ..errors import InputError
from ..model.weight_files import WeightReader
from ..parallel.checkpoints import MERGE, MODEL, OwnPart, own_pieces, part_of_pieces
from ..parallel.parts import Piece, read_pieces_
from ..parallel.shares import Shares
from ..tokenizer import Tokenizer
from .merge import named_weights
from .saving import export_part
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
    """`total` holds the sum so far of what this process writes; `taken` the steps and weights that are in it."""

    def __init__(self, settings: Settings):
        self.plan = planned(settings)
        self.total: list[Piece] = []
        self.taken: list[list[float]] = []  # pairs of step and weight, as JSON has them

    def due(self, step: int) -> bool:
        """Whether the weights after `step` are the next of the merge."""
        return step in self.plan and [s for s, _ in self.taken] == [s for s in self.plan if s < step]

    @torch.no_grad()
    def add(self, step: int, pieces: Sequence[Piece]) -> None:
        """Add the weights after a step, as `own_pieces` gives them. The tensors of `total` are new ones: a thread may
        still write the old."""
        c = self.plan[step]
        before = [piece.tensor for piece in self.total] if self.taken else [0.0] * len(pieces)
        self.total = [
            piece._replace(tensor=t + c * piece.tensor.detach().to("cpu", torch.float64))
            for piece, t in zip(pieces, before, strict=True)
        ]
        self.taken.append([step, c])

    @property
    def complete(self) -> bool:
        return bool(self.plan) and len(self.taken) == len(self.plan)

    def part(self, shares: Shares) -> OwnPart | None:
        """What this process writes of the sum to a checkpoint; None before the first step of the merge."""
        return part_of_pieces(shares, self.total, MERGE) if self.taken else None

    def restore(self, checkpoint: Path, taken: list[list[float]], step: int, shares: Shares) -> str | None:
        """Take up the sum of a checkpoint after `step`, of any number of processes; returns a line for the user where
        it is of another plan. Raises InputError where the checkpoint lacks a part of it."""
        wanted = [[s, c] for s, c in self.plan.items() if s <= step]
        if taken == wanted:
            if taken:
                self.total = [
                    piece._replace(tensor=torch.empty(piece.tensor.shape, dtype=torch.float64))
                    for piece in own_pieces(shares)
                ]
                with WeightReader(checkpoint, MERGE) as reader:
                    read_pieces_(reader, self.total)
                self.taken = [list(pair) for pair in taken]
            return None
        if wanted:
            return f"merge      none: it would begin with step {min(self.plan)}, and step {step} is done"
        return "merge      begins anew, as the settings have changed" if self.plan else None

    def write(self, out: str | Path, shares: Shares, tokenizer: Tokenizer, dtype: torch.dtype = torch.bfloat16) -> None:
        """Write the merged model to the folder `out`, each process its part, over one that is there. Raises InputError
        before it is complete."""
        if not self.complete:
            raise InputError(f"{len(self.taken)} of {len(self.plan)} weights are merged so far: there is no merge yet")
        export_part(Path(out), part_of_pieces(shares, self.total, MODEL).on_host(dtype), shares, tokenizer, dtype)
