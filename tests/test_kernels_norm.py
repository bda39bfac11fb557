"""Kernels of norms, rope and losses beyond cases.py: rounding, loops, NaN and inf, unusual calls."""

import sys

import pytest
import torch

from ling_kernels import cross_entropy, linear_cross_entropy, op, rms_norm
from ling_kernels.backend import force
from ling_kernels.ops.rms_norm import rms_norm_ref
from tests.cases import CASES, DEVICE, Rand, args_of, qk_norm_rope_args, runs
from tests.test_ops import outputs_and_grads, same_bits

pytestmark = pytest.mark.skipif(not runs("triton"), reason="triton cannot run here")
BF16, FP32 = torch.bfloat16, torch.float32
FILES = ("linear_cross_entropy", "qk_norm_rope", "rms_norm")
linear_cross_entropy_file, qk_norm_rope_file, rms_norm_file = (sys.modules[f"ling_kernels.ops.{n}"] for n in FILES)


def share_equal(got, want):
    """The share of equal elements: a last bit of the norm may change the rounding of a few."""
    return [(g == w).float().mean().item() for g, w in zip(got, want, strict=True)]


def test_rms_norm_norms_the_rounded_sum():
    rand = Rand(BF16)
    x, w, residual = rand.data(64, 256), rand.data(256), rand.data(64, 256) * 100
    with force("triton"):
        y, total = rms_norm(x, w, residual, 0.1)
    assert torch.equal(total, x + residual)
    unrounded = rms_norm_ref(x.float() + residual.float(), w.float(), None, 0.1).to(BF16)
    equal, unequal = share_equal([y, y], [rms_norm_ref(total, w, None, 0.1), unrounded])
    assert equal > 0.99 and unequal < 0.9


def test_rows_too_wide_for_the_kernels_are_reported():
    """The eager reference never replaces a kernel silently."""
    x, w = Rand(BF16).data(2, rms_norm_file.MAX_N + 8), Rand(BF16).data(rms_norm_file.MAX_N + 8)
    op._reported.clear()
    with force("triton"), pytest.warns(UserWarning, match="rms_norm: .* rows of 8200 columns.*; the eager torch"):
        y = rms_norm(x, w)
    assert torch.equal(y, rms_norm_ref(x, w))
    with force("triton"):
        (choice,) = op.explain(rms_norm, x, w)
    assert choice.implementation == "torch" and "8200" in choice.reason


@pytest.mark.parametrize("programs", [1, 2])
@pytest.mark.parametrize("name", ["rms_norm", "qk_norm_rope"])
def test_backward_programs_take_several_blocks(monkeypatch, name, programs):
    """A program of the backward kernels has every n-th block of rows; with the shapes of cases.py it has only one."""
    file = {"rms_norm": rms_norm_file, "qk_norm_rope": qk_norm_rope_file}[name]
    case = next(c for c in CASES if c.name == name)
    args = args_of(case, dict(M=37, N=512) if name == "rms_norm" else dict(T=37, Hq=16, Hkv=4, D=128, R=64), FP32)
    with force("triton"):
        monkeypatch.setattr(file, "PROGRAMS", programs)
        got = outputs_and_grads(case, case.op, args)
    for g, w in zip(got, outputs_and_grads(case, case.ref, args), strict=True):
        torch.testing.assert_close(g, w, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("used", ["y", "sum"])
def test_rms_norm_backward_with_one_result_used(used):
    def run(backend):
        rand = Rand(FP32)
        x, w, residual = rand(2, 5, 96), rand(96), rand(2, 5, 96)
        with force(backend):
            y, total = rms_norm(x.transpose(0, 1), w, residual.transpose(0, 1), 0.1)
            return torch.autograd.grad((y if used == "y" else total).pow(3).sum(), (x, w, residual), allow_unused=True)

    for g, want in zip(run("triton"), run("torch"), strict=True):
        torch.testing.assert_close(g, torch.zeros_like(g) if want is None else want, rtol=1e-4, atol=1e-4)


def test_nan_and_inf_stay_visible_in_fp8():
    rand = Rand(FP32)
    x, w = rand.data(130, 256), rand.data(256)
    x[0, 5], x[1, 200], x[129, 0] = float("nan"), float("inf"), float("-inf")
    with force("triton"):
        got = rms_norm(x, w, None, 0.1, quantize=True, columns=True)
    want = rms_norm_ref(x, w, None, 0.1, quantize=True, columns=True)
    for g, t in zip(got, want, strict=True):
        assert torch.equal(g.float().isnan(), t.float().isnan()) and g.float().isnan().any()


def test_a_position_past_the_table_is_nan_and_a_slot_past_the_cache_is_not_written():
    rand = Rand(FP32)
    args = list(qk_norm_rope_args(rand, 5, Hq=2, Hkv=1, D=8, R=4, P=9, cache=4))
    args[:3] = (a.detach() for a in args[:3])
    positions, cache, slots = args[5], args[8], args[9]
    pages = len(cache.k)
    guarded = [torch.cat([c, torch.zeros_like(c[:1])]) for c in cache[:2]]  # stray writes would go to the added page
    positions[2], slots[3] = 9, pages * 4
    before = guarded[0].flatten(0, 1).clone()
    cache = [g[:pages] for g in guarded]
    q, k, _ = qk_norm_rope_file.qk_norm_rope_forward(*args[:5], positions, *args[6:8], *cache, slots)
    assert q[2, :, :4].isnan().all() and not q[2, :, 4:].isnan().any() and not q[[0, 1, 3, 4]].isnan().any()
    cells = guarded[0].flatten(0, 1)
    assert torch.equal(cells[slots[[0, 1, 4]]], k[[0, 1, 4]])
    others = [i for i in range(len(cells)) if i not in slots.tolist() or i == pages * 4]
    assert same_bits(cells[others], before[others])


def test_cross_entropy_of_rows_with_nothing_but_minus_inf_so_far():
    """The running maximum starts at -inf, and so may whole tiles of a masked vocabulary."""
    logits = torch.full((3, 9000), float("-inf"), device=DEVICE)
    logits[0, 8999], logits[1, :2], logits[2, 5000] = 3.0, 1.0, float("nan")
    targets = torch.tensor([8999, 1, 5], device=DEVICE)
    logits.requires_grad_()
    with force("triton"):
        loss = cross_entropy(logits, targets, reduction="none")
        (grad,) = torch.autograd.grad(loss[:2].sum(), logits)
    torch.testing.assert_close(loss[:2], torch.tensor([0.0, 0.6931472], device=DEVICE))
    assert loss[2].isnan()
    assert grad[0].eq(0).all() and grad[1, :2].tolist() == pytest.approx([0.5, -0.5])


@pytest.mark.parametrize("wanted", [(True, True), (True, False), (False, True), (False, False)])
def test_linear_cross_entropy_of_bf16_products_with_fp32_sums(monkeypatch, wanted):
    """The path of a GPU. On a CPU torch.mm lacks out_dtype, so a function with its documented meaning replaces it."""
    plain, calls = torch.mm, []

    def mm(a, b, *, out_dtype):
        assert a.dtype == b.dtype == BF16 and out_dtype == FP32
        calls.append(len(a))
        return plain(a.float(), b.float())

    rand = Rand(BF16)
    x, w = ((rand.data(37, 24) / 4).requires_grad_(wanted[0]), rand.data(100, 24).requires_grad_(wanted[1]))
    targets = rand.ints(0, 100, 37, dtype=torch.int64).masked_fill(rand.bools(37, p=0.2), -7)
    leaves = [t for t in (x, w) if t.requires_grad]
    assert linear_cross_entropy_file.mm_gives_fp32(x) == x.is_cuda
    if not x.is_cuda:
        monkeypatch.setattr(linear_cross_entropy_file, "mm_gives_fp32", lambda x: True)
        monkeypatch.setattr(torch, "mm", mm)
    with force("triton"):
        loss = linear_cross_entropy(x, w, targets, -7, chunk=16)
        got = torch.autograd.grad(loss, leaves) if leaves else ()
    if not x.is_cuda:
        assert len(calls) == 3 * (1 + sum(wanted))
    true = linear_cross_entropy_file.linear_cross_entropy_ref(x.double(), w.double(), targets, -7)
    torch.testing.assert_close(loss.double(), true, rtol=1e-5, atol=0)
    for g, t in zip(got, torch.autograd.grad(true, leaves) if leaves else (), strict=True):
        assert g.dtype == BF16 and (g - t).norm() < 2**-7 * t.norm()
