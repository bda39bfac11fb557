"""The device of a run: its choice, its precision, its peak FLOP/s, deterministic results."""

import os
import time
from contextlib import contextmanager

import torch

from ...backend import why_not_forced
from ...errors import InputError, counted
from ...gpu import find_gpu
from ...parallel.deep_ep import imported
from ...parallel.exchange import OVER_BUFFERS
from ...parallel.symmetric import expect_nvshmem
from ..settings import Settings


def choose_device(settings: Settings) -> tuple[torch.device, str, torch.dtype]:
    """Device, its name, and the precision of autocast (fp32: none)."""
    gpu = torch.cuda.is_available()
    if settings.device == "cuda" and not gpu:
        raise InputError("--device cuda: torch finds no GPU here; --device cpu or auto trains on the CPU")
    use = gpu and settings.device != "cpu"
    if reason := why_not_forced(torch.device("cuda" if use else "cpu")):
        raise InputError(reason)
    if settings.precision == "fp8" and use:
        refuse_without_fp8(
            torch.cuda.get_device_name(), torch.cuda.get_device_capability(), os.environ.get("LING_BACKEND")
        )
    # auto is bf16 on GPUs alone: most CPUs are slower in bf16 than in fp32
    bf16 = settings.precision in ("bf16", "fp8") or (settings.precision == "auto" and use)
    name = torch.cuda.get_device_name() if use else "CPU"
    return torch.device("cuda" if use else "cpu"), name, torch.bfloat16 if bf16 else torch.float32


def check_exchange(exchange: str, device: torch.device) -> None:
    """Raise InputError where the package or the GPUs of --exchange are missing."""
    if exchange not in OVER_BUFFERS:
        return
    try:
        imported() if exchange == "deepep" else expect_nvshmem()
    except InputError as error:
        raise InputError(f"--exchange {exchange}: {error}") from None
    if device.type != "cuda":
        raise InputError(f"--exchange {exchange} is for GPUs; --exchange bf16 works on CPUs too")


def refuse_without_fp8(gpu: str, capability: tuple[int, int], backend: str | None) -> None:
    """Raise InputError for a GPU whose tensor cores lack FP8, unless the torch references are forced."""
    if capability < (8, 9) and backend != "torch":
        raise InputError(
            f"--precision fp8: {gpu} has no FP8 (compute capability {'.'.join(map(str, capability))}, FP8 needs"
            " 8.9 or more); --precision bf16 trains on it, and LING_BACKEND=torch emulates FP8, slowly"
        )


@contextmanager
def deterministic():
    """Equal runs give equal bits. Otherwise sums into one row run in any order, also on a CPU's threads."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS reads it once, when it is first used
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    fill = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # it only helps to find bugs, and takes time
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        torch.utils.deterministic.fill_uninitialized_memory = fill


def peak_flops(device: torch.device, dtype: torch.dtype) -> tuple[float, str]:
    """Peak FLOP/s for the MFU, and its source: the data sheet for Hopper in bf16, otherwise a matrix product timed
    now."""
    if device.type == "cuda" and dtype == torch.bfloat16 and (gpu := find_gpu(torch.cuda.get_device_name(device))):
        return gpu.bf16, f"{gpu.name} bf16 dense"
    size, label = (8192, "") if device.type == "cuda" else (1024, f" with {counted(torch.get_num_threads(), 'thread')}")
    return measured_flops(device, dtype, size), f"measured{label}"


def measured_flops(device: torch.device, dtype: torch.dtype, size: int, repeats: int = 5) -> float:
    """FLOP/s of the fastest of `repeats` products [size, size] x [size, size]."""
    # Random data, since a GPU multiplies constants faster; an own generator, since the run's state must not change.
    g = torch.Generator(device).manual_seed(0)
    a, b = (torch.randn(size, size, generator=g, device=device, dtype=dtype) for _ in range(2))
    best = float("inf")
    for _ in range(repeats + 1):  # the first warms up and is never the fastest
        start = time.perf_counter()
        a @ b
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best
