"""op.py: which kernel runs, what tells so, and what autograd learns of a launch."""

import dataclasses
import warnings

import pytest
import torch

import ling_kernels as lk
from ling_kernels import backend as backends
from ling_kernels import op as ops
from ling_kernels.backend import force
from ling_kernels.model import Ling, LingConfig
from ling_kernels.nn.fp8 import Fp8Linear
from ling_kernels.op import Choice, report_fallback, rows_aligned
from ling_kernels.ops.adamw_8bit import adamw_8bit_state
from ling_kernels.plan import kernels
from tests.cases import CASES, args_of, runs

MINI = LingConfig.mini()
needs_triton = pytest.mark.skipif(not runs("triton"), reason="triton cannot run here")
needs_cuda = pytest.mark.skipif(not runs("cuda"), reason="csrc/ does not run here")


@pytest.fixture(autouse=True)
def nothing_reported():
    ops._reported.clear()


def route_args(E=256, dtype=torch.float32):
    logits, bias = torch.randn(3, E, dtype=dtype, requires_grad=True), torch.randn(E, dtype=dtype)
    return logits, bias, None, 8, 4, 8, 2.5  # sizes that csrc/ is compiled for, where E is 256


def test_explain_on_a_cpu():
    (choice,) = lk.explain(lk.route, *route_args())
    assert choice == Choice("route", "torch", "the tensors are on the CPU")


def test_explain_names_every_launch_and_the_reason():
    with force("cuda"):
        assert [str(c) for c in lk.explain(lk.route, *route_args())] == ["route_fwd: cuda", "route_bwd: cuda"]
        (forward, backward) = lk.explain(lk.route, *route_args(64))
        assert forward.implementation == "triton" and forward.reason.startswith(
            "csrc/ does not support 64 experts in 8 groups"
        )
        assert backward.implementation == "cuda"
        (choice,) = lk.explain(lk.route, *route_args(dtype=torch.float64))
        assert choice == Choice("route", "torch", "no kernel supports float64")
    with force("triton"):
        assert {c.reason for c in lk.explain(lk.route, *route_args())} == {"LING_BACKEND is triton"}


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_explain_shows_a_decision_for_every_op(case):
    args = args_of(case, case.shapes[-2], case.dtypes[0])
    for name in ("torch", "triton", "cuda"):
        with force(name):
            choices = lk.explain(case.op, *args, **case.kwargs)
        allowed = {"torch"} if name == "torch" else {"torch", "triton"} if name == "triton" else {*backends.BACKENDS}
        assert choices and {c.implementation for c in choices} <= allowed
        assert all(c.reason for c in choices if c.implementation != "cuda")


def test_explain_with_a_non_leaf_argument():
    logits = torch.randn(3, 8, requires_grad=True) * 2
    with force("triton"):
        choices = lk.explain(lk.cross_entropy, logits, torch.tensor([1, 2, 3]))
    assert [c.name for c in choices] == ["cross_entropy_fwd", "cross_entropy_bwd"]


def test_explain_changes_nothing():
    bias, counts = torch.zeros(8), torch.arange(8, dtype=torch.int32)
    for name in ("torch", "triton", "cuda"):
        with force(name):
            assert len(lk.explain(lk.balance_bias_, bias, counts, 0.1)) == 1
    assert not bias.any()


@pytest.mark.parametrize("kept", [False, True])
def test_explain_leaves_a_module_as_it_was(kept):
    """No gradient, no cached FP8 weight and no hook of a real parameter sees the tensors without values."""
    layer = Fp8Linear(128, 128, **(dict(weights="kept", transposed="kept") if kept else {}))
    x, seen = torch.randn(4, 128), []
    layer.weight.register_post_accumulate_grad_hook(seen.append)
    assert lk.explain(layer, x)
    assert layer.weight.grad is None and not seen
    with torch.no_grad():
        first = layer(x)
        layer.weight.mul_(2)
        lk.explain(layer, x)
        second = layer(x)
    assert type(first) is type(second) is torch.Tensor and torch.equal(second, Fp8Linear.of(layer)(x).detach())
    assert (second.norm() / first.norm()).item() == pytest.approx(2, rel=0.01)
    layer(x).sum().backward()
    assert type(layer.weight.grad) is torch.Tensor and len(seen) == 1


def test_explain_opens_a_models_output():
    model, ids = Ling(LingConfig.tiny()), torch.zeros(1, 8, dtype=torch.int64)
    with force("triton"):
        names = [c.name for c in lk.explain(model, ids, labels=ids)]
    assert "rms_norm_bwd" in names and all(p.grad is None for p in model.parameters())


@needs_cuda
def test_explain_under_ling_backend_cuda(monkeypatch):
    monkeypatch.setattr(backends, "_forced", "cuda")
    monkeypatch.setattr(backends, "_strict", True)
    assert [c.implementation for c in lk.explain(lk.route, *route_args(64))] == ["refused", "cuda"]
    assert [c.implementation for c in lk.explain(lk.route, *route_args(dtype=torch.float64))] == ["refused"]


@needs_triton
@needs_cuda
def test_a_fallback_is_reported_once(monkeypatch):
    with force("cuda"):
        with pytest.warns(UserWarning, match="route_fwd: csrc/ does not support 64 experts in 8 groups") as seen:
            want = lk.route(*route_args(64))
        assert len(seen) == 1 and len(want) == 3
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            lk.route(*route_args(64))
            lk.route(*route_args(256))


@needs_cuda
def test_ling_backend_cuda_refuses_unsupported_arguments(monkeypatch):
    monkeypatch.setattr(backends, "_forced", "cuda")
    monkeypatch.setattr(backends, "_strict", True)
    lk.route(*route_args(256))
    with pytest.raises(ValueError, match="LING_BACKEND=cuda: route_fwd: csrc/ does not support 64 experts in 8 groups"):
        lk.route(*route_args(64))
    with pytest.raises(ValueError, match="LING_BACKEND=cuda: route: no kernel supports float64"):
        lk.route(*route_args(dtype=torch.float64))


@pytest.mark.parametrize("name", ["torch", *(pytest.param(b, marks=m) for b, m in (("triton", needs_triton),))])
def test_a_step_between_forward_and_backward_raises(name):
    """A weight that a backward needs was changed by a launcher: torch's error instead of a wrong gradient."""
    w, x = torch.randn(256, 256, requires_grad=True), torch.randn(2, 256, requires_grad=True)
    state = adamw_8bit_state([w])
    with force(name):
        y = x @ w
        lk.adamw_8bit([w], [torch.randn_like(w)], state, 0.1, (0.9, 0.95), 1e-8, 0.0, 1)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            y.sum().backward()


@pytest.mark.parametrize("name", ["torch", *(pytest.param(b, marks=m) for b, m in (("triton", needs_triton),))])
def test_a_cache_knows_a_launchers_write(name):
    linear = Fp8Linear(128, 128, weights="kept")
    x, state = torch.randn(4, 128), adamw_8bit_state([linear.weight])
    with force(name), torch.no_grad():
        before = linear(x)
        lk.adamw_8bit([linear.weight], [torch.randn(128, 128)], state, 0.1, (0.9, 0.95), 1e-8, 0.0, 1)
        after, fresh = linear(x), Fp8Linear.of(linear)(x)
    assert torch.equal(after, fresh) and (after - before).abs().max() > 0.1


@needs_triton
def test_a_launcher_keeps_the_version_of_its_inputs():
    bias, counts = torch.zeros(8), torch.arange(8, dtype=torch.int32)
    with force("triton"):
        lk.balance_bias_(bias, counts, 0.1)
        with torch.inference_mode():
            lk.balance_bias_(torch.zeros(8), counts, 0.1)  # inference tensors have no version
    assert bias._version == 1 and counts._version == 0


def test_rows_aligned():
    x = torch.randn(4, 64)
    assert rows_aligned(x, None, x[1:], x[:, :5], x[:1, 4:])
    assert not rows_aligned(x[:, 1:]) and not rows_aligned(x.T) and not rows_aligned(torch.randn(4, 5))
    assert rows_aligned(torch.randn(1, 5))  # one row has no stride


def test_reports_name_the_op():
    with pytest.warns(UserWarning, match="^some_op: a reason; Triton runs$"):
        report_fallback("some_op", "a reason", "Triton runs")


@needs_cuda
def test_a_new_size_is_named():
    """Sizes that csrc/ lacks show as launches of another backend, with the reason, and as more launches in decode."""
    supported, other = (kernels.model_kernels(c) for c in (MINI, dataclasses.replace(MINI, num_experts=64)))
    assert all(c.implementation == "cuda" for c in supported["decode layer, FP8"])
    assert [c.name for c in other["training, bf16"] if c not in supported["training, bf16"]] == ["route_fwd"]
    assert len(other["decode layer, FP8"]) > len(supported["decode layer, FP8"])
    text = "\n".join(kernels.lines(dataclasses.replace(MINI, num_experts=64)))
    assert "route_fwd: triton (csrc/ does not support 64 experts in 8 groups" in text
    assert "more than with sizes that csrc/ supports" in text
    assert "does not support" not in "\n".join(kernels.lines(MINI))
