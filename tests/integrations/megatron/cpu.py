"""Megatron-core on a CPU with gloo: what it asks of torch.cuda, a small Ling, and random batches."""

import contextlib
import functools

import torch
import torch.nn.functional as F


class Stream:
    """A CUDA stream or event of a machine that has none: all it does is nothing."""

    def __init__(self, *args, **kwargs):
        pass

    def __getattr__(self, name):
        return lambda *args, **kwargs: self


@functools.cache
def shim() -> None:
    """Replace in this process what Megatron-core calls of torch.cuda while it trains."""
    cuda = torch.cuda
    cuda.current_device = lambda: "cpu"
    cuda.Stream = cuda.Event = Stream
    cuda.current_stream = lambda *args: Stream()
    cuda.stream = lambda stream: contextlib.nullcontext()
    cuda.synchronize = lambda *args: None
    for module in (cuda, cuda.random):
        module.get_rng_state, module.set_rng_state = lambda *_, **__: torch.get_rng_state(), lambda *_, **__: None
    torch.Tensor.cuda = lambda self, *args, **kwargs: self
    from megatron.core.tensor_parallel import random
    from megatron.core.transformer.moe import moe_utils, token_dispatcher

    random.CudaRNGStatesTracker.fork = lambda self, *args: contextlib.nullcontext()
    to_cpu = token_dispatcher.maybe_move_tensor_to_cpu

    def move(tensor, as_numpy=False, record_stream=False):  # the stock one makes numpy of GPU tensors alone
        if as_numpy and torch.is_tensor(tensor):
            return tensor.numpy()
        return to_cpu(tensor, as_numpy, record_stream)

    token_dispatcher.maybe_move_tensor_to_cpu = move
    if not hasattr(moe_utils, "te_general_gemm"):  # 0.16 without Transformer Engine
        moe_utils.te_general_gemm = None


def start(ep: int) -> None:
    """Megatron's process groups, all ranks being expert-parallel."""
    shim()
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    if not parallel_state.model_parallel_is_initialized():
        parallel_state.initialize_model_parallel(1, 1, expert_model_parallel_size=ep)
        model_parallel_cuda_manual_seed(0)


def config(ep: int = 1, mtp: int = 1, **changes):
    from megatron.core.transformer.transformer_config import TransformerConfig

    options = dict(
        num_layers=3, hidden_size=32, ffn_hidden_size=64, num_attention_heads=4, num_query_groups=2, kv_channels=16,
        moe_ffn_hidden_size=16, moe_shared_expert_intermediate_size=16, num_moe_experts=16, moe_router_topk=4,
        moe_router_num_groups=4, moe_router_group_topk=2, moe_router_topk_scaling_factor=2.5,
        moe_router_score_function="sigmoid", moe_router_enable_expert_bias=True, moe_router_dtype="fp32",
        moe_router_load_balancing_type="none", moe_z_loss_coeff=1e-3, moe_layer_freq=[0, 1, 1],
        moe_token_dispatcher_type="alltoall", expert_model_parallel_size=ep, gated_linear_unit=True,
        activation_func=F.silu, add_bias_linear=False, normalization="RMSNorm", layernorm_epsilon=1e-6,
        qk_layernorm=True, use_cpu_initialization=True, bias_activation_fusion=False, masked_softmax_fusion=False,
        persist_layer_norm=False, bias_dropout_fusion=False, gradient_accumulation_fusion=False, hidden_dropout=0.0,
        attention_dropout=0.0, apply_rope_fusion=False, mtp_num_layers=mtp or None, mtp_loss_scaling_factor=0.3,
    )  # fmt: skip
    return TransformerConfig(**options | changes)


def model(config, tied: bool = False):
    """A GPTModel with Ling's rotation of half of a head."""
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec, get_gpt_mtp_block_spec
    from megatron.core.models.gpt.gpt_model import GPTModel

    torch.manual_seed(0)
    spec = get_gpt_decoder_block_spec(config, use_transformer_engine=False)
    mtp = get_gpt_mtp_block_spec(config, spec, use_transformer_engine=False) if config.mtp_num_layers else None
    made = GPTModel(
        config=config, transformer_layer_spec=spec, mtp_block_spec=mtp, vocab_size=96, max_sequence_length=64,
        share_embeddings_and_output_weights=tied, position_embedding_type="rope", rotary_percent=0.5,
    )  # fmt: skip
    return lively(made)


def hybrid_model(config):
    """A HybridModel of attention, MLP and MoE layers. Its last norm is Transformer Engine's, here torch's."""
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_submodules
    from megatron.core.models.hybrid import hybrid_block
    from megatron.core.models.hybrid.hybrid_model import HybridModel
    from megatron.core.transformer.spec_utils import ModuleSpec
    from megatron.core.transformer.torch_norm import WrappedTorchNorm
    from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules

    def layer(**submodules):
        return ModuleSpec(module=TransformerLayer, submodules=TransformerLayerSubmodules(**submodules))

    hybrid_block.TENorm = WrappedTorchNorm
    dense, moe = (get_gpt_layer_local_submodules(n, qk_layernorm=True, normalization="RMSNorm") for n in (None, 16))
    norm = moe.pre_mlp_layernorm
    attention = layer(input_layernorm=norm, self_attention=dense.self_attention, self_attn_bda=dense.self_attn_bda)
    layers = hybrid_block.HybridStackSubmodules(
        attention_layer=attention,
        mlp_layer=layer(pre_mlp_layernorm=norm, mlp=dense.mlp, mlp_bda=dense.mlp_bda),
        moe_layer=layer(pre_mlp_layernorm=norm, mlp=moe.mlp, mlp_bda=moe.mlp_bda),
    )
    torch.manual_seed(0)
    made = HybridModel(
        config=config, hybrid_stack_spec=ModuleSpec(module=hybrid_block.HybridStack, submodules=layers), vocab_size=96,
        max_sequence_length=64, hybrid_layer_pattern="*-*E*E", position_embedding_type="rope", rotary_percent=0.5,
    )  # fmt: skip
    return lively(made)


def lively(model):
    """Norms and biases that are not what they are at the start, and router scores that are not all near 0.5."""
    torch.manual_seed(1)
    for name, t in [*model.named_parameters(), *model.named_buffers()]:
        if "norm" in name:
            t.data += 0.2 * torch.randn_like(t)
        if name.endswith("expert_bias"):
            t += 0.1 * torch.randn_like(t)
        if name.endswith("router.weight"):
            t.data *= 20
    return model


def batch(seed: int = 0, rows: int = 2, length: int = 12) -> dict:
    """Arguments of GPTModel.forward."""
    draw = torch.Generator().manual_seed(seed)
    ids = torch.randint(96, (rows, length + 1), generator=draw)
    mask = torch.triu(torch.ones(1, 1, length, length, dtype=torch.bool), 1)
    weights = (torch.rand(rows, length, generator=draw) < 0.8).float()
    positions = torch.arange(length).expand(rows, -1)
    return dict(
        input_ids=ids[:, :-1], position_ids=positions, attention_mask=mask, labels=ids[:, 1:], loss_mask=weights
    )


def step(model, batch: dict):
    """The mean loss, after its backward, and the gradients by name."""
    return backward(model, batch), gradients(model)


def backward(model, batch: dict) -> float:
    model.zero_grad()
    losses = model(**batch)
    loss = (losses * batch["loss_mask"]).sum() / batch["loss_mask"].sum()
    loss.backward()
    return loss.item()


def gradients(model) -> dict:
    return by_stock_names((name, p.grad) for name, p in model.named_parameters())


def by_stock_names(tensors) -> dict:
    """By name, those of experts as Megatron's own call them."""
    found = {}
    for name, t in tensors:
        prefix, _, last = name.rpartition(".")
        stock = {"weight1": "linear_fc1", "weight2": "linear_fc2"}.get(last)
        found |= {f"{prefix}.local_experts.{e}.{stock}.weight": w for e, w in enumerate(t)} if stock else {name: t}
    return found


def same_weights(a, b) -> None:
    a, b = (by_stock_names([*model.named_parameters(), *model.named_buffers()]) for model in (a, b))
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name


def close(ours: dict, stock: dict, tolerance: float) -> None:
    """The same names; each gradient differs by at most tolerance x its largest element."""
    assert ours.keys() == stock.keys()
    for name, theirs in stock.items():
        assert (theirs is None) == (ours[name] is None), name
        if theirs is not None:
            largest = theirs.abs().max().clamp(min=1e-6)
            assert (ours[name] - theirs).abs().max() <= tolerance * largest, name
