"""python -m ling_kernels.info: versions, GPUs, and which backends can run on this machine. --json for programs."""

import importlib.metadata
import json
import platform
import re
import sys
import warnings
from pathlib import Path

from . import __version__
from .commands import Parser, command


def package_version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def driver_version() -> str | None:
    """The version of the NVIDIA kernel module, also where torch cannot use it."""
    try:
        text = Path("/proc/driver/nvidia/version").read_text()
    except OSError:
        return None
    match = re.search(r"Kernel Module.*?(\d+\.\d[\d.]*)", text)
    return match[1] if match else None


def list_gpus(torch) -> tuple[list[dict], str | None]:
    """The GPUs that torch sees; if it sees none, the reason."""
    if torch.version.cuda is None:
        return [], f"torch {torch.__version__} is built without CUDA"
    try:
        torch.cuda.init()
        devices = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    except (RuntimeError, AssertionError) as error:  # no driver, or one that is too old
        return [], first_line(error)
    return [
        dict(name=p.name, sms=p.multi_processor_count, memory=p.total_memory, capability=f"{p.major}.{p.minor}")
        for p in devices
    ], None if devices else "there is none, or CUDA_VISIBLE_DEVICES hides it"


def first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")


def info() -> dict:
    """The whole report as JSON types. `backends` maps each name to None (available) or to the reason against it."""
    report: dict = dict(
        ling_kernels=__version__, python=platform.python_version(),
        torch=package_version("torch"), triton=package_version("triton"),
        cuda=None, driver=driver_version(), gpus=[], no_gpu=None, built=None, not_built=None, backends={}, forced=None,
    )  # fmt: skip
    try:
        import torch

        from . import backend
    except (ImportError, OSError) as error:
        report["no_gpu"] = f"torch cannot be imported: {first_line(error)}"
        return report
    report.update(torch=torch.__version__, cuda=torch.version.cuda, forced=backend._forced)
    report.update(built=getattr(backend._C, "__file__", None), not_built=backend._C_missing)
    report["gpus"], report["no_gpu"] = list_gpus(torch)
    for name in backend.BACKENDS:
        reasons = [backend.why_not(name, i) for i in range(len(report["gpus"]))] or ["no GPU"]
        report["backends"][name] = None if name == "torch" or None in reasons else reasons[0]
    return report


def lines(report: dict) -> list[str]:
    """The report as aligned lines for a person."""
    cuda = f" (for CUDA {report['cuda']})" if report["cuda"] else ""
    rows = [
        ("ling_kernels", report["ling_kernels"]),
        ("python", report["python"]),
        ("torch", (report["torch"] or "not installed") + cuda),
        ("triton", report["triton"] or "not installed"),
        ("driver", report["driver"] or "none"),
    ]
    for i, gpu in enumerate(report["gpus"]):
        memory, sm = f"{gpu['memory'] / 2**30:.0f} GiB", f"sm_{gpu['capability'].replace('.', '')}"
        rows.append((f"gpu {i}", f"{gpu['name']}, {gpu['sms']} SMs, {memory}, {sm}"))
    if not report["gpus"]:
        rows.append(("gpu", f"none: {report['no_gpu']}"))
    for name, reason in report["backends"].items():
        rows.append((f"backend {name}", "available" if reason is None else f"not available: {reason}"))
    rows.append(("csrc/", report["built"] or report["not_built"] or "unknown without torch"))
    if report["forced"]:
        rows.append(("LING_BACKEND", f"{report['forced']}, whatever is available"))
    return [f"{name:<15}{value}" for name, value in rows]


def print_kernels(name: str, as_json: bool) -> None:
    from .model import resolve_model
    from .plan.kernels import lines, model_kernels

    config, _ = resolve_model(name)
    if as_json:
        steps = {step: [c._asdict() for c in choices] for step, choices in model_kernels(config).items()}
        print(json.dumps(dict(model=name, steps=steps), indent=1))
    else:
        print(*lines(config), sep="\n")


@command
def main(argv: list[str] | None = None) -> None:
    parser = Parser(prog="python -m ling_kernels.info", description=__doc__.partition(": ")[2])
    parser.add_argument("--json", action="store_true", help="one JSON object instead of lines")
    parser.add_argument(
        "--model",
        metavar="NAME|DIR",
        help="instead: which kernels this model's size runs on a Hopper GPU, and why not csrc/'s",
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the report contains what torch warns about on a machine without GPU
        args = parser.parse_args(argv)
        if args.model is not None:
            print_kernels(args.model, args.json)
            return
        report = info()
    print(json.dumps(report, indent=1) if args.json else "\n".join(lines(report)))


if __name__ == "__main__":
    sys.exit(main())
