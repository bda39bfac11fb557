"""Peak rates and memory of Hopper GPUs, from their data sheets."""

from typing import NamedTuple


class Gpu(NamedTuple):
    name: str  # as the driver reports it, without vendor, memory size and socket
    memory: float  # bytes
    bandwidth: float  # bytes/s
    bf16: float  # dense FLOP/s
    fp8: float  # dense FLOP/s
    sms: int
    clock: float  # boost, Hz

    def rate(self, precision: str) -> float:
        """Peak dense FLOP/s of "fp8", or of "bf16"."""
        return self.fp8 if precision == "fp8" else self.bf16


# H20: 296 / 148 TFLOPS and 4 TB/s, as Ant Group publishes them with its SGLang deployment.
HOPPER = {
    gpu.name: gpu
    for gpu in (
        Gpu("H20", 96e9, 4.0e12, 148e12, 296e12, 78, 1.98e9),
        Gpu("H100", 80e9, 3.35e12, 989.4e12, 1978.9e12, 132, 1.98e9),
        Gpu("H200", 141e9, 4.8e12, 989.4e12, 1978.9e12, 132, 1.98e9),
    )
}
# PCIe cards and export models. The H20-3e is an H20 with the H200's memory.
VARIANTS = (
    Gpu("H100 PCIe", 80e9, 2.0e12, 756e12, 1513e12, 114, 1.755e9),
    Gpu("H100 NVL", 94e9, 3.9e12, 835.5e12, 1671e12, 132, 1.785e9),
    Gpu("H200 NVL", 141e9, 4.8e12, 835.5e12, 1671e12, 132, 1.785e9),
    HOPPER["H100"]._replace(name="H800"),
    Gpu("H800 PCIe", 80e9, 2.0e12, 756e12, 1513e12, 114, 1.755e9),
    HOPPER["H20"]._replace(name="H20-3e", memory=141e9, bandwidth=4.8e12),
)
NEUTRAL = {"NVIDIA", "SXM5", "HBM2e", "HBM3", "HBM3e"}  # words of a driver's name that do not distinguish models


def find_gpu(name: str) -> Gpu | None:
    """The GPU that a driver calls e.g. "NVIDIA H100 80GB HBM3"; None for another one, or for a part of one (MIG).

    Every word must match, so that an unlisted model ("H100 64GB") does not get another model's rates.
    """
    words = {*name.split()} - NEUTRAL
    for gpu in (*HOPPER.values(), *VARIANTS):
        if words - {f"{gpu.memory / 1e9:.0f}GB"} == {*gpu.name.split()}:
            return gpu
    return None
