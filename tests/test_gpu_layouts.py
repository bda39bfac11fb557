"""Operands of wgmma in shared memory, in each layout of a descriptor, against CuTe's canonical layouts."""

import shutil

import pytest
import torch

if shutil.which("g++") is None:
    pytest.skip("the virtual GPU needs g++", allow_module_level=True)

from tests.test_gpu_machine import result, wgmma_kernel

LINE = 16, 128, 64, 32  # bytes, by swizzle
N = 128
# (are rows of the contraction, A's descriptor, B's): swizzle, leading and stride offset, and the way to the second step
LAYOUTS = {
    "128": (False, (1, 1, 64, 2), (1, 1, 64, 2)),
    "64": (False, (2, 1, 32, 2), (2, 1, 32, 2)),
    "32": (False, (3, 1, 16, 128), (3, 1, 16, 256)),
    "none": (False, (0, 8, 32, 16), (0, 8, 32, 16)),
    "none, chunks apart": (False, (0, 64, 8, 128), (0, 128, 8, 256)),
    "128, transposed": (True, (1, 256, 64, 128), (1, 256, 64, 128)),
    "64, transposed": (True, (2, 128, 32, 64), (2, 128, 32, 64)),
}  # fmt: skip
WRONG = {  # the right layout, and B's descriptor with another leading offset; words of the message, "": a wrong result
    "none": ("none", (0, 16, 32, 16), ""),
    "128, transposed": ("128, transposed", (1, 1, 64, 128), ""),
    "64, transposed": ("64, transposed", (2, 64, 32, 64), ""),
    "past the shared memory": ("128, transposed", (1, 0x3FFF, 64, 128), "an operand ends past the shared memory"),
}


def kernel(name: str, transposed: bool, a, b):
    return wgmma_kernel(name, f"m64n{N}k16.f32.bf16.bf16", N, flags=", 1, 1" if transposed else ", 0, 0", a=a, b=b)


KERNELS = {name: kernel(f"layout{i}", *layout) for i, (name, layout) in enumerate(LAYOUTS.items())}
WRONG_KERNELS = {
    name: kernel(f"leading{i}", *LAYOUTS[right][:2], b) for i, (name, (right, b, _)) in enumerate(WRONG.items())
}


def operand(x: torch.Tensor, rows: int, transposed: bool, descriptor) -> torch.Tensor:
    """x, as it lies in memory before it is swizzled -> [rows, 32 of K]; offsets in units of 8 elements."""
    swizzle, leading, stride, step = descriptor
    line, leading, stride, step = LINE[swizzle] // 2, 8 * leading, 8 * stride, 8 * step
    if transposed:  # lines along the rows; groups of 8 lines
        parts = x.as_strided((rows // line, line, 2, 2, 8), (leading, 1, step, stride, line))
    elif swizzle:
        parts = x.as_strided((rows // 8, 8, 2, 16), (stride, line, step, 1))
    else:  # chunks of 8 elements
        parts = x.as_strided((rows // 8, 8, 2, 2, 8), (stride, 8, step, leading, 1))
    return parts.reshape(rows, 32).float()


def memory() -> torch.Tensor:
    return torch.randn(64 + N, 64, generator=torch.Generator().manual_seed(3)).to(torch.bfloat16)


def product(name: str) -> torch.Tensor:
    transposed, a, b = LAYOUTS[name]
    x = memory().flatten()
    return operand(x, 64, transposed, a) @ operand(x[4096:].clone(), N, transposed, b).T


def run(kernel) -> torch.Tensor:
    return result(kernel(memory().view(torch.uint8), torch.zeros(128, N // 2), block=128), N)


@pytest.mark.parametrize("name", LAYOUTS)
def test_layout(name):
    torch.testing.assert_close(run(KERNELS[name]), product(name), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", WRONG)
def test_wrong_leading_offset(name):
    right, _, words = WRONG[name]
    if words:
        with pytest.raises(RuntimeError, match=words):
            run(WRONG_KERNELS[name])
    else:
        assert not torch.allclose(run(WRONG_KERNELS[name]), product(right), rtol=1e-2, atol=1e-2)
