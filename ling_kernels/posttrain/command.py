"""What the commands of this room share: flags of the settings, a loop over the steps, what is written at the end."""

import shlex
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from ..commands import Parser
from ..errors import Diverged, InputError
from ..files import user_path
from ..train.flags import add_flag
from ..train.report import open_lines
from ..train.report.page import write_html
from ..train.saving import NotSaved
from ..train.signals import STOPPED, stop_on_signals
from .learner import Learner, LearnerSettings


def parser_of(module: str, about: str, kind: type[LearnerSettings], model: str) -> Parser:
    """The flags of a run. model: the help of --model."""
    parser = Parser(f"python -m ling_kernels.posttrain.{module}", description=about)
    parser.add_argument("--model", metavar="FOLDER", help=model)
    parser.add_argument("--out", metavar="RUN", help=f"folder of a new run (default: runs/{module}-DATE-TIME)")
    parser.add_argument(
        "--resume", metavar="RUN", help="a run or a checkpoint to continue; with --steps for more steps"
    )
    for f in fields(kind):
        add_flag(parser.add_argument, f)
    return parser


def main_of(kind: Any, module: str, about: str, line: Callable[[dict, int], str], argv: Sequence[str] | None) -> int:
    """The command of a Learner that is made from settings, a model and a folder."""
    parser = parser_of(module, about, kind.kind, "a model's folder to start from")
    options = vars(parser.parse_args(argv))
    model, out, resume = (options.pop(k) for k in ("model", "out", "resume"))
    if resume:
        learner = resumed(kind, resume, options, model or out)
    elif model is None:
        raise InputError("--model: name the folder of the model to start from")
    else:
        learner = kind(kind.kind(**options), model, new_out(out, module))
    return run(learner, module, kind.key, line)


def resumed(kind: Any, run: str, options: dict, others: Any) -> Any:
    """The Learner of --resume; options: the settings given."""
    if others or options.keys() - {"steps"}:
        raise InputError("--resume goes with --steps alone: a run keeps its other settings")
    return kind.resume(run, **options)


def new_out(out: str | None, module: str) -> Path:
    if out is not None:
        return user_path(out, "--out")
    return Path(f"runs/{module}-{time.strftime('%Y%m%d-%H%M%S')}")


def run(learner: Learner, module: str, what: str, line: Callable[[dict, int], str]) -> int:
    """Take the steps that are left, with a line and a record for each; checkpoints, the report and the model. Ends the
    learner. what: a word for the run's line."""
    try:
        return take_steps(learner, module, what, line)
    finally:
        learner.close()


def take_steps(learner: Learner, module: str, what: str, line: Callable[[dict, int], str]) -> int:
    s, saved, folder = learner.settings, learner.step_done, learner.folder
    print(f"run        {folder}, {what}, steps {learner.step_done + 1} to {s.steps}; {learner.device_name}")
    print(*learner.notes, sep="\n", end="\n" if learner.notes else "")
    with open_lines(folder / "metrics.jsonl", learner.step_done) as metrics, stop_on_signals() as received:
        while learner.step_done < s.steps and not received:
            try:
                record = learner.step()
            except Diverged as error:
                metrics.write(error.record)
                print(f"error: {error}; begin again with a lower --lr", file=sys.stderr)
                return 1
            metrics.write(record)
            print(line(record, s.steps), flush=True)
            if s.save_every and learner.step_done % s.save_every == 0:
                try:
                    learner.save()
                    saved = learner.step_done
                except NotSaved as error:
                    print(f"warning: {error}; training goes on, and tries again at the next checkpoint")
    if saved != learner.step_done:
        learner.save()
    if learner.step_done:
        print(f"report     {write_html(folder)}")
    if received:
        print(f"stopped by {received[0]} after step {learner.step_done}; continue with")
        print(f"    python -m ling_kernels.posttrain.{module} --resume {shlex.quote(str(folder))}")
        return STOPPED
    learner.export(folder / "model")
    print(f"model      {folder / 'model'}")
    if s.lora_rank:
        learner.export_adapter(folder / "adapter")
        print(f"adapter    {folder / 'adapter'}, in peft's format")
    return 0
