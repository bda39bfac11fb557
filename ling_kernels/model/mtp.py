"""Multi-token prediction: one more layer that sees the next token and predicts the one after.

x = final_layernorm(layer(eh_proj([enorm(embedding of the next token), hnorm(normed hidden state)])))
"""

import torch
from torch import Tensor, nn

from ..nn import RMSNorm, Rows


class MTP(nn.Module):
    """Embedding and head are the model's."""

    def __init__(self, hidden_size: int, eps: float, layer: nn.Module):
        super().__init__()
        self.enorm, self.hnorm = RMSNorm(hidden_size, eps), RMSNorm(hidden_size, eps)
        self.eh_proj = nn.Linear(2 * hidden_size, hidden_size, bias=False)
        self.layer = layer
        self.final_layernorm = RMSNorm(hidden_size, eps)

    def forward(self, following: Tensor, hidden: Tensor, rows: Rows, z_loss: float | None = None, cache=None):
        """following [T, H]: embeddings of the next tokens; hidden [T, H], after the final norm -> [T, H], z-loss."""
        x = self.eh_proj(torch.cat([self.enorm(following), self.hnorm(hidden)], -1))
        x, z = self.layer(x, rows, cache, z_loss)
        return self.final_layernorm(x), z
