"""What the table leaves out of SwiGLU's gradient: its formula, and the exact bits of its FP8."""

import pytest
import torch

from ling_kernels.backend import force
from ling_kernels.ops.dispatch import dispatch_ref
from ling_kernels.ops.quantize import quantize_ref
from ling_kernels.ops.swiglu import swiglu, swiglu_backward, swiglu_backward_ref, swiglu_fwd, swiglu_ref
from tests.cases import Rand, counts_of, plan_of, poison, runs
from tests.test_ops import same_bits


@pytest.mark.parametrize("weighted", [False, True])
def test_the_formula_is_autograds(weighted):
    rand = Rand(torch.float64)
    dy, x, weights = rand.data(5, 3), rand(5, 6), rand(5) if weighted else None
    leaves = [x, weights] if weighted else [x]
    want = torch.autograd.grad(swiglu_ref(x, weights), leaves, dy)
    got = swiglu_backward_ref(dy, x, weights)
    assert weighted or got[1] is None
    for g, w in zip(got, want, strict=False):
        torch.testing.assert_close(g, w)


@pytest.mark.skipif(not runs("triton"), reason="triton cannot run here")
@pytest.mark.parametrize("pow2", [False, True])
@pytest.mark.parametrize("planned", [False, True])
def test_fp8_is_of_the_gradient_before_it_is_rounded(planned, pow2):
    """The kernel's fp32 dx of the same values, quantised by the reference, bit for bit."""
    rand = Rand(torch.bfloat16)
    plan = plan_of(rand, 67, 4, 2, "masked") if planned else None
    dy, x, weights = rand.data(134, 256), rand.data(134, 512), rand.data(134).float()
    if planned:
        dy, x = poison(dy, plan.offsets), poison(x, plan.offsets)
    with force("triton"):
        dx, dweights = swiglu_backward(dy.float(), x.float(), weights)
        got, same_dweights = swiglu_backward(dy, x, weights, True, True, plan, pow2)
    rows, columns = (plan.offsets[-1], plan.padded_offsets[-1]) if planned else (134, 256)
    want = quantize_ref(dx, True, True, plan, pow2)
    for i, (g, w) in enumerate(zip(got, want, strict=True)):
        assert g.stride() == w.stride()
        g, w = (t[:rows] if i < 2 else t[:, : columns // (1, 128)[i - 2]] for t in (g, w))
        assert same_bits(g.contiguous(), w.contiguous()), i
    torch.testing.assert_close(same_dweights[:rows], dweights[:rows])


@pytest.mark.parametrize("backend", [b for b in ("triton", "cuda") if runs(b)])
def test_rows_of_no_expert_are_not_computed(backend):
    """They may be most of a buffer that is made for the worst case: a row in 8 has an expert here."""
    rand = Rand(torch.bfloat16)
    experts = rand.ints(0, 4, 200, 1).masked_fill(rand.data(200, 1) < 1.15, -1)
    plan = dispatch_ref(experts, counts_of(experts, 4))
    end, x, weights = int(plan.offsets[-1]), poison(rand.data(200, 256), plan.offsets), rand.data(200).float()
    assert 10 < end < 50
    y = torch.full_like(x[:, :128], 7)
    with force(backend):
        swiglu_fwd(x, weights, y, None, None, None, None, plan.offsets, None, False)
        got = [swiglu(x, weights, plan=plan), *swiglu(x, weights, True, plan=plan)]
    assert (y[end:] == 7).all() and same_bits(y[:end], got[0][:end])
    want = [swiglu_ref(x, weights), *swiglu_ref(x, weights, True)]
    for g, w in zip(got, want, strict=True):
        rtol = 0.13 if g.dtype == torch.float8_e4m3fn else 0.01  # codes may be neighbours
        torch.testing.assert_close(g[:end].float(), w[:end].float(), rtol=rtol, atol=1e-5)


@pytest.mark.skipif(not runs("triton"), reason="triton cannot run here")
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_nan_and_inf_stay_visible(bad):
    rand = Rand(torch.bfloat16)
    dy, x = rand.data(3, 128), rand.data(3, 256)
    dy[1, 5] = bad
    with force("triton"):
        (dx_q, dx_scale), _ = swiglu_backward(dy, x, quantize=True)
    assert not dx_scale[1].isfinite().any() and dx_scale[::2].isfinite().all() and dx_q[1].float().isnan().any()
