"""python -m ling_kernels.info: versions, GPUs, and which backends this machine has, or why not. --json for programs."""

import argparse
import importlib.metadata
import json
import platform
import re
import sys
import warnings
from pathlib import Path

from . import __version__
from .errors import command


def version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def driver() -> str | None:
    """Of the kernel module, which torch need not be able to use."""
    try:
        said = Path("/proc/driver/nvidia/version").read_text()
    except OSError:
        return None
    found = re.search(r"Kernel Module.*?(\d+\.\d[\d.]*)", said)
    return found[1] if found else None


def gpus(torch) -> tuple[list[dict], str | None]:
    """The GPUs that torch sees, and if it sees none, why."""
    if torch.version.cuda is None:
        return [], f"torch {torch.__version__} is built without CUDA"
    try:
        torch.cuda.init()
        found = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    except (RuntimeError, AssertionError) as error:  # no driver, or one that is too old
        return [], first_line(error)
    return [
        dict(name=p.name, sms=p.multi_processor_count, memory=p.total_memory, capability=f"{p.major}.{p.minor}")
        for p in found
    ], None if found else "there is none, or CUDA_VISIBLE_DEVICES hides it"


def first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")


def info() -> dict:
    found = dict(
        ling_kernels=__version__, python=platform.python_version(), torch=version("torch"), triton=version("triton"),
        cuda=None, driver=driver(), gpus=[], no_gpu=None, built=None, not_built=None, backends={}, forced=None,
    )  # fmt: skip
    try:
        import torch

        from . import backend
    except (ImportError, OSError) as error:
        found["no_gpu"] = f"torch cannot be imported: {first_line(error)}"
        return found
    found.update(torch=torch.__version__, cuda=torch.version.cuda, forced=backend._forced)
    found.update(built=getattr(backend._C, "__file__", None), not_built=backend._C_missing)
    found["gpus"], found["no_gpu"] = gpus(torch)
    for name in backend.BACKENDS:
        reasons = [backend.why_not(name, i) for i in range(len(found["gpus"]))] or ["no GPU"]
        found["backends"][name] = None if name == "torch" or None in reasons else reasons[0]
    return found


def lines(found: dict) -> list[str]:
    cuda = f" (for CUDA {found['cuda']})" if found["cuda"] else ""
    rows = [
        ("ling_kernels", found["ling_kernels"]),
        ("python", found["python"]),
        ("torch", (found["torch"] or "not installed") + cuda),
        ("triton", found["triton"] or "not installed"),
        ("driver", found["driver"] or "none"),
    ]
    for i, gpu in enumerate(found["gpus"]):
        memory, sm = f"{gpu['memory'] / 2**30:.0f} GiB", f"sm_{gpu['capability'].replace('.', '')}"
        rows.append((f"gpu {i}", f"{gpu['name']}, {gpu['sms']} SMs, {memory}, {sm}"))
    if not found["gpus"]:
        rows.append(("gpu", f"none: {found['no_gpu']}"))
    for name, reason in found["backends"].items():
        rows.append((f"backend {name}", "available" if reason is None else f"not available: {reason}"))
    rows.append(("csrc/", found["built"] or found["not_built"] or "unknown without torch"))
    if found["forced"]:
        rows.append(("LING_BACKEND", f"{found['forced']}, whatever is available"))
    return [f"{name:<15}{value}" for name, value in rows]


@command
def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m ling_kernels.info", description=__doc__.partition(": ")[2])
    parser.add_argument("--json", action="store_true", help="one JSON object instead of lines")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what torch warns of when it meets no GPU stands in the answer
        args = parser.parse_args(argv)
        found = info()
    print(json.dumps(found, indent=1) if args.json else "\n".join(lines(found)))


if __name__ == "__main__":
    sys.exit(main())
