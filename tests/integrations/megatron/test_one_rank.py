"""Megatron's own GPTModel against the same model with our parts, on one rank."""

import importlib
import sys

import pytest
import torch

from ling_kernels.errors import InputError
from tests.integrations.megatron import cpu

OPS = {  # those of a part, as module:name of the integration
    "experts": ["experts:swiglu"],
    "attention": ["attention:qk_norm_rope"],
    "router": ["routing:route", "routing:router_gemm"],
    "permutation": ["permutation:permute"],  # of chunks; of tokens it needs our router
    "router-permutation": ["permutation:unpermute"],
    "loss": ["loss:linear_cross_entropy"],
}


PARTS = ["experts", "attention", "router", "permutation", "loss", "balance"]


@pytest.fixture(scope="module")
def stock(one_rank):
    """Megatron's model, its loss and its gradients."""
    model = cpu.model(cpu.config())
    return model, *cpu.step(model, cpu.batch())


def counted(monkeypatch, op: str) -> list:
    """A list to which every call of an op adds an element."""
    module, name = op.split(":")
    module = importlib.import_module(f"ling_kernels.integrations.megatron.{module}")
    calls, real = [], getattr(module, name)
    monkeypatch.setattr(module, name, lambda *args, **kwargs: calls.append(op) or real(*args, **kwargs))
    return calls


@pytest.mark.parametrize("parts", [name.split("-") for name in OPS] + [PARTS], ids="-".join)
def test_loss_and_gradients(megatron, stock, monkeypatch, parts):
    """Of the main and the MTP loss and the z-loss, with the weights that Megatron's model has saved."""
    theirs, loss, gradients = stock
    ops = [op for name, ops in OPS.items() if {*name.split("-")} <= {*parts} for op in ops]
    calls = [counted(monkeypatch, op) for op in ops]
    megatron.apply(parts)
    ours = cpu.model(theirs.config)
    ours.load_state_dict(theirs.state_dict())
    our_loss, our_gradients = cpu.step(ours, cpu.batch())
    assert our_loss == pytest.approx(loss, rel=1e-6)
    cpu.close(our_gradients, gradients, 1e-5)
    assert ops and all(calls), ops


def test_logits(megatron):
    config = cpu.config(mtp=0)  # 0.16 has no logits with MTP, which asks for labels
    theirs = cpu.model(config).eval()
    batch = cpu.batch() | dict(labels=None, loss_mask=None)
    megatron.apply()
    ours = cpu.model(config).eval()
    ours.load_state_dict(theirs.state_dict())
    with torch.no_grad():
        torch.testing.assert_close(ours(**batch), theirs(**batch), rtol=1e-5, atol=1e-5)


def test_tokens_of_experts_are_counted(megatron, stock):
    """As the balance bias needs them."""
    theirs, *_ = stock
    megatron.apply()
    ours = cpu.model(theirs.config)
    ours.load_state_dict(theirs.state_dict())
    counts = []
    for model in (theirs, ours):
        routers = [m for m in model.modules() if hasattr(m, "local_tokens_per_expert")]
        for router in routers:
            router.local_tokens_per_expert.zero_()
        cpu.backward(model, cpu.batch(5))
        counts.append([router.local_tokens_per_expert for router in routers])
    assert len(counts[0]) == 3 and counts[0][0].sum() == 2 * 12 * 4 and all(map(torch.equal, *counts))


@pytest.mark.parametrize("changes", [
    dict(moe_router_load_balancing_type="seq_aux_loss", moe_aux_loss_coeff=1e-2),
    dict(moe_router_num_groups=None, moe_router_group_topk=None, moe_router_topk_scaling_factor=None),
    dict(moe_router_topk=2, moe_router_group_topk=2),
    dict(moe_router_score_function="softmax", moe_router_enable_expert_bias=False),
    dict(moe_expert_capacity_factor=1.0),
    dict(moe_expert_capacity_factor=1.0, moe_pad_expert_input_to_capacity=True),
    dict(moe_token_dispatcher_type="allgather"),
    dict(moe_router_dtype=None),
    dict(qk_layernorm=False),
    dict(no_rope_freq=[0, 1, 0], mtp=0),
    dict(recompute_granularity="full", recompute_method="uniform", recompute_num_layers=1),
    dict(calculate_per_token_loss=True),
    dict(num_query_groups=4),
], ids=str)  # fmt: skip
def test_other_configurations(megatron, changes):
    """What we do not have is Megatron's own code, and what we have does not change beside it."""
    config = cpu.config(**changes)
    theirs = cpu.model(config)
    loss, gradients = cpu.step(theirs, cpu.batch())
    megatron.apply()
    ours = cpu.model(config)
    ours.load_state_dict(theirs.state_dict())
    our_loss, our_gradients = cpu.step(ours, cpu.batch())
    assert our_loss == pytest.approx(loss, rel=1e-6)
    cpu.close(our_gradients, gradients, 1e-5)


def test_tied_head(megatron):
    theirs = cpu.model(cpu.config(), tied=True)
    loss, gradients = cpu.step(theirs, cpu.batch())
    megatron.apply()
    ours = cpu.model(cpu.config(), tied=True)
    ours.load_state_dict(theirs.state_dict())
    our_loss, our_gradients = cpu.step(ours, cpu.batch())
    assert our_loss == pytest.approx(loss, rel=1e-6)
    cpu.close(our_gradients, gradients, 1e-5)


def test_hybrid_model(megatron, monkeypatch):
    pytest.importorskip("megatron.core.models.hybrid")
    config = cpu.config(mtp=0, num_layers=6, moe_layer_freq=1, moe_z_loss_coeff=None)  # its log counts four layers
    theirs = cpu.hybrid_model(config)
    loss, gradients = cpu.step(theirs, cpu.batch())
    calls = [counted(monkeypatch, op) for ops in OPS.values() for op in ops]
    megatron.apply()
    ours = cpu.hybrid_model(config)
    ours.load_state_dict(theirs.state_dict())
    our_loss, our_gradients = cpu.step(ours, cpu.batch())
    assert our_loss == pytest.approx(loss, rel=1e-6)
    cpu.close(our_gradients, gradients, 1e-5)
    assert all(calls) and len(gradients) > 90


def test_yarn(megatron):
    """Megatron rotates by stretched angles and multiplies cos and sin by a factor."""
    yarn = dict(
        position_embedding_type="yarn", yarn_rotary_scaling_factor=4.0, yarn_original_max_position_embeddings=32,
        yarn_beta_fast=32.0, yarn_beta_slow=1.0, yarn_mscale=1.0, yarn_mscale_all_dim=0.0,
        yarn_correction_range_round_to_int=True,
    )  # fmt: skip
    config = cpu.config(mtp=0)
    for name, value in yarn.items():  # fields in some versions, attributes in others
        setattr(config, name, value)
    theirs = cpu.model(config)
    megatron.apply(["attention"])
    ours = cpu.model(config)
    ours.load_state_dict(theirs.state_dict())
    loss, gradients = cpu.step(theirs, cpu.batch())
    our_loss, our_gradients = cpu.step(ours, cpu.batch())
    assert our_loss == pytest.approx(loss, rel=1e-6)
    cpu.close(our_gradients, gradients, 1e-5)


def test_recorded_routes_are_replayed(megatron, one_rank):
    """Routes that Megatron's router has recorded, in a model whose own choices would be others."""
    from megatron.core.transformer.moe.router_replay import RouterReplay, RouterReplayAction

    def replayed(parts, routes=None):
        RouterReplay.clear_global_router_replay_instances()
        megatron.apply(parts)
        model = cpu.model(cpu.config(moe_enable_routing_replay=True))
        if routes is None:
            RouterReplay.set_global_router_replay_action(RouterReplayAction.RECORD)
        else:
            for name, bias in model.named_buffers():
                if name.endswith("expert_bias"):
                    bias.copy_(bias.flip(0))
            RouterReplay.set_replay_data(routes)
            RouterReplay.set_global_router_replay_action(RouterReplayAction.REPLAY_FORWARD)
        result = cpu.step(model, cpu.batch())
        return RouterReplay.get_recorded_data(), *result

    routes, loss, _ = replayed([])
    our_routes, our_loss, _ = replayed(["router", "permutation"])
    assert our_loss == pytest.approx(loss, rel=1e-6)
    for ours, theirs in zip(our_routes, routes, strict=True):
        assert ours.dtype == theirs.dtype and torch.equal(ours.sort().values, theirs.sort().values)
    _, loss, gradients = replayed([], routes)
    _, our_loss, our_gradients = replayed(["router", "permutation"], routes)
    assert our_loss == pytest.approx(loss, rel=1e-6)
    cpu.close(our_gradients, gradients, 1e-5)
    RouterReplay.clear_global_router_replay_instances()


def test_chunks(megatron):
    """Chunks of rows, some of them empty, in another order; between ranks the dispatchers sort by expert like this."""
    dispatchers = importlib.import_module("megatron.core.transformer.moe.token_dispatcher")
    sizes, order = torch.tensor([3, 0, 5, 1, 0, 4]), torch.tensor([2, 5, 1, 0, 4, 3])
    rows, probs = torch.randn(13, 8, requires_grad=True), torch.rand(13, requires_grad=True)

    def results():
        x, p = dispatchers.sort_chunks_by_idxs(rows, sizes, order, probs=probs)
        weight = torch.arange(13.0)
        return x, p, *torch.autograd.grad((x * weight[:, None]).sum() + (p * weight).sum(), (rows, probs))

    theirs = results()
    megatron.apply()
    for ours, stock in zip(results(), theirs, strict=True):
        assert torch.equal(ours, stock)
    assert dispatchers.sort_chunks_by_idxs(rows, sizes, order)[1] is None


def test_late_weight_gradients(megatron, stock):
    """With delay_wgrad_compute they come in backward_dw, from where Megatron's data parallelism takes them."""
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig

    theirs, _, gradients = stock
    megatron.apply()
    config = cpu.config()
    config.delay_wgrad_compute = True
    ours = cpu.model(config)
    ours.load_state_dict(theirs.state_dict())
    parallel = DistributedDataParallel(config, DistributedDataParallelConfig(delay_wgrad_compute=True), ours)
    cpu.backward(parallel, cpu.batch())
    layers = [module for module in ours.modules() if isinstance(module, megatron.Experts)]
    late = [p for layer in layers for p in layer.parameters()]
    assert len(late) == 6 and not any(p.main_grad.any() for p in late)
    for layer in layers:
        layer.backward_dw()
    assert all(p.grad is None for p in ours.parameters())
    cpu.close(cpu.by_stock_names((name, p.main_grad) for name, p in ours.named_parameters()), gradients, 1e-5)


def test_fp8_experts(megatron, one_rank):
    """Near the same products in fp32, but not the same; an expert without rows and weight gradients that come late."""
    from megatron.core.transformer.moe.moe_utils import get_default_pg_collection

    groups, config = get_default_pg_collection(), cpu.config(hidden_size=128, moe_ffn_hidden_size=128)
    plain = megatron.Experts(4, config, pg_collection=groups)
    config.delay_wgrad_compute = True
    fp8 = megatron.Fp8Experts(4, config, pg_collection=groups)
    fp8.load_state_dict(plain.state_dict())
    rows, weights, counts = torch.randn(40, 128), torch.rand(40), torch.tensor([7, 0, 30, 3])
    results = []
    for experts in (plain, fp8):
        x, p = rows.clone().requires_grad_(), weights.clone().requires_grad_()
        y, bias = experts(x, counts, p)
        assert bias is None
        y.square().sum().backward()
        assert (experts.weight1.grad is None) == (experts is fp8)
        experts.backward_dw()
        results.append([y, x.grad, p.grad, experts.weight1.grad, experts.weight2.grad])
    for ours, theirs in zip(*reversed(results), strict=True):
        assert 1e-3 < (ours - theirs).norm() / theirs.norm() < 0.1
    assert not results[1][3][1].any()


def test_a_rank_without_rows(megatron, one_rank):
    """Its experts' gradients are 0, and not missing: other ranks wait for them."""
    from megatron.core.transformer.moe.moe_utils import get_default_pg_collection

    config = cpu.config(hidden_size=128, moe_ffn_hidden_size=128)
    for kind in (megatron.Experts, megatron.Fp8Experts):
        experts = kind(4, config, pg_collection=get_default_pg_collection())
        x = torch.randn(0, 128, requires_grad=True)
        y, _ = experts(x, torch.zeros(4, dtype=torch.long), torch.rand(0))
        y.sum().backward()
        assert y.shape == x.grad.shape == (0, 128)
        assert all(p.grad is not None and not p.grad.any() for p in experts.parameters())


def test_fp8_model(megatron):
    """Experts, attention and MLPs in FP8, near Megatron's model in fp32; the head, the router and MTP's projection are
    not, nor are layers whose sizes do not fit."""
    from ling_kernels.integrations.megatron.linear import Fp8Product

    sizes = dict(hidden_size=128, ffn_hidden_size=256, moe_ffn_hidden_size=128, moe_shared_expert_intermediate_size=128,
                 num_attention_heads=8, num_query_groups=4)  # fmt: skip
    theirs = cpu.model(cpu.config(**sizes))
    loss, gradients = cpu.step(theirs, cpu.batch())
    megatron.apply(fp8=True)
    ours = cpu.model(theirs.config)
    ours.load_state_dict(theirs.state_dict())
    for p in ours.parameters():  # as under Megatron's data parallelism, whose hooks add gradients to it
        p.main_grad = torch.zeros_like(p)
    our_loss, our_gradients = cpu.step(ours, cpu.batch())
    assert not any(p.main_grad.any() for p in ours.parameters())
    assert our_loss == pytest.approx(loss, rel=1e-2) and our_loss != loss
    names = [name for name, module in ours.named_modules() if isinstance(module, Fp8Product)]
    assert len(names) == 4 * 4 and all("linear_" in name for name in names)  # of four layers, MTP's with them
    assert sum(isinstance(module, megatron.Fp8Experts) for module in ours.modules()) == 3
    for name in ("decoder.layers.0.mlp.linear_fc1.weight", "decoder.layers.0.self_attention.linear_qkv.weight"):
        assert (our_gradients[name] - gradients[name]).norm() < 0.3 * gradients[name].norm()
    plain = cpu.config(moe_ffn_hidden_size=128, hidden_size=128)
    assert cpu.step(cpu.model(plain), cpu.batch())[0] > 0  # its dense MLP has 64 columns
    with pytest.raises(InputError, match="multiples of 128, not 32 and 16"):
        cpu.model(cpu.config())


@pytest.mark.parametrize("fp8", [False, True])
def test_bf16_model(megatron, fp8):
    """As Megatron's mixed precision has it: weights and activations in bf16, the balance bias in fp32."""
    from megatron.core.transformer.module import Float16Module

    config = cpu.config(bf16=True, params_dtype=torch.bfloat16, hidden_size=128, moe_ffn_hidden_size=128)
    theirs = Float16Module(config, cpu.model(config))
    loss, _ = cpu.step(theirs, cpu.batch())
    megatron.apply(fp8=fp8)
    ours = Float16Module(config, cpu.model(config))
    ours.load_state_dict(theirs.state_dict())
    our_loss, gradients = cpu.step(ours, cpu.batch())
    assert our_loss == pytest.approx(loss, rel=5e-3)
    assert {g.dtype for g in gradients.values() if g is not None} == {torch.bfloat16}
    biases = [bias for name, bias in ours.named_buffers() if name.endswith("expert_bias")]
    assert len(biases) == 3 and all(bias.dtype == torch.float32 for bias in biases)


def test_balance_keeps_the_mean(megatron):
    functions = importlib.import_module("megatron.core.distributed.finalize_model_grads")
    tokens, bias = torch.tensor([[5.0, 1, 0, 2], [4, 4, 0, 0]]), torch.randn(2, 4)
    theirs = functions.get_updated_expert_bias(tokens.clone(), bias, 1e-3)
    megatron.apply()
    ours = functions.get_updated_expert_bias(tokens.clone(), bias, 1e-3)
    torch.testing.assert_close(ours.mean(-1), bias.mean(-1))
    torch.testing.assert_close(ours - theirs, (bias - theirs).mean(-1, keepdim=True).expand(2, 4))
    assert not torch.equal(ours, theirs)  # in the first row one expert has too much and two have too little


def test_undo(megatron):
    from ling_kernels.integrations.megatron import patch

    def functions():
        names = [*patch.FUNCTIONS.values(), [(model, "__init__", None) for model in patch.MODELS]]
        owners = [(patch.found(path), name) for part in names for path, name, _ in part]
        return [getattr(owner, name) for owner, name in owners if owner is not None]

    before = functions()
    megatron.apply()
    assert all(a is not b for a, b in zip(before, functions(), strict=True))
    megatron.apply(["loss"])  # a second call replaces the first
    changed = [a.__qualname__ for a, b in zip(before, functions(), strict=True) if a is not b]
    assert {*changed} - {"HybridModel.forward"} == {
        "GPTModel._postprocess",
        "LanguageModule.compute_language_model_loss",
    }
    megatron.undo()
    assert all(a is b for a, b in zip(before, functions(), strict=True))
    assert not any(isinstance(module, megatron.Experts) for module in cpu.model(cpu.config()).modules())


def test_a_specification_is_copied(megatron):
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec

    spec = get_gpt_decoder_block_spec(cpu.config(), use_transformer_engine=False)
    before = str(spec)
    ours = megatron.replaced(spec)
    assert str(spec) == before
    assert str(ours).count("megatron.experts.Experts") == 2 and str(ours).count("attention.Attention") == 3


@pytest.mark.parametrize("changes, message", [
    (dict(activation_func=torch.nn.functional.gelu), "activation_func"),
    (dict(gated_linear_unit=False), "gated_linear_unit=False"),
    (dict(add_bias_linear=True), "add_bias_linear=True"),
])  # fmt: skip
def test_other_experts_are_refused(megatron, changes, message):
    megatron.apply()
    with pytest.raises(InputError, match=message):
        cpu.model(cpu.config(**changes))


def test_unknown_part(megatron):
    with pytest.raises(InputError, match="no part 'norm'; parts are experts, "):
        megatron.apply(["norm"])
    with pytest.raises(InputError, match=r"parts is the text 'experts,loss': .*such as \['experts', 'loss'\]"):
        megatron.apply("experts,loss")


def test_command(megatron, tmp_path, capsys, monkeypatch):
    from ling_kernels.integrations.megatron.__main__ import main

    script = tmp_path / "train.py"
    script.write_text(
        "import sys\n"
        "from megatron.core.models.gpt.gpt_model import GPTModel\n"
        "print(sys.argv[1:], sys.path[0], GPTModel._postprocess.__wrapped__.__name__, GPTModel.__init__.__code__)\n"
    )
    monkeypatch.setattr("sys.path", [*sys.path])
    monkeypatch.setattr("sys.argv", [])
    assert main(["--parts", "loss,router", str(script), "--fp8", "--lr", "1"]) == 0
    out = capsys.readouterr().out
    assert out.startswith(f"['--fp8', '--lr', '1'] {tmp_path} _postprocess") and "gpt_model.py" in out
    assert main([str(tmp_path / "none.py")]) == 2
    assert capsys.readouterr().err == f"error: no script {tmp_path}/none.py\n"
    assert main(["--parts", "norm", str(script)]) == 2
    assert "no part 'norm'" in capsys.readouterr().err
