"""The experts of NeMo Automodel with torch_mm, before and after `patch`."""

from types import SimpleNamespace

import pytest
import torch
from nemo_automodel.components.moe.config import MoEConfig
from nemo_automodel.components.moe.experts import GroupedExperts

from ling_kernels.integrations import automodel as ours


@pytest.fixture(autouse=True)
def restored():
    yield
    ours.unpatch()


def experts(dtype=torch.float32, **changes):
    config = MoEConfig(
        **dict(
            n_routed_experts=6, n_shared_experts=0, n_activated_experts=2, n_expert_groups=1, n_limited_groups=1,
            train_gate=True, gate_bias_update_factor=0.0, aux_loss_coeff=0.0, score_func="sigmoid", route_scale=1.0,
            dim=32, inter_dim=48, moe_inter_dim=16, norm_topk_prob=True, dtype=dtype,
        ) | changes
    )  # fmt: skip
    backend = SimpleNamespace(experts="torch_mm", compile_router_weight=False)
    layer = GroupedExperts(config, backend)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in layer.parameters():
            p.normal_(0, 0.3, generator=generator)
    return layer


def run(layer):
    generator = torch.Generator().manual_seed(1)
    dtype = layer.down_projs.dtype
    x = torch.randn(13, 32, generator=generator).to(dtype).requires_grad_()
    weights = torch.rand(13, 2, generator=generator).requires_grad_()
    indices = torch.rand(13, 6, generator=generator).argsort(1)[:, :2]
    mask = torch.arange(13) < 11  # two padding tokens
    y = layer(x, mask, weights, indices)
    (y.float() * torch.randn(y.shape, generator=generator)).sum().backward()
    return [y.detach(), x.grad, weights.grad, *(p.grad for p in layer.parameters())]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_experts_are_automodels(dtype, monkeypatch):
    calls = []
    monkeypatch.setattr(ours, "grouped_gemm", lambda *args, f=ours.grouped_gemm: calls.append(1) or f(*args))
    want = run(experts(dtype))
    ours.patch()
    got = run(experts(dtype))
    assert len(calls) == 2 and len(got) == len(want) == 5
    for a, b in zip(got, want, strict=True):
        error = (a.double() - b.double()).norm() / b.double().norm()
        assert a.dtype == b.dtype and error < (1e-2 if dtype == torch.bfloat16 else 1e-5)
    ours.unpatch()
    run(experts(dtype))
    assert len(calls) == 2


def test_other_activations_stay_automodels(monkeypatch):
    monkeypatch.setattr(ours, "grouped_gemm", lambda *args: pytest.fail("our op ran"))
    want = run(experts(expert_activation="relu2"))
    ours.patch()
    for a, b in zip(run(experts(expert_activation="relu2")), want, strict=True):
        assert torch.equal(a, b)
