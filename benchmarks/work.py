"""What a Case must move and multiply, counted from its arguments and results, real or fake; and a step of decoding."""

import inspect

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from benchmarks.limits import Work
from ling_kernels.backend import force
from ling_kernels.op import E4M3
from tests.cases import args_of


def op_of(case):
    """What a user calls, without the table's wrappers that copy what it writes."""
    return inspect.unwrap(case.op)


def tensors(a) -> list[Tensor]:
    if isinstance(a, Tensor):
        return [a]
    return [t for part in a for t in tensors(part)] if isinstance(a, tuple | list) else []


def memory(t: Tensor) -> int:
    """What tells tensors of one allocation."""
    return t.untyped_storage()._cdata


def nbytes(found: list[Tensor]) -> int:
    return sum(t.numel() * t.element_size() for t in found)


def precision(args) -> str:
    return "fp8" if any(t.dtype == E4M3 for t in tensors(args)) else "bf16"


def idle_share(args) -> tuple[int, float]:
    """The number of experts, and the share of them that have rows: the others' weights need not be read.

    An argument that is int32 and has E + 1 entries says who has which rows, where others have E in front. A fake one
    says nothing; then as many experts have rows as can.
    """
    found = tensors(args)
    rows = [len(t) for t in found if t.ndim == 2]
    for offsets in found:
        if offsets.dtype != torch.int32 or offsets.ndim != 1 or len(offsets) < 3 or not rows:
            continue
        E = len(offsets) - 1
        if not any(t.ndim == 3 and len(t) == E for t in found):
            continue
        if is_fake(offsets):
            return E, min(E, max(rows)) / E
        return E, (offsets.diff() > 0).float().mean().item()
    return 0, 1.0


def is_fake(t: Tensor) -> bool:
    return type(t).__name__ == "FakeTensor"


def read_bytes(args, found: list[Tensor]) -> int:
    E, share = idle_share(args)
    return sum(int(nbytes([t]) * (share if E and t.ndim == 3 and len(t) == E else 1)) for t in found)


def forward_work(case, shape: dict, args, outs) -> Work:
    flops = case.flops(**shape) if case.flops else 0
    if case.bytes:
        return Work(case.bytes(**shape), flops, precision(args))
    given = tensors(args)
    places = {memory(t) for t in given}
    made = [t for t in tensors(outs) if memory(t) not in places]
    written = [t for i in getattr(case.op, "writes", ()) for t in tensors(args[i])]
    return Work(read_bytes(args, given) + nbytes(made) + nbytes(written), flops, precision(args))


class Backward:
    """A call of the op under autograd: `run` computes its gradients, `work` is what that must move.

    That is what the op saved of its arguments and results, cotangents and gradients; not what it saved besides.
    """

    def __init__(self, case, shape: dict, args):
        saved = {}
        keep = saved_tensors_hooks(lambda t: (saved.setdefault((memory(t), t.storage_offset()), t), t)[1], lambda t: t)
        with keep:
            self.outs = tensors(op_of(case)(*args, **case.kwargs))
        places = {memory(t) for t in [*tensors(args), *self.outs]}
        saved = [t for (place, _), t in saved.items() if place in places]
        self.outs = [o for o in self.outs if o.requires_grad]
        self.leaves = [a for a in tensors(args) if a.requires_grad]
        self.cotangents = [torch.randn_like(o) for o in self.outs]
        flops = int(case.flops(**shape) * case.backward_flops) if case.flops else 0
        moved = read_bytes(args, saved) + nbytes([*self.cotangents, *self.leaves])
        self.work = Work(moved, flops, precision(args))

    def run(self):
        return torch.autograd.grad(self.outs, self.leaves, self.cotangents, retain_graph=True, allow_unused=True)


def fake_work(case, shape: dict) -> dict[str, Work]:
    """forward's and, where there is one, backward's, at any size on any machine."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    name = next((b for b in case.backends if b == "triton"), "torch")
    with FakeTensorMode(allow_non_fake_inputs=True), force(name):
        args = tuple(args_of(case, shape, case.dtypes[0]))
        outs = op_of(case)(*args, **case.kwargs)
        found = dict(forward=forward_work(case, shape, args, outs))
        if any(o.requires_grad for o in tensors(outs)):
            found["backward"] = Backward(case, shape, args).work
    return found
