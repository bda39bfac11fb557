"""New weights of an engine's model, in place: CUDA graphs and the cache keep their addresses."""

from collections.abc import Mapping

import torch
from torch import Tensor

from ..errors import InputError, counted
from ..model.checkpoint import named_views


@torch.no_grad()
def take_weights(engine, source: torch.nn.Module | Mapping[str, Tensor] | None) -> None:
    """`Engine.new_weights` for a caller that holds the engine's lock."""
    scheduler = engine.scheduler
    if unfinished := scheduler.queued + len(scheduler.running):
        raise InputError(f"{counted(unfinished, 'request')} unfinished: finish or cancel before the weights change")
    if source is not None and source is not engine.model:
        if isinstance(source, torch.nn.Module):
            here, there = engine.model.state_dict(), source.state_dict()
        else:
            here, there = dict(named_views(engine.model)), source
        if {k: t.shape for k, t in here.items()} != {k: t.shape for k, t in there.items()}:
            other = sorted(k for k in here.keys() | there.keys()
                           if k not in here or k not in there or here[k].shape != there[k].shape)  # fmt: skip
            raise InputError(f"the new weights are of another model: {other[0]} differs")
        for name, tensor in here.items():
            tensor.copy_(there[name])
    engine.pages.forget()
    engine.policy_version += 1
