"""Memory of a training step, predicted by running the step on fake tensors, which have sizes and no values.

Model, options, optimizer and the ops' allocations are those of the run, with kernels as on a GPU; of several processes,
those of one (processes.py). Every allocation updates the total of live bytes. Not included: CUDA's context, library
workspaces and fragmentation, for which RESERVE is an allowance.
"""

import weakref
from collections import Counter
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ..backend import force
from ..model import LingConfig
from ..parallel.shares import Shares
from ..train.building import apply_fp8_and_recompute
from ..train.optimizer import StepInBackward, make_optimizer
from ..train.settings import Settings
from .processes import one_process
from .step import EXCHANGE, run_micro_batches, run_stages

KINDS = ("weights", "gradients", "optimizer", "FP8 weights", "loss", "activations")
RESERVE = 6e9  # bytes for CUDA's context, library workspaces and fragmentation: an allowance, not measured
# Collectives whose first arguments are buffers for the exchange alone: what arrives, and of an all-to-all what is sent.
TRAVELLING = {"alltoall_base_": 2, "_allgather_base_": 1}
OUTPUTS = {"quantize_weight_fwd": "FP8 weights", "transpose_fp8_fwd": "FP8 weights", "linear_cross_entropy_fwd": "loss"}


@dataclass
class MemoryPlan:
    """Bytes of each kind. peak_bytes: live together at the step's peak. kept_bytes: live at the end of a forward, for
    its backward. gradients: the most bytes of them at any moment."""

    peak_bytes: dict[str, int]
    kept_bytes: dict[str, int]
    gradients: int = 0

    @property
    def peak(self) -> int:
        """Bytes in all at the peak."""
        return sum(self.peak_bytes.values())


def plan_training(
    config: LingConfig, s: Settings, rank: int = 0, worst_load: bool = False, backend: str = "triton"
) -> MemoryPlan:  # fmt: skip
    """Plan a step of one process of a run. worst_load: of its experts; otherwise all get equally many tokens. backend:
    the kernels, "torch" for a step on CPUs. Raises InputError as the trainer does."""
    with one_process(config, s, rank, worst_load) as shares:
        apply_fp8_and_recompute(shares.model, s)
        shares.model.train()
        return plan_memory(shares, s, backend)


def plan_memory(shares: Shares, s: Settings, backend: str) -> MemoryPlan:
    """Plan a step of a process, under FakeTensorMode."""
    model, stepped, tracker = shares.model, shares.stepped, MemoryTracker()
    optimizer = make_optimizer(stepped, s.optimizer, s.lr, s.weight_decay)
    with force(backend):
        for name, p in stepped.named_parameters():
            p.grad = torch.empty_like(p) if shares.steps(name) else None
        optimizer.step()  # allocates its state
        optimizer.zero_grad()
        for t in [*model.parameters(), *model.buffers()]:
            tracker.add(t, "weights")
        for t in [*stepped.wholes.values(), *(t for state in optimizer.state.values() for t in state.values())]:
            tracker.add(t, "optimizer")
        for p in model.parameters():
            p.register_post_accumulate_grad_hook(tracker.mark_gradient)
        in_backward = StepInBackward(model, optimizer) if s.step_in_backward else None
        if in_backward is not None:
            in_backward.begin(s.lr, torch.ones((), dtype=torch.bool))
        with tracker:
            kept = (run_stages if shares.pipeline else run_micro_batches)(shares, s, tracker)
            shares.sum_gradients_()
            for p in stepped.parameters():
                tracker.mark_gradient(p)
            optimizer.step()
            shares.spread_weights_()
    at_peak, kept = ({kind: counts[kind] for kind in (*KINDS, EXCHANGE)} for counts in (tracker.at_peak, kept))
    return MemoryPlan(at_peak, kept, tracker.most["gradients"])


class MemoryTracker(TorchDispatchMode):
    """Live bytes by kind of the tensors allocated while this mode is on, now and at the peak."""

    def __init__(self):
        super().__init__()
        self.entries = {}  # storage: [bytes, kind, time of allocation]
        self.now, self.at_peak, self.most = Counter(), Counter(), Counter()  # most: of kinds that `mark` names
        self.peak, self.clock, self.peak_clock = 0, 0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for t in tree_leaves(out):
            if isinstance(t, Tensor):
                self.add(t)
        if func.namespace == "c10d" and func._opname in TRAVELLING:
            for t in tree_leaves(args[: TRAVELLING[func._opname]]):
                self.mark(t, EXCHANGE)
        if func.namespace == "ling":
            self.transient(launcher_bytes(func, args))
            for value, argument in zip(args, func._schema.arguments, strict=False):
                if isinstance(value, Tensor) and argument.is_write and func._opname in OUTPUTS:
                    self.mark(value, OUTPUTS[func._opname])
        return out

    def add(self, t: Tensor, kind: str = "activations") -> None:
        """Count a tensor's storage until it is freed. A storage that is counted already stays as it is."""
        storage = t.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in self.entries or not size:
            return
        self.clock += 1
        self.entries[key] = [size, kind, self.clock]
        self.now[kind] += size
        weakref.finalize(storage, self.remove, key)
        self.transient(0)

    def transient(self, size: int, kind: str = "loss") -> None:
        """Count bytes that exist only briefly, on top of those live now; 0 only updates the peak."""
        if (total := self.now.total() + size) > self.peak:
            self.peak, self.peak_clock = total, self.clock
            self.at_peak = self.now + Counter({kind: size})

    def remove(self, key: int) -> None:
        size, kind, _ = self.entries.pop(key)
        self.now[kind] -= size

    def mark(self, t: Tensor, kind: str) -> None:
        """Count a tensor's storage as another kind, also in the peak where it was live then."""
        entry = self.entries.get(t.untyped_storage()._cdata)
        if entry is None:
            return
        for counts in [self.now] + [self.at_peak] * (entry[2] <= self.peak_clock):
            counts[entry[1]] -= entry[0]
            counts[kind] += entry[0]
        entry[1] = kind
        self.most[kind] = max(self.most[kind], self.now[kind])

    def mark_gradient(self, p: Tensor) -> None:
        """Count a parameter's gradient as one, where it is there: a pipeline may compute it later than its hook."""
        if p.grad is not None:
            self.mark(p.grad, "gradients")


def launcher_bytes(func, args: tuple) -> int:
    """Bytes that a launcher allocates inside: for the loss, a chunk's logits, their gradient, the head's in fp32."""
    if func._opname != "linear_cross_entropy_fwd":
        return 0
    x, w, chunk = args[0], args[1], args[-1]
    logits = min(chunk, len(x)) * len(w)
    return logits * (4 + x.element_size()) + (2 * 4 * w.numel() if args[5].ndim == 2 else 0)  # a product and the sum
