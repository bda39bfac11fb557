"""Casts and tl.dot of Triton round as the format says: on the virtual GPU, and in hardware where there is a GPU."""

import pytest
import torch
import triton
import triton.language as tl

from tests.cases import DEVICE, runs
from tests.gpu import schedule

pytestmark = pytest.mark.skipif(not runs("triton"), reason="triton cannot run here")
E4M3, E5M2, BF16, FP16, FP32 = torch.float8_e4m3fn, torch.float8_e5m2, torch.bfloat16, torch.float16, torch.float32
CODES = torch.arange(256, dtype=torch.uint8)


@triton.jit
def cast_kernel(x, y, N, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    v = tl.load(x + i, mask=i < N)
    tl.store(y + i, v.to(y.dtype.element_ty), mask=i < N)


@triton.jit
def dot_kernel(a, b, c, BLOCK: tl.constexpr):
    i, j = tl.arange(0, BLOCK)[:, None], tl.arange(0, BLOCK)[None, :]
    tl.store(c + i * BLOCK + j, tl.dot(tl.load(a + i * BLOCK + j), tl.load(b + i * BLOCK + j)))


def cast(x, dtype):
    x = x.to(DEVICE)
    y = torch.empty_like(x, dtype=dtype)
    cast_kernel[(triton.cdiv(len(x), 1024),)](x, y, len(x), BLOCK=1024)
    return y.cpu()


def same(a, b):
    """Bit for bit, but any NaN equals any other."""
    a_wide, b_wide = a.double(), b.double()
    return a.dtype == b.dtype and ((a_wide == b_wide) | (a_wide.isnan() & b_wide.isnan())).all() and (
        a_wide.signbit() == b_wide.signbit()
    )[~a_wide.isnan()].all()  # fmt: skip


def finite_e4m3():
    """Every finite non-negative value in order; its index is its code."""
    return CODES[:127].view(E4M3).double()


def nearest_e4m3(x):
    """Round to nearest, ties to the even code, saturating: from the format's definition, without torch's own cast."""
    values = finite_e4m3()
    distance = (x.double().abs().clamp(max=448)[:, None] - values).abs()
    best = distance.min(-1, keepdim=True).values
    closest = distance == best
    code = torch.where(closest, torch.arange(127), 999)
    even = torch.where(closest & (torch.arange(127) % 2 == 0), torch.arange(127), 999).min(-1).values
    code = torch.where(closest.sum(-1) == 2, even, code.min(-1).values)
    code = torch.where(x.isnan(), 127, code) + 128 * x.signbit()
    return code.to(torch.uint8).view(E4M3)


def around_e4m3():
    """Every value, the halves between neighbours, a hair to either side of both, and what overflows."""
    values = finite_e4m3()
    halves = (values[1:] + values[:-1]) / 2
    exact = torch.cat([values, halves, torch.tensor([449.0, 463.9, 464.0, 464.1, 480.0, 1e4, 3e38, torch.inf])]).float()
    up, down = exact.nextafter(torch.tensor(torch.inf)), exact.nextafter(torch.tensor(0.0))
    tiny = torch.tensor([2.0**-10, 2.0**-10 * 1.001, 2.0**-11, 1e-30, 1e-45])
    x = torch.cat([exact, up, down, tiny, torch.tensor([torch.nan])])
    return torch.cat([x, -x])


def test_fp32_to_e4m3():
    x = around_e4m3()
    want = nearest_e4m3(x)
    assert same(x.clamp(-448, 448).to(E4M3), want)  # torch agrees with the definition
    assert same(cast(x, E4M3), want)


@pytest.mark.parametrize("source", [BF16, FP16], ids=str)
def test_every_16_bit_float_to_e4m3(source):
    x = torch.arange(-(2**15), 2**15).to(torch.int16).view(source)
    assert same(cast(x, E4M3), nearest_e4m3(x.float()))


@pytest.mark.parametrize("target", [FP32, BF16, FP16], ids=str)
@pytest.mark.parametrize("source", [E4M3, E5M2], ids=str)
def test_every_fp8_value_widens_exactly(source, target):
    x = CODES.view(source)
    if (source, target) == (E5M2, BF16):  # Triton gives its inf and NaN as numbers above 57344; no kernel here has e5m2
        x = x[x.float().isfinite()]
    assert same(cast(x, target), x.to(target))


def test_fp32_to_bf16():
    g = torch.Generator().manual_seed(0)
    bits = torch.randint(-(2**31), 2**31, (50_000,), generator=g).int()
    ties = (torch.arange(-(2**15), 2**15, dtype=torch.int32) << 16) + 0x8000  # halfway above every bf16 value
    x = torch.cat([bits, ties, ties - 1, ties + 1]).view(FP32)
    assert same(cast(x, BF16), x.to(BF16))


def test_every_bf16_value_widens_exactly():
    x = torch.arange(-(2**15), 2**15).to(torch.int16).view(BF16)
    assert same(cast(x, FP32), x.float())


@pytest.mark.parametrize("dtype", [BF16, FP16, E4M3, E5M2], ids=str)
def test_dot(dtype):
    """Small integers: every product and sum is exact, so the order of summation does not matter."""
    g = torch.Generator().manual_seed(0)
    a, b = (torch.randint(-8, 9, (32, 32), generator=g).float().to(dtype) for _ in range(2))
    c = torch.empty(32, 32, device=DEVICE)
    dot_kernel[(1,)](a.to(DEVICE), b.to(DEVICE), c, BLOCK=32)
    assert torch.equal(c.cpu(), a.float() @ b.float())


@triton.jit
def sequence_kernel(order, next_place):
    tl.store(order + tl.atomic_add(next_place, 1), tl.program_id(0) * 10 + tl.program_id(1))


@pytest.mark.skipif(DEVICE == "cuda", reason="hardware has an order of its own")
@pytest.mark.skipif(DEVICE == "cuda", reason="hardware has an order of its own")
def test_a_schedule_runs_every_program_once_in_another_order():
    """Without it, that two runs give equal bits would prove nothing."""

    def run(seed):
        order, next_place = torch.zeros(35, dtype=torch.int32), torch.zeros(1, dtype=torch.int32)
        with schedule(seed):
            sequence_kernel[(7, 5)](order, next_place)
        return order.tolist()

    assert sorted(run(0)) == [x * 10 + y for x in range(7) for y in range(5)]
    assert run(0) == run(0) != run(1) and sorted(run(1)) == sorted(run(0))
