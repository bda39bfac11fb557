"""The FP8 kernels of csrc/ on the virtual GPU, and their arithmetic value by value."""

import numpy as np
import pytest
import torch

from ling_kernels.ops.dispatch import dispatch_ref
from ling_kernels.ops.permute import permute_ref
from ling_kernels.ops.quantize import empty_fp8, quantize_ref, quantize_weight_ref, to_e4m3
from ling_kernels.ops.swiglu import swiglu_backward_ref, swiglu_ref
from tests.cases import Rand, counts_of, owned, plan_of
from tests.gpu.build import ROOT, Kernels, load, missing
from tests.test_ops import near_codes

if missing():
    pytest.skip(f"csrc/ needs {missing()} to run on the virtual GPU", allow_module_level=True)

C = load()
E4M3, FP32, BF16, FP16 = torch.float8_e4m3fn, torch.float32, torch.bfloat16, torch.float16


def assert_same(got, want):
    """Bit for bit, but for the sign of a NaN."""
    assert got.dtype == want.dtype and got.shape == want.shape
    nan = got.isnan() if got.dtype != E4M3 else got.view(torch.uint8) & 0x7F == 0x7F
    other = want.isnan() if want.dtype != E4M3 else want.view(torch.uint8) & 0x7F == 0x7F
    assert torch.equal(nan, other)
    bits = torch.uint8 if got.dtype == E4M3 else torch.int32
    got, want = (t.contiguous().view(bits).masked_fill(n, 0) for t, n in ((got, nan), (want, other)))
    assert torch.equal(got, want), f"{(got != want).sum()} of {got.numel()} differ"


def hard(x):
    """x with blocks of zeros, of tiny and of huge numbers, with -0, inf and NaN here and there."""
    M, K = x.shape[-2:]
    scale = torch.tensor([1, 0, 1e-38, 1e-29, 1e-19, 1e-3, 448, 1e19, 1e36]).repeat(M * K // 128 // 9 + 1)
    scale = scale[: M * K // 128].reshape(M, K // 128).repeat_interleave(128, 1)
    x = (x.float() * scale).clamp(-3e38, 3e38)
    x[..., ::7] *= -0.0
    for bad, every in ((torch.inf, 1013), (torch.nan, 1511), (-torch.inf, 1999)):
        x.view(-1)[every // 2 :: every] = bad
    return x


def check_quantize(C, x, rows=True, columns=True, plan=None, pow2=False, topk=0):
    M = len(plan.source) if topk else len(x)
    out = empty_fp8(x, M, x.shape[1], rows, columns, plan)
    source = plan.source if topk else None
    offsets, padded = (plan.offsets, plan.padded_offsets if columns else None) if plan else (None, None)
    C.quantize_fwd(x, *out, offsets, padded, source, topk or 1, pow2)
    got = [t for t in out if t is not None]
    want = quantize_ref(permute_ref(x, plan) if topk else x, rows, columns, plan, pow2)
    assert [t.stride() for t in got if t.numel() > 1] == [t.stride() for t in want if t.numel() > 1]
    if plan and rows:
        got, want = owned(got, [plan]), owned(list(want), [plan])
    elif plan:
        got, want = (owned([t[0][:0], t[0][:0], *t], [plan])[2:] for t in (got, want))
    for g, w in zip(got, want, strict=True):
        assert_same(g, w)


def check_rows(C):
    rand = Rand(FP32)
    check_quantize(C, hard(rand.data(37, 384)), columns=False)
    check_quantize(C, hard(rand.data(33, 256)).to(BF16), columns=False, pow2=True)
    check_quantize(C, rand.data(5, 128).to(FP16), columns=False)
    check_quantize(C, rand.data(3, 512)[:, 128:384], columns=False)  # strided rows
    check_quantize(C, rand.data(0, 128), columns=False)


def check_columns(C):
    rand = Rand(FP32)
    check_quantize(C, hard(rand.data(130, 128)))
    check_quantize(C, hard(rand.data(70, 256)).to(BF16), rows=False, pow2=True)
    check_quantize(C, rand.data(1, 128).to(FP16), pow2=True)
    check_quantize(C, rand.data(0, 128))


def check_plan(C):
    rand = Rand(BF16)
    for routing in ("masked", "one"):
        plan = plan_of(rand, 90, 5, 2, routing)
        check_quantize(C, rand.data(180, 128), plan=plan)
        check_quantize(C, rand.data(90, 128), plan=plan, topk=2)
        check_quantize(C, rand.data(90, 256), columns=False, plan=plan, topk=2, pow2=True)
    experts = torch.tensor([[700], [3], [519]], dtype=torch.int32)
    check_quantize(C, rand.data(3, 128), rows=False, plan=dispatch_ref(experts, counts_of(experts, 1025)))


def check_plan_writes_nothing_else(C):
    """Rows past the last expert's, and columns past its run, are not written."""
    rand = Rand(BF16)
    plan = plan_of(rand, 90, 3, 2, "masked")
    x, last, columns = rand.data(180, 128), int(plan.offsets[-1]), int(plan.padded_offsets[-1])
    out = empty_fp8(x, 180, 128, True, True, plan)
    for t in out:
        t.view(torch.uint8 if t.dtype == E4M3 else torch.int32).fill_(77)
    C.quantize_fwd(x, *out, plan.offsets, plan.padded_offsets, None, 1, False)
    outside = out[0][last:], out[1][last:], out[2][:, columns:], out[3][:, columns // 128 :]
    for t in outside:
        assert t.numel() and (t.view(torch.uint8 if t.dtype == E4M3 else torch.int32) == 77).all()


def check_weight(C):
    rand = Rand(FP32)
    for w, pow2 in ((rand.data(2, 128, 256), False), (rand.data(256, 128), True), (rand.data(128, 384).to(BF16), False),
                    (torch.zeros(0, 128, 128), False), (hard(rand.data(128, 128)), True),
                    (rand.data(128, 128) * 1e-37, False)):  # fmt: skip
        w_q, w_scale = quantize_weight_ref(w, pow2)
        got, scale = torch.empty_like(w_q), torch.empty_like(w_scale)
        C.quantize_weight_fwd(w.contiguous(), got, scale, pow2)
        assert_same(got, w_q)
        assert_same(scale, w_scale)


def check_transpose(C):
    g = torch.Generator().manual_seed(0)
    for sizes in ((3, 128, 256), (2, 256, 128), (0, 128, 128), (128, 384)):
        w_q = torch.randint(0, 256, sizes, generator=g, dtype=torch.uint8).view(E4M3)
        w_scale = torch.randn(*sizes[:-2], sizes[-2] // 128, sizes[-1] // 128, generator=g)
        wt_q, wt_scale = (torch.empty_like(t.mT, memory_format=torch.contiguous_format) for t in (w_q, w_scale))
        C.transpose_fp8_fwd(w_q, w_scale, wt_q, wt_scale)
        assert torch.equal(wt_q.view(torch.uint8), w_q.view(torch.uint8).mT) and torch.equal(wt_scale, w_scale.mT)


def check_swiglu(C):
    """Codes differ from the reference's by at most one, as a last bit may change a code; the rest is near."""
    rand = Rand(FP32)
    for dtype, T, F, routing in ((FP32, 45, 128, "masked"), (BF16, 40, 256, "one"), (BF16, 0, 128, "")):
        plan = plan_of(rand, T, 3, 2, routing)
        x, dy, weights = rand.data(2 * T, 2 * F, dtype=dtype), rand.data(2 * T, F, dtype=dtype), rand.data(2 * T)
        offsets, end = (plan.offsets, plan.padded_offsets), int(plan.offsets[-1])
        for pow2 in (False, True):
            fp8, y = empty_fp8(x, 2 * T, F, True, True, plan), torch.empty_like(dy)
            C.swiglu_fwd(x, weights, None, *fp8, *offsets, pow2)
            near(owned([*fp8], [plan]), owned([*swiglu_ref(x, weights, True, True, plan, pow2)], [plan]))
            fp8 = empty_fp8(x, 2 * T, F, True, False, None)
            C.swiglu_fwd(x, None, y, *fp8, None, None, pow2)
            want = [swiglu_ref(x), *swiglu_ref(x, None, True, pow2=pow2)]
            near([y, *fp8[:2]], want)
            fp8, y = empty_fp8(x, 2 * T, F, True, False, None), torch.full_like(dy, 7)
            C.swiglu_fwd(x, None, y, *fp8, plan.offsets, None, pow2)
            near([t[:end] for t in (y, *fp8[:2])], [t[:end] for t in want])
            assert (y[end:] == 7).all()
            dx, dweights = torch.full_like(x, 7), torch.full_like(weights, 7)
            fp8 = empty_fp8(x, 2 * T, 2 * F, True, False, None)
            C.swiglu_bwd(dy, x, weights, dx, dweights, *fp8, plan.offsets, None, pow2)
            assert (dx[end:] == 7).all() and (dweights[end:] == 7).all()
            want = swiglu_backward_ref(dy, x, weights, True, pow2=pow2)[0]
            want = [*swiglu_backward_ref(dy, x, weights), *want]
            near([t[:end] for t in (dx, dweights, *fp8[:2])], [t[:end] for t in want])


def near(got, want):
    for g, w in zip(got, want, strict=True):
        if g.dtype == E4M3:
            assert near_codes(g, w)
            continue
        eps = 2**-7 if g.dtype == BF16 else 1e-5
        torch.testing.assert_close(g.float(), w.float(), rtol=eps, atol=max(eps / 8, 1e-5))


CHECKS = [
    check_swiglu,
    check_rows,
    check_columns,
    check_plan,
    check_plan_writes_nothing_else,
    check_weight,
    check_transpose,
]


@pytest.mark.parametrize("check", CHECKS, ids=lambda f: f.__name__[6:])
def test_correct(check, schedule):
    check(C)


@pytest.fixture(scope="module")
def arithmetic():
    return Kernels(ROOT / "tests/cuda/arithmetic.cu")


def call(kernel, *tensors, n=None, more=()):
    n = n or tensors[0].numel()
    kernel(-(-n // 256), 256, *tensors, n, *more)
    return tensors[-1]


def test_codes(arithmetic):
    """Every e4m3 number, the midpoints of neighbours, the floats next to both, and values without a code."""
    values = torch.arange(127, dtype=torch.uint8).view(E4M3).float()
    x = torch.cat([values, (values[1:] + values[:-1]) / 2, torch.tensor([464.0, 480, 1e4, 3e38, 1e-40, torch.inf])])
    x = torch.cat(
        [x, x.nextafter(torch.tensor(torch.inf)), x.nextafter(torch.tensor(-torch.inf)), values[:1] + torch.nan]
    )
    x = torch.cat([x, -x, torch.randn(10000) * 100, torch.randn(10000) / 100])
    x = x[: len(x) // 4 * 4]
    assert_same(call(arithmetic.codes, x, torch.empty(len(x), dtype=torch.uint8)).view(E4M3), to_e4m3(x))
    fours = call(arithmetic.codes_of_four, x, torch.empty(len(x) // 4, dtype=torch.int32), n=len(x) // 4)
    assert_same(fours.view(E4M3), to_e4m3(x))


def near_midpoints(n=1 << 20):
    """(x, scale) whose quotients lie 2^-48 beside the midpoint m / 2^25 of two floats: x 2^25 = m scale +- 1."""
    b = torch.randint(1 << 22, 1 << 23, (n,), generator=torch.Generator().manual_seed(0)) * 2 + 1
    inverse = b  # modulo 8, then modulo 2^(3 2^i)
    for _ in range(4):
        inverse = inverse * (2 - b * inverse) & (1 << 25) - 1
    found = []
    for sign in (1, -1):
        m = sign * inverse & (1 << 25) - 1
        a = (m * b - sign) >> 25
        found.append(torch.stack([a, b])[:, (a >= 1 << 23) & (m >= 1 << 24)])
    x, scale = torch.cat(found, 1).float().contiguous()
    return x, scale


def test_quotients_beside_midpoints(arithmetic):
    x, scale = near_midpoints()
    assert torch.equal(call(arithmetic.quotients, x, scale, torch.empty_like(x)), x / scale)  # as IEEE 754 rounds


def test_codes_of_bf16_survive_remainders_that_underflow(arithmetic):
    assert not call(arithmetic.wrong_codes, torch.ones(34 * 128, dtype=torch.int32)).any()


def test_quotients(arithmetic):
    """A product with the reciprocal, once corrected, has the bits of a division, -0 and underflow too."""
    g = torch.Generator().manual_seed(0)
    n = 1 << 21
    scale = torch.rand(n, generator=g).add(1) * 2.0 ** torch.randint(-99, 118, (n,), generator=g)
    size = 2.0 ** torch.randint(-60, 1, (n,), generator=g).float()
    x = scale * 448 * torch.rand(n, generator=g) * size * torch.randint(0, 2, (n,), generator=g).mul(2).sub(1)
    x[::101] = 0.0
    x[1::101] = -0.0
    scale[::1009], scale[1::1009], x[2::1009] = torch.inf, torch.nan, torch.nan
    x[3::1009], scale[3::1009] = torch.inf, torch.inf
    got = call(arithmetic.quotients, x, scale, torch.empty(n))
    with np.errstate(all="ignore"):
        want = torch.from_numpy(x.numpy() / scale.numpy())
    seen = want.abs() >= 2**-30  # below that only the sign of its code, which is 0, is
    assert_same(torch.where(seen, got, 0), torch.where(seen, want, 0))
    assert torch.equal(got.signbit() | got.isnan(), want.signbit() | want.isnan())
    assert (got[~seen & ~want.isnan()].abs() < 2**-29).all()


@pytest.mark.parametrize("pow2", [False, True])
def test_scales(arithmetic, pow2):
    amax = torch.cat([2.0 ** torch.arange(-149, 128.0), 448 * 2.0 ** torch.arange(-120, 119.0), torch.rand(1000) * 1e3,
                      torch.tensor([0, -0.0, 448e-30, torch.inf, torch.nan, 3.4e38])])  # fmt: skip
    amax = torch.cat([amax, amax.nextafter(torch.tensor(torch.inf)), amax.nextafter(torch.tensor(0.0))])
    want = quantize_ref(amax[:, None].abs().expand(-1, 128), pow2=pow2)[1].flatten()
    assert_same(call(arithmetic.scales, amax, torch.empty(len(amax)), more=(pow2,)), want)
