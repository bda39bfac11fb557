"""The official keys of a model as boxes of its parameters."""

from typing import NamedTuple

import torch
from torch import Tensor

from ..model import Ling, LingConfig
from ..model.checkpoint import named_views
from .boxes import Box


class Official(NamedTuple):
    """The tensor of an official key: a box of a parameter, without the dimension of the experts."""

    key: str
    box: Box
    ndim: int

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(stop - start for start, stop in self.box[len(self.box) - self.ndim :])

    def of(self, whole: Tensor) -> Tensor:
        """The key's tensor as a view of the whole parameter."""
        slices = tuple(slice(*bounds) for bounds in self.box)
        return whole[slices][(0,) * (len(slices) - self.ndim)]


class Parameter(NamedTuple):
    """A parameter, or a bias of the experts, of a whole model."""

    shape: torch.Size
    keys: list[Official]  # in the order of its memory


def whole_on_meta(config: LingConfig) -> Ling:
    with torch.device("meta"):
        return Ling(config)


def official_keys(config: LingConfig) -> dict[str, Parameter]:
    """The parameters and the experts' biases of a whole model, by name, in the order of `named_views`."""
    whole = whole_on_meta(config)
    named = {id(t): (name, t) for name, t in [*whole.named_parameters(), *whole.named_buffers()]}
    found: dict[str, Parameter] = {}
    for key, view in named_views(whole):
        name, t = named[id(view if view._base is None else view._base)]
        start, shape, box = view.storage_offset(), (1,) * (t.ndim - view.ndim) + view.shape, []
        for stride, n in zip(t.stride(), shape, strict=True):
            box.append((start // stride, start // stride + n))
            start %= stride
        found.setdefault(name, Parameter(t.shape, [])).keys.append(Official(key, tuple(box), view.ndim))
    return found
