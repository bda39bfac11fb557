"""How fast a device can multiply, for the MFU: model FLOPs done per second over the device's peak."""

import time

import torch

from ..gpu import named


def peak_flops(device: torch.device, dtype: torch.dtype) -> tuple[float, str]:
    """Peak FLOP/s and where the number is from: a data sheet for Hopper in bf16, else a matrix product measured now."""
    if device.type == "cuda" and dtype == torch.bfloat16 and (gpu := named(torch.cuda.get_device_name(device))):
        return gpu.bf16, f"{gpu.name} bf16 dense"
    size, label = (8192, "GPU") if device.type == "cuda" else (1024, f"{torch.get_num_threads()} CPU threads")
    return measured_flops(device, dtype, size), f"measured, {label}, {str(dtype)[6:]}"


def measured_flops(device: torch.device, dtype: torch.dtype, size: int, repeats: int = 5) -> float:
    g = torch.Generator(device).manual_seed(0)  # random: a GPU multiplies ones faster; its own: the run's must not move
    a, b = (torch.randn(size, size, generator=g, device=device, dtype=dtype) for _ in range(2))
    best = float("inf")
    for _ in range(repeats + 1):  # the first one warms up, and never is the best
        start = time.perf_counter()
        a @ b
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best
