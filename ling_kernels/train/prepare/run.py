"""Before a run: check settings, choose device and precision, make the run's folder. Every mistake is an InputError
before any work is done."""

import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Collection
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from ... import __version__
from ...errors import InputError
from ...files import LOCK, FolderLock, lock_folder, user_path
from ...model import Ling, LingConfig
from ...model.config import PRESETS
from ...parallel.ranks import Ranks, start
from ...tokenizer import Tokenizer, load_tokenizer
from .. import checkpoint as ckpt
from ..changes import DATA_FOLDER, changes, new_data_folder, tokens_in
from ..data.cores import free_cores
from ..scaling import schedule_line, with_defaults
from ..settings import TEXT_SETTINGS, Settings, from_json, plain_options, settings_of, to_json
from .adapters import base_model
from .checks import check
from .checks_parallel import check_parallel, mesh_of
from .device import check_exchange, choose_device
from .models import fits_vocabulary, model_config, model_name, own_tokenizer, with_end_token
from .room import check_disk, check_memory
from .threads import STARTS, began_elsewhere, faster_threads


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
    lock: FolderLock | None  # of the folder, which rank 0 holds
    new_folder: bool  # created for this run
    tokens: Path  # tokenised text, in the folder
    had_tokens: bool  # it or one beside it was there before
    weights: Path | None = None  # folder of the model to start from; None: random weights
    checkpoint: Path | None = None  # to resume from
    state: dict | None = None  # the checkpoint's state.json
    changes: list[dict] = field(default_factory=list)  # of the settings, since that checkpoint
    notes: list[str] = field(default_factory=list)  # lines about the settings, for the user
    settings_before: bytes | None = None  # settings.json of the run to resume, before this process wrote it
    try_threads: bool = False  # their number is not given, and one may be faster
    ranks: Ranks = field(default_factory=Ranks)
    base: dict[str, list[int]] = field(default_factory=dict)  # of adapters: what tells `weights` from others


def new_run(
    settings: Settings, out: str | Path | None = None, restart: bool = False, given: Collection[str] = ()
) -> Run:
    """Prepare a new run in the folder `out` (default: runs/MODEL-DATE-TIME). given: settings that are flags, where that
    is known."""
    settings = absolute_paths(settings)
    config, weights = model_config(settings)
    base = base_model(settings.model, settings.lora_rank)[1] if settings.lora_rank else {}
    settings, notes = with_defaults(settings, config, trained=weights is not None, given=given)
    check(settings, config)
    ranks, any_threads = arrange(settings, config), settings.threads is None
    settings, device = choose_device_and_threads(settings, ranks)
    tokenizer = load_tokenizer(settings.tokenizer or own_tokenizer(settings.model))
    fits_vocabulary(tokenizer, config, settings, weights)
    config, end = with_end_token(config, tokenizer, weights)
    check_memory(config, settings, device[0], ranks)
    check_disk(config, settings, Path("runs") if out is None else user_path(out))
    folder, new = ranks.from_first(lambda: make_folder(out, settings.model, restart))
    with ranks.agreed():
        lock = lock_folder(folder) if ranks.first else None
        if restart and ranks.first:
            forget_other_tokens(folder, settings)
    run = Run(settings, config, tokenizer, *device, folder, lock, new, *tokens_of(folder), weights, ranks=ranks)
    run.base = base
    run.try_threads = any_threads and device[0].type == "cpu" and not settings.step_in_backward and ranks.size == 1
    run.notes = [*notes, *end]
    if not weights and settings.model not in PRESETS:
        run.notes.insert(0, f"weights    random, as there are none in {settings.model}")
    return write_settings(run)


def resumed_run(resume: str | Path, options: dict, fall_back: bool = False) -> Run:
    """Prepare to resume from a run's latest checkpoint, or from a checkpoint; options: settings to change. fall_back:
    from the latest one that is not damaged, saying so."""
    everyone = start()
    folder, checkpoint = everyone.from_first(lambda: ckpt.locate(str(resume)))
    with everyone.agreed():
        lock = lock_folder(folder) if everyone.first else None
    if fall_back:
        checkpoint = ckpt.last_sound(checkpoint, everyone)
    state = ckpt.read_state(checkpoint, everyone)
    if missing := {"settings", "step", "data"} - state.keys():
        raise InputError(f"{checkpoint / 'state.json'} has no {', '.join(sorted(missing))}")
    if not ckpt.is_progress(state):
        raise InputError(f"{checkpoint / 'state.json'} is not the state of a run: a value has another type")
    settings = absolute_paths(settings_of(absolute_changes(options), state["settings"]))
    if "threads" not in options and began_elsewhere(folder / STARTS):
        settings = replace(settings, threads=None)
    config, _ = model_config(settings, checkpoint)
    check(settings, config, options)
    weights, base = None, {}
    if settings.lora_rank:
        weights, base = base_model(settings.model, settings.lora_rank, state)
    try:
        ranks = arrange(settings, config)
    except InputError as error:
        error.args = (str(error) + kept_division(settings, options, str(error)),)
        raise
    if settings.steps < state["step"]:
        raise InputError(f"--steps {settings.steps}: {checkpoint} has done {state['step']} already")
    settings, device = choose_device_and_threads(settings, ranks)
    tokenizer = load_tokenizer(checkpoint)
    fits_vocabulary(tokenizer, config, settings)
    check_memory(config, settings, device[0], ranks)
    check_disk(config, settings, folder, state["step"])
    changed = changes(from_json(state["settings"]), settings, state["step"])
    tokens = tokens_of(folder, data_folder := state.get("data_folder", DATA_FOLDER))
    if any(change["setting"] == "data" for change in changed):
        tokens = tokens_in(folder, new_data_folder(state["step"], {data_folder, *ckpt.data_folders(folder)})), False
        if ranks.first:
            shutil.rmtree(tokens[0].parent, ignore_errors=True)  # of a continuation that has no checkpoint
    run = Run(
        settings, config, tokenizer, *device, folder, lock, False, *tokens, weights, checkpoint, state, changed,
        ranks=ranks, base=base,
    )  # fmt: skip
    run.notes = [schedule_line(settings)]
    with suppress(OSError):
        run.settings_before = (folder / "settings.json").read_bytes()
    return write_settings(run)


def arrange(settings: Settings, config: LingConfig) -> Ranks:
    """The processes in the arrangement of the settings, which are the same in each, as are the versions."""
    everyone = start()
    everyone.compare(version_of_torch=torch.__version__, version_of_ling_kernels=__version__)
    everyone.compare(**{f"the_setting_{name}": value for name, value in to_json(settings).items()})
    s = settings
    if s.exchange_by_nodes:
        everyone.compare(processes_of_its_machine=os.environ.get("LOCAL_WORLD_SIZE"))
    ranks = everyone.arranged(**mesh_of(s), by_nodes=s.exchange_by_nodes, timeout=s.dist_timeout)
    with ranks.agreed():
        check_parallel(s, config, ranks)
    return ranks


def kept_division(settings: Settings, options: dict, error: str) -> str:
    """The end of an error's line where it names numbers of processes that are those of the run to resume, not given."""
    names = [
        name for name in ("dp", "dp_replicate", "cp", "tp", "ep", "vocab_parallel", "pp") if options.get(name) is None
    ]
    flags = {f"--{name.replace('_', '-')}": getattr(settings, name) for name in names}
    kept = [f"{flag} {n}" for flag, n in flags.items() if n not in (None, 1) and f"{flag} {n} " in error]
    return f"; the run to resume has {' and '.join(kept)}: give other numbers" if kept else ""


def choose_device_and_threads(
    settings: Settings, ranks: Ranks
) -> tuple[Settings, tuple[torch.device, str, torch.dtype]]:
    """The settings with the number of CPU threads, which is set; device, its name and the precision."""
    with ranks.agreed():
        device = choose_device(settings)
        check_exchange(settings.exchange, device[0])
    if settings.threads is None:
        free = ranks.from_first(lambda: min(torch.get_num_threads(), free_cores()))
        settings = replace(settings, threads=free)
    torch.set_num_threads(settings.threads)
    return settings, device


def with_faster_threads(run: Run, model: Ling, passed: Callable[[int], object]) -> Settings:
    """The run's settings, with 1 thread where a trial shows that it is faster; written, with a note for the user.
    passed: forward and backward of so many rows. The model is as before then."""
    s = run.settings
    rows = s.micro_batch or s.batch

    def one_pass() -> None:
        passed(rows)
        model.zero_grad()
        model.balance_(0.0)  # clears the counts

    if run.try_threads:
        threads, line = faster_threads(one_pass, s.threads, s.steps * s.batch // rows)
        run.settings = replace(s, threads=threads)
        run.notes += [line] if line else []
        write_settings(run)
    return run.settings


def write_settings(run: Run) -> Run:
    file = run.folder / "settings.json"
    with run.ranks.agreed():
        try:
            if run.ranks.first:
                file.write_text(json.dumps(to_json(run.settings), indent=2) + "\n")
        except OSError as error:
            raise InputError(f"cannot write {file}: {error.strerror}") from None
    return run


def tokens_of(folder: Path, data_folder: str = DATA_FOLDER) -> tuple[Path, bool]:
    path = tokens_in(folder, data_folder)
    return path, any(path.parent.glob("*.bin"))


def forget_other_tokens(folder: Path, settings: Settings) -> None:
    """Remove the tokens in the folder of a run that begins again, unless they are of the same data."""
    names = ("data", "val_data", "tokenizer", "model", "train_on", *TEXT_SETTINGS)
    with suppress(OSError, ValueError, TypeError, AttributeError, RecursionError):
        before = from_json(json.loads((folder / "settings.json").read_text()))
        if all(getattr(before, name) == getattr(settings, name) for name in names):
            return
    for kind in ("tokens", "validation"):
        for suffix in ("bin", "json"):
            for path in (folder / DATA_FOLDER).glob(f"{kind}*.{suffix}"):
                path.unlink()


def absolute_changes(options: dict) -> dict:
    """Settings with absolute paths, so that a run can be resumed from another working directory."""
    return {name: absolute(name, value) for name, value in plain_options(options).items()}


def absolute_paths(settings: Settings) -> Settings:
    names = ("data", "val_data", "tokenizer", "model", "schedule")
    return replace(settings, **{name: absolute(name, getattr(settings, name)) for name in names})


def absolute(name: str, value):
    if value is None:
        return None
    if name == "data":
        # A weight without a path would become one of the present folder.
        return tuple(s if s.startswith("=") and not os.path.exists(s) else os.path.abspath(s) for s in value)
    if name == "val_data":
        parts = [source.partition("=") for source in value]
        return tuple(f"{name}={os.path.abspath(path)}" if path else name for name, _, path in parts)
    if name == "schedule" and value.endswith(".csv"):
        return os.path.abspath(value)
    if name == "tokenizer" or (name == "model" and value not in PRESETS and os.path.exists(value)):
        return os.path.abspath(value)
    return value


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


def make_folder(
    out: str | Path | None, model: str, restart: bool, again: str = "--resume auto --out"
) -> tuple[Path, bool]:
    """An empty folder that can be written, and whether it is new. Raises InputError for a folder that holds anything,
    except, with `restart`, a run that stopped before its first checkpoint. again: the flags that begin such a run
    again, for the message."""
    folder = Path("runs") / f"{model_name(model)}-{time.strftime('%Y%m%d-%H%M%S')}" if out is None else user_path(out)
    if out is None:
        number, plain = 2, folder
        while folder.exists():
            folder, number = plain.with_name(f"{plain.name}-{number}"), number + 1
    folder = folder.absolute()
    new = not folder.exists()
    if folder.exists() and not folder.is_dir():
        raise InputError(f"--out {folder} is a file")
    ckpt.expect_folder(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if any(path.name != LOCK for path in folder.iterdir()) and not (
            restart and (folder / "settings.json").is_file()
        ):
            if ckpt.list_checkpoints(folder):
                remedy = f"--resume {folder} continues its run"
            elif (folder / "settings.json").is_file():
                remedy = f"{again} {folder} begins its run again"
            else:
                remedy = "name a new folder"
            raise InputError(f"--out {folder} is not empty: {remedy}")
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise InputError(f"cannot write to {folder}: {error.strerror or error}") from None
    return folder, new


def discard(run: Run) -> None:
    """Remove the files of a run that turns out to be impossible before its first step."""
    if not run.ranks.first:
        return
    if not run.had_tokens and run.tokens.parent.is_dir():
        for path in [*run.tokens.parent.glob("*.bin"), *run.tokens.parent.glob("*.json")]:
            path.unlink()
    if run.settings_before is not None:
        with suppress(OSError):
            (run.folder / "settings.json").write_bytes(run.settings_before)
    elif not run.checkpoint:
        (run.folder / "settings.json").unlink()
        if run.lock:
            run.lock.remove()
    with suppress(OSError):  # not empty, so it was there before
        run.tokens.parent.rmdir()
    if run.new_folder:
        shutil.rmtree(run.folder)
