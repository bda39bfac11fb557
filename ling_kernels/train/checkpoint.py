"""Checkpoints: RUN/checkpoints/step-000123/ with everything that a run needs to continue bit for bit.

    config.json, model.safetensors   the weights in the precision of the masters, under official keys
    tokenizer.json, tokenizer_config.json   so that the folder is a complete model
    adapter_model.safetensors        in place of these, of a run with --lora-rank, in peft's format and fp32
    model.safetensors.index.json     which files hold the weights; of several processes each writes its own
    optimizer.safetensors            the optimizer's state, by parameter; of several processes files and an index
    merge.safetensors                the running merge, where there is one; of several processes files and an index
    rng.safetensors                  the states of torch's random number generators
    state.json                       progress and settings of the run, time of writing (s since 1970), size and
                             checksum of the files above

saving.py writes them.
"""

import json
import os
import re
import shutil
import time
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import torch
from torch import Tensor, nn

from ..errors import InputError, one_line
from ..files import user_path
from ..model.config_json import is_integer
from ..parallel.adapters import read_adapters_
from ..parallel.checkpoints import read_optimizer
from ..parallel.ranks import Ranks
from ..parallel.shares import Shares
from ..parallel.whole import Stepped
from .changes import DATA_FOLDER, are_changes, is_data_folder

READ_BYTES = 1 << 24


def checkpoint_folder(run: Path, step: int) -> Path:
    return run / "checkpoints" / f"step-{step:06d}"


def expect_folder(run: Path) -> None:
    """Raise InputError where RUN/checkpoints is something else than a folder."""
    path = run / "checkpoints"
    if os.path.lexists(path) and not path.is_dir():
        raise InputError(f"{path} is not a folder, so {run} can have no checkpoints: move it away")


def list_checkpoints(run: Path) -> list[Path]:
    """Oldest first, by step."""
    found = [p for p in (run / "checkpoints").glob("step-*") if re.fullmatch(r"step-\d+", p.name)]
    return sorted(found, key=step_of)


def step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix("step-"))


def clear_leftovers(run: Path) -> None:
    """Remove checkpoints that a killed process left half-written or half-removed."""
    for path in (run / "checkpoints").glob(".step-*"):
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def data_folders(run: Path) -> set[str]:
    """The folders of data of the run's checkpoints, superseded ones too; that of a damaged state.json is unknown."""
    found = set()
    for path in (run / "checkpoints").glob("*/state.json"):
        with suppress(OSError, ValueError, AttributeError, RecursionError):
            found.add(json.loads(path.read_text()).get("data_folder", DATA_FOLDER))
    return {name for name in found if is_data_folder(name)}


def remove(checkpoint: Path) -> None:
    """Rename, then delete, so that a half-removed folder is never taken for a checkpoint."""
    renamed = checkpoint.with_name(f".{checkpoint.name}.removed")
    os.rename(checkpoint, renamed)
    shutil.rmtree(renamed)


def make_durable(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def checksum(path: Path) -> int:
    total = 0
    with open(path, "rb") as file:
        while part := file.read(READ_BYTES):
            total = zlib.crc32(part, total)
    return total


def optimizer_tensors(model: nn.Module | Stepped, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The optimizer's state by the parameter's name: the tensors themselves."""
    names = {p: name for name, p in model.named_parameters()}
    return {f"{names[p]}.{key}": value for p, moments in optimizer.state.items() for key, value in moments.items()}


@contextmanager
def new_folder(out: str | Path) -> Iterator[Path]:
    """A folder beside `out` to write a model to, which appears as `out` when all is written. Raises InputError where
    that cannot be, and where it would be taken for a checkpoint of a run."""
    out = user_path(out)
    if out.exists():
        raise InputError(f"{out} exists; it is not overwritten")
    if out.absolute().parent.name == "checkpoints":
        raise InputError(f"{out} would be taken for a checkpoint of its run: name a folder elsewhere")
    partial = out.with_name(f".{out.name}.partial")
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        yield partial
        partial.rename(out)
    except OSError as error:
        raise InputError(f"cannot write {out}: {error.strerror or error}") from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def random_states() -> dict[str, Tensor]:
    states = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state()
    return states


def locate(resume: str) -> tuple[Path, Path]:
    """The run's folder and the checkpoint that --resume names: a checkpoint itself, or a run for its latest."""
    path = user_path(resume).resolve()
    if re.fullmatch(r"step-\d+", path.name) and path.parent.name == "checkpoints" and path.is_dir():
        return path.parent.parent, path
    if not path.is_dir():
        raise InputError(f"there is no run to resume at {resume}" + (", it is a file" if path.exists() else ""))
    expect_folder(path)
    checkpoints = list_checkpoints(path)
    if not checkpoints:
        raise InputError(f"{resume} holds no checkpoint to resume from")
    return path, checkpoints[-1]


def read_state(checkpoint: Path, ranks: Ranks | None = None) -> dict:
    """Read state.json. Raises InputError for a damaged checkpoint, naming the latest intact one before it. Every
    process calls it, and reads a share of the files."""
    ranks = ranks or Ranks()
    if (damage := damage_of(checkpoint, ranks)) is None:
        return ranks.from_first(lambda: json.loads((checkpoint / "state.json").read_text()))
    sound = sound_before(checkpoint, ranks)
    offer = f"continue from the one before it with --resume {sound}" if sound else "there is no earlier one"
    raise InputError(f"the checkpoint {checkpoint} is damaged: {damage}; {offer}")


def last_sound(checkpoint: Path, ranks: Ranks | None = None) -> Path:
    """The checkpoint, or where it is damaged the latest intact one before it, with a line that says so; the checkpoint
    itself where there is none."""
    ranks = ranks or Ranks()
    if (damage := damage_of(checkpoint, ranks)) is None or (sound := sound_before(checkpoint, ranks)) is None:
        return checkpoint
    if ranks.first:
        print(f"the checkpoint {checkpoint} is damaged: {damage}; resuming from {sound.name}")
    return sound


def sound_before(checkpoint: Path, ranks: Ranks) -> Path | None:
    """The latest intact checkpoint before this one."""
    found = ranks.from_first(lambda: list_checkpoints(checkpoint.parent.parent))
    earlier = (c for c in reversed(found) if step_of(c) < step_of(checkpoint))
    return next((c for c in earlier if damage_of(c, ranks) is None), None)


def age_key(checkpoint: Path) -> tuple[bool, float, int]:
    """Larger for a newer checkpoint: by the time in its state.json, or else that of its folder."""
    try:
        written = float(json.loads((checkpoint / "state.json").read_text())["time"])
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        written = checkpoint.stat().st_mtime
    return written <= time.time(), written, step_of(checkpoint)


def damage_of(checkpoint: Path, ranks: Ranks | None = None) -> str | None:
    """Describe damage to a checkpoint; None where every file is intact. Every process reads a share of the files."""
    ranks = ranks or Ranks()
    listed = ranks.from_first(lambda: listed_files(checkpoint))
    if isinstance(listed, str):
        return listed
    mine = listed[ranks.rank :: ranks.size]
    return next(filter(None, ranks.exchange(next(filter(None, (damage_to(checkpoint, *f) for f in mine)), None))), None)


def listed_files(checkpoint: Path) -> list[tuple[str, int, int]] | str:
    """Name, size and checksum of every file, or why they are not known."""
    try:
        files = json.loads((checkpoint / "state.json").read_text())["files"].items()
        return [(name, size, crc) for name, (size, crc) in files]
    except OSError as error:
        return f"{error.filename or checkpoint}: {error.strerror}"
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return "state.json is not readable"


def damage_to(checkpoint: Path, name: str, size: int, crc: int) -> str | None:
    """Describe damage to a file of a checkpoint."""
    try:
        path = checkpoint / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != size:
            return f"{name} has {path.stat().st_size} of {size} bytes"
        if checksum(path) != crc:
            return f"the checksum of {name} is wrong"
    except OSError as error:
        return f"{error.filename or checkpoint}: {error.strerror}"
    except (ValueError, TypeError):
        return "state.json is not readable"
    return None


def is_progress(state: dict) -> bool:
    """Whether a state.json has a position and settings, in the types of the trainer's Progress."""
    counts = [
        state.get(name, 0)
        for name in ("step", "sequences", "tokens", "bad", "skipped", "data_start", "sound", "proven")
    ]
    recent, in_bf16, merged = (state.get(name, []) for name in ("recent", "in_bf16", "merged"))
    return (
        all(is_integer(n) and n >= 0 for n in counts)
        and state.get("data_start", 0) <= state.get("sequences", 0)
        and is_data_folder(state.get("data_folder", DATA_FOLDER))
        and are_changes(state.get("changes", []))
        and isinstance(state["settings"], dict)
        and isinstance(recent, list)
        and all(isinstance(pair, list) and [type(x) for x in pair] == [float, float] for pair in recent)
        and isinstance(merged, list)
        and all(isinstance(pair, list) and [type(x) for x in pair] == [int, float] for pair in merged)
        and isinstance(in_bf16, list)
        and all(isinstance(name, str) for name in in_bf16)
    )


def restore(checkpoint: Path, shares: Shares, optimizer: torch.optim.Optimizer) -> None:
    """Load this process's part of the optimizer's state, of adapters if there are any, and the random number
    generators'. The model must have the checkpoint's weights, or those that the adapters are for."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    if shares.adapters:
        read_adapters_(shares, checkpoint)
    named = dict(shares.stepped.named_parameters())
    for name, key, value in read_optimizer(checkpoint, shares):
        optimizer.state[named[name]][key] = value.to(named[name].device)
    file = checkpoint / "rng.safetensors"
    try:
        states = load_file(file)
        torch.set_rng_state(states["cpu"])
        if "cuda" in states and torch.cuda.is_available():
            torch.cuda.set_rng_state(states["cuda"])
    except (OSError, SafetensorError, KeyError, TypeError, RuntimeError) as error:
        raise InputError(f"{file} holds no states of random number generators: {one_line(str(error))}") from None


def set_aside_later(run: Path, checkpoint: Path) -> list[Path]:
    """Rename the checkpoints later than the one that the run continues from to superseded-..., which --resume
    ignores."""
    later_ones = [c for c in list_checkpoints(run) if step_of(c) > step_of(checkpoint)]
    moved = []
    for path in later_ones:
        target = path.with_name(f"superseded-{path.name}")
        number = 2
        while target.exists():
            target, number = path.with_name(f"superseded-{path.name}-{number}"), number + 1
        moved.append(path.rename(target))
    return moved
