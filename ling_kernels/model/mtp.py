"""Multi-token prediction (MTP): an extra layer that gets the embedding of token t + 1 and predicts token t + 2.

x = final_layernorm(layer(eh_proj([enorm(embedding of the next token), hnorm(normed hidden state)])))
"""

import torch
from torch import Tensor, nn

from ..nn import BatchLayout, RMSNorm


class MTP(nn.Module):
    """One MTP layer; it shares embedding and lm_head with the model."""

    def __init__(self, hidden_size: int, eps: float, layer: nn.Module):
        super().__init__()
        self.enorm, self.hnorm = RMSNorm(hidden_size, eps), RMSNorm(hidden_size, eps)
        self.eh_proj = nn.Linear(2 * hidden_size, hidden_size, bias=False)
        self.layer = layer
        self.final_layernorm = RMSNorm(hidden_size, eps)

    def forward(
        self, next_embeddings: Tensor, hidden: Tensor, layout: BatchLayout, z_loss: float | None = None, cache=None
    ):
        """next_embeddings [T, H], hidden [T, H] after the final norm -> hidden [T, H], and the z-loss or None."""
        x = self.eh_proj(torch.cat([self.enorm(next_embeddings), self.hnorm(hidden)], -1))
        x, z = self.layer(x, layout, cache, z_loss)
        return self.final_layernorm(x), z
