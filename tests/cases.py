"""Every op once: how to call it, on what, and what is expected of it. Tests and benchmarks both read this table."""

import os
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import product

import pytest
import torch
from torch import Tensor

from ling_kernels.backend import _C
from ling_kernels.ops.rms_norm import rms_norm, rms_norm_ref
from ling_kernels.ops.route import route, route_ref

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BF16, FP32 = torch.bfloat16, torch.float32


class Rand:
    """Random tensors for one Case in its dtype; what a call returns is a leaf of autograd."""

    def __init__(self, dtype: torch.dtype, seed: int = 0):
        self.dtype, self.g = dtype, torch.Generator(DEVICE).manual_seed(seed)

    def __call__(self, *shape, dtype=None) -> Tensor:
        return torch.randn(*shape, generator=self.g, device=DEVICE).to(dtype or self.dtype).requires_grad_()

    def fp32(self, *shape) -> Tensor:
        return self(*shape, dtype=torch.float32)

    def data(self, *shape, dtype=None) -> Tensor:
        """The same without a gradient."""
        return self(*shape, dtype=dtype).detach()

    def ints(self, low: int, high: int, *shape, dtype=torch.int32) -> Tensor:
        return torch.randint(low, high, shape, generator=self.g, device=DEVICE).to(dtype)

    def bools(self, *shape, p=0.5) -> Tensor:
        return torch.rand(*shape, generator=self.g, device=DEVICE) < p


@dataclass(frozen=True)
class Case:
    op: Callable  # the public function
    ref: Callable  # same arguments, same results, plain torch
    make: Callable  # make(rand, **shape) -> arguments; scalars large enough to be missed if dropped
    shapes: list  # the last one is the benchmark shape and no test's
    dtypes: tuple = (BF16, FP32)
    backends: tuple = ("torch",)
    kwargs: dict = field(default_factory=dict)  # further arguments by name; part of the test's id
    truth: Callable = None  # what a quantised result approximates; otherwise ref itself, in fp64
    exact: bool | tuple = False  # outputs that equal the reference's bit for bit: all, or these indices
    defined: Callable = None  # outputs -> outputs with what the contract leaves undefined cut away
    flops: Callable = None  # flops(**shape); None: the op is memory bound

    @property
    def name(self) -> str:
        return "-".join([self.op.__name__, *(k if v is True else f"{k}={v}" for k, v in self.kwargs.items())])


CASES = [
    Case(
        rms_norm, rms_norm_ref,
        lambda rand, M, N: (rand(M, N), rand(N), None, 0.1),
        [dict(M=0, N=128), dict(M=1, N=128), dict(M=37, N=576), dict(M=64, N=2048), dict(M=16384, N=2048)],
        backends=("torch", "triton", "cuda"),
    ),
    Case(
        rms_norm, rms_norm_ref,
        lambda rand, M, N: (rand(M, N), rand(N), rand(M, N), 0.1),
        [dict(M=0, N=128), dict(M=37, N=512), dict(M=16384, N=2048)],
        kwargs=dict(round_first=True),
    ),
    Case(
        rms_norm, rms_norm_ref,
        lambda rand, M, N: (rand(M, N), rand(N), rand(M, N), 0.1),
        [dict(M=0, N=128), dict(M=37, N=512), dict(M=16384, N=2048)],
        kwargs=dict(quantize=True, columns=True),
    ),
    Case(
        route, route_ref,
        lambda rand, T, E, groups=8, masked=False: (
            rand.fp32(T, E), rand.data(E, dtype=FP32) / 10, rand.bools(T) if masked else None, groups,
        ),
        [dict(T=0, E=256), dict(T=1, E=256), dict(T=67, E=256), dict(T=67, E=256, masked=True),
         dict(T=5, E=64, groups=4), dict(T=8192, E=256)],
        dtypes=(FP32,), kwargs=dict(z_loss=0.5),
    ),
]  # fmt: skip


def args_of(case, shape, dtype):
    return case.make(Rand(dtype), **shape)


def runs(backend: str) -> bool:
    gpu = torch.cuda.is_available()
    interpreter = "TRITON_INTERPRET" in os.environ
    return {"torch": True, "triton": gpu or interpreter, "cuda": _C is not None}[backend]


def sweep(bench: bool = False):
    """pytest parameters (case, shape, dtype, backend) with readable ids; a backend this machine lacks is skipped."""
    return [
        pytest.param(
            c, s, d, b,
            id="-".join([c.name, *(f"{k}{v}" for k, v in s.items()), str(d)[6:], b]),
            marks=() if runs(b) else pytest.mark.skip(f"{b} cannot run here"),
        )
        for c in CASES
        for s, d, b in (
            product(c.shapes[-1:], c.dtypes[:1], dict.fromkeys(["torch", *c.backends])) if bench
            else product(c.shapes[:-1], c.dtypes, c.backends)
        )
    ]  # fmt: skip
