"""CUTLASS's kernels, the optional extension _cutlass, against the reference: on a Hopper GPU, or on the virtual one."""

import importlib.util

import pytest
import torch

from ling_kernels.backend import why_not
from ling_kernels.ops.grouped_gemm_fp8 import (
    grouped_gemm_fp8_cutlass,
    grouped_gemm_fp8_cutlass_fwd,
    grouped_gemm_fp8_ref,
    import_cutlass,
)
from tests.cases import DEVICE, Rand, grouped_fp8_args
from tests.gpu import build
from tests.gpu.program import RACES, WARPGROUPS

SHAPES = [
    dict(S=1, E=1, N=128, K=128),
    dict(S=67, E=8, N=128, K=256, unused=5),
    dict(S=9, E=256, N=128, K=128),
    dict(S=700, E=3, N=384, K=1152),
    dict(S=1000, E=4, N=1024, K=2048),
    dict(S=0, E=3, N=128, K=128),
]


def not_here() -> str | None:
    if DEVICE == "cpu":
        if missing := build.missing():
            return f"csrc/ needs {missing} to run on the virtual GPU"
        return None if (build.CUTLASS / "cutlass/cutlass.h").exists() else "there are no headers of CUTLASS"
    if reason := why_not("cuda", 0):
        return reason
    try:
        import_cutlass()
    except ImportError as error:
        return str(error)
    return None


def check(launch, shape, pingpong):
    args = grouped_fp8_args(Rand(torch.bfloat16), **shape)
    a, a_scale, b, b_scale, offsets = args
    rows = int(offsets[-1])
    y = torch.full((len(a), b.shape[1]), 7.0, dtype=torch.bfloat16, device=a.device)
    launch(*args, y, pingpong)
    second_run = torch.full_like(y, 7.0)
    launch(*args, second_run, pingpong)
    assert torch.equal(y, second_run) and (y[rows:] == 7).all()
    near = grouped_gemm_fp8_ref(*args)[:rows].double()
    true = grouped_gemm_fp8_ref(a, a_scale.double(), b, b_scale.double(), offsets)[:rows].double()
    absolute = [x.float().abs().to(x.dtype) for x in (a, b)], [s.abs().double() for s in (a_scale, b_scale)]
    (a, b), (a_scale, b_scale) = absolute
    sizes = grouped_gemm_fp8_ref(a, a_scale, b, b_scale, offsets)[:rows].double()
    limit = 2 * (near - true).abs() + 2**-13 * sizes + 2**-8 * true.abs()
    assert ((y[:rows].double() - true).abs() <= limit).all()


def on_virtual_gpu(a, a_scale, b, b_scale, offsets, y, pingpong):
    """The launcher, with a workspace aligned as a GPU's memory is."""
    module = build.load("_cutlass")
    size = module.grouped_gemm_fp8_workspace(len(a), len(b), a.shape[1])
    workspace = torch.empty(size + 128, dtype=torch.uint8)
    workspace = workspace[-workspace.data_ptr() % 128 :][:size]
    module.grouped_gemm_fp8(a, a_scale, b, b_scale, offsets, y, workspace, pingpong)


@pytest.mark.skipif(not_here() is not None, reason=str(not_here()))
@pytest.mark.parametrize("pingpong", [False, True], ids=["cooperative", "pingpong"])
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "-".join(f"{k}{v}" for k, v in s.items()))
def test_matches_reference(shape, pingpong, monkeypatch):
    # One thread of a warpgroup frees the scales that all its threads have read: the wgmma between orders them.
    monkeypatch.setenv("LING_GPU_RACES", str(RACES | WARPGROUPS))
    for seed in range(4 if DEVICE == "cpu" and shape["S"] < 100 else 1):
        monkeypatch.setenv("LING_GPU_SEED", str(seed))
        check(on_virtual_gpu if DEVICE == "cpu" else grouped_gemm_fp8_cutlass_fwd, shape, pingpong)


@pytest.mark.skipif(DEVICE == "cpu" or not_here() is not None, reason=str(not_here() or "there is no GPU"))
def test_in_a_graph():
    args = grouped_fp8_args(Rand(torch.bfloat16), S=300, E=4, N=256, K=512)
    want, graph = grouped_gemm_fp8_cutlass(*args), torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = grouped_gemm_fp8_cutlass(*args)
    y.zero_()
    graph.replay()
    assert torch.equal(y, want)


@pytest.mark.skipif(DEVICE != "cpu", reason="the check itself, on a CPU")
@pytest.mark.parametrize("wrong", [None, "a neighbour's row", "scale"])
def test_the_check_can_fail(wrong):
    def launch(a, a_scale, b, b_scale, offsets, y, pingpong):
        rows = int(offsets[-1])
        a_scale = a_scale * (1.02 if wrong == "scale" else 1)
        y[:rows] = grouped_gemm_fp8_ref(a, a_scale, b, b_scale, offsets)[:rows]
        if wrong == "a neighbour's row":
            y[rows] = 0

    if wrong is None:
        return check(launch, SHAPES[1], False)
    with pytest.raises(AssertionError):
        check(launch, SHAPES[1], False)


@pytest.mark.skipif(importlib.util.find_spec("ling_kernels._cutlass") is not None, reason="_cutlass is built")
def test_error_without_the_extension():
    args = grouped_fp8_args(Rand(torch.bfloat16), **SHAPES[1])
    with pytest.raises(ImportError, match="_cutlass is not built .make cutlass"):
        grouped_gemm_fp8_cutlass(*args)
