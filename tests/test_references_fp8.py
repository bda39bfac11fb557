"""The FP8 references against independent ones: Python arithmetic, numpy in fp64, every value of e4m3."""

import math

import numpy as np
import pytest
import torch

from ling_kernels.op import E4M3, round_up
from ling_kernels.ops.dispatch import dispatch
from ling_kernels.ops.gemm_fp8 import gemm_fp8
from ling_kernels.ops.grouped_gemm_fp8 import grouped_gemm_fp8, grouped_gemm_fp8_masked
from ling_kernels.ops.grouped_wgrad import grouped_wgrad
from ling_kernels.ops.permute import permute, permute_quantize
from ling_kernels.ops.quantize import dequantize, padded_slots, quantize, quantize_weight, to_e4m3
from ling_kernels.ops.swiglu import swiglu
from ling_kernels.ops.transpose_fp8 import transpose_fp8
from tests.cases import counts_of

BF16, FP32, FP64 = torch.bfloat16, torch.float32, torch.float64
rand = torch.randn


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def e4m3(code: int) -> float:
    """The value of a byte: 1 sign, 4 exponent (bias 7), 3 mantissa bits; no infinity, S.1111.111 is NaN."""
    sign, exponent, mantissa = code >> 7, code >> 3 & 15, code & 7
    if exponent == 15 and mantissa == 7:
        return math.nan
    value = mantissa / 8 * 2**-6 if exponent == 0 else (1 + mantissa / 8) * 2.0 ** (exponent - 7)
    return -value if sign else value


GRID = [e4m3(code) for code in range(127)]  # the positive ones, ascending, 0 to 448


def plan_for(experts, E):
    experts = torch.tensor(experts, dtype=torch.int32)
    return dispatch(experts, counts_of(experts, E))


def value(q, scale, bm=1, bn=128):
    """Dequantised in fp64 by numpy."""
    scale = scale.double().numpy().repeat(bm, -2).repeat(bn, -1)
    return torch.from_numpy(q.float().double().numpy() * scale)


def near(got, want, ulps=2.0):
    """Within a few roundings of got's dtype, relative to the largest element."""
    eps = {BF16: 2**-8, FP32: 2**-22, FP64: 2**-50}[got.dtype]
    assert got.shape == want.shape
    assert (got.double() - want.double()).abs().max() <= ulps * eps * want.abs().max()


def test_every_e4m3_value():
    codes = torch.arange(256, dtype=torch.uint8)
    want = torch.tensor([*map(e4m3, range(256))], dtype=FP64)
    assert torch.equal(codes.view(E4M3).double().nan_to_num(999), want.nan_to_num(999))
    finite = codes.view(E4M3).float()
    assert torch.equal(to_e4m3(finite).view(torch.uint8)[~finite.isnan()], codes[~finite.isnan()])


@pytest.mark.parametrize("sign", [1, -1])
def test_rounds_to_nearest_even_between_all_neighbours(sign):
    for code, (low, high) in enumerate(zip(GRID, GRID[1:], strict=False)):
        middle = np.float32((low + high) / 2)
        even = low if code % 2 == 0 else high
        for x, want in ((middle, even), (np.nextafter(middle, np.float32(0)), low),
                        (np.nextafter(middle, np.float32(1e9)), high)):  # fmt: skip
            assert to_e4m3(torch.tensor(sign * x)).item() == sign * want, (code, x)


def test_saturates_and_keeps_nan():
    x = torch.tensor([448.0, 463.9, 464.0, 465.0, 1e30, math.inf, -449.0, -math.inf])
    assert to_e4m3(x).float().tolist() == [448.0] * 6 + [-448.0] * 2
    assert to_e4m3(torch.tensor(math.nan)).isnan()


def test_rounding_is_unbiased():
    x = torch.rand(1 << 20, dtype=FP64) * 896 - 448
    error = to_e4m3(x).double() - x
    assert error.mean().abs() < 5 * error.std() / 1024
    assert (error.abs() <= x.abs().clamp(min=2**-6) / 16).all()


@pytest.mark.parametrize("pow2", [False, True])
def test_scales(pow2):
    """One block per row: exact powers of two, their neighbours, zero, tiny and huge values."""
    exact = [448 * 2.0**n for n in range(-80, 119)]
    amax = [*exact, *(np.nextafter(np.float32(a), np.float32(s)) for a in exact for s in (0, 1e38)), 0, 1e-40, 3e38]
    x = torch.zeros(len(amax), 128)
    x[:, 77] = -torch.tensor(np.array(amax, dtype=np.float32))
    x_q, scale = quantize(x, pow2=pow2)
    for a, s, q in zip(np.array(amax, dtype=np.float32), scale[:, 0].tolist(), x_q[:, 77].float(), strict=True):
        want = max(np.float32(a) / np.float32(448), np.float32(1e-30))
        if pow2:
            mantissa, exponent = math.frexp(want)
            want = 2.0 ** (exponent - (mantissa == 0.5))
        assert s == want, a
        assert a < 1e-27 or (abs(q * s + a) <= a / 16 if pow2 else q == -448)


def test_scale_layout():
    for M in range(1, 10):
        _, scale = quantize(rand(M, 384))
        assert scale.shape == (M, 3) and scale.stride(0) == 1 and scale.stride(1) % 4 == 0 and scale.stride(1) >= M


def test_rows_and_weights_against_a_loop():
    x = rand(5, 256, dtype=BF16)
    x_q, scale = quantize(x)
    for m in range(5):
        for b in range(2):
            block = x[m, b * 128 : b * 128 + 128].float()
            s = block.abs().max() / 448
            q = x_q[m, b * 128 : b * 128 + 128]
            assert scale[m, b] == s and torch.equal(q.float(), (block / s).to(E4M3).float())
    w = rand(2, 256, 384)
    w_q, scale = quantize_weight(w)
    assert scale.shape == (2, 2, 3) and scale[1, 1, 2] == w[1, 128:, 256:].abs().max() / 448
    assert torch.equal(w_q[1, 128:, 256:].float(), (w[1, 128:, 256:] / scale[1, 1, 2]).to(E4M3).float())
    assert (dequantize(w_q, scale) - w).abs().max() <= w.abs().max() / 16
    near(dequantize(w_q, scale), value(w_q, scale, 128))


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("pow2", [False, True])
def test_nan_and_inf_stay_visible(bad, pow2):
    x = rand(256, 256)
    x[3, 130] = bad
    back = dequantize(*quantize(x, pow2=pow2))
    assert not back[3, 130].isfinite() and back[3, :128].isfinite().all() and back[4:].isfinite().all()
    xt_q, xt_scale = quantize(x, rows=False, columns=True, pow2=pow2)
    back = dequantize(xt_q, xt_scale)
    assert not back[130, 3].isfinite() and back[130, 128:].isfinite().all()
    back = dequantize(*quantize_weight(x, pow2))
    assert not back[3, 130].isfinite() and back[128:].isfinite().all()


def test_columns_without_a_plan():
    x = rand(130, 128)
    xt_q, xt_scale = quantize(x, rows=False, columns=True)
    padded = torch.nn.functional.pad(x, (0, 0, 0, 126))
    want_q, want_scale = quantize(padded.T.contiguous())
    assert torch.equal(xt_q.view(torch.uint8), want_q.view(torch.uint8)) and torch.equal(xt_scale, want_scale)
    assert xt_q.is_contiguous() and xt_scale.T.is_contiguous()


def test_columns_with_a_plan():
    """Experts with 200, 0 and 3 rows, and 4 rows that nobody owns."""
    experts = torch.cat([torch.zeros(200), torch.full((3,), 2.0), torch.full((4,), -1.0)])[torch.randperm(207)]
    plan = plan_for(experts.int()[:, None].tolist(), 3)
    assert plan.padded_offsets.tolist() == [0, 256, 256, 384]
    x = rand(207, 128)
    x[203:] = math.nan
    x_q, x_scale, xt_q, xt_scale = quantize(x, columns=True, plan=plan)
    assert xt_q.shape == (128, padded_slots(207, 3)) and padded_slots(207, 3) == 640 and xt_scale.shape == (128, 5)
    for lo, hi, at in ((0, 200, 0), (200, 203, 256)):
        n = round_up(hi - lo, 128)
        want_q, want_scale = quantize(x[lo:hi], rows=False, columns=True)
        assert torch.equal(xt_q[:, at : at + n].float(), want_q.float())
        assert torch.equal(xt_scale[:, at // 128 : (at + n) // 128], want_scale)
        assert (xt_q[:, at + hi - lo : at + n].float() == 0).all()


def test_padded_slots_suffice_and_are_tight():
    for S, E in ((0, 4), (1, 256), (7, 3), (300, 2)):
        worst = [1] * min(E - 1, max(S - 1, 0))
        worst.append(S - sum(worst))
        need = sum(-(-n // 128) * 128 for n in worst)
        assert need <= padded_slots(S, E) < need + 128 * (1 + min(E, S))


@pytest.mark.parametrize("shape", [(256, 384), (3, 128, 256)])
def test_transpose_is_exact(shape):
    w_q, w_scale = quantize_weight(rand(shape))
    got = value(*transpose_fp8(w_q, w_scale), 128)
    assert torch.equal(got, value(w_q, w_scale, 128).mT)


@pytest.mark.parametrize("row_scales", [False, True])
@pytest.mark.parametrize("dtype", [BF16, FP32])
def test_gemm_fp8(row_scales, dtype):
    N = 100 if row_scales else 256
    a, a_scale = quantize(rand(37, 512) * torch.logspace(-3, 3, 512))
    b, b_scale = quantize(rand(N, 512)) if row_scales else quantize_weight(rand(N, 512))
    want = value(a, a_scale) @ value(b, b_scale, 1 if row_scales else 128).T
    near(gemm_fp8(a, a_scale, b, b_scale, dtype=dtype), want, ulps=8)
    out = rand(37, N, dtype=dtype)
    before = out.double()
    near(gemm_fp8(a, a_scale, b, b_scale, out, accumulate=True), want + before, ulps=8)
    near(out, want + before, ulps=8)
    out.fill_(math.nan)
    assert gemm_fp8(a, a_scale, b, b_scale, out) is out
    near(out, want, ulps=8)


def test_partial_sums_are_scaled_and_added_in_the_order_of_k():
    """With scales 1, 2^25 and -2^25 the first product is lost only where it is added before the others cancel."""
    one = torch.zeros(1, 384).to(E4M3)
    one[0, ::128] = torch.ones(3).to(E4M3)
    a_scale = torch.tensor([[1.0, 2.0**25, -(2.0**25)]])
    assert gemm_fp8(one, a_scale, one, torch.ones(1, 3), dtype=FP32).item() == 0
    assert gemm_fp8(one, a_scale.flip(1), one, torch.ones(1, 3), dtype=FP32).item() == 1


def test_grouped_gemm_fp8():
    """Ragged rows with an empty expert, and with NaN in the rows that nobody owns; gathered rows give the same."""
    experts = torch.randint(0, 4, (33, 2)) * 2  # 0, 2, 4, 6: the odd ones are empty
    experts[5] = -1
    plan = plan_for(experts.tolist(), 7)
    x = rand(33, 256, dtype=BF16)
    a, a_scale = permute_quantize(x, plan)
    a_scale[plan.offsets[-1] :] = math.nan
    b, b_scale = quantize_weight(rand(7, 256, 256))
    y = grouped_gemm_fp8(a, a_scale, b, b_scale, plan.offsets, dtype=FP32)
    bounds = plan.offsets.tolist()
    assert bounds[-1] == 64
    for e in range(7):
        rows = slice(bounds[e], bounds[e + 1])
        if rows.start < rows.stop:
            near(y[rows], value(a[rows], a_scale[rows]) @ value(b[e], b_scale[e], 128).T, ulps=4)
    got = grouped_gemm_fp8(*quantize(x), b, b_scale, plan.offsets, gather=plan, dtype=FP32)
    assert torch.equal(got[:64], y[:64])
    y_q, y_scale = grouped_gemm_fp8(a, a_scale, b, b_scale, plan.offsets, swiglu=True)
    want = quantize(torch.nn.functional.silu(y[:, :128]) * y[:, 128:])
    assert torch.equal(y_q[:64].float(), want[0][:64].float()) and torch.equal(y_scale[:64], want[1][:64])
    assert y_scale.stride(0) == 1


def test_grouped_gemm_fp8_masked():
    a, a_scale = (t.unflatten(0, (3, 8)).clone() for t in quantize(rand(24, 256)))
    b, b_scale = quantize_weight(rand(3, 128, 256))
    counts = torch.tensor([8, 0, 3], dtype=torch.int32)
    a_scale[2, 3:] = math.nan
    y = grouped_gemm_fp8_masked(a, a_scale, b, b_scale, counts, dtype=FP32)
    for e, n in enumerate(counts.tolist()):
        if n:
            near(y[e, :n], value(a[e, :n], a_scale[e, :n]) @ value(b[e], b_scale[e], 128).T, ulps=4)


@pytest.mark.parametrize("operands", ["bf16", "rows", "columns"])
@pytest.mark.parametrize("accumulate", [False, True])
def test_grouped_wgrad(operands, accumulate):
    """Experts with 150, 0 and 20 rows; the others' rows are NaN and expert 1's gradient is 0 or what it was."""
    experts = [[0]] * 150 + [[2]] * 20 + [[-1]] * 9
    plan = plan_for(experts, 3)
    dy, x = rand(179, 128, dtype=BF16), rand(179, 256, dtype=BF16)
    dy[170:] = x[170:] = math.nan
    offsets, scales = plan.offsets, {}
    if operands == "bf16":
        dyv, xv = dy.double(), x.double()
    elif operands == "rows":
        dy, dy_scale = quantize(dy)
        x, x_scale = quantize(x)
        dyv, xv = value(dy, dy_scale), value(x, x_scale)
    else:
        dy, dy_scale = quantize(dy, rows=False, columns=True, plan=plan)
        x, x_scale = quantize(x, rows=False, columns=True, plan=plan)
        dy_scale[:, 3:], x_scale[:, 3:] = math.nan, math.nan  # the tail past the last expert
        offsets = plan.padded_offsets
        dyv, xv = value(dy, dy_scale).T, value(x, x_scale).T
    if operands != "bf16":
        scales = dict(dy_scale=dy_scale, x_scale=x_scale, columns=operands == "columns")
    bounds = offsets.tolist()
    want = torch.stack([dyv[lo:hi].T @ xv[lo:hi] for lo, hi in zip(bounds, bounds[1:], strict=False)])
    out = rand(3, 128, 256) if accumulate else torch.full((3, 128, 256), math.nan)
    total = want + out.double() if accumulate else want
    assert grouped_wgrad(dy, x, offsets, out, accumulate, **scales) is out
    near(out, total, ulps=8)
    assert accumulate or (out[1] == 0).all()
    got = grouped_wgrad(dy, x, offsets, **scales, dtype=BF16)
    assert got.dtype == BF16
    near(got, want)


def test_quantised_ops_are_quantise_of_the_plain_ones():
    plan = plan_for(torch.randint(-1, 3, (70, 2)).tolist(), 3)
    x, n = rand(70, 512, dtype=BF16), int(plan.offsets[-1])
    m = int(plan.padded_offsets[-1])
    h, weights = permute(x, plan), torch.rand(140)
    y = torch.nn.functional.silu(h[:, :256].float()) * h[:, 256:].float() * weights[:, None]
    for got, want in (
        (permute_quantize(x, plan, columns=True, pow2=True), quantize(h, columns=True, plan=plan, pow2=True)),
        (swiglu(h, weights, True, True, plan, True), quantize(y, columns=True, plan=plan, pow2=True)),
    ):
        for i, (g, w) in enumerate(zip(got, want, strict=True)):
            g, w = ((t[:n] if i < 2 else t[:, : m if i == 2 else m // 128]).float() for t in (g, w))
            assert torch.equal(g, w), i
