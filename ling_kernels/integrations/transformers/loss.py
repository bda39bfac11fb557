"""The loss of a language model from its last hidden states, without all logits in memory."""

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from ...nn.linear import is_plain
from ...ops.cross_entropy import cross_entropy
from ...ops.linear_cross_entropy import linear_cross_entropy

IGNORE = -100


def causal_loss(
    head: nn.Module, hidden: Tensor, targets: Tensor, num_items_in_batch: Tensor | int | None = None
) -> Tensor:
    """hidden [..., H], targets [...] int64, -100: ignored -> cross entropy of head(hidden), a scalar in fp32.

    Its mean, or its sum over num_items_in_batch, the number of targets in all micro batches of a step. A head whose
    weight is divided, quantised or adapted computes its logits itself.
    """
    rows, targets = hidden.flatten(0, -2), targets.flatten().to(hidden.device)
    reduction = "mean" if num_items_in_batch is None else "sum"
    if head_fits(head, rows.shape[1]):
        loss = linear_cross_entropy(rows, head.weight, targets, reduction=reduction)
    else:
        loss = cross_entropy(head(rows), targets, reduction=reduction)
    if num_items_in_batch is None:
        return loss
    return loss / torch.as_tensor(num_items_in_batch, device=loss.device)


def head_fits(head: nn.Module, hidden_size: int) -> bool:
    """Whether the loss may read the head's weight itself."""
    weight = getattr(head, "weight", None)
    if not is_plain(head, nn.Linear) or head.bias is not None or type(weight) not in (nn.Parameter, Tensor):
        return False
    return weight.ndim == 2 and weight.shape[1] == hidden_size and weight.is_floating_point()


def shifted(labels: Tensor, ahead: int = 1) -> Tensor:
    """labels [B, L] -> the label `ahead` positions later in the row, -100 past its end."""
    return pad(labels, (0, ahead), value=IGNORE)[..., ahead:]
