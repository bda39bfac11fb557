"""Which implementation runs: `torch` is the reference, `triton` and `cuda` (csrc/, built as _C) are the kernels."""

import importlib.util
import os
import warnings
from contextlib import contextmanager

import torch
from torch import Tensor

from .errors import InputError

_C_missing = None
try:
    from . import _C  # type: ignore[attr-defined]
except ImportError as error:
    _C, _C_missing = None, f"ling_kernels._C does not load: {error}"
    if importlib.util.find_spec(f"{__package__}._C") is None:
        _C_missing = "ling_kernels._C is not built: there was no nvcc on PATH, or LING_CUDA=0"

BACKENDS = ("torch", "triton", "cuda")
EXPECTS_C = __package__ == "ling_kernels"  # the Hub kernel has the Triton half of these files alone

_forced = os.environ.get("LING_BACKEND") or None
_strict = _forced is not None
_misuse = None  # what is wrong with LING_BACKEND; raised at the first use, so that a command can report it
if _forced not in (None, *BACKENDS):
    _misuse = f"LING_BACKEND is one of {', '.join(BACKENDS)}; not {_forced!r}"
if _forced == "cuda" and _C is None:
    _misuse = f"LING_BACKEND is cuda, but {_C_missing}"


def backend(x: Tensor) -> str:
    """The implementation for x: what LING_BACKEND says, else `torch` on a CPU, `cuda` on Hopper, `triton` elsewhere."""
    if _forced:
        if _strict:
            check_forced()
        return _forced
    return kernels_on(x.device.index) if x.is_cuda else "torch"


def kernels_on(device: int) -> str:
    """The default on that GPU, looked up once. Where one would expect `cuda`, a warning says why it is not.

    Without Triton it is `torch`, with a warning.
    """
    if device not in _kernels_on:
        reason, no_triton = why_not("cuda", device), why_not("triton", device)
        _kernels_on[device] = "cuda" if reason is None else "torch" if no_triton else "triton"
        if reason and no_triton:
            warnings.warn(f"no kernel runs: {no_triton}, and {reason}; the torch references run", stacklevel=3)
        elif reason and EXPECTS_C and (_C is not None or torch.cuda.get_device_properties(device).major == 9):
            warnings.warn(f"backend cuda is off: {reason}; Triton runs", stacklevel=3)
    return _kernels_on[device]


_kernels_on = {}
# torch.compile takes the answer and does not look inside. torch.compiler.assume_constant_result sets the same mark,
# but imports the compiler to do so, which takes a second.
kernels_on._dynamo_marked_constant = True  # type: ignore[attr-defined]


def why_not(name: str, device: int) -> str | None:
    """None where backend `name` runs on that GPU, otherwise the reason in one line."""
    if name == "triton" and importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if name != "cuda":
        return None
    if _C is None:
        return _C_missing
    gpu = torch.cuda.get_device_properties(device)
    if (gpu.major, gpu.minor) != (9, 0):
        return f"its kernels are built for sm_90a, and this GPU is sm_{gpu.major}{gpu.minor}"
    try:
        _C.device_count()
    except RuntimeError as error:  # a driver older than the CUDA that _C was built with
        return str(error)
    return None


def check_forced() -> None:
    """Raise InputError where LING_BACKEND names no backend, or one that is not built."""
    if _misuse:
        raise InputError(_misuse)


def why_not_forced(device: torch.device) -> str | None:
    """Why the kernels that LING_BACKEND asks for cannot run on a device; None where they can, or nothing is asked."""
    if not _strict or _forced == "torch":
        return None
    reason: str | None = "its kernels need a GPU, and this is the CPU"
    if device.type == "cuda":
        reason = why_not(_forced, device.index or 0)
    elif _forced == "triton" and os.environ.get("TRITON_INTERPRET") == "1":
        reason = None
    return reason and f"LING_BACKEND is {_forced}, but {reason}"


def forced() -> str | None:
    """The backend that LING_BACKEND names."""
    return _forced


def strict() -> bool:
    """Whether LING_BACKEND=cuda asked for csrc/ alone: arguments that it does not support raise."""
    return _strict and _forced == "cuda"


def why_not_cuda(x: Tensor) -> str | None:
    """Why the backend for x is not cuda, in one line; None where it is."""
    if _forced:
        return None if _forced == "cuda" else f"LING_BACKEND is {_forced}"
    return why_not("cuda", x.device.index) if x.is_cuda else "the tensors are on the CPU"


@contextmanager
def force(name: str):
    """Prefer backend `name`, for tests and benchmarks that compare implementations and for plans of a GPU's memory.

    Unlike LING_BACKEND=cuda, arguments that csrc/ does not support fall back to Triton.
    """
    global _forced, _strict
    before = _forced, _strict
    _forced, _strict = name, False
    try:
        yield
    finally:
        _forced, _strict = before
