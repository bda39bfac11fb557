"""The input of CUTLASS's grouped GEMM: its setup kernel on the virtual GPU, and CUTLASS's own layouts of the scales."""

import subprocess

import pytest
import torch

from ling_kernels.op import E4M3, round_up
from tests.gpu.build import CUTLASS, ROOT, includes, load, missing

if missing():
    pytest.skip(f"csrc/ needs {missing()} to run on the virtual GPU", allow_module_level=True)

pytestmark = pytest.mark.usefixtures("schedule")
C = load("_cutlass_setup")

OFFSETS = {
    "ragged": [0, 3, 60, 64, 130],
    "empty first, middle and last": [0, 0, 5, 5, 5, 70, 70],
    "rows past the last": [0, 20, 33],
    "one expert": [0, 64],
    "all empty": [0, 0, 0],
    "more experts than rows": [*range(20), *[20] * 280],
}


def split(workspace, sizes):
    """The arrays in the workspace, each at a multiple of 128 bytes."""
    start = 0
    for dtype, n in sizes:
        size = n * dtype.itemsize
        yield workspace[start : start + size].view(dtype)
        start = round_up(start + size, 128)


def operands(S, E, N, K):
    g = torch.Generator().manual_seed(0)
    a, b = torch.randn(S, K, generator=g).to(E4M3), torch.randn(E, N, K, generator=g).to(E4M3)
    a_scale = torch.randn(K // 128, round_up(S, 4), generator=g).T[:S]  # stride 1 along S, the other a multiple of 4
    b_scale = torch.randn(E, N // 128, K // 128, generator=g)
    return a, a_scale, b, b_scale


def check_setup(C, offsets, S=None, N=256, K=384):
    S = offsets[-1] if S is None else S
    E, KB = len(offsets) - 1, K // 128
    a, a_scale, b, b_scale = operands(S, E, N, K)
    y = torch.empty(S, N, dtype=torch.bfloat16)
    bytes_ = C.grouped_gemm_fp8_workspace(S, E, K)
    buffer = torch.full((bytes_ + 128,), 0xFF, dtype=torch.uint8)
    workspace = buffer[-buffer.data_ptr() % 128 :][:bytes_]
    C.grouped_gemm_fp8_setup(a, a_scale, b, b_scale, torch.tensor(offsets, dtype=torch.int32), y, workspace)
    if S == 0:
        return
    pointers = [(torch.int64, E)] * 8
    scales, shape, *rows = split(workspace, [(torch.float32, S * KB), (torch.int32, 3 * E), *pointers])
    a_ptr, b_ptr, a_scale_ptr, b_scale_ptr, y_ptr, a_stride, b_stride, y_stride = (t.tolist() for t in rows)
    for e, (lo, hi) in enumerate(zip(offsets, offsets[1:], strict=False)):
        assert shape[3 * e : 3 * e + 3].tolist() == [hi - lo, N, K]
        assert a_ptr[e] == a.data_ptr() + lo * K and b_ptr[e] == b.data_ptr() + e * N * K
        assert y_ptr[e] == y.data_ptr() + lo * N * 2 and b_scale_ptr[e] == b_scale[e].data_ptr()
        assert a_scale_ptr[e] == scales[lo * KB :].data_ptr() or lo == S
        assert (a_stride[e], b_stride[e], y_stride[e]) == (K, K, N)
        assert torch.equal(scales[lo * KB : hi * KB].view(KB, hi - lo), a_scale[lo:hi].T)  # [K/128, M]
    untouched = scales[offsets[-1] * KB :].view(torch.uint8)
    assert (untouched == 0xFF).all()


def check_all(C):
    for offsets in OFFSETS.values():
        check_setup(C, offsets, S=offsets[-1] + 7 * (len(offsets) == 3))


@pytest.mark.parametrize("name", OFFSETS)
def test_setup(name):
    offsets = OFFSETS[name]
    check_setup(C, offsets, S=offsets[-1] + (7 if name == "rows past the last" else 0))


def test_refused():
    a, a_scale, b, b_scale = operands(8, 2, 128, 256)
    offsets, y = torch.tensor([0, 4, 8], dtype=torch.int32), torch.empty(8, 128, dtype=torch.bfloat16)
    workspace = torch.empty(C.grouped_gemm_fp8_workspace(8, 2, 256) - 1, dtype=torch.uint8)
    with pytest.raises(ValueError, match="expects workspace.shape"):
        C.grouped_gemm_fp8_setup(a, a_scale, b, b_scale, offsets, y, workspace)
    with pytest.raises(ValueError, match="expects a_scale"):
        C.grouped_gemm_fp8_setup(a, a_scale.contiguous(), b, b_scale, offsets, y, workspace)


@pytest.mark.skipif(not (CUTLASS / "cutlass/cutlass.h").exists(), reason="there are no headers of CUTLASS")
@pytest.mark.parametrize("schedule", [0], indirect=True)
def test_cutlass_reads_the_scales_where_they_are(tmp_path, schedule):
    """CUTLASS's layouts, evaluated on the host: a's scales as setup writes them, b's as quantize_weight does."""
    program = tmp_path / "scales"
    cuda = includes()[0]
    folders = [f"-I{ROOT}/csrc", f"-I{CUTLASS}", f"-I{cuda}", f"-I{cuda}/cccl"]
    source = ROOT / "tests/cuda/cutlass_scales.cpp"
    subprocess.run(["g++", "-std=c++20", "-w", *folders, source, "-o", program], check=True)
    for M, N, K in ((1, 128, 128), (5, 256, 384), (130, 384, 256)):
        output = subprocess.run([program, str(M), str(N), str(K)], capture_output=True, text=True, check=True).stdout
        packed = torch.arange(M * K // 128).view(K // 128, M).T
        weight = torch.arange(N // 128 * K // 128)
        assert [*map(int, output.split())] == packed.flatten().tolist() + weight.tolist()
