"""How much memory a run takes, before it takes any: one training step on tensors that have sizes and no values.

The model, its flags, its optimizer and the ops' allocations are those of the run, with kernels as on a GPU; of several
GPUs (`layout`), those of one. What is alive is added up at every allocation. Not in it: what CUDA, its libraries and
the allocator's rounding take.
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
from ..gpu import HOPPER
from ..model import LingConfig
from ..nn import MoE
from ..nn.fp8 import FP8_ROWS
from .layout import ALONE, ExpertParallel, Rank
from .memory import padding_bytes
from .optimizer import StepInBackward, make_optimizer
from .settings import Settings

KINDS = ("weights", "gradients", "optimizer", "FP8 weights", "loss", "activations")
OF_LAYOUTS = ("gathered", "reduced", "exchange")  # shown where they are not 0
RESERVE = 6e9  # CUDA's context, its libraries' workspaces, what the allocator cannot use: an allowance, not measured
OUTPUTS = {"quantize_weight_fwd": "FP8 weights", "transpose_fp8_fwd": "FP8 weights", "linear_cross_entropy_fwd": "loss"}


class Live(TorchDispatchMode):
    """Bytes of the tensors made while this is on, by kind, and of those that were alive together at the peak."""

    def __init__(self):
        super().__init__()
        self.entries, self.now, self.at_peak = {}, Counter(), Counter()
        self.peak, self.clock, self.peak_clock = 0, 0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for t in tree_leaves(out):
            if isinstance(t, Tensor):
                self.add(t)
        if func.namespace == "ling":
            self.passing(inside(func, args))
            for value, argument in zip(args, func._schema.arguments, strict=False):
                if isinstance(value, Tensor) and argument.is_write and func._opname in OUTPUTS:
                    self.mark(value, OUTPUTS[func._opname])
        return out

    def add(self, t: Tensor, kind: str = "activations") -> None:
        storage = t.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in self.entries or not size:
            return
        self.clock += 1
        self.entries[key] = [size, kind, self.clock]
        self.now[kind] += size
        weakref.finalize(storage, self.remove, key)
        self.passing(0)

    def passing(self, more: int, kind: str = "loss") -> None:
        """Besides what is alive, so many bytes are, for a moment."""
        if (total := self.now.total() + more) > self.peak:
            self.peak, self.peak_clock = total, self.clock
            self.at_peak = self.now + Counter({kind: more})

    def hold(self, more: int, kind: str) -> None:
        """From now on so many bytes more are alive, without a tensor; less where it is negative."""
        self.now[kind] += more
        self.passing(0)

    def remove(self, key: int) -> None:
        size, kind, _ = self.entries.pop(key)
        self.now[kind] -= size

    def mark(self, t: Tensor, kind: str) -> None:
        entry = self.entries.get(t.untyped_storage()._cdata)
        if entry is None:
            return
        for counts in [self.now] + [self.at_peak] * (entry[2] <= self.peak_clock):
            counts[entry[1]] -= entry[0]
            counts[kind] += entry[0]
        entry[1] = kind


def inside(func, args: tuple) -> int:
    """What a launcher allocates itself, where that is much: logits of a chunk, their gradient, the head's in fp32."""
    if func._opname != "linear_cross_entropy_fwd":
        return 0
    x, w, chunk = args[0], args[1], args[-1]
    logits = min(chunk, len(x)) * len(w)
    return logits * (4 + x.element_size()) + (2 * 4 * w.numel() if args[5].ndim == 2 else 0)  # a product, and the sum


@dataclass
class Plan:
    """Bytes of each kind alive at the peak of a step, and at the end of a forward, which is kept for the backward."""

    parts: dict[str, int]
    kept: dict[str, int]

    @property
    def peak(self) -> int:
        return sum(self.parts.values())

    def lines(self, s: Settings, c: LingConfig, rank: Rank = ALONE) -> list[str]:
        """The table that --plan prints; of a layout's GPU, s and c are its own."""
        micro, ep = s.micro_batch or s.batch, rank.layout.ep
        slots = c.num_experts_per_tok * s.seq_len * micro
        wgrad = "bf16" if s.fp8_wgrad == "auto" and slots // (c.num_experts // ep) < FP8_ROWS else s.fp8_wgrad
        layers = c.num_hidden_layers - c.first_k_dense_replace + c.num_nextn_predict_layers
        padding = (
            rank.in_flight(s.batch // micro) * layers * padding_bytes(c, slots, s.recompute, wgrad, ep)
            if s.precision == "fp8"
            else 0
        )
        said = dict(
            weights=f"{s.master} masters; norms, routers and their biases fp32",
            gradients="of the masters' precision" + ", each used in the backward" * s.step_in_backward,
            optimizer=s.optimizer,
            loss="logits of 1024 tokens at a time, gradients of head and last hidden states",
            activations=f"recompute {s.recompute}; {size(self.kept['activations'])} kept for the backward,"
            f" {size(padding)} of it the padding of column-wise copies",
            gathered="weights of the layer that computes and of the next; embedding, head and norm all the time",
            reduced="a layer's gradients on their way to those that own them",
            exchange="rows to and from the experts of a layer",
        ) | {"FP8 weights": s.fp8_weights}  # fmt: skip
        kinds = [*KINDS, *(kind for kind in OF_LAYOUTS if self.parts[kind])]
        rows = [f"{kind:<12}{size(self.parts[kind]):>10}  {said[kind]}" for kind in kinds]
        need = self.peak + RESERVE
        fits = ", ".join(
            f"{g.name} ({g.memory / 1e9:.0f} GB) {'yes' if need <= g.memory else 'no'}" for g in HOPPER.values()
        )
        rows.append(f"{'peak':<12}{size(self.peak):>10}  besides, {size(RESERVE)} for CUDA and fragments")
        return [*rows, f"{'fits':<12}  {fits}"]


def size(n: float) -> str:
    return f"{n / 1e9:.2f} GB" if n >= 1e9 else f"{n / 1e6:.1f} MB"


def plan(model: nn.Module, s: Settings, rank: Rank = ALONE) -> Plan:
    """Of a training step of a model as it is to be trained, and what of it is one GPU's (`Rank.model`), with the rows
    that this GPU takes. Called under FakeTensorMode, with a model made there."""
    shards = rank.shards(model)
    owned = nn.ParameterList(shards.values()) if rank.layout.zero else model
    optimizer = make_optimizer(owned, s.optimizer, s.lr, s.weight_decay)
    live = Live()
    with force("triton"):
        for p in owned.parameters():
            p.grad = torch.empty_like(p)
        optimizer.step()  # makes its state
        optimizer.zero_grad()
        for t in [*(owned if rank.layout.zero == 3 else model).parameters(), *model.buffers()]:
            live.add(t, "weights")
        for t in (t for state in optimizer.state.values() for t in state.values()):
            live.add(t, "optimizer")
        watch_gradients(model, shards, rank, live)
        if s.step_in_backward:
            StepInBackward(model, optimizer).begin(s.lr, torch.ones((), dtype=torch.bool))
        for module in model.modules():
            if isinstance(module, MoE) and isinstance(module.exchange, ExpertParallel):
                module.exchange.mark = lambda t: live.mark(t, "exchange")
        with live:
            kept = micro_batches(model, s, rank, live)
            if rank.layout.zero == 1:
                for p, shard in shards.items():
                    shard.grad = p.grad[: len(shard)]  # a part of it, no copy
            optimizer.step()
    return Plan(*({kind: counts[kind] for kind in (*KINDS, *OF_LAYOUTS)} for counts in (live.at_peak, kept)))


def micro_batches(model: nn.Module, s: Settings, rank: Rank, live: Live) -> Counter:
    """Forwards and backwards as the schedule has them, until the most is alive that ever is -> what the last forward
    leaves. Gradients add up from the second backward on, hence two with all other micro batches in flight."""
    micro = s.micro_batch or s.batch
    number = s.batch // micro
    ahead = rank.in_flight(number) - 1
    running = []

    def forward() -> None:
        ids = torch.zeros(micro, s.seq_len, dtype=torch.int64)
        ends = s.seq_len * torch.arange(micro + 1, dtype=torch.int32)
        targets = [float(ids.numel())] * (1 + len(model.mtp))
        with torch.autocast("cpu", torch.bfloat16, enabled=s.precision != "fp32"):
            out = model(ids, labels=ids, cu_seqlens=ends, logits=False, z_loss=s.z_loss, target_counts=targets)
        running.append((out, ids, ends))

    def backward() -> None:
        out, *_ = batch = running.pop(0)  # noqa: F841 (alive until the end, as in training)
        if out.loss is not None:
            return out.loss.backward()
        (hidden,) = out.hidden_states
        given = [(hidden, torch.empty_like(hidden)), *([] if out.z_loss is None else [(out.z_loss, None)])]
        torch.autograd.backward(*zip(*given, strict=True))

    for _ in range(ahead):
        forward()
    for _ in range(min(2, number - ahead)):
        forward()
        kept = live.now.copy()
        backward()
    while running:
        backward()
    return kept


def watch_gradients(model: nn.Module, shards: dict, rank: Rank, live: Live) -> None:
    """Gradients are known for what they are, and where parameters are cut up, by units as FSDP2 has them: each layer,
    and what is in none."""
    if rank.layout.zero < 2:
        for p in model.parameters():
            p.register_post_accumulate_grad_hook(lambda p: live.mark(p.grad, "gradients"))
        return
    units = [Unit(layer.parameters(), shards, live) for layer in [*model.layers, *model.mtp]]
    taken = {p for unit in units for p in unit.params}
    rest = Unit((p for p in model.parameters() if p not in taken), shards, live)
    if rank.layout.zero == 3:
        for unit, layer in zip(units, [*model.layers, *model.mtp], strict=True):
            unit.gather(layer)
        live.hold(rest.bytes + max(unit.bytes for unit in units), "gathered")


class Unit:
    """Parameters that are gathered together, and whose gradients, once all are there, are summed over the GPUs, of
    which each keeps its rows."""

    def __init__(self, params: Iterable, shards: dict, live: Live):
        self.params, self.shards, self.live, self.there, self.gathered = [*params], shards, live, 0, False
        self.cut = [p for p in self.params if shards[p] is not p]
        self.bytes = sum(p.nbytes for p in self.cut)
        for p in self.params:
            p.register_post_accumulate_grad_hook(self.arrived)

    def gather(self, layer: nn.Module) -> None:
        """Whole weights are there in the layer's forward, and from its output's gradient to its weights' gradients."""

        def leave(layer, args, out) -> None:
            self.live.hold(-self.bytes, "gathered")
            out[0].register_hook(lambda dy: self.live.hold(self.bytes, "gathered"))

        self.gathered = True
        layer.register_forward_pre_hook(lambda *_: self.live.hold(self.bytes, "gathered"))
        layer.register_forward_hook(leave)

    def arrived(self, p: Tensor) -> None:
        self.live.mark(p.grad, "gradients")
        self.there += 1
        if self.there < len(self.params):
            return
        self.there = 0
        self.live.passing(self.bytes, "reduced")  # gradients have the precision of weights
        for p in self.cut:
            shard = self.shards[p]
            if shard.grad is None:
                shard.grad = torch.empty_like(shard)
                self.live.mark(shard.grad, "gradients")
            p.grad = None
        if self.gathered:
            self.live.hold(-self.bytes, "gathered")
