"""create_graph=True: a second derivative equals finite differences, or the op refuses it; never silently wrong."""

import pytest
import torch
from torch import Tensor

from ling_kernels.backend import force
from tests.cases import args_of
from tests.test_ops import args_tensors, flatten, in_fp64, smallest_of_each

STEP = 1e-5  # of the central difference, in fp64


def leaves_of(args) -> list[Tensor]:
    return [t for t in flatten(args_tensors(args)) if t.requires_grad]


def known(x: Tensor) -> Tensor:
    """x in fp64, with 0 for the NaN that fills rows which no op may read."""
    return torch.where(x.isnan(), 0, x).double()


def penalty(fn, case, args, create_graph: bool) -> Tensor:
    """The squared norm of a loss's gradient. The loss has a term of its own, so the gradient always has a graph."""
    outs = flatten(fn(*args, **case.kwargs))
    outs = [o for o in (flatten(case.defined(outs, args)) if case.defined else outs) if o.requires_grad]
    leaves = leaves_of(args)
    loss = sum(o.double().square().sum() for o in outs) + 1e-3 * sum(known(leaf).pow(3).sum() for leaf in leaves)
    return sum(known(g).square().sum() for g in torch.autograd.grad(loss, leaves, create_graph=create_graph))


def moved(args, directions: list[Tensor], step: float):
    """args with step times the directions added to the leaves, in order."""
    rest = iter(directions)

    def move(a):
        if isinstance(a, Tensor):
            return (a.detach() + step * next(rest)).requires_grad_() if a.requires_grad else a
        if isinstance(a, tuple):
            parts = [move(part) for part in a]
            return type(a)(*parts) if hasattr(a, "_fields") else tuple(parts)
        return a

    return tuple(map(move, args))


def differentiable():
    """The smallest shape of each case and backend that has a gradient, in fp32 where there is a choice."""
    for parameters in smallest_of_each():
        case, shape, dtype, backend = parameters.values
        wanted = torch.float32 if torch.float32 in case.dtypes else case.dtypes[0]
        if dtype == wanted and backend != "cuda":  # the autograd.Functions are Triton's
            args = args_of(case, shape, dtype)
            outs = flatten(case.op(*args, **case.kwargs)) if leaves_of(args) else []
            if any(o.requires_grad for o in outs):
                yield parameters


@pytest.mark.parametrize("case, shape, dtype, backend", differentiable())
def test_right_or_refused(case, shape, dtype, backend):
    args = args_of(case, shape, dtype)
    true = tuple(map(in_fp64, args))
    generator = torch.Generator().manual_seed(0)
    directions = [torch.randn(t.shape, generator=generator).double().to(t.device) for t in leaves_of(true)]
    with force(backend):
        try:
            got = torch.autograd.grad(penalty(case.op, case, args, True), leaves_of(args))
        except RuntimeError as error:
            assert "derivative" in str(error)
            return
    parts = torch.cat([(known(g) * d).flatten() for g, d in zip(got, directions, strict=True)])
    ends = [float(penalty(case.ref, case, moved(true, directions, side * STEP), False)) for side in (1, -1)]
    want = (ends[0] - ends[1]) / (2 * STEP)
    tolerance = 1e-3 if dtype == torch.float32 else 1e-2
    assert abs(float(parts.sum()) - want) <= tolerance * float(parts.abs().sum())


def test_every_op_with_a_gradient_is_tried():
    tried = {p.values[0].op.__name__ for p in differentiable()}
    assert {"attention", "linear_cross_entropy", "moe", "rms_norm", "route", "swiglu", "unpermute"} <= tried
