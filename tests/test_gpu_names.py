"""Data sheet rates by the names that drivers report."""

import pytest

from ling_kernels.gpu import find_gpu


@pytest.mark.parametrize("name, gpu, memory, bandwidth, bf16", [
    ("NVIDIA H100 80GB HBM3", "H100", 80, 3.35, 989.4),
    ("NVIDIA H100 PCIe", "H100 PCIe", 80, 2.0, 756),
    ("NVIDIA H100 NVL", "H100 NVL", 94, 3.9, 835.5),
    ("NVIDIA H200", "H200", 141, 4.8, 989.4),
    ("NVIDIA H200 NVL", "H200 NVL", 141, 4.8, 835.5),
    ("NVIDIA H800", "H800", 80, 3.35, 989.4),
    ("NVIDIA H800 PCIe", "H800 PCIe", 80, 2.0, 756),
    ("NVIDIA H20", "H20", 96, 4.0, 148),
    ("NVIDIA H20-3e", "H20-3e", 141, 4.8, 148),
])  # fmt: skip
def test_known_gpus(name, gpu, memory, bandwidth, bf16):
    found = find_gpu(name)
    assert found.name == gpu
    assert (found.memory / 1e9, found.bandwidth / 1e12, found.bf16 / 1e12) == pytest.approx((memory, bandwidth, bf16))
    assert found.rate("bf16") == found.bf16 and found.rate("fp8") == found.fp8 == pytest.approx(
        2 * found.bf16, rel=2e-3
    )


@pytest.mark.parametrize("name", [
    "", "Tesla T4", "NVIDIA GH200 480GB", "NVIDIA H100 64GB HBM2", "NVIDIA H100 80GB HBM3 MIG 1g.10gb",
    "NVIDIA H200 XYZ", "NVIDIA H20 80GB",
])  # fmt: skip
def test_other_gpus_have_no_rates(name):
    assert find_gpu(name) is None
