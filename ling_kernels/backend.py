"""Which implementation runs: `torch` is the reference, `triton` and `cuda` (csrc/, built as _C) are the kernels."""

import functools
import os
import warnings
from contextlib import contextmanager

import torch
from torch import Tensor

try:
    from . import _C
except ImportError as error:  # built with LING_CUDA=0, or a _C for another machine
    _C, _C_error = None, error

_forced = os.environ.get("LING_BACKEND")
if _forced not in (None, "torch", "triton", "cuda"):
    raise ValueError(f"LING_BACKEND is torch, triton or cuda, not {_forced!r}")


def backend(x: Tensor) -> str:
    """The implementation for x: what LING_BACKEND says, else `torch` on a CPU, `cuda` on Hopper, `triton` elsewhere."""
    if _forced:
        return _forced
    if not x.is_cuda:
        return "torch"
    return "triton" if why_no_cuda(x.device.index) else "cuda"


@functools.cache
def why_no_cuda(device: int) -> str | None:
    """None where _C's kernels run on that GPU; otherwise the reason, which is also given once as a warning."""
    major, minor = torch.cuda.get_device_capability(device)
    if _C is None:
        reason = f"ling_kernels._C is not there ({_C_error})"
    elif major != 9:
        reason = f"its kernels are built for sm_90a and this GPU is sm_{major}{minor}"
    else:
        return None
    warnings.warn(f"backend cuda is off: {reason}; Triton serves", stacklevel=2)
    return reason


@contextmanager
def force(name: str):
    """Tests and benchmarks compare implementations with this; nothing else should."""
    global _forced
    _forced, before = name, _forced
    try:
        yield
    finally:
        _forced = before
