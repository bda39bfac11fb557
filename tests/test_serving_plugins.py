"""The plugins of vLLM and SGLang beside small stand-ins for the engines, which have the names that the plugins use."""

import importlib
import re
import sys
from functools import partial
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch

from ling_kernels.integrations.serving import fp8_experts
from ling_kernels.ops.dispatch import counts_here, dispatch
from ling_kernels.ops.moe import expert_mlp
from ling_kernels.ops.quantize import quantize_weight
from ling_kernels.ops.rms_norm import rms_norm_ref
from ling_kernels.ops.route import route_ref

ROOT = Path(__file__).parents[1]
E, H, F, T = 8, 128, 128, 6


@pytest.fixture
def engine(monkeypatch):
    """Makes modules of an engine: engine({"vllm.ir": dict(ops=...)})."""
    ours = [name for name in sys.modules if name.startswith("ling_kernels.integrations.vllm.layers")]
    for name in ours:
        monkeypatch.delitem(sys.modules, name)

    def make(modules: dict[str, dict]):
        for name, content in modules.items():
            parts = name.split(".")
            for end in range(1, len(parts) + 1):
                path = ".".join(parts[:end])
                if path not in sys.modules:
                    module = ModuleType(path)
                    module.__spec__, module.__path__ = ModuleSpec(path, None), []
                    monkeypatch.setitem(sys.modules, path, module)
                    if end > 1:
                        setattr(sys.modules[".".join(parts[: end - 1])], parts[end - 1], module)
            for key, value in content.items():
                setattr(sys.modules[name], key, value)

    yield make
    sys.modules.pop("ling_kernels.integrations.vllm.layers", None)


def entry_points() -> dict[str, str]:
    found = re.findall(r'entry-points\."([^"]+)"\]\nling_kernels = "([^"]+)"', (ROOT / "pyproject.toml").read_text())
    return dict(found)


def register(group: str):
    module, _, name = entry_points()[group].partition(":")
    return getattr(importlib.import_module(module), name)


def test_entry_points_are_quiet_without_an_engine(recwarn):
    assert sorted(entry_points()) == ["sglang.srt.plugins", "vllm.general_plugins"]
    for group in entry_points():
        assert register(group)() is None
    assert not recwarn.list


@pytest.mark.parametrize("group, name", [("vllm.general_plugins", "vllm"), ("sglang.srt.plugins", "sglang")])
def test_another_version_of_an_engine_gets_a_warning(engine, group, name):
    engine({name: {}})
    with pytest.warns(UserWarning, match=f"ling_kernels was written for {name} .*runs without us"):
        register(group)()


def layer_of_experts() -> tuple[SimpleNamespace, dict]:
    """Weights in the engines' names, and the same as operands of the op."""
    torch.manual_seed(0)
    w13, w2 = (quantize_weight(torch.randn(E, n, k) / k**0.5) for n, k in ((2 * F, H), (H, F)))
    layer = SimpleNamespace(
        w13_weight=w13[0], w13_weight_scale_inv=w13[1], w2_weight=w2[0], w2_weight_scale_inv=w2[1], expert_map=None
    )
    return layer, dict(w_gate_up=w13, w_down=w2)


def reference(x, weights, experts, operands):
    """By the op, for experts of which -1 are elsewhere."""
    plan = dispatch(experts.int(), counts_here(experts.int(), E))
    return expert_mlp(x, plan, weights, **operands)


def test_experts_elsewhere_are_left_out():
    layer, operands = layer_of_experts()
    x, weights = torch.randn(T, H), torch.rand(T, 2)
    experts = torch.tensor([[0, 9], [-1, 3], [8, 1 << 30], [-2, 5], [7, 6], [2, 4]])
    scales = layer.w13_weight_scale_inv, layer.w2_weight_scale_inv
    y = fp8_experts(x, layer.w13_weight, scales[0], layer.w2_weight, scales[1], weights, experts)
    here = torch.where((experts < 0) | (experts >= E), -1, experts)
    assert torch.equal(y, reference(x, weights, here, operands))
    assert not y[2].any() and y[0].any()


class StockFp8Config:
    """vLLM's, which makes StockMoEMethod for a layer of experts."""

    def __init__(self, weight_block_size):
        self.weight_block_size = weight_block_size

    def get_quant_method(self, layer, prefix):
        return StockMoEMethod(self, layer) if hasattr(layer, "w13_weight") else "linear"


class StockMoEMethod:
    weight_scale_refine = None

    def __init__(self, config, layer):
        self.weight_block_size, self.moe = config.weight_block_size, SimpleNamespace(has_bias=False)

    @property
    def is_monolithic(self):
        return True


class StockOp:
    """Of vLLM's IR."""

    def __init__(self):
        self.impls = {}

    def register_impl(self, provider, *, supports_args):
        return lambda function: self.impls.update({provider: (function, supports_args)})


@pytest.fixture
def vllm(engine):
    quantizations, stock_calls = {}, []

    def grouped_topk(*args, **given):
        stock_calls.append(1)

    layers = "vllm.model_executor.layers"
    router = f"{layers}.fused_moe.router.grouped_topk_router"
    engine({
        "vllm.ir": dict(ops=SimpleNamespace(rms_norm=StockOp(), fused_add_rms_norm=StockOp())),
        f"{layers}.quantization": dict(
            register_quantization_config=lambda name: lambda made: quantizations.setdefault(name, []).append(made)
        ),
        f"{layers}.quantization.fp8": dict(Fp8Config=StockFp8Config, Fp8MoEMethod=StockMoEMethod),
        router: dict(grouped_topk=grouped_topk),
    })  # fmt: skip
    register("vllm.general_plugins")()
    register("vllm.general_plugins")()
    return SimpleNamespace(
        configs=quantizations, ops=sys.modules["vllm.ir"].ops, router=sys.modules[router], stock=stock_calls
    )


def test_vllm_experts(vllm):
    made = vllm.configs["ling_kernels"]
    assert [*vllm.configs] == ["ling_kernels"] and made[0] is made[1] and made[0].get_name() == "ling_kernels"
    config = made[0]([128, 128])
    layer, operands = layer_of_experts()
    assert config.get_quant_method(object(), "") == "linear"
    method = config.get_quant_method(layer, "")
    assert type(method).__name__ == "LingFp8MoEMethod" and method.is_monolithic is False
    method.process_weights_after_loading(layer)
    x, weights, ids = (
        torch.randn(T, H),
        torch.rand(T, 2),
        torch.tensor([[0, 5], [3, 1], [7, 6], [2, 4], [1, 0], [6, 2]]),
    )
    y = method.apply(
        layer=layer, x=x, topk_weights=weights, topk_ids=ids, shared_experts=None, shared_experts_input=None
    )
    assert torch.equal(y, reference(x, weights, ids, operands))
    layer.expert_map = torch.tensor([4, 5, 6, 7, -1, -1, 2, 3], dtype=torch.int32)
    ids[0, 0] = -1  # a padding token's
    y = method.apply(layer, x, weights, ids, None, None)
    here = torch.where(ids < 0, -1, layer.expert_map[ids])
    assert torch.equal(y, reference(x, weights, here, operands))


@pytest.mark.parametrize("changes", [
    dict(config=[64, 128]), dict(activation="gelu"), dict(swiglu_limit=7.0), dict(apply_router_weight_on_input=True)
], ids=str)  # fmt: skip
def test_other_layers_are_vllms_own(vllm, changes):
    layer, _ = layer_of_experts()
    config = vllm.configs["ling_kernels"][0](changes.pop("config", [128, 128]))
    layer.__dict__.update(changes)
    assert type(config.get_quant_method(layer, "")) is StockMoEMethod


def test_vllm_takes_us_where_the_user_names_us(vllm):
    choose = vllm.configs["ling_kernels"][0].override_quantization_method
    block = dict(quant_method="fp8", weight_block_size=[128, 128])
    assert choose(block, "ling_kernels", hf_config=None) == "ling_kernels"
    assert choose(block, None) is None and choose(block, "fp8") is None
    assert choose(dict(quant_method="fp8"), "ling_kernels") is None


def test_vllm_router(vllm):
    before = vllm.router.grouped_topk
    config, (layer, _) = vllm.configs["ling_kernels"][0]([128, 128]), layer_of_experts()
    for _ in range(2):
        config.get_quant_method(layer, "")
    assert vllm.router.grouped_topk.__wrapped__ is before
    logits, bias = torch.randn(T, 16), torch.randn(16)
    routed = partial(vllm.router.grouped_topk, hidden_states=None, gating_output=logits, topk=4, num_expert_group=4,
                     topk_group=2, routed_scaling_factor=2.5)  # fmt: skip
    weights, experts = routed(renormalize=True, scoring_func="sigmoid", e_score_correction_bias=bias)
    expected = route_ref(logits, bias, None, 4, 2, 4, 2.5)
    assert torch.equal(experts, expected[1])
    torch.testing.assert_close(weights, expected[0])
    for other in (dict(scoring_func="softmax"), dict(renormalize=False), dict(e_score_correction_bias=None)):
        routed(**dict(renormalize=True, scoring_func="sigmoid", e_score_correction_bias=bias) | other)
    assert len(vllm.stock) == 3


def test_vllm_norms(vllm):
    x, residual, w = torch.randn(3, 2, H), torch.randn(3, 2, H), torch.randn(H)
    for op in (vllm.ops.rms_norm, vllm.ops.fused_add_rms_norm):
        function, supports = op.impls["ling_kernels"]
        tensors = (x,) if op is vllm.ops.rms_norm else (x, residual)
        assert supports(*tensors, w, 0.1) and not supports(*tensors, None, 0.1) and not supports(*tensors, w, 0.1, 64)
        torch.testing.assert_close(function(*tensors, w, 0.1), rms_norm_ref(x, w, *tensors[1:], eps=0.1))


class Backend:
    def __init__(self, value):
        self.value = value


@pytest.fixture
def sglang(engine):
    state = SimpleNamespace(asked="ling_kernels", cores={}, choices=[], hooks={}, names=set())

    def resolve(name):
        if name not in state.names:
            raise ValueError(name)
        return Backend(name)

    def register_core(name, factory):
        state.names.add(name)
        state.cores[name] = factory

    class Runner:
        """SGLang's, of a registered core."""

        def __init__(self, backend, config):
            self.runner_backend, self.config, self.core = backend, config, state.cores[backend.value](config)

        def run(self, dispatch_output, quant_info):
            return self.core.run_from_dispatch(dispatch_output, quant_info, self.config, hooks=None)

    class Core:
        def __init__(self, config):
            self.config = config

    def hook(target, function, kind):
        assert target not in state.hooks and kind == "around"
        state.hooks[target] = function

    moe, combine = "sglang.srt.layers.moe", partial(SimpleNamespace)
    engine({
        f"{moe}.moe_runner.base": dict(DispatchMoeRunnerCore=Core),
        f"{moe}.moe_runner.runner": dict(register_moe_runner_core=register_core, MoeRunner=Runner),
        f"{moe}.utils": dict(
            resolve_moe_runner_backend=resolve, get_moe_runner_backend=lambda: Backend(state.asked)
        ),
        f"{moe}.token_dispatcher.standard": dict(StandardCombineInput=combine),
        "sglang.srt.plugins.hook_registry": dict(
            HookRegistry=SimpleNamespace(register=hook), HookType=SimpleNamespace(AROUND="around")
        ),
        "sglang.srt.server_args": dict(add_moe_runner_backend_choices=state.choices.extend),
    })  # fmt: skip
    register("sglang.srt.plugins")()
    register("sglang.srt.plugins")()
    return state


def stock(*args, **given):
    return "stock"


def test_sglang_registers_once(sglang):
    assert sglang.choices == ["ling_kernels"] and [*sglang.cores] == ["ling_kernels"]
    assert sorted(target.rpartition(".")[2] for target in sglang.hooks) == [
        "apply", "biased_grouped_topk", "create_moe_runner", "forward_cuda",
    ]  # fmt: skip


def around(sglang, name):
    return partial(next(hook for target, hook in sglang.hooks.items() if target.endswith(name)), stock)


def method_of_sglang(layer, blocks=(128, 128)):
    quant_info = SimpleNamespace(
        w13_weight=layer.w13_weight, w13_scale=layer.w13_weight_scale_inv, w2_weight=layer.w2_weight,
        w2_scale=layer.w2_weight_scale_inv,
    )  # fmt: skip
    return SimpleNamespace(
        block_quant=True, weight_block_size=[*blocks], runner=None, get_triton_quant_info=lambda layer: quant_info
    )


def test_sglang_experts(sglang):
    layer, operands = layer_of_experts()
    method, config = (
        method_of_sglang(layer),
        SimpleNamespace(activation="silu", is_gated=True, routed_scaling_factor=2.5),
    )
    create, apply = around(sglang, "create_moe_runner"), around(sglang, "apply")
    assert create(method, layer, config) is None and method.runner.runner_backend.value == "ling_kernels"
    x, weights = torch.randn(T, H), torch.rand(T, 2)
    ids = torch.tensor([[0, 5], [3, -1], [7, 6], [2, 4], [1, 0], [6, 2]])
    dispatched = SimpleNamespace(hidden_states=x, topk_output=(weights, ids, None))
    y = apply(method, layer, dispatched).hidden_states
    assert torch.equal(y, reference(x, weights * 2.5, ids, operands))
    method.runner = None
    assert apply(method, layer, dispatched) == "stock"


@pytest.mark.parametrize("changes, message", [
    (dict(activation="gelu"), "activation gelu"),
    (dict(swiglu_limit=7.0), "swiglu_limit"),
    (dict(blocks=(64, 64)), "blocks of 128 x 128"),
])  # fmt: skip
def test_sglang_refuses_other_layers(sglang, changes, message):
    layer, _ = layer_of_experts()
    method = method_of_sglang(layer, changes.pop("blocks", (128, 128)))
    config = SimpleNamespace(**dict(activation="silu", is_gated=True, routed_scaling_factor=1.0) | changes)
    with pytest.raises(ValueError, match=message):
        around(sglang, "create_moe_runner")(method, layer, config)


def test_sglang_router(sglang):
    logits, bias = torch.randn(T, 16), torch.randn(16)
    given = dict(
        hidden_states=None, gating_output=logits, correction_bias=bias, topk=4, renormalize=True, num_expert_group=4,
        topk_group=2, num_fused_shared_experts=0, routed_scaling_factor=2.5,
    )  # fmt: skip
    routed = around(sglang, "biased_grouped_topk")
    for on_output, scale in ((False, 1.0), (True, 2.5)):
        weights, experts = routed(**given, apply_routed_scaling_factor_on_output=on_output)
        expected = route_ref(logits, bias, None, 4, 2, 4, scale)
        assert torch.equal(experts, expected[1])
        torch.testing.assert_close(weights, expected[0])
    for other in (dict(renormalize=False), dict(num_fused_shared_experts=1), dict(correction_bias=bias.expand(T, 16))):
        assert routed(**given | other) == "stock"


def test_sglang_norm(sglang):
    x, residual = torch.randn(3, H), torch.randn(3, H)
    layer = SimpleNamespace(weight=torch.randn(H), variance_epsilon=0.1, has_weight=True)
    norm = around(sglang, "forward_cuda")
    torch.testing.assert_close(norm(layer, x), rms_norm_ref(x, layer.weight, eps=0.1))
    torch.testing.assert_close(norm(layer, x, residual), rms_norm_ref(x, layer.weight, residual, eps=0.1))
    assert norm(layer, x, residual, residual) == norm(layer, x, quant_linear=object()) == "stock"
    layer.variance_size_override = 64
    assert norm(layer, x) == "stock"


def test_sglang_without_our_backend(sglang):
    """Nothing changes where the user has asked for another."""
    sglang.asked = "triton"
    layer, _ = layer_of_experts()
    method = method_of_sglang(layer)
    assert around(sglang, "create_moe_runner")(method, layer, None) == "stock"
    routed = dict(gating_output=torch.randn(T, 16), correction_bias=torch.randn(16), topk=4, renormalize=True)
    assert around(sglang, "biased_grouped_topk")(**routed) == "stock"
    norm = SimpleNamespace(weight=torch.randn(H), variance_epsilon=0.1, has_weight=True)
    assert around(sglang, "forward_cuda")(norm, torch.randn(3, H)) == "stock"
