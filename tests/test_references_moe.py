"""The routed layer's references against independent ones: Python loops per token and per expert, numpy, fp64."""

from contextlib import nullcontext
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from triton.runtime._allocation import _allocator

import ling_kernels
from ling_kernels import attention, linear_cross_entropy
from ling_kernels.backend import _C, force
from ling_kernels.ops.dispatch import dispatch
from ling_kernels.ops.gemm_fp8 import gemm_fp8, launch_with_scratch
from ling_kernels.ops.grouped_gemm import grouped_gemm
from ling_kernels.ops.moe import moe
from ling_kernels.ops.moe_decode import moe_decode
from ling_kernels.ops.permute import permute
from ling_kernels.ops.quantize import quantize, quantize_weight
from ling_kernels.ops.rms_norm import rms_norm
from ling_kernels.ops.rms_norm_linear import rms_norm_linear
from ling_kernels.ops.rms_norm_router import rms_norm_router
from ling_kernels.ops.router_gemm import router_gemm
from ling_kernels.ops.swiglu import swiglu
from ling_kernels.ops.unpermute import unpermute
from tests.cases import DEVICE, Rand, counts_of, offsets_of, plan_of, poison
from tests.test_references_route import route_one

BF16, FP32, FP64 = torch.bfloat16, torch.float32, torch.float64
rand = torch.randn


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def test_dispatch_is_stable():
    experts = torch.randint(-1, 7, (50, 3), dtype=torch.int32)
    counts = counts_of(experts, 9)  # experts 7 and 8 are empty
    plan = dispatch(experts, counts)
    flat = experts.flatten().numpy()
    order = np.argsort(np.where(flat < 0, 99, flat), kind="stable")
    n = (flat >= 0).sum()
    assert plan.offsets.tolist() == [0, *np.cumsum(counts.numpy())] and plan.offsets[-1] == n
    assert plan.source[:n].tolist() == order[:n].tolist()
    for t in range(50):
        for k in range(3):
            s = plan.slot[t, k].item()
            assert (s == -1) if experts[t, k] < 0 else (plan.source[s] == t * 3 + k)
    runs = plan.padded_offsets.diff()
    assert (runs % 128 == 0).all() and (runs >= counts).all() and (runs - counts < 128).all()
    assert all(t.dtype == torch.int32 for t in plan)


@pytest.mark.parametrize("dtype", [BF16, FP32])
def test_permute_and_back(dtype):
    plan = plan_of(Rand(FP32), 30, 6, 4, "masked")
    x = rand(30, 8, dtype=dtype)
    y = permute(x, plan)
    for t in range(30):
        for k in range(4):
            if (s := plan.slot[t, k]) >= 0:
                assert torch.equal(y[s], x[t])
    back = unpermute(poison(y, plan.offsets), plan)
    times = (plan.slot >= 0).sum(1, keepdim=True)
    nowhere = plan._replace(offsets=torch.zeros_like(plan.offsets), slot=torch.full_like(plan.slot, -1))
    assert (unpermute(poison(y, nowhere.offsets), nowhere, rand(30, 4)) == 0).all()
    assert back.dtype == dtype and torch.allclose(back, (times * x.float()).to(dtype), rtol=1e-6)


@pytest.mark.parametrize("dtype", [BF16, FP32])
def test_slots_are_summed_in_the_order_of_k(dtype):
    """Bit for bit in numpy's fp32, by values of such different size that any other order gives other bits."""
    plan, weights = plan_of(Rand(FP32), 40, 16, 8, "masked"), rand(40, 8)
    rows = (rand(320, 6) * 10 ** (4 * rand(320, 1))).to(dtype)
    slot, y, w = plan.slot.numpy(), rows.float().numpy(), weights.numpy()

    def total(weigh, ks):
        out = np.zeros((40, 6), np.float32)
        for t in range(40):
            for k in ks:
                if slot[t, k] >= 0:
                    out[t] += w[t, k] * y[slot[t, k]] if weigh else y[slot[t, k]]
        return torch.from_numpy(out).to(dtype)

    x = torch.zeros(40, 6, dtype=dtype, requires_grad=True)
    (dx,) = torch.autograd.grad(permute(x, plan), x, rows)
    assert dx.dtype == dtype and torch.equal(dx, total(False, range(8)))
    assert torch.equal(unpermute(rows, plan, weights), total(True, range(8)))
    assert dtype == BF16 or not torch.equal(dx, total(False, range(7, -1, -1)))


def test_unpermute_gradients():
    plan = plan_of(Rand(FP32), 9, 4, 3, "masked")
    y = poison(rand(27, 5, dtype=FP64), plan.offsets).requires_grad_()
    weights, g = rand(9, 3, dtype=FP64).requires_grad_(), rand(9, 5, dtype=FP64)
    dy, dw = torch.autograd.grad(unpermute(y, plan, weights), (y, weights), g)
    want_dy, want_dw = torch.zeros_like(dy), torch.zeros_like(dw)
    for t in range(9):
        for k in range(3):
            if (s := plan.slot[t, k]) >= 0:
                want_dy[s], want_dw[t, k] = weights[t, k] * g[t], y[s] @ g[t]
    assert torch.allclose(dy, want_dy, rtol=1e-14) and torch.allclose(dw, want_dw, rtol=1e-13)


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_swiglu(backend):
    x = rand(5, 2, 66).requires_grad_()
    g = rand(5, 2, 33).numpy()
    with force(backend):
        y = swiglu(x)
        (dx,) = torch.autograd.grad(y, x, torch.from_numpy(g))
    gate, up = np.split(x.detach().double().numpy(), 2, -1)
    sig = 1 / (1 + np.exp(-gate))
    want = np.concatenate([g * up * sig * (1 + gate * (1 - sig)), g * gate * sig], -1)
    assert np.abs(y.detach().numpy() - gate * sig * up).max() < 1e-6 and np.abs(dx.numpy() - want).max() < 2e-6


def test_swiglu_weights_scale_rows():
    x, w = rand(7, 10, dtype=FP64).requires_grad_(), rand(7, dtype=FP64).requires_grad_()
    assert torch.equal(swiglu(x, w), swiglu(x) * w[:, None])
    (dw,) = torch.autograd.grad(swiglu(x, w).sum(), w)
    assert torch.allclose(dw, swiglu(x).sum(1), rtol=1e-14)
    low = x.detach().bfloat16()
    assert torch.equal(swiglu(low, w.detach().float()), (swiglu(low.float()) * w.float()[:, None]).bfloat16())


def test_grouped_gemm():
    offsets = torch.tensor([0, 0, 3, 3, 9], dtype=torch.int32)
    a, b, g = poison(rand(11, 6, dtype=FP64), offsets).requires_grad_(), rand(4, 5, 6, dtype=FP64), rand(11, 5).double()
    b.requires_grad_()
    y = grouped_gemm(a, b, offsets)
    da, db = torch.autograd.grad(y, (a, b), g)
    want_da, want_db = torch.zeros_like(a), torch.zeros_like(b)
    for s in range(9):
        e = 1 if s < 3 else 3
        assert torch.allclose(y[s], b[e] @ a[s], rtol=1e-13)
        want_da[s] = g[s] @ b[e]
        want_db[e] += g[s, :, None] * a[s]
    assert torch.allclose(da, want_da, rtol=1e-13) and torch.allclose(db, want_db, rtol=1e-13)
    with torch.autocast("cpu", torch.bfloat16):
        y = grouped_gemm(a.float(), b.float(), offsets)
    want = torch.stack([b[1 if s < 3 else 3].bfloat16().double() @ a[s].bfloat16().double() for s in range(9)])
    assert y.dtype == BF16 and torch.equal(y[:9], want.float().bfloat16())


@pytest.mark.parametrize("first, N, calls", [(0, 8, 3), (0, 6, 1), (2, 8, 0)], ids=["whole", "odd", "a gap before"])
def test_torchs_grouped_mm_has_the_references_bits(monkeypatch, first, N, calls):
    """It runs for rows on 16 bytes that begin at row 0; LING_BACKEND=torch runs the reference."""
    offsets, ran, grouped_mm = torch.tensor([first, 3, 3, 9], dtype=torch.int32), [], torch.nn.functional.grouped_mm
    monkeypatch.setattr(torch.nn.functional, "grouped_mm", lambda *a, **k: ran.append(a) or grouped_mm(*a, **k))
    a, b, g = poison(rand(11, 12), offsets).requires_grad_(), rand(3, N, 12).requires_grad_(), rand(11, N)
    results = []
    for backend in (None, "torch"):
        with force(backend) if backend else nullcontext():
            y = grouped_gemm(a, b, offsets)
            da, db = torch.autograd.grad(y, (a, b), g)
            results.append([y[first:9], da[first:], db])
    assert all(map(torch.equal, *results)) and len(ran) == calls


@pytest.mark.parametrize("dtype", [BF16, FP32])
def test_router_gemm(dtype):
    x, w = rand(20, 300).to(dtype).requires_grad_(), rand(16, 300).requires_grad_()
    exact = x.double() @ w.double().T
    size = x.double().abs() @ w.double().abs().T
    with torch.autocast("cpu", torch.bfloat16):
        logits = router_gemm(x, w)
    dx, dw = torch.autograd.grad(logits, (x, w), torch.ones_like(logits))
    assert logits.dtype == FP32 and dx.dtype == dtype and dw.dtype == FP32
    assert ((logits - exact).abs() < 2**-20 * size).all()
    one, column = torch.ones(1, 1, dtype=dtype), w[:, :1].detach()
    assert torch.equal(router_gemm(one, column), column.T)
    assert torch.allclose(dw.double(), x.double().sum(0).expand(16, -1), rtol=1e-5, atol=1e-5)


def test_rms_norm_router():
    """Its three results one by one, and gradients where they are wanted."""
    x, w, router_w, residual = (t.requires_grad_() for t in (rand(5, 24), rand(24), rand(7, 24), rand(5, 24)))
    h, s, logits = rms_norm_router(x, w, router_w, residual, 0.1)
    assert torch.equal(s, x + residual) and torch.equal(h, rms_norm(s, w, eps=0.1))
    assert torch.equal(logits, router_gemm(h, router_w)) and rms_norm_router(x, w, router_w)[1] is x
    for dtype, backend in ((FP32, "torch"), (BF16, "triton")):
        leaves = [t.detach().to(dtype).requires_grad_() for t in (x, w, router_w, residual)]
        with force(backend):
            got = torch.autograd.grad(sum(t.sum() for t in rms_norm_router(*leaves)), leaves)
            h, s = rms_norm(*leaves[:2], leaves[3])
            want = torch.autograd.grad(sum(t.sum() for t in (h, s, router_gemm(h, leaves[2]))), leaves)
        assert all(torch.equal(g, t) for g, t in zip(got, want, strict=True))


def test_rms_norm_linear():
    """The product of the norm, or of x, in another dtype and with gradients; FP8 rows are those of the norm."""
    x, norm, w = rand(5, 128).requires_grad_(), rand(128).requires_grad_(), rand(256, 128).requires_grad_()
    y, h = rms_norm_linear(x, norm, w, 0.1), rms_norm(x, norm, eps=0.1)
    assert torch.equal(y, h @ w.T) and torch.equal(rms_norm_linear(x, None, w), x @ w.T)
    assert rms_norm_linear(x.bfloat16(), norm, w.bfloat16(), dtype=FP32).dtype == FP32
    got, want = (torch.autograd.grad(t.square().sum(), (x, norm, w)) for t in (y, h @ w.T))
    assert all(torch.equal(g, t) for g, t in zip(got, want, strict=True))
    w = quantize_weight(w.detach())
    rows = rms_norm(x, norm, None, 0.1, quantize=True)[1:]
    assert torch.equal(rms_norm_linear(x, norm, w, 0.1), gemm_fp8(*rows, *w, dtype=FP32))
    assert torch.equal(rms_norm_linear(x, None, w), gemm_fp8(*quantize(x), *w, dtype=FP32))


def moe_per_token(x, router_w, bias, w_gate_up, w_down, shared, mask, sizes, scale):
    """Every token on its own, through dense matrices, with autograd's gradients."""

    def expert(v, gate_up, down):
        gate, up = (gate_up @ v).chunk(2)
        return down @ (gate / (1 + torch.exp(-gate)) * up)

    rows = []
    for t, v in enumerate(x):
        logits = router_w @ v
        y = torch.zeros_like(v)
        if mask is None or mask[t]:
            chosen = route_one(logits.detach().float().tolist(), bias.float().tolist(), *sizes)
            s = logits[chosen].sigmoid()
            for e, w in zip(chosen, s / (s.sum() + 1e-20) * scale, strict=True):
                y = y + w * expert(v, w_gate_up[e], w_down[e])
        rows.append(y if shared is None else y + expert(v, *shared))
    return torch.stack(rows)


def moe_problem(dtype, T=13, E=12, H=10, F=6, Fs=4):
    x, router_w, bias = rand(T, H), rand(E, H), (rand(E) / 5).to(FP64 if dtype == FP64 else FP32)
    weights = [rand(s) / s[-1] ** 0.5 for s in ((E, 2 * F, H), (E, H, F), (2 * Fs, H), (H, Fs))]
    x, *weights = (t.to(dtype).requires_grad_() for t in (x, *weights))
    return x, router_w.to(bias.dtype).requires_grad_(), bias, *weights[:2], tuple(weights[2:])


@pytest.mark.parametrize("dtype, tolerance", [(FP64, 1e-12), (FP32, 1e-5), (BF16, 0.04)])
@pytest.mark.parametrize("masked", [False, True])
def test_moe_against_a_loop_over_tokens(dtype, tolerance, masked):
    args = moe_problem(dtype)
    mask = torch.rand(13) < 0.6 if masked else None
    sizes = dict(num_groups=4, group_topk=2, topk=4, scale=1.5)
    y, counts = moe(*args, mask, **sizes)
    wide = [t.detach().double().requires_grad_() for t in (*args[:5], *args[5])]
    want = moe_per_token(*wide[:5], tuple(wide[5:]), mask, (4, 2, 4), 1.5)
    g = rand(y.shape, dtype=FP64)
    leaves = (*args[:2], *args[3:5], *args[5])
    got = torch.autograd.grad(y, leaves, g.to(dtype))
    grads = torch.autograd.grad(want, wide[:2] + wide[3:], g)
    assert y.dtype == dtype and counts.sum() == 4 * (13 if mask is None else mask.sum())
    for n, t in zip((y, *got), (want, *grads), strict=True):
        assert (n - t).abs().max() <= tolerance * t.abs().max()


def test_moe_neither_groups_nor_scales_unless_told():
    x, router_w, bias, *weights, _ = moe_problem(FP64)
    y, _ = moe(x, router_w, bias, *weights, topk=4)
    want = moe_per_token(x, router_w, bias, *weights, None, None, (1, 1, 4), 1.0)
    assert (y - want).abs().max() <= 1e-12 * want.abs().max()
    assert torch.equal(y, moe(x, router_w, bias, *weights, None, None, 1, 1, 4, 1.0)[0])


def test_moe_in_fp8_is_near_and_decode_is_the_same():
    args = moe_problem(BF16, T=8, E=8, H=128, F=128, Fs=128)
    sizes = dict(num_groups=4, group_topk=2, topk=3)
    with torch.no_grad():
        want, counts = moe(*args, **sizes)
        assert torch.equal(moe_decode(*args, **sizes), want)
        x, router_w, bias, *weights, shared = args
        low = [quantize_weight(w) for w in weights], tuple(quantize_weight(w) for w in shared)
        y, fp8_counts = moe(x, router_w, bias, *low[0], low[1], **sizes)
        assert torch.equal(moe_decode(x, router_w, bias, *low[0], low[1], **sizes), y)
    assert torch.equal(counts, fp8_counts) and y.dtype == BF16
    error = (y.float() - want.float()).norm() / want.float().norm()
    assert 0.01 < error < 0.1
    with pytest.raises(ValueError, match="FP8"):
        moe(x, router_w, bias, *low[0], **sizes)


def test_moe_under_autocast():
    """fp32 weights, products in bf16, routing as without."""
    args = moe_problem(FP32)
    sizes = dict(num_groups=4, group_topk=2, topk=4)
    with torch.autocast("cpu", torch.bfloat16):
        y, counts = moe(*args, **sizes)
    want, same = moe(*args, **sizes)
    grads = torch.autograd.grad(y.float().sum(), (*args[:2], *args[3:5], *args[5]))
    assert y.dtype == BF16 and torch.equal(counts, same) and all(g.dtype == FP32 for g in grads)
    assert (y - want).abs().max() < 0.03 * want.abs().max()


@pytest.mark.skipif(_C is None, reason="no _C")
def test_moe_with_every_kernel_there_is():
    args = moe_problem(FP32, T=5, E=256, H=8, F=2)
    sizes = dict(num_groups=8, group_topk=4, topk=8, scale=2.5)  # csrc/ is compiled for these
    want = moe(*args, **sizes)
    with force("cuda"):
        got = moe(*args, **sizes)
    assert torch.equal(got[1], want[1]) and torch.allclose(got[0], want[0], rtol=1e-4, atol=1e-5)


def test_autocast_keeps_fp64():
    a, b, offsets = rand(5, 3, dtype=FP64), rand(2, 4, 3, dtype=FP64), offsets_of(Rand(FP32), 5, 2)
    q, targets = rand(5, 2, 8, dtype=FP64), torch.arange(4).repeat(2)[:5]
    for call in (
        lambda: grouped_gemm(a, b, offsets),
        lambda: attention(q, q, q, torch.tensor([0, 2, 5], dtype=torch.int32))[0],
        lambda: linear_cross_entropy(a, b[0], targets),
    ):
        want = call()
        with torch.autocast(a.device.type, BF16):
            got = call()
        assert got.dtype == FP64 and torch.equal(got, want)


def test_the_allocator_of_triton_is_the_users_again():
    """A launch with TMA descriptors sets one for itself alone. Without a GPU, a kernel that only asks for memory."""
    gpu, given = SimpleNamespace(is_cuda=True, device=DEVICE), []

    def kernel(x, n, bytes):
        given.append((_allocator.get()(bytes, 128, None), n))

    mine = _allocator.get()
    launch_with_scratch(kernel, gpu, 3, bytes=64)
    ((memory, n),) = given
    assert memory.numel() == 64 and n == 3 and _allocator.get() is mine


def ints(*shape):
    return torch.zeros(shape, dtype=torch.int32)


OFFSETS = offsets_of(Rand(FP32), 4, 2)
PLAN = plan_of(Rand(FP32), 4, 2, 1)
E8 = torch.zeros(4, 128).to(torch.float8_e4m3fn)
BAD = {
    "balance_bias_": [(rand(4), ints(5), 0.1), (rand(4), rand(4), 0.1), (rand(4).bfloat16(), ints(4), 0.1)],
    "dispatch": [(ints(4), ints(4)), (ints(4, 2).long(), ints(4)), (ints(4, 2), rand(4)), (ints(4, 2), ints(4)),
                 (torch.full((4, 2), 4, dtype=torch.int32), ints(4))],
    "gemm_fp8": [(rand(4, 128), rand(4, 1), E8, rand(4, 1)), (E8, rand(4, 2), E8, rand(4, 1)),
                 (E8, rand(4, 1), E8, rand(1, 1)), (E8[:, :64], rand(4, 1), E8[:, :64], rand(4, 1)),
                 (E8, rand(4, 1), E8, rand(4, 1), rand(3, 4)), (E8, rand(4, 1), E8, rand(4, 1), None, True)],
    "grouped_gemm": [(rand(4, 3), rand(2, 5, 4), OFFSETS), (rand(3, 3), rand(2, 5, 3), OFFSETS),
                     (rand(4, 3), rand(2, 5, 3), torch.tensor([0, 3, 2], dtype=torch.int32)),
                     (rand(4, 3), rand(2, 5, 3), OFFSETS.long()),
                     (rand(4, 3), rand(3, 5, 3), OFFSETS), (rand(4, 3), rand(2, 5, 3).bfloat16(), OFFSETS)],
    "grouped_gemm_fp8": [(E8, rand(4, 1), E8, rand(4, 1), OFFSETS), (E8, rand(4, 1), E8[None], rand(1, 4, 1), OFFSETS)],
    "grouped_gemm_fp8_masked": [(E8, rand(4, 1), E8[None], rand(1, 4, 1), ints(1)),
                                (E8[None], rand(1, 4, 1), E8[None], rand(1, 4, 1), ints(2)),
                                (E8[None], rand(1, 4, 1), E8[None], rand(1, 4, 1), ints(1) + 5)],
    "grouped_wgrad": [(rand(4, 3), rand(5, 3), OFFSETS), (rand(4, 3), rand(4, 3), OFFSETS.long()), (E8, E8, OFFSETS),
                      (rand(4, 3), rand(4, 3), OFFSETS, rand(2, 3, 4)), (E8, E8, OFFSETS, None, False, rand(4, 1)),
                      (rand(4, 3), rand(4, 3), OFFSETS, None, True), (rand(3, 3), rand(3, 3), OFFSETS),
                      (rand(4, 3), rand(4, 3).bfloat16(), OFFSETS)],
    "moe": [(rand(4, 8), rand(8, 7), rand(8), rand(8, 4, 8), rand(8, 8, 2)),
            (rand(4, 8), rand(8, 8), rand(8), rand(8, 4, 8), rand(8, 8, 3)),
            (rand(4, 8), rand(8, 8), rand(8), (rand(8, 4, 8), rand(1)), rand(8, 8, 2))],
    "moe_decode": [(rand(9, 8), rand(8, 8), rand(8), rand(8, 4, 8), rand(8, 8, 2))],
    "permute": [(rand(5, 3), PLAN), (rand(4), PLAN)],
    "permute_quantize": [(rand(5, 128), PLAN), (rand(4, 100), PLAN)],
    "quantize": [(rand(4, 100),), (rand(128),), (ints(4, 128),), (rand(5, 128), True, True, PLAN),
                 (rand(4, 128), False)],
    "quantize_weight": [(rand(128, 100),), (rand(100, 128),), (rand(128),),
                        (rand(128, 256), False, (rand(256, 128).T, rand(1, 2)))],
    "rms_norm_linear": [(rand(4, 3), rand(3), rand(8, 4)), (rand(4, 3), rand(4), rand(8, 3)),
                        (rand(3), rand(3), rand(8, 3)), (rand(4, 3), rand(3), (rand(8, 3), rand(1, 1)))],
    "rms_norm_router": [(rand(4, 3), rand(3), rand(8, 4)), (rand(4, 3), rand(4), rand(8, 3)),
                        (rand(4, 3), rand(3), rand(8, 3), rand(4, 4)), (rand(2, 4, 3), rand(3), rand(8, 3))],
    "route": [(rand(4, 8), rand(7)), (rand(4, 8).bfloat16(), rand(8)), (rand(4, 8), rand(8), rand(4)),
              (rand(4, 8), rand(8), None, 3), (rand(4, 8), rand(8), None, 4, 5), (rand(4, 8), rand(8), None, 4, 2, 5)],
    "router_gemm": [(rand(4, 3), rand(8, 4)), (ints(4, 3), rand(8, 3)), (rand(4, 3), rand(8, 3).double()),
                    (rand(4, 3).double(), rand(8, 3).bfloat16())],
    "swiglu": [(rand(4, 3),), (rand(4, 4), rand(3)), (rand(4, 128), None, True), (rand(4, 256), None, False, True)],
    "transpose_fp8": [(E8, rand(1, 1)), (rand(128, 128), rand(1, 1))],
    "unpermute": [(rand(5, 3), PLAN), (rand(4, 3), PLAN, rand(4, 2)), (rand(4, 3), PLAN, ints(4, 1))],
}  # fmt: skip


@pytest.mark.parametrize("name, i", [(name, i) for name, calls in BAD.items() for i in range(len(calls))])
def test_bad_arguments_are_refused_in_words(name, i):
    with pytest.raises(ValueError, match="expected .*; got"):
        getattr(ling_kernels, name)(*BAD[name][i])
