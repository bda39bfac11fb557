"""The optimizers: 8-bit AdamW with any master, stochastic rounding, fused requantisation, Muon, skipped steps."""

import copy
import math
import sys

import pytest
import torch
from torch import nn

from ling_kernels.backend import force
from ling_kernels.model import Ling
from ling_kernels.nn.fp8 import Fp8Linear, to_fp8
from ling_kernels.ops.adamw_8bit import adamw_8bit, adamw_8bit_state, dequantize_moment, dynamic_map, hashed
from ling_kernels.ops.quantize import quantize_weight
from ling_kernels.train.optimizer import (
    OPTIMIZERS,
    AdamW8bit,
    bytes_per_weight,
    clipped_step,
    make_optimizer,
    to_masters,
)
from tests.cases import DEVICE, Rand, runs
from tests.test_fp8_training import WHOLE

KINDS = [*((k, "fp32") for k in OPTIMIZERS), ("adamw8bit", "bf16"), ("muon", "bf16")]


def model_with_gradients(master="fp32", seed=0):
    model = Ling(WHOLE).to(DEVICE)
    model.init_weights(torch.Generator(DEVICE).manual_seed(0))
    to_masters(model, master)
    give_gradients(model, seed)
    return model


def give_gradients(model, seed):
    g = torch.Generator(DEVICE).manual_seed(seed)
    for p in model.parameters():
        p.grad = torch.randn(p.shape, generator=g, device=DEVICE).to(p.dtype) / 100


def step(optimizer, finite=True, lr=1e-2, norm=1.0, limit=1.0):
    scalar = lambda x: torch.tensor(x, device=DEVICE)  # noqa: E731
    clipped_step(optimizer, lr, scalar(norm), limit, scalar(finite))


def snapshot(model, optimizer):
    return [t.clone() for t in [*model.parameters(), *(t for s in optimizer.state.values() for t in s.values())]]


@pytest.mark.parametrize("kind, master", KINDS)
def test_a_skipped_step_changes_nothing(kind, master):
    model = model_with_gradients(master)
    optimizer = make_optimizer(model, kind, 1e-2, 0.1)
    step(optimizer)
    before = snapshot(model, optimizer)
    next(model.parameters()).grad.view(-1)[0] = torch.nan
    step(optimizer, finite=False, norm=math.nan)
    assert all(map(torch.equal, before, snapshot(model, optimizer)))
    give_gradients(model, 1)
    step(optimizer)
    after = snapshot(model, optimizer)
    assert not any(torch.equal(a, b) for a, b in zip(before, after, strict=True) if a.numel() > 1)
    steps = [s["step"].item() for s in optimizer.state.values() if "step" in s]
    assert set(steps) == {2.0}


@pytest.mark.parametrize("kind, master", KINDS)
def test_a_loaded_state_is_the_whole_state(kind, master):
    """After three steps and loading, the next step gives the original's bits for every parameter; and param_groups
    still set the learning rate of all of them."""
    model = model_with_gradients(master)
    optimizer = make_optimizer(model, kind, 1e-2, 0.1)
    for seed in range(3):
        give_gradients(model, seed)
        step(optimizer)
    twin = copy.deepcopy(model)
    loaded = make_optimizer(twin, kind, 1e-2, 0.1)
    loaded.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for m, o in ((model, optimizer), (twin, loaded)):
        give_gradients(m, 3)
        step(o)
    assert all(map(torch.equal, snapshot(model, optimizer), snapshot(twin, loaded)))
    before = [p.clone() for p in twin.parameters()]
    give_gradients(twin, 4)
    step(loaded, lr=0.0)
    assert all(map(torch.equal, before, twin.parameters()))


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_gradients_are_clipped_on_the_device(kind):
    """Gradients eight times as large, with their norm, give the same step."""
    models = [model_with_gradients() for _ in range(2)]
    optimizers = [make_optimizer(m, kind, 1e-2, 0.1) for m in models]
    for _ in range(2):
        step(optimizers[0], norm=0.5)
        for p in models[1].parameters():
            p.grad *= 8
        step(optimizers[1], norm=8.0 - 1e-6, limit=1.0)
        for m in models:
            give_gradients(m, 5)
    assert all(map(torch.equal, *(snapshot(m, o) for m, o in zip(models, optimizers, strict=True))))
    assert not torch.equal(next(models[0].parameters()), next(model_with_gradients().parameters()))


@pytest.mark.parametrize("kind, master", KINDS)
def test_bytes_of_weight_gradient_and_state(kind, master):
    model = model_with_gradients(master)
    optimizer = make_optimizer(model, kind, 1e-2, 0.1)
    step(optimizer)
    for w in (model.layers[1].mlp.experts.gate_up, model.layers[0].attention.dense.weight):
        state = sum(t.nbytes for name, t in optimizer.state[w].items() if name != "step")
        assert w.nbytes + w.grad.nbytes + state == w.numel() * bytes_per_weight(kind, master)
    assert model.norm.weight.dtype == model.layers[1].mlp.router.weight.dtype == torch.float32


def test_adamw_8bit_as_an_optimizer_follows_torch():
    models = [model_with_gradients() for _ in range(2)]
    start = [p.clone() for p in models[0].parameters()]
    optimizers = [make_optimizer(m, kind, 1e-3, 0.1) for m, kind in zip(models, ("adamw", "adamw8bit"), strict=True)]
    for seed in range(5):
        for m, o in zip(models, optimizers, strict=True):
            give_gradients(m, seed)
            step(o, lr=1e-3)
    for s, a, b in zip(start, *(m.parameters() for m in models), strict=True):
        assert (a - b).norm() <= (0.05 if a.ndim > 1 else 1e-6) * (a - s).norm() and not torch.equal(a, s)


def test_stochastic_rounding():
    """The mean is the fp32 value, only its two bf16 neighbours occur, and equal seed, step and element give equal
    bits."""
    n, value = 1 << 16, 1 + 0.3 * 2**-7  # bf16 has 1 and 1 + 2^-7

    def rounded(seed, step):
        p = torch.full((n,), 1.0, device=DEVICE, dtype=torch.bfloat16)
        scale = -(value - 1) / (0.1 * 1.0)  # an update of that size, from a gradient of its sign
        g = torch.full((n,), math.copysign(1.0, scale), device=DEVICE)
        adamw_8bit([p], [g], adamw_8bit_state([p]), abs(value - 1), (0.0, 0.0), 1e-12, 0.0, step, seed=seed)
        return p

    one = rounded(3, 1)
    assert set(one.tolist()) == {1.0, 1 + 2**-7}
    share = (one > 1).double().mean().item()
    assert abs(share - 0.3) < 5 * math.sqrt(0.3 * 0.7 / n)
    assert torch.equal(one, rounded(3, 1))
    for other in (rounded(4, 1), rounded(3, 2)):
        assert 0.37 < (one != other).double().mean() < 0.47  # 2 * 0.3 * 0.7, were they independent
    assert torch.equal(rounded(None, 1), torch.ones_like(one))


def test_random_bits_are_even():
    x = hashed(torch.arange(1 << 18, device=DEVICE))
    assert len(x.unique()) == len(x)
    bits = (x[:, None] >> torch.arange(32, device=DEVICE) & 1).double()
    assert ((bits.mean(0) - 0.5).abs() < 5 * 0.5 / 2**9).all()
    together = (bits - 0.5).T @ (bits - 0.5) / len(x) * 4
    assert (together - torch.eye(32, device=DEVICE)).abs().max() < 5 / 2**9


def test_stochastic_rounding_keeps_small_updates():
    """Updates of a thirtieth of bf16's last place: rounding to nearest loses them."""

    def moved(seed):
        p = torch.ones(4096, device=DEVICE, dtype=torch.bfloat16)
        state = adamw_8bit_state([p])
        for step in range(1, 61):
            adamw_8bit([p], [torch.ones_like(p)], state, 2**-8 / 30, (0.9, 0.95), 1e-8, 0.0, step, seed=seed)
        return 1 - p.float().mean().item()

    assert moved(None) == 0
    assert moved(1) == pytest.approx(60 * 2**-8 / 30, rel=0.05)


def test_muon_with_bf16_masters_follows_fp32_ones():
    """From equal weights, with updates of a tenth of bf16's last place, which rounding to nearest would lose."""
    models = [model_with_gradients(master) for master in ("bf16", "fp32")]
    with torch.no_grad():
        for narrow, wide in zip(*(m.parameters() for m in models), strict=True):
            wide.copy_(narrow)
    start = [p.clone() for p in models[1].parameters()]
    optimizers = [make_optimizer(m, "muon", 1e-5, 0.0, seed=3) for m in models]
    for seed in range(12):
        for model, optimizer in zip(models, optimizers, strict=True):
            give_gradients(model, seed // 6)  # several in one direction
            step(optimizer, lr=1e-5)
    names = [n for n, _ in models[1].named_parameters()]
    for name, s, narrow, wide in zip(names, start, *(m.parameters() for m in models), strict=True):
        if name.endswith(("experts.gate_up", "attention.dense.weight", "lm_head.weight")):
            moved, wanted = narrow.float() - s, wide - s
            assert wanted.abs().amax() < 2**-8 * s.abs().amax()  # much less than most weights' last place
            along = ((moved * wanted).sum() / wanted.square().sum()).item()
            assert along == pytest.approx(1, abs=0.15), name
    states = [o.state[m.layers[1].mlp.experts.gate_up] for m, o in zip(models, optimizers, strict=True)]
    assert [s["momentum_buffer"].dtype for s in states] == [torch.bfloat16, torch.float32]


def test_random_bits_depend_on_the_place_in_the_group():
    """Not on which other parameters have gradients."""
    after = []
    for others in (True, False):
        params = [nn.Parameter(torch.ones(256, 256, device=DEVICE, dtype=torch.bfloat16)) for _ in range(3)]
        for p in params if others else params[2:]:
            p.grad = torch.ones_like(p)
        AdamW8bit(params, 2**-9, seed=5).step()
        after.append(params[2])
    assert torch.equal(*after) and len(after[0].unique()) == 2
    assert not torch.equal(params[2], adamw_8bit_of_the_first(params[2]))


def adamw_8bit_of_the_first(like):
    p = nn.Parameter(torch.ones_like(like))
    p.grad = torch.ones_like(p)
    AdamW8bit([p], 2**-9, seed=5).step()
    return p


@pytest.mark.parametrize("number, percent", [(16, 0.5), (256, 1.6), (1024, 3.1)])
def test_gradients_summed_in_bf16(number, percent):
    """Error of the sum over so many micro batches, as docs/fp8.md has it."""
    g = torch.Generator().manual_seed(0)
    signal = torch.randn(1 << 14, generator=g) / 10
    total, truth = torch.zeros(1 << 14, dtype=torch.bfloat16), torch.zeros(1 << 14, dtype=torch.float64)
    for _ in range(number):
        grad = (signal + torch.randn(1 << 14, generator=g)).bfloat16()
        total += grad
        truth += grad.double()
    error = 100 * float((total.double() - truth).norm() / truth.norm())
    assert error == pytest.approx(percent, rel=0.05)


@pytest.mark.parametrize("K", [256, 384])
@pytest.mark.parametrize("pow2", [False, True])
def test_requantised_in_the_step(K, pow2):
    rand = Rand(torch.bfloat16)
    p, g = rand.data(2, 128, K), rand.data(2, 128, K)
    weight = tuple(t.clone() for t in quantize_weight(p, pow2))
    before = weight[0].clone()
    adamw_8bit([p], [g], adamw_8bit_state([p]), 0.1, (0.9, 0.95), 1e-8, 0.1, 1, fp8=[weight], pow2=pow2, seed=1)
    assert all(torch.equal(a.float(), b.float()) for a, b in zip(weight, quantize_weight(p, pow2), strict=True))
    assert not torch.equal(weight[0].float(), before.float())


def test_the_reference_works_in_chunks(monkeypatch):
    def after(chunk):
        monkeypatch.setattr(sys.modules["ling_kernels.ops.adamw_8bit"], "CHUNK", chunk)
        rand = Rand(torch.bfloat16)
        p, g = rand.data(1500), rand.data(1500)
        state = adamw_8bit_state([p])
        for step in (1, 2):
            adamw_8bit([p], [g], state, 0.1, (0.9, 0.95), 1e-8, 0.1, step, seed=1)
        return [p, *state[0]]

    assert all(map(torch.equal, after(512), after(1 << 20)))


def test_zero_moments_are_zero():
    (state,) = adamw_8bit_state([torch.ones(300)])
    state.m_scale.fill_(1), state.v_scale.fill_(1)
    for codes, scale, signed in ((*state[:2], True), (*state[2:], False)):
        assert not dequantize_moment(codes, scale, dynamic_map(signed)).any()


@pytest.mark.parametrize("kind, master", [("adamw8bit", "fp32"), ("adamw8bit", "bf16"), ("muon", "bf16")])
def test_embedding_and_head_keep_fp32_moments(kind, master):
    """Rows without gradients move by one learning rate at most after a step with; bf16 masters on the mean."""
    model = model_with_gradients(master)
    rows = model.word_embeddings.weight, model.lm_head.weight
    optimizer = make_optimizer(model, kind, 1e-2, 0.0)
    start = [w.detach().clone().float() for w in rows]
    for share in (torch.logspace(-5, 0, rows[0].shape[1], device=DEVICE), 0.0, 0.0):
        for p in model.parameters():
            p.grad = torch.zeros_like(p)
        for w in rows:
            w.grad += torch.as_tensor(share, dtype=w.dtype)
        step(optimizer)
    size = 1e-2 * sum(
        (0.9**t * 0.1 / (1 - 0.9 ** (t + 1))) / (0.95**t * 0.05 / (1 - 0.95 ** (t + 1))) ** 0.5 for t in range(3)
    )
    for w, before in zip(rows, start, strict=True):
        assert {optimizer.state[w][k].dtype for k in ("m", "v")} == {torch.float32}
        assert not any("scale" in k for k in optimizer.state[w])
        moved = (before - w.detach().float()).mean(0)  # over hundreds of rows
        torch.testing.assert_close(moved, torch.full_like(moved, size), rtol=0.02, atol=0)
    assert optimizer.state[model.layers[1].mlp.router.weight]["m"].dtype == torch.uint8


def test_moments_of_8_bits_that_were_loaded_stay():
    """A run whose embedding had 8-bit moments goes on with them."""
    model = model_with_gradients("bf16")
    old = AdamW8bit([*model.parameters()], 1e-2)
    step(old)
    new = AdamW8bit([*model.parameters()], 1e-2, fp32_moments=[model.lm_head.weight])
    new.load_state_dict(old.state_dict())
    step(new)
    assert new.state[model.lm_head.weight]["m"].dtype == torch.uint8
    assert new.state[model.lm_head.weight]["step"].item() == 2


def test_muon_updates_each_expert_separately():
    model = model_with_gradients()
    optimizer = make_optimizer(model, "muon", 1e-2, 0.0)
    w = model.layers[1].mlp.experts.gate_up
    alone = nn.Parameter(w.detach()[3].clone())
    alone.grad = w.grad[3].clone()
    torch.optim.Muon([alone], lr=1e-2, weight_decay=0.0, adjust_lr_fn="match_rms_adamw").step()
    step(optimizer, norm=0.5)
    torch.testing.assert_close(w.detach()[3], alone.detach())
    assert optimizer.state[w]["momentum_buffer"].shape == w.shape
    names = {id(p): name for name, p in model.named_parameters()}
    moments = {names[id(p)].split(".")[-1] if p.ndim < 2 else names[id(p)]
               for p, s in optimizer.state.items() if "exp_avg" in s}  # fmt: skip
    assert {n for n in moments if n.count(".")} == {
        "word_embeddings.weight", "lm_head.weight", "layers.1.mlp.router.weight", "mtp.0.layer.mlp.router.weight",
    }  # fmt: skip


def loss_of(model):
    ids = torch.arange(40, device=DEVICE).view(2, 20)
    return model(ids, labels=ids, logits=False).loss


@pytest.mark.parametrize("kind, master", [("adamw", "fp32"), ("adamw8bit", "fp32"), ("adamw8bit", "bf16")])
def test_kept_fp8_weights_equal_those_of_each_forward(kind, master):
    """Also after steps of any optimizer, after in-place changes, and after a skipped step."""
    losses = []
    for weights in ("each_forward", "kept"):
        model = model_with_gradients(master)
        made, _ = to_fp8(model, weights=weights)
        assert len(made) == 11
        optimizer = make_optimizer(model, kind, 1e-2, 0.1)
        seen = []
        for i in range(3):
            optimizer.zero_grad()
            with torch.autocast(DEVICE, torch.bfloat16):
                seen.append(loss_of(model))
            seen[-1].backward()
            step(optimizer, finite=i != 1)
        with torch.autocast(DEVICE, torch.bfloat16):
            seen.append(loss_of(model))
            with torch.no_grad():
                model.layers[1].mlp.experts.gate_up.mul_(0.5)
            seen.append(loss_of(model))
        losses.append(torch.stack(seen).tolist())
    assert losses[0] == losses[1]
    assert losses[0][1] == losses[0][2] != losses[0][3] and losses[0][3] != losses[0][4]  # the second step was skipped


def test_the_optimizer_updates_kept_fp8_weights(monkeypatch):
    """8-bit AdamW writes them in its own pass, at one address."""
    from ling_kernels.nn import fp8_cache

    model = model_with_gradients("bf16")
    to_fp8(model, weights="kept")
    optimizer = make_optimizer(model, "adamw8bit", 1e-2, 0.1)
    loss_of(model).backward()
    kept = fp8_cache.cache_of(model.layers[1].mlp.experts.gate_up)
    address, before = kept.pair[0].data_ptr(), kept.pair[0].clone()
    step(optimizer)
    calls = []
    genuine = fp8_cache.quantize_weight
    monkeypatch.setattr(fp8_cache, "quantize_weight", lambda *args: (calls.append(1), genuine(*args))[1])
    loss_of(model)
    assert not calls and kept.pair[0].data_ptr() == address
    assert not torch.equal(kept.pair[0].float(), before.float())
    assert torch.equal(kept.pair[0].float(), genuine(model.layers[1].mlp.experts.gate_up)[0].float())
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    loss_of(model)
    assert len(calls) == 3 * 2 + 2 + 2 * (2 + 2)  # attention, the dense MLP, experts with their shared one


@pytest.mark.parametrize("backend", [b for b in ("torch", "triton") if runs(b)])
def test_kept_transposes_follow_the_optimizer(backend):
    """A kept transpose is made again after a step of 8-bit AdamW."""
    rand = Rand(torch.bfloat16)
    layer = Fp8Linear(256, 128, device=DEVICE, dtype=torch.bfloat16, weights="kept", transposed="kept")
    layer.weight.data = rand.data(128, 256)
    optimizer = AdamW8bit([layer.weight], 0.1)
    x, dy = rand.data(5, 256), rand.data(5, 128)
    with force(backend):
        for _ in range(3):
            fresh = Fp8Linear(256, 128, device=DEVICE, dtype=torch.bfloat16)
            fresh.weight.data = layer.weight.detach().clone()
            leaves = [x.clone().requires_grad_() for _ in range(2)]
            for module, leaf in zip((layer, fresh), leaves, strict=True):
                module(leaf).backward(dy)
            assert torch.equal(leaves[0].grad, leaves[1].grad)
            optimizer.step()
            optimizer.zero_grad()


def test_parameters_without_gradients():
    """They do not change; vectors and matrices may share a group."""
    a, b, c = (nn.Parameter(torch.ones(*shape, device=DEVICE)) for shape in ((3,), (2, 5), (4, 4)))
    optimizer = AdamW8bit([a, b, c], 0.1)
    a.grad, b.grad = torch.ones_like(a), torch.ones_like(b)
    optimizer.step()
    assert (a < 1).all() and (b < 1).all() and (c == 1).all() and c not in optimizer.state
