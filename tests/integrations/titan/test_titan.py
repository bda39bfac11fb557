"""torchtitan's overrides by ling_kernels: the same MoE layers and norms, forward and backward."""

from dataclasses import dataclass

import pytest
import torch
from torchtitan.config import Configurable
from torchtitan.config.override import OverrideConfig, apply_overrides
from torchtitan.models.common.moe import MoE
from torchtitan.models.common.nn_modules import RMSNorm
from torchtitan.models.deepseek_v3 import deepseekv3_configs

from ling_kernels.errors import InputError
from ling_kernels.integrations import torchtitan as ours

NAMES = ("experts", "router", "dispatcher", "norm")
CLASSES = dict(experts=ours.Experts, router=ours.Router, dispatcher=ours.Dispatcher, norm=ours.Norm)


@dataclass(kw_only=True, slots=True)
class Root(Configurable.Config):
    model: Configurable.Config


def config(groups=True, **changes):
    """deepseek_v3's debug model, with the routing of Ling-2.0 where it differs."""
    model = deepseekv3_configs["debugmodel"](attn_backend="flex", moe_comm_backend="standard")
    for layer in model.layers:
        if (moe := getattr(layer, "moe", None)) is not None:
            wanted = dict(score_func="sigmoid", route_norm=True, route_scale=2.5, top_k=3)
            if groups:
                wanted |= dict(num_expert_groups=4, num_limited_groups=2)
            for name, value in (wanted | changes).items():
                setattr(moe.router, name, value)
            moe.routed_experts.token_dispatcher.top_k = moe.router.top_k
    return Root(model=model)


def overridden(names, **options):
    root = config(**options)
    lines = apply_overrides(OverrideConfig(imports=[f"{ours.__name__}.{name}" for name in names]), root)
    assert lines
    return root


def moe_of(root, seed=0) -> MoE:
    layer = next(layer for layer in root.model.layers if getattr(layer, "moe", None) is not None)
    moe = layer.moe.build()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in moe.parameters():
            p.normal_(0, p.shape[-1] ** -0.5, generator=generator)
        moe.expert_bias_E.uniform_(-0.2, 0.2, generator=generator)
    return moe


def run(moe, x):
    x = x.clone().requires_grad_()
    y = moe(x)
    generator = torch.Generator().manual_seed(1)
    (y * torch.randn(y.shape, generator=generator)).sum().backward()
    return {"y": y.detach(), "dx": x.grad, **{n: p.grad for n, p in moe.named_parameters()}}


def error(a, b):
    return ((a.double() - b.double()).norm() / b.double().norm()).item()


@pytest.mark.parametrize("names", [NAMES, *((name,) for name in NAMES if name != "norm")], ids="-".join)
@pytest.mark.parametrize("groups", [True, False])
def test_an_moe_layer_is_torchtitans(names, groups):
    """To the rounding of bf16, in which torchtitan computes the experts whatever its parameters are."""
    stock, layer = moe_of(config(groups)), moe_of(overridden(names, groups=groups))
    kinds = {type(m) for m in (*layer.modules(), layer.routed_experts.token_dispatcher)}
    assert {CLASSES[name] for name in names if name != "norm"} <= kinds
    x = torch.randn(2, 24, 256, generator=torch.Generator().manual_seed(2))
    got, want = run(layer, x), run(stock, x)
    assert got.keys() == want.keys() and len(got) > 6
    for name, value in want.items():
        assert error(got[name], value) < 1e-2, name
    torch.testing.assert_close(layer.tokens_per_expert_E, stock.tokens_per_expert_E, rtol=0, atol=0)
    assert layer.tokens_per_expert_E.sum() == 2 * 24 * 3


def test_the_router_alone_is_exact_to_rounding_of_fp32():
    stock, layer = moe_of(config()).router, moe_of(overridden(["router"])).router
    x, bias = torch.randn(3, 17, 256), torch.rand(8) / 4
    for given in (bias, None):
        (weights, experts, scores), (w, e, s) = layer(x, given), stock(x, given)
        order, o = experts.argsort(-1), e.argsort(-1)
        assert torch.equal(experts.gather(-1, order), e.gather(-1, o)) and experts.dtype == e.dtype
        torch.testing.assert_close(weights.gather(-1, order), w.gather(-1, o), rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(scores, s)


def test_state_dicts_are_torchtitans():
    stock, layer = moe_of(config()), moe_of(overridden(NAMES), seed=5)
    layer.load_state_dict(stock.state_dict())
    x = torch.randn(1, 9, 256)
    assert error(layer(x), stock(x)) < 1e-2


def test_every_norm_of_the_model_is_replaced():
    root = overridden(["norm"])
    norms = []

    def walk(node):
        for f in getattr(node, "__dataclass_fields__", {}):
            value = getattr(node, f, None)
            for child in value if isinstance(value, list) else [value]:
                if isinstance(child, RMSNorm.Config):
                    norms.append(type(child))
                if isinstance(child, Configurable.Config):
                    walk(child)

    walk(root.model)
    assert len(norms) > 12 and {*norms} == {ours.Norm.Config}
    x = torch.randn(5, 64, requires_grad=True)
    layers = [kind.Config(normalized_shape=64, eps=1e-3).build() for kind in (RMSNorm, ours.Norm)]
    weight = torch.rand(64) + 0.5
    results = []
    for layer in layers:
        layer.weight.data.copy_(weight)
        y = layer(x)
        results.append((y, *torch.autograd.grad(y.square().sum(), (x, layer.weight))))
    for want, got in zip(*results, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "changes, words",
    [(dict(score_func="softmax"), "score_func 'softmax'"), (dict(route_norm=False), "route_norm False"),
     (dict(top_k=1), "top_k 1"), (dict(num_limited_groups=None), "num_limited_groups")],
)  # fmt: skip
def test_routers_of_another_formula_are_refused(changes, words):
    with pytest.raises(InputError, match=words):
        overridden(["router"], **changes)


def test_norms_without_weights_are_refused():
    with pytest.raises(InputError, match="without weights"):
        ours.norm(RMSNorm.Config(normalized_shape=8, elementwise_affine=False))
