"""Linear layers whose weight gradients a pipeline may compute later; those of experts and FP8 layers can already."""

import torch
from torch import Tensor, nn

from ..op import autocast, first_derivative_only
from ..ops.deferred import now_or_later


class DeferredLinear(nn.Linear):
    """nn.Linear without a bias."""

    def forward(self, x: Tensor) -> Tensor:
        """x [..., K] -> [..., N]"""
        return LinearFunction.apply(*autocast(x, self.weight))


class LinearFunction(torch.autograd.Function):
    """y = x w^T, as torch computes it."""

    @staticmethod
    def forward(ctx, x: Tensor, w: Tensor) -> Tensor:
        ctx.save_for_backward(x, w)
        return nn.functional.linear(x, w)

    @staticmethod
    @first_derivative_only
    def backward(ctx, dy: Tensor):
        x, w = ctx.saved_tensors
        dx = dy @ w if ctx.needs_input_grad[0] else None
        rows = dy.reshape(-1, dy.shape[-1])
        dw = now_or_later(ctx, 1, lambda: rows.T @ x.reshape(-1, x.shape[-1])) if ctx.needs_input_grad[1] else None
        return dx, dw


def defer_linear_(module: nn.Module) -> None:
    """Replace the plain linear layers inside a module, in place, by DeferredLinear over the same parameters."""
    for parent in [*module.modules()]:
        for name, child in parent.named_children():
            if type(child) is nn.Linear and child.bias is None:
                new = DeferredLinear(child.in_features, child.out_features, bias=False, device="meta")
                new.weight = child.weight
                setattr(parent, name, new.train(child.training))
