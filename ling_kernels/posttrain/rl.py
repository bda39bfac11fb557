"""python -m ling_kernels.posttrain.rl: reinforcement learning on a toy task, on one GPU or CPU."""

import shlex
import sys
import time
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path

from ..errors import Diverged, InputError, Parser, command
from ..train.flags import add_flag
from ..train.report import open_lines
from ..train.report.page import write_html
from ..train.saving import NotSaved
from ..train.signals import STOPPED, stop_on_signals
from .loop import Loop, LoopSettings
from .start import make_start
from .tasks import TASKS


@command
def main(argv: Sequence[str] | None = None) -> int:
    parser = Parser(
        "python -m ling_kernels.posttrain.rl",
        description="Train a model by reinforcement learning on a toy task that a program checks. Without --model it"
        " begins with a tiny one that is taught the task's format first. docs/posttraining.md explains it.",
    )  # fmt: skip
    parser.add_argument("--model", metavar="FOLDER", help="a model's folder to start from (default: a tiny one)")
    parser.add_argument("--start-steps", type=int, default=500, metavar="N", help="steps that teach the tiny one (500)")
    parser.add_argument("--out", metavar="RUN", help="folder of a new run (default: runs/rl-DATE-TIME)")
    parser.add_argument(
        "--resume", metavar="RUN", help="a run or a checkpoint to continue; with --steps for more steps"
    )
    for f in fields(LoopSettings):
        add_flag(parser.add_argument, f)
    options = vars(parser.parse_args(argv))
    model, out, resume, start_steps = (options.pop(k) for k in ("model", "out", "resume", "start_steps"))
    if resume:
        if model or out or options.keys() - {"steps"}:
            raise InputError("--resume goes with --steps alone: a run keeps its other settings")
        loop = Loop.resume(resume, **options)
    else:
        settings, out = LoopSettings(**options), Path(out or f"runs/rl-{time.strftime('%Y%m%d-%H%M%S')}")
        if start_steps < 1:
            raise InputError(f"--start-steps {start_steps}: it must be at least 1")
        start = out.with_name(f"{out.name}-start")
        if model is None and out.exists() and any(out.iterdir()):
            raise InputError(f"--out {out} is not empty: name a new folder, or --resume {out}")
        loop = Loop(
            settings, model or make_start(start, TASKS[settings.task], start_steps, settings.seed, say=print), out
        )
    try:
        return run(loop)
    finally:
        loop.close()


def run(loop: Loop) -> int:
    """Take the steps that are left, with a line and a record for each; checkpoints, the report and the model."""
    s, saved = loop.settings, loop.step_done
    print(
        f"run        {loop.folder}, {s.task}, {s.method}, steps {loop.step_done + 1} to {s.steps}; {loop.device_name}"
    )
    with open_lines(loop.folder / "metrics.jsonl", loop.step_done) as metrics, stop_on_signals() as received:
        while loop.step_done < s.steps and not received:
            try:
                record = loop.step()
            except Diverged as error:
                metrics.write(error.record)
                print(f"error: {error}; begin again with a lower --lr", file=sys.stderr)
                return 1
            metrics.write(record)
            print(line(record, s.steps), flush=True)
            if s.save_every and loop.step_done % s.save_every == 0:
                try:
                    loop.save()
                    saved = loop.step_done
                except NotSaved as error:
                    print(f"warning: {error}; training goes on, and tries again at the next checkpoint")
    if saved != loop.step_done:
        loop.save()
    if loop.step_done:
        print(f"report     {write_html(loop.folder)}")
    if received:
        print(f"stopped by {received[0]} after step {loop.step_done}; continue with")
        print(f"    python -m ling_kernels.posttrain.rl --resume {shlex.quote(str(loop.folder))}")
        return STOPPED
    loop.export(loop.folder / "model")
    print(f"model      {loop.folder / 'model'}")
    return 0


def line(record: dict, steps: int) -> str:
    failed = sum(number for name, number in record.items() if name.startswith("failed/"))
    return (
        f"step {record['step']:>{len(str(steps))}}/{steps}  reward {record['reward']:.3f}  answers of"
        f" {record['answer_tokens']:.1f} tokens  clipped {record['clipped']:.3f}  grad norm {record['grad_norm']:.2f}"
        f"  {record['seconds']:.1f} s" + (f"  {failed} rewards failed" if failed else "")
    )


if __name__ == "__main__":
    sys.exit(main())
