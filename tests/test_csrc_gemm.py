"""The GEMM kernels of csrc/ on the virtual GPU: every tile."""

import subprocess

import pytest
import torch

from ling_kernels.op import E4M3, round_up
from ling_kernels.ops.gemm_fp8 import gemm_fp8_ref
from ling_kernels.ops.grouped_gemm_fp8 import grouped_gemm_fp8_masked_ref, grouped_gemm_fp8_ref
from ling_kernels.ops.grouped_wgrad import grouped_wgrad_ref
from ling_kernels.ops.quantize import quantize, quantize_weight
from tests.cases import Rand, grouped_fp8_args, offsets_of, plan_of, poison, wgrad_column_args
from tests.gpu.build import CUTLASS, ROOT, Kernels, includes, load, missing
from tests.test_ops import near_codes

if missing():
    pytest.skip(f"csrc/ needs {missing()} to run on the virtual GPU", allow_module_level=True)

pytestmark = pytest.mark.usefixtures("schedule")
C = load()
BF16, FP32 = torch.bfloat16, torch.float32


def near(got, want, eps=2**-7):
    assert got.isfinite().all() or not want.isfinite().all()
    error = (got.float() - want.float()).abs().max().item() if want.numel() else 0
    assert error <= eps * max(want.float().abs().max().item(), 1e-9) if want.numel() else True


def check_rows(C):
    """Tiles of 16, 32, 64 and 128 rows; empty groups, all rows in one group, rows of none; 128 or 384 columns."""
    rand = Rand(FP32)
    for S, E, N, K, rest in ((40, 8, 128, 256, 3), (60, 2, 384, 128, 0), (150, 3, 256, 384, 9), (290, 2, 384, 640, 0),
                             (9, 40, 128, 128, 2), (300, 1, 640, 128, 1)):  # fmt: skip
        a, a_scale, b, b_scale, offsets = grouped_fp8_args(rand, S, E, N, K, rest)
        for bounds in (offsets, one_group(offsets)):
            want = grouped_gemm_fp8_ref(a, a_scale, b, b_scale, bounds, dtype=FP32)
            for dtype in (BF16, FP32):
                y = torch.full((S, N), -7, dtype=dtype)
                C.grouped_gemm_fp8_fwd(a, a_scale, b, b_scale, bounds, None, 1, y, None, False)
                near(y[: bounds[-1]], want[: bounds[-1]], 2**-7 if dtype == BF16 else 2**-18)
                assert (y[bounds[-1] :] == -7).all()


def one_group(offsets):
    """All rows belong to a group in the middle."""
    return torch.where(torch.arange(len(offsets)) > (len(offsets) - 1) // 2, offsets[-1], 0).int()


def check_transposed(C):
    rand = Rand(FP32)
    for S, E, N, K, rest in ((40, 2, 128, 384, 3), (150, 1, 384, 640, 0), (300, 2, 256, 256, 5)):
        a, a_scale, b, b_scale, offsets = grouped_fp8_args(rand, S, E, N, K, rest, transposed=True)
        y = torch.full((S, N), -7.0)
        C.grouped_gemm_fp8_fwd(a, a_scale, b, b_scale, offsets, None, 1, y, None, True)
        want = grouped_gemm_fp8_ref(a, a_scale, b, b_scale, offsets, dtype=FP32, transposed=True)
        near(y[: offsets[-1]], want[: offsets[-1]], 2**-18)
        assert (y[offsets[-1] :] == -7).all()


def check_gather(C):
    """With and without SwiGLU and FP8 output, at every tile."""
    rand = Rand(FP32)
    for T, E, routing in ((20, 4, ""), (50, 4, "masked"), (60, 2, ""), (90, 2, "one"), (150, 2, "")):
        N, K = 512, 384
        plan = plan_of(rand, T, E, 2, routing)
        (a, a_scale), (b, b_scale) = quantize(rand.data(T, K)), quantize_weight(rand.data(E, N, K))
        S, end = len(plan.source), plan.offsets[-1]
        want = grouped_gemm_fp8_ref(a, a_scale, b, b_scale, plan.offsets, plan, dtype=FP32)
        y = torch.full((S, N), -7, dtype=BF16)
        C.grouped_gemm_fp8_fwd(a, a_scale, b, b_scale, plan.offsets, plan.source, 2, y, None, False)
        near(y[:end], want[:end])

        gate, up = want[:end].chunk(2, -1)
        want = torch.nn.functional.silu(gate) * up
        rows, row_scale = (t[plan.source // 2] for t in (a, a_scale))
        row_scale = row_scale.T.contiguous().T if S % 4 == 0 else pad_scale(row_scale)
        for operands, source in (((a, a_scale), plan.source), ((rows.contiguous(), row_scale), None)):
            y_q, y_scale = torch.zeros(S, N // 2, dtype=E4M3), torch.full((N // 256, round_up(S, 4)), -7.0).T[:S]
            C.grouped_gemm_fp8_fwd(*operands, b, b_scale, plan.offsets, source, 2, y_q, y_scale, False)
            assert near_codes(y_q[:end], quantize(want)[0])
            largest = want.unflatten(1, (-1, 128)).abs().amax(-1)
            near(y_scale[:end] * 448, largest, 2**-18)
            assert (y_scale[end:] == -7).all()


def pad_scale(scale):
    S = len(scale)
    return scale.new_zeros(scale.shape[1], round_up(S, 4)).T[:S].copy_(scale)


def check_masked(C):
    rand = Rand(FP32)
    for E, M, N, K in ((5, 12, 128, 256), (3, 100, 384, 256), (2, 150, 256, 128)):
        (a, a_scale), (b, b_scale) = quantize(rand.data(E * M, K)), quantize_weight(rand.data(E, N, K))
        a, a_scale, counts = a.unflatten(0, (E, M)), a_scale.unflatten(0, (E, M)), rand.ints(0, M + 1, E)
        y = torch.full((E, M, N), -7, dtype=BF16)
        C.grouped_gemm_fp8_masked_fwd(a, a_scale, b, b_scale, counts, y)
        want = grouped_gemm_fp8_masked_ref(a, a_scale, b, b_scale, counts)
        for mine, right, m in zip(y, want, counts.tolist(), strict=True):
            near(mine[:m], right[:m])
            assert (mine[m:] == -7).all()


def check_dense(C):
    """b_scale per block and per row, with and without accumulation; columns that are not a multiple of 128."""
    rand = Rand(FP32)
    for M, N, K, by_row in (
        (40, 256, 384, False),
        (20, 128, 4224, False),  # more steps than lanes that hold their scales
        (150, 384, 256, False),
        (40, 72, 256, True),
        (150, 264, 128, True),
    ):
        a, a_scale = quantize(rand.data(M, K))
        b, b_scale = quantize(rand.data(N, K)) if by_row else quantize_weight(rand.data(N, K))
        for dtype in (BF16, FP32):
            for accumulate in (False, True):
                d = rand.data(M, N, dtype=dtype)
                want = gemm_fp8_ref(a, a_scale, b, b_scale, d.float().clone(), accumulate)
                C.gemm_fp8_fwd(a, a_scale, b, b_scale, d, accumulate, False)
                near(d, want, 2**-7 if dtype == BF16 else 2**-18)


def check_few_rows(C):
    """K shared by 1, 2, 4 and 8 warps, or more than it has parts; more tiles than blocks; a row in a batch."""
    rand = Rand(FP32)
    with pytest.MonkeyPatch.context() as patch:
        for sms, M, N, K in ((1, 3, 640, 256), (3, 1, 256, 640), (3, 8, 128, 5120), (132, 5, 128, 1152),
                             (3, 2, 128, 384)):  # fmt: skip
            patch.setenv("LING_GPU_SMS", str(sms))
            (a, a_scale), (b, b_scale) = quantize(rand.data(M, K)), quantize_weight(rand.data(N, K))
            for dtype, accumulate in ((BF16, True), (FP32, False), (FP32, True)):
                d = rand.data(M, N, dtype=dtype)
                alone, want = d[:1].clone(), gemm_fp8_ref(a, a_scale, b, b_scale, d.float().clone(), accumulate)
                C.gemm_fp8_fwd(a, a_scale, b, b_scale, d, accumulate, False)
                near(d, want, 2**-7 if dtype == BF16 else 2**-18)
                C.gemm_fp8_fwd(a[:1], a_scale[:1], b, b_scale, alone, accumulate, False)
                assert torch.equal(alone, d[:1])


def check_wgrad(C):
    """FP8 columns and bf16 rows; groups without rows, neighbours of NaN."""
    rand = Rand(FP32)
    for accumulate in (False, True):
        for dtype in (BF16, FP32):
            for T, E, N, K, routing in ((70, 4, 256, 384, "masked"), (90, 2, 128, 128, "one")):
                dy, x, padded, _, _, dy_scale, x_scale, *_ = wgrad_column_args(rand, T, E, N, K, 2, routing)
                dw = rand.data(E, N, K, dtype=dtype)
                want = grouped_wgrad_ref(dy, x, padded, dw.float().clone(), accumulate, dy_scale, x_scale, True)
                C.grouped_wgrad_fwd(dy, x, padded, dw, accumulate, dy_scale, x_scale, True)
                near(dw, want, 2**-7 if dtype == BF16 else 2**-18)
            for S, E, N, K, rest in ((200, 5, 136, 264, 9), (70, 1, 24, 40, 3), (300, 3, 128, 256, 0)):
                offsets = offsets_of(rand, S, E, rest)
                dy, x = (poison(rand.data(S, n, dtype=BF16), offsets) for n in (N, K))
                dw = rand.data(E, N, K, dtype=dtype)
                want = grouped_wgrad_ref(dy, x, offsets, dw.float().clone(), accumulate)
                C.grouped_wgrad_fwd(dy, x, offsets, dw, accumulate, None, None, False)
                near(dw, want, 2**-7 if dtype == BF16 else 2**-16)


CHECKS = [check_rows, check_transposed, check_gather, check_masked, check_dense, check_few_rows, check_wgrad]


@pytest.mark.parametrize("check", CHECKS, ids=lambda f: f.__name__[6:])
def test_correct(check):
    check(C)


def test_nothing_to_do():
    """Without rows, or without groups, nothing is written."""
    a, a_scale, b, b_scale, offsets = grouped_fp8_args(Rand(FP32), 8, 3, 128, 128)
    y = torch.full((8, 128), -7.0)
    C.grouped_gemm_fp8_fwd(a, a_scale, b, b_scale, torch.zeros_like(offsets), None, 1, y, None, False)
    assert (y == -7).all()
    C.grouped_gemm_fp8_fwd(a[:0], a_scale[:0], b, b_scale, torch.zeros_like(offsets), None, 1, y[:0], None, False)


@pytest.mark.skipif(not (CUTLASS / "cutlass/cutlass.h").exists(), reason="CUTLASS's headers are not here")
@pytest.mark.parametrize("schedule", [0], indirect=True)
def test_cute_agrees_where_operands_and_results_lie(tmp_path):
    """The layouts and descriptors of csrc/ are those of CuTe, evaluated on the host."""
    cuda, program = includes()[0], tmp_path / "layouts"
    folders = [f"-I{CUTLASS}", f"-I{cuda}", f"-I{cuda}/cccl"]
    subprocess.run(
        ["g++", "-std=c++20", "-w", *folders, ROOT / "tests/cuda/cute_layouts.cpp", "-o", program], check=True
    )
    output = subprocess.run([program], capture_output=True, text=True, check=True).stdout
    noise = "ERROR: cast_smem_ptr_to_uint not supported but used"  # it gives 0, and no address is compared
    cute = torch.tensor([int(w) for w in output.replace(noise, "").split() if w != "."])
    ours = torch.empty(2 * 64 * 128 + 2 + 128 * 64, dtype=torch.int64)
    Kernels(ROOT / "tests/cuda/layouts.cu").layouts(1, 128, ours)
    for t in (ours, cute):
        t[2 * 64 * 128 : 2 * 64 * 128 + 2] &= ~0x3FFF  # an address
    assert torch.equal(ours, cute)
