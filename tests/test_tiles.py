"""What the table leaves out of the GEMM kernels: many tiles a program, bands, H20 tiles, operands that TMA refuses."""

import sys

import pytest
import torch
import triton
import triton.language as tl

from ling_kernels.backend import force
from ling_kernels.ops.gemm_fp8 import gemm_fp8, gemm_fp8_ref, tile_position
from ling_kernels.ops.grouped_gemm import grouped_gemm, grouped_gemm_ref
from ling_kernels.ops.grouped_wgrad import grouped_wgrad, grouped_wgrad_ref
from ling_kernels.ops.quantize import quantize
from tests.cases import CASES, DEVICE, Rand, args_of, offsets_of, runs, wgrad_column_args
from tests.test_ops import errors, outputs_and_grads

pytestmark = pytest.mark.skipif(not runs("triton"), reason="triton cannot run here")


@triton.jit
def places_kernel(places, tiles_m, tiles_n, BAND: tl.constexpr):
    tile = tl.program_id(0)
    m, n = tile_position(tile, tiles_m, tiles_n, BAND)
    tl.store(places + 2 * tile, m)
    tl.store(places + 2 * tile + 1, n)


@pytest.mark.parametrize("tiles_m, tiles_n", [(1, 1), (1, 7), (5, 3), (4, 2), (9, 1), (11, 4)])
def test_a_band_is_finished_before_the_next_begins(tiles_m, tiles_n):
    places = torch.zeros(tiles_m * tiles_n, 2, dtype=torch.int32, device=DEVICE)
    places_kernel[(len(places),)](places, tiles_m, tiles_n, BAND=4)
    assert sorted(map(tuple, places.tolist())) == [(m, n) for m in range(tiles_m) for n in range(tiles_n)]
    assert places.tolist() == sorted(places.tolist(), key=lambda p: (p[0] // 4, p[1], p[0]))


@pytest.mark.parametrize(
    "name, shape",
    [
        ("gemm_fp8", dict(M=150, N=256, K=128)),
        ("grouped_gemm_fp8", dict(S=100, E=4, N=384, K=128)),
        ("grouped_gemm_fp8", dict(S=150, E=4, N=384, K=128, unused=3)),
        ("grouped_gemm_fp8-swiglu", dict(T=70, E=2, N=512, K=128)),
        ("grouped_gemm_fp8_masked", dict(E=3, M=70, N=256, K=128)),
        ("grouped_gemm", dict(S=50, E=4, N=264, K=72)),
        ("grouped_gemm", dict(S=150, E=4, N=264, K=72, unused=3)),
    ],
)
def test_one_program_does_many_tiles(name, shape, monkeypatch):
    """One SM, of an H20: its tiles, and every program has several."""
    for file in ("gemm_fp8", "grouped_gemm"):
        monkeypatch.setattr(sys.modules[f"ling_kernels.ops.{file}"], "multiprocessors", lambda device: 1)
    case = next(c for c in CASES if c.name == name)
    args = args_of(case, shape, torch.bfloat16)
    with force("triton"):
        got = outputs_and_grads(case, case.op, args)
    want = outputs_and_grads(case, case.ref, args)
    for g, w in zip(got, want, strict=True):
        assert errors(g, w)[0] <= 2**-7 * errors(w, torch.zeros_like(w))[0]


def off_by_one(x):
    """x as a view whose first element and whose rows do not lie on 16 bytes."""
    around = torch.zeros(x.shape[0], x.shape[1] + 1, dtype=x.dtype, device=x.device)
    around[:, 1:] = x
    return around[:, 1:]


def near(got, want):
    return errors(got, want)[0] <= 1e-6 * want.abs().max().item()


def test_operands_may_lie_anywhere():
    rand = Rand(torch.float32)
    with force("triton"):
        (a, a_scale), (b, b_scale) = quantize(rand.data(37, 256)), quantize(rand.data(70, 256))
        out = rand.data(70, 37).T
        want = gemm_fp8_ref(a, a_scale, b, b_scale, out.clone(), True)
        got = gemm_fp8(off_by_one(a), a_scale.contiguous(), off_by_one(b), b_scale, out, True)
        assert got is out and near(got, want)

        offsets = offsets_of(rand, 37, 3)
        x, w = off_by_one(rand.data(37, 40)), rand.data(3, 40, 24).mT
        assert near(grouped_gemm(x, w, offsets), grouped_gemm_ref(x, w, offsets))

        dy, x, padded, _, _, *rest = wgrad_column_args(rand, 37, 3, 128, 128)
        got = grouped_wgrad(off_by_one(dy), off_by_one(x), padded, None, False, *rest)
        assert near(got, grouped_wgrad_ref(dy, x, padded, None, False, *rest))
