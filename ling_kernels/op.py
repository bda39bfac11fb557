"""What every op file uses: `@op` makes a launcher visible to torch.compile, `expect` checks arguments, `wide` widens.

A launcher writes into tensors its caller allocated and returns nothing. Hence its schema names what it writes, its
fake kernel is empty, and one argument list serves Python, pybind11 and CUDA.
"""

import functools

import torch
from torch import Tensor
from torch._subclasses import FakeTensor
from torch.utils._python_dispatch import _get_current_dispatch_mode

E4M3 = torch.float8_e4m3fn


def op(*writes: str):
    """Declare `fn(...) -> None`, which writes its arguments `writes`, as torch.ops.ling.<fn>."""

    def declare(fn):
        registered = torch.library.custom_op(f"ling::{fn.__name__}", fn, mutates_args=writes)
        registered.register_fake(lambda *args: None)

        @functools.wraps(fn)
        def call(*args):
            # Compilers, fake tensors and selective checkpointing must see the op. Plain eager need not, and
            # would pay the dispatcher 30 us a call, more than many a kernel takes.
            watched = torch.compiler.is_compiling() or _get_current_dispatch_mode() is not None
            return (registered if watched else fn)(*args)

        call.registered = registered
        return call

    return declare


def wide(x: Tensor) -> Tensor:
    """x in the dtype references compute in: fp32, or fp64 when a test asks for the truth."""
    return x if x.dtype == torch.float64 else x.float()


def autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """The tensors in autocast's dtype where torch.autocast is on, as torch's own matrix products would take them."""
    device = tensors[0].device.type
    if not torch.is_autocast_enabled(device):
        return tensors
    return tuple(t.to(torch.get_autocast_dtype(device)) for t in tensors)


def expect(condition: bool, contract: str, *args) -> None:
    """Raise a ValueError that states the contract and what came instead."""
    if not condition:
        got = ", ".join(f"{a.dtype}{list(a.shape)}" if isinstance(a, Tensor) else repr(a) for a in args)
        raise ValueError(f"expected {contract}; got {got}".replace("torch.", ""))


def known(x: Tensor) -> bool:
    """Whether the host may look at x's values at no cost: x lies on a CPU, and nothing traces or fakes the call."""
    return x.device.type == "cpu" and not torch.compiler.is_compiling() and not isinstance(x, FakeTensor)


def round_up(n: int, multiple: int) -> int:
    return (n + multiple - 1) // multiple * multiple


@functools.cache
def multiprocessors(device: torch.device) -> int:
    """Of that GPU; a CPU, where kernels are only interpreted or built, stands for an H200."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 132
