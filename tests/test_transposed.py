"""nn.Transposed: how long a transposed FP8 weight lives, what memory it takes, and that it is never an old one."""

import gc

import pytest
import torch

from ling_kernels import quantize_weight
from ling_kernels.model import LingConfig
from ling_kernels.nn import Transposed
from ling_kernels.nn.transposed import KEEP
from ling_kernels.ops.transpose_fp8 import transpose_fp8_ref

N, K = 256, 384


def kept_bytes() -> int:
    """Of all e4m3 storages that somebody holds."""
    gc.collect()
    held = [t for t in gc.get_objects() if type(t) is torch.Tensor and t.dtype == torch.float8_e4m3fn]
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in held}.values())


class Linear(torch.autograd.Function):
    """x w^T over an FP8 weight; its backward reads the transposed weight and notes which tensors are held then."""

    @staticmethod
    def forward(ctx, x, w, transposed, seen):
        w_q, w_scale = quantize_weight(w)
        ctx.save_for_backward(w_q, w_scale)
        ctx.rest = transposed, seen, w._version
        scale = w_scale.repeat_interleave(128, 0).repeat_interleave(128, 1)
        return x @ (w_q.float() * scale).T

    @staticmethod
    def backward(ctx, dy):
        transposed, seen, version = ctx.rest
        wt_q, wt_scale = transposed(*ctx.saved_tensors, version)
        seen.append((kept_bytes(), wt_q.data_ptr()))
        return dy @ (wt_q.float() * wt_scale.repeat_interleave(128, 0).repeat_interleave(128, 1)).T, None, None, None


@pytest.mark.parametrize("keep", KEEP)
def test_memory(keep):
    before = kept_bytes()
    w, transposed, seen = torch.nn.Parameter(torch.randn(N, K)), Transposed(keep), []
    weight = N * K  # bytes of the FP8 weight, which the graph holds until its backward
    for _step in range(2):
        for _micro_batch in range(2):
            x = torch.randn(3, K, requires_grad=True)
            y = Linear.apply(x, w, transposed, seen)
            holds = weight if keep != "on_demand" and seen else 0
            assert kept_bytes() - before == weight + holds  # between forward and backward
            y.sum().backward()
            w_q, w_scale = quantize_weight(w)
            want = torch.ones(3, N) @ (w_q.float() * w_scale.repeat_interleave(128, 0).repeat_interleave(128, 1))
            torch.testing.assert_close(x.grad, want, rtol=1e-4, atol=1e-4)
            del w_q, y
        with torch.no_grad():
            w.mul_(-0.5)
    assert [b - before for b, _ in seen] == [2 * weight] * 4  # the weight and its transpose, in a backward
    assert kept_bytes() - before == (0 if keep == "on_demand" else weight)
    if keep == "kept":
        assert len({address for _, address in seen}) == 1
    del transposed
    assert kept_bytes() == before


@pytest.mark.parametrize("keep", KEEP)
@pytest.mark.parametrize("shape", [(N, K), (3, 128, 256)])
def test_is_never_an_old_one(keep, shape):
    transposed = Transposed(keep)
    w_q, w_scale = quantize_weight(torch.randn(shape))

    def check(*version):
        for got, want in zip(transposed(w_q, w_scale, *version), transpose_fp8_ref(w_q, w_scale), strict=True):
            assert torch.equal(got.float(), want.float())

    check()
    check()
    w_q.copy_(quantize_weight(torch.randn(shape))[0])  # changed in place
    check()
    for _ in range(3):  # another tensor, perhaps where the last one lay
        del w_q
        w_q, w_scale = quantize_weight(torch.randn(shape))
        check()
    check(7)
    w_q, w_scale = quantize_weight(torch.randn(shape))
    check(8)


@pytest.mark.parametrize("keep", KEEP[1:])
def test_is_made_once_for_a_version(keep):
    transposed, weight = Transposed(keep), quantize_weight(torch.randn(N, K))
    assert transposed(*weight)[0] is transposed(*weight)[0]
    first = transposed(*weight, 1)
    assert transposed(*quantize_weight(torch.randn(N, K)), 1)[0] is first[0]  # the caller says it is the same weight


def test_keep_is_one_of_two():
    with pytest.raises(ValueError, match="on_demand, kept"):
        Transposed("always")


def test_figures_of_the_docstring():
    c = LingConfig.mini()
    layers = c.num_hidden_layers - c.first_k_dense_replace
    expert = 3 * c.hidden_size * c.moe_intermediate_size
    assert round(layers * c.num_experts * expert / 1e9, 1) == 15.3
    assert round(c.num_experts * 2 * c.hidden_size * c.moe_intermediate_size / 1e9, 2) == 0.54
