"""csrc/ bound by Python's limited API does what it does bound by pybind11: on the virtual GPU."""

import pytest
import torch

from ling_kernels import backend
from ling_kernels.ops import quantize, rms_norm, route, swiglu
from tests.gpu import build

pytestmark = pytest.mark.skipif(
    torch.cuda.is_available() or bool(build.missing()), reason="needs nvcc, and no GPU: the virtual GPU stands for one"
)


@pytest.fixture
def modules():
    return build.load_now("_C", ""), build.load_now("_C_limited", "")


def test_the_functions_are_the_same(modules):
    ours, limited = ([n for n in dir(m) if not n.startswith("__")] for m in modules)
    assert ours == limited and "moe_decode_fits" in ours


def results(module, monkeypatch):
    """Ops with tensors of every dtype, None, ints, floats and bools."""
    monkeypatch.setattr(backend, "_C", module)
    generator = torch.Generator().manual_seed(0)

    def rand(*shape):
        return torch.randn(*shape, generator=generator)

    x, w = rand(37, 256).bfloat16().requires_grad_(), rand(256).bfloat16().requires_grad_()
    with backend.force("cuda"):
        y = rms_norm(x, w, eps=1e-3)
        y.float().square().sum().backward()
        routed = route(rand(33, 16), rand(16) / 8, num_groups=4, group_topk=2, topk=4, scale=2.5)
        return [y, x.grad, w.grad, *quantize(rand(40, 256).bfloat16()), *routed, swiglu(rand(8, 64).bfloat16())]


def test_the_results_are_the_same(modules, monkeypatch):
    ours, limited = (results(m, monkeypatch) for m in modules)
    assert len(ours) == len(limited) > 7
    for a, b in zip(ours, limited, strict=True):
        assert a.dtype == b.dtype and torch.equal(a.float(), b.float())
    assert any(a.dtype == torch.float8_e4m3fn for a in ours)


W = torch.ones(128, 128)


@pytest.mark.parametrize(
    "name, args, error",
    [
        ("quantize_weight_fwd", (W, W, W), TypeError),  # too few
        ("quantize_weight_fwd", ("x", W, W, True), None),
        ("quantize_weight_fwd", (W.to(torch.complex64), W, W, True), None),
        ("quantize_weight_fwd", (torch.ones(1, 1, 1, 1, 1, 1), W, W, True), ValueError),
        ("quantize_weight_fwd", (W[:, :3], W, W, True), ValueError),
        ("moe_decode_fits", (1, 2, 3, 4, 5, True, 7), TypeError),  # too many
        ("moe_decode_fits", (1, 2, 3, 4, "5", True), TypeError),
        ("moe_decode_fits", (1, 2, 3, 4, 1.5, True), TypeError),
    ],
)
def test_the_errors_are_the_same(modules, name, args, error):
    """error None: whatever torch raises for something that is no tensor."""
    caught = []
    for module in modules:
        with pytest.raises(Exception) as info:
            getattr(module, name)(*args)
        caught.append(info.value)
    ours, limited = caught
    assert type(ours) is type(limited) and (error is None or type(limited) is error), caught
    assert error is TypeError or str(ours) == str(limited)


def test_functions_without_tensors(modules):
    sizes = [(T, 2048, 512, 512, 8, fp8) for T in (1, 64, 1000) for fp8 in (False, True)]
    ours, limited = ([m.moe_decode_fits(*s) for s in sizes] for m in modules)
    assert ours == limited and {*map(type, limited)} == {bool} and {*limited} == {False, True}
