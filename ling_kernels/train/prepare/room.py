"""Whether weights, optimizer and checkpoints fit into the device's memory and onto the disk."""

import errno
import os
import shutil
from pathlib import Path

import torch

from ...errors import InputError, counted, warn
from ...files import format_bytes
from ...model import LingConfig
from ...parallel.ranks import Ranks
from .. import checkpoint as ckpt
from ..optimizer import bytes_per_weight
from ..settings import Settings
from .adapters import adapter_parameters
from .sizes import checkpoint_bytes, checkpoints_at_once, disk_bytes, layers_and_embeddings


def check_memory(config: LingConfig, settings: Settings, device: torch.device, ranks: Ranks | None = None) -> None:
    """Raise InputError where weights and optimizer of one process alone exceed the device's memory."""
    weights, need = config.num_parameters(mtp=True), least_bytes(config, settings, ranks or Ranks())
    if device.type == "cuda":
        memory = torch.cuda.get_device_properties(device).total_memory
    else:
        memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if need > memory:
        raise InputError(
            f"{settings.model} does not fit: training {weights:,} parameters takes {format_bytes(need)} for"
            f" weights and optimizer, the device has {format_bytes(memory)};"
            " python -m ling_kernels.plan train shows what takes it"
        )


def least_bytes(config: LingConfig, s: Settings, ranks: Ranks) -> int:
    """Bytes of weights, gradients and optimizer that a process has at least: its share of the optimizer's state, and of
    the rest as if what divides most divided all."""
    most = max(ranks.experts.number, ranks.vocabulary.number, ranks.tensor.number)
    if s.lora_rank:
        return needed_bytes(config, s) // most // ranks.pp
    state = checkpoint_bytes(config, s) - config.num_parameters(mtp=True) * (4 if s.master == "fp32" else 2)
    return (needed_bytes(config, s) - state) // most // ranks.pp + state * ranks.copies // ranks.size


def check_disk(config: LingConfig, s: Settings, folder: Path, step: int = 0) -> None:
    """Raise InputError where the disk cannot be written, or has no room for the checkpoints that a run of sound steps
    has at once and the exported model; warn where it has none for as many as there can be. The run's own up to `step`
    count as free: they are among these."""
    own = [c for c in ckpt.list_checkpoints(folder) if ckpt.step_of(c) <= step]
    while not folder.exists() and folder != folder.parent:
        folder = folder.absolute().parent
    if not os.access(folder, os.W_OK):
        raise InputError(f"cannot write to {folder}: {why_read_only(folder)}")
    disk = shutil.disk_usage(folder)
    free = disk.free + sum(file.stat().st_size for c in own for file in c.glob("*"))
    usual, most = checkpoints_at_once(s, step, [ckpt.step_of(c) for c in own])
    if not disk.total or (need := disk_bytes(config, s, most)) <= free:  # a tmpfs without a limit says 0
        return
    has = f"the disk of {folder} has {format_bytes(free)}"
    one = f"of {format_bytes(checkpoint_bytes(config, s))} and the model at the end"
    if (least := disk_bytes(config, s, usual)) > free:
        number = counted(usual, "checkpoint")
        raise InputError(f"{number} {one} need {format_bytes(least)}, and {has}: try a smaller --keep or another --out")
    warn(f"after a stop or unsound steps there may be {most} checkpoints {one}, which need"
                  f" {format_bytes(need)}, and {has}")  # fmt: skip


def why_read_only(folder: Path) -> str:
    """Why a folder cannot be written."""
    if hasattr(os, "statvfs") and os.statvfs(folder).f_flag & os.ST_RDONLY:
        return os.strerror(errno.EROFS)
    return os.strerror(errno.EACCES)


def needed_bytes(config: LingConfig, s: Settings) -> int:
    """Bytes of weights, gradients and optimizer, and of FP8 weights that are kept."""
    in_layers, in_embeddings = layers_and_embeddings(config)
    options = s.optimizer, s.master, not s.step_in_backward
    fp8_copy = 1 if s.precision == "fp8" and s.fp8_weights == "kept" else 0
    if s.lora_rank:
        trained = adapter_parameters(config, s) * bytes_per_weight(s.optimizer, "fp32")
        frozen = 2 if s.master == "bf16" else 4
        if s.fp8_weights == "only":
            return round(trained + in_layers + 2 * in_embeddings)
        return round(trained + (in_layers + in_embeddings) * frozen + in_layers * fp8_copy)
    return round(in_layers * (bytes_per_weight(*options) + fp8_copy) + in_embeddings * bytes_per_weight(*options, True))
