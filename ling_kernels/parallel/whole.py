"""Whole matrices, for optimizers that need them, of weights that tensor parallelism divides.

Muon makes a matrix orthogonal, and 8-bit AdamW has one scale for 256 elements of it. So of the ranks of a tensor group,
which have the sums of a weight's parts, one keeps the whole weight and the optimizer's state: it gets the gradients'
parts, steps, and sends back the weight's. Random bits and state are then those of one process. The ranks of a group
keep different weights, each about as many.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .boxes import Part, whole_box, within


class Stepped(NamedTuple):
    """The parameters of a model as its optimizer takes them: `wholes`, by name, in place of this rank's parts."""

    model: nn.Module
    wholes: Mapping[str, nn.Parameter]

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        yield from ((name, self.wholes.get(name, p)) for name, p in self.model.named_parameters())

    def parameters(self) -> Iterator[nn.Parameter]:
        yield from (p for _, p in self.named_parameters())


class WholeMatrices:
    """The messages between this rank and the others of its tensor group, which all call each method.

    shapes: of the whole weights, by name, which these ranks have the sums of. keepers: the rank in the group that
    keeps each. parts: this rank's. The model's weights must have their values.
    """

    def __init__(
        self, model: nn.Module, group: dist.ProcessGroup, shapes: dict[str, torch.Size], keepers: dict[str, int],
        parts: dict[str, Part],
    ):  # fmt: skip
        self.model, self.group, self.shapes, self.keepers = model, group, shapes, keepers
        rank, n = dist.get_rank(group), dist.get_world_size(group)
        self.parts = {name: [part_of_rank(parts[name], rank, r) for r in range(n)] for name in shapes}
        weights = self.gathered({name: model.get_parameter(name).detach() for name in shapes})
        self.wholes = {name: nn.Parameter(w) for name, w in weights.items()}

    def gathered(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """This rank's parts of each weight, or of its gradient -> the whole ones that it keeps."""
        found, rank, n = {}, dist.get_rank(self.group), dist.get_world_size(self.group)
        for name, t in tensors.items():
            mine = self.keepers[name] == rank
            theirs = [torch.empty_like(t) for _ in range(n)] if mine else None
            dist.gather(t, theirs, group=self.group, group_dst=self.keepers[name])
            if theirs is not None:
                found[name] = together(theirs, self.parts[name], self.shapes[name])
        return found

    def gather_gradients_(self) -> None:
        """Give the whole weights their gradients, in place of the parts'."""
        parts = {name: self.model.get_parameter(name) for name in self.shapes}
        gradients = {  # a rank may have had no token for a weight
            name: torch.zeros_like(p) if p.grad is None else p.grad.contiguous() for name, p in parts.items()
        }
        for name, grad in self.gathered(gradients).items():
            self.wholes[name].grad = grad
        for p in parts.values():
            p.grad = None

    @torch.no_grad()
    def scatter_weights_(self) -> None:
        """Give every rank its parts of the whole weights, which have been stepped."""
        for name, keeper in self.keepers.items():
            p, whole = self.model.get_parameter(name), self.wholes.get(name)
            theirs = None if whole is None else [part.take(whole).contiguous() for part in self.parts[name]]
            dist.scatter(p.detach(), theirs, group=self.group, group_src=keeper)
            torch.autograd.graph.increment_version([p])


def part_of_rank(part: Part, rank: int, other: int) -> Part:
    """The part of another rank, where `part` is of `rank`: ranges of equal blocks, one for each rank."""
    return Part(part.dim, tuple((a + (other - rank) * (b - a), b + (other - rank) * (b - a)) for a, b in part.ranges))


def together(tensors: Sequence[Tensor], parts: Sequence[Part], shape: torch.Size) -> Tensor:
    """The whole tensor of these parts."""
    whole = tensors[0].new_empty(shape)
    for t, part in zip(tensors, parts, strict=True):
        for box, here in part.boxes(shape):
            whole[within(box, whole_box(shape))] = t[within(here, whole_box(t.shape))]
    return whole
