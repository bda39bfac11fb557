"""Megatron-core's experts by our ops: one grouped GEMM a projection, whose rows are neither padded nor split.

The weights are two tensors, [E, 2F, H] and [E, H, F] for the E experts of this rank. Distributed checkpoints have the
names and shapes of Megatron's own experts, so that either can load what the other has saved.
"""

from collections.abc import Callable
from contextlib import nullcontext

import torch
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.tensor_parallel.random import get_cuda_rng_tracker, get_expert_parallel_rng_tracker_name
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.utils import make_sharded_object_for_checkpoint
from torch import Tensor, nn

from ...errors import InputError
from ...nn.fp8 import Fp8Weights, fits
from ...nn.fp8_functions import FeedForward, product_dtype
from ...ops.deferred import deferring
from ...ops.dispatch import exclusive_sum, plan_of_counts
from ...ops.grouped_gemm import GroupedGemm
from ...ops.swiglu import swiglu

# Fields of Megatron's configuration that would change the formula of an expert, and the values that do not.
NEEDED = {
    "gated_linear_unit": (True,),
    "add_bias_linear": (False,),
    "activation_func": (nn.functional.silu,),
    "moe_apply_probs_on_input": (False,),
    "moe_latent_size": (None,),
    "moe_mlp_glu_interleave_size": (None,),
    "activation_func_clamp_value": (None,),
    "glu_linear_offset": (0.0,),
    "fp8": (None, False),
    "fp4": (None, False),
}
STOCK = {"weight1": "linear_fc1", "weight2": "linear_fc2"}  # what Megatron's experts call the two projections


class Experts(MegatronModule):
    """The experts of one rank, in the place of Megatron's SequentialMLP or TEGroupedMLP.

    Routing weights are folded into SwiGLU, before the down projection, as there. A state dict of either may be loaded.
    Raises InputError where the configuration asks for another formula, or for tensor parallelism inside an expert.
    """

    def __init__(self, num_local_experts: int, config, *, pg_collection=None, name: str | None = None):
        super().__init__(config=config)
        check_config(config, pg_collection)
        self.num_local_experts, self.groups = num_local_experts, pg_collection
        hidden, ffn = config.hidden_size, config.moe_ffn_hidden_size
        self.weight1 = self.parameter((num_local_experts, 2 * ffn, hidden), config.init_method)
        self.weight2 = self.parameter((num_local_experts, hidden, ffn), config.output_layer_init_method)
        self.register_load_state_dict_pre_hook(from_stock)
        self.queue: list[Callable[[], None]] | None = [] if config.delay_wgrad_compute else None
        self.after_gradients: list[Callable[[], None]] = []

    def parameter(self, shape: tuple[int, int, int], init: Callable) -> nn.Parameter:
        config = self.config
        on_cpu = config.use_cpu_initialization
        device = "cpu" if on_cpu else torch.cuda.current_device()
        p = nn.Parameter(torch.empty(shape, dtype=config.params_dtype, device=device))
        if config.perform_initialization:
            tracker = get_cuda_rng_tracker()
            with nullcontext() if on_cpu else tracker.fork(get_expert_parallel_rng_tracker_name()):
                for weight in p.data:
                    init(weight)
        p.allreduce = self.groups.ep.size() == 1  # False: its gradient is summed over the expert-data-parallel ranks
        p.skip_backward_post_hook = config.delay_wgrad_compute
        return p

    def forward(
        self, dispatched_input: Tensor, tokens_per_expert: Tensor, permuted_probs: Tensor
    ) -> tuple[Tensor, None]:
        """Rows [S, H] sorted by expert, the experts' numbers of rows [E], routing weights [S] -> ([S, H], no bias)."""
        counts = tokens_per_expert.to(dispatched_input.device, torch.int32, non_blocking=True)
        return self.product(dispatched_input, counts, permuted_probs.float()), None

    def product(self, x: Tensor, counts: Tensor, weights: Tensor) -> Tensor:
        offsets = exclusive_sum(counts)
        h = LateGemm.apply(x, self.weight1, offsets, self.queue)
        return LateGemm.apply(swiglu(h, weights), self.weight2, offsets, self.queue)

    def backward_dw(self) -> None:
        """Compute the weight gradients that the backward has put off, with delay_wgrad_compute."""
        while self.queue:
            self.queue.pop(0)()
        for hook in self.after_gradients:
            hook()

    def register_wgrad_accumulation_and_reduce_hooks(self, hook: Callable[[], None]) -> None:
        """Megatron's data parallelism calls this for weights whose gradients come late."""
        self.after_gradients.append(hook)

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None) -> dict:
        """The weights under the names, and with the global shapes, of Megatron's own experts."""
        if (metadata or {}).get("singleton_local_shards"):
            raise InputError("ling_kernels: experts cannot be saved with singleton_local_shards")
        axis, ep, replica = len(sharded_offsets), self.groups.ep, (0, 0, self.groups.expt_dp.rank())
        state: dict = {}
        for name, stock in STOCK.items():
            key, weight = f"{prefix}experts.{stock}", getattr(self, name)
            offsets = *sharded_offsets, (axis, ep.rank(), ep.size())
            state[prefix + name] = ShardedTensor.from_rank_offsets(
                f"{key}.weight", weight, *offsets, replica_id=replica, prepend_axis_num=axis
            )
            for e in range(self.num_local_experts):  # what Megatron's experts expect to find: the state of an FP8 layer
                number = ep.rank() * self.num_local_experts + e
                offsets = *sharded_offsets, (axis, number, ep.size() * self.num_local_experts)
                state[f"{prefix}{e}.{stock}._extra_state"] = make_sharded_object_for_checkpoint(
                    None, f"{key}._extra_state", offsets, replica
                )
        return state


class Fp8Experts(Experts):
    """With products in FP8, whose weights are quantised from the bf16 or fp32 parameters when they are needed."""

    def __init__(self, num_local_experts: int, config, *, pg_collection=None, name: str | None = None):
        super().__init__(num_local_experts, config, pg_collection=pg_collection, name=name)
        if not fits(self.weight2):
            sizes = f"{config.hidden_size} and {config.moe_ffn_hidden_size}"
            raise InputError(f"ling_kernels: FP8 experts need sizes that are multiples of 128, not {sizes}")
        self.fp8 = Fp8Weights(2)

    def product(self, x: Tensor, counts: Tensor, weights: Tensor) -> Tensor:
        plan = plan_of_counts(counts, len(x))
        # Views: gradients go through autograd, whose hooks Megatron needs, and not to `main_grad`.
        w = self.weight1.view_as(self.weight1), self.weight2.view_as(self.weight2)
        wgrad = self.fp8.wgrad_for(*w, rows=len(x) // self.num_local_experts)
        options = self.fp8.pow2, wgrad, "none", product_dtype(x)
        return LateFeedForward.apply(self.queue, x, weights[:, None], *w, *self.fp8.fields(*w), *options, *plan)


class LateGemm(GroupedGemm):
    """GroupedGemm whose weight gradient is put into a queue, where there is one."""

    @staticmethod
    def forward(ctx, a, b, offsets, queue):
        ctx.queue = queue
        return GroupedGemm.forward(ctx, a, b, offsets)

    @staticmethod
    def backward(ctx, dy):
        with deferring(ctx.queue):
            return GroupedGemm.backward(ctx, dy)[:4]


class LateFeedForward(FeedForward):
    """FeedForward whose weight gradients are put into a queue, where there is one."""

    @staticmethod
    def forward(ctx, queue, *args):
        ctx.queue = queue
        return FeedForward.forward(ctx, *args)

    @staticmethod
    def backward(ctx, dout):
        with deferring(ctx.queue):
            return None, *FeedForward.backward(ctx, dout)


def check_config(config, groups) -> None:
    """Raise InputError for an expert that we do not have."""
    for field, values in NEEDED.items():
        value = getattr(config, field, values[0])
        if value not in values:
            raise InputError(f"ling_kernels: experts with {field}={value} are not supported; apply without 'experts'")
    if groups.expt_tp.size() > 1:
        raise InputError("ling_kernels: no tensor parallelism inside experts; use expert parallelism")


def from_stock(module: Experts, state: dict, prefix: str, *_) -> None:
    """Rename in a state dict that is loaded what Megatron's own experts have saved, one tensor an expert."""
    for ours, stock in STOCK.items():
        spellings = (f"{prefix}local_experts.{{}}.{stock}.weight", f"{prefix}{stock}.weight{{}}")
        for spelling in spellings:
            keys = [spelling.format(e) for e in range(module.num_local_experts)]
            if all(key in state for key in keys):
                state[prefix + ours] = torch.stack([state.pop(key) for key in keys])
        for key in [key for key in state if key.startswith(prefix) and key.endswith(f"{stock}._extra_state")]:
            del state[key]  # Transformer Engine's, of FP8
