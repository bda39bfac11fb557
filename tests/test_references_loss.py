"""The references of the loss and optimizer ops against torch's own, in fp64 where that is the truth."""

from functools import partial

import pytest
import torch
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from ling_kernels import adamw_8bit, cross_entropy, grad_norm, linear_cross_entropy
from ling_kernels.backend import force
from ling_kernels.ops.adamw_8bit import Moments, adamw_8bit_state, dequantize_moment, dynamic_map, quantize_moment
from ling_kernels.ops.linear_cross_entropy import (
    linear_cross_entropy_fwd,
    linear_cross_entropy_rows_bwd,
    linear_cross_entropy_rows_fwd,
)
from tests.cases import DEVICE, Rand, runs, targets_of

FP32, FP64, BF16 = torch.float32, torch.float64, torch.bfloat16
BETAS = (0.9, 0.95)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("ignore_index", [-7, 3])
def test_cross_entropy_is_torchs(reduction, ignore_index):
    rand = Rand(FP64)
    logits, targets = rand(37, 11), targets_of(rand, 37, 11)
    targets = targets.masked_fill(targets == -7, ignore_index)
    got = cross_entropy(logits, targets, ignore_index, reduction)
    want = F.cross_entropy(logits, targets, ignore_index=ignore_index, reduction=reduction)
    torch.testing.assert_close(got, want)
    weight = torch.linspace(1, 2, got.numel(), device=DEVICE, dtype=FP64).view_as(got)
    torch.testing.assert_close(*(torch.autograd.grad(x, logits, weight)[0] for x in (got, want)))


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("chunk", [1, 8, 37, 1000])
def test_linear_cross_entropy_is_torchs(reduction, chunk):
    rand = Rand(FP64)
    x, w, targets = rand(37, 6), rand(11, 6), targets_of(rand, 37, 11)
    got = 3 * linear_cross_entropy(x, w, targets, -7, reduction, chunk)
    want = 3 * F.cross_entropy(x @ w.T, targets, ignore_index=-7, reduction=reduction)
    torch.testing.assert_close(got, want)
    weight = torch.linspace(-1, 2, got.numel(), device=DEVICE, dtype=FP64).view_as(got)  # of each row, for none
    for g, t in zip(*(torch.autograd.grad(loss, (x, w), weight) for loss in (got, want)), strict=True):
        torch.testing.assert_close(g, t)


def test_linear_cross_entropy_gradient():
    rand = Rand(FP64)
    x, w, targets = rand(5, 3), rand(4, 3), torch.tensor([0, 3, -100, 1, 1], device=DEVICE)
    for reduction in ("mean", "none"):
        loss = partial(linear_cross_entropy, targets=targets, reduction=reduction, chunk=2)
        assert torch.autograd.gradcheck(loss, (x, w))


@pytest.mark.parametrize("wanted", ["x", "w"])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_linear_cross_entropy_with_one_gradient(reduction, wanted):
    rand = Rand(FP32)
    x, w, targets = rand(9, 6), rand(11, 6), targets_of(rand, 9, 11)
    loss = lambda x, w: linear_cross_entropy(x, w, targets, -7, reduction).square().sum()  # noqa: E731
    want = torch.autograd.grad(loss(x, w), x if wanted == "x" else w)
    x, w = (x, w.detach()) if wanted == "x" else (x.detach(), w)
    got = torch.autograd.grad(loss(x, w), x if wanted == "x" else w)
    assert torch.equal(*got, *want)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_linear_cross_entropy_of_a_weight_with_nan(reduction):
    """Ignored rows add nothing to the weight's gradient, although their logits are NaN."""
    rand = Rand(FP32)
    x, w = rand(9, 6), rand(11, 6).detach()
    w[3, 2] = torch.nan
    loss = linear_cross_entropy(x, w.requires_grad_(), torch.full((9,), -7, device=DEVICE), -7, reduction)
    assert (loss == 0).all()
    assert (torch.autograd.grad(loss.sum(), w)[0] == 0).all()


class Largest(TorchDispatchMode):
    """Records the number of elements of the largest tensor that any torch call returns."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for t in out if isinstance(out, tuple | list) else [out]:
            if isinstance(t, torch.Tensor):
                self.elements = max(self.elements, t.numel())
        return out


def test_logits_never_exist_whole():
    rand = Rand(FP32)
    x, w, targets = rand.data(512, 4), rand.data(300, 4), targets_of(rand, 512, 300)
    loss, dx, dw = torch.empty((), device=DEVICE), torch.empty_like(x), torch.empty_like(w)
    with Largest() as largest:  # the launcher's body: as a registered op it would be opaque
        linear_cross_entropy_fwd.__wrapped__(x, w, targets, loss, dx, dw, -7, True, 32)
    assert largest.elements == 32 * 300
    torch.testing.assert_close(loss, F.cross_entropy(x @ w.T, targets, ignore_index=-7))
    losses, lse = torch.empty(512, device=DEVICE), torch.empty(512, device=DEVICE)
    with Largest() as largest:
        linear_cross_entropy_rows_fwd.__wrapped__(x, w, targets, losses, lse, -7, 32)
        linear_cross_entropy_rows_bwd.__wrapped__(x, w, targets, lse, torch.ones_like(lse), dx, dw, -7, 32)
    assert largest.elements == 32 * 300


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_loss_of_ignored_tokens_only(reduction):
    rand = Rand(FP32)
    x, w, targets = rand(5, 8), rand(9, 8), torch.full((5,), -100, device=DEVICE)
    for loss in (cross_entropy(x, targets, -100, reduction), linear_cross_entropy(x, w, targets, -100, reduction)):
        assert loss.eq(0).all() and loss.dtype == FP32
        grads = torch.autograd.grad(loss.sum(), (x, w), allow_unused=True)
        assert all(g is None or (g == 0).all() for g in grads)


@pytest.mark.parametrize("dtype", [FP32, BF16])
def test_huge_logits(dtype):
    logits = torch.tensor([[1e4, -1e4, 0.0], [-1e4, 1e4, 1e4]], dtype=dtype, device=DEVICE, requires_grad=True)
    targets = torch.tensor([0, 0], device=DEVICE)
    one = logits.detach()[0, 0].item()  # 1e4 rounded to dtype
    loss = cross_entropy(logits, targets, reduction="none")
    torch.testing.assert_close(loss.detach(), torch.tensor([0.0, 2 * one + 0.6931472], device=DEVICE))
    (grad,) = torch.autograd.grad(loss.sum(), logits)
    want = torch.tensor([[0, 0, 0], [-1, 0.5, 0.5]], dtype=dtype, device=DEVICE)
    assert grad.dtype == dtype and torch.equal(grad, want)
    x, w = logits.detach().requires_grad_(), torch.eye(3, dtype=dtype, device=DEVICE, requires_grad=True)
    fused = linear_cross_entropy(x, w, targets, reduction="sum")
    torch.testing.assert_close(fused, loss.sum())
    assert torch.equal(torch.autograd.grad(fused, x)[0], want)


def test_weight_gradient_is_summed_in_fp32():
    """In bf16 a sum of equal terms stops growing at 2^8 of them."""
    T, targets = 2048, torch.zeros(2048, dtype=torch.int64, device=DEVICE)
    x = torch.ones(T, 1, dtype=BF16, device=DEVICE)
    w = torch.zeros(2, 1, dtype=BF16, device=DEVICE, requires_grad=True)
    (dw,) = torch.autograd.grad(linear_cross_entropy(x, w, targets, reduction="sum", chunk=1), w)
    assert dw.dtype == BF16 and dw.flatten().tolist() == [-T / 2, T / 2]


def test_linear_cross_entropy_under_autocast():
    rand = Rand(FP32)
    x, w, targets = rand(9, 16), rand(11, 16), targets_of(rand, 9, 11)
    with torch.autocast(DEVICE, dtype=BF16):
        loss = linear_cross_entropy(x, w, targets, -7)
    want = linear_cross_entropy(x.to(BF16), w.to(BF16), targets, -7)
    assert loss.dtype == FP32 and torch.equal(loss, want) and not torch.equal(
        loss, linear_cross_entropy(x, w, targets, -7)
    )  # fmt: skip
    for g, t in zip(*(torch.autograd.grad(one, (x, w)) for one in (loss, want)), strict=True):
        assert g.dtype == FP32 and torch.equal(g, t)


@pytest.mark.parametrize("dtype", [FP32, BF16])
def test_grad_norm_is_that_of_all_elements(dtype):
    rand = Rand(dtype)
    grads = [rand.data(3, 500), rand.data(0), rand.data(1), 100 * rand.data(7, 2, 9)]
    got = grad_norm(grads)
    want = torch.cat([g.double().flatten() for g in grads]).norm()
    assert got.dtype == FP32 and got.shape == () and abs(got.item() / want.item() - 1) < 1e-6
    mixed = grad_norm([grads[0].float(), *(g.double() for g in grads[1:])])
    assert mixed.dtype == torch.float64 and torch.allclose(mixed, want)
    assert grad_norm([]) == 0 and grad_norm([*grads, torch.full((2,), torch.nan, device=DEVICE)]).isnan()


@pytest.mark.parametrize("signed", [True, False])
def test_dynamic_map(signed):
    table = dynamic_map(signed)
    assert len(table.unique()) == 256 and table.max() == 1 and (table == 0).sum() == 1
    assert (table.diff() > 0).all() and (table.min() < -0.99 if signed else table.min() == 0)
    for decade in range(7):
        inside = (table > 10.0 ** (decade - 7)) & (table < 10.0 ** (decade - 6))
        assert inside.sum() == 2**decade * (1 if signed else 2)


def test_a_moment_decodes_to_the_nearest_value_of_the_map():
    rand = Rand(FP32)
    x = rand.data(700) * torch.logspace(-3, 3, 700, device=DEVICE)
    table = dynamic_map(True, x.device)
    codes, scale = quantize_moment(x, table)
    assert codes.dtype == torch.uint8 and scale.shape == (3,)
    for b in range(3):
        block = x[256 * b : 256 * (b + 1)]
        assert scale[b] == block.abs().max()
        nearest = (block / scale[b] - table[:, None]).abs().min(0).values * scale[b]
        error = (dequantize_moment(codes, scale, table)[256 * b : 256 * (b + 1)] - block).abs()
        torch.testing.assert_close(error, nearest, rtol=1e-4, atol=1e-6 * scale[b].item())


def test_adamw_8bit_follows_adamw():
    """50 steps on a noisy gradient differ from torch's by the rounding of the moments; the first step is equal."""
    rand = Rand(FP32)
    start, target = rand.data(40, 30), rand.data(40, 30)
    weight, reference = start.clone(), start.clone().requires_grad_()
    state = adamw_8bit_state([weight])
    torch_adamw = torch.optim.AdamW([reference], lr=0.02, betas=BETAS, eps=1e-8, weight_decay=0.1)
    for step in range(1, 51):
        noise = rand.data(40, 30)
        reference.grad = (reference.detach() - target + noise) / 8
        adamw_8bit([weight], [(weight - target + noise) / 8], state, 0.02, BETAS, 1e-8, 0.1, step)
        torch_adamw.step()
        if step == 1:  # from zero moments, which 8 bits hold exactly
            torch.testing.assert_close(weight, reference.detach())
    moved = (reference.detach() - start).norm()
    assert (weight - reference.detach()).norm() < 0.02 * moved
    for moment, scale, true, signed in ((*state[0][:2], "exp_avg", True), (*state[0][2:], "exp_avg_sq", False)):
        true = torch_adamw.state[reference][true].flatten()
        got = dequantize_moment(moment, scale, dynamic_map(signed, scale.device))
        assert (got - true).norm() < 0.05 * true.norm()


def uneven_gradients(seed, steps=12, n=512):
    """Gradients of very different sizes in a block; by seed, also most of them 0, all of them in two steps of three, or
    another size in each step."""
    g = torch.Generator().manual_seed(seed)
    size = 10 ** (-9 * torch.rand(1, generator=g) * torch.rand(n, generator=g))
    for step in range(steps):
        here = torch.rand(n, generator=g) < 0.2, torch.tensor(step % 3 == 0), 10 ** (-4 * torch.rand(1, generator=g))
        yield (torch.randn(n, generator=g) * size * (*here, 1)[seed % 4]).to(DEVICE)


@pytest.mark.parametrize("backend", [b for b in ("torch", "triton") if runs(b)])
@pytest.mark.parametrize("seed", range(8))
def test_adamw_8bit_moves_no_element_far(seed, backend):
    """At most twice as far as fp32 moments move any element in a step; fp32 moments without scales move it equally."""
    p, wide = (torch.zeros(512, device=DEVICE) for _ in range(2))
    q = torch.zeros(512, device=DEVICE, requires_grad=True)
    (zero,) = state = adamw_8bit_state([p])
    fp32_state = [Moments(torch.zeros_like(p), None, torch.zeros_like(p), None)]
    settings = 1.0, BETAS, 1e-8, 0.0
    torch_adamw = torch.optim.AdamW([q], lr=1.0, betas=BETAS, eps=1e-8, weight_decay=0.0)
    farthest = allowed = 0.0
    for step, q.grad in enumerate(uneven_gradients(seed), 1):
        before = p.clone(), q.detach().clone()
        with force(backend):
            adamw_8bit([p], [q.grad], state, *settings, step)
            adamw_8bit([wide], [q.grad], fp32_state, *settings, step)
        torch_adamw.step()
        farthest = max(farthest, (p - before[0]).abs().max().item())
        allowed = max(allowed, 2 * (q.detach() - before[1]).abs().max().item())
        assert not ((zero.v == 0) & (q.grad.square() > 0)).any()
    assert 0 < farthest < allowed
    torch.testing.assert_close(wide, q.detach(), rtol=1e-4, atol=1e-5)


def test_tiny_moments_keep_their_size():
    """The scale of a block of moments may be any normal number."""
    for size in (1e-31, 1e-35, 1e-37):
        x = torch.full((4,), size, device=DEVICE)
        table = dynamic_map(False, x.device)
        torch.testing.assert_close(dequantize_moment(*quantize_moment(x, table), table), x, atol=0, rtol=1e-6)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("n", [1, 300])
def test_adamw_8bit_of_a_bad_gradient_is_the_same_on_every_backend(n, bad):
    """Its whole block becomes NaN, the codes included, which a checkpoint holds."""
    rand, results = Rand(FP32), []
    p, g = rand.data(n), rand.data(n)
    g[0] = bad
    for backend in ("torch", "triton") if runs("triton") else ("torch",):
        params = [p.clone()]
        state = adamw_8bit_state(params)
        with force(backend):
            adamw_8bit(params, [g], state, 0.1, BETAS, 1e-8, 0.0, 1)
        assert params[0][:256].isnan().any() and params[0][256:].isfinite().all()
        results.append([*params, *state[0]])
    for result in results:
        torch.testing.assert_close(result, results[0], rtol=1e-6, atol=0, equal_nan=True)


def test_adamw_8bit_decays_apart_from_the_moments():
    p = torch.full((3,), 2.0, device=DEVICE)
    state = adamw_8bit_state([p])
    adamw_8bit([p], [torch.zeros_like(p)], state, 0.1, BETAS, 1e-8, 0.5, 1)
    torch.testing.assert_close(p, torch.full_like(p, 2.0 * 0.95))
    assert all((s == 0).all() for s in (state[0].m_scale, state[0].v_scale))


@pytest.mark.parametrize("dtype", [FP32, BF16])
def test_adamw_8bit_minimises_a_quadratic(dtype):
    rand = Rand(FP32)
    params, targets = [rand.data(300).to(dtype), rand.data(2, 2).to(dtype)], [rand.data(300), rand.data(2, 2)]
    state = adamw_8bit_state(params)

    def loss():
        return sum((p.float() - t).square().sum() for p, t in zip(params, targets, strict=True)).item()

    before = loss()
    for step in range(1, 201):
        grads = [p - t.to(dtype) for p, t in zip(params, targets, strict=True)]
        adamw_8bit(params, grads, state, 0.03, BETAS, 1e-8, 0.0, step)
    assert loss() < 0.01 * before


def wrong_calls():
    rand = Rand(FP32)
    logits, targets, w = rand.data(4, 6), torch.tensor([0, 5, -100, 1], device=DEVICE), rand.data(3, 6)
    p, state = rand.data(5), adamw_8bit_state([rand.data(5)])
    settings = 0.1, BETAS, 1e-8, 0.1
    small = targets.clamp(max=2)
    yield "logits 1-D", cross_entropy, (logits[0], targets)
    yield "no classes", cross_entropy, (logits[:, :0], targets)
    yield "int logits", cross_entropy, (logits.long(), targets)
    yield "targets", cross_entropy, (logits, targets[:3])
    yield "int32 targets", cross_entropy, (logits, targets.int())
    yield "reduction", cross_entropy, (logits, targets, -100, "average")
    yield "H", linear_cross_entropy, (logits, w[:, :5], small)
    yield "w 1-D", linear_cross_entropy, (logits, w[0], small)
    yield "fp64 beside fp32", linear_cross_entropy, (logits.double(), w, small)
    yield "no classes", linear_cross_entropy, (logits, w[:0], small)
    yield "targets", linear_cross_entropy, (logits, w, small[:3])
    yield "reduction", linear_cross_entropy, (logits, w, small, -100, "max")
    yield "chunk", linear_cross_entropy, (logits, w, small, -100, "mean", 0)
    if DEVICE == "cpu":
        yield "target V", cross_entropy, (logits, targets + 1)
        yield "target -1", cross_entropy, (logits, targets - 1, -101)
        yield "target V", linear_cross_entropy, (logits, w, targets)
    yield "ints", grad_norm, ([p, p.int()],)
    yield "fewer grads", adamw_8bit, ([p], [], state, *settings, 1)
    yield "fewer states", adamw_8bit, ([p], [p], [], *settings, 1)
    yield "grad", adamw_8bit, ([p], [p[:4]], state, *settings, 1)
    yield "state", adamw_8bit, ([p[:4]], [p[:4]], state, *settings, 1)
    yield "fp32 state", adamw_8bit, ([p], [p], [Moments(*(s.float() for s in state[0]))], *settings, 1)
    yield "step 0", adamw_8bit, ([p], [p], state, *settings, 0)
    yield "beta 1", adamw_8bit, ([p], [p], state, 0.1, (0.9, 1.0), 1e-8, 0.1, 1)


@pytest.mark.parametrize("fn, args", [pytest.param(f, a, id=f"{f.__name__}-{name}") for name, f, a in wrong_calls()])
def test_wrong_arguments_raise(fn, args):
    with pytest.raises(ValueError, match="expected .*; got"):
        fn(*args)
