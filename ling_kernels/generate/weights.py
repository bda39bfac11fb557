"""New weights of an engine's model, in place: CUDA graphs and the cache keep their addresses."""

from collections.abc import Mapping

import torch
from torch import Tensor

from ..errors import InputError, counted
from ..model.checkpoint import named_views
from ..nn.fp8 import Fp8Experts, Fp8Linear, Fp8MLP
from ..nn.fp8_inference import SCALES
from ..ops.quantize import quantize_weight


@torch.no_grad()
def take_weights(engine, source: torch.nn.Module | Mapping[str, Tensor] | None) -> None:
    """`Engine.new_weights` for a caller that holds the engine's lock. Where the engine's weight is FP8 and the source's
    is not, it is quantised, as the FP8 layers of a trainer quantise theirs."""
    scheduler = engine.scheduler
    if unfinished := scheduler.queued + len(scheduler.running):
        raise InputError(f"{counted(unfinished, 'request')} unfinished: finish or cancel before the weights change")
    if source is not None and source is not engine.model:
        if isinstance(source, torch.nn.Module):
            here, there = engine.model.state_dict(), source.state_dict()
        else:
            here, there = dict(named_views(engine.model)), source
        scales = {k: here.pop(k) for k in [*here] if k.endswith(SCALES) and k not in there}  # of weights to quantise
        if {k: t.shape for k, t in here.items()} != {k: t.shape for k, t in there.items()}:
            other = sorted(k for k in here.keys() | there.keys()
                           if k not in here or k not in there or here[k].shape != there[k].shape)  # fmt: skip
            raise InputError(f"the new weights are of another model: {other[0]} differs")
        layers = [m for m in engine.model.modules() if isinstance(m, Fp8Linear | Fp8MLP | Fp8Experts)]
        pow2 = any(layer.fp8.pow2 for layer in layers)
        for name, tensor in here.items():
            if name + SCALES in scales:
                quantize_weight(there[name].to(tensor.device), pow2, (tensor, scales[name + SCALES]))
            else:
                tensor.copy_(there[name])
    engine.pages.forget()
    engine.policy_version += 1
