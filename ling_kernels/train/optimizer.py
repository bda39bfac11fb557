"""AdamW as Ling 2.0 is trained with: betas 0.9 and 0.95, weight decay on matrices, gradients clipped by their norm."""

import torch
from torch import Tensor, nn


def adamw(model: nn.Module, lr: float, weight_decay: float) -> torch.optim.AdamW:
    """Weight decay acts on whatever has two dimensions or more, embedding, head and router included (as in Megatron);
    norms are vectors and do not decay, the experts' bias is no parameter."""
    parameters = list(model.parameters())
    groups = [
        dict(params=[p for p in parameters if p.ndim >= 2], weight_decay=weight_decay),
        dict(params=[p for p in parameters if p.ndim < 2], weight_decay=0.0),
    ]
    return torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.95), eps=1e-8, fused=True)


def clip_gradients(model: nn.Module, limit: float) -> Tensor:
    """Scale all gradients so that their norm is at most `limit`; the norm before, on the device."""
    return nn.utils.clip_grad_norm_(model.parameters(), limit, foreach=True)


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = lr
