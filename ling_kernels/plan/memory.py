"""Memory of a training step, predicted by running the step on fake tensors, which have sizes and no values.

Model, options, optimizer and the ops' allocations are those of the run, with kernels as on a GPU; for a layout, those
of one of its GPUs. Every allocation updates the total of live bytes. Not included: CUDA's context, library workspaces
and fragmentation, for which RESERVE is an allowance.
"""

import weakref
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ..backend import force
from ..nn import MoE
from ..train.optimizer import StepInBackward, make_optimizer
from ..train.settings import Settings
from .ranks import SINGLE_GPU, ExpertParallel, Rank

KINDS = ("weights", "gradients", "optimizer", "FP8 weights", "loss", "activations")
LAYOUT_KINDS = ("gathered", "reduced", "exchange")  # printed where they are not 0
RESERVE = 6e9  # bytes for CUDA's context, library workspaces and fragmentation: an allowance, not measured
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


def plan_memory(model: nn.Module, s: Settings, rank: Rank = SINGLE_GPU) -> MemoryPlan:
    """Plan a training step of `rank.model(config)`, in training mode and made under FakeTensorMode, which must be on.

    s.batch is the rows that this GPU takes.
    """
    shards = rank.shards(model)
    by_name = {name.replace(".", "_"): shards[p] for name, p in model.named_parameters()}
    owned = nn.ParameterDict(by_name) if rank.layout.zero else model
    optimizer = make_optimizer(owned, s.optimizer, s.lr, s.weight_decay)
    tracker = MemoryTracker()
    with force("triton"):
        for p in owned.parameters():
            p.grad = torch.empty_like(p)
        optimizer.step()  # allocates its state
        optimizer.zero_grad()
        for t in [*(owned if rank.layout.zero == 3 else model).parameters(), *model.buffers()]:
            tracker.add(t, "weights")
        for t in (t for state in optimizer.state.values() for t in state.values()):
            tracker.add(t, "optimizer")
        track_gradients(model, shards, rank, tracker)
        in_backward = StepInBackward(model, optimizer) if s.step_in_backward else None
        if in_backward is not None:
            in_backward.begin(s.lr, torch.ones((), dtype=torch.bool))
        for module in model.modules():
            if isinstance(module, MoE) and isinstance(module.exchange, ExpertParallel):
                module.exchange.mark = lambda t: tracker.mark(t, "exchange")
        with tracker:
            kept = run_micro_batches(model, s, rank, tracker)
            if rank.layout.zero == 1:
                for p, shard in shards.items():
                    shard.grad = p.grad[: len(shard)]  # a view, no copy
            optimizer.step()
    kinds = (*KINDS, *LAYOUT_KINDS)
    at_peak, kept = ({kind: counts[kind] for kind in kinds} for counts in (tracker.at_peak, kept))
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

    def hold(self, size: int, kind: str) -> None:
        """Count bytes that no tensor stands for, from now on. A negative size releases them."""
        self.now[kind] += size
        self.transient(0)

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


def launcher_bytes(func, args: tuple) -> int:
    """Bytes that a launcher allocates inside: for the loss, a chunk's logits, their gradient, the head's in fp32."""
    if func._opname != "linear_cross_entropy_fwd":
        return 0
    x, w, chunk = args[0], args[1], args[-1]
    logits = min(chunk, len(x)) * len(w)
    return logits * (4 + x.element_size()) + (2 * 4 * w.numel() if args[5].ndim == 2 else 0)  # a product and the sum


def run_micro_batches(model: nn.Module, s: Settings, rank: Rank, tracker: MemoryTracker) -> Counter:
    """Run forwards and backwards in the schedule's order up to the peak -> live bytes after the last forward.

    Gradients accumulate from the second backward on, so two backwards run with all other micro batches in flight.
    """
    micro = s.micro_batch or s.batch
    number = s.batch // micro
    ahead = rank.in_flight(number) - 1
    running = []

    def forward() -> None:
        ids = torch.zeros(micro, s.seq_len, dtype=torch.int64)
        cu_seqlens = s.seq_len * torch.arange(micro + 1, dtype=torch.int32)
        targets = [float(ids.numel())] * (1 + len(model.mtp))
        with torch.autocast("cpu", torch.bfloat16, enabled=s.precision != "fp32"):
            out = model(ids, labels=ids, cu_seqlens=cu_seqlens, logits=False, z_loss=s.z_loss, target_counts=targets)
        running.append((out, ids, cu_seqlens))

    def backward() -> None:
        out, *_ = batch = running.pop(0)  # noqa: F841 (ids and cu_seqlens stay live until the end, as in training)
        if out.loss is not None:
            return out.loss.backward()
        (hidden,) = out.hidden_states
        outputs = [(hidden, torch.empty_like(hidden)), *([] if out.z_loss is None else [(out.z_loss, None)])]
        torch.autograd.backward(*zip(*outputs, strict=True))

    for _ in range(ahead):
        forward()
    for _ in range(min(2, number - ahead)):
        forward()
        kept = tracker.now.copy()
        backward()
    while running:
        backward()
    return kept


def track_gradients(model: nn.Module, shards: dict, rank: Rank, tracker: MemoryTracker) -> None:
    """Mark gradients as such. Where they are sharded, in FSDP2's units: each layer, and all parameters outside
    layers."""
    if rank.layout.zero < 2:
        for p in model.parameters():
            p.register_post_accumulate_grad_hook(lambda p: tracker.mark(p.grad, "gradients"))
        return
    layers = [*model.layers, *model.mtp]
    units = [ShardedUnit(layer.parameters(), shards, tracker) for layer in layers]
    in_layers = {p for unit in units for p in unit.params}
    rest = ShardedUnit((p for p in model.parameters() if p not in in_layers), shards, tracker)
    if rank.layout.zero == 3:
        for unit, layer in zip(units, layers, strict=True):
            unit.gather(layer)
        tracker.hold(rest.bytes + max(unit.bytes for unit in units), "gathered")


class ShardedUnit:
    """Parameters that are gathered together. Once all their gradients exist, these are summed over the GPUs, and each
    GPU keeps its rows."""

    def __init__(self, params: Iterable, shards: dict, tracker: MemoryTracker):
        self.params, self.shards, self.tracker = [*params], shards, tracker
        self.sharded = [p for p in self.params if shards[p] is not p]
        self.bytes = sum(p.nbytes for p in self.sharded)
        self.gradients, self.gathered = 0, False
        for p in self.params:
            p.register_post_accumulate_grad_hook(self.on_gradient)

    def gather(self, layer: nn.Module) -> None:
        """Hold whole weights in the layer's forward, and from its output's gradient to its weights' gradients."""

        def after_forward(layer, args, out) -> None:
            self.tracker.hold(-self.bytes, "gathered")
            out[0].register_hook(lambda dy: self.tracker.hold(self.bytes, "gathered"))

        self.gathered = True
        layer.register_forward_pre_hook(lambda *_: self.tracker.hold(self.bytes, "gathered"))
        layer.register_forward_hook(after_forward)

    def on_gradient(self, p: Tensor) -> None:
        self.tracker.mark(p.grad, "gradients")
        self.gradients += 1
        if self.gradients < len(self.params):
            return
        self.gradients = 0
        self.tracker.transient(self.bytes, "reduced")  # gradients have the weights' precision
        for p in self.sharded:
            shard = self.shards[p]
            if shard.grad is None:
                shard.grad = torch.empty_like(shard)
                self.tracker.mark(shard.grad, "gradients")
            p.grad = None
        if self.gathered:
            self.tracker.hold(-self.bytes, "gathered")
