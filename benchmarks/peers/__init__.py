"""Others' implementations of our ops, each behind an optional import, on the layout that it wants.

A function of PEERS takes a Case's arguments and returns a call without arguments, which alone is timed; where the
peer's result is laid out otherwise than ours, it also returns `alike(theirs, ours)`, two tensors that should agree.
Names and argument orders are those of each package's own source; tests/test_bench_peers.py calls the functions with
stand-ins of these signatures. A peer that is absent, has another signature, refuses the shape or computes something
else is listed with what it says, and its time does not count.
"""

import importlib
import importlib.metadata
import inspect
from collections.abc import Callable

import torch
from torch import Tensor

PEERS: dict[str, dict[str, Callable]] = {}  # op -> peer -> function
# Peer -> what is imported for it. The one here is bench_model.py's, which times whole layers.
PACKAGES = {"transformers' eager MoE layer": "transformers"}
WRONG = 0.1  # relative: far above what rounding to FP8 does, far below what a layout misread does


def peer(op: str, name: str, package: str = "torch"):
    def declare(fn):
        PEERS.setdefault(op, {})[name] = fn
        PACKAGES[name] = package
        return fn

    return declare


def absent(package: str) -> str | None:
    """Why it cannot be imported, or None."""
    try:
        importlib.import_module(package)
    except Exception as error:  # a package built for another torch raises what it likes
        return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
    return None


def inventory() -> dict[str, str]:
    """Every peer's package: its version, or why it is not here."""
    return {package: absent(package) or version(package) for package in sorted({*PACKAGES.values()})}


def version(package: str) -> str:
    top = package.split(".")[0]
    names = importlib.metadata.packages_distributions().get(top, [top])
    try:
        return importlib.metadata.version(names[0])
    except importlib.metadata.PackageNotFoundError:
        return "unknown version"


def of(case) -> list[str]:
    """Peers of a Case: torch.compile, and those of its op."""
    return ["torch.compile", *PEERS.get(case.op.__name__, {})]


def prepare(name: str, case, args) -> tuple[Callable, Callable]:
    """What is timed, and `alike`. Raises whatever the peer raises."""
    if name == "torch.compile":
        reference = inspect.unwrap(case.ref)
        only(reference is not inspect.unwrap(case.op), "other reference to compile than the op itself")
        torch._dynamo.reset()
        compiled = torch.compile(reference)
        return lambda: compiled(*args, **case.kwargs), firsts
    if reason := absent(PACKAGES[name]):
        raise ImportError(reason)
    call = PEERS[case.op.__name__][name](*args, **case.kwargs)
    return call if isinstance(call, tuple) else (call, firsts)


def error(theirs, ours, alike: Callable) -> float:
    """Of all elements together, relative to our result's size. Raises ValueError where that is no rounding."""
    got, want = alike(theirs, ours)
    if got.shape != want.shape:
        raise ValueError(f"its result is {[*got.shape]}, ours {[*want.shape]}")
    got, want = got.double(), want.double()
    off = ((got - want).norm() / want.norm().clamp(min=1e-30)).item()
    if not off <= WRONG:
        raise ValueError(f"its result differs from the reference's by {off:.1e}")
    return off


def first(out) -> Tensor:
    return out if isinstance(out, Tensor) else first(out[0])


def firsts(theirs, ours) -> tuple[Tensor, Tensor]:
    return first(theirs), first(ours)


def only(condition, what: str) -> None:
    """A peer that lacks a variant says so."""
    if not condition:
        raise NotImplementedError(f"it has no {what}")


from . import attention, products, routing, rows  # noqa: E402, F401  each declares its peers
