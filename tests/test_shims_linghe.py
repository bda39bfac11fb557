"""linghe's names over our ops, against its documented behaviour in fp64."""

import pytest
import torch

from ling_kernels import InputError, backend
from ling_kernels.integrations.linghe import (
    fp32_gemm,
    group_topk_score,
    qk_norm_half_rope,
    rms_norm,
    softmax_cross_entropy,
)
from tests.cases import BF16, FP32, Rand
from tests.test_shims_liger import BACKENDS, close, wide
from tests.test_shims_transformer_engine import reference_topk


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("shape", [(11, 16), (3, 4, 16)])
def test_group_topk_score(name, shape):
    rand = Rand(FP32)
    x, bias = rand(*shape), rand.data(16)
    with backend.force(name):
        probs, routed, counts = group_topk_score(x, 4, bias, num_groups=4, group_topk=2, scaling_factor=2.5)
        dprobs = rand.data(*shape)
        probs.backward(dprobs)
    (x64,) = wide(x)
    want, chosen = reference_topk(x64.view(-1, 16), 4, 4, 2, 2.5, bias.double())
    want.view(shape).backward(dprobs.double())
    assert torch.equal(routed, chosen.view(shape)) and torch.equal(counts, routed.sum(0))
    close(probs, want.detach().view(shape), FP32)
    close(x.grad, x64.grad, FP32)


def angles(positions: int, D: int) -> torch.Tensor:
    half = torch.outer(torch.arange(positions), 100.0 ** -torch.arange(0, 1, 4 / D))
    return torch.cat([half, half], -1)


def reference_qkv(qkv, qw, kw, freqs, H, h, eps):
    """qkv [N, dim] of rows whose angles are freqs [N, D / 2], by loops over heads."""
    D = len(qw)
    q, k, v = [], [], []
    for group in qkv.view(len(qkv), h, H // h + 2, D).unbind(1):
        heads = group.unbind(1)
        q += [rotated(x, qw, freqs, eps) for x in heads[:-2]]
        k.append(rotated(heads[-2], kw, freqs, eps))
        v.append(heads[-1])
    return [torch.stack(of, 1) for of in (q, k, v)]


def rotated(x, w, freqs, eps):
    x = x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * w
    turned, rest = x.chunk(2, -1)
    a, b = turned.chunk(2, -1)
    return torch.cat([turned * freqs.cos() + torch.cat([-b, a], -1) * freqs.sin(), rest], -1)


def check_qkv(name, dtype, qkv, order, freqs, call, H, h, D):
    """order: the reference's rows [N, dim] -> the layout of call's results, [..., heads, D]."""
    rand = Rand(dtype, seed=2)
    qw, kw = rand(D), rand(D)
    with backend.force(name):
        out = call(qkv, qw, kw)
        grads = [rand.data(*t.shape) for t in out]
        torch.autograd.backward(out, grads)
    x64, qw64, kw64 = wide(qkv, qw, kw)
    want = [order(t) for t in reference_qkv(x64.flatten(0, -2), qw64, kw64, freqs.double(), H, h, 0.1)]
    torch.autograd.backward(want, [g.double() for g in grads])
    for got, expected in zip(out, want, strict=True):
        assert got.shape == expected.shape
        close(got, expected.detach(), dtype)
    for got, expected in ((qkv.grad, x64.grad), (qw.grad, qw64.grad), (kw.grad, kw64.grad)):
        close(got, expected, dtype)


@pytest.mark.parametrize(
    "name, dtype, H, h, D",
    [("torch", BF16, 4, 2, 128), ("cuda", BF16, 4, 2, 128), ("triton", FP32, 6, 3, 16), ("torch", FP32, 2, 1, 16)],
)
def test_qk_norm_half_rope(name, dtype, H, h, D):
    S, B = 5, 2
    qkv, freqs = Rand(dtype)(S, B, (H + 2 * h) * D), angles(S, D)

    def call(qkv, qw, kw):
        return qk_norm_half_rope(qkv, qw, kw, freqs[:, None, None], H=H, h=h, eps=0.1)

    order = lambda t: t.view(S, B, -1, D).transpose(0, 1)  # noqa: E731
    check_qkv(name, dtype, qkv, order, freqs.repeat_interleave(B, 0), call, H, h, D)


@pytest.mark.parametrize("size, rank", [(1, 0), (2, 0), (2, 1)])
def test_packed_qk_norm_half_rope(size, rank):
    H, h, D, lengths = 4, 2, 16, [8, 4, 12]
    cu = torch.tensor([0, 8, 12, 24], dtype=torch.int32)
    positions = []
    for length in lengths:  # chunks rank and 2 size - 1 - rank of each sequence
        chunks = torch.arange(length).chunk(2 * size)
        positions += [chunks[rank], chunks[2 * size - 1 - rank]] if size > 1 else [torch.arange(length)]
    positions = torch.cat(positions)
    qkv, freqs = Rand(FP32)(len(positions), (H + 2 * h) * D), angles(12, D)

    def call(qkv, qw, kw):
        return qk_norm_half_rope(qkv, qw, kw, freqs, cu, cu.clone(), H, h, 0.1, rank, size)

    check_qkv("torch", FP32, qkv, lambda t: t, freqs[positions], call, H, h, D)


def test_mscale_scales_the_rotated_half():
    rand, cu = Rand(FP32), torch.tensor([0, 6], dtype=torch.int32)
    qkv, w, freqs = rand.data(6, 4 * 16), rand.data(16), angles(6, 16)
    plain, scaled = (qk_norm_half_rope(qkv, w, w, freqs, cu, H=2, h=1, mscale=m) for m in (1.0, 1.5))
    torch.testing.assert_close(scaled[0][..., :8], plain[0][..., :8] * 1.5)
    assert torch.equal(scaled[0][..., 8:], plain[0][..., 8:]) and torch.equal(scaled[2], plain[2])


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("dtype", [BF16, FP32])
@pytest.mark.parametrize("shape", [(12,), (3, 4)])
def test_softmax_cross_entropy(name, dtype, shape):
    rand = Rand(dtype)
    logits, labels, dloss = rand(*shape, 50), rand.ints(0, 50, *shape, dtype=torch.int64), rand.data(*shape, dtype=FP32)
    labels.view(-1)[[1, 5]] = -100
    with backend.force(name):
        loss = softmax_cross_entropy(logits, labels)
        loss.backward(dloss)
    (wide_logits,) = wide(logits)
    want = torch.nn.functional.cross_entropy(wide_logits.view(-1, 50), labels.view(-1), reduction="none").view(shape)
    want.backward(dloss.double())
    close(loss, want.detach(), FP32)
    close(logits.grad, wide_logits.grad, dtype)


@pytest.mark.parametrize("name", BACKENDS)
def test_products_and_norm(name):
    rand = Rand(BF16)
    x, router, w = rand(3, 4, 32), rand(16, 32), rand(32)
    with backend.force(name):
        logits, y = fp32_gemm(x, router), rms_norm(x, w, 0.1)
        torch.autograd.backward([logits, y], [torch.ones_like(logits), torch.ones_like(y)])
    x64, router64, w64 = wide(x, router, w)
    want, normed = x64 @ router64.T, x64 / (x64.square().mean(-1, keepdim=True) + 0.1).sqrt() * w64
    torch.autograd.backward([want, normed], [torch.ones_like(want), torch.ones_like(normed)])
    close(logits, want.detach(), FP32)
    close(y, normed.detach(), BF16)
    for got, expected in ((x.grad, x64.grad), (router.grad, router64.grad), (w.grad, w64.grad)):
        close(got, expected, BF16)


def test_refused():
    rand, cu = Rand(FP32), torch.tensor([0, 6], dtype=torch.int32)
    qkv, w, freqs, x = rand.data(6, 64), rand.data(16), angles(6, 16), rand.data(6, 16)
    rope = dict(qkv=qkv, q_norm_weight=w, k_norm_weight=w, freqs=freqs, cu_seqlens_q=cu, H=2, h=1)
    group = type("Group", (), {"size": lambda self: 2})()
    for call, match in (
        (lambda: group_topk_score(x, 4, score_function="softmax"), "score_function"),
        (lambda: group_topk_score(x, 4, num_groups=4, group_topk=4), "topk // group_topk is 1"),
        (lambda: qk_norm_half_rope(**rope, silu=True), "silu"),
        (lambda: qk_norm_half_rope(**rope, reuse=True), "reuse"),
        (lambda: qk_norm_half_rope(**rope | dict(cu_seqlens_q=None, qkv=qkv[:, None], mscale=2.0)), "mscale"),
        (lambda: softmax_cross_entropy(x, torch.zeros(6, dtype=torch.int64), inplace=True), "inplace"),
        (lambda: softmax_cross_entropy(x, torch.zeros(6, dtype=torch.int64), tp_group=group), "tp_group"),
    ):
        with pytest.raises(InputError, match=match):
            call()
    for call, match in (
        (
            lambda: qk_norm_half_rope(**rope | dict(freqs=torch.cat([freqs[:, :4], 2 * freqs[:, :4]], 1))),
            "equal halves",
        ),
        (lambda: qk_norm_half_rope(**rope | dict(freqs=freqs[:, :4])), r"freqs \[positions, 8\]"),
        (lambda: qk_norm_half_rope(**rope | dict(qkv=qkv[:, None])), "qkv"),
        (lambda: qk_norm_half_rope(**rope, cu_seqlens_kv=cu + 1), "cu_seqlens_kv"),
    ):
        with pytest.raises(ValueError, match=match):
            call()
