"""How much memory a run takes, before it takes any: one training step on tensors that have sizes and no values.

The model, its flags, its optimizer and the ops' allocations are those of the run, with kernels as on a GPU. What is
alive is added up at every allocation. Not in it: what CUDA, its libraries and the allocator's rounding take.
"""

import weakref
from collections import Counter
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ..backend import force
from ..gpu import HOPPER
from ..model import LingConfig
from ..nn.fp8 import FP8_ROWS
from .memory import padding_bytes
from .optimizer import make_optimizer
from .settings import Settings

KINDS = ("weights", "gradients", "optimizer", "FP8 weights", "loss", "activations")
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

    def passing(self, more: int) -> None:
        """Besides what is alive, so many bytes are, for a moment."""
        if (total := self.now.total() + more) > self.peak:
            self.peak, self.peak_clock = total, self.clock
            self.at_peak = self.now + Counter({"loss": more})

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

    def lines(self, s: Settings, c: LingConfig) -> list[str]:
        """The table that --plan prints."""
        slots = c.num_experts_per_tok * s.seq_len * (s.micro_batch or s.batch)
        wgrad = "bf16" if s.fp8_wgrad == "auto" and slots // c.num_experts < FP8_ROWS else s.fp8_wgrad
        layers = c.num_hidden_layers - c.first_k_dense_replace + c.num_nextn_predict_layers
        padding = layers * padding_bytes(c, slots, s.recompute, wgrad) if s.precision == "fp8" else 0
        said = dict(
            weights=f"{s.master} masters; norms, routers and their biases fp32",
            gradients="of the masters' precision",
            optimizer=s.optimizer,
            loss="logits of 1024 tokens at a time, gradients of head and last hidden states",
            activations=f"recompute {s.recompute}; {size(self.kept['activations'])} kept for the backward,"
            f" {size(padding)} of it the padding of column-wise copies",
        ) | {"FP8 weights": s.fp8_weights}  # fmt: skip
        rows = [f"{kind:<12}{size(self.parts[kind]):>10}  {said[kind]}" for kind in KINDS]
        need = self.peak + RESERVE
        fits = ", ".join(
            f"{g.name} ({g.memory / 1e9:.0f} GB) {'yes' if need <= g.memory else 'no'}" for g in HOPPER.values()
        )
        rows.append(f"{'peak':<12}{size(self.peak):>10}  besides, {size(RESERVE)} for CUDA and fragments")
        return [*rows, f"{'fits':<12}  {fits}"]


def size(n: float) -> str:
    return f"{n / 1e9:.2f} GB" if n >= 1e9 else f"{n / 1e6:.1f} MB"


def plan(model: nn.Module, s: Settings) -> Plan:
    """Of a training step of a model as it is to be trained. Called under FakeTensorMode, with a model made there."""
    optimizer = make_optimizer(model, s.optimizer, s.lr, s.weight_decay)
    live, micro = Live(), s.micro_batch or s.batch
    with force("triton"):
        for p in model.parameters():
            p.grad = torch.empty_like(p)
            p.register_post_accumulate_grad_hook(lambda p: live.mark(p.grad, "gradients"))
        optimizer.step()  # makes its state
        optimizer.zero_grad()
        for t in [*model.parameters(), *model.buffers()]:
            live.add(t, "weights")
        for t in (t for state in optimizer.state.values() for t in state.values()):
            live.add(t, "optimizer")
        with live:
            for _ in range(min(2, s.batch // micro)):
                ids = torch.zeros(micro, s.seq_len, dtype=torch.int64)
                ends = s.seq_len * torch.arange(micro + 1, dtype=torch.int32)
                targets = [float(ids.numel())] * (1 + len(model.mtp))
                with torch.autocast("cpu", torch.bfloat16, enabled=s.precision != "fp32"):
                    out = model(ids, labels=ids, cu_seqlens=ends, logits=False, z_loss=s.z_loss, target_counts=targets)
                kept = live.now.copy()
                out.loss.backward()
                del out
            optimizer.step()
    return Plan(*({kind: counts[kind] for kind in KINDS} for counts in (live.at_peak, kept)))
