"""The FP8 kernels on what random data lacks: NaN, infinities, -0, subnormals, every binade, every rounding."""

import math

import pytest
import torch

from ling_kernels.backend import force
from ling_kernels.ops.quantize import quantize, quantize_ref, quantize_weight, quantize_weight_ref
from ling_kernels.ops.swiglu import swiglu
from tests.cases import DEVICE, runs

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
pytestmark = pytest.mark.skipif(not runs("triton"), reason="triton cannot run here")


def special(dtype) -> torch.Tensor:
    """[128, 256] of random rows, 22 of them with special values, so that blocks in both directions mix them."""
    x = torch.randn(128, 256, generator=torch.Generator().manual_seed(0))
    x[0, 0], x[1, 3], x[2, 130] = math.nan, math.inf, -math.inf
    x.view(torch.int32)[3, 200] = -1  # a NaN whose bits are all 1
    x[4], x[5], x[6, ::2] = 0, -0.0, -0.0
    x[7] *= 2.0**-14 if dtype == FP16 else 1e-30
    if dtype != FP16:
        x[8], x[9], x[10] = x[8] * 1e-38, 3e38, 1e-40
        x[11, :198] = 448 * 2.0 ** torch.arange(-80, 118)
        for i, n in enumerate((-100, -99, -3, 0, 5)):  # scales at a power of two, and one step to either side
            a = torch.tensor(448 * 2.0**n)
            x[12 + 2 * i], x[13 + 2 * i, :128] = a, torch.nextafter(a, torch.tensor(math.inf))
            x[13 + 2 * i, 128:] = torch.nextafter(a, torch.tensor(0.0))
    return x.to(dtype).to(DEVICE)


def assert_same(got, want):
    """Bit for bit, but any NaN equals any other."""
    for g, w in zip(got, want, strict=True):
        nan = w.float().isnan()
        assert g.dtype == w.dtype and torch.equal(g.float().isnan(), nan)
        codes = (t.contiguous().view(torch.uint8 if t.element_size() == 1 else torch.int32) for t in (g, w))
        assert torch.equal(*(c.masked_fill(nan, 0) for c in codes))


@pytest.mark.parametrize("dtype", [BF16, FP16, FP32])
@pytest.mark.parametrize("pow2", [False, True])
def test_special_values(dtype, pow2):
    x = special(dtype)
    with force("triton"):
        rows, both, weight = quantize(x, pow2=pow2), quantize(x, True, True, None, pow2), quantize_weight(x, pow2)
        finite = quantize_weight(x[12:].repeat(2, 1)[:128], pow2)
    assert_same(rows, quantize_ref(x, pow2=pow2))
    assert_same(both, quantize_ref(x, True, True, None, pow2))
    assert_same(weight, quantize_weight_ref(x, pow2))
    assert_same(finite, quantize_weight_ref(x[12:].repeat(2, 1)[:128], pow2))


def test_every_bf16_value_rounds_as_the_reference():
    values = torch.arange(2**15, dtype=torch.int16).view(BF16)
    values = values[values.abs() <= 448]
    values = torch.cat([values, -values])[: 2 * len(values) // 127 * 127].view(-1, 127)
    x = torch.cat([values, torch.full_like(values[:, :1], 448)], 1).to(DEVICE)  # the scale is 1
    with force("triton"):
        got = quantize(x)
    assert (got[1] == 1).all()
    assert_same(got, quantize_ref(x))


def test_strides():
    wide = torch.randn(40, 640, device=DEVICE)
    for x in (wide[:, 128:384], wide[:, 1:257], wide[::2, :256], wide.T[:512].T):
        with force("triton"):
            got = quantize(x, True, True)
        assert_same(got, quantize_ref(x, True, True))


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_swiglu_keeps_nan_and_inf_visible(bad):
    x = torch.randn(3, 512, device=DEVICE)
    x[1, 5] = bad
    with force("triton"):
        y_q, scale = swiglu(x, quantize=True)
    back = y_q.float() * scale.repeat_interleave(128, 1)
    assert not back[1, 5].isfinite() and back[1, 128:].isfinite().all() and back[2].isfinite().all()
