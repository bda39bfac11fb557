"""Rows that a mask, an ignored target or an expert -1 leaves out are not read: no value in them reaches any result."""

import pytest
import torch

import ling_kernels as lk
from ling_kernels.backend import force
from ling_kernels.nn.router import Router
from tests.cases import DEVICE, FP32, Rand, offsets_of, plan_of, runs

BACKENDS = [b for b in ("torch", "triton", "cuda") if runs(b)]
T, E, H, F = 24, 16, 128, 64
GROUPS = dict(num_groups=4, group_topk=2, topk=4)


def in_rows(left_out, value, *tensors):
    """The tensors [T, ...] with a value in the rows left out."""
    return [t.detach().masked_fill(left_out.view(-1, *[1] * (t.ndim - 1)), value) for t in tensors]


def route(rand, left_out):
    bias = rand.data(E, dtype=FP32)
    return (rand.data(T, E, dtype=FP32),), (), lambda x: lk.route(x, bias, ~left_out, **GROUPS, z_loss=0.5)


def route_forced(rand, left_out):
    bias, experts = rand.data(E, dtype=FP32), rand.data(T, E).argsort(1)[:, :4].int()
    experts = experts.masked_fill(left_out[:, None], -1)
    return (rand.data(T, E, dtype=FP32),), (), lambda x: lk.route(x, bias, None, **GROUPS, z_loss=0.5, experts=experts)


def router_forced(rand, left_out):
    router = Router(H, E, **GROUPS).to(DEVICE)
    experts = rand.data(T, E).argsort(1)[:, :4].int().masked_fill(left_out[:, None], -1)
    router.weight.data = rand.data(E, H, dtype=FP32)
    return (rand.data(T, H),), (router.weight,), lambda x: router(x, 0.5, experts)


def moe(rand, left_out):
    weights = [rand.fp32(E, H), *(rand(*shape) for shape in ((E, 2 * F, H), (E, H, F)))]
    bias = rand.data(E, dtype=FP32)

    def call(x):
        return lk.moe(x, weights[0], bias, *weights[1:], None, ~left_out, **GROUPS, z_loss=0.5)

    return (rand.data(T, H),), weights, call


def cross_entropy(reduction):
    def make(rand, left_out):
        targets = rand.ints(0, 50, T, dtype=torch.int64).masked_fill(left_out, -7)
        return (rand.data(T, 50),), (), lambda x: lk.cross_entropy(x, targets, -7, reduction)

    return make


def linear_cross_entropy(rand, left_out):
    w, targets = rand(50, H), rand.ints(0, 50, T, dtype=torch.int64).masked_fill(left_out, -7)
    return (rand.data(T, H),), (w,), lambda x: lk.linear_cross_entropy(x, w, targets, -7, chunk=10)


def unpermute(rand, left_out):
    """Rows of y past the experts', and the weights of the slots that are nobody's."""
    plan = plan_of(rand, T // 2, 4, 2, "masked")
    weights, unowned = rand.data(T // 2, 2, dtype=FP32), plan.slot < 0
    left_out[:] = torch.arange(T, device=DEVICE) >= plan.offsets[-1]
    leaf = weights.clone().requires_grad_()

    def call(y):
        bad = y.detach()[-1, 0]  # the value in the rows left out, if there are any
        return lk.unpermute(y, plan, torch.where(unowned, bad, leaf))

    assert left_out[-1]
    return (rand.data(T, H),), (leaf,), call


def experts(rand, left_out):
    """permute, grouped_gemm and swiglu on rows past the last expert's."""
    offsets = offsets_of(rand, T, 4, 5)
    left_out[:] = torch.arange(T, device=DEVICE) >= offsets[-1]
    w1, w2 = rand(4, 2 * F, H), rand(4, H, F)

    def call(x):
        return lk.grouped_gemm(lk.swiglu(lk.grouped_gemm(x, w1, offsets)), w2, offsets)[: offsets[-1]]

    return (rand.data(T, H),), (w1, w2), call


MAKERS = {
    "route": route, "route_forced": route_forced, "router_forced": router_forced, "moe": moe,
    **{f"cross_entropy_{r}": cross_entropy(r) for r in ("mean", "sum", "none")},
    "linear_cross_entropy": linear_cross_entropy, "unpermute": unpermute, "experts": experts,
}  # fmt: skip


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("name", MAKERS)
def test_rows_left_out_are_not_read(name, dtype, backend):
    """Outputs and gradients have the same bits for any value there; the gradient of those rows is 0."""
    rand = Rand(dtype)
    left_out = rand.bools(T, p=0.4)
    inputs, weights, call = MAKERS[name](rand, left_out)
    results = []
    for value in (1.0, torch.nan, torch.inf, -torch.inf):
        leaves = [t.requires_grad_() for t in in_rows(left_out, value, *inputs)]
        with force(backend):
            outs = call(*leaves)
            outs = [o for o in (outs if isinstance(outs, tuple) else (outs,)) if o is not None]
            differentiable = [o for o in outs if o.requires_grad]
            rand.g.manual_seed(1)
            gradients = [rand.data(o.numel(), dtype=o.dtype).view(o.shape) for o in differentiable]
            grads = torch.autograd.grad(differentiable, [*leaves, *weights], gradients)
        assert all((g[left_out] == 0).all() for g in grads[: len(leaves)])
        results.append([*outs, *grads])
    assert all(g.isfinite().all() for g in results[0]) and any((g != 0).any() for g in results[0][-1:])
    for poisoned in results[1:]:
        assert all(map(torch.equal, results[0], poisoned))
