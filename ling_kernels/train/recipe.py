"""Recipes of several stages: python -m ling_kernels.train --recipe NAME trains them one after the other.

A recipe is a folder of files, recipes/NAME/1-pretrain.json and so on, in the order of their names:

    about      what the stage is
    settings   the trainer's settings, by name; those that are not given are the trainer's defaults
    sources    {name: share of the rows}, which add up to 1; a stage without them is not trained, it only writes the
               model with another rotary base or YaRN
    merge      {"best" or "last": N, "decay": name}: the stage's result is the merge of these checkpoints
    needles    lengths of the needle retrieval of the stage's model

Each stage is an ordinary run in OUT/STAGE, which begins from the weights of the one before, with new moments of the
optimizer. OUT/recipe.json says which stages are complete, so the same command goes on where it was stopped.
"""

import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch

from ..errors import InputError
from ..files import atomic_write, read_json, user_path
from ..model import LingConfig, load_model
from ..parallel.ranks import Ranks
from ..tokenizer import load_tokenizer
from .changes import DATA_FOLDER, first_value
from .checkpoint import list_checkpoints, step_of
from .corpus import open_corpus
from .data.toy import write_toy_sources
from .merge import chosen, merge, named_weights, validations
from .needle import check_needles, needle_line
from .prepare.checks import check
from .prepare.device import choose_device, deterministic
from .prepare.models import initial_config, with_positions
from .prepare.run import tokens_of
from .scaling import with_defaults
from .schedule import DECAYS, rows_at
from .settings import SIZES, Settings, from_json, plain_options
from .validation import bytes_of_tokens, measure
from .values import check_bounds

RECIPES = Path(__file__).parents[1] / "recipes"
STATE = "recipe.json"
MERGED = "merged"  # folder of a stage's merged weights
TOY = "tiny"  # the recipe that has sources of its own
KEYS = {"about": str, "settings": dict, "sources": dict, "merge": dict, "needles": list}
SHORTEST_NEEDLE = 32  # tokens of a text with a needle and its question
POSITIONS = {"rope_theta", "yarn"}  # settings of a stage that is not trained
FIRST_ONLY = {*SIZES, "model", "mtp", "vocab", "tokenizer"}  # of the flags that stand for all stages


@dataclass(frozen=True)
class Stage:
    name: str
    about: str
    settings: dict
    sources: dict[str, float] = field(default_factory=dict)
    merge: dict = field(default_factory=dict)
    needles: list[int] = field(default_factory=list)

    def with_flags(self, options: dict, first: bool) -> dict:
        """The stage's settings under the flags that the user gave for all stages."""
        return self.settings | {k: v for k, v in options.items() if first or k not in FIRST_ONLY}


def load_stages(recipe: str) -> list[Stage]:
    """The stages of a recipe of the package, or of a folder. Raises InputError for files that are no stages."""
    known = sorted(p.name for p in RECIPES.iterdir() if p.is_dir())
    folder = RECIPES / recipe if recipe in known else user_path(recipe)
    files = sorted(folder.glob("*.json")) if folder.is_dir() else []
    if not files:
        raise InputError(f"--recipe {recipe}: it must be {', '.join(known)}, or a folder of stages, NUMBER-NAME.json")
    stages = [read_stage(path) for path in files]
    if not stages[0].sources:
        raise InputError(f"{files[0]}: the first stage has no sources")
    for path, stage in zip(files[1:], stages[1:], strict=True):
        if taken := stage.settings.keys() & FIRST_ONLY:
            raise InputError(f"{path}: {min(taken)} is for the first stage, whose weights the others have")
    return stages


def read_stage(path: Path) -> Stage:
    content = read_json(path)
    if unknown := content.keys() - KEYS.keys():
        raise InputError(f"{path}: a stage has no {', '.join(sorted(unknown))}; it has {', '.join(sorted(KEYS))}")
    for key, value in content.items():
        if not isinstance(value, KEYS[key]):
            kind = {str: "text", dict: "an object", list: "a list"}[KEYS[key]]
            raise InputError(f"{path}: {key} is {value!r}, not {kind}")
    stage = Stage(path.stem, **{"about": "", "settings": {}} | content)
    try:
        plain_options(stage.settings)
        check_stage(stage)
    except InputError as error:
        raise InputError(f"{path}: {error}") from None
    return stage


def check_stage(stage: Stage) -> None:
    """Raise InputError for what no stage can have."""
    if stage.sources:
        if any(not name or "=" in name for name in stage.sources):
            raise InputError(f"a source's name is not empty and has no =: {', '.join(map(repr, stage.sources))}")
        if not all(type(w) in (int, float) and w > 0 for w in stage.sources.values()):
            raise InputError(f"the shares of the sources must be more than 0: {stage.sources}")
        if abs(sum(stage.sources.values()) - 1) > 1e-6:
            raise InputError(f"the shares of the sources add up to {sum(stage.sources.values()):g}, not to 1")
        if taken := stage.settings.keys() & {"data", "preset"}:
            raise InputError(f"{min(taken)} is not for a stage: its data are the sources")
    elif others := stage.settings.keys() - POSITIONS:
        raise InputError(f"a stage without sources is not trained, so {min(others)} has no effect")
    elif stage.merge:
        raise InputError("a stage without sources has no checkpoints to merge")
    if stage.merge:
        counts = [stage.merge[key] for key in ("best", "last") if key in stage.merge]
        right = len(counts) == 1 and stage.merge.keys() <= {"best", "last", "decay"}
        if not right or type(counts[0]) is not int or counts[0] < 1 or stage.merge.get("decay", "linear") not in DECAYS:
            raise InputError(f"merge is {stage.merge}: it must be best or last, a number of at least 1, and decay, one"
                             f" of {', '.join(DECAYS)}")  # fmt: skip
    for n in stage.needles:
        if type(n) is not int or n < SHORTEST_NEEDLE:
            raise InputError(f"needles are lengths of at least {SHORTEST_NEEDLE} tokens; {n!r} is none")


def check_settings(stages: Sequence[Stage], options: dict) -> None:
    """Raise InputError for what a stage would find out only when those before it are trained."""
    config: LingConfig | None = None
    for number, stage in enumerate(stages):
        try:
            s = Settings(**stage.with_flags(options, not number) if stage.sources else stage.settings)
            check_bounds(s)
            config = with_positions(config, s) if config else initial_config(s)[0]
            if stage.sources:
                s = with_defaults(s, config, trained=number > 0)[0]
                check(s, config)
            merged = stage.merge.get("best") or stage.merge.get("last") or 0
            if stage.merge and 0 < s.keep < merged:
                raise InputError(f"merge is of {merged} checkpoints, and keep {s.keep} keeps fewer: 0 keeps all")
            if stage.needles and max(stage.needles) > config.max_positions:
                raise InputError(f"needles of {max(stage.needles)} tokens are longer than the model's"
                                 f" {config.max_positions} positions")  # fmt: skip
        except InputError as error:
            raise InputError(f"stage {stage.name}: {error}") from None


def stage_tokens(settings: Settings) -> int:
    """Tokens of a run, with the ramp of its batch."""
    ramp = settings.ramp
    steps = min(ramp[1], settings.steps) if ramp else 0
    batch = settings.batch or 1
    rows = sum(rows_at(step, batch, ramp, settings.micro_batch or 1) for step in range(1, steps + 1))
    return (rows + (settings.steps - steps) * batch) * settings.seq_len


def table(recipe: str, options: dict) -> list[str]:
    """A recipe's stages as lines."""
    lines, stages = [], load_stages(recipe)
    check_settings(stages, options)
    for number, stage in enumerate(stages):
        lines.append(f"{stage.name}: {stage.about}")
        if stage.sources:
            values = stage.with_flags(options, not number)
            s = Settings(**values)
            mixture = " ".join(f"{name} {share:g}" for name, share in stage.sources.items())
            batch, lr = s.batch or "a batch by size", s.lr or "by size"
            lines.append(f"    {s.steps:,} steps of {batch} x {s.seq_len:,}, lr {lr}, {stage_tokens(s):,} tokens")
            lines.append(f"    of {mixture}")
        else:
            lines.append(f"    not trained: {stage.settings}")
    return lines


def sources_of(recipe: str, stages: Sequence[Stage], given: Sequence[str], folder: Path) -> dict[str, str]:
    """The absolute path of each source. Raises InputError where a stage's has none, or a name is of no source."""
    names = list(dict.fromkeys(name for stage in stages for name in stage.sources))
    paths = {}
    for text in given:
        name, equals, path = text.partition("=")
        if not equals or not path or name not in names:
            raise InputError(f"--source {text}: it must be NAME=PATH, with NAME one of {', '.join(names)}")
        paths[name] = str(user_path(path).absolute())
        if not Path(paths[name]).exists():
            raise InputError(f"--source {text}: there is no {path}")
    missing = [name for name in names if name not in paths]
    if missing and recipe == TOY:
        return {name: str(path) for name, path in write_toy_sources(folder / "sources").items()} | paths
    if missing:
        stage = next(stage for stage in stages if set(stage.sources) & set(missing))
        remedy = " ".join(f"{name}=FOLDER" for name in missing)
        raise InputError(f"--recipe {recipe} has no data for {', '.join(missing)}, the first of them in stage"
                         f" {stage.name}: give --source {remedy}")  # fmt: skip
    return paths


def begin(recipe: str, stages: Sequence[Stage], given: Sequence[str], folder: Path, options: dict) -> dict:
    """What recipe.json holds: the stages, where each source is, and the model of each complete stage."""
    file = folder / STATE
    try:
        if not file.is_file() and folder.is_dir() and any(p.name != "sources" for p in folder.iterdir()):
            raise InputError(f"--out {folder} is not empty, and no run of a recipe: name a new folder")
        names, before = [stage.name for stage in stages], read_json(file) if file.is_file() else {}
        if before and not (
            before.get("stages") == names
            and (not given or before.get("sources") == sources_of(recipe, stages, given, folder))
        ):
            raise InputError(f"{file} is of other stages or sources: name a new folder with --out")
        if before:
            return before
        check_settings(stages, options)
        state = dict(stages=names, sources=sources_of(recipe, stages, given, folder), done={})
        write_state(folder, state)
    except OSError as error:
        raise InputError(f"cannot write to {folder}: {error.strerror or error}") from None
    return state


def write_state(folder: Path, state: dict) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    with atomic_write(folder / STATE, durable=True) as partial:
        partial.write_text(json.dumps(state, indent=2) + "\n")


def run_recipe(
    recipe: str, given: Sequence[str], out: Path | None, options: dict, train_stage: Callable[[dict], int],
    everyone: Ranks,
) -> int:  # fmt: skip
    """Train the stages that are not complete; returns 0, or the exit code of the stage that stopped.

    given: NAME=PATH of sources. options: flags for all stages, sizes for the first. train_stage: the command with its
    options, which returns its exit code.
    """
    stages = load_stages(recipe)
    for name in ("data", "preset"):
        if name in options:
            raise InputError(
                f"--{name} is not for a recipe: --source gives the data, and the stages' files the settings"
            )
    folder = (user_path(out) if out else Path("runs") / f"recipe-{Path(recipe).name}").absolute()
    state = everyone.from_first(lambda: begin(recipe, stages, given, folder, options))
    model: str | None = None
    for number, stage in enumerate(stages):
        if stage.name not in state["done"]:
            print(f"\nstage      {stage.name}, {number + 1} of {len(stages)}: {stage.about}", flush=True)
            if stage.sources:
                begun = bool(list_checkpoints(folder / stage.name))  # its weights are there, and may have moved
                values = stage.with_flags(options, not number) | ({"model": model} if model and not begun else {})
                values["data"] = tuple(f"{state['sources'][name]}={share}" for name, share in stage.sources.items())
                if code := train_stage(values | dict(out=folder / stage.name, resume="auto")):
                    print(f"stage {stage.name} is not complete: the same command goes on with it")
                    return code
            state = everyone.from_first(partial(complete, stage, model, folder, state, everyone.size == 1))
        model = str(folder / state["done"][stage.name])
    print(*summary(folder, stages, state), f"model      {model}", sep="\n")
    return 0


def complete(stage: Stage, before: str | None, folder: Path, state: dict, validating: bool) -> dict:
    """Write the stage's model, check it, and note that the stage is complete. validating: also measure merged weights,
    by this process alone."""
    run = folder / stage.name
    if not stage.sources:
        model = extended(stage, before or "", run / "model")
    elif stage.merge:
        model = merged(stage, run)
    else:
        model = list_checkpoints(run)[-1]  # the weights in the precision of the masters
    state = state | {"done": state["done"] | {stage.name: str(model.relative_to(folder))}}
    if stage.merge and validating:
        state["validated"] = state.get("validated", {}) | {stage.name: validation_loss(run, model)}
    if stage.needles:
        rows = check_needles(model, stage.needles)
        print(*map(needle_line, rows), sep="\n")
        state["needles"] = state.get("needles", {}) | {stage.name: rows}
    write_state(folder, state)
    return state


def merged(stage: Stage, run: Path) -> Path:
    """RUN/merged, of at most as many checkpoints as the stage says."""
    out = run / MERGED
    if not out.is_dir():
        best, last = stage.merge.get("best"), stage.merge.get("last")
        losses = validations(run)
        there = sum(not best or step_of(c) in losses for c in list_checkpoints(run))
        folders = chosen(run, last and min(last, there), best and min(best, there))
        merge(folders, named_weights(stage.merge.get("decay", "linear"), len(folders)), out, "fp32")
        print(f"merged     {len(folders)} checkpoints, steps {', '.join(str(step_of(c)) for c in folders)}")
    return out


def validation_loss(run: Path, model: Path) -> float:
    """val_loss of a model, in nats per token, by the rows that a run's last step was validated with, on its device."""
    state = read_json(list_checkpoints(run)[-1] / "state.json")
    s = from_json(state["settings"])
    device, _, precision = choose_device(s)
    tokenizer, weights = load_tokenizer(model), load_model(model, torch.float32, device)
    first = first_value("val_data", state.get("changes", []), s.val_data)
    tokens, _ = tokens_of(run, state.get("data_folder", DATA_FOLDER))
    with deterministic():
        sets = open_corpus(s, tokenizer, weights.config.vocab_size, tokens, first).validation
        return measure(weights, sets, bytes_of_tokens(tokenizer), precision)["val_loss"]


def extended(stage: Stage, before: str, out: Path) -> Path:
    """The model of the stage before with the rotary base and YaRN of this one."""
    shutil.rmtree(out, ignore_errors=True)  # of a process that was killed
    config = with_positions(
        LingConfig.from_json(Path(before) / "config.json"), Settings(model=before, **stage.settings)
    )
    merge([before], [1.0], out, "bf16")
    config.to_json(out / "config.json")
    return out


def stage_loss(folder: Path, stage: str, state: dict) -> float | None:
    """The validation loss of the model that a stage has ended with, where it was measured."""
    if stage in state.get("validated", {}):
        return state["validated"][stage]
    losses = [*validations(folder / stage).values()]
    return None if state["done"].get(stage, "").endswith(MERGED) or not losses else losses[-1]


def summary(folder: Path, stages: Sequence[Stage], state: dict) -> list[str]:
    lines = [""]
    for stage in stages:
        losses = validations(folder / stage.name)
        if losses:
            step, last = [*losses.items()][-1]
            loss = stage_loss(folder, stage.name, state)
            text = f"step {step:,}: {last:.4f} nats of what its sources held out"
            if stage.merge:
                found = "not measured" if loss is None else f"{loss:.4f} nats of what its sources held out"
                text = f"merged: {found}; step {step:,}: {last:.4f}"
            lines.append(f"{stage.name:<20} {text}")
    return lines
