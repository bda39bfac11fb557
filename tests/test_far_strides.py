"""Operands whose elements lie more than 2^31 elements apart: every product of a stride with an index has 64 bits.

Memory is mapped and mostly not touched. A wrong address ends the process, so the calls run in one of their own.
"""

import os
import subprocess
import sys

import pytest
import torch

import ling_kernels as lk
from ling_kernels.backend import force
from tests.cases import DEVICE, runs

BF16, FP32 = torch.bfloat16, torch.float32
S, N, K = 8, 128, 128


def far(x: torch.Tensor, dim: int) -> torch.Tensor:
    """A copy of x [m, n] whose last row or column lies 2^31 elements after the first; the other dimension is dense."""
    step = 1024 + 2**31 // (x.shape[dim] - 1)
    strides = (step, 1) if dim == 0 else (1, step)
    storage = torch.empty(step * (x.shape[dim] - 1) + x.shape[1 - dim], dtype=x.dtype, device=x.device)
    out = storage.as_strided(x.shape, strides)
    out.copy_(x)
    return out


def data(*shape, dtype=BF16):
    return torch.randn(*shape, device=DEVICE).to(dtype)


def cases():
    """(name, call, operands, the operand that is far)."""
    offsets = torch.tensor([0, 3, S], dtype=torch.int32, device=DEVICE)
    a, b, dy = data(S, K), data(1, N, K), data(S, N)
    one = torch.tensor([0, S], dtype=torch.int32, device=DEVICE)
    q = *lk.quantize(a), *lk.quantize_weight(b[0])
    targets = torch.arange(S, device=DEVICE)
    routed, bias = data(S, 16, dtype=FP32), torch.zeros(16, device=DEVICE)
    for dim in (0, 1):
        yield f"grouped_gemm a {dim}", lambda a: lk.grouped_gemm(a, b, one), a, dim
        yield f"grouped_gemm b {dim}", lambda w: lk.grouped_gemm(a, w[None], one), b[0], dim
        yield f"grouped_gemm dy {dim}", lambda dy: gradient(lambda a: lk.grouped_gemm(a, b, one), a, dy), dy, dim
        yield f"grouped_wgrad dy {dim}", lambda dy: lk.grouped_wgrad(dy, a, offsets), dy, dim
        yield f"grouped_wgrad x {dim}", lambda x: lk.grouped_wgrad(dy, x, offsets), a, dim
        yield f"grouped_wgrad out {dim}", lambda w: lk.grouped_wgrad(dy, a, one, w[None]), data(N, K), dim
        yield f"gemm_fp8 a {dim}", lambda a: lk.gemm_fp8(a, *q[1:]), q[0], dim
        yield f"gemm_fp8 b {dim}", lambda b: lk.gemm_fp8(*q[:2], b, q[3]), q[2], dim
        yield f"gemm_fp8 out {dim}", lambda out: lk.gemm_fp8(*q, out=out), dy, dim
        yield f"quantize {dim}", lambda x: lk.quantize(x), a, dim
        yield f"quantize_weight {dim}", lambda w: lk.quantize_weight(w), b[0], dim
        yield f"swiglu {dim}", lambda x: lk.swiglu(x), a, dim
        yield f"rms_norm {dim}", lambda x: lk.rms_norm(x, torch.ones_like(x[0])), a, dim
        yield f"rms_norm_router {dim}", lambda x: lk.rms_norm_router(x, a[0], b[0])[1], a, dim
        yield f"router_gemm {dim}", lambda x: lk.router_gemm(x, b[0]), a, dim
        yield f"router_gemm w {dim}", lambda w: lk.router_gemm(a, w), b[0], dim
        yield f"cross_entropy {dim}", lambda x: lk.cross_entropy(x, targets), a, dim
        yield f"linear_cross_entropy {dim}", lambda x: lk.linear_cross_entropy(x, b[0], targets), a, dim
        yield f"attention {dim}", lambda q: lk.attention(*[q[:, None]] * 3, one)[0], a, dim
        yield f"route {dim}", lambda x: lk.route(x, bias, None, 4, 2, 4)[0], routed, dim


def gradient(fn, x, dy):
    x = x.detach().requires_grad_()
    return torch.autograd.grad(fn(x), x, dy)


def main():
    torch.manual_seed(0)
    for name, call, x, dim in cases():
        print(name, flush=True)
        results = []
        for operand in (x.contiguous(), far(x, dim)):
            with force("triton"):
                out = call(operand)
            results.append([t.float() for t in (out if isinstance(out, tuple) else (out,))])
            del operand, out
        torch.testing.assert_close(*results, atol=1e-2, rtol=1e-2)


@pytest.mark.skipif(not runs("triton"), reason="no Triton")
def test_strides_past_32_bits():
    env = os.environ | dict(OMP_NUM_THREADS="1")
    command = "import tests.conftest; from tests.test_far_strides import main; main()"
    run = subprocess.run([sys.executable, "-c", command], capture_output=True, text=True, env=env)
    assert run.returncode == 0, f"{run.stdout.splitlines()[-1:]} ended with {run.returncode}: {run.stderr[-2000:]}"
