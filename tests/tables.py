"""python -m tests.tables: write the tables of registers, shared memory and instructions of every kernel (make tables).

    benchmarks/results/resources.json, docs/kernels-resources.md              Triton's kernels, built for sm_90
    benchmarks/results/resources_cuda.json, docs/kernels-resources-cuda.md    csrc/, from the module _C built in place
    benchmarks/results/clocks.json, clocks_cuda.json, docs/kernels-clocks.md  both, by tests/sass: a walk of the code
    docs/kernels-predicted.md                                                 what follows from it, against others
    benchmarks/results/counters.json, docs/kernels-counters.md                csrc/, by benchmarks.profile

No GPU is needed. test_compiles_for_hopper.py, test_csrc_build.py, test_csrc_clocks.py and test_gpu_counters.py compare
the files with fresh tables.
"""

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

from tests import cuobjdump
from tests.gpu import build, counters_page
from tests.pack import nvcc_release
from tests.sass import clocks, page, predict

ROOT = Path(__file__).parents[1]
RESULTS, DOCS = ROOT / "benchmarks/results", ROOT / "docs"
TRITON, CUDA = RESULTS / "resources.json", RESULTS / "resources_cuda.json"
TRITON_CLOCKS, CUDA_CLOCKS = RESULTS / "clocks.json", RESULTS / "clocks_cuda.json"
CLOCKS, PREDICTED = DOCS / "kernels-clocks.md", DOCS / "kernels-predicted.md"
COUNTERS, COUNTERS_PAGE = RESULTS / "counters.json", DOCS / "kernels-counters.md"
MODULE = ROOT / f"ling_kernels/_C{sysconfig.get_config_var('EXT_SUFFIX')}"
SOURCES = [p for p in (ROOT / "csrc").rglob("*") if p.suffix in (".cu", ".cuh", ".cpp", ".h")]


def triton_table(packages: Path | None = None) -> dict:
    """The table of tests/hopper.py, made with the installed Triton or with that in the folder `packages`.

    Its "rows" are those of docs/kernels-clocks.md.
    """
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    env["PYTHONPATH"] = os.pathsep.join(map(str, filter(None, [packages, ROOT])))
    with tempfile.TemporaryDirectory() as tmp:
        out = Path(tmp) / "resources.json"
        subprocess.run([sys.executable, "-m", "tests.hopper", out], check=True, env=env, cwd=ROOT)
        table = json.loads(out.read_text())
    return table | dict(rows=clocks.triton_rows(table))


def triton_page(table: dict) -> str:
    lines = [
        "# Resources of the Triton kernels on Hopper",
        "",
        f"Made by `make tables` with Triton {table['triton']} for sm_90, without a GPU: registers a thread, shared",
        "memory a block, and the number of wgmma and TMA instructions. None spills, none adds floating-point numbers",
        "by atomics. Shapes are Ling's real sizes; tiles are those chosen for H200 and H20.",
        "",
        "| kernel | of | dtype | compiled in | GPU | warps | stages | registers | shared | wgmma | TMA |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    rows = [r for r in table["kernels"] if "error" not in r]
    for r in sorted(rows, key=lambda r: (r["kernel"], r["dtype"], str(r["constants"]))):
        constants = ", ".join(f"{k} {v}" for k, v in r["constants"].items() if v not in (None, False))
        cells = (
            r["kernel"], ", ".join(r["ops"]), r["dtype"], constants, ", ".join(r["gpus"]), r["warps"], r["stages"],
            r["registers"], f"{r['shared'] / 1024:.0f} KB", r["wgmma"] or "", r["tma"] or "",
        )  # fmt: skip
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines) + "\n"


def why_no_cuda_table() -> str | None:
    """The reason why there can be no table of csrc/ here, if any."""
    if not MODULE.exists():
        return "csrc/ is not built in place" + ("" if shutil.which("nvcc") else ": there is no nvcc")
    newer = [p.name for p in SOURCES if "cutlass" not in p.parts and p.stat().st_mtime > MODULE.stat().st_mtime]
    if newer:
        return f"csrc/ has changed since it was built: {', '.join(newer[:3])}"
    return None if cuobjdump.tool() and shutil.which("c++filt") else "there is no cuobjdump or no c++filt"


def cuda_table() -> dict:
    """What cuobjdump says of every kernel in _C: see cuobjdump.instructions for the columns."""
    resources, threads, code = cuobjdump.resources(MODULE), cuobjdump.threads(MODULE), cuobjdump.code(MODULE)
    rows = [
        dict(kernel=name, threads=threads.get(mangled), **resources[mangled], **cuobjdump.instructions(code[mangled]))
        for mangled, name in zip(code, cuobjdump.names([*code]), strict=True)
    ]
    return dict(cuda=nvcc_release(shutil.which("nvcc")), kernels=sorted(rows, key=lambda r: r["kernel"]))


def cuda_page(table: dict) -> str:
    lines = [
        "# Resources of the CUDA kernels on Hopper",
        "",
        f"Made by `make tables` from the code that nvcc {table['cuda']} built for sm_90a, without a GPU: registers a",
        "thread, static shared memory a block, and how many of the instructions that move global memory move 16 bytes",
        "a thread or a whole tile (TMA). None spills, none adds floating-point numbers by atomics.",
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


def stale_kernels(table: dict, committed: dict) -> list[str]:
    """Kernels whose rows differ between a fresh table and the committed one."""
    rows, old = table["kernels"], committed["kernels"]
    return sorted({r["kernel"] for r in [*(r for r in rows if r not in old), *(r for r in old if r not in rows)]})


def write(texts: dict[Path, str]) -> None:
    for path, text in texts.items():
        path.write_text(text)
    print(f"wrote {' and '.join(str(path.relative_to(ROOT)) for path in texts)}")


def indented(table: dict) -> str:
    return json.dumps(table, indent=1) + "\n"


def counters() -> None:
    """In a process of its own: it puts the virtual GPU under ling_kernels."""
    code = "import json, sys; from benchmarks.profile import table; json.dump(table(), sys.stdout)"
    if reason := build.missing():
        print(f"no counters: there is no {reason}")
        return
    made = subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.PIPE, text=True, cwd=ROOT)
    table = json.loads(made.stdout)
    write({COUNTERS: clocks.text(table), COUNTERS_PAGE: counters_page.page(table)})


def main() -> None:
    reason = why_no_cuda_table()
    if reason:
        print(f"no table of csrc/: {reason}")
        cuda = json.loads(CUDA_CLOCKS.read_text())
    else:
        table = cuda_table()
        write({CUDA: indented(table), DOCS / "kernels-resources-cuda.md": cuda_page(table)})
        cuda = dict(cuda=table["cuda"], rows=clocks.cuda_rows(MODULE))
    counters()
    table = triton_table()
    triton = dict(triton=table["triton"], rows=table.pop("rows"))
    write({TRITON: indented(table), DOCS / "kernels-resources.md": triton_page(table)})
    write({CUDA_CLOCKS: clocks.text(cuda), TRITON_CLOCKS: clocks.text(triton), CLOCKS: page.page(cuda, triton)})
    write({PREDICTED: predict.page(cuda["rows"])})


if __name__ == "__main__":
    main()
