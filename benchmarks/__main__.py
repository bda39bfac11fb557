"""make bench: run the suites; write benchmarks/results/<machine>.json, pytest-benchmark's, and docs/performance.md.

    python -m benchmarks                 ops over Ling's grid, layers, decoding, serving, the host, peers
    python -m benchmarks --quick         each op at its own shape; on a GPU at most 8 minutes
    python -m benchmarks -k grouped_gemm --benchmark-compare=benchmarks/results/nvidia-h200.json

Further arguments are pytest's; such a selection goes to build/bench.json and does not replace the machine's results.
Without a GPU, ops and peers are left out.
"""

import importlib.util
import platform
import re
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import report
from ling_kernels.commands import command
from ling_kernels.errors import InputError


def results_file() -> Path:
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else f"cpu {platform.machine()}"
    return report.RESULTS / f"{re.sub(r'[^a-z0-9]+', '-', name.lower())}.json"


def main() -> int:
    if importlib.util.find_spec("pytest_benchmark") is None:
        raise InputError("pytest-benchmark is not installed: pip install '.[dev]'")
    quick, arguments = "--quick" in sys.argv, [a for a in sys.argv[1:] if a != "--quick"]
    selection = [a for a in arguments if not a.startswith("--commit")]
    out = report.ROOT / "build/bench.json" if selection else results_file()
    out.parent.mkdir(parents=True, exist_ok=True)
    partial = out.with_suffix(".partial")
    partial.unlink(missing_ok=True)
    limit = ["--session-timeout=450"] if quick and importlib.util.find_spec("pytest_timeout") else []
    status = pytest.main([
        str(report.ROOT / "benchmarks/bench.py"), "-rs", "-p", "no:cacheprovider", "-p", "no:xdist", *limit,
        f"--shapes={'own' if quick else 'grid'}", f"--benchmark-json={partial}",
        "--benchmark-columns=median,iqr,rounds", *arguments,
    ])  # fmt: skip
    if partial.exists() and partial.stat().st_size:
        partial.replace(out)
        print(f"wrote {out.relative_to(report.ROOT)}")
    if not selection:
        report.write()
    return int(status)


if __name__ == "__main__":
    sys.exit(command(main)())
