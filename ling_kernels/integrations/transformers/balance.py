"""A callback of the Trainer that balances the load of the experts."""

import torch
import torch.distributed as dist
from transformers import TrainerCallback

from ...nn import Router


class Balance(TrainerCallback):
    """After each step of the optimizer, moves every router's expert_bias by `rate` towards an even load.

    The counts are summed over all processes, each of which has its own part of the batch.
    """

    def __init__(self, rate: float = 1e-3):
        self.rate = rate

    @torch.no_grad()
    def on_step_end(self, args, state, control, model=None, **kwargs):
        for module in model.modules():
            if isinstance(module, Router):
                if dist.is_initialized():
                    dist.all_reduce(module.counts)
                module.balance_(self.rate)
