"""Ops in a training loop of your own: a small language model in plain PyTorch that calls three of them.

    python examples/own_training_loop.py

An op takes tensors and returns tensors with gradients, like a function of torch.nn.functional. On a CPU the plain torch
references run, on a GPU the kernels; `print(lk.explain(lk.swiglu, x))` shows which, and why.
"""

import torch
from torch import nn

import ling_kernels as lk

device = "cuda" if torch.cuda.is_available() else "cpu"
vocabulary, hidden, width = 128, 64, 128


class NextByte(nn.Module):
    """Predicts a byte from the byte before it: embedding, RMSNorm, a SwiGLU MLP with a residual, and a head."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, hidden)
        self.norm = nn.Parameter(torch.ones(hidden))
        self.gate_up = nn.Linear(hidden, 2 * width, bias=False)
        self.down = nn.Linear(width, hidden, bias=False)
        self.head = nn.Linear(hidden, vocabulary, bias=False)

    def forward(self, ids, targets):
        x = self.embedding(ids)  # [T, hidden]
        x = x + self.down(lk.swiglu(self.gate_up(lk.rms_norm(x, self.norm))))
        return lk.linear_cross_entropy(x, self.head.weight, targets)  # without all logits at once


torch.manual_seed(0)
text = b"the quick brown fox jumps over the lazy dog; pack my box with five dozen liquor jugs. " * 4
ids = torch.tensor(list(text), device=device)

model = NextByte().to(device)
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
losses = []
for _ in range(60):
    loss = model(ids[:-1], ids[1:])
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    losses.append(loss.item())

print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f} nats per byte")
