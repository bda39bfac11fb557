"""Optimizers that are copied, or get more parameters after they were made."""

import copy
import pickle

import pytest
import torch
from torch import nn

from ling_kernels.model import Ling
from ling_kernels.train.optimizer import make_optimizer, to_masters
from tests.training import tiniest

KINDS = [("adamw8bit", "fp32"), ("adamw8bit", "bf16"), ("muon", "fp32"), ("muon", "bf16")]


def model_and_optimizer(kind, master):
    model = Ling(tiniest())
    model.init_weights(torch.Generator().manual_seed(0))
    to_masters(model, master)
    return model, make_optimizer(model, kind, 1e-2, 0.1, 3)


def step(params, optimizer, seed) -> None:
    g = torch.Generator().manual_seed(seed)
    for p in params:
        p.grad = torch.randn(p.shape, generator=g).to(p.dtype)
    optimizer.step()


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))])
@pytest.mark.parametrize("kind, master", KINDS)
def test_a_copy_goes_on_like_its_original(kind, master, copied):
    """Also its random bits, and the state that Muon's AdamW shares with it."""
    model, optimizer = model_and_optimizer(kind, master)
    params = [*model.parameters()]
    step(params, optimizer, 0)
    copies, other = copied((params, optimizer))
    for group in other.param_groups:
        group["lr"] = 1e-3
    for group in optimizer.param_groups:
        group["lr"] = 1e-3
    step(copies, other, 1)
    assert not any(map(torch.equal, params, copies)), "the copy has parameters of its own"
    step(params, optimizer, 1)
    assert all(map(torch.equal, params, copies))


@pytest.mark.parametrize("kind, master", KINDS)
def test_groups_that_are_added_later_are_trained(kind, master):
    model, optimizer = model_and_optimizer(kind, master)
    matrix, vector = nn.Parameter(torch.ones(4, 4)), nn.Parameter(torch.ones(4))
    optimizer.add_param_group(dict(params=[matrix, vector], lr=0.5))
    matrix.grad, vector.grad = torch.ones(4, 4), torch.ones(4)
    optimizer.step()
    for p in (matrix, vector):  # AdamW's first step is lr
        torch.testing.assert_close(p.detach(), torch.full_like(p, 0.5), rtol=1e-3, atol=1e-3)
    optimizer.param_groups[-1]["lr"] = 0.0
    optimizer.step()
    torch.testing.assert_close(matrix.detach(), torch.full_like(matrix, 0.5), rtol=1e-3, atol=1e-3)
    _, other = model_and_optimizer(kind, master)
    other.add_param_group(dict(params=[nn.Parameter(torch.ones(4, 4)), nn.Parameter(torch.ones(4))]))
    other.load_state_dict(optimizer.state_dict())
    assert other.state_dict()["param_groups"] == optimizer.state_dict()["param_groups"]
