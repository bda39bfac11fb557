"""References of the router's ops against definitions written out: Python lists, numpy."""

import math

import numpy as np
import pytest
import torch

from ling_kernels.backend import _C, force
from ling_kernels.ops.balance_bias import balance_bias_
from ling_kernels.ops.route import route, scores

FP64, rand = torch.float64, torch.randn
BACKENDS = ["torch", "triton", pytest.param("cuda", marks=pytest.mark.skipif(_C is None, reason="no _C"))]

LING = dict(num_groups=8, group_topk=4, topk=8, scale=2.5)  # which csrc/ is compiled for


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def route_one(logits, bias, groups, group_topk, topk):
    """The experts of one token, by sorting Python lists; ties fall to the lowest index."""
    b = [float(v) if v == v else -1e30 for v in torch.tensor(logits).sigmoid() + torch.tensor(bias)]
    size = len(b) // groups
    best_two = [np.float32(sum(sorted(b[g * size : g * size + size])[-2:])) for g in range(groups)]
    kept = sorted(range(groups), key=lambda g: (-best_two[g], g))[:group_topk]
    open_to = [e for e in range(len(b)) if e // size in kept]
    return sorted(open_to, key=lambda e: (-b[e], e))[:topk]


def check_route(logits, bias, groups=8, group_topk=4, topk=8):
    weights, experts, counts = route(logits, bias, None, groups, group_topk, topk, 2.5)
    for t in range(len(logits)):
        chosen = route_one(logits[t].tolist(), bias.tolist(), groups, group_topk, topk)
        assert experts[t].tolist() == chosen, t
        s = logits[t, chosen].double().sigmoid()
        assert torch.allclose(weights[t].double(), s / (s.sum() + 1e-20) * 2.5, rtol=1e-6, atol=1e-35, equal_nan=True)
    assert counts.tolist() == np.bincount(experts.flatten(), minlength=logits.shape[1]).tolist()
    return experts


@pytest.mark.parametrize("backend", BACKENDS)
class TestRoute:
    def test_random(self, backend):
        with force(backend):
            check_route(rand(50, 256), rand(256) / 10)

    def test_ties_of_groups_and_experts(self, backend):
        """Few distinct scores, so that nearly every choice is a tie; among them all scores equal."""
        share = torch.tensor([0.9, 0.06, 0.02, 0.015, 0.005])
        logits = torch.multinomial(share, 60 * 256, replacement=True).view(60, 256).float() - 2
        logits[0] = 1.0
        bias = (torch.rand(256) < 0.1).float() / 8
        with force(backend):
            check_route(logits, bias)
            assert check_route(logits[:1], torch.zeros(256)).tolist() == [list(range(8))]

    def test_saturated_scores(self, backend):
        """Where every sigmoid underflows to 0, the weights are 0 and not NaN; infinite logits are ordinary."""
        logits = torch.full((2, 256), -200.0)
        logits[1, 40:44], logits[1, 70] = math.inf, -math.inf
        with force(backend):
            experts = check_route(logits, torch.zeros(256))
        assert experts[1, :4].tolist() == [40, 41, 42, 43]

    @pytest.mark.parametrize("offset", [-200.0, -20.0, -5.0, 0.0, 20.0])
    def test_scores_are_accurate_wherever_the_logits_lie(self, backend, offset):
        """Weights are ratios of scores: `scores` in fp64 is the truth, for any score function."""
        logits, g = (rand(9, 256) + offset).requires_grad_(), rand(9, 8)
        with force(backend):
            weights, experts, _ = route(logits, torch.zeros(256), **LING)
            (got,) = torch.autograd.grad(weights, logits, g)
        exact = logits.detach().double().requires_grad_()
        s = scores(exact).gather(1, experts.long())
        want = s / (s.sum(1, keepdim=True) + 1e-20) * 2.5
        (gradient,) = torch.autograd.grad(want, exact, g.double())
        assert torch.allclose(weights.double(), want, rtol=2e-5, atol=1e-35)
        assert torch.allclose(got.double(), gradient, rtol=1e-3, atol=1e-5 * float(gradient.abs().max()) + 1e-7)

    def test_nan_loses_and_leaves_distinct_experts(self, backend):
        logits = rand(40, 256)
        logits[torch.rand(40, 256) < 0.5] = math.nan
        logits[0], logits[1, 3:], logits[2, ::2] = math.nan, math.nan, math.nan
        logits.view(torch.int32)[3] = -1  # a NaN whose bits are all 1
        with force(backend):
            experts = check_route(logits, rand(256) / 10)
        assert all(len(set(row)) == 8 and 0 <= min(row) and max(row) < 256 for row in experts.tolist())
        assert experts[1, :3].sort().values.tolist() == [0, 1, 2]

    def test_gradient(self, backend):
        """dlogits = scale m s (1 - s) / z (g - sum(s g m) / z), with m the chosen experts and z = sum(s m) + 1e-20."""
        logits, bias, g = rand(9, 256).requires_grad_(), rand(256) / 10, rand(9, 8)
        with force(backend):
            weights, experts, _ = route(logits, bias, **LING)
        (got,) = torch.autograd.grad(weights, logits, g)
        s = logits.detach().double().sigmoid()
        m = torch.zeros(9, 256, dtype=FP64).scatter(1, experts.long(), 1)
        full = torch.zeros(9, 256, dtype=FP64).scatter(1, experts.long(), g.double())
        z = (s * m).sum(1, keepdim=True) + 1e-20
        want = 2.5 * m * s * (1 - s) / z * (full - (s * full * m).sum(1, keepdim=True) / z)
        assert (got - want).abs().max() < 1e-6 * want.abs().max()

    def test_z_loss(self, backend):
        logits = rand(9, 256).requires_grad_()
        with force(backend):
            *_, z = route(logits, torch.zeros(256), z_loss=0.25, **LING)
            *_, empty = route(logits[:0], torch.zeros(256), z_loss=0.25, **LING)
        x = logits.detach().double().numpy()
        lse = np.log(np.exp(x).sum(1))
        assert z.item() == pytest.approx(0.25 * (lse**2).mean(), rel=1e-6) and empty == 0
        (got,) = torch.autograd.grad(z, logits, torch.tensor(3.0))
        want = 3 * 2 * 0.25 / 9 * lse[:, None] * np.exp(x - lse[:, None])
        assert np.abs(got.numpy() - want).max() < 1e-6 * np.abs(want).max()

    def test_misaligned_rows(self, backend):
        flat, bias = rand(1 + 3 * 260), rand(1 + 256) / 10
        logits = flat[1:].view(3, 260)[:, 2:258]
        with force(backend):
            check_route(logits, bias[1:])


def test_route_of_other_sizes():
    check_route(rand(20, 24), rand(24) / 10, groups=4, group_topk=3, topk=5)
    check_route(rand(20, 6).round(), torch.zeros(6), groups=6, group_topk=4, topk=4)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("forced", [False, True])
def test_a_single_expert_weighs_its_score(backend, forced):
    """The published gate divides by the sum only where it chooses several: the weight is sigmoid * scale, and the
    router learns. Masked tokens have weight and gradient 0."""
    logits, g = rand(50, 16).requires_grad_(), rand(50, 1)
    mask = torch.rand(50) < 0.7
    experts = torch.randint(0, 16, (50, 1), dtype=torch.int32) if forced else None
    with force(backend):
        weights, chosen, _ = route(logits, rand(16) / 10, mask, 4, 2, 1, 2.5, experts=experts)
        (got,) = torch.autograd.grad(weights, logits, g)
    s = logits.detach().double().sigmoid().gather(1, chosen.clamp(min=0).long()) * mask[:, None]
    assert torch.allclose(weights.double(), 2.5 * s, rtol=1e-6) and (chosen[mask] >= 0).all()
    want = torch.zeros(50, 16, dtype=FP64).scatter(1, chosen.clamp(min=0).long(), 2.5 * g * s * (1 - s))
    assert torch.allclose(got.double(), want, rtol=1e-5, atol=1e-7) and (got[mask] != 0).any()


@pytest.mark.parametrize("backend", BACKENDS)
def test_forced_experts_are_returned_as_they_are(backend):
    logits, experts = rand(6, 16), torch.stack([torch.randperm(16)[:4] for _ in range(6)]).int()
    with force(backend):
        _, same, _ = route(logits, torch.zeros(16), None, 4, 2, 4, experts=experts)
        _, masked, _ = route(logits, torch.zeros(16), torch.arange(6) > 0, 4, 2, 4, experts=experts)
    assert same.data_ptr() == experts.data_ptr()
    assert masked.data_ptr() != experts.data_ptr() and (masked[0] == -1).all() and (experts >= 0).all()


def test_masked_tokens_are_routed_nowhere():
    logits, mask = rand(12, 32).requires_grad_(), torch.rand(12) < 0.5
    args = dict(num_groups=4, group_topk=2, topk=4, z_loss=0.5)
    weights, experts, counts, z = route(logits, torch.zeros(32), mask, **args)
    only = route(logits[mask], torch.zeros(32), **args)
    assert (experts[~mask] == -1).all() and (weights[~mask] == 0).all()
    for got, want in zip((weights[mask], experts[mask], counts, z), only, strict=True):
        assert torch.allclose(got, want, rtol=1e-6)
    (grad,) = torch.autograd.grad(weights.square().sum() + z, logits)
    assert (grad[~mask] == 0).all() and (grad[mask] != 0).any()
    *_, z = route(logits, torch.zeros(32), torch.zeros(12, dtype=torch.bool), **args)
    assert z == 0


def test_balance_bias():
    c = torch.tensor([5, 0, 9, 5, 6], dtype=torch.int32)  # mean 5: signs 0, 1, -1, 0, -1, whose mean is -0.2
    bias = torch.arange(5.0)
    balance_bias_(bias, c, 0.5)
    assert torch.allclose(bias, torch.arange(5.0) + 0.5 * torch.tensor([0.2, 1.2, -0.8, 0.2, -0.8]))
    balance_bias_(still := torch.ones(3), torch.full((3,), 7), 0.5)
    assert still.tolist() == [1, 1, 1]
    large = torch.tensor([2**25, 2**25 + 1, 2**25 + 2])  # fp32 cannot tell these apart
    balance_bias_(bias := torch.zeros(3), large, 1.0)
    assert bias.tolist() == [1, 0, -1]
    bias = torch.zeros(256)
    for _ in range(200):
        balance_bias_(bias, torch.randint(0, 100, (256,)), 1e-3)
    assert bias.mean().abs() < 1e-7 and bias.abs().max() > 1e-3
