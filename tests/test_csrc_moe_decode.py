"""moe_decode of csrc/ on the virtual GPU: every composition against the ops that define it, any grid."""

import dataclasses
from types import SimpleNamespace

import pytest
import torch

import ling_kernels.nn.moe
from ling_kernels.backend import _C, force
from ling_kernels.model import Ling, LingConfig
from ling_kernels.model.transformer import Layer
from ling_kernels.nn.attention import BatchLayout
from ling_kernels.nn.fp8 import to_fp8
from ling_kernels.nn.fp8_inference import quantize_for_inference_
from ling_kernels.ops.moe import moe
from ling_kernels.ops.moe_decode import fits_shared_memory, moe_decode, unsupported
from ling_kernels.ops.quantize import dequantize, quantize, quantize_weight
from ling_kernels.ops.rms_norm import rms_norm
from ling_kernels.ops.route import route
from ling_kernels.ops.swiglu import swiglu_ref
from tests.cases import Rand
from tests.gpu.build import load, missing
from tests.test_ops import near_codes

if missing():
    pytest.skip(f"csrc/ needs {missing()} to run on the virtual GPU", allow_module_level=True)

BF16, FP32 = torch.bfloat16, torch.float32
NO_LAYOUT = BatchLayout(None, None, None, None)  # where nothing attends
FEW, MANY = (16, 4, 2, 4), (256, 8, 4, 8)  # experts, groups, groups kept, experts kept


def problem(T, sizes=FEW, H=128, F=128, Fs=0, fp8=True, seed=0):
    """Blocks of 128 differ in magnitude, so a wrong scale gives a wrong result."""
    rand, E = Rand(BF16, seed), sizes[0]

    def uneven(*shape):
        blocks = [-(-n // 128) if n % 128 == 0 else 1 for n in shape[-2:]]
        size = rand.data(*shape[:-2], *blocks, dtype=FP32).exp()
        for dim, n in zip((-2, -1), shape[-2:], strict=True):
            size = size.repeat_interleave(n // size.shape[dim], dim)
        return (rand.data(*shape, dtype=FP32) * size / (3 * shape[-1] ** 0.5)).to(BF16)

    x = (rand.data(T, H, dtype=FP32).view(T, -1, 128) * rand.data(T, H // 128, 1, dtype=FP32).exp()).view(T, H).to(BF16)
    weights = [uneven(E, 2 * F, H), uneven(E, H, F), *([uneven(2 * Fs, H), uneven(H, Fs)] if Fs else [])]
    weights = [quantize_weight(w) for w in weights] if fp8 else weights
    bias = rand.data(E, dtype=FP32) / 10
    router_w = rand.data(E, H, dtype=FP32) / H**0.5
    return [x, router_w, bias, *weights[:2], tuple(weights[2:]) or None, *sizes[1:], 2.0]


def launch(C, args, logits=None, residual=None):
    return launch_both(C, args, logits, residual)[1]


def launch_both(C, args, logits=None, residual=None):
    """Returns the kernel's h and y for `logits`; outputs that it does not write stay NaN."""
    x, router_w, bias, *weights = args[:5]
    shared, sizes, (T, H) = args[5], args[6:], x.shape
    pairs = [w if isinstance(w, tuple) else (w, None) for w in (*weights, *(shared or ()))]
    columns = sizes[2] * pairs[1][0].shape[-1] + (pairs[3][0].shape[-1] if shared else 0)
    h, y = torch.full((T * columns,), torch.nan), torch.full((T, H), torch.nan, dtype=BF16)
    flat = [t for pair in pairs for t in pair] + [None] * (0 if shared else 4)
    logits = x.float() @ router_w.T if logits is None else logits
    C.moe_decode_fwd(x, logits, bias, *flat, residual, h, y, *sizes)
    return h, y


def define_h(args):
    """Of FP8 weights: SwiGLU of the choices [T topk, F], then of the shared expert [T, Fs]."""
    x, router_w, bias, gate_up, _, shared, *sizes = args
    with force("torch"):
        experts = route(x.float() @ router_w.T, bias, None, *sizes)[1].long()
        x = dequantize(*quantize(x))
    routed = torch.einsum("th,tkfh->tkf", x, dequantize(*gate_up)[experts]).flatten(0, 1)
    # The shared expert's product is a bf16 tensor of the ops that define the layer
    products = [routed, (x @ dequantize(*shared[0]).T).to(BF16)] if shared else [routed]
    return [swiglu_ref(p) for p in products]


def check_near(got, want, rows=slice(None)):
    """Three roundings to bf16 in `want`, one in `got`; FP8 codes flip by one when sums run in another order."""
    d, size = (got[rows].float() - want[rows].float()), want[rows].float().square().mean(1, keepdim=True).sqrt()
    assert got.dtype == want.dtype and (d.square().mean(1, keepdim=True).sqrt() < 0.006 * size).all(), d / size
    assert (d.abs() < 0.04 * size).all()


def define(args, residual=None):
    with force("torch"):
        y = moe(*args[:6], None, *args[6:])[0]
    return y if residual is None else (y.float() + residual.float()).to(BF16)


def check_sizes(C):
    for T, fp8, others in (
        (1, True, dict(H=256, Fs=128)), (2, False, dict(F=256)), (3, True, dict(F=256, Fs=128)),
        (5, False, dict(H=256, Fs=256)), (8, True, dict(Fs=256)), (1, False, dict(Fs=128)),
    ):  # fmt: skip
        args = problem(T, fp8=fp8, seed=T, **others)
        residual = Rand(BF16, 9).data(T, args[0].shape[1]) if T % 2 else None
        h, y = launch_both(C, args, residual=residual)
        check_near(y, define(args, residual))
        if fp8:  # as they are quantised before the second half
            wanted = define_h(args)
            for got, want in zip(h.split([w.numel() for w in wanted]), wanted, strict=True):
                assert near_codes(quantize(got.view_as(want))[0], quantize(want)[0])


def check_many_experts(C):
    args = problem(4, MANY, Fs=128)
    check_near(launch(C, args), define(args))


def check_shared_choices_and_ties(C):
    """All rows choose the same experts, which are read once; then equal logits, where the lowest index wins."""
    args = problem(6, Fs=128)
    args[0][1:] = args[0][:1]
    check_near(launch(C, args), define(args))
    args[0], args[1], args[2] = problem(6, seed=1)[0], torch.eye(16, 128), torch.zeros(16)
    args[0][:, :16] = Rand(BF16).ints(-1, 2, 6, 16)  # the logits
    check_near(launch(C, args), define(args))


def check_nan(C):
    """A NaN in a row of x, or in all logits of a row, affects only that row; the chosen experts are in range."""
    args = problem(4, Fs=128)
    whole = launch(C, args)
    args[0][1, 5] = torch.nan
    logits = args[0].float().nan_to_num() @ args[1].T
    logits[2] = torch.nan
    got = launch(C, args, logits)
    assert got[1].isnan().all() and got[2].isnan().all()
    assert torch.equal(got[[0, 3]], whole[[0, 3]])


def check_grids(C, monkeypatch, grids=(1, 3, 78)):
    """Sums and the barrier's counter after a launch do not depend on the grid."""
    args = problem(2, H=256, Fs=128)
    seen = []
    for sms in grids:
        monkeypatch.setenv("LING_GPU_SMS", str(sms))
        seen += [launch(C, args), launch(C, args)]
    check_near(seen[0], define(args))
    assert all(torch.equal(y, seen[0]) for y in seen)


CHECKS = [check_sizes, check_many_experts, check_shared_choices_and_ties, check_nan]


@pytest.mark.parametrize("check", CHECKS, ids=lambda f: f.__name__[6:])
@pytest.mark.parametrize("seed", (0, 1))
def test_correct(check, seed, monkeypatch):
    monkeypatch.setenv("LING_GPU_SEED", str(seed))
    check(load())


@pytest.mark.parametrize("seed, grids", [(0, (1, 78, 132)), (2, (3, 20))])
def test_any_grid_gives_the_same_bits(seed, grids, monkeypatch):
    monkeypatch.setenv("LING_GPU_SEED", str(seed))
    check_grids(load(), monkeypatch, grids)


@pytest.mark.parametrize("T", range(1, 9))
@pytest.mark.parametrize("fp8", [False, True])
def test_every_composition(T, fp8):
    """The op: with and without the shared expert, the residual and the norm, by turns over T; two launches, or its
    definition where the kernel does not support the call."""
    args = problem(T, Fs=128 * (T % 2), fp8=fp8, seed=T)
    rand = Rand(BF16, T)
    residual = rand.data(*args[0].shape) if T // 2 % 2 else None
    norm = 1 + rand.data(128) / 4 if T // 4 % 2 != fp8 else None
    assert unsupported(*args[:9]) is None
    with force("cuda"):
        got = moe_decode(*args, residual, norm, 0.1)
    with force("torch"):
        s = args[0] if norm is not None else None
        if norm is not None and residual is not None:
            args[0], s = rms_norm(args[0], norm, residual, 0.1)
        elif norm is not None:
            args[0] = rms_norm(args[0], norm, None, 0.1)
    check_near(got, define(args, residual if norm is None else s))


class NormOnly(torch.nn.Module):
    """Replaces attention: only the norm."""

    def forward(self, x, layout, cache, norm):
        return norm(x)


def decode_layer(kind):
    torch.manual_seed(0)
    config = dataclasses.replace(LingConfig.tiny(), moe_intermediate_size=128, initializer_range=0.1)
    layer = Layer(config, dense=False).to(BF16)
    layer.attention = NormOnly()
    if kind != "bf16":
        to_fp8(layer, weights="kept" if kind == "kept" else "each_forward")
    if kind == "frozen":
        quantize_for_inference_(layer)
    return layer


@pytest.mark.parametrize("kind", ["bf16", "kept", "frozen"])
def test_a_decode_layer_ends_in_two_launches(kind, monkeypatch):
    layer, calls = decode_layer(kind), []
    for name in ("rms_norm_router_fwd", "moe_decode_fwd"):
        counted = getattr(_C, name)
        monkeypatch.setattr(_C, name, lambda *a, f=counted, n=name: (calls.append(n), f(*a)))
    x = Rand(BF16).data(9, 128)
    cache = object()  # the layer only asks whether there is one

    def run(backend, rows, cache=cache):
        with force(backend):
            return layer(x[:rows], NO_LAYOUT, cache)[0]

    with torch.no_grad():
        for T in (1, 8):
            calls.clear()
            got = run("cuda", T)
            assert calls == ["rms_norm_router_fwd", "moe_decode_fwd"]
            want = run("torch", T, None)  # not folded here, folded there in FP8
            error = (got.float() - want.float()).norm() / want.float().norm()
            assert error < (0.004 if kind == "bf16" else 0.02)
        if kind == "bf16":
            assert torch.equal(run("torch", 8), want)


def test_which_layers_decode(monkeypatch):
    """Few rows, a cache, no gradient, all experts here."""
    layer, calls = decode_layer("frozen"), []
    monkeypatch.setattr(ling_kernels.nn.moe, "moe_decode", lambda x, *_, **options: (calls.append(len(x)), x)[1])
    x, cache = Rand(BF16).data(9, 128), object()
    with torch.no_grad():
        layer(x[:8], NO_LAYOUT, cache), layer(x[:1], NO_LAYOUT, cache)
        assert calls == [8, 1]
        layer(x, NO_LAYOUT, cache), layer(x[:2], NO_LAYOUT), layer(x[:0], NO_LAYOUT, cache)
        local = layer.mlp.exchange
        layer.mlp.exchange = SimpleNamespace(dispatch=local.dispatch, combine=local.combine, local=False)
        layer(x[:2], NO_LAYOUT, cache)
    layer.mlp.exchange = local
    layer(x[:2], NO_LAYOUT, cache)
    assert calls == [8, 1]


def test_a_model_decodes_through_it(monkeypatch):
    """Two prompts and three fixed further tokens of each."""
    config = dataclasses.replace(LingConfig.tiny(), vocab_size=64, num_hidden_layers=2, num_attention_heads=2,
                                 num_key_value_heads=1, head_dim=128, moe_intermediate_size=128,
                                 num_nextn_predict_layers=0, initializer_range=0.2)  # fmt: skip
    model, rand, calls = Ling(config), Rand(BF16), []
    model.init_weights(torch.Generator().manual_seed(0))
    model.to(BF16).eval()
    ids, tokens = rand.ints(0, 64, 2, 9, dtype=torch.int64), rand.ints(0, 64, 4, 2, dtype=torch.int64)
    launched = _C.moe_decode_fwd
    monkeypatch.setattr(_C, "moe_decode_fwd", lambda x, *others: (calls.append(len(x)), launched(x, *others)))
    seen = {}
    for backend in ("torch", "cuda"):
        logits = seen[backend] = []
        with force(backend):
            model.generate(ids, 4, choose=lambda new, so_far, all=logits: (all.append(new), tokens[len(all) - 1])[1])
    got, want = (torch.stack(seen[backend]) for backend in ("cuda", "torch"))
    assert calls == [2, 2, 2] and len(got) == 4  # one layer of experts
    assert (got - want).norm() < 0.02 * want.norm()


def test_supported_arguments():
    args = problem(2, Fs=128)
    x, router_w, bias, gate_up, down, shared, *routing = args[:9]
    assert unsupported(*args[:9]) is None and unsupported(*problem(2, fp8=False)[:9]) is None
    assert "bf16" in unsupported(x.float(), *args[1:9]) and "16 experts" in unsupported(*args[:6], 4, 4, 4)
    bf16 = problem(2, Fs=128, fp8=False)
    assert "beside" in unsupported(x, router_w, bias, gate_up, down, bf16[5], *routing)
    strided = gate_up[0].mT.contiguous().mT, gate_up[1]
    assert "strided" in unsupported(x, router_w, bias, strided, down, shared, *routing)
    ling = {(2048, 512): 8, (4096, 1024): 8, (8192, 2048): 8}  # mini, flash, 1T: in FP8 for all rows
    assert all(fits_shared_memory(T, H, F, F, 8, True) for (H, F), T in ling.items())
    assert fits_shared_memory(8, 2048, 512, 512, 8, False) and not fits_shared_memory(8, 8192, 2048, 2048, 8, False)


def test_refused():
    C, args = load(), problem(2)
    with pytest.raises(ValueError, match="expects sizes_have_a_kernel"):
        launch(C, [*args[:6], 4, 1, 4, 2.0])
    with pytest.raises(ValueError, match="expects x.is"):
        launch(C, [args[0].float(), *args[1:]])
    with pytest.raises(ValueError, match="expects gate_up_scale.is"):
        launch(C, [*args[:3], (args[3][0], args[3][1][:, :1].contiguous()), *args[4:]])
    with pytest.raises(ValueError, match="T <= kMaxRows"):
        launch(C, problem(9))
