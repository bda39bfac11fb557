"""The references of rms_norm and qk_norm_rope against torch, complex numbers and the official model's tables."""

import json
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch.nn import functional as F

from ling_kernels import qk_norm_rope, rms_norm
from ling_kernels.backend import force
from ling_kernels.ops.attention_decode import append
from ling_kernels.ops.quantize import dequantize, quantize
from ling_kernels.ops.rope_tables import rope_frequencies, rope_tables
from tests.cases import DEVICE, Rand, cache_of, runs
from tests.test_ops import same_bits as equal_bits

DATA = Path(__file__).parent / "data"
FP64, BF16 = torch.float64, torch.bfloat16


@pytest.fixture(autouse=True)
def references():
    """Also on a GPU, where the kernels are the default."""
    with force("torch"):
        yield


def same_bits(a, b):
    return all(map(equal_bits, a, b))


@pytest.mark.parametrize("R", [2, 6, 12])
def test_qk_norm_rope_rotates_pairs_as_complex_numbers(R):
    T, Hq, Hkv, D, theta = 5, 3, 1, 12, 100.0
    rand = Rand(FP64)
    qkv, q_weight, k_weight = rand.data(T, Hq + 2 * Hkv, D), rand.data(D), rand.data(D)
    positions = torch.tensor([4, 0, 9, 9, 1], device=DEVICE)
    q, k, v = qk_norm_rope(qkv, q_weight, k_weight, *rope_tables(10, R, theta, device=DEVICE), positions, Hkv, 0.1)
    assert torch.equal(v, qkv[:, Hq + Hkv :])
    for t in range(T):
        for h in range(Hq + Hkv):
            x = qkv[t, h] / (qkv[t, h].square().mean() + 0.1).sqrt() * (q_weight if h < Hq else k_weight)
            for i in range(R // 2):
                angle = positions[t].item() * theta ** (-2 * i / R)
                turned = complex(x[i], x[i + R // 2]) * complex(math.cos(angle), math.sin(angle))
                x[i], x[i + R // 2] = turned.real, turned.imag
            torch.testing.assert_close(q[t, h] if h < Hq else k[t, h - Hq], x, rtol=1e-5, atol=1e-6)


def test_rotation_depends_on_relative_positions_only():
    """q at position m times k at position n depends on m - n only."""
    rand = Rand(torch.float32)
    one = rand.data(1, 3, 32).expand(40, -1, -1)
    ones, tables = torch.ones(32, device=DEVICE), rope_tables(40, 16, 1e4, device=DEVICE)
    q, k, _ = qk_norm_rope(one, ones, ones, *tables, torch.arange(40, device=DEVICE), 1)
    products = q[:, 0] @ k[:, 0].T
    for lag in (-7, 0, 3):
        torch.testing.assert_close(products.diagonal(lag), products.diagonal(lag)[:1].expand(40 - abs(lag)))
    assert (products.diagonal(3)[0] - products.diagonal(0)[0]).abs() > 1e-3


def test_qk_norm_rope_gradient():
    rand = Rand(FP64)
    positions = torch.tensor([3, 0, 1], device=DEVICE)
    tables = rope_tables(4, 4, 10.0, device=DEVICE)

    def call(*args):
        return qk_norm_rope(*args, *tables, positions, 2)

    assert torch.autograd.gradcheck(call, (rand(3, 8, 6), rand(6), rand(6)))


def test_qk_norm_rope_norms_as_rms_norm():
    rand = Rand(BF16)
    qkv, w = rand.data(7, 4, 16), rand.data(16)
    tables, zeros = rope_tables(1, 2, 10.0, device=DEVICE), torch.zeros(7, dtype=torch.int32, device=DEVICE)
    q, k, _ = qk_norm_rope(qkv, w, w, *tables, zeros, 1)
    assert torch.equal(torch.cat([q, k], 1), rms_norm(qkv[:, :3], w))


@pytest.mark.parametrize("fp8", [False, True])
def test_qk_norm_rope_writes_its_keys_into_the_cache(fp8):
    rand = Rand(torch.float32)
    qkv, w, cache = rand.data(5, 8, 16), rand.data(16), cache_of(rand, 3, 4, 2, 16, fp8)
    tables, positions = rope_tables(9, 8, 10.0, device=DEVICE), torch.arange(5, device=DEVICE)
    slots = torch.tensor([3, 11, 4, 0, 7], device=DEVICE)
    want = cache_of(rand, 3, 4, 2, 16, fp8)
    for x, y in zip(cache, want, strict=True):
        if x is not None:
            x.view(torch.uint8).copy_(y.view(torch.uint8))
    q, k, v = qk_norm_rope(qkv, w, w, *tables, positions, 2, cache=cache, slots=slots)
    assert same_bits((q, k, v), qk_norm_rope(qkv, w, w, *tables, positions, 2))
    append(want, k, v, slots)
    assert same_bits([x for x in cache if x is not None], [x for x in want if x is not None])
    stored = cache.k.float() * (cache.k_scale[..., None] if fp8 else 1)
    torch.testing.assert_close(stored.flatten(0, 1)[slots], k, rtol=0.07 if fp8 else 0, atol=0.01 if fp8 else 0)


def test_yarn_tables_are_those_of_the_official_model():
    config = json.loads((DATA / "yarn/config.json").read_text())
    expected = load_file(DATA / "yarn/expected.safetensors")
    R, theta, scaling = int(config["head_dim"] * 0.5), config["rope_theta"], config["rope_scaling"]
    inv_freq, factor = rope_frequencies(R, theta, scaling)
    torch.testing.assert_close(inv_freq, expected["rope.inv_freq"], rtol=1e-6, atol=0)
    assert factor == pytest.approx(expected["rope.attention_scaling"].item(), rel=1e-7) and factor > 1.1
    cos, sin = rope_tables(128, R, theta, {**scaling, "rope_type": "yarn"})
    angle = torch.arange(128.0)[:, None] * expected["rope.inv_freq"]
    torch.testing.assert_close(cos, angle.cos() * factor, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(sin, angle.sin() * factor, rtol=1e-5, atol=1e-5)


def test_plain_frequencies_are_those_of_the_official_model():
    config = json.loads((DATA / "base/config.json").read_text())
    expected = load_file(DATA / "base/expected.safetensors")
    for scaling in (None, {"type": "default"}):
        inv_freq, factor = rope_frequencies(config["head_dim"] // 2, config["rope_theta"], scaling)
        torch.testing.assert_close(inv_freq, expected["rope.inv_freq"], rtol=1e-6, atol=0)
        assert factor == expected["rope.attention_scaling"] == 1


def test_yarn_of_the_published_long_context_recipe():
    """Ling's README: factor 4 over 32768 at theta 600000; the ramp lies between pairs 12 and 21 of 32."""
    yarn = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}
    plain, _ = rope_frequencies(64, 600000.0, None)
    inv_freq, factor = rope_frequencies(64, 600000.0, yarn)
    assert factor == pytest.approx(1.13863, abs=1e-5)
    ratio = inv_freq / plain
    assert (ratio[:13] == 1).all() and (ratio[13:21] < 1).all() and (ratio[21:] == 0.25).all()
    assert (ratio.diff() <= 0).all()


@pytest.mark.parametrize(
    "scaling, words",
    [
        ({"type": "linear", "factor": 2.0}, "default or yarn"),
        ({"factor": 2.0}, "default or yarn"),
        ({"type": "yarn", "factor": 2.0}, "original_max_position_embeddings"),
        ({"type": "yarn", "factor": 2.0, "original_max_position_embeddings": 32, "mscale": 1.0}, "mscale"),
    ],
)
def test_unknown_rope_scaling(scaling, words):
    with pytest.raises(ValueError, match=words):
        rope_tables(8, 4, 1e4, scaling)


@pytest.mark.parametrize("residual", [False, True])
def test_rms_norm_is_torchs(residual):
    rand = Rand(FP64)
    x, w = rand(3, 5, 40), rand(40)
    other = rand(3, 5, 40) if residual else None
    got = rms_norm(x, w, other, 0.1)
    total = x + other if residual else x
    want = F.rms_norm(total, (40,), w, 0.1)
    torch.testing.assert_close(got[0] if residual else got, want)
    assert not residual or torch.equal(got[1], total)
    leaves = [t for t in (x, w, other) if t is not None]
    loss = want.square().sum() + (total.sum() if residual else 0)
    got_loss = got[0].square().sum() + got[1].sum() if residual else got.square().sum()
    for g, t in zip(torch.autograd.grad(got_loss, leaves), torch.autograd.grad(loss, leaves), strict=True):
        torch.testing.assert_close(g, t)


def test_rms_norm_is_the_official_models_but_for_a_rounding():
    """The official model's code also rounds x * rstd, before the weight."""
    rand = Rand(BF16)
    x, w = rand.data(64, 128), rand.data(128)
    wide = x.float()
    unit = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)
    assert torch.equal(rms_norm(x, w), (w * unit).to(BF16))
    torch.testing.assert_close(rms_norm(x, w), w * unit.to(BF16), rtol=2**-7, atol=0)


def test_rms_norm_adds_to_a_wider_residual_stream():
    rand = Rand(torch.float32)
    x, w, residual = rand.data(4, 64).to(BF16), rand.data(64), rand.data(4, 64)
    y, total = rms_norm(x, w, residual)
    assert y.dtype == BF16 and total.dtype == torch.float32 and torch.equal(total, x + residual)


def test_rms_norm_quantises_before_rounding():
    rand = Rand(BF16)
    x, w, residual = rand.data(67, 256), rand.data(256), rand.data(67, 256)
    y, total, *quantised = rms_norm(x, w, residual, 0.1, quantize=True, columns=True)
    assert total.dtype == BF16 and torch.equal(y, rms_norm(total, w, None, 0.1))
    exact = F.rms_norm(total.double(), (256,), w.double(), 0.1)
    want = quantize(exact, columns=True)
    unrounded = quantize(rms_norm(total.float(), w.float(), None, 0.1), columns=True)
    assert same_bits(quantised, unrounded)
    for got, true in zip(quantised, want, strict=True):
        assert got.dtype == true.dtype and got.shape == true.shape and got.stride() == true.stride()
    back = dequantize(*quantised[:2])
    assert (back - exact).norm() < 0.04 * exact.norm()
    assert (dequantize(*quantised[2:])[:, :67].T - exact).norm() < 0.04 * exact.norm()


@pytest.mark.parametrize(
    "backend", [pytest.param(b, marks=() if runs(b) else pytest.mark.skip) for b in ("triton", "cuda")]
)
@pytest.mark.parametrize("view", ["columns", "odd columns", "transposed"])
def test_rms_norm_kernels_take_strided_rows(backend, view):
    whole = Rand(torch.float32).data(256, 64) if view == "transposed" else Rand(torch.float32).data(6, 256)
    x = {"columns": whole[:, 64:192], "odd columns": whole[:, 3:131], "transposed": whole[:128].T}[view]
    x, w = x.detach().requires_grad_(), torch.linspace(1, 2, 128, device=DEVICE).requires_grad_()
    with force(backend):
        y = rms_norm(x, w, None, 0.1)
        got = [y, *torch.autograd.grad(y.square().sum(), (x, w))]
    y = F.rms_norm(x, (128,), w, 0.1)
    for g, t in zip(got, [y, *torch.autograd.grad(y.square().sum(), (x, w))], strict=True):
        torch.testing.assert_close(g, t, rtol=1e-4, atol=1e-5)


def wrong_calls():
    rand = Rand(torch.float32)
    qkv, w, (cos, sin) = rand.data(6, 8, 8), rand.data(8), rope_tables(10, 4, 10.0, device=DEVICE)
    positions, pages = torch.arange(6, device=DEVICE), cache_of(rand, 3, 4, 2, 8)
    yield "qkv 2-D", qk_norm_rope, (qkv[0], w, w, cos, sin, positions, 2)
    yield "KV heads", qk_norm_rope, (qkv, w, w, cos, sin, positions, 3)
    yield "no KV heads", qk_norm_rope, (qkv, w, w, cos, sin, positions, 0)
    yield "no query heads", qk_norm_rope, (qkv, w, w, cos, sin, positions, 4)
    yield "weight", qk_norm_rope, (qkv, w[:4], w, cos, sin, positions, 2)
    yield "sin", qk_norm_rope, (qkv, w, w, cos, sin[:, :1], positions, 2)
    yield "bf16 cos", qk_norm_rope, (qkv, w, w, cos.to(BF16), sin.to(BF16), positions, 2)
    yield "R > D", qk_norm_rope, (qkv, w, w, *rope_tables(10, 10, 10.0, device=DEVICE), positions, 2)
    yield "positions", qk_norm_rope, (qkv, w, w, cos, sin, positions[:3], 2)
    yield "float positions", qk_norm_rope, (qkv, w, w, cos, sin, positions.float(), 2)
    if DEVICE == "cpu":
        yield "position past the table", qk_norm_rope, (qkv, w, w, cos, sin, positions + 5, 2)
        yield "position -1", qk_norm_rope, (qkv, w, w, cos, sin, positions - 1, 2)
    yield "cache without slots", qk_norm_rope, (qkv, w, w, cos, sin, positions, 2, 0.1, pages)
    yield "w", rms_norm, (rand.data(3, 8), w[:4])
    yield "0-D", rms_norm, (w[0], w)
    yield "int x", rms_norm, (rand.data(3, 8).int(), w)
    yield "residual", rms_norm, (rand.data(3, 8), w, rand.data(2, 8))
    yield "FP8 of 8", rms_norm, (rand.data(3, 8), w, None, 1e-6, True)
    yield "odd R", rope_tables, (4, 3, 10.0)


@pytest.mark.parametrize("fn, args", [pytest.param(f, a, id=f"{f.__name__}-{name}") for name, f, a in wrong_calls()])
def test_wrong_arguments_raise(fn, args):
    with pytest.raises(ValueError, match="expected .*; got"):
        fn(*args)
