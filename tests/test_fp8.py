"""FP8 layers: their numbers against products of dequantised tensors, recompute levels, bytes kept, training."""

import copy
import io
from itertools import pairwise

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from ling_kernels.backend import force
from ling_kernels.nn import MLP, Experts
from ling_kernels.nn.fp8 import FP8_ROWS, TRANSPOSED, Fp8Experts, Fp8Linear, Fp8MLP
from ling_kernels.ops.quantize import dequantize, quantize_ref, quantize_weight_ref
from ling_kernels.ops.swiglu import swiglu_backward_ref, swiglu_ref
from tests.cases import DEVICE, Rand, plan_of, runs

BACKENDS = [b for b in ("torch", "triton", "cuda") if runs(b)]
T, H, F, E, TOPK = 75, 256, 128, 4, 2
TIGHT = 1e-3  # of the norm: fp32 sums in another order let one number in some thousands round to its other neighbour
LOOSE = 0.045  # of one product: e4m3 has 4 bits, each operand is 2.6 % off. Twice that after two of them


def rows(x, pow2=False):
    """What the GEMM sees of x [M, K]."""
    return dequantize(*quantize_ref(x, pow2=pow2))


def columns(x, pow2=False):
    """The same in blocks along the tokens, with the padding."""
    return dequantize(*quantize_ref(x, False, True, pow2=pow2)).T


def weight(w, pow2=False):
    return dequantize(*quantize_weight_ref(w, pow2))


def linear_ref(x, w, dy, pow2=False):
    y, dx = rows(x, pow2) @ weight(w, pow2).T, rows(dy, pow2) @ weight(w, pow2)
    return y, dx, columns(dy, pow2).T @ columns(x, pow2)


def swiglu_layer_ref(x, p, gate_up, down, dy):
    """One expert's rows -> y, dx, dp, d_gate_up, d_down."""
    h = rows(x) @ weight(gate_up).T
    a = swiglu_ref(h, p)
    dh, dp = swiglu_backward_ref(rows(dy) @ weight(down), h, p)
    return (rows(a) @ weight(down).T, rows(dh) @ weight(gate_up), dp,
            columns(dh).T @ columns(x), columns(dy).T @ columns(a))  # fmt: skip


def experts_ref(x, weights, plan, gate_up, down, dout):
    token, p = plan.source.long() // TOPK, weights.flatten()[plan.source.long()]
    parts = [swiglu_layer_ref(x[token[lo:hi]], p[lo:hi], gate_up[e], down[e], dout[token[lo:hi]])
             for e, (lo, hi) in enumerate(pairwise(plan.offsets.tolist()))]  # fmt: skip
    y, dx, dp, d_gate_up, d_down = zip(*parts, strict=True)
    owned = int(plan.offsets[-1])
    out, dx = (torch.zeros_like(x).index_add(0, token[:owned], torch.cat(t)) for t in (y, dx))
    dweights = torch.zeros_like(weights).flatten().index_put((plan.source[:owned].long(),), torch.cat(dp))
    return out, dx, dweights.view_as(weights), torch.stack(d_gate_up), torch.stack(d_down)


def assert_close(got, want, share):
    assert len(got) == len(want)
    for i, (g, w) in enumerate(zip(got, want, strict=True)):
        assert g.shape == w.shape, i
        assert (g.double() - w.double()).norm() <= share * w.double().norm(), (i, (g - w).norm() / w.norm())


def equal_bits(got, want):
    return all(torch.equal(g, w) for g, w in zip(got, want, strict=True))


def results(layer, x, dy, *rest, call=None):
    """The output and the gradients of x, of floating-point `rest`, and of the parameters."""
    x = x.detach().requires_grad_()
    rest = [t.detach().requires_grad_() if isinstance(t, torch.Tensor) else t for t in rest]
    y = (layer if call is None else call)(x, *rest)
    leaves = [x, *(t for t in rest if isinstance(t, torch.Tensor)), *layer.parameters()]
    return [y.detach(), *torch.autograd.grad(y, leaves, dy)]


def linear_case(dtype=torch.float32, N=384, **options):
    rand = Rand(dtype)
    layer = nn.Linear(H, N, bias=False, device=DEVICE, dtype=dtype)
    layer.weight.data = rand.data(N, H) / 16
    return layer, Fp8Linear.of(layer, **options), rand.data(T, H), rand.data(T, N)


def experts_case(routing="", dtype=torch.float32, **options):
    rand = Rand(dtype)
    layer = Experts(E, H, F).to(DEVICE, dtype)
    for w in layer.parameters():
        w.data = rand.data(*w.shape) / 12
    plan = plan_of(rand, T, E, TOPK, routing)
    weights = rand.data(T, TOPK).float().abs() + 0.1
    return layer, Fp8Experts.of(layer, **options), rand.data(T, H), rand.data(T, H), plan, weights


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("pow2", [False, True])
def test_linear(backend, pow2):
    layer, fp8, x, dy = linear_case(pow2=pow2)
    with force(backend):
        got = results(fp8, x, dy)
    assert_close(got, linear_ref(x, layer.weight.detach(), dy, pow2), 1e-6)
    assert_close(got, results(layer, x, dy), LOOSE)


@pytest.mark.parametrize("backend", BACKENDS)
def test_linear_with_a_weight_gradient_in_bf16(backend):
    layer, fp8, x, dy = linear_case(wgrad="bf16")
    with force(backend):
        y, dx, dw = results(fp8, x, dy)
    assert_close([y, dx], linear_ref(x, layer.weight.detach(), dy)[:2], 1e-6)
    assert_close([dw], [dy.T @ x], 1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_mlp(backend):
    rand = Rand(torch.float32)
    layer = MLP(H, F).to(DEVICE)
    for w in layer.parameters():
        w.data = rand.data(*w.shape) / 12
    x, dy = rand.data(T, H), rand.data(T, H)
    y, dx, _, *dw = swiglu_layer_ref(x, None, layer.gate_up.weight.detach(), layer.down.weight.detach(), dy)
    for recompute in ("none", "experts"):
        with force(backend):
            got = results(Fp8MLP.of(layer, recompute=recompute), x, dy)
        assert_close(got, [y, dx, *dw], TIGHT)
    assert_close(got, results(layer, x, dy), 2 * LOOSE)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("routing", ["", "masked", "one"])
def test_experts(backend, routing):
    layer, fp8, x, dy, plan, weights = experts_case(routing, wgrad="fp8")
    with force(backend):
        got = results(fp8, x, dy, plan, weights)
    want = experts_ref(x, weights, plan, layer.gate_up.detach(), layer.down.detach(), dy)
    assert_close(got, want, TIGHT)
    if routing != "masked":
        assert_close(got, results(layer, x, dy, plan, weights), 2 * LOOSE)


@pytest.mark.parametrize("backend", BACKENDS)
def test_experts_with_weight_gradients_in_bf16(backend):
    layer, fp8, x, dy, plan, weights = experts_case("masked")
    assert (
        fp8.fp8.wgrad_for(layer.gate_up, rows=FP8_ROWS - 1) == "bf16" != fp8.fp8.wgrad_for(layer.gate_up, rows=FP8_ROWS)
    )
    with force(backend):
        got = results(fp8, x, dy, plan, weights)
    want = experts_ref(x, weights, plan, layer.gate_up.detach(), layer.down.detach(), dy)
    assert_close(got[:3], want[:3], TIGHT)
    assert_close(got[3:], want[3:], 2 * LOOSE)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("wgrad", ["fp8", "bf16"])
def test_recompute_levels_give_equal_bits(backend, wgrad):
    seen = []
    for recompute in ("none", "norm_act", "experts", "full"):
        _, fp8, x, dy, plan, weights = experts_case("masked", torch.bfloat16, recompute=recompute, wgrad=wgrad)
        with force(backend):
            call = (lambda *a, f=fp8: checkpoint(f, *a, use_reentrant=False)) if recompute == "full" else None
            seen.append(results(fp8, x, dy, plan, weights, call=call))
    assert all(equal_bits(s, seen[0]) for s in seen[1:])


def test_a_layer_with_kept_copies_is_saved():
    """torch.save of the whole module; the copy computes its FP8 weights again."""
    layer = Fp8Linear(H, 128, device=DEVICE, weights="kept", transposed="kept")
    x = Rand(torch.float32).data(3, H).requires_grad_()
    layer(x).sum().backward()
    file = io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    assert torch.equal(loaded(x), layer(x))
    with torch.no_grad():
        loaded.weight.mul_(2)
    assert torch.equal(loaded(x), 2 * layer(x))


@pytest.mark.parametrize("save", [
    lambda layer: layer.weight, lambda layer: [*layer.parameters()], lambda layer: layer.state_dict(keep_vars=True),
    lambda layer: layer.state_dict(),
])  # fmt: skip
def test_a_parameter_with_a_kept_copy_is_saved(save):
    """As any parameter: torch.load takes it with weights_only=True, and it holds the weight alone."""
    layer = Fp8Linear(H, 128, device=DEVICE, weights="kept", transposed="kept")
    layer(Rand(torch.float32).data(3, H).requires_grad_()).sum().backward()
    layer.weight.grad = None
    file = io.BytesIO()
    torch.save(save(layer), file)
    file.seek(0)
    loaded = torch.load(file, weights_only=True)
    (weight,) = loaded.values() if isinstance(loaded, dict) else loaded if isinstance(loaded, list) else [loaded]
    assert torch.equal(weight, layer.weight) and file.getbuffer().nbytes < 1.1 * layer.weight.nbytes + 4096


def test_a_vector_is_one_row():
    layer = Fp8Linear(H, 128, device=DEVICE)
    x = Rand(torch.float32).data(H)
    results = []
    for leaf in (x.clone().requires_grad_(), x.clone()[None].requires_grad_()):
        y = layer(leaf)
        y.square().sum().backward()
        results.append((y.flatten(), leaf.grad.flatten()))
        assert y.shape == (*leaf.shape[:-1], 128)
    assert all(map(torch.equal, *results))


@pytest.mark.parametrize("backend", BACKENDS)
def test_transposes_give_equal_bits_and_are_never_old(backend):
    """Also after a fused optimizer, which does not raise a weight's version."""
    seen = []
    for transposed in TRANSPOSED:
        _, fp8, x, dy = linear_case(torch.bfloat16, N=128, transposed=transposed)
        fp8 = copy.deepcopy(fp8)
        optimizer = torch.optim.AdamW(fp8.parameters(), lr=0.1, fused=True)
        with force(backend):
            out = []
            for _step in range(2):
                for _micro_batch in range(2):
                    fp8(x.requires_grad_()).backward(dy)
                    out.append(x.grad)
                    x.grad = None
                optimizer.step()
                optimizer.zero_grad()
        seen.append(out)
    assert not torch.equal(seen[0][0], seen[0][2])
    assert all(equal_bits(s, seen[0]) for s in seen[1:])


@pytest.mark.parametrize("wgrad", ["fp8", "bf16"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients_add_up_in_main_grad(backend, wgrad):
    """In fp32 beneath bf16 weights, two micro batches before either's backward."""
    _, linear, x, dy = linear_case(torch.bfloat16, wgrad=wgrad)
    _, experts, xs, dys, plan, weights = experts_case(dtype=torch.bfloat16, wgrad=wgrad)
    cases = [(linear, x, dy, []), (experts, xs, dys, [plan, weights])]
    for layer, x, dy, rest in cases:
        for p in layer.parameters():
            p.main_grad = torch.ones_like(p, dtype=torch.float32)
        with force(backend):
            for y in [layer(x, *rest), layer(x / 2, *rest)]:
                y.backward(dy)
            once = [p.main_grad.clone() for p in layer.parameters()]
            assert all(p.grad is None for p in layer.parameters())
            for p in layer.parameters():
                del p.main_grad
            want = [results(layer, x * part, dy, *rest)[-len(once) :] for part in (1, 0.5)]
        assert_close(
            [g - 1 for g in once], [a.float() + b for a, b in zip(*want, strict=True)], 0.003
        )  # these are bf16


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autocast(dtype):
    """Products come out in autocast's dtype, gradients in their leaf's."""
    _, linear, x, dy = linear_case(dtype)
    _, experts, xs, dys, plan, weights = experts_case(dtype=dtype)
    with torch.autocast(DEVICE, torch.bfloat16):
        one, two = linear(x.requires_grad_()), experts(xs.requires_grad_(), plan, weights)
    assert one.dtype == two.dtype == torch.bfloat16
    (one.float() * dy).sum().backward()
    (two.float() * dys).sum().backward()
    assert all(t.grad.dtype == dtype for t in (x, xs, linear.weight, experts.gate_up, experts.down))


@pytest.mark.parametrize("wgrad", ["fp8", "bf16"])
@pytest.mark.parametrize("backend", [b for b in BACKENDS if b != "cuda"])
def test_compile(backend, wgrad):
    torch._dynamo.reset()
    _, linear, x, dy = linear_case(torch.bfloat16, wgrad=wgrad)
    _, experts, xs, dys, plan, weights = experts_case(dtype=torch.bfloat16, wgrad=wgrad, recompute="norm_act")
    with force(backend):
        compiled = torch.compile(linear, fullgraph=True, backend="aot_eager")
        assert equal_bits(results(linear, x, dy, call=compiled), results(linear, x, dy))
        compiled = torch.compile(experts, fullgraph=True, backend="aot_eager")
        got = results(experts, xs, dys, plan, weights, call=compiled)
        assert equal_bits(got, results(experts, xs, dys, plan, weights))


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_tokens(backend):
    _, linear, *_ = linear_case()
    _, experts, *_ = experts_case()
    plan = plan_of(Rand(torch.float32), 0, E, TOPK)
    with force(backend):
        got = results(linear, torch.zeros(0, H, device=DEVICE), torch.zeros(0, 384, device=DEVICE))
        assert got[0].shape == (0, 384) and not got[2].any()
        x = torch.zeros(0, H, device=DEVICE)
        got = results(experts, x, x, plan, torch.zeros(0, TOPK, device=DEVICE))
        assert got[0].shape == (0, H) and not got[3].any() and not got[4].any()


def test_nan_stays_visible():
    _, fp8, x, dy = linear_case()
    x[3, 5] = torch.nan
    y, dx, dw = results(fp8, x, dy)
    assert y[3].isnan().all() and dw.isnan().any() and y[:3].isfinite().all() and dx.isfinite().all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_gradient_without_strides(backend):
    """What y.sum() sends back is one number, expanded."""
    _, linear, x, _ = linear_case(torch.bfloat16, N=128)
    _, experts, xs, _, plan, weights = experts_case(dtype=torch.bfloat16)
    with force(backend):
        for layer, x, rest in ((linear, x, []), (experts, xs, [plan, weights])):  # noqa: B020
            y = layer(x, *rest)
            got = torch.autograd.grad(y.sum(), [*layer.parameters()])
            want = torch.autograd.grad(layer(x, *rest), [*layer.parameters()], torch.ones_like(y))
            assert equal_bits(got, want)


def test_frozen_weights_pass_gradients_on():
    _, experts, x, dy, plan, weights = experts_case()
    want = results(experts, x, dy, plan, weights)[1]
    experts.requires_grad_(False)
    for recompute in ("none", "experts"):
        experts.recompute = recompute
        x.requires_grad_()
        got = torch.autograd.grad(experts(x, plan, weights), x, dy)
        assert torch.equal(got[0], want)


def test_sizes_and_options_are_checked():
    for make in (lambda: Fp8Linear(192, 128), lambda: Fp8MLP(128, 64), lambda: Fp8Experts(2, 128, 192)):
        with pytest.raises(ValueError, match="multiples of 128"):
            make()
    for options in (dict(wgrad="fp4"), dict(transposed="never")):
        with pytest.raises(ValueError, match="among"):
            Fp8Linear(128, 128, **options)
    with pytest.raises(ValueError, match="norm_act"):
        Fp8Experts(2, 128, 128, recompute="most")


@pytest.mark.parametrize(
    "options", [dict(weights="kept"), dict(transposed="kept"), dict(weights="kept", transposed="kept")]
)
def test_caches_follow_another_parameter_and_inference_mode(options):
    """A new parameter may have the version of the old one; tensors of inference mode cannot be saved or rewritten."""
    torch.manual_seed(0)
    layer, other = Fp8Linear(128, 128, **options), Fp8Linear(128, 128)
    x = torch.randn(4, 128)

    def gradient(layer):
        leaf = x.clone().requires_grad_()
        layer(leaf).square().sum().backward()
        return leaf.grad

    with torch.inference_mode():
        layer(x)
    gradient(layer)
    layer.weight = other.weight
    # Not the same bits: a transposed copy may be summed in another order.
    torch.testing.assert_close(gradient(layer), gradient(other))
    torch.optim.SGD(layer.parameters(), 0.1).step()
    torch.testing.assert_close(gradient(layer), gradient(other))
    with torch.inference_mode():
        inside = Fp8Linear(128, 128, **options)
        assert inside(x).shape == (4, 128)
