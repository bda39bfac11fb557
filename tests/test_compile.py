"""torch.compile takes a whole model: one graph, forward and backward, with the bits of the eager model."""

import torch

from ling_kernels.model import Ling
from tests.training import tiniest


def test_a_model_is_one_graph():
    model = Ling(tiniest()).train()
    model.init_weights(torch.Generator().manual_seed(0))
    g = torch.Generator().manual_seed(1)
    ids = torch.randint(0, model.config.vocab_size, (2, 24), generator=g)
    results = []
    for call in (model, torch.compile(model, backend="aot_eager", fullgraph=True)):
        model.zero_grad()
        model.balance_(0.0)
        loss = call(ids, labels=ids, logits=False, z_loss=1e-3).loss
        loss.backward()
        counts = model.expert_counts().clone()
        results.append([loss.detach(), counts, *(p.grad for p in model.parameters())])
    assert results[0][1].sum() == 2 * ids.numel() * model.config.num_experts_per_tok
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want)
