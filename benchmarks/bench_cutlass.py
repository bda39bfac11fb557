"""CUTLASS's grouped FP8 GEMM beside ours: Ling-mini's two products at T = 8192, and one with few rows."""

import pytest
import torch

from benchmarks.bench_ops import Tick, flush_l2
from ling_kernels.backend import _C
from ling_kernels.ops import grouped_gemm_fp8
from tests.cases import Rand, grouped_fp8_args
from tests.test_cutlass_on_gpu import not_here

pytestmark = pytest.mark.skipif(not_here() is not None, reason=str(not_here()))
SHAPES = [
    dict(S=65536, E=256, N=1024, K=2048),
    dict(S=65536, E=256, N=2048, K=512),
    dict(S=1024, E=256, N=1024, K=2048),
]


@pytest.mark.benchmark(timer=Tick, group="cutlass")
@pytest.mark.parametrize("kernel", ["cooperative", "pingpong", "ours"])
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "-".join(f"{k}{v}" for k, v in s.items()))
def bench_grouped_gemm_fp8(benchmark, shape, kernel):
    args = grouped_fp8_args(Rand(torch.bfloat16), **shape)
    a, b = args[0], args[2]
    y = torch.empty(len(a), b.shape[1], dtype=torch.bfloat16, device=a.device)
    size = _C.grouped_gemm_fp8_workspace(len(a), len(b), a.shape[1])
    workspace = torch.empty(size, dtype=torch.uint8, device=a.device)

    def run():
        if kernel == "ours":
            return grouped_gemm_fp8(*args)
        _C.grouped_gemm_fp8_cutlass(*args, y, workspace, kernel == "pingpong")

    benchmark.pedantic(run, setup=flush_l2, warmup_rounds=5, rounds=50)
    seconds = benchmark.stats.stats.median
    benchmark.extra_info["TFLOPS"] = 2 * shape["S"] * shape["N"] * shape["K"] / seconds / 1e12
    benchmark.extra_info["GB/s"] = (sum(t.nbytes for t in args) + y.nbytes) / seconds / 1e9
