"""From what the user gave to what a run needs, every mistake answered before any work is done."""

import json
import os
import shutil
import tempfile
import time
from contextlib import contextmanager, suppress
from dataclasses import dataclass, fields, replace
from pathlib import Path

import torch

from ..errors import InputError
from ..model import LingConfig, resolve_model
from ..model.config import PRESETS
from ..tokenizer import Tokenizer, load_tokenizer
from . import checkpoint as ckpt
from .optimizer import bytes_per_weight
from .settings import Settings, check, settings_of, to_json


@dataclass
class Job:
    settings: Settings
    config: LingConfig
    tokenizer: Tokenizer
    device: torch.device
    device_name: str
    precision: torch.dtype
    folder: Path
    made: bool  # the folder was not there before
    tokens: Path  # what the text was tokenised into, in the folder
    had_tokens: bool
    source: Path | None = None  # directory with the weights to begin from; None: random
    checkpoint: Path | None = None  # to resume from
    state: dict | None = None  # its state.json


def prepare(given: dict) -> Job:
    """Raise InputError for anything that cannot work; then make the run's folder."""
    given = {k: absolute(k, v) for k, v in given.items()}
    out, resume = given.pop("out", None), given.pop("resume", None)
    if resume == "auto":
        resume = latest_run(out, given.get("model", Settings.model))
        restart, out = out is not None and resume is None, None if resume else out
    else:
        restart = False
    if resume and out:
        raise InputError("--out is for a new run and --resume for one that is there: give one of the two")
    run, point = ckpt.locate(resume) if resume else (None, None)
    state = ckpt.read_state(point) if point else None
    settings = settings_of(given, state and state["settings"])
    config, source = settings_model(settings, point)
    check(settings, config)
    if state and settings.steps < state["step"]:
        raise InputError(f"--steps {settings.steps}: {point} has done {state['step']} already")
    device, name, precision = choose_device(settings)
    settings = replace(settings, threads=settings.threads or torch.get_num_threads())
    torch.set_num_threads(settings.threads)
    tokenizer = load_tokenizer(point or settings.tokenizer or own_tokenizer(source))
    if tokenizer.vocab_size > config.vocab_size:
        raise InputError(
            f"the tokenizer has {tokenizer.vocab_size} tokens, more than the {config.vocab_size} of {settings.model}"
        )
    if not source and not point:
        config = replace(config, eos_token_id=tokenizer.eos_id, pad_token_id=tokenizer.eos_id)
    enough_memory(config, settings, device)
    folder, made = (run, False) if run else new_folder(out, settings.model, restart)
    (folder / "settings.json").write_text(json.dumps(to_json(settings), indent=2) + "\n")
    tokens = folder / "data" / "tokens.bin"
    there = tokens.exists()
    return Job(settings, config, tokenizer, device, name, precision, folder, made, tokens, there, source, point, state)


def absolute(name: str, value):
    """Paths are kept absolute: a run may be resumed from another folder."""
    if name == "data":
        return [os.path.abspath(v) for v in value]
    if name == "tokenizer" or (name == "model" and value not in PRESETS and os.path.isdir(value)):
        return os.path.abspath(value)
    return value


def settings_model(settings: Settings, point: Path | None) -> tuple[LingConfig, Path | None]:
    """The configuration and the directory with weights; of a resumed run, the checkpoint's configuration, which must be
    the preset's of today."""
    mtp = {} if settings.mtp is None else dict(num_nextn_predict_layers=settings.mtp)
    if point is None:
        config, source = resolve_model(settings.model)
        if source and mtp:
            raise InputError(f"--mtp {settings.mtp}: {source} says itself how many MTP layers it has")
        return replace(config, **mtp), source
    config = LingConfig.from_json(point / "config.json")
    if not os.path.isabs(settings.model):
        preset = replace(LingConfig.preset(settings.model), **mtp)
        for f in fields(config):
            had, has = getattr(config, f.name), getattr(preset, f.name)
            if f.compare and not f.name.endswith("token_id") and had != has:
                raise InputError(f"{f.name} is {had} in {point} and {has} in {settings.model}: not the same model")
    return config, None


def own_tokenizer(source: Path | None) -> Path | None:
    return source if source and (source / "tokenizer.json").is_file() else None


def choose_device(settings: Settings) -> tuple[torch.device, str, torch.dtype]:
    gpu = torch.cuda.is_available()
    if settings.device == "cuda" and not gpu:
        raise InputError("--device cuda: torch finds no GPU here; --device cpu or auto trains on the CPU")
    use = gpu and settings.device != "cpu"
    if settings.precision == "fp8" and use:
        refuse_without_fp8(
            torch.cuda.get_device_name(), torch.cuda.get_device_capability(), os.environ.get("LING_BACKEND")
        )
    # On a GPU everything may autocast to bf16; a CPU mostly is slower in it.
    bf16 = settings.precision in ("bf16", "fp8") or (settings.precision == "auto" and use)
    name = torch.cuda.get_device_name() if use else "CPU"
    return torch.device("cuda" if use else "cpu"), name, torch.bfloat16 if bf16 else torch.float32


def refuse_without_fp8(gpu: str, capability: tuple[int, int], backend: str | None) -> None:
    """Raise InputError for a GPU whose tensor cores know no FP8, unless the references are to compute its products."""
    if capability < (8, 9) and backend != "torch":
        raise InputError(
            f"--precision fp8: {gpu} has no FP8 (compute capability {'.'.join(map(str, capability))}, it begins with"
            " 8.9); --precision bf16 trains on it, and LING_BACKEND=torch emulates FP8, slowly"
        )


@contextmanager
def deterministic():
    """Equal runs give equal bits: without this, sums into the same row run in any order, also on a CPU's threads."""
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


def enough_memory(config: LingConfig, settings: Settings, device: torch.device) -> None:
    kept = settings.precision == "fp8" and settings.fp8_weights == "kept"
    weights = config.num_parameters(mtp=True)
    per_weight = bytes_per_weight(settings.optimizer, settings.master, not settings.step_in_backward)
    need = (per_weight + kept) * weights
    if device.type == "cuda":
        there = torch.cuda.get_device_properties(device).total_memory
    else:
        there = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if need > there:
        raise InputError(
            f"{settings.model} does not fit: training {weights / 1e9:.1f} B parameters takes {need / 1e9:.0f} GB for"
            f" weights and optimizer, there are {there / 1e9:.0f} GB; --plan shows what takes it"
        )


def latest_run(out: Path | None, model: str) -> str | None:
    """What --resume auto resumes: `out`, or the latest run of the model, where it has a checkpoint."""
    there = [out] if out else sorted(Path("runs").glob(f"{os.path.basename(model)}-*"))
    there = [run for run in there if ckpt.list_checkpoints(run)]
    return str(there[-1]) if there else None


def new_folder(out: Path | None, model: str, restart: bool) -> tuple[Path, bool]:
    """An empty folder that can be written, and whether it was made. What is in a folder already is never touched,
    except a run that was stopped before its first checkpoint, and only where `restart` says so."""
    folder = out or Path("runs") / f"{os.path.basename(model)}-{time.strftime('%Y%m%d-%H%M%S')}"
    if out is None:
        number, plain = 2, folder
        while folder.exists():
            folder, number = plain.with_name(f"{plain.name}-{number}"), number + 1
    folder = folder.absolute()
    made = not folder.exists()
    if folder.exists() and not folder.is_dir():
        raise InputError(f"--out {folder} is a file")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if any(folder.iterdir()) and not (restart and (folder / "settings.json").is_file()):
            raise InputError(f"--out {folder} is not empty; --resume {folder} goes on with a run")
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise InputError(f"cannot write to {folder}: {error.strerror or error}") from None
    return folder, made


def discard(job: Job) -> None:
    """Take back what was made before the first step, where a run turns out to be impossible."""
    if not job.had_tokens:
        job.tokens.unlink(missing_ok=True)
        job.tokens.with_suffix(".json").unlink(missing_ok=True)
    if not job.checkpoint:
        (job.folder / "settings.json").unlink()
    with suppress(OSError):  # not empty: then it was not made here
        job.tokens.parent.rmdir()
    if job.made:
        shutil.rmtree(job.folder)
