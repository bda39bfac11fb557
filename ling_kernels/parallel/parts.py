"""The weights of a divided model: every process reads, or draws, only what it holds, one parameter at a time.

The model begins on the meta device, without memory, and is divided there; so no process ever holds the whole.
"""

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from ..model import Ling, LingConfig
from ..model.checkpoint import check_shapes, check_unused, named_views, official_views
from ..model.weight_files import WeightReader
from ..nn.fp8_inference import SCALES
from ..ops.rope_tables import rope_tables
from .shares import Shares


def whole_on_meta(config: LingConfig) -> Ling:
    with torch.device("meta"):
        return Ling(config)


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


def official_keys(whole: Ling) -> dict[str, list[str]]:
    """The official keys of each parameter and experts' bias of a whole model, in the order of its memory."""
    names = {id(t): name for name, t in [*whole.named_parameters(), *whole.named_buffers()]}
    keys: dict[str, list[str]] = {}
    for key, view in named_views(whole):
        base = view if view._base is None else view._base
        keys.setdefault(names[id(base)], []).append(key)
    return keys


@torch.no_grad()
def read_weights_(shares: Shares, folder: Path) -> None:
    """Read this process's part of a checkpoint directory. Raises InputError as `load_model` does."""
    whole = whole_on_meta(shares.config)
    keys = official_keys(whole)
    with WeightReader(folder) as reader:
        check_shapes(whole, reader)
        reader.refuse_two_checkpoints()
        for name, t in held(shares.model):
            if len(keys[name]) == 1 or name in shares.cuts:
                t.copy_(shares.my_part(name, torch.cat([reader.wide(key) for key in keys[name]])))
                continue
            mine = shares.my_part(name, keys[name])
            for key, (_, view) in zip(mine, official_views(name, t), strict=True):
                view.copy_(reader.wide(key))
        used = {key for of_one in keys.values() for key in of_one}
        scales = {key + SCALES for key in used} & reader.files.keys()
        check_unused(folder, reader, used | scales)


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
            mine[name].copy_(shares.my_part(name, drawn))
    for name, t in mine.items():
        if name.endswith("expert_bias"):
            t.zero_()
