"""The suites' options, and the facts about machine and commit in pytest-benchmark's JSON."""

import importlib.metadata
import os
import subprocess

import torch

from benchmarks import peers
from ling_kernels.host_memory import keep_freed_memory

CLOCKS = "driver_version,clocks.sm,clocks.max.sm,clocks.mem,power.draw,power.limit,temperature.gpu"


def pytest_addoption(parser):
    group = parser.getgroup("ling_kernels")
    group.addoption(
        "--shapes", choices=("own", "grid", "small"), default="own",
        help="each op at its benchmark shape, also over Ling's grid, or (the only one without a GPU) at a test's shape",
    )  # fmt: skip
    group.addoption("--commit", help="the tree's commit, for a copy without git history")


def pytest_configure():
    keep_freed_memory()  # as our commands do; for peers too


def clocks() -> dict[str, str]:
    """The GPU's driver, clocks, power and temperature now; {} where nvidia-smi does not tell."""
    command = ["nvidia-smi", f"--query-gpu={CLOCKS}", "--format=csv,noheader"]
    try:
        out = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return {}
    return dict(zip(CLOCKS.split(","), map(str.strip, out.splitlines()[0].split(",")), strict=False))


def pytest_benchmark_update_machine_info(config, machine_info):
    for private in ("node", "release", "processor", "python_build", "python_compiler"):
        machine_info.pop(private, None)
    triton = [d.version for d in importlib.metadata.distributions(name="triton")]
    machine_info.update(
        cpu=machine_info.get("cpu", {}).get("brand_raw"), cores=os.cpu_count(), threads=torch.get_num_threads(),
        load=round(os.getloadavg()[0], 1), torch=torch.__version__, triton=triton[0] if triton else None,
        cuda=torch.version.cuda, gpu=None, peers=peers.inventory(),
    )  # fmt: skip
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        machine_info.update(gpu=properties.name, sms=properties.multi_processor_count, clocks=clocks())


def pytest_benchmark_update_commit_info(config, commit_info):
    for private in ("project", "branch", "author_time"):
        commit_info.pop(private, None)
    if config.getoption("--commit"):
        commit_info.update(id=config.getoption("--commit"), dirty=False)


def pytest_benchmark_update_json(config, benchmarks, output_json):
    """Without the single times, which would be most of the file, and parameters that JSON cannot hold."""
    for row in output_json["benchmarks"]:
        row["stats"].pop("data", None)
        for name in ("case", "shape"):
            (row["params"] or {}).pop(name, None)


def pytest_collection_modifyitems(items):
    """Our CUDA kernels, layers and decoding before peers and slower backends: time on a GPU may run out."""
    order = {"cuda": 0, None: 0, "triton": 2, "torch": 3}
    items.sort(key=lambda item: order.get(getattr(item, "callspec", None) and item.callspec.params.get("by"), 1))
