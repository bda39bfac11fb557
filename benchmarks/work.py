"""The bytes that a Case must move and the FLOPs of its products; how long a GPU needs for them at least (roofline);
and the shapes at which a Case is timed."""

import inspect
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from ling_kernels.backend import force
from ling_kernels.gpu import Gpu
from ling_kernels.model import LingConfig
from ling_kernels.op import E4M3
from tests.cases import CASES, args_of


@dataclass(frozen=True)
class Work:
    """The least that an implementation moves and multiplies. precision: "bf16" or "fp8", of the factors."""

    bytes: int
    flops: int = 0
    precision: str = "bf16"

    def seconds(self, gpu: Gpu) -> float:
        """The larger of the time to move the bytes and the time to multiply."""
        return max(self.bytes / gpu.bandwidth, self.flops / gpu.rate(self.precision))

    def bound(self, gpu: Gpu) -> str:
        return "memory" if self.bytes / gpu.bandwidth >= self.flops / gpu.rate(self.precision) else "compute"


def op_of(case):
    """The public function, without the table's wrappers that copy the arguments which it writes."""
    return inspect.unwrap(case.op)


def tensors(a) -> list[Tensor]:
    """The tensors of nested tuples and lists, in order."""
    if isinstance(a, Tensor):
        return [a]
    return [t for part in a for t in tensors(part)] if isinstance(a, tuple | list) else []


def storage(t: Tensor) -> int:
    """Equal for tensors that share memory."""
    return t.untyped_storage()._cdata


def nbytes(found: list[Tensor]) -> int:
    return sum(t.numel() * t.element_size() for t in found)


def precision(args) -> str:
    return "fp8" if any(t.dtype == E4M3 for t in tensors(args)) else "bf16"


def experts_in_use(args) -> tuple[int, float]:
    """E and the share of the E experts that have rows: the weights of the others need not be read. (0, 1) without.

    The int32 argument of E + 1 entries is the experts' offsets if another argument is [E, .., ..]. A fake tensor has
    no values: then each row is counted as another expert's.
    """
    found = tensors(args)
    rows = [len(t) for t in found if t.ndim == 2]
    for offsets in (t for t in found if t.dtype == torch.int32 and t.ndim == 1 and len(t) > 2 and rows):
        E = len(offsets) - 1
        if any(t.ndim == 3 and len(t) == E for t in found):
            fake = type(offsets).__name__ == "FakeTensor"
            return E, min(E, max(rows)) / E if fake else (offsets.diff() > 0).float().mean().item()
    return 0, 1.0


def read_bytes(args, found: list[Tensor]) -> int:
    E, share = experts_in_use(args)
    return sum(int(nbytes([t]) * (share if E and t.ndim == 3 and len(t) == E else 1)) for t in found)


def evaluate(formula, shape: dict) -> int:
    """A Case's formula at a shape; 0 without a formula, and where it does not take a test shape's further arguments."""
    try:
        return formula(**shape) if formula else 0
    except TypeError:
        return 0


def forward_work(case, shape: dict, args, outs) -> Work:
    """Each argument and each new result counts once; an argument that the op writes counts twice."""
    flops = evaluate(case.flops, shape)
    if moved := evaluate(case.bytes, shape):
        return Work(moved, flops, precision(args))
    given = tensors(args)
    new = [t for t in tensors(outs) if storage(t) not in {storage(g) for g in given}]
    written = [t for i in getattr(case.op, "writes", ()) for t in tensors(args[i])]
    return Work(read_bytes(args, given) + nbytes(new) + nbytes(written), flops, precision(args))


class Backward:
    """A call under autograd: `run` computes its gradients; `work` counts the arguments and results that it saved, the
    cotangents and the gradients, but no other tensors that it saved. `outs` is empty without gradients."""

    def __init__(self, case, shape: dict, args):
        saved = {}
        keep = saved_tensors_hooks(lambda t: (saved.setdefault((storage(t), t.storage_offset()), t), t)[1], lambda t: t)
        with keep:
            outs = tensors(op_of(case)(*args, **case.kwargs))
        known = {storage(t) for t in [*tensors(args), *outs]}
        self.outs = [o for o in outs if o.requires_grad]
        self.leaves = [a for a in tensors(args) if a.requires_grad]
        self.cotangents = [torch.randn_like(o) for o in self.outs]
        flops = int(evaluate(case.flops, shape) * case.backward_flops)
        moved = read_bytes(args, [t for (place, _), t in saved.items() if place in known])
        self.work = Work(moved + nbytes([*self.cotangents, *self.leaves]), flops, precision(args))

    def run(self):
        return torch.autograd.grad(self.outs, self.leaves, self.cotangents, retain_graph=True, allow_unused=True)


def fake_work(case, shape: dict) -> dict[str, Work]:
    """{"forward": Work, and "backward" where there is one}, on fake tensors: at any size, on any machine."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode(allow_non_fake_inputs=True), force("triton" if "triton" in case.backends else "torch"):
        args = tuple(args_of(case, shape, case.dtypes[0]))
        outs = op_of(case)(*args, **case.kwargs)
        found = dict(forward=forward_work(case, shape, args, outs))
        if any(o.requires_grad for o in tensors(outs)):
            found["backward"] = Backward(case, shape, args).work
    return found


class Point:
    """One GPU's share of a layer of the model `model`: T tokens; its E experts of 256, among `parallel` GPUs."""

    def __init__(self, model: str, T: int, parallel: int = 1, routing: str = "balanced"):
        c = LingConfig.preset(model)
        self.T, self.parallel, self.routing = T, parallel, routing
        self.E, self.S = c.num_experts // parallel, T * c.num_experts_per_tok
        self.H, self.F, self.Hq, self.Hkv = (
            c.hidden_size, c.moe_intermediate_size, c.num_attention_heads, c.num_key_value_heads,
        )  # fmt: skip
        self.lengths = (min(T, 4096),) * max(1, T // 4096)  # sequences of at most 4096 tokens
        self.whole = parallel == 1 and routing == "balanced"


MODELS, TOKENS = ("mini", "flash", "1t"), (1, 8, 64, 1024, 8192, 32768, 131072)
POINTS = [
    *(Point(m, T, parallel) for m in MODELS for T in TOKENS for parallel in (1, 8, 64)),
    *(Point(m, 8192, 1, routing) for m in MODELS for routing in ("zipf", "one")),
]


def shapes(case, which: str) -> list[dict]:
    """which: "own", the Case's benchmark shape; "grid", also those at POINTS; "small", a small one with data."""
    if which == "small":
        sizes = ((s, [t.numel() for t in tensors(args_of(case, s, case.dtypes[0]))]) for s in case.shapes[:-1])
        return [next((s for s, n in sizes if n and all(n)), case.shapes[-2])]
    found = [case.shapes[-1]]
    for point in POINTS if which == "grid" and case.ling else ():
        found += [shape for shape in case.ling(point) or () if shape not in found]
    return found


def title(case, shape: dict) -> str:
    """Name of a Case at a shape; a number tells Cases of one op and one set of keyword arguments apart."""
    alike = [c for c in CASES if c.name == case.name]
    number = f"#{alike.index(case) + 1}" if len(alike) > 1 else ""
    return "-".join([case.name + number, *(f"{k}{brief(v)}" for k, v in shape.items() if v != "")])


def brief(value) -> str:
    if isinstance(value, tuple) and len(value) > 1 and len({*value}) == 1:
        return f"{len(value)}x{value[0]}"
    return "+".join(map(str, value)) if isinstance(value, tuple) else str(value)
