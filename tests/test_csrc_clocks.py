"""The clocks of csrc/'s machine code (tests/sass) keep their budgets, and break no rule of wgmma."""

import json
import shutil
import subprocess

import pytest

from tests.pack import nvcc_release
from tests.sass.clocks import REGIONS, cuda_rows, differences, rows_of
from tests.sass.decode import kernels
from tests.tables import CUDA_CLOCKS, MODULE, ROOT, why_no_cuda_table
from tests.test_csrc_build import needs_nvcc


@pytest.fixture(scope="module")
def rows() -> list[dict]:
    if reason := why_no_cuda_table():
        pytest.skip(reason)
    return cuda_rows(MODULE)


def test_budgets_are_kept(rows):
    committed = json.loads(CUDA_CLOCKS.read_text())
    here = nvcc_release(shutil.which("nvcc"))
    if committed["cuda"] != here:
        pytest.skip(f"{CUDA_CLOCKS.name} was made with nvcc {committed['cuda']}, here is {here}")
    found = differences(rows, committed["rows"])
    assert not found, f"{CUDA_CLOCKS.relative_to(ROOT)}: if it is meant, make tables. {found}"


def test_every_region_is_found(rows):
    """The opcodes that mark regions still occur in the kernels they are meant for."""
    assert {row["part"] for row in rows} >= {region.name for region in REGIONS}


def test_nothing_spills_or_breaks_a_rule(rows):
    assert not [row for row in rows if row["spills"] or row.get("hazards")]


@needs_nvcc
def test_a_slow_loop_is_seen(tmp_path):
    """The same sum, with a division and a dependent load for each element, and without."""
    source = tmp_path / "sums.cu"
    source.write_text("""
        template <bool slow> __device__ float sum(const float* x, const int* order, int n) {
            float total = 0;
            for (int i = threadIdx.x; i < n; i += 32) total += slow ? x[order[i]] / x[i + 1] : x[i] * x[i + 1];
            return total;
        }
        __global__ void slow_kernel(const float* x, const int* order, float* y, int n) {
            y[threadIdx.x] = sum<true>(x, order, n);
        }
        __global__ void fast_kernel(const float* x, const int* order, float* y, int n) {
            y[threadIdx.x] = sum<false>(x, order, n);
        }
    """)
    cubin = source.with_suffix(".cubin")
    subprocess.run(["nvcc", "-cubin", "-arch=sm_90a", source, "-o", cubin], check=True)
    found = {name: rows_of(name, code) for name, code in kernels(cubin).items()}
    (slow, *slow_loops), (fast, *fast_loops) = (next(r for n, r in found.items() if k in n) for k in ("slow", "fast"))
    assert slow["call_sites"] > 0 == fast["call_sites"] and slow["branches"] > fast["branches"]
    assert slow["early"] > fast["early"] and slow["clocks"] > 1.5 * fast["clocks"]
    assert slow_loops and fast_loops and {row["spills"] for rows in found.values() for row in rows} == {0}
