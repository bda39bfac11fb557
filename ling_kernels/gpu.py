"""What Hopper GPUs have and can do at most, by their data sheets."""

from typing import NamedTuple


class Gpu(NamedTuple):
    name: str
    memory: float  # bytes
    bandwidth: float  # bytes/s
    bf16: float  # dense FLOP/s
    fp8: float
    sms: int
    clock: float  # boost, Hz

    def rate(self, precision: str) -> float:
        return self.fp8 if precision == "fp8" else self.bf16


# The H20's are as Ant Group publishes them beside its SGLang deployment (296 / 148 TFLOPS, 4 TB/s).
HOPPER = {
    gpu.name: gpu
    for gpu in (
        Gpu("H20", 96e9, 4.0e12, 148e12, 296e12, 78, 1.98e9),
        Gpu("H100", 80e9, 3.35e12, 989.4e12, 1978.9e12, 132, 1.98e9),
        Gpu("H200", 141e9, 4.8e12, 989.4e12, 1978.9e12, 132, 1.98e9),
    )
}
VARIANTS = (
    Gpu("H100 PCIe", 80e9, 2.0e12, 756e12, 1513e12, 114, 1.755e9),
    HOPPER["H100"]._replace(name="H800"),
)


def named(name: str) -> Gpu | None:
    """The one that a driver means by names like "NVIDIA H100 80GB HBM3"; None where it is none of these."""
    words = name.replace("-", " ").split()
    return next((gpu for gpu in (*VARIANTS, *HOPPER.values()) if all(w in words for w in gpu.name.split())), None)
