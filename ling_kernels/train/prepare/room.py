"""Whether weights, optimizer and checkpoints fit into the device's memory and onto the disk."""

import os
import shutil
from pathlib import Path

import torch

from ...errors import InputError
from ...model import LingConfig
from ...parallel.ranks import Ranks
from .. import checkpoint as ckpt
from ..optimizer import bytes_per_weight
from ..settings import Settings
from .sizes import checkpoint_bytes, disk_bytes, layers_and_embeddings


def check_memory(config: LingConfig, settings: Settings, device: torch.device, ranks: Ranks | None = None) -> None:
    """Raise InputError where weights and optimizer of one process alone exceed the device's memory."""
    weights, need = config.num_parameters(mtp=True), needed_bytes(config, settings)
    if ranks and ranks.size > 1:  # each keeps its share of the optimizer's state; experts are most of the weights
        need = need // ranks.ep // ranks.pp
    if device.type == "cuda":
        memory = torch.cuda.get_device_properties(device).total_memory
    else:
        memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if need > memory:
        raise InputError(
            f"{settings.model} does not fit: training {weights / 1e9:.1f} B parameters takes {need / 1e9:.0f} GB for"
            f" weights and optimizer, the device has {memory / 1e9:.0f} GB;"
            " python -m ling_kernels.plan train shows what takes it"
        )


def check_disk(config: LingConfig, s: Settings, folder: Path, step: int = 0) -> None:
    """Raise InputError where the disk has no room for the checkpoints that the run keeps, one more that is being
    written, and the exported model. Those that are there already count as free: others take their place."""
    (number, need), one = disk_bytes(config, s, step), checkpoint_bytes(config, s)
    while not folder.exists() and folder != folder.parent:
        folder = folder.absolute().parent
    there = sum(file.stat().st_size for c in ckpt.list_checkpoints(folder) for file in c.iterdir())
    free = shutil.disk_usage(folder).free
    if need > free + there:
        raise InputError(
            f"{number} checkpoints of {one / 1e9:.1f} GB and the model at the end need {need / 1e9:.1f} GB, and the"
            f" disk of {folder} has {(free + there) / 1e9:.1f} GB: try a smaller --keep or another --out"
        )


def needed_bytes(config: LingConfig, s: Settings) -> int:
    """Bytes of weights, gradients and optimizer, and of FP8 weights that are kept."""
    in_layers, in_embeddings = layers_and_embeddings(config)
    options = s.optimizer, s.master, not s.step_in_backward
    fp8_copy = 1 if s.precision == "fp8" and s.fp8_weights == "kept" else 0
    return in_layers * (bytes_per_weight(*options) + fp8_copy) + in_embeddings * bytes_per_weight(*options, True)
