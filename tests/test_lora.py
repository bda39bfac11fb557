"""Adapters: nothing changes before a step, the gradient of W + s B A, merged weights, FP8, what is frozen."""

import copy
from dataclasses import replace

import pytest
import torch

from ling_kernels.backend import force
from ling_kernels.errors import InputError
from ling_kernels.model import Ling, LingConfig
from ling_kernels.nn import MLP, Attention, Experts, lora_, merge_adapters_, without_adapters
from ling_kernels.nn.fp8 import to_fp8
from ling_kernels.nn.lora import KINDS, ON, adapted, adapters
from ling_kernels.ops.dispatch import dispatch
from tests.cases import DEVICE, runs
from tests.training import tiniest


def model(seed: int = 0, config=None, dtype=torch.float32) -> Ling:
    m = Ling(tiniest() if config is None else config)
    m.init_weights(torch.Generator().manual_seed(seed))
    return m.to(dtype).train()


def wide() -> LingConfig:
    """Sizes that FP8 takes."""
    return replace(
        tiniest(), hidden_size=128, intermediate_size=128, moe_intermediate_size=128, num_attention_heads=8,
        num_key_value_heads=4,
    )  # fmt: skip


def tokens(n: int = 40, vocab: int = 200) -> torch.Tensor:
    return torch.randint(vocab, (2, n), generator=torch.Generator().manual_seed(1))


def away_from_zero(m: Ling) -> Ling:
    """Adapters as after some steps."""
    for i, adapter in enumerate(adapters(m).values()):
        adapter.b.data.copy_(0.02 * torch.randn(adapter.b.shape, generator=torch.Generator().manual_seed(i)))
    return m


@pytest.mark.parametrize("fp8", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nothing_changes_before_the_first_step(fp8, dtype):
    m = model(config=wide(), dtype=dtype)
    if fp8:
        to_fp8(m)
    ids = tokens()
    before = m(ids, labels=ids)
    lora_(m, 4)
    after = m(ids, labels=ids)
    assert torch.equal(before.logits, after.logits) and torch.equal(before.loss, after.loss)
    changed = away_from_zero(m)(ids).logits
    assert not torch.equal(before.logits, changed)
    with without_adapters(m):
        assert torch.equal(before.logits, m(ids).logits)
    assert torch.equal(changed, m(ids).logits)
    m.eval()
    with torch.no_grad(), without_adapters(m):
        without = m(ids).logits
    for layer, _ in adapted(m).values():
        layer.__class__ = {kind: of for of, kind in KINDS.items()}.get(type(layer), type(layer))
    with torch.no_grad():
        assert torch.equal(without, m(ids).logits)


def test_gradients_are_those_of_the_weight_with_the_product_added():
    m = away_from_zero(model(dtype=torch.float64))
    lora_(m, 3, alpha=5)
    away_from_zero(m)
    ids = tokens()
    m(ids, labels=ids, z_loss=1e-3).loss.backward()
    merged = copy.deepcopy(m)
    merge_adapters_(merged)
    merged.requires_grad_(True)
    merged(ids, labels=ids, z_loss=1e-3).loss.backward()
    weights = {name: w for name, (_, w) in adapted(merged).items()}
    found = adapters(m)
    assert found.keys() == weights.keys() and len(found) == 2 * 2 + 2 * 2 + 2 + 3 * 2
    for name, adapter in found.items():
        dw = weights[name].grad
        torch.testing.assert_close(adapter.a.grad, adapter.scale * adapter.b.mT @ dw)
        torch.testing.assert_close(adapter.b.grad, adapter.scale * dw @ adapter.a.mT)


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-12), (torch.float32, 2e-5), (torch.bfloat16, 0.06)])
def test_merged_weights_compute_what_the_adapters_do(dtype, tolerance):
    m, ids = model(dtype=dtype), tokens()
    lora_(m, 4)
    away_from_zero(m)
    before = m(ids).logits
    plain = model(dtype=dtype)(ids).logits
    merge_adapters_(m)
    assert not adapters(m) and type(m.layers[1].mlp.experts) is Experts
    after = m(ids).logits
    difference = (after - before).norm() / before.norm()
    assert difference < tolerance < (plain - before).norm() / before.norm()


@pytest.mark.parametrize("kind", ["attention", "mlp", "experts"])
def test_fp8_results_and_gradients_are_near_those_without(kind):
    g = torch.Generator().manual_seed(3)
    x, dy = (torch.randn(24, 128, generator=g) for _ in range(2))
    chosen = torch.randint(4, (24, 2), generator=g, dtype=torch.int32)
    plan = dispatch(chosen, torch.bincount(chosen.flatten()).int()) if kind == "experts" else None
    found = []
    for fp8 in (False, True):
        torch.manual_seed(0)
        m = torch.nn.Module()
        m.layer = dict(attention=Attention(128, 2, 1, 32), mlp=MLP(128, 128), experts=Experts(4, 128, 128, True))[kind]
        if fp8:
            to_fp8(m)
        lora_(m, 8, alpha=64)
        away_from_zero(m)
        layer = m.layer.query_key_value if kind == "attention" else m.layer
        p = torch.linspace(0.2, 1, 48).view(24, 2).requires_grad_()
        inputs = x.clone().requires_grad_()
        y = layer(inputs, plan, p) if plan else layer(inputs)
        y.backward(dy[:, : y.shape[1]])
        grads = [p.grad for p in layer.parameters() if p.grad is not None]
        found.append([y.detach(), inputs.grad, *grads, *([p.grad] if plan else [])])
    assert len(found[0]) == len(found[1]) == dict(attention=4, mlp=6, experts=7)[kind]
    for ours, theirs in zip(*found, strict=True):
        assert (ours - theirs).norm() < 0.06 * theirs.norm()


def test_the_rest_is_frozen_and_kept_fp8_weights_are_not_quantised_again():
    m, ids = model(config=wide()), tokens()
    to_fp8(m, weights="kept")
    lora_(m, 4)
    optimizer = torch.optim.AdamW([p for p in m.parameters() if p.requires_grad], fused=True)
    pairs = []
    for _ in range(2):
        m(ids, labels=ids).loss.backward()
        cache = m.layers[1].mlp.experts.fp8.caches[0]
        pairs.append((cache.version, cache.pair[0]._version))
        optimizer.step()
    assert pairs[0] == pairs[1]
    trained = {name for name, p in m.named_parameters() if p.grad is not None}
    assert trained == {name for name, _ in m.named_parameters() if "adapter." in name}


@pytest.mark.parametrize("on", [[kind] for kind in ON])
def test_layers_can_be_chosen(on):
    m = model()
    lora_(m, 2, on=on)
    assert {name for name in adapters(m)} == {*adapted(m, on)}
    ids = tokens()
    m(ids, labels=ids).loss.backward()
    assert all(a.b.grad.abs().sum() > 0 for a in adapters(m).values())


def test_experts_without_rows_and_choices_that_are_not_routed():
    experts = Experts(4, 16, 8)
    lora_(experts, 2)
    away_from_zero(experts)
    x = torch.randn(3, 16, requires_grad=True)
    chosen = torch.tensor([[0, 1], [1, -1], [-1, -1]], dtype=torch.int32)
    counts = torch.tensor([1, 2, 0, 0], dtype=torch.int32)
    y = experts(x, dispatch(chosen, counts), torch.rand(3, 2))
    y.sum().backward()
    adapter = experts.gate_up_adapter
    assert y[2].eq(0).all() and x.grad[2].eq(0).all() and y[:2].ne(0).all()
    assert adapter.b.grad[:2].ne(0).any() and adapter.b.grad[2:].eq(0).all() and adapter.a.grad[2:].eq(0).all()


def test_what_cannot_be_adapted():
    class Other(Experts):
        pass

    with pytest.raises(InputError, match="a Other, can have no adapter"):
        lora_(torch.nn.ModuleDict(dict(experts=Other(2, 8, 8))), 2)
    with pytest.raises(InputError, match="no attention to adapt"):
        lora_(Experts(2, 8, 8), 2, on=["attention"])
    with pytest.raises(ValueError, match="rank of at least 1"):
        lora_(model(), 0)


@pytest.mark.parametrize("backend, rank, fp8", [("triton", 3, False), ("triton", 8, True), ("cuda", 8, True)])
def test_experts_with_each_backends_kernels(backend, rank, fp8):
    """On the virtual GPU, or a GPU: forward and all gradients are the reference's, with ranks that fill no tile."""
    if not runs(backend):
        pytest.skip(f"{backend} cannot run here")
    found = []
    for kernels in ("torch", backend):
        g = torch.Generator().manual_seed(1)
        experts = torch.nn.ModuleDict(dict(layer=Experts(3, 128, 128, True)))
        for p in experts.parameters():
            p.data.normal_(0, 0.05, generator=g)
        experts.to(DEVICE, torch.bfloat16)
        if fp8:
            to_fp8(experts)
        lora_(experts, rank)
        away_from_zero(experts)
        x = torch.randn(10, 128, generator=g).to(DEVICE, torch.bfloat16).requires_grad_()
        chosen = torch.randint(3, (10, 2), generator=g, dtype=torch.int32)
        chosen[3, 1] = -1
        counts = torch.bincount(chosen[chosen >= 0], minlength=3).int()
        weights = torch.rand(10, 2, generator=g).to(DEVICE).requires_grad_()
        with force(kernels):
            y = experts["layer"](x, dispatch(chosen.to(DEVICE), counts.to(DEVICE)), weights)
            y.backward(torch.randn(10, 128, generator=g).to(DEVICE, torch.bfloat16))
        grads = [p.grad for p in experts.parameters() if p.grad is not None]
        found.append([y.detach(), x.grad, weights.grad, *grads])
    assert len(found[0]) == 7
    for ours, theirs in zip(*found, strict=True):
        assert (ours.float() - theirs.float()).norm() < 0.01 * theirs.float().norm()
