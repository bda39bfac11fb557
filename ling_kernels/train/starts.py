"""starts.jsonl in a run's folder: when, where and after which changes of settings each process began to train it."""

import os
import platform
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from .. import __version__
from ..model import LingConfig
from .prepare.threads import STARTS
from .report import open_lines
from .trainer import Trainer

PACKAGES = "torch", "triton", "numpy", "safetensors", "tokenizers"


def record_start(trainer: Trainer) -> None:
    """Append a line. Its step is the last one done before; lines of later steps, of a run that went on further, go."""
    if not trainer.ranks.first:
        return
    line = dict(
        step=trainer.progress.step, date=time.strftime("%Y-%m-%d %H:%M:%S %Z"), device=trainer.device_name,
        precision=str(trainer.precision)[6:], peak_flops=trainer.peak, peak_source=trainer.peak_source,
        parameters=trainer.config.num_parameters(mtp=True), active=trainer.config.num_active_parameters(),
        layers=moe_layers(trainer.config), training_tokens=trainer.training.tokens, held_out=trainer.held_out.tokens,
        versions=dict(ling_kernels=__version__, python=platform.python_version()) | versions(),
        system=platform.platform(), cores=os.cpu_count(), changes=trainer.progress.changes,
    )  # fmt: skip
    with open_lines(Path(trainer.folder) / STARTS, trainer.progress.step) as file:
        file.write(line)


def versions() -> dict[str, str]:
    found = {}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def moe_layers(config: LingConfig) -> list[str]:
    """Names of the MoE layers, in the order of the experts' load."""
    layers = [f"layer {i}" for i in range(config.first_k_dense_replace, config.num_hidden_layers)]
    return [*layers, *(f"MTP {k}" for k in range(1, config.num_nextn_predict_layers + 1))]
