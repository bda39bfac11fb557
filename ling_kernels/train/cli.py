"""The command `python -m ling_kernels.train`: check the flags, train with reports and checkpoints, show the results."""

import os
import shlex
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, redirect_stdout, suppress
from pathlib import Path

import torch

from ..commands import command
from ..errors import Diverged, InputError, OtherRank, counted, one_line
from ..files import user_path
from ..parallel.adapters import write_adapter
from ..parallel.ranks import Ranks, is_lost_rank, rank_of_torchrun, start, stop
from . import checkpoint as ckpt
from .changes import described
from .flags import as_flags, parser
from .prepare import deterministic, latest_run, new_run, resumed_run
from .prepare.adapters import alpha_of
from .prepare.checks_parallel import schedule_of, stages_of
from .profiling import StepProfiler, recorded
from .recipe import run_recipe, table
from .report import SAMPLES, NoReport, Report, open_lines
from .report.page import write_html
from .report.plots import draw
from .sampling import sampled
from .saving import NotSaved, OtherNotSaved, last_good
from .settings import SIZES, Settings, settings_of, to_json
from .signals import STOPPED, interrupted_by_sigterm, stop_on_signals
from .starts import moe_layers, record_start
from .trainer import Trainer


@command
def main(argv: Sequence[str] | None, planner) -> int:
    """planner: the module ling_kernels.plan.train, for --plan. It is above this room and comes as an argument."""
    try:
        options = vars(parser().parse_args(argv))
        recipe, sources = options.pop("recipe"), options.pop("source")
        if sources and not recipe:
            raise InputError("--source is for --recipe: without one, --data gives the data")
        if options["plan"] and rank_of_torchrun():
            return 0  # rank 0 prints the plan
        if recipe:
            return staged(recipe, sources or [], options, planner)
        if options.pop("plan"):
            if options.pop("resume"):
                raise InputError("--plan is for a new run: leave --resume out")
            options.pop("out")
            return planner.show(options)
        with deterministic(), interrupted_by_sigterm(), processes() as everyone:
            return run(options, planner, everyone)
    except KeyboardInterrupt:
        print("stopped before the first step; nothing was trained", file=sys.stderr)
        return STOPPED
    except NotSaved as error:
        if not isinstance(error, OtherRank):
            print(f"error: {error}", file=sys.stderr)
        return 1
    except torch.OutOfMemoryError as error:
        why = str(error).split(". ")[0]
        print(f"error: the GPU's memory is full, a smaller --micro-batch needs less: {why}", file=sys.stderr)
        return 1


def staged(recipe: str, sources: list[str], options: dict, planner) -> int:
    """A recipe of several stages: --plan shows them; otherwise each stage that is not complete is a run."""
    out, plan, resume = (options.pop(name) for name in ("out", "plan", "resume"))
    if resume:
        raise InputError("--resume is not for a recipe: the same command goes on where it was stopped")
    if plan:
        print(*table(recipe, options), sep="\n")
        return 0
    with deterministic(), interrupted_by_sigterm(), processes() as everyone:
        return run_recipe(recipe, sources, out, options, lambda stage: run(stage, planner, everyone), everyone)


@contextmanager
def processes() -> Iterator[Ranks]:
    """The processes that torchrun started; only rank 0 prints inside, but for errors."""
    everyone = start()
    with ExitStack() as quiet:
        if not everyone.first:
            quiet.enter_context(redirect_stdout(quiet.enter_context(open(os.devnull, "w"))))
            quiet.enter_context(warnings.catch_warnings(action="ignore"))
        try:
            yield everyone
        except RuntimeError as error:
            if not is_lost_rank(error):
                raise
            rank = f"rank {everyone.rank} of {everyone.size}"
            print(f"error: {rank} waited in vain for another: {one_line(str(error))}", file=sys.stderr)
            os._exit(1)  # the groups cannot be taken down in order, as others wait in them
    stop()


def run(options: dict, planner, everyone: Ranks) -> int:
    with everyone.agreed():
        trainer = open_run(options, everyone)
    for path in trainer.superseded:
        print(f"a later checkpoint is kept as {path.name}")
    for change in trainer.changes:
        print(described(change))
    print_header(trainer)
    record_start(trainer)
    with everyone.agreed():
        report = report_of(trainer)
    try:
        stopped = train(trainer, report)
    except Diverged as error:
        way = way_back(trainer)
        if everyone.first:
            print(f"error: {error}; {way}", file=sys.stderr)
        return 1
    finally:
        report.close()
        if everyone.first:
            write_page(trainer.folder)
    if stopped:
        print(f"stopped by {stopped} after step {trainer.progress.step}; continue with")
        print(f"    {python('train')} --resume {shlex.quote(shown(trainer.folder))}")
        return STOPPED
    try:
        finish_run(trainer, planner)
    except KeyboardInterrupt:
        print(f"stopped while writing the results; --resume {shown(trainer.folder)} writes them", file=sys.stderr)
        return STOPPED
    return 0


def report_of(trainer: Trainer) -> Report | NoReport:
    """Rank 0 writes and prints. Raises InputError where wandb cannot begin."""
    s = trainer.settings
    if not trainer.ranks.first:
        return NoReport()
    return Report(trainer.folder, trainer.progress.step, s.steps, s.log_every, s.wandb, to_json(s))


def way_back(trainer: Trainer) -> str:
    """What may repair a run that has diverged."""
    with suppress(NotSaved):
        trainer.writer.wait()
    found = {ckpt.step_of(c): c for c in ckpt.list_checkpoints(trainer.folder)}
    good = last_good(sorted(found), trainer.progress.proven)
    if good is None:
        last = f" (the last is {found[max(found)]})" if found else ""
        return f"no checkpoint is known to be good{last}: begin again with a lower --lr or a longer --warmup"
    lower = f"--lr {trainer.settings.lr / 4:.2g}"
    return f"the last good checkpoint is {found[good]}: --resume it with a lower rate, such as {lower}, or --clip 0.5"


def open_run(options: dict, everyone: Ranks) -> Trainer:
    """The run that the flags name, new or to be resumed."""
    out, resume, restart, fall_back = options.pop("out"), options.pop("resume"), False, False
    if resume == "":
        raise InputError("--resume is empty: name a run, or auto")
    if out is not None:
        out = user_path(out, "--out")
    everyone.compare(**{"--out": out, "--resume": resume})
    if resume == "auto":
        model = settings_of(options).model
        resume = everyone.from_first(lambda: latest_run(out, model))
        restart, out, fall_back = out is not None and resume is None, None if resume else out, True
    if resume and out:
        raise InputError("--out is for a new run and --resume for an existing one: give one of the two")
    if resume:
        return Trainer.of(resumed_run(resume, options, fall_back))
    return Trainer.of(new_run(settings_of(options), out, restart, given=options))


def train(trainer: Trainer, report: Report | NoReport) -> str | None:
    """Train up to settings.steps with validations and checkpoints. Returns the name of the signal that stopped it, if
    one did; a checkpoint is written then too. Raises Diverged, and NotSaved where the last checkpoint cannot be
    written; at another one training goes on, and tries again at the next."""
    s, progress = trainer.settings, trainer.progress
    saved: int | None = progress.step
    profiler = profiler_of(trainer, report)

    @contextmanager
    def going_on() -> Iterator[None]:
        """A checkpoint that cannot be written is one line: the disk may have room at the next."""
        nonlocal saved
        try:
            yield
        except NotSaved as error:
            saved = None
            then = (
                "training goes on, and tries again at the next checkpoint" if progress.step < s.steps else "once more"
            )
            report.say(f"warning: {error}; {then}")

    def save() -> None:
        nonlocal saved
        report.expert_load(progress.step)
        with going_on():
            trainer.writer.wait()
        with going_on():
            trainer.save(wait=False)
            saved = progress.step

    with stop_on_signals() as received:
        while progress.step < s.steps and not trainer.ranks.any(bool(received)):
            profiler.begin(progress.step + 1)
            try:
                record = trainer.step()
            except Diverged as error:
                report.step(error.record, trainer.details)
                raise
            profiled = profiler.end(progress.step)
            validating = progress.step == s.steps or due(progress.step, s.eval_every)
            if validating:
                record |= trainer.evaluate()
            report.step(record, trainer.details)
            for line in profiled:
                report.say(line)
            with going_on():
                trainer.writer.poll()
            if due(progress.step, s.sample_every) and progress.step < s.steps:  # the last sample is finish_run's
                if text := sampled(trainer):
                    report.sample(progress.step, *text)
            if due(progress.step, s.save_every):
                save()
            elif validating:
                report.expert_load(progress.step)
            if validating and progress.step < s.steps and trainer.ranks.first:  # the last is finish_run's
                write_page(trainer.folder, report.say)
        for line in profiler.stop(progress.step):
            report.say(line)
        with going_on():
            trainer.writer.wait()
        if trainer.ranks.any(progress.step != saved):
            report.expert_load(progress.step)
            trainer.save()
    return next(filter(None, trainer.ranks.exchange(received[0] if received else None)), None)


def profiler_of(trainer: Trainer, report: Report | NoReport) -> StepProfiler:
    """Records --profile's steps of rank 0 once in a run, and again where a resumed run changes their number."""
    s, folder, number = trainer.settings, trainer.folder / "profile", trainer.settings.profile * trainer.ranks.first
    changed = any(change["setting"] == "profile" for change in trainer.changes)
    if number and not changed and (steps := recorded(folder)):
        report.say(f"profile    {steps} was recorded before, in {shown(folder)}; another --profile N records again")
        number = 0
    return StepProfiler(folder, trainer.progress.step, number, s.steps, trainer.device)


def write_page(run: Path, say: Callable[[str], None] = print) -> Path | None:
    """Write report.html; a line where that fails, as training matters more."""
    try:
        return write_html(run)
    except InputError as error:
        say(f"warning: {error}")
        return None


def due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


def print_header(trainer: Trainer) -> None:
    s, training, held_out = trainer.settings, trainer.training, trainer.held_out
    total, active = trainer.config.num_parameters(mtp=True), trainer.config.num_active_parameters()
    ranks, peak = trainer.ranks, f"{trainer.peak / 1e12:.4g} TFLOP/s ({trainer.peak_source})"
    sizes = as_flags({name: value for name in SIZES if (value := getattr(s, name)) is not None})
    print(f"model      {' '.join([s.model, sizes]).strip()}: {total:,} parameters, {active:,} active in a token")
    print(
        f"data       {training.tokens:,} tokens of {counted(len(training), 'document')} to train on,"
        f" {held_out.tokens:,} of {counted(len(held_out), 'document')} to validate on"
    )
    for text in trainer.corpus.lines():
        print(text)
    print(f"device     {trainer.device_name}, {str(trainer.precision)[6:]}, peak {peak}")
    if ranks.size > 1:
        print(f"processes  {ranks.size}: {', '.join(divided(s, trainer))}")
    done = trainer.progress.step
    steps = f"steps {done + 1} to {s.steps}" if done < s.steps else f"all {s.steps} steps are done: --steps N goes on"
    print(f"run        {shown(trainer.folder)}, {steps}")
    print(*trainer.notes, sep="\n", end="\n" if trainer.notes else "", flush=True)


def divided(s: Settings, trainer: Trainer) -> Iterator[str]:
    """What the processes divide."""
    ranks = trainer.ranks
    yield f"{ranks.dp} divide the rows"
    divisions = (ranks.experts, "the experts"), (ranks.vocabulary, "the vocabulary"), (ranks.tensor, "heads and MLPs")
    groups = [(division.number, what) for division, what in divisions] + [(ranks.cp, "the tokens of a row")]
    yield from (f"groups of {number} {what}" for number, what in groups if number > 1)
    if ranks.copies > 1:
        yield f"{ranks.copies} copies of the optimizer's state, each of {ranks.copy_size}"
    if ranks.pp > 1:
        layout = stages_of(s, trainer.config)
        yield f"{ranks.pp} the layers, {layout}, in the order {s.schedule or schedule_of(s, layout)}"


def finish_run(trainer: Trainer, planner) -> None:
    """Export the model, draw the plots, generate a sample, and print where everything is. Raises NotSaved."""
    folder, config = trainer.folder, trainer.config
    if trainer.device.type == "cuda":
        peak = torch.cuda.max_memory_allocated(trainer.device)
        known = trainer.ranks.size == 1 and not trainer.settings.lora_rank
        planned = planner.plan_training(config, trainer.settings).peak if known else None
        print(f"memory     {peak / 1e9:.2f} GB at the peak" + (f", {planned / 1e9:.2f} planned" if planned else ""))
    try:
        trainer.export(folder / "model")
        if trainer.settings.lora_rank and trainer.ranks.first:
            s, last = trainer.settings, ckpt.list_checkpoints(folder)[-1]
            write_adapter(last, folder / "adapter", s.model, s.lora_rank, alpha_of(s), trainer.base)
        if merged := trainer.merge.complete:
            trainer.merge.write(folder / "merged", trainer.shares, trainer.tokenizer)
    except InputError as error:
        kind = OtherNotSaved if isinstance(error, OtherRank) else NotSaved
        raise kind(f"{error}; the weights are in {ckpt.list_checkpoints(folder)[-1]}") from None
    text = sampled(trainer)
    if not trainer.ranks.first:
        return
    try:
        plots, no_plots = draw(folder, moe_layers(config)), "matplotlib is missing (pip install '.[train]')"
    except OSError as error:
        plots, no_plots = [], str(error)
    if text:
        prompt, text = text
        with open_lines(folder / SAMPLES, trainer.progress.step - 1) as file:
            file.write(dict(step=trainer.progress.step, prompt=prompt, text=text))
        print(f"\nA sample that continues {prompt!r}:\n{text}\n")
    print(f"checkpoint {shown(ckpt.list_checkpoints(folder)[-1])}")
    print(f"model      {shown(folder / 'model')}")
    if trainer.settings.lora_rank:
        print(f"adapter    {shown(folder / 'adapter')}, in peft's format")
    if merged:
        print(f"merged     {shown(folder / 'merged')}, {counted(len(trainer.merge.plan), 'step')}")
    elif (folder / "merged").exists():
        print(f"merged     not written: {shown(folder / 'merged')} is older than this model")
    if page := write_page(folder):
        print(f"report     {shown(page)}")
    for path in plots:
        print(f"plot       {shown(path)}")
    if not plots:
        print(f"plot       none: {no_plots}")
    prompt = "--chat --prompt 'Hello'" if trainer.held_out.masks else "--prompt 'The '"
    print("\nThe model continues a text with")
    print(f"    {python('generate')} --model {shlex.quote(shown(folder / 'model'))} {prompt}")


def python(module: str) -> str:
    return f"{shown(Path(sys.executable))} -m ling_kernels.{module}"


def shown(path: Path) -> str:
    """The path relative to the working directory where it is below it."""
    relative = os.path.relpath(path)
    return str(path) if relative.startswith("..") else relative
