"""The router: fp32 logits, group-limited top-k, and the bias that balances the load."""

import torch
from torch import Tensor, nn

from ..ops.balance_bias import balance_bias_
from ..ops.moe import routed_rows
from ..ops.route import route
from ..ops.router_gemm import router_gemm
from .norm import Fp32Buffers


class Router(Fp32Buffers):
    """weight [E, H]; expert_bias [E] fp32, for selection only; counts [E] int32, tokens per expert since `balance_`."""

    def __init__(self, hidden_size, num_experts, num_groups=1, group_topk=1, topk=8, scale=1.0):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_experts, hidden_size))
        nn.init.normal_(self.weight, std=0.02)
        self.register_buffer("expert_bias", torch.zeros(num_experts, dtype=torch.float32))
        self.register_buffer("counts", torch.zeros(num_experts, dtype=torch.int32), persistent=False)
        self.limits = dict(num_groups=num_groups, group_topk=group_topk, topk=topk, scale=scale)

    def forward(
        self, x: Tensor, z_loss: float | None = None, experts: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """x [T, H] -> weights [T, topk] fp32, experts [T, topk] int32, counts [E] int32, z-loss or None.

        experts forces the choice of experts, as `route` does; the weights still come from x.
        """
        weights, experts, counts, *z = self.choose(routed_rows(x, experts), z_loss, experts)
        if self.training and torch.is_grad_enabled() and (torch.compiler.is_compiling() or not recomputing()):
            self.counts += counts
        return weights, experts, counts, z[0] if z else None

    def choose(
        self, x: Tensor, z_loss: float | None, experts: Tensor | None, mask: Tensor | None = None
    ) -> tuple[Tensor, ...]:
        """What `route` returns for the logits of x [T, H]; mask [T]: False for padding."""
        logits = router_gemm(x, self.weight)
        bias = self.expert_bias.to(logits.dtype)  # fp32, but for a model in fp64
        return route(logits, bias, mask, z_loss=z_loss, experts=experts, **self.limits)

    @torch.no_grad()
    def balance_(self, rate: float) -> None:
        """Once per global batch: moves expert_bias towards an even load and starts counting anew."""
        balance_bias_(self.expert_bias, self.counts, rate)
        self.counts.zero_()


def recomputing() -> bool:
    """Whether torch.utils.checkpoint runs a forward for the second time, in a backward.

    Without use_reentrant it does so while autograd unpacks a saved tensor, with hooks that catch what the forward
    saves. With use_reentrant no such hooks are there, and the first forward, which had no gradients, did not count.
    """
    if torch._C._current_graph_task_id() < 0:  # not in a backward
        return False
    return torch._C._autograd._top_saved_tensors_default_hooks(True) is not None
