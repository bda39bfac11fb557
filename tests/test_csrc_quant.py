"""The FP8 kernels of csrc/ on the CPU: their arithmetic value by value, and broken kernels that must fail."""

import ctypes

import numpy as np
import pytest
import torch

from ling_kernels.ops.dispatch import dispatch_ref
from ling_kernels.ops.permute import permute_ref
from ling_kernels.ops.quantize import empty_fp8, quantize_ref, quantize_weight_ref, to_e4m3
from ling_kernels.ops.swiglu import swiglu_backward_ref, swiglu_ref
from tests.cases import Rand, counts_of, owned, plan_of
from tests.host.build import CSRC, HERE, SANITIZE, link, load, missing

if missing():
    pytest.skip(f"csrc/ needs {missing()} to be built on the host", allow_module_level=True)

from tests.test_host import sanitized

C = load()
SWIGLU = "moe/swiglu.cu"
FP8, TILE, QUANTIZE, TRANSPOSE = (
    f"quant/{name}" for name in ("fp8.cuh", "fp8_tile.cuh", "quantize.cu", "transpose_fp8.cu")
)
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
            near([y, *fp8[:2]], [swiglu_ref(x), *swiglu_ref(x, None, True, pow2=pow2)])
            dx, dweights = torch.full_like(x, 7), torch.full_like(weights, 7)
            fp8 = empty_fp8(x, 2 * T, 2 * F, True, False, None)
            C.swiglu_bwd(dy, x, weights, dx, dweights, *fp8, plan.offsets, None, pow2)
            assert (dx[end:] == 7).all() and (dweights[end:] == 7).all()
            want = swiglu_backward_ref(dy, x, weights, True, pow2=pow2)[0]
            want = [*swiglu_backward_ref(dy, x, weights), *want]
            near([t[:end] for t in (dx, dweights, *fp8[:2])], [t[:end] for t in want])


def near(got, want):
    for g, w in zip(got, want, strict=True):
        eps = {E4M3: 2**-3, BF16: 2**-7}.get(g.dtype, 1e-5)
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


ARITHMETIC = """
#include "fp8.cuh"
#define EXPORT extern "C" __attribute__((visibility("default"))) void
EXPORT codes(const float* x, unsigned char* out, int n) {
    for (int i = 0; i < n; i++) out[i] = ling::to_e4m3(x[i]);
    for (int i = 0; i + 3 < n; i += 4) {
        const unsigned four = ling::to_e4m3x4(x[i], x[i + 1], x[i + 2], x[i + 3]);
        for (int j = 0; j < 4; j++)
            if (out[i + j] != (four >> 8 * j & 255)) out[i + j] = 0x55;
    }
}
EXPORT quotients(const float* x, const float* scale, float* out, int n) {
    for (int i = 0; i < n; i++) {
        float one[1] = {x[i]};
        const ling::Quotient<false> divide(scale[i]);
        divide(one, divide.is_tiny());
        out[i] = one[0];
    }
}
// Pairs of bf16 |x| <= amax, so small that remainders underflow, whose codes differ from those of a division
EXPORT wrong_pairs(int* out, int n) {
    for (int e = -91; e < -57; e++)
        for (int m = 0; m < 128; m++) {
            const float amax = std::ldexp(1 + m / 128.f, e), scale = ling::block_scale(ling::abs_bits(amax), false);
            const ling::Quotient<false, ling::bf16> divide(scale);
            for (int k = 0; k < 20; k++)
                for (int j = 0; j < 128; j++) {
                    const float x = std::ldexp(1 + j / 128.f, e - k);
                    float q[1] = {x};
                    divide(q, divide.is_tiny());
                    *out += x <= amax && ling::to_e4m3(q[0]) != ling::to_e4m3(x / scale);
                }
        }
}
EXPORT scales(const float* amax, float* out, int n, bool pow2) {
    for (int i = 0; i < n; i++) out[i] = ling::block_scale(ling::abs_bits(amax[i]), pow2);
}
"""


def build_arithmetic(tmp_path, right="", wrong=""):
    """ARITHMETIC as a library, with fp8.cuh changed so."""
    header = (CSRC / FP8).read_text()
    assert header.count(right) == 1 or not right
    (tmp_path / "fp8.cuh").write_text(header.replace(right, wrong) if right else header)
    (tmp_path / "arithmetic.cu").write_text(ARITHMETIC.replace("fp8.cuh", str(tmp_path / "fp8.cuh")))
    return ctypes.CDLL(link([tmp_path / "arithmetic.cu", HERE / "cuda_on_host.cpp"], ".so", "-shared"))


@pytest.fixture(scope="module")
def arithmetic(tmp_path_factory):
    return build_arithmetic(tmp_path_factory.mktemp("fp8"))


def call(f, *tensors, more=()):
    f(*(ctypes.c_void_p(t.data_ptr()) for t in tensors), ctypes.c_int(tensors[0].numel()), *more)
    return tensors[-1]


def test_codes(arithmetic):
    """Every e4m3 number, the midpoints of neighbours, the floats next to both, and values without a code."""
    values = torch.arange(127, dtype=torch.uint8).view(E4M3).float()
    x = torch.cat([values, (values[1:] + values[:-1]) / 2, torch.tensor([464.0, 480, 1e4, 3e38, 1e-40, torch.inf])])
    x = torch.cat(
        [x, x.nextafter(torch.tensor(torch.inf)), x.nextafter(torch.tensor(-torch.inf)), values[:1] + torch.nan]
    )
    x = torch.cat([x, -x, torch.randn(10000) * 100, torch.randn(10000) / 100])
    assert_same(call(arithmetic.codes, x, torch.empty(len(x), dtype=torch.uint8)).view(E4M3), to_e4m3(x))


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


def check_quotients(arithmetic):
    """A product with the reciprocal, once corrected, has the bits of a division, -0 and underflow too."""
    x, scale = near_midpoints()
    want = x / scale  # torch divides as IEEE 754 says
    assert torch.equal(call(arithmetic.quotients, x, scale, torch.empty_like(x)), want)
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


def test_quotients(arithmetic):
    check_quotients(arithmetic)


def test_codes_of_bf16_survive_remainders_that_underflow(arithmetic):
    assert call(arithmetic.wrong_pairs, torch.zeros(1, dtype=torch.int32)).tolist() == [0]


@pytest.mark.parametrize("right, wrong", [
    ("fmaf(-fmaf(q, divisor, -x), inverse, q)", "fmaf(fmaf(-q, divisor, x), inverse, q)"),  # loses -0
    ("fmaf(-fmaf(q, divisor, -x), inverse, q)", "q"),
    ("divisor < 1e-20f", "false"),
    ("else divisor = 1", "else divisor = scale"),
])  # fmt: skip
def test_broken_quotients(right, wrong, tmp_path):
    with pytest.raises(AssertionError):
        check_quotients(build_arithmetic(tmp_path, right, wrong))


@pytest.mark.parametrize("pow2", [False, True])
def test_scales(arithmetic, pow2):
    amax = torch.cat([2.0 ** torch.arange(-149, 128.0), 448 * 2.0 ** torch.arange(-120, 119.0), torch.rand(1000) * 1e3,
                      torch.tensor([0, -0.0, 448e-30, torch.inf, torch.nan, 3.4e38])])  # fmt: skip
    amax = torch.cat([amax, amax.nextafter(torch.tensor(torch.inf)), amax.nextafter(torch.tensor(0.0))])
    want = quantize_ref(amax[:, None].abs().expand(-1, 128), pow2=pow2)[1].flatten()
    assert_same(call(arithmetic.scales, amax, torch.empty(len(amax)), more=(ctypes.c_bool(pow2),)), want)


BROKEN = {  # name: (check that must fail, file, right, wrong)
    "a float maximum drops NaN": (check_rows, TILE, "max_or_nan(fabsf(__uint_as_float(a))",
                                  "fmaxf(fabsf(__uint_as_float(a))"),
    "the wrong lane's scale": (check_rows, TILE, "of_lane(i, 16)", "of_lane(0, 16)"),
    "a scale past the end": (check_plan_writes_nothing_else, TILE, "lane < N && lane < rows",
                             "lane < N && lane <= rows"),
    "no barrier before the scales": (check_columns, TILE, "    __syncthreads();\n    if (t < kBlock) {",
                                     "    if (t < kBlock) {"),
    "halves not swapped": (check_columns, TILE, "if (group % 2)", "if (false)"),
    "expert after the next": (check_plan, TILE, "padded_offsets[e + 1] <= start", "padded_offsets[e + 1] < start"),
    "512 experts": (check_plan, TILE, "e - static_cast<int>(threadIdx.x) < E;", "e < kTileThreads;"),
    "source not divided": (check_plan, QUANTIZE, "source[row] / topk", "source[row] / 1 % 90"),
    "half of the other warps' maximum": (check_weight, QUANTIZE, "max(most, warp_amax)", "max(most, warp_amax >> 1)"),
    "gate for up": (check_swiglu, SWIGLU, "load8(up[i], x_row + F)", "load8(up[i], x_row)"),
    "dweights of half a row": (check_swiglu, SWIGLU, "for (int d = 8; d;", "for (int d = 4; d;"),
    "up's codes over gate's": (check_swiglu, SWIGLU, "k + F / kBlock", "k"),
    "the upper rows' weights": (check_swiglu, SWIGLU, "row + 2, rows - 2", "row, rows - 2"),
    "the first expert for all": (check_transpose, TRANSPOSE, "y += blockIdx.z * N * K", "y += 0"),
    "the first expert's scales": (check_transpose, TRANSPOSE, "scale += blockIdx.z", "scale += 0"),
}  # fmt: skip


def seen_by(file):
    """The one .cu that sees a changed header."""
    return None if file.endswith(".cu") else QUANTIZE


@pytest.mark.parametrize("name", BROKEN)
def test_broken(name, monkeypatch):
    monkeypatch.setenv("LING_HOST_SEED", "1")
    check, *patch = BROKEN[name]
    broken = load(tuple(patch), seen_by(patch[0]))
    with pytest.raises((AssertionError, RuntimeError)):
        check(broken)


OUT_OF_BOUNDS = {  # name: (check, file, right, wrong)
    "a row past the end": (check_rows, QUANTIZE, "constexpr int kRows = 4;\n    launch_dependents();",
                            "constexpr int kRows = 4;\n    M += 3;\n    launch_dependents();"),
    "codes past the tile": (check_columns, TILE, "codes[8 * tx + j0 + j][", "codes[8 * tx + j0 + j + 1]["),
}  # fmt: skip


@pytest.mark.skipif(SANITIZE, reason="starts its own")
@pytest.mark.parametrize("name", [None, *OUT_OF_BOUNDS])
def test_sanitizer(name):
    module = "from tests.test_csrc_quant import *"
    if name is None:
        result = sanitized(f"{module}; [check(C) for check in CHECKS]")
        assert result.returncode == 0, result.stderr
        return
    check, *patch = OUT_OF_BOUNDS[name]
    only = seen_by(patch[0])
    result = sanitized(f"{module}; {check.__name__}(load({tuple(patch)!r}, {only!r}))")
    assert result.returncode != 0 and "AddressSanitizer" in result.stderr, result.stderr
