"""csrc/'s norm kernels on the virtual GPU against their references."""

import pytest
import torch

from ling_kernels.backend import force
from ling_kernels.ops.qk_norm_rope import QKNormRope, head_groups, qk_norm_rope_ref
from ling_kernels.ops.quantize import empty_fp8, quantize_weight
from ling_kernels.ops.rms_norm import rms_norm_ref
from ling_kernels.ops.rope_tables import rope_tables
from tests.cases import Rand
from tests.gpu.build import load, missing
from tests.test_ops import near_codes

if missing():
    pytest.skip(f"csrc/ needs {missing()} to run on the virtual GPU", allow_module_level=True)

C = load()
E4M3, FP32, BF16, FP16 = torch.float8_e4m3fn, torch.float32, torch.bfloat16, torch.float16


def near(got, want, dtype=FP32):
    """Equal up to two roundings."""
    if got.dtype == E4M3:
        assert near_codes(got, want)
        return
    eps = torch.finfo(dtype).eps
    assert torch.equal(got.isnan(), want.isnan())
    torch.testing.assert_close(got, want, rtol=2 * max(eps, 2e-6), atol=2 * max(eps, 2e-6), equal_nan=True)


def rotate(C, qkv, w, positions, Hkv, cache=None, slots=None, P=30):
    """The launcher and the reference on the same arguments."""
    T, H, D = qkv.shape
    cos, sin = rope_tables(P, 64, 1e4)
    args = qkv, *w, cos, sin, positions
    q, k, v = (qkv.new_empty(T, n, D) for n in (H - 2 * Hkv, Hkv, Hkv))
    C.qk_norm_rope_fwd(*args, slots, q, k, v, *(cache or (None, None)), 0.1)
    in_table = (positions >= 0) & (positions < P)
    want = qk_norm_rope_ref(qkv, *w, cos, sin, positions.clamp(0, max(P - 1, 0)), Hkv, 0.1)
    for x in want[:2]:
        x[~in_table, :, :64] = torch.nan
    return (q, k, v), want


def check_qk_forward(C):
    rand = Rand(FP32)
    for dtype, weights, T, Hq, Hkv in ((FP32, FP32, 9, 4, 2), (BF16, BF16, 3, 6, 1), (FP16, FP32, 2, 64, 8),
                                       (BF16, FP32, 0, 2, 1)):  # fmt: skip
        qkv = rand.data(T, Hq + 2 * Hkv, 128, dtype=dtype)
        w = [rand.data(128, dtype=weights) for _ in range(2)]
        positions = rand.ints(-2, 33, T, dtype=torch.int64 if T % 2 else torch.int32)  # some are outside the tables
        for got, want in zip(*rotate(C, qkv, w, positions, Hkv), strict=True):
            near(got, want, dtype)


def check_qk_cache(C):
    """Kernels write the cells of slots inside the cache, and no others."""
    rand = Rand(BF16)
    T, Hkv = 7, 2
    cache = [torch.full((3, 2, Hkv, 128), 7.0, dtype=BF16) for _ in range(2)]
    slots = torch.tensor([4, -1, 0, 6, 5, 1 << 40, 2])
    qkv, w = rand.data(T, 8, 128), [rand.data(128) for _ in range(2)]
    (_, k, v), _ = rotate(C, qkv, w, rand.ints(0, 30, T), Hkv, cache, slots)
    for kept, x in zip(cache, (k, v), strict=True):
        want = torch.full((6, Hkv, 128), 7.0, dtype=BF16)
        want[[4, 0, 5, 2]] = x[[0, 2, 4, 6]]
        assert torch.equal(kept.view(6, Hkv, 128), want)


def check_qk_backward(C, programs=3):
    rand = Rand(FP32)
    for dtype, T, Hq, Hkv in ((FP32, 29, 4, 2), (BF16, 5, 6, 1), (FP32, 4, 6, 3)):
        qkv, w = rand(T, Hq + 2 * Hkv, 128, dtype=dtype), [rand.fp32(128) for _ in range(2)]
        cos, sin = rope_tables(30, 64, 1e4)
        positions = rand.ints(0, 30, T)
        outs = qk_norm_rope_ref(qkv, *w, cos, sin, positions, Hkv, 0.1)
        douts = [rand.data(*o.shape, dtype=dtype) for o in outs]
        want = torch.autograd.grad(outs, (qkv, *w), douts)
        groups = head_groups(Hq, Hkv)
        dqkv, dw = torch.empty_like(qkv), torch.full((programs, sum(groups[:2]), 128), torch.nan)
        C.qk_norm_rope_bwd(*douts, qkv.detach(), *w, cos, sin, positions, dqkv, dw, 0.1)
        near(dqkv, want[0], dtype)
        for got, true in zip(dw.split(groups[:2], 1), want[1:], strict=True):
            torch.testing.assert_close(got.sum((0, 1)), true, rtol=1e-4 if dtype == FP32 else 2e-2, atol=1e-4)


def check_rms_forward(C):
    rand = Rand(FP32)
    for dtype, other, M, N in ((FP32, FP32, 5, 384), (BF16, FP32, 3, 2048), (FP16, FP16, 2, 8192), (BF16, BF16, 9, 136),
                               (BF16, BF16, 0, 128)):  # fmt: skip
        x = rand.data(M, N + 8, dtype=dtype)[:, :N]  # its rows are strided
        w = rand.data(N, dtype=other)
        for residual in (None, rand.data(M, N, dtype=other)):
            y, rstd = x.new_empty(M, N), torch.empty(M)
            total = None if residual is None else torch.empty_like(residual)
            fp8 = empty_fp8(x, M, N, N % 128 == 0, False, None)
            C.rms_norm_fwd(x, w, residual, y, rstd, total, *fp8, 0.1)
            want = rms_norm_ref(x, w, residual, 0.1, N % 128 == 0)
            got = [t for t in (y, total, *fp8) if t is not None]
            for g, t in zip(got, want if isinstance(want, tuple) else (want,), strict=True):
                near(*((g, t) if g.dtype == E4M3 else (g.float(), t.float())), g.dtype)
            near(rstd, ((x if total is None else total).float().square().mean(-1) + 0.1).rsqrt())


def check_rms_backward(C):
    rand = Rand(FP32)
    for dtype, other, M, N, programs in (
        (FP32, FP32, 21, 128, 2), (BF16, FP32, 7, 2048, 3), (FP16, FP16, 3, 4104, 2), (FP32, FP32, 2, 8192, 1)
    ):  # fmt: skip
        x, w, residual = rand(M, N, dtype=dtype), rand(N, dtype=other), rand(M, N, dtype=other)
        y, total = rms_norm_ref(x, w, residual, 0.1)
        dy, dtotal = rand.data(M, N, dtype=dtype), rand.data(M, N, dtype=other)
        want = torch.autograd.grad((y, total), (x, residual, w), (dy, dtotal))
        rstd = (total.detach().float().square().mean(-1) + 0.1).rsqrt()
        dx, dresidual, dw = torch.empty_like(x), torch.empty_like(residual), torch.full((programs, N), torch.nan)
        C.rms_norm_bwd(dy, dtotal, total.detach(), w.detach(), rstd, dx, dresidual, dw)
        near(dx, want[0], dtype)
        near(dresidual, want[1], other)
        torch.testing.assert_close(dw.sum(0), want[2].float(), rtol=1e-4 if dtype == FP32 else 2e-2, atol=1e-2)


def check_linear(C):
    """A row and K shared by 1 to 8 warps, more tiles than blocks; the bits of the norm's kernel; a row in a batch."""
    rand = Rand(BF16)
    with pytest.MonkeyPatch.context() as patch:
        for sms, M, N, K, other, fp8 in (
            (1, 3, 640, 256, BF16, True), (3, 8, 128, 2176, FP32, True), (132, 5, 128, 1152, BF16, True),
            (3, 1, 128, 8192, BF16, True), (1, 2, 656, 64, BF16, False), (3, 8, 48, 4160, FP32, False),
            (132, 5, 16, 576, None, False),
        ):  # fmt: skip
            patch.setenv("LING_GPU_SMS", str(sms))
            x, norm = rand.data(M, K + 8)[:, :K], other and rand.data(K, dtype=other)
            w, scale = quantize_weight(rand.data(N, K)) if fp8 else (rand.data(N, K), None)
            h, codes = torch.empty(M, K, dtype=BF16), empty_fp8(x, M, K, fp8, False, None)
            if norm is None:
                h = x
            else:
                C.rms_norm_fwd(x, norm, None, h, torch.empty(M), None, *codes, 0.1)
            for dtype in (BF16, FP32):
                y, alone = (torch.full((m, N + 8), torch.nan, dtype=dtype)[:, :N] for m in (M, 1))
                C.rms_norm_linear_fwd(x, norm, w, scale, y, 0.1)
                C.rms_norm_linear_fwd(x[:1], norm, w, scale, alone, 0.1)
                assert torch.equal(alone, y[:1])
                if fp8:
                    want = torch.empty(M, N, dtype=dtype)
                    C.gemm_fp8_fwd(*codes[:2], w, scale, want, False, False)
                    assert torch.equal(y, want)
                else:
                    exact, size = h.double() @ w.double().T, h.double().abs() @ w.double().abs().T
                    assert ((y - exact).abs() <= (2**-8 if dtype == BF16 else 2**-20) * size).all()


def check_router(C):
    """The logits are computed from the returned h."""
    rand = Rand(BF16)
    for T, H, E, other, plain in ((1, 520, 3, BF16, False), (2, 136, 4, FP32, False), (3, 264, 1, FP32, True),
                                  (5, 1032, 5, FP32, False), (8, 2048, 2, BF16, False), (5, 4104, 2, BF16, True),
                                  (0, 8, 2, BF16, True)):  # fmt: skip
        x = rand.data(T, H + 8)[:, :H]  # its rows are strided
        w, router_w = rand.data(H, dtype=other), rand.data(E, H, dtype=other)
        residual = None if plain else rand.data(T, H, dtype=other)
        total = None if plain else torch.empty_like(residual)
        h, logits = x.new_empty(T, H), torch.full((T, E), torch.nan)
        C.rms_norm_router_fwd(x, w, router_w, residual, h, total, logits, 0.1)
        want = rms_norm_ref(x, w, residual, 0.1)
        for got, true in zip((h,) if plain else (h, total), (want,) if plain else want, strict=True):
            near(got.float(), true.float(), got.dtype)
        exact, size = h.double() @ router_w.double().T, h.double().abs() @ router_w.double().abs().T
        assert ((logits - exact).abs() <= 2**-20 * size).all()


CHECKS = [
    check_qk_forward,
    check_qk_cache,
    check_qk_backward,
    check_rms_forward,
    check_rms_backward,
    check_linear,
    check_router,
]


@pytest.mark.parametrize("check", CHECKS, ids=lambda f: f.__name__[6:])
def test_correct(check, schedule):
    check(C)


def test_without_any_position():
    """Tables without rows: every position is outside them."""
    cos = torch.empty(0, 32)
    qkv, w = torch.randn(2, 4, 128), torch.ones(128)
    with force("cuda"):
        q, k, v = QKNormRope.apply(qkv, w, w, cos, cos, torch.zeros(2, dtype=torch.int32), 1, 0.1)
    assert q[..., :64].isnan().all() and not q[..., 64:].isnan().any() and torch.equal(v, qkv[:, 3:])


REFUSED = {  # name: arguments of rms_norm_fwd, and words of its answer
    "other shapes": (lambda x, w, y, r: (x, w, y[:2], r, 0.1), "expects .*y.is"),
    "another dtype": (lambda x, w, y, r: (x, w.half(), y, r, 0.1), "expects .*w =="),
    "no kernel's dtype": (lambda x, w, y, r: (x.bool(), w, y, r, 0.1), "no kernel takes"),
    "a misaligned view": (lambda x, w, y, r: (x.new_empty(4, 72)[:, 1:65], w, y, r, 0.1), "expects rows_aligned"),
    "transposed": (lambda x, w, y, r: (x.new_empty(64, 4).T, w, y, r, 0.1), "expects rows_aligned"),
    "six dimensions": (lambda x, w, y, r: (x[None, None, None, None], w, y, r, 0.1), "at most 5 dimensions"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name):
    make, words = REFUSED[name]
    with pytest.raises(ValueError, match=words):
        x, w, y, rstd, eps = make(torch.randn(4, 64), torch.randn(64), torch.empty(4, 64), torch.empty(4))
        C.rms_norm_fwd(x, w, None, y, rstd, *[None] * 5, eps)
