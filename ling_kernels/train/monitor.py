"""Safeguards of FP8 training (arXiv 2510.22115, 5.1.1): FP8's error in each layer's operands, and steps to skip.

    underflow    share of an operand's non-zero elements that FP8 rounds to zero
    distortion   1 - cosine of the operand and its FP8 representation

The operands of a product y = x W^T are x, w and dy, and for the weight's gradient xt and dyt, which are quantised
along the tokens. A measurement takes 128 of a micro batch's tokens (of an expert's rows), beginning at a border of
blocks, and 128 rows of w, so that scales equal the run's. Operands inside an MLP or an expert are computed again
from the sample, in fp32.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from math import inf
from statistics import median
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..files import finite
from ..nn import Experts
from ..nn.fp8 import Fp8Experts, Fp8Linear, Fp8MLP
from ..nn.fp8_cache import forget_cache
from ..ops.quantize import BLOCK, dequantize, quantize, quantize_weight
from ..ops.swiglu import swiglu, swiglu_backward

FP8 = Fp8Linear, Fp8MLP, Fp8Experts
# Highest values that the paper's figure 16 shows for Ling-mini over 20 T tokens. The paper has none for w and xt: the
# limit of a layer is OWN_BAND_FACTOR times the highest of its first OWN_BAND_SAMPLES measurements, and at least
# OWN_BAND_FLOOR.
METRICS, OPERANDS = ("underflow", "distortion"), ("x", "w", "dy", "xt", "dyt")  # of fp8.jsonl
BANDS = {"x": (0.008, 0.0035), "dy": (0.010, 0.0035), "dyt": (0.16, 0.10)}
OWN_BAND_SAMPLES, OWN_BAND_FACTOR, OWN_BAND_FLOOR = 3, 3.0, (0.008, 0.0035)
WINDOW, MIN_STEPS = 32, 16  # a spike: compared with the median of the last WINDOW steps; at least MIN_STEPS
# Text that is learnt by heart has losses near 0, of which ten times the median is still no harm.
NO_SPIKE = 1.0  # a loss (nats) or gradient norm up to it is never a spike


class OutOfRange(NamedTuple):
    """An operand's metric that is above its limit and was not at the measurement before."""

    layer: str
    operand: str
    metric: str
    value: float | None  # None: not finite
    limit: float

    def __str__(self) -> str:
        value = "not finite" if self.value is None else f"{self.value:.2g}, above {self.limit:.2g}"
        return f"{self.layer}: {self.metric} of {self.operand} is {value}"


class FP8Monitor:
    """Measures every FP8 layer of a model in every `every`-th step (0: never), and reports layers outside their band.

    A layer is reported once, and again only after it has come back into its band. patience: measurements in a row
    outside after which a layer should switch to bf16; 0: never. earlier: measurements of the run before it was
    resumed.
    """

    def __init__(self, model: nn.Module, every: int, patience: int = 0, earlier: Iterable[dict] = ()):
        self.model, self.every, self.patience = model, every, patience
        self.first = {}  # (layer, operand): the layer's first measurements, from which its own band follows
        self.outside = {}  # (layer, operand, metric): measurements in a row outside the band
        for record in earlier:
            self.update(record)

    def modules(self) -> dict[str, nn.Module]:
        """The model's FP8 modules by name."""
        return {name: module for name, module in self.model.named_modules() if isinstance(module, FP8)}

    @contextmanager
    def measuring(self, step: int) -> Iterator[dict]:
        """Run the step inside this context. The yielded dict gets the record at its end, or stays empty where this step
        is not measured.

        The first of several micro batches is measured. The host waits for the device once, at the end.
        """
        record = {}
        modules = self.modules() if self.every and step % self.every == 0 else {}
        if not modules:
            yield record
            return
        sample = Sample(step // self.every - 1)
        hooks = [module.register_forward_hook(sample.hook(name)) for name, module in modules.items()]
        try:
            yield record
        finally:
            for hook in hooks:
                hook.remove()
        record |= dict(step=step, layers=sample.result())

    def update(self, record: dict) -> list[OutOfRange]:
        """Take in a record; returns the metrics that are outside their band and were inside before."""
        newly_outside = []
        for layer, operands in record["layers"].items():
            for operand, values in operands.items():
                limits = BANDS.get(operand) or self.own_band(layer, operand, values)
                for metric, value, limit in zip(METRICS, values, limits, strict=True):
                    key = layer, operand, metric
                    before = self.outside.get(key, 0)
                    self.outside[key] = before + 1 if value is None or value > limit else 0
                    if self.outside[key] and not before:
                        newly_outside.append(OutOfRange(*key, value, limit))
        return newly_outside

    def own_band(self, layer: str, operand: str, values: list[float]) -> tuple[float, float]:
        first = self.first.setdefault((layer, operand), [])
        if len(first) < OWN_BAND_SAMPLES:
            first.append(values)
        a, b = (max(OWN_BAND_FLOOR[i], OWN_BAND_FACTOR * max(v[i] or 0 for v in first)) for i in range(2))
        return a, b

    def layers_to_disable(self) -> list[str]:
        """Names of FP8 modules that have been outside their band for `patience` measurements in a row."""
        if not self.patience:
            return []
        layers = [layer for (layer, *_), times in self.outside.items() if times >= self.patience]
        return list(dict.fromkeys(name for name in self.modules() for layer in layers if is_in(layer, name)))


def joined(records: Iterable[dict]) -> dict:
    """One record of the layers of several; empty where none has any."""
    found = [record for record in records if record]
    layers = {layer: operands for record in found for layer, operands in record["layers"].items()}
    return dict(step=found[0]["step"], layers=layers) if found else {}


def is_in(layer: str, module: str) -> bool:
    return layer == module or layer in (f"{module}.gate_up", f"{module}.down")


class Sample:
    """Measures the operands of one step. number counts the samples; each takes other tokens and rows."""

    def __init__(self, number: int):
        self.number = number
        self.seen = set()
        self.measured = {}  # (layer, operand): [2] on the device

    def hook(self, name: str):
        def measure(module: nn.Module, args: tuple, out: Tensor) -> None:
            if name not in self.seen and out.requires_grad:  # the first micro batch, not a recomputation
                self.seen.add(name)
                measure_kind = next(m for kind, m in KINDS.items() if isinstance(module, kind))
                with torch.no_grad(), torch.autocast(out.device.type, enabled=False):
                    measure_kind(self, name, module, out, *args)

        return measure

    def tokens(self, x: Tensor) -> Tensor:
        """128 rows of x [..., H] -> [128, H], padded with zeros where there are fewer."""
        x = x.flatten(0, -2)
        start = BLOCK * (self.number % -(-len(x) // BLOCK))
        rows = x[start : start + BLOCK]
        return torch.cat([rows, rows.new_zeros(BLOCK - len(rows), rows.shape[1])])

    def linear(
        self,
        name: str,
        module: Fp8Linear,
        out: Tensor,
        x: Tensor,
        norm: nn.Module | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        pow2, columns = module.fp8.pow2, along_tokens(module, module.weight)
        self.weight(name, module.weight, pow2)
        x = self.tokens(x)
        self.rows(name, "x", x if norm is None else norm(x), pow2, columns)
        out.register_hook(lambda dy: self.rows(name, "dy", self.tokens(dy), pow2, columns))

    def mlp(self, name: str, module: Fp8MLP, out: Tensor, x: Tensor) -> None:
        gate_up, down = module.gate_up.weight, module.down.weight
        columns = along_tokens(module, gate_up, down)
        backward = self.feed_forward(name, self.tokens(x), gate_up, down, None, module.fp8.pow2, columns)
        out.register_hook(lambda dy: backward(self.tokens(dy)))

    def experts(self, name: str, module: Fp8Experts, out: Tensor, x: Tensor, plan, weights: Tensor) -> None:
        """Measure the first 128 rows of one expert, in each sample another of the busiest quarter. The device
        chooses."""
        w, rows = (module.gate_up, module.down), len(plan.source)
        columns = along_tokens(module, *w, rows=rows // len(w[0]))
        busy = plan.offsets.diff().argsort(descending=True, stable=True)
        expert = busy[self.number % max(len(busy) // 4, 1)][None]
        row = plan.offsets[expert] + torch.arange(BLOCK, device=x.device)
        valid = (row < plan.offsets[expert + 1])[:, None]
        source = plan.source[row.clamp(max=rows - 1).long()].long().where(valid[:, 0], 0)
        token, p = source // weights.shape[1], weights.detach().flatten()[source]
        gate_up, down = (t.index_select(0, expert)[0] for t in w)
        backward = self.feed_forward(name, x[token] * valid, gate_up, down, p, module.fp8.pow2, columns)
        out.register_hook(lambda dy: backward(dy[token] * valid))

    def feed_forward(self, name, x: Tensor, gate_up: Tensor, down: Tensor, p: Tensor | None, pow2: bool, columns: bool):
        """Measure operands of gate_up and down for rows x; returns a function that does so for their dy."""
        self.weight(f"{name}.gate_up", gate_up, pow2)
        self.weight(f"{name}.down", down, pow2)
        self.rows(f"{name}.gate_up", "x", x, pow2, columns)
        h = x.float() @ gate_up.detach().float().T
        self.rows(f"{name}.down", "x", swiglu(h, p), pow2, columns)

        def backward(dy: Tensor) -> None:
            self.rows(f"{name}.down", "dy", dy, pow2, columns)
            dh, _ = swiglu_backward(dy.float() @ down.detach().float(), h, p)
            self.rows(f"{name}.gate_up", "dy", dh, pow2, columns)

        return backward

    def weight(self, name: str, w: Tensor, pow2: bool) -> None:
        start = BLOCK * (self.number % (len(w) // BLOCK))
        w = w.detach()[start : start + BLOCK]
        self.measured[name, "w"] = fp8_errors(w, dequantize(*quantize_weight(w, pow2)))

    @torch.no_grad()
    def rows(self, name: str, operand: str, x: Tensor, pow2: bool, columns: bool) -> None:
        self.measured[name, operand] = fp8_errors(x, dequantize(*quantize(x, pow2=pow2)))
        if columns:
            x = x.T.contiguous()
            self.measured[name, operand + "t"] = fp8_errors(x, dequantize(*quantize(x, pow2=pow2)))

    def result(self) -> dict[str, dict[str, list[float]]]:
        """{layer: {operand: [underflow, distortion]}}, None for a value that is not finite."""
        out = {}
        if self.measured:
            for (layer, operand), values in zip(
                self.measured, torch.stack([*self.measured.values()]).tolist(), strict=True
            ):
                out.setdefault(layer, {})[operand] = [finite(v) for v in values]
        return out


KINDS: dict[type, Callable] = {Fp8Linear: Sample.linear, Fp8MLP: Sample.mlp, Fp8Experts: Sample.experts}


@torch.enable_grad()
def along_tokens(module: nn.Module, *weights: nn.Parameter, rows: int | None = None) -> bool:
    """Whether the module computes its weights' gradients in FP8, quantised along the tokens."""
    return module.fp8.wgrad_for(*weights, rows=rows) == "fp8"


def fp8_errors(x: Tensor, back: Tensor) -> Tensor:
    """Underflow and distortion of x and `back`, dequantised from its FP8 -> [2] fp64; 0 and 0 where x is zero."""
    x, back = x.double(), back.double()
    nonzero = x != 0
    underflow = ((back == 0) & nonzero).sum() / nonzero.sum().clamp(min=1)
    norms = (x.square().sum() * back.square().sum()).sqrt()
    distortion = 1 - torch.where(norms == 0, (~nonzero.any()).double(), (x * back).sum() / norms)
    return torch.stack([underflow.double(), distortion])


def to_bf16(model: nn.Module, name: str) -> None:
    """Undo `to_fp8` for the model's module `name`, in place, with the same parameters. Other modules are left alone."""
    old = dict(model.named_modules()).get(name)
    if not isinstance(old, FP8):  # the run was resumed in bf16, or the layer is on another rank
        return
    new: nn.Module
    with torch.device("meta"):
        if isinstance(old, Fp8Linear):
            new = nn.Linear(old.in_features, old.out_features, bias=False)
        else:
            new = old.plain() if isinstance(old, Fp8MLP) else Experts(*old.down.shape)
    for part, p in old.named_parameters():
        forget_cache(p)
        owner, _, attribute = part.rpartition(".")
        setattr(new.get_submodule(owner), attribute, p)
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, new.train(old.training))


def spike(values: list[float], recent: list[list[float]], limits: tuple[float | None, float | None]) -> str | None:
    """Describe a spike: a step's loss or gradient norm above its limit times the median of recent steps. None where
    there is no spike, and with fewer than MIN_STEPS recent steps.

    values: loss and gradient norm of the step; recent: the same of steps not skipped; limits: factor for each; None or
    0: never.
    """
    for i, (name, ceiling) in enumerate(zip(("loss", "gradient norm"), ceilings(recent, limits), strict=True)):
        if values[i] > ceiling:
            middle = median(before[i] for before in recent)
            return f"{name} {values[i] / middle:.3g} times the median of {len(recent)} steps"
    return None


def ceilings(recent: list[list[float]], limits: tuple[float | None, float | None]) -> list[float]:
    """The loss and the gradient norm above which a step is a spike; inf: never."""
    if len(recent) < MIN_STEPS:
        return [inf, inf]
    columns = zip(*recent, strict=True)
    return [max(n * median(column), NO_SPIKE) if n else inf for n, column in zip(limits, columns, strict=True)]
