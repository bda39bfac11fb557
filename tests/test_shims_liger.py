"""Liger's names over our ops, against torch in fp64."""

import pytest
import torch

from ling_kernels import InputError, backend
from ling_kernels.integrations.liger import LigerFusedLinearCrossEntropyLoss, LigerRMSNorm, LigerSiLUMulFunction
from tests.cases import BF16, FP32, Rand

BACKENDS = ("torch", "triton", "cuda")


def close(got, want, dtype) -> None:
    limit = 2**-7 if dtype == BF16 else 1e-5
    assert got.dtype == dtype and torch.isfinite(got).all()
    assert ((got.double() - want).abs() <= limit * (want.abs() + want.abs().max() / 4)).all()


def wide(*tensors):
    return [t.detach().double().requires_grad_() for t in tensors]


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("dtype", [BF16, FP32])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_linear_cross_entropy(name, dtype, reduction):
    rand = Rand(dtype)
    x, w, target = rand(13, 32), rand(50, 32), rand.ints(0, 50, 13, dtype=torch.int64)
    target[[2, 7]] = 3 - 10
    scale = 3.0 if reduction != "none" else torch.arange(1.0, 14.0)
    with backend.force(name):
        loss = LigerFusedLinearCrossEntropyLoss(ignore_index=-7, reduction=reduction, accum_dtype=FP32)(w, x, target)
        (loss * scale).sum().backward()
    x64, w64 = wide(x, w)
    logits = x64 @ w64.T
    want = torch.nn.functional.cross_entropy(logits, target, ignore_index=-7, reduction=reduction)
    (want * scale).sum().backward()
    close(loss, want.detach(), FP32)
    close(x.grad, x64.grad, dtype)
    close(w.grad, w64.grad, dtype)


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("dtype", [BF16, FP32])
def test_rms_norm(name, dtype):
    rand = Rand(dtype)
    norm = LigerRMSNorm(40, eps=0.1, init_fn="zeros").to(dtype)
    assert not norm.weight.any() and list(norm.state_dict()) == ["weight"] and LigerRMSNorm(40).weight.eq(1).all()
    norm.weight.data.copy_(rand.data(40))
    x, dy = rand(2, 9, 40), rand.data(2, 9, 40)
    with backend.force(name):
        y = norm(x)
        y.backward(dy)
    x64, w64 = wide(x, norm.weight)
    want = x64 / (x64.square().mean(-1, keepdim=True) + 0.1).sqrt() * w64
    want.backward(dy.double())
    close(y, want.detach(), dtype)
    close(x.grad, x64.grad, dtype)
    close(norm.weight.grad, w64.grad, dtype)


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("dtype", [BF16, FP32])
def test_silu_mul(name, dtype):
    rand = Rand(dtype)
    a, b, dy = rand(3, 5, 24), rand(3, 5, 24), rand.data(3, 5, 24)
    with backend.force(name):
        y = LigerSiLUMulFunction.apply(a, b)
        y.backward(dy)
    a64, b64 = wide(a, b)
    want = a64 * a64.sigmoid() * b64
    want.backward(dy.double())
    for got, expected in ((y, want.detach()), (a.grad, a64.grad), (b.grad, b64.grad)):
        close(got, expected, dtype)


@pytest.mark.parametrize(
    "name, value",
    [("ce_weight", torch.ones(3)), ("lse_square_scale", 1e-4), ("label_smoothing", 0.1), ("softcap", 30.0),
     ("return_z_loss", True), ("accum_dtype", BF16), ("use_token_scaling", True), ("return_token_accuracy", True),
     ("return_predicted_tokens", True), ("reduction", "max")],
)  # fmt: skip
def test_losses_refuse(name, value):
    with pytest.raises(InputError, match=name):
        LigerFusedLinearCrossEntropyLoss(**{name: value})


def test_refused():
    x = torch.ones(2, 4)
    for call, match in (
        (lambda: LigerFusedLinearCrossEntropyLoss()(x, x, torch.zeros(2, dtype=torch.int64), x[0]), "bias"),
        (lambda: LigerRMSNorm(4, offset=1.0), "offset"),
        (lambda: LigerRMSNorm(4, casting_mode="none"), "casting_mode"),
        (lambda: LigerRMSNorm(4, elementwise_affine=False), "has a weight"),
        (lambda: LigerSiLUMulFunction.apply(x, x, 2.0), "gate_multiplier"),
        (lambda: LigerSiLUMulFunction.apply(x, x, 1.0, 2.0), "down_multiplier"),
    ):
        with pytest.raises(InputError, match=match):
            call()
    with pytest.raises(ValueError, match="of one dtype"):
        LigerSiLUMulFunction.apply(x, x.to(BF16))
