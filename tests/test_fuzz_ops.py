"""Fuzzer of op arguments, drawn from the table in cases.py: the reference's result, or a ValueError of one line."""

import warnings

import pytest
import torch
from torch import Tensor

from ling_kernels.backend import force
from ling_kernels.op import E4M3
from tests.cases import CASES, Case, args_of, runs
from tests.fuzz import fuzz, hypothesis, is_clear, st
from tests.test_ops import assert_near, in_fp64, outputs_and_grads

given, example = hypothesis.given, hypothesis.example
ERRORS = (ValueError, TypeError)
LAYOUTS = "dense", "offset", "spread", "turned"
ROWS = dict.fromkeys("T M S".split(), 40) | dict(q=20, lengths=20, sizes=300)  # largest of these sizes in a drawn shape
LARGEST = dict(torch=1 << 20, triton=1 << 14, cuda=1 << 14)  # elements of the arguments: the virtual GPU is slow


def relayout(x: Tensor, how: str) -> Tensor:
    """A copy of x with NaN around and between its elements; 0 where it holds integers, which may be offsets."""
    codes = x.detach().view(torch.uint8) if x.dtype == E4M3 else x.detach()
    filler = 127 if x.dtype == E4M3 else torch.nan if x.is_floating_point() else 0  # 127 is e4m3's NaN

    def filled(*shape):
        return torch.full(shape, filler, dtype=codes.dtype, device=x.device)

    if how == "offset":
        out = filled(x.numel() + 3)[3:].view(x.shape)
    elif how == "spread":
        out = filled(*(2 * n + 1 for n in x.shape))[tuple(slice(1, None, 2) for _ in x.shape)]
    elif how == "turned" and x.ndim:
        out = filled(*reversed(x.shape)).permute(*reversed(range(x.ndim)))
    else:
        return x
    out.copy_(codes)
    out = out.view(E4M3) if x.dtype == E4M3 else out
    return out.requires_grad_(x.requires_grad)


def map_tensors(args, change):
    """An argument list with change(tensor) for each tensor, also inside tuples such as a Plan or a cache."""
    if isinstance(args, Tensor):
        return change(args)
    if isinstance(args, tuple | list):
        parts = [map_tensors(a, change) for a in args]
        return type(args)(*parts) if hasattr(args, "_fields") else type(args)(parts)
    return args


def tensors_of(args) -> list[Tensor]:
    found = []
    map_tensors(args, found.append)
    return found


class Call:
    """An op's Case and arguments, and how they came about."""

    def __init__(self, case: Case, args: tuple, text: str):
        self.case, self.args, self.text = case, args, text

    def __repr__(self) -> str:
        return self.text

    def of(self, args: tuple, how: str) -> "Call":
        return Call(self.case, args, f"{self.text}; {how}")


@st.composite
def calls(draw, backend: str):
    """A shape of the table with other numbers of rows or other sizes."""
    case = draw(st.sampled_from([c for c in CASES if backend in ("torch", *c.backends)]))
    shape = dict(draw(st.sampled_from(case.shapes[:-1])))
    for name, value in shape.items():
        if name in ROWS and isinstance(value, int):
            shape[name] = draw(st.sampled_from([value, 0, 1]) | st.integers(2, ROWS[name]))
        elif name in ROWS and all(isinstance(n, int) for n in value):
            shape[name] = tuple(draw(st.lists(st.integers(0, ROWS[name]), max_size=4)))
        elif type(value) is int and draw(st.integers(0, 4)) == 0:
            shape[name] = draw(st.sampled_from([1, value + 1, max(value // 2, 1)]))
    if "k" in shape:  # keys of as many sequences as there are queries
        shape["k"] = (*shape["k"], *[1] * len(shape["q"]))[: len(shape["q"])]
    dtype = draw(st.sampled_from(case.dtypes))
    try:
        args = args_of(case, shape, dtype)
    except (ValueError, RuntimeError, IndexError, ZeroDivisionError):  # no such arguments can be made
        hypothesis.reject()
    hypothesis.assume(sum(t.numel() for t in tensors_of(args)) <= LARGEST[backend])
    return Call(case, tuple(args), f"{case.name} {shape} {dtype}")


def attempt(case: Case, args: tuple, backend: str) -> list[Tensor] | str:
    """An op's results and gradients, or the message of a clear error."""
    try:
        with warnings.catch_warnings(), force(backend):
            warnings.simplefilter("ignore")
            return outputs_and_grads(case, case.op, args)
    except ERRORS as error:
        assert is_clear(str(error)), str(error)
        return str(error)


def check_layouts(call: Call, changed: Call, backend: str) -> None:
    case, args = call.case, call.args
    got = attempt(case, changed.args, backend)
    if isinstance(got, str):
        assert isinstance(attempt(case, args, backend), str) or "contiguous" in got, got
        return
    near = outputs_and_grads(case, case.ref, args)
    true = outputs_and_grads(case, case.truth or case.ref, tuple(map(in_fp64, args)))
    assert_near(case, *without_bad_numbers(got, near, true))


def without_bad_numbers(got, near, true):
    """The results with 0 where the reference has NaN or inf; there the op must have one of them, too.

    NaN for inf is right enough: a kernel may split a product in parts of either sign.
    """
    results = [], [], []
    for three in zip(got, near, true, strict=True):
        if three[1].dtype == E4M3:  # compared as codes, of which NaN is two
            for result, x in zip(results, (x.to(E4M3).view(torch.uint8) for x in three), strict=True):
                result.append(x.masked_fill(x & 127 == 127, 127).view(E4M3))
            continue
        g, n, t = three
        bad = ~n.isfinite() if n.is_floating_point() else torch.zeros_like(n, dtype=torch.bool)
        assert g.shape == n.shape and not g[bad].isfinite().any()
        for result, x in zip(results, (g, n, t), strict=True):
            result.append(x.masked_fill(bad, 0))
    return results


@st.composite
def with_nan(draw, call):
    """A call with NaN or inf in one element of one of its arguments, half the time."""
    args = call.args
    wide = [t for t in tensors_of(args) if t.is_floating_point() and t.dtype != E4M3 and t.numel()]
    if not wide or draw(st.booleans()):
        return call
    chosen, value = draw(st.sampled_from(range(len(wide)))), draw(st.sampled_from([torch.nan, torch.inf, -torch.inf]))
    place = draw(st.integers(0, wide[chosen].numel() - 1))

    def change(x):
        if x is not wide[chosen]:
            return x
        out = x.detach().clone(memory_format=torch.contiguous_format)
        out.view(-1)[place] = value
        return out.requires_grad_(x.requires_grad)

    shape = list(wide[chosen].shape)
    return call.of(map_tensors(args, change), f"{value} at {place} of the {chosen}th wide tensor, {shape}")


@st.composite
def laid_out(draw, call):
    """A call whose arguments have the same values in other places."""
    layouts = [draw(st.sampled_from(LAYOUTS)) for _ in tensors_of(call.args)]
    remaining = iter(layouts)
    return call.of(map_tensors(call.args, lambda t: relayout(t, next(remaining))), " ".join(layouts))


@fuzz(250)
@given(st.data())
def test_layouts_of_the_reference(data):
    call = data.draw(calls("torch").flatmap(with_nan))
    check_layouts(call, data.draw(laid_out(call)), "torch")


@fuzz(120)
@given(st.data())
def test_layouts_of_triton(data):
    call = data.draw(calls("triton").flatmap(with_nan))
    check_layouts(call, data.draw(laid_out(call)), "triton")


@pytest.mark.skipif(not runs("cuda"), reason="csrc/ cannot run here")
@fuzz(60)
@given(st.data())
def test_layouts_of_cuda(data):
    call = data.draw(calls("cuda").flatmap(with_nan))
    check_layouts(call, data.draw(laid_out(call)), "cuda")


BACKENDS = [b for b in ("torch", "triton", "cuda") if runs(b)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int32, torch.int64, torch.bool, E4M3]


@st.composite
def wrong(draw, call):
    """A call of which one argument has another dtype, shape or value."""
    args = call.args
    # A Case's `defined` knows its results, of which a flag would make others.
    kept = bool if call.case.defined else ()
    at = draw(st.sampled_from([i for i, a in enumerate(args) if a is not None and not isinstance(a, kept)]))
    tensors = tensors_of(args[at])
    chosen = draw(st.integers(0, max(len(tensors) - 1, 0)))
    seen = iter(range(len(tensors)))
    new = draw(other(tensors[chosen]) if tensors else other_value(args[at]))
    if tensors:
        how = f"tensor {chosen} of argument {at} is {new.dtype}{list(new.shape)}"
        new = map_tensors(args[at], lambda t: new if next(seen) == chosen else t)
    else:
        how = f"argument {at} is {new}"
    return call.of((*args[:at], new, *args[at + 1 :]), how)


@st.composite
def other(draw, x: Tensor):
    """x in another dtype or shape; the gradient that is wanted of it stays."""
    wide = x.detach().float() if x.dtype == E4M3 else x.detach()
    how = draw(st.sampled_from(["dtype", "more", "fewer", "grow", "shrink", "turn", "one", "empty"]))
    dim = draw(st.integers(0, max(x.ndim - 1, 0)))
    if how == "dtype":
        out = wide.to(draw(st.sampled_from(DTYPES)))
    else:
        out = {
            "more": lambda: wide[None],
            "fewer": lambda: wide.flatten(0, 1) if x.ndim > 1 else wide.flatten()[:1].squeeze(),
            "grow": lambda: torch.cat([wide, wide], dim) if x.ndim else wide,
            "shrink": lambda: wide.narrow(dim, 0, x.shape[dim] // 2) if x.ndim else wide,
            "turn": lambda: wide.transpose(dim, -1) if x.ndim else wide,
            "one": lambda: wide.narrow(dim, 0, min(1, x.shape[dim])) if x.ndim else wide,
            "empty": lambda: wide.narrow(dim, 0, 0) if x.ndim else wide,
        }[how]().to(x.dtype)
    return out.requires_grad_(x.requires_grad and out.is_floating_point())


def other_value(value):
    if isinstance(value, bool):
        return st.just(not value)
    if isinstance(value, int):
        return st.sampled_from([0, 1, -1, 2, value + 1, 2**31])
    if isinstance(value, float):
        return st.sampled_from([0.0, 1.0, 1e-30, value / 2])
    return st.just(value)


@fuzz(250)
@given(st.data())
def test_wrong_arguments(data):
    """All backends accept or refuse the same arguments, and give the same results for those that they accept."""
    call = data.draw(calls("triton").flatmap(wrong))
    backends = [b for b in BACKENDS if b in ("torch", *call.case.backends)]
    results = [attempt(call.case, call.args, backend) for backend in backends]
    refused = [isinstance(r, str) for r in results]
    assert all(refused) or not any(refused), results
    for other_results in () if any(refused) else results[1:]:
        for one, other in zip(results[0], other_results, strict=True):
            assert one.shape == other.shape and one.dtype == other.dtype
            if one.element_size() > 1:
                torch.testing.assert_close(
                    one,
                    other,
                    rtol=3e-2,
                    atol=3e-2 * float(1 + one.float().abs().nan_to_num().max()) if one.numel() else 0,
                    equal_nan=True,
                )
