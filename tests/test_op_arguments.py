"""Arguments of ops that fuzzers found: integers that lie apart, plans that do not fit, sizes of 0, other dtypes."""

import pytest
import torch

import ling_kernels as lk
from ling_kernels.backend import force
from ling_kernels.op import expect
from ling_kernels.ops.dispatch import Plan
from ling_kernels.ops.moe import expert_mlp
from ling_kernels.ops.rope_tables import rope_tables
from tests.cases import DEVICE, Rand, offsets_of, plan_of, runs

BACKENDS = [b for b in ("torch", "triton", "cuda") if runs(b)]
BF16 = torch.bfloat16


def apart(x: torch.Tensor) -> torch.Tensor:
    """A copy of x whose elements have others between them."""
    return torch.stack([x, torch.zeros_like(x)], -1)[..., 0]


def calls(rand):
    """Ops of integers: a function of them, and the integers."""
    plan, offsets = plan_of(rand, 20, 4, 2, "masked"), offsets_of(rand, 40, 4, 3)
    x, y, w = rand.data(20, 128), rand.data(40, 128), rand.data(4, 128, 128)
    x_q, w_q = lk.quantize(x), lk.quantize_weight(w)
    rows = int(plan.offsets[-1])
    yield lambda *p: lk.quantize(y, False, True, Plan(*p))[0][:, : int(plan.padded_offsets[-1])].float(), plan
    yield lambda *p: lk.permute(x, Plan(*p))[:rows], plan
    yield lambda *p: lk.unpermute(y, Plan(*p), None), plan
    yield lambda *p: lk.permute_quantize(x, Plan(*p))[0][:rows].float(), plan
    yield lambda *p: lk.grouped_gemm_fp8(*x_q, *w_q, p[0], Plan(*p))[:rows], plan
    yield lambda o: lk.grouped_gemm(y, w, o)[: int(offsets[-1])], (offsets,)
    yield lambda o: lk.grouped_wgrad(y, y, o), (offsets,)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("i", range(7))
def test_integers_may_lie_apart(i, backend):
    call, integers = [*calls(Rand(BF16))][i]
    with force(backend):
        assert torch.equal(call(*integers), call(*map(apart, integers)))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("change", [
    dict(slot=lambda t: t[:-1]), dict(slot=lambda t: t[None]), dict(source=lambda t: t[:-1]),
    dict(source=lambda t: t[:, None]), dict(offsets=lambda t: t[:-1]), dict(offsets=lambda t: t[:0]),
    dict(padded_offsets=lambda t: t[None]), dict(slot=lambda t: t.long()), dict(offsets=lambda t: t.float()),
])  # fmt: skip
def test_plans_that_do_not_fit_are_refused(change, backend):
    rand = Rand(BF16)
    ((field, of),) = change.items()
    plan = plan_of(rand, 20, 4, 2)
    plan = plan._replace(**{field: of(getattr(plan, field))})
    x, y, w = rand.data(20, 128), rand.data(40, 128), rand.data(4, 256, 128)
    with force(backend):
        for call in (
            lambda: lk.permute(x, plan), lambda: lk.unpermute(y, plan), lambda: lk.permute_quantize(x, plan),
            lambda: lk.quantize(y, True, True, plan), lambda: lk.swiglu(rand.data(40, 256), None, True, True, plan),
            lambda: expert_mlp(x, plan, None, w, w[:, :128]),
            lambda: lk.grouped_gemm_fp8(*lk.quantize(x), *lk.quantize_weight(w), plan.offsets, plan),
        ):  # fmt: skip
            with pytest.raises(ValueError, match="expected a plan of"):
                call()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", [(0,), (3, 0), (0, 4), (2, 0, 2)])
def test_swiglu_of_nothing(shape, backend):
    x = torch.empty(shape, device=DEVICE, requires_grad=True)
    with force(backend):
        y = lk.swiglu(x)
        assert y.shape == (*shape[:-1], shape[-1] // 2)
        assert torch.autograd.grad(y.sum(), x)[0].shape == shape


@pytest.fixture
def nan_in_new_memory():
    """Tensors that nothing has written hold NaN."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients_that_are_sums_of_nothing_are_0(backend, nan_in_new_memory):
    rand = Rand(BF16)
    plan = plan_of(rand, 20, 4, 2, "masked")
    of_rows, of_choices = (torch.ones(shape, device=DEVICE, requires_grad=True) for shape in (40, (20, 2)))
    with force(backend):
        y = lk.swiglu(rand(40, 0), of_rows), lk.unpermute(rand(40, 0), plan, of_choices)
        grads = torch.autograd.grad([t.sum() for t in y], [of_rows, of_choices])
        again = lk.swiglu_backward(rand.data(40, 0), rand.data(40, 0), of_rows)[1]
    assert all((g == 0).all() for g in (*grads, again))


@pytest.mark.parametrize("backend", BACKENDS)
def test_router_gemm_of_no_experts(backend):
    x, w = torch.randn(5, 16, device=DEVICE).to(BF16), torch.empty(0, 16, device=DEVICE, requires_grad=True)
    with force(backend):
        logits = lk.router_gemm(x, w)
        assert logits.shape == (5, 0) and torch.autograd.grad(logits.sum(), w)[0].shape == (0, 16)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("D, R", [(20, 8), (128, 64)])
def test_norms_without_eps(backend, D, R):
    """Rows of a tile that are no row of the tensor are 0, and 0 / 0 must not reach the gradients of the weights."""
    rand = Rand(BF16)
    qkv, weights = rand(5, 5, D), (rand.fp32(D), rand.fp32(D))
    tables, positions = rope_tables(8, R, 1e4, device=DEVICE), torch.arange(5, device=DEVICE)
    results = []
    for name in ("torch", backend):
        with force(name):
            outs = lk.qk_norm_rope(qkv, *weights, *tables, positions, 1, 0.0)[:3]
            y = lk.rms_norm(qkv, weights[0], eps=0.0)
            loss = sum(t.float().square().sum() for t in (*outs, y))
            results.append((*outs, y, *torch.autograd.grad(loss, (qkv, *weights))))
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want, rtol=3e-2, atol=3e-2 * float(want.abs().max()))


@pytest.mark.parametrize("backend", BACKENDS)
def test_rows_of_fp8_are_taken_or_refused_alike(backend):
    """quantize and its like take them as any other numbers, also where csrc/ has no kernel for them."""
    rand = Rand(BF16)
    x, plan = rand.data(20, 256).to(torch.float8_e4m3fn), plan_of(rand, 20, 4, 2)
    calls = lambda: lk.quantize(x), lambda: lk.swiglu(x), lambda: lk.permute_quantize(x, plan)  # noqa: E731
    results = []
    for name in ("torch", backend):
        with force(name):
            outs = [call() for call in calls]
            results.append([t.float() for out in outs for t in (out if isinstance(out, tuple) else (out,))])
    torch.testing.assert_close(*results)
    tables, positions = rope_tables(20, 64, 1e4, device=DEVICE), torch.arange(20, device=DEVICE)
    router_w, bias, w = rand.fp32(4, 256).detach(), rand.data(4, dtype=torch.float32), rand.data(128)
    experts, x_scale = (rand.data(4, 64, 256), rand.data(4, 256, 32)), torch.ones(20, 2, device=DEVICE)
    offsets = torch.tensor([0, 20], dtype=torch.int32, device=DEVICE)
    with force(backend):
        for call, says in (
            (lambda: lk.moe(x, router_w, bias, *experts, None, num_groups=1, group_topk=1, topk=2), "x .T, H."),
            (lambda: lk.qk_norm_rope(x.view(10, 4, 128), w, w, *tables, positions[:10], 1), "qkv .T, Hq"),
            (lambda: lk.grouped_wgrad(x, x, offsets, dy_scale=x_scale.to(x.dtype), x_scale=x_scale), "one fp32 scale"),
        ):  # fmt: skip
            with pytest.raises(ValueError, match=says):
                call()


@pytest.mark.parametrize("backend", BACKENDS)
def test_decoding_and_products_refuse_other_types(backend):
    """Scales of a cache that are integers gave other results on every backend."""
    rand = Rand(BF16)
    cells, tables = (4, 16, 1, 128), rope_tables(64, 64, 1e4, device=DEVICE)
    cache = [rand.data(*cells).to(torch.float8_e4m3fn) for _ in range(2)]
    block_table, lengths = (torch.tensor(x, dtype=torch.int32, device=DEVICE) for x in ([[0, 1]], [20]))
    q, qkv, w, ones = rand.data(1, 1, 2, 128), rand.data(1, 1, 4, 128), rand.data(128), torch.ones(4, 16, 1)
    ones = ones.to(DEVICE)
    a, b = lk.quantize(rand.data(20, 128)), lk.quantize_weight(rand.data(128, 128))
    norm = w, w, *tables
    with force(backend):
        for call, says in (
            *((lambda s=s: lk.attention_decode(q, lk.KVCache(*cache, s, s), block_table, lengths), "k_scale")
              for s in (ones.int(), ones.bool(), ones.to(BF16), ones.to(torch.float8_e4m3fn))),
            (lambda: lk.qk_norm_attention_decode(qkv.to(torch.float8_e4m3fn), *norm, lk.KVCache(*cache, ones, ones),
                                                 block_table, lengths), "qkv .B, n"),
            (lambda: lk.gemm_fp8(*a, *b, torch.zeros(20, 128, device=DEVICE).to(torch.float8_e4m3fn)), "out .M, N."),
        ):  # fmt: skip
            with pytest.raises(ValueError, match=says):
                call()


def test_a_shared_expert_that_does_not_fit_is_refused():
    rand = Rand(BF16)
    x, router_w, bias = rand.data(3, 16), rand.fp32(4, 16).detach(), rand.data(4, dtype=torch.float32)
    experts, gate_up, down = (rand.data(4, 16, 16), rand.data(4, 16, 8)), rand.data(8, 16), rand.data(16, 4)
    routing = dict(num_groups=1, group_topk=1, topk=2)
    assert lk.moe(x, router_w, bias, *experts, (gate_up, down), **routing)[0].shape == x.shape
    for shared in ((gate_up.float(), down), (gate_up[:4], down), (gate_up, down.T), (gate_up[None], down)):
        with pytest.raises(ValueError, match="shared weights"):
            lk.moe(x, router_w, bias, *experts, shared, **routing)


def test_an_error_describes_tensors_in_tuples_and_is_one_line():
    with pytest.raises(ValueError) as error:
        expect(False, "a pair", (torch.zeros(2, 3), None), list(range(5000)))
    assert str(error.value).startswith("expected a pair; got (float32[2, 3], None), [0, 1, 2")
    assert len(str(error.value)) < 1000


def test_a_weight_in_another_dtype_than_the_rows():
    x, w = torch.randn(3, 16), torch.randn(4, 16).bfloat16()
    for rows in (x, x[:0]):
        with pytest.raises(ValueError, match="x and w in one dtype"):
            lk.rms_norm_linear(rows, None, w)
    with torch.autocast("cpu", torch.bfloat16):
        assert lk.rms_norm_linear(x, None, w).shape == (3, 4)


def test_head_norms_in_other_dtypes():
    """One weight in FP8 and the other in bf16 are widened before they stand in one tensor."""
    rand = Rand(BF16)
    qkv, w, tables = rand.data(3, 6, 16), rand.data(16), rope_tables(8, 16, 1e4, device=DEVICE)
    q_weight, positions = w.to(torch.float8_e4m3fn), torch.arange(3, device=DEVICE)
    with force("torch"):
        outs, want = (lk.qk_norm_rope(qkv, a, w, *tables, positions, 2) for a in (q_weight, q_weight.float()))
    assert all(torch.equal(*pair) for pair in zip(outs, want, strict=True))
