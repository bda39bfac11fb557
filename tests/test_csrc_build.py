"""What nvcc made of csrc/: no spills, no sums by floating-point atomics, and the instructions that are meant."""

import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

from tests import cuobjdump

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks/results"
BUILT = ROOT / f"ling_kernels/_C{sysconfig.get_config_var('EXT_SUFFIX')}"
KEPT = ROOT / f"build/editable-{sys.implementation.cache_tag}"
SOURCES = [p for p in (ROOT / "csrc").rglob("*") if p.suffix in (".cu", ".cuh", ".cpp", ".h")]

# All kernels move 16 bytes at a time, but for these.
NARROW = "|".join([
    r"_setup_|^zero_|^dispatch_|^balance_|^route_fwd_kernel<16,",  # they move little
    r"permute_\w+<\w+, 1, ",  # for rows whose ends 16 bytes would not meet
])  # fmt: skip


# Kernels that overlap the one ahead touch no memory before they wait for it, but for these.
EARLY = "|".join([
    "few_rows|^rms_norm_router_",  # weights
    "^route_fwd_|^dispatch_place_",  # what was there before the kernel ahead, which zeroes counts, had begun
])  # fmt: skip


def not_here() -> str | None:
    if not BUILT.exists():
        return "csrc/ is not built in place" + ("" if shutil.which("nvcc") else ": there is no nvcc")
    newer = [p.name for p in SOURCES if p.stat().st_mtime > BUILT.stat().st_mtime]
    if newer:
        return f"csrc/ has changed since it was built: {', '.join(newer[:3])}"
    return None if cuobjdump.tool() and shutil.which("c++filt") else "there is no cuobjdump or no c++filt"


@pytest.fixture(scope="module")
def kernels() -> list[dict]:
    if not_here():
        pytest.skip(not_here())
    resources, threads, code = cuobjdump.resources(BUILT), cuobjdump.threads(BUILT), cuobjdump.code(BUILT)
    rows = [
        dict(kernel=name, threads=threads.get(mangled), **resources[mangled], **instructions(code[mangled]))
        for mangled, name in zip(code, cuobjdump.names([*code]), strict=True)
    ]
    rows.sort(key=lambda r: r["kernel"])
    RESULTS.mkdir(parents=True, exist_ok=True)
    nvcc = re.search(r"release ([\d.]+)", subprocess.run(["nvcc", "--version"], capture_output=True, text=True).stdout)
    table = dict(cuda=nvcc and nvcc[1], kernels=rows)
    (RESULTS / "resources_cuda.json").write_text(json.dumps(table, indent=1) + "\n")
    (ROOT / "docs/kernels-resources-cuda.md").write_text(markdown(table))
    return rows


MEMORY = r"\b(?:LDG|LDGSTS|LD|STG|ST|ATOM|ATOMG|RED|UTMALDG|UTMASTG|UBLKCP)(?:\.\S+)?\s"


def instructions(code: str) -> dict[str, int]:
    def count(pattern):
        return len(re.findall(rf"\b(?:{pattern})", code))

    return dict(
        qgmma=count("QGMMA"), hgmma=count("HGMMA"), mma=count("HMMA"),
        tma_loads=count("UTMALDG"), tma_stores=count("UTMASTG"),
        wide_loads=count(r"LDG\.\S*128|LDGSTS\.\S*128|UTMALDG|UBLKCP"), loads=count(r"LDG|UTMALDG|UBLKCP"),
        wide_stores=count(r"STG\.\S*128|UTMASTG"), stores=count("STG|UTMASTG"),
        float_atomics=count(r"(?:RED|ATOM)\w*\.\S*(?:F16|BF16|F32|F64)"),
        waits=count("ACQBULK"), early=len(re.findall(MEMORY, code.split("ACQBULK")[0])),
    )  # fmt: skip


def markdown(table: dict) -> str:
    lines = [
        "# What the CUDA kernels take on Hopper",
        "",
        f"Made by `tests/test_csrc_build.py` from what nvcc {table['cuda']} built for sm_90a, without a GPU: registers",
        "a thread, static shared memory a block, and how many of the instructions that move global memory move 16",
        "bytes a thread or a whole tile (TMA). None spills, none adds floating-point numbers by atomics.",
        "",
        "| kernel | threads | registers | shared | wide loads | wide stores | wgmma | TMA loads |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for r in table["kernels"]:
        cells = (
            f"`{r['kernel']}`", r["threads"] or "", r["registers"], f"{r['shared'] / 1024:.1f} KB",
            f"{r['wide_loads']} of {r['loads']}", f"{r['wide_stores']} of {r['stores']}",
            r["qgmma"] + r["hgmma"] or "", r["tma_loads"] or "",
        )  # fmt: skip
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines) + "\n"


def test_nothing_spills_and_every_block_fits(kernels):
    for r in kernels:
        assert r["spilled"] == 0, f"registers spill: {r}"
        rounded = -(-r["registers"] // 8) * 8
        assert (r["threads"] or 1024) * rounded <= 65536, f"a block takes more registers than an SM has: {r}"


def test_no_sums_by_floating_point_atomics(kernels):
    assert not [r for r in kernels if r["float_atomics"]]


def test_products_run_on_tensor_cores_fed_by_tma(kernels):
    products = [r for r in kernels if re.search("gemm|wgrad", r["kernel"])]
    products = [r for r in products if not re.search("_setup_|_few_rows_", r["kernel"])]
    assert products
    for r in products:
        wgmma = r["qgmma"] if "fp8" in r["kernel"] else r["hgmma"]
        assert wgmma and r["tma_loads"], f"no wgmma of its type or no UTMALDG: {r}"


def test_products_of_few_rows_run_on_tensor_cores(kernels):
    few = [r for r in kernels if re.search("few_rows|moe_decode", r["kernel"])]
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


def test_the_module_knows_nothing_of_torch(kernels):
    symbols = subprocess.run(["nm", "-D", "--undefined-only", BUILT], capture_output=True, text=True).stdout
    assert "PyErr_Occurred" in symbols and not re.search(r"torch|c10|\baten\b|\bcu[A-Z]", symbols), symbols


def test_a_change_compiles_one_file_again(kernels):
    """What ninja noted of each object: the files that were read for it."""
    if not (KEPT / ".ninja_deps").exists():
        pytest.skip("the build's folder is not here")
    ninja = re.search(r"CMAKE_MAKE_PROGRAM:\w+=(.*)", (KEPT / "CMakeCache.txt").read_text())[1]
    said = subprocess.run([ninja, "-t", "deps"], cwd=KEPT, capture_output=True, text=True, check=True).stdout
    readers = {}
    for block in said.split("\n\n"):
        made, *read = block.split("\n")
        for file in read:
            readers.setdefault(Path(file.strip()), []).append(Path(made.split(":")[0]).name)
    for source in SOURCES:
        if source.suffix in (".cu", ".cpp") and source in readers:
            assert readers[source] == [f"{source.name}.o"]
    assert sorted(readers[ROOT / "csrc/norm/rms_norm.h"]) == ["bindings.cpp.o", "rms_norm.cu.o"]


def test_memory_bounds_how_many_compile_at_once(kernels):
    """Pool `cutlass` of build.ninja; 4 GB for each of its files."""
    if not (KEPT / "build.ninja").exists():
        pytest.skip("the build's folder is not here")
    rules = (KEPT / "CMakeFiles/rules.ninja").read_text()
    depth = re.search(r"^pool cutlass\n\s+depth = (\d+)", rules, re.M)
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    assert depth and 1 <= int(depth[1]) <= max(1, memory / 8e9)
    if "-DLING_CUTLASS" in (KEPT / "build.ninja").read_text():
        files = len([*(ROOT / "csrc").rglob("cutlass/*.cu")])
        assert (KEPT / "build.ninja").read_text().count("pool = cutlass\n") == files


@pytest.mark.skipif(not (shutil.which("nvcc") and cuobjdump.tool()), reason="there is no nvcc or no cuobjdump")
def test_the_measures_see_what_is_wrong(tmp_path):
    """Spills, a sum by atomics and narrow loads, made on purpose."""
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
    seen = instructions(cuobjdump.code(cubin)[name])
    assert cuobjdump.names([name]) == ["bad_kernel"] and cuobjdump.threads(cubin) == {name: 1024}
    assert found["spilled"] > 0 and seen["float_atomics"] > 0
    assert seen["loads"] >= 128 and seen["wide_loads"] == 0


@pytest.mark.skipif(not (shutil.which("nvcc") and cuobjdump.tool()), reason="there is no nvcc or no cuobjdump")
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
    seen = {cuobjdump.names([name])[0]: instructions(code) for name, code in cuobjdump.code(cubin).items()}
    assert seen["early_kernel"]["waits"] == seen["late_kernel"]["waits"] == 1
    assert seen["early_kernel"]["early"] == 1 and seen["late_kernel"]["early"] == 0


def test_few_files_instantiate_cutlass():
    """Each takes a minute or two and 4 GB to compile."""
    files = [*(ROOT / "csrc").rglob("cutlass/*.cu")]
    assert 0 < len(files) <= 6
    for file in files:
        assert file.read_text().count("struct ") == 1, f"more than one instantiation in {file.name}"
