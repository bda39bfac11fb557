"""The weights of a divided model: every process reads, or draws, only what it holds, one parameter at a time.

The model begins on the meta device, without memory, and is divided there; so no process ever holds the whole.
"""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from ..model import Ling
from ..model.checkpoint import check_shapes, check_unused
from ..model.weight_files import WeightReader
from ..nn.fp8_inference import SCALES
from ..ops.rope_tables import rope_tables
from .boxes import Box, as_box, overlap, within
from .official import Official, whole_on_meta
from .shares import Shares


def give_memory_(model: Ling, device: torch.device) -> None:
    """Memory of any values on the device for a divided model on the meta device; tables and counts are right."""
    c = model.config
    model.to_empty(device=device)
    model.cos, model.sin = rope_tables(c.max_positions, c.rotary_dim, c.rope_theta, c.rope_scaling, device)
    for router in model.routers():
        router.counts.zero_()


def held(model: Ling) -> Iterator[tuple[str, Tensor]]:
    """Parameters and experts' biases of this process, by name."""
    yield from ((name, p.detach()) for name, p in model.named_parameters())
    yield from ((name, b) for name, b in model.named_buffers() if name.endswith("expert_bias"))


class Piece(NamedTuple):
    """What this rank holds of the tensor of an official key."""

    official: Official
    box: Box  # of the key's tensor
    tensor: Tensor  # a view of the parameter

    @property
    def is_whole(self) -> bool:
        return self.tensor.shape == self.official.shape


def pieces(shares: Shares, tensors: Iterable[tuple[str, Tensor]]) -> Iterator[Piece]:
    """The official tensors in parameters and experts' biases of this rank, which are given by name."""
    for name, t in tensors:
        whole = shares.official[name]
        for mine, held_at in shares.part_of(name).boxes(whole.shape):
            for official in whole.keys:
                if both := overlap(mine, official.box):
                    experts = len(both) - official.ndim
                    view = t[within(both, mine, held_at)][(0,) * experts]
                    box = as_box(within(both, official.box))[experts:]
                    yield Piece(official, box, view)


@torch.no_grad()
def read_weights_(shares: Shares, folder: Path) -> None:
    """Read this process's part of a checkpoint directory, and no more of it. Raises InputError as `load_model` does."""
    wanted = [*pieces(shares, held(shares.model))]
    with WeightReader(folder) as reader:
        reader.refuse_two_checkpoints()
        read_pieces_(reader, wanted)
        if shares.ranks.first:
            used = {official.key for parameter in shares.official.values() for official in parameter.keys}
            scales = {key + SCALES for key in used} & reader.files.keys()
            check_unused(folder, reader, used | scales)


@torch.no_grad()
def read_pieces_(reader: WeightReader, wanted: list[Piece]) -> None:
    check_shapes(((piece.official.key, piece.official.shape) for piece in wanted), reader)
    for piece in sorted(wanted, key=lambda piece: str(reader.files[piece.official.key])):  # one file at a time
        piece.tensor.copy_(reader.wide(piece.official.key, piece.box))


@torch.no_grad()
def draw_weights_(shares: Shares, seed: int) -> None:
    """Give this process its part of the weights that `Ling.init_weights` gives a whole model on the CPU."""
    generator, mine = torch.Generator().manual_seed(seed), dict(held(shares.model))
    for name, p in whole_on_meta(shares.config).named_parameters():
        if p.ndim > 1:  # drawn by every process, so that the numbers after it are the same
            drawn = torch.empty(p.shape).normal_(0, shares.config.initializer_range, generator=generator)
        else:
            drawn = torch.ones(p.shape)
        if name in mine:
            mine[name].copy_(shares.part_of(name).take(drawn))
    for name, t in mine.items():
        if name.endswith("expert_bias"):
            t.zero_()
