"""The code that nvcc built from csrc/: no spills, no sums by floating-point atomics, and the intended instructions."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests import cuobjdump
from tests.tables import CUDA as COMMITTED
from tests.tables import MODULE, ROOT, SOURCES, cuda_table, stale_kernels, why_no_cuda_table

BUILD = ROOT / f"build/editable-{sys.implementation.cache_tag}"
needs_nvcc = pytest.mark.skipif(not (shutil.which("nvcc") and cuobjdump.tool()), reason="there is no nvcc or cuobjdump")

# All kernels move 16 bytes at a time, except these.
NARROW = "|".join([
    r"^zero_|^dispatch_|^balance_|^route_fwd_kernel<16,|^accept_tokens_",  # they move little
    r"(?:permute_\w+|gather_sum_kernel|scatter_rows_kernel)<\w+, 1, ",  # for rows that are not multiples of 16 bytes
])  # fmt: skip


# Kernels that overlap the preceding one touch no memory before they wait for it, except these.
EARLY = "|".join([
    "few_rows|^rms_norm_(router|linear)_",  # they read weights
    "^route_fwd_|^dispatch_place_",  # their input was complete before the preceding kernel, which zeroes counts, began
    r"^attention_bwd_",  # the lengths: the delta kernel ahead does not write them, and began after all others had ended
])  # fmt: skip


@pytest.fixture(scope="module")
def table() -> dict:
    if reason := why_no_cuda_table():
        pytest.skip(reason)
    return cuda_table()


@pytest.fixture
def kernels(table) -> list[dict]:
    return table["kernels"]


def test_the_committed_table_is_current(table):
    committed = json.loads(COMMITTED.read_text())
    if committed["cuda"] != table["cuda"]:
        pytest.skip(f"{COMMITTED.name} was made with nvcc {committed['cuda']}, here is {table['cuda']}")
    assert not stale_kernels(table, committed), f"{COMMITTED.relative_to(ROOT)} is out of date: make tables"


def test_nothing_spills_and_every_block_fits(kernels):
    for r in kernels:
        assert r["spilled"] == 0, f"registers spill: {r}"
        rounded = -(-r["registers"] // 8) * 8
        assert (r["threads"] or 1024) * rounded <= 65536, f"a block takes more registers than an SM has: {r}"


def test_no_sums_by_floating_point_atomics(kernels):
    assert not [r for r in kernels if r["float_atomics"]]


def test_products_run_on_tensor_cores_fed_by_tma(kernels):
    products = [r for r in kernels if re.search("gemm|wgrad", r["kernel"])]
    products = [r for r in products if not re.search("_few_rows_", r["kernel"])]
    assert products
    for r in products:
        wgmma = r["qgmma"] if "fp8" in r["kernel"] else r["hgmma"]
        assert wgmma and r["tma_loads"], f"no wgmma of its type or no UTMALDG: {r}"


def test_products_of_few_rows_run_on_tensor_cores(kernels):
    few = [r for r in kernels if re.search("few_rows|rms_norm_linear|moe_decode", r["kernel"])]
    assert few and all(r["mma"] and r["wide_loads"] for r in few), few


def test_global_memory_moves_16_bytes_at_a_time(kernels):
    for r in kernels:
        narrow = not (r["wide_loads"] or r["wide_stores"])
        assert not narrow or re.search(NARROW, r["kernel"]), f"only narrow loads and stores: {r}"


def test_kernels_that_overlap_wait_before_they_touch_memory(kernels):
    """The compiler may move a load through const __restrict__ to before the wait, whatever the source says."""
    overlapping = [r for r in kernels if r["waits"]]
    assert {r["kernel"].split("<")[0] for r in overlapping} >= {"moe_decode_kernel", "rms_norm_fwd_kernel"}
    for r in overlapping:
        assert not r["early"] or re.search(EARLY, r["kernel"]), f"global memory before griddepcontrol.wait: {r}"


def test_the_module_does_not_link_torch(kernels):
    symbols = subprocess.run(["nm", "-D", "--undefined-only", MODULE], capture_output=True, text=True).stdout
    assert "PyErr_Occurred" in symbols and not re.search(r"torch|c10|\baten\b|\bcu[A-Z]", symbols), symbols


def test_a_change_compiles_one_file_again(kernels):
    """By ninja's record of the files that were read for each object."""
    if not (BUILD / ".ninja_deps").exists():
        pytest.skip("there is no build folder")
    ninja = re.search(r"CMAKE_MAKE_PROGRAM:\w+=(.*)", (BUILD / "CMakeCache.txt").read_text())[1]
    output = subprocess.run([ninja, "-t", "deps"], cwd=BUILD, capture_output=True, text=True, check=True).stdout
    readers = {}
    for block in output.split("\n\n"):
        target, *files = block.split("\n")
        for file in files:
            readers.setdefault(Path(file.strip()), []).append(Path(target.split(":")[0]).name)
    for source in SOURCES:
        if source.suffix in (".cu", ".cpp") and source in readers:
            assert readers[source] == [f"{source.name}.o"]
    assert sorted(readers[ROOT / "csrc/norm/rms_norm.h"]) == ["bindings.cpp.o", "rms_norm.cu.o"]


@needs_nvcc
def test_faults_are_seen(tmp_path):
    """A kernel with spills, a sum by atomics and narrow loads."""
    source, cubin = tmp_path / "bad.cu", tmp_path / "bad.cubin"
    source.write_text("""
        __global__ void __launch_bounds__(1024) bad_kernel(const float* x, float* y) {
            float v[128];
            #pragma unroll
            for (int i = 0; i < 128; i++) v[i] = x[threadIdx.x + i * 4096];
            __syncthreads();
            #pragma unroll
            for (int i = 0; i < 128; i++) atomicAdd(y + i, v[i] * v[127 - i]);
        }
    """)
    subprocess.run(["nvcc", "-cubin", "-arch=sm_90", source, "-o", cubin], check=True)
    ((name, found),) = cuobjdump.resources(cubin).items()
    seen = cuobjdump.instructions(cuobjdump.code(cubin)[name])
    assert cuobjdump.names([name]) == ["bad_kernel"] and cuobjdump.threads(cubin) == {name: 1024}
    assert found["spilled"] > 0 and seen["float_atomics"] > 0
    assert seen["loads"] >= 128 and seen["wide_loads"] == 0


@needs_nvcc
def test_a_load_before_the_wait_is_seen(tmp_path):
    source, cubin = tmp_path / "early.cu", tmp_path / "early.cubin"
    source.write_text("""
        __global__ void early_kernel(const float* x, float* y) {
            const float before = x[threadIdx.x];
            asm volatile("griddepcontrol.wait;" ::: "memory");
            y[threadIdx.x] = before;
        }
        __global__ void late_kernel(const float* x, float* y) {
            asm volatile("griddepcontrol.wait;" ::: "memory");
            y[threadIdx.x] = x[threadIdx.x];
        }
    """)
    subprocess.run(["nvcc", "-cubin", "-arch=sm_90", source, "-o", cubin], check=True)
    seen = {cuobjdump.names([name])[0]: cuobjdump.instructions(code) for name, code in cuobjdump.code(cubin).items()}
    assert seen["early_kernel"]["waits"] == seen["late_kernel"]["waits"] == 1
    assert seen["early_kernel"]["early"] == 1 and seen["late_kernel"]["early"] == 0
