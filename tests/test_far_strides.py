"""Operands whose elements lie more than 2^31 elements apart: every product of a stride with an index has 64 bits.

Memory is mapped and mostly not touched. A wrong address ends the process, so the calls run in one of their own.
test_wide_offsets.py reads the same from the source of every kernel.
"""

import functools
import os
import subprocess
import sys

import pytest
import torch

import ling_kernels as lk
from ling_kernels.backend import force
from ling_kernels.op import E4M3
from ling_kernels.ops.attention_decode import KVCache, read
from tests.cases import DEVICE, Rand, cache_of, runs

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


def deep(cached: tuple[KVCache, torch.Tensor]) -> tuple[KVCache, torch.Tensor]:
    """A copy of a cache whose pages but the first lie past 2^31 elements, and the block table for it."""
    small, table = cached
    pages = 2**31 // small.k[0].numel() + len(small.k)
    where = torch.tensor([0, *range(pages + 1 - len(small.k), pages)], device=DEVICE)
    cache = KVCache(*(t if t is None else t.new_empty(pages, *t.shape[1:]) for t in small))
    for to, t in zip(cache, small, strict=True):
        if t is not None:
            dtype = torch.uint8 if t.dtype == E4M3 else t.dtype  # torch does not index FP8
            to.view(dtype)[where] = t.view(dtype)
    return cache, where[table.long()].int()


def cases():
    """(name, call, its operand, a function that gives a copy of the operand which is far in memory)."""
    for dim in (0, 1):
        for name, call, x in strided_cases():
            yield f"{name} {dim}", call, x, functools.partial(far, dim=dim)
    lengths = torch.tensor([20, 32], device=DEVICE).int()
    qkv, weight, tables = data(2, 1, 6, 128), data(128), lk.rope_tables(64, 64, 1e4, None, DEVICE)

    def with_cells(out, cache, table):
        slots = (table.long()[:, :, None] * 16 + torch.arange(16, device=DEVICE)).flatten()
        return *out, *read(cache, slots, BF16)

    def decode(cached):
        return (lk.attention_decode(qkv[:, :, :4], *cached, lengths),)

    def norm_and_decode(cached):
        out = lk.qk_norm_attention_decode(qkv, weight, weight, *tables, *cached, lengths)
        return with_cells([out], *cached)

    def norm_and_append(cached):
        cache, table = cached
        slots = table[:, 1].long() * 16 + 3
        out = lk.qk_norm_rope(qkv[:, 0], weight, weight, *tables, lengths - 1, 1, 1e-6, cache, slots)
        return with_cells(out, *cached)

    for fp8 in (False, True):
        table = torch.tensor([[2, 0], [1, 3]], device=DEVICE).int()
        cached, kind = (cache_of(Rand(BF16), 4, 16, 1, 128, fp8), table), "fp8" if fp8 else "bf16"
        yield f"attention_decode {kind}", decode, cached, deep
        yield f"qk_norm_attention_decode {kind}", norm_and_decode, cached, deep
        yield f"qk_norm_rope {kind}", norm_and_append, cached, deep


def strided_cases():
    """(name, call, its operand [m, n])."""
    offsets = torch.tensor([0, 3, S], dtype=torch.int32, device=DEVICE)
    a, b, dy = data(S, K), data(1, N, K), data(S, N)
    one = torch.tensor([0, S], dtype=torch.int32, device=DEVICE)
    q = *lk.quantize(a), *lk.quantize_weight(b[0])
    wide = *lk.quantize(data(S, 3 * K)), *lk.quantize_weight(data(3 * N, 3 * K))  # several scales in either direction
    tall = *wide[:2], *lk.quantize(data(N, 3 * K))
    columns = [lk.quantize(data(3 * N, n), False, True) for n in (N, K)]  # of 3 N rows
    three = torch.tensor([0, 3 * N], dtype=torch.int32, device=DEVICE)
    targets = torch.arange(S, device=DEVICE)
    routed, bias = data(S, 16, dtype=FP32), torch.zeros(16, device=DEVICE)
    cells = KVCache(data(2, 16, 1, 32), data(2, 16, 1, 32))
    cached = cells, torch.zeros(S, 1, device=DEVICE).int(), torch.full((S,), 9, device=DEVICE).int()
    tables, head = lk.rope_tables(S, 16, 1e4, None, DEVICE), data(32)
    yield "grouped_gemm a", lambda a: lk.grouped_gemm(a, b, one), a
    yield "grouped_gemm b", lambda w: lk.grouped_gemm(a, w[None], one), b[0]
    yield "grouped_gemm dy", lambda dy: gradient(lambda a: lk.grouped_gemm(a, b, one), a, dy), dy
    yield "grouped_gemm_fp8 a", lambda x: lk.grouped_gemm_fp8(x, q[1], q[2][None], q[3][None], one), q[0]
    yield "grouped_gemm_fp8 b", lambda w: lk.grouped_gemm_fp8(*q[:2], w[None], q[3][None], one), q[2]
    yield "grouped_gemm_fp8 a_scale", lambda s: lk.grouped_gemm_fp8(wide[0], s, *grouped(wide[2:]), one), wide[1]
    yield "grouped_gemm_fp8 b_scale", lambda s: lk.grouped_gemm_fp8(*wide[:2], *grouped((wide[2], s)), one), wide[3]
    yield "grouped_wgrad dy", lambda dy: lk.grouped_wgrad(dy, a, offsets), dy
    yield "grouped_wgrad x", lambda x: lk.grouped_wgrad(dy, x, offsets), a
    yield "grouped_wgrad out", lambda w: lk.grouped_wgrad(dy, a, one, w[None]), data(N, K)
    yield "grouped_wgrad scale of columns", lambda s: wgrad_of_columns(columns, s, three), columns[0][1]
    yield "grouped_wgrad scale of rows", lambda s: wgrad_of_rows(wide, s, one), wide[1]
    yield "gemm_fp8 a", lambda a: lk.gemm_fp8(a, *q[1:]), q[0]
    yield "gemm_fp8 b", lambda b: lk.gemm_fp8(*q[:2], b, q[3]), q[2]
    yield "gemm_fp8 a_scale", lambda s: lk.gemm_fp8(wide[0], s, *wide[2:]), wide[1]
    yield "gemm_fp8 b_scale", lambda s: lk.gemm_fp8(*wide[:3], s), wide[3]
    yield "gemm_fp8 b_scale of rows", lambda s: lk.gemm_fp8(*tall[:3], s), tall[3]
    yield "gemm_fp8 out", lambda out: lk.gemm_fp8(*q, out=out), dy
    yield "quantize", lambda x: lk.quantize(x), a
    yield "quantize_weight", lambda w: lk.quantize_weight(w), b[0]
    yield "transpose_fp8 scale", lambda s: lk.transpose_fp8(wide[2], s), wide[3]
    yield "swiglu", lambda x: lk.swiglu(x), a
    yield "rms_norm", lambda x: lk.rms_norm(x, torch.ones_like(x[0])), a
    yield "rms_norm_linear", lambda x: lk.rms_norm_linear(x, a[0], b[0]), a
    yield "rms_norm_linear w", lambda w: lk.rms_norm_linear(a, a[0], w), b[0]
    yield "rms_norm_router", lambda x: lk.rms_norm_router(x, a[0], b[0])[1], a
    yield "router_gemm", lambda x: lk.router_gemm(x, b[0]), a
    yield "router_gemm w", lambda w: lk.router_gemm(a, w), b[0]
    yield "cross_entropy", lambda x: lk.cross_entropy(x, targets), a
    yield "linear_cross_entropy", lambda x: lk.linear_cross_entropy(x, b[0], targets), a
    yield "attention", lambda q: lk.attention(*[q[:, None]] * 3, one)[0], a
    yield "attention_decode", lambda q: lk.attention_decode(q.unflatten(1, (1, 4, 32)), *cached), a
    yield "qk_norm_rope", lambda x: lk.qk_norm_rope(x.unflatten(1, (4, 32)), head, head, *tables, targets, 1), a
    yield (
        "qk_norm_rope cos",
        lambda c: lk.qk_norm_rope(a.unflatten(1, (4, 32)), head, head, c, tables[1], targets, 1),
        tables[0],
    )
    yield "route", lambda x: lk.route(x, bias, None, 4, 2, 4)[0], routed


def grouped(tensors):
    return [t[None] for t in tensors]


def wgrad_of_columns(columns, scale, offsets):
    (dy, _), (x, x_scale) = columns
    return lk.grouped_wgrad(dy, x, offsets, None, False, scale, x_scale, True)


def wgrad_of_rows(rows, scale, offsets):
    return lk.grouped_wgrad(rows[0], rows[0], offsets, None, False, scale, rows[1])


def gradient(fn, x, dy):
    x = x.detach().requires_grad_()
    return torch.autograd.grad(fn(x), x, dy)


def main():
    torch.manual_seed(0)
    for name, call, x, copy in cases():
        print(name, flush=True)
        near = x.contiguous() if isinstance(x, torch.Tensor) else x
        results = []
        for operand in (copy(near), near):  # a call may write into its operand
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
