"""Before a run: check settings, choose device and precision, make the run's folder. Every mistake is an InputError
before any work is done."""

import json
import os
import shutil
import tempfile
import time
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from ..backend import why_not_forced
from ..errors import InputError
from ..files import LOCK, FolderLock, lock_folder, user_path
from ..gpu import find_gpu
from ..model import LingConfig
from ..model.config import PRESETS
from ..tokenizer import Tokenizer, load_tokenizer
from . import checkpoint as ckpt
from .changes import DATA_FOLDER, changes, new_data_folder, tokens_in
from .checks import check
from .models import fits_vocabulary, model_config, model_name, own_tokenizer, with_end_token
from .optimizer import bytes_per_weight
from .scaling import with_defaults
from .settings import Settings, from_json, plain_options, settings_of, to_json
from .sizes import checkpoint_bytes, disk_bytes, layers_and_embeddings
from .threads import STARTS, began_elsewhere, free_cores


@dataclass
class Run:
    """A run that can start: its settings checked, its folder there with settings.json."""

    settings: Settings
    config: LingConfig
    tokenizer: Tokenizer
    device: torch.device
    device_name: str
    precision: torch.dtype
    folder: Path
    lock: FolderLock  # of the folder
    new_folder: bool  # created for this run
    tokens: Path  # tokenised text, in the folder
    had_tokens: bool  # it or one beside it was there before
    weights: Path | None = None  # folder of the model to start from; None: random weights
    checkpoint: Path | None = None  # to resume from
    state: dict | None = None  # the checkpoint's state.json
    changes: list[dict] = field(default_factory=list)  # of the settings, since that checkpoint
    notes: list[str] = field(default_factory=list)  # lines about the settings, for the user


def new_run(settings: Settings, out: str | Path | None = None, restart: bool = False) -> Run:
    """Prepare a new run in the folder `out` (default: runs/MODEL-DATE-TIME)."""
    settings = absolute_paths(settings)
    config, weights = model_config(settings)
    settings, notes = with_defaults(settings, config, trained=weights is not None)
    check(settings, config)
    settings, device = choose_device_and_threads(settings)
    tokenizer = load_tokenizer(settings.tokenizer or own_tokenizer(settings.model))
    fits_vocabulary(tokenizer, config, settings, weights)
    config, end = with_end_token(config, tokenizer, weights)
    check_memory(config, settings, device[0])
    check_disk(config, settings, user_path(out) if out else Path("runs"))
    folder, new = make_folder(out, settings.model, restart)
    lock = lock_folder(folder)
    run = Run(settings, config, tokenizer, *device, folder, lock, new, *tokens_of(folder), weights)
    run.notes = [*notes, *end]
    if not weights and settings.model not in PRESETS:
        run.notes.insert(0, f"weights    random, as there are none in {settings.model}")
    return write_settings(run)


def resumed_run(resume: str | Path, options: dict, fall_back: bool = False) -> Run:
    """Prepare to resume from a run's latest checkpoint, or from a checkpoint; options: settings to change. fall_back:
    from the latest one that is not damaged, saying so."""
    folder, checkpoint = ckpt.locate(str(resume))
    lock = lock_folder(folder)
    if fall_back:
        checkpoint = ckpt.last_sound(checkpoint)
    state = ckpt.read_state(checkpoint)
    if missing := {"settings", "step", "data"} - state.keys():
        raise InputError(f"{checkpoint / 'state.json'} has no {', '.join(sorted(missing))}")
    if not ckpt.is_progress(state):
        raise InputError(f"{checkpoint / 'state.json'} is not the state of a run: a value has another type")
    settings = absolute_paths(settings_of(absolute_changes(options), state["settings"]))
    if "threads" not in options and began_elsewhere(folder / STARTS):
        settings = replace(settings, threads=None)
    config, _ = model_config(settings, checkpoint)
    check(settings, config)
    if settings.steps < state["step"]:
        raise InputError(f"--steps {settings.steps}: {checkpoint} has done {state['step']} already")
    settings, device = choose_device_and_threads(settings)
    tokenizer = load_tokenizer(checkpoint)
    fits_vocabulary(tokenizer, config, settings)
    check_memory(config, settings, device[0])
    check_disk(config, settings, folder, state["step"])
    changed = changes(from_json(state["settings"]), settings, state["step"])
    tokens = tokens_of(folder, data_folder := state.get("data_folder", DATA_FOLDER))
    if any(change["setting"] == "data" for change in changed):
        tokens = tokens_in(folder, new_data_folder(state["step"], data_folder)), False
        shutil.rmtree(tokens[0].parent, ignore_errors=True)  # of a continuation that was given up
    run = Run(settings, config, tokenizer, *device, folder, lock, False, *tokens, None, checkpoint, state, changed)
    return write_settings(run)


def choose_device_and_threads(settings: Settings) -> tuple[Settings, tuple[torch.device, str, torch.dtype]]:
    """The settings with the number of CPU threads, which is set; device, its name and the precision."""
    device = choose_device(settings)
    settings = replace(settings, threads=settings.threads or min(torch.get_num_threads(), free_cores()))
    torch.set_num_threads(settings.threads)
    return settings, device


def write_settings(run: Run) -> Run:
    file = run.folder / "settings.json"
    try:
        file.write_text(json.dumps(to_json(run.settings), indent=2) + "\n")
    except OSError as error:
        raise InputError(f"cannot write {file}: {error.strerror}") from None
    return run


def tokens_of(folder: Path, data_folder: str = DATA_FOLDER) -> tuple[Path, bool]:
    path = tokens_in(folder, data_folder)
    return path, any(path.parent.glob("*.bin"))


def absolute_changes(options: dict) -> dict:
    """Settings with absolute paths, so that a run can be resumed from another working directory."""
    return {name: absolute(name, value) for name, value in plain_options(options).items()}


def absolute_paths(settings: Settings) -> Settings:
    names = ("data", "val_data", "tokenizer", "model")
    return replace(settings, **{name: absolute(name, getattr(settings, name)) for name in names})


def absolute(name: str, value):
    if value is None:
        return None
    if name == "data":
        return tuple(map(os.path.abspath, value))
    if name == "val_data":
        parts = [source.partition("=") for source in value]
        return tuple(f"{name}={os.path.abspath(path)}" if path else name for name, _, path in parts)
    if name == "tokenizer" or (name == "model" and value not in PRESETS and os.path.exists(value)):
        return os.path.abspath(value)
    return value


def choose_device(settings: Settings) -> tuple[torch.device, str, torch.dtype]:
    """Device, its name, and the precision of autocast (fp32: none)."""
    gpu = torch.cuda.is_available()
    if settings.device == "cuda" and not gpu:
        raise InputError("--device cuda: torch finds no GPU here; --device cpu or auto trains on the CPU")
    use = gpu and settings.device != "cpu"
    if reason := why_not_forced(torch.device("cuda" if use else "cpu")):
        raise InputError(reason)
    if settings.precision == "fp8" and use:
        refuse_without_fp8(
            torch.cuda.get_device_name(), torch.cuda.get_device_capability(), os.environ.get("LING_BACKEND")
        )
    # auto is bf16 on GPUs alone: most CPUs are slower in bf16 than in fp32
    bf16 = settings.precision in ("bf16", "fp8") or (settings.precision == "auto" and use)
    name = torch.cuda.get_device_name() if use else "CPU"
    return torch.device("cuda" if use else "cpu"), name, torch.bfloat16 if bf16 else torch.float32


def refuse_without_fp8(gpu: str, capability: tuple[int, int], backend: str | None) -> None:
    """Raise InputError for a GPU whose tensor cores lack FP8, unless the torch references are forced."""
    if capability < (8, 9) and backend != "torch":
        raise InputError(
            f"--precision fp8: {gpu} has no FP8 (compute capability {'.'.join(map(str, capability))}, FP8 needs"
            " 8.9 or more); --precision bf16 trains on it, and LING_BACKEND=torch emulates FP8, slowly"
        )


@contextmanager
def deterministic():
    """Equal runs give equal bits. Otherwise sums into one row run in any order, also on a CPU's threads."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS reads it once, when it is first used
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    fill = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # it only helps to find bugs, and takes time
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        torch.utils.deterministic.fill_uninitialized_memory = fill


def check_memory(config: LingConfig, settings: Settings, device: torch.device) -> None:
    """Raise InputError where weights and optimizer alone exceed the device's memory."""
    weights, need = config.num_parameters(mtp=True), needed_bytes(config, settings)
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


def latest_run(out: Path | None, model: str) -> Path | None:
    """The run that --resume auto resumes, if there is one with a checkpoint: `out`, or of the runs of `model` in runs/
    the one with the newest checkpoint, by the times in them. A time in the future is older than any other."""
    model = absolute("model", model)
    runs = [out] if out else [path.parent for path in Path("runs").glob("*/settings.json") if model_of(path) == model]
    newest = {run: checkpoints[-1] for run in runs if (checkpoints := ckpt.list_checkpoints(run))}
    return max(newest, key=lambda run: ckpt.age_key(newest[run]), default=None)


def model_of(path: Path) -> str | None:
    """The model of a settings.json; None where it cannot be read."""
    try:
        return from_json(json.loads(path.read_text())).model
    except (OSError, ValueError, TypeError, AttributeError, RecursionError):
        return None


def make_folder(out: str | Path | None, model: str, restart: bool) -> tuple[Path, bool]:
    """An empty folder that can be written, and whether it is new. Raises InputError for a folder that holds anything,
    except, with `restart`, a run that stopped before its first checkpoint."""
    folder = user_path(out) if out else Path("runs") / f"{model_name(model)}-{time.strftime('%Y%m%d-%H%M%S')}"
    if out is None:
        number, plain = 2, folder
        while folder.exists():
            folder, number = plain.with_name(f"{plain.name}-{number}"), number + 1
    folder = folder.absolute()
    new = not folder.exists()
    if folder.exists() and not folder.is_dir():
        raise InputError(f"--out {folder} is a file")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if any(path.name != LOCK for path in folder.iterdir()) and not (
            restart and (folder / "settings.json").is_file()
        ):
            begun = (folder / "settings.json").is_file() and not ckpt.list_checkpoints(folder)
            how = f"auto --out {folder} begins its run again" if begun else f"{folder} continues a run"
            raise InputError(f"--out {folder} is not empty; --resume {how}")
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise InputError(f"cannot write to {folder}: {error.strerror or error}") from None
    return folder, new


def discard(run: Run) -> None:
    """Remove the files of a run that turns out to be impossible before its first step."""
    if not run.had_tokens and run.tokens.parent.is_dir():
        for path in [*run.tokens.parent.glob("*.bin"), *run.tokens.parent.glob("*.json")]:
            path.unlink()
    if not run.checkpoint:
        (run.folder / "settings.json").unlink()
        run.lock.remove()
    with suppress(OSError):  # not empty, so it was there before
        run.tokens.parent.rmdir()
    if run.new_folder:
        shutil.rmtree(run.folder)


def peak_flops(device: torch.device, dtype: torch.dtype) -> tuple[float, str]:
    """Peak FLOP/s for the MFU, and its source: the data sheet for Hopper in bf16, otherwise a matrix product timed
    now."""
    if device.type == "cuda" and dtype == torch.bfloat16 and (gpu := find_gpu(torch.cuda.get_device_name(device))):
        return gpu.bf16, f"{gpu.name} bf16 dense"
    size, label = (8192, "GPU") if device.type == "cuda" else (1024, f"{torch.get_num_threads()} CPU threads")
    return measured_flops(device, dtype, size), f"measured, {label}, {str(dtype)[6:]}"


def measured_flops(device: torch.device, dtype: torch.dtype, size: int, repeats: int = 5) -> float:
    """FLOP/s of the fastest of `repeats` products [size, size] x [size, size]."""
    # Random data, since a GPU multiplies constants faster; an own generator, since the run's state must not change.
    g = torch.Generator(device).manual_seed(0)
    a, b = (torch.randn(size, size, generator=g, device=device, dtype=dtype) for _ in range(2))
    best = float("inf")
    for _ in range(repeats + 1):  # the first warms up and is never the fastest
        start = time.perf_counter()
        a @ b
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best
