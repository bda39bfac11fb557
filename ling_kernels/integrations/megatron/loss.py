"""The losses of Megatron-core's models, MTP's too, without logits in memory, by the op `linear_cross_entropy`.

Where the model has labels, its output layer returns `Rows` in the place of logits, and the function that makes losses
of logits takes them.
"""

from collections.abc import Callable
from functools import wraps
from inspect import signature
from typing import NamedTuple

import torch
from torch import Tensor

from ...ops.linear_cross_entropy import linear_cross_entropy

CHUNK = 1024  # rows whose logits exist at a time


class Rows(NamedTuple):
    """Logits [S, B, V] that are not computed: the output layer's input x [S, B, H] and weight [V, H]."""

    x: Tensor
    weight: Tensor

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        """torch.argmax(rows, -1), with which Megatron measures how often MTP is right."""
        if function is not torch.argmax:
            return NotImplemented
        rows: Rows = args[0]
        with torch.no_grad():
            best = [(part @ rows.weight.T).argmax(-1) for part in rows.x.flatten(0, 1).split(CHUNK)]
        return torch.cat(best).view(rows.x.shape[:2])


def postprocess(stock: Callable) -> Callable:
    """For GPTModel._postprocess and HybridModel.forward."""
    arguments = signature(stock)

    @wraps(stock)
    def with_rows(model, *args, **kwargs):
        given = arguments.bind(model, *args, **kwargs).arguments
        if given.get("labels") is None or given.get("output_processor") or not fusible(model):
            return stock(model, *args, **kwargs)
        layer = model.output_layer

        def rows(x: Tensor, weight: Tensor | None = None, **_) -> tuple[Rows, None]:
            return Rows(x, layer.weight if weight is None else weight), None

        layer.forward = rows  # not another layer: hooks before its forward gather its weight
        try:
            return stock(model, *args, **kwargs)
        finally:
            del layer.forward

    return with_rows


def fusible(model) -> bool:
    """Whether the losses are those of x @ weight.T on one rank."""
    config = model.config
    other = ("use_mup", "defer_embedding_wgrad_compute", "config_logger_dir")
    return model.post_process and model.tp_group.size() == 1 and not any(getattr(config, n, None) for n in other)


def language_model_loss(stock: Callable) -> Callable:
    """For LanguageModule.compute_language_model_loss: labels [B, S] -> losses [B, S] fp32."""

    @wraps(stock)
    def losses(model, labels: Tensor, logits: Tensor | Rows) -> Tensor:
        if not isinstance(logits, Rows):
            return stock(model, labels, logits)
        x, weight = logits
        each = linear_cross_entropy(x.flatten(0, 1), weight, labels.T.flatten(), reduction="none", chunk=CHUNK)
        return each.view(x.shape[:2]).T.contiguous()

    return losses
