"""Every op against its reference, forward and backward, on every backend it has. The table is in cases.py."""

import functools

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import ling_kernels
from ling_kernels.backend import force
from ling_kernels.op import E4M3, explain
from ling_kernels.ops import EXPORTS
from ling_kernels.ops.quantize import dequantize
from tests.cases import CASES, DEVICE, args_of, sweep
from tests.gpu import schedule

WIDE = (torch.float32, torch.bfloat16, torch.float16)


def flatten(out) -> list[Tensor]:
    if isinstance(out, Tensor) or out is None:
        return [] if out is None else [out]
    return [t for o in out for t in flatten(o)]


def outputs_and_grads(case, fn, args, absolute: bool = False) -> list[Tensor]:
    """fn's results followed by the gradients of its tensor arguments, for a fixed cotangent, or its absolute value."""
    outs = flatten(fn(*args, **case.kwargs))
    diff = [o for o in outs if o.requires_grad]
    cot = [torch.linspace(-1, 1, o.numel(), device=o.device).view(o.shape).to(o.dtype) for o in diff]
    cot = [c.abs() for c in cot] if absolute else cot
    leaves = [a for a in flatten(args_tensors(args)) if a.requires_grad]
    grads = torch.autograd.grad(diff, leaves, cot, allow_unused=True) if diff else ()
    outs = flatten(case.defined(outs, args)) if case.defined else outs
    return [*(o.detach() for o in outs), *(g for g in grads if g is not None)]


def args_tensors(args):
    """Tensors of an argument list, also those inside tuples such as a Plan."""
    return [a if isinstance(a, Tensor) else args_tensors(a) for a in args if isinstance(a, Tensor | tuple)]


def in_fp64(a, absolute: bool = False):
    if isinstance(a, Tensor) and a.dtype in WIDE:
        a, wanted = a.detach().double(), a.requires_grad
        return (a.abs() if absolute else a).requires_grad_(wanted)
    if isinstance(a, Tensor) and a.dtype == E4M3:
        return a.double().abs().to(E4M3) if absolute else a
    if isinstance(a, tuple):
        parts = [in_fp64(part, absolute) for part in a]
        return type(a)(*parts) if hasattr(a, "_fields") else tuple(parts)
    return a


def tensor_core_errors(case, args) -> list[Tensor]:
    """What tensor cores may lose of each output and gradient of a product, elementwise: a share of |A||B|.

    Hopper keeps about 14 bits of a sum of FP8 products. The same share for all ops; no GPU has confirmed it yet.
    """
    fp8 = any(isinstance(a, Tensor) and a.dtype == E4M3 for a in args)
    sizes = outputs_and_grads(case, case.ref, tuple(in_fp64(a, True) for a in args), True)
    return [size.double() * (2**-13 if fp8 else 2**-19) for size in sizes]


def errors(got, want, free=0.0):
    """The worst element's error and that of all, of what exceeds the elements' `free` error."""
    d = ((got.double() - want.double()).abs() - free).relu().flatten()
    return (d.max().item(), d.square().mean().sqrt().item()) if len(d) else (0.0, 0.0)


def layout(t):
    """Strides, where they mean anything."""
    return [stride for stride, size in zip(t.stride(), t.shape, strict=True) if size > 1 and t.numel()]


def same_bits(a, b):
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    # clone: contiguous() leaves a single element its stride, and view wants 1
    return torch.equal(*(t.reshape(-1).clone(memory_format=torch.contiguous_format).view(torch.uint8) for t in (a, b)))


FP8_SHARE = 1 / 128


def near_codes(got: Tensor, want: Tensor) -> bool:
    """Whether FP8 results agree: the rule for every kernel and every test that does not ask for equal bits.

    Sums in another order and approximate functions change last bits, and a last bit may move a value to the next code:
    in at most FP8_SHARE of the elements, or in one of a few. NaN stays NaN.
    """
    ranks = []
    for t in (got, want):
        bits = t.contiguous().view(torch.uint8).int()
        ranks.append(torch.where(bits < 128, bits, 128 - bits))  # in the order of the values; -0 is 0
    d = (ranks[0] - ranks[1]).abs()
    same_nan = torch.equal(got.float().isnan(), want.float().isnan())
    return same_nan and bool((d <= 1).all()) and d.count_nonzero().item() <= max(1, FP8_SHARE * d.numel())


def test_near_codes():
    codes = torch.arange(-126, 127)
    x = torch.where(codes < 0, 128 - codes, codes).to(torch.uint8).view(E4M3).repeat(20)  # every number, ascending
    at = (x == 0).nonzero()[5]  # the neighbour of -0 is the smallest number
    one, two, many = x.clone(), x.clone(), x.clone()
    one.view(torch.uint8)[at] = 1
    two.view(torch.uint8)[at] = 2
    many.view(torch.uint8)[x.float() > 100] -= 1
    nan = x.clone()
    nan.view(torch.uint8)[at + 126] = 127
    assert near_codes(one, x) and near_codes(x, x)
    assert not any(near_codes(wrong, x) for wrong in (two, many, nan))


@pytest.mark.parametrize("case, shape, dtype, backend", sweep())
def test_matches_reference(case, shape, dtype, backend):
    """No per-op tolerances: a kernel may be twice as far from the fp64 truth as its reference in `dtype`.

    On a GPU a matrix product may also lose what its tensor cores do.
    """
    args = args_of(case, shape, dtype)
    with force(backend):
        got = outputs_and_grads(case, case.op, args)
    near = outputs_and_grads(case, case.ref, args)
    true = outputs_and_grads(case, case.truth or case.ref, tuple(map(in_fp64, args)))
    free = tensor_core_errors(case, args) if case.product and DEVICE == "cuda" else None
    assert list(map(layout, got)) == list(map(layout, near))
    assert_near(case, got, near, true, free, bitwise=backend == "torch")


def assert_near(case, got, near, true, free=None, bitwise: bool = False) -> None:
    """got against the reference's results and the truth: equal bits if `bitwise` or where the table asks for them."""
    exact = range(len(near)) if case.exact is True else case.exact or ()
    assert len(got) == len(near)
    for i, (g, n, t) in enumerate(zip(got, near, true, strict=True)):
        assert g.dtype == n.dtype and g.shape == n.shape, f"output {i}"
        if bitwise or i in exact or not g.is_floating_point():
            assert same_bits(g, n), f"output {i}"
            continue
        if g.dtype == E4M3:
            assert near_codes(g, n), f"output {i}"
            continue
        scale = errors(t, torch.zeros_like(t))[0]
        both = zip(errors(g, t, free[i] if free else 0.0), errors(n, t), strict=True)
        for e, allowed in both:  # the worst element, and all of them
            assert e <= 2 * allowed + 2e-6 * scale, f"output {i}"  # the reference's own sums depend on the CPU


@pytest.mark.parametrize("name, shape", [("gemm_fp8", dict(M=67, N=256, K=2048)),
                                         ("router_gemm", dict(T=37, E=64, H=48, w_offset=64))])  # fmt: skip
def test_the_allowance_for_tensor_cores_is_a_share_of_the_absolute_product(name, shape):
    """Only GPU runs use this allowance; its value can be checked on a CPU."""
    case = next(c for c in CASES if c.op.__name__ == name and shape in c.shapes)
    args = args_of(case, shape, torch.bfloat16)
    got = tensor_core_errors(case, args)
    if name == "gemm_fp8":
        want = [dequantize(*args[:2]).abs() @ dequantize(*args[2:4]).abs().T * 2**-13]
    else:
        x, w = (a.detach().float().abs() for a in args)
        cot = torch.linspace(-1, 1, 37 * 64, device=DEVICE).view(37, 64).abs()
        want = [2**-19 * t for t in (x @ w.T, cot @ w, cot.T @ x)]
    assert case.product and len(got) == len(want)
    for g, w in zip(got, want, strict=True):
        torch.testing.assert_close(g, w.double(), rtol=1e-5, atol=0)


def test_a_free_error_is_free_for_its_element_only():
    want, free = torch.zeros(2), torch.tensor([0.5, 0.0])
    assert errors(torch.tensor([0.5, 0.0]), want, free) == (0, 0)
    assert errors(torch.tensor([-0.75, 0.0]), want, free)[0] == 0.25 and errors(free.flip(0), want, free)[0] == 0.5


@pytest.mark.parametrize("case, shape, dtype, backend", [p for p in sweep() if "torch" in p.values])
def test_reference_is_near_the_truth(case, shape, dtype, backend):
    """The reference in `dtype` against itself in fp64: it accumulates widely and drops no argument's gradient."""
    args = args_of(case, shape, dtype)
    near = outputs_and_grads(case, case.ref, args)
    true = outputs_and_grads(case, case.truth or case.ref, tuple(map(in_fp64, args)))
    for i, (n, t) in enumerate(zip(near, true, strict=True)):
        assert n.shape == t.shape
        if not n.is_floating_point() or not n.numel() or n.element_size() == 1:
            continue  # FP8 is judged bit for bit in test_references.py
        assert n.isfinite().all(), f"output {i}"
        eps = 2**-7 if n.dtype == torch.bfloat16 or dtype == torch.bfloat16 else 2**-16
        assert errors(n, t)[1] <= eps * errors(t, torch.zeros_like(t))[0], f"output {i}"


@pytest.mark.parametrize("case, shape, dtype, backend", [p for p in sweep() if p.values[2] == p.values[0].dtypes[0]])
def test_two_runs_give_equal_bits(case, shape, dtype, backend):
    """On the virtual GPU the second one runs blocks, warps and copies in another order.

    In one dtype: which programs meet in memory does not depend on it.
    """
    with force(backend):
        one = outputs_and_grads(case, case.op, args_of(case, shape, dtype))
        with schedule(1):
            two = outputs_and_grads(case, case.op, args_of(case, shape, dtype))
    assert all(map(same_bits, one, two))


@functools.cache
def smallest_of_each():
    """The smallest parameters whose first tensor is not empty, of each case, dtype and backend."""
    chosen = {}
    for p in sweep():
        case, shape, dtype, backend = p.values
        sizes = [a.numel() for a in flatten(args_tensors(args_of(case, shape, dtype)))]
        size = sum(sizes) if all(sizes[:1]) else 0
        key = (id(case), dtype, backend)
        if size and (key not in chosen or size < chosen[key][0]):
            chosen[key] = (size, p)
    return [p for _, p in chosen.values()]


@pytest.mark.parametrize("case, shape, dtype, backend", smallest_of_each())
def test_compiles(case, shape, dtype, backend):
    """torch.compile sees one graph and changes no bit."""
    torch._dynamo.reset()  # or else the shapes so far count as recompilations
    compiled = torch.compile(case.op, fullgraph=True, backend="aot_eager")
    with force(backend):
        eager = outputs_and_grads(case, case.op, args_of(case, shape, dtype))
        graph = outputs_and_grads(case, compiled, args_of(case, shape, dtype))
    assert len(eager) == len(graph) and all(map(same_bits, eager, graph))


class Calls(TorchDispatchMode):
    """Notes calls of our launchers, which under a dispatch mode are calls of registered ops, and what they change."""

    def __init__(self):
        super().__init__()
        self.seen = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace != "ling":
            return func(*args, **(kwargs or {}))
        before = [a.clone() if isinstance(a, Tensor) else a for a in args]
        assert func(*args) is None
        for a, b, declared in zip(args, before, func._schema.arguments, strict=True):
            if isinstance(a, Tensor) and not declared.is_write:
                assert same_bits(a, b), f"{func} writes {declared.name}, which it does not declare"
        self.seen.setdefault(func, before)


OPCHECKED = set()  # launchers with their backend: all of opcheck takes seconds, and one Case's arguments are enough


@pytest.mark.parametrize("case, shape, dtype, backend", smallest_of_each())
def test_launchers_write_only_declared_arguments(case, shape, dtype, backend):
    """Launchers write exactly the arguments that they declare; fake kernels pass opcheck."""
    with force(backend):
        with Calls() as calls:
            outputs_and_grads(case, case.op, args_of(case, shape, dtype))
        for launcher, args in calls.seen.items():
            comparable = all(not isinstance(a, Tensor) or a.element_size() > 1 for a in args)  # float8 is not on a CPU
            torch.library.opcheck(launcher, tuple(args), test_utils="test_faketensor")
            if comparable and (launcher, backend) not in OPCHECKED:
                OPCHECKED.add((launcher, backend))
                torch.library.opcheck(launcher, tuple(args))


@pytest.mark.parametrize("case, shape, dtype, backend", smallest_of_each())
def test_explain_gives_every_choice(case, shape, dtype, backend):
    """explain never names a faster backend than the forced one, and gives a reason for each slower one."""
    args = args_of(case, shape, dtype)
    with force(backend):
        choices = explain(case.op, *args, **case.kwargs)
    assert choices or "triton" not in case.backends
    speed = {"torch": 0, "composed of other ops": 0, "triton": 1, "cuda": 2}
    for choice in choices:
        assert speed[choice.implementation] <= speed[backend]
        assert choice.reason is None if choice.implementation == "cuda" else choice.reason


@pytest.mark.parametrize("case, shape, dtype, backend", smallest_of_each())
def test_activation_checkpointing_gives_equal_bits(case, shape, dtype, backend):
    def recomputed(*args, **kwargs):
        return checkpoint(case.op, *args, use_reentrant=False, **kwargs)

    with force(backend):
        expected = outputs_and_grads(case, case.op, args_of(case, shape, dtype))
        got = outputs_and_grads(case, recomputed, args_of(case, shape, dtype))
    assert len(expected) == len(got) and all(map(same_bits, expected, got))


def test_every_public_op_has_a_case():
    named = {c.op.__name__ for c in CASES}
    assert {*EXPORTS} <= named, {*EXPORTS} - named
    for name in ling_kernels.__all__:
        assert getattr(ling_kernels, name).__doc__, name
