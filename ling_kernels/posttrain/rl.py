"""python -m ling_kernels.posttrain.rl: reinforcement learning on a toy task, on one GPU or CPU."""

import sys
from collections.abc import Sequence

from ..commands import command
from ..errors import InputError
from .command import new_out, parser_of, resumed, run
from .loop import Loop, LoopSettings
from .start import make_start
from .tasks import TASKS

ABOUT = (
    "Train a model by reinforcement learning on a toy task that a program checks. Without --model it begins with a tiny"
    " one that is taught the task's format first. docs/posttraining.md explains it."
)


@command
def main(argv: Sequence[str] | None = None) -> int:
    parser = parser_of("rl", ABOUT, LoopSettings, "a model's folder to start from (default: a tiny one)")
    parser.add_argument("--start-steps", type=int, default=500, metavar="N", help="steps that teach the tiny one (500)")
    options = vars(parser.parse_args(argv))
    model, out, resume, start_steps = (options.pop(k) for k in ("model", "out", "resume", "start_steps"))
    if resume:
        return run(loop := resumed(Loop, resume, options, model or out), "rl", words(loop), line)
    settings, out = LoopSettings(**options), new_out(out, "rl")
    if start_steps < 1:
        raise InputError(f"--start-steps {start_steps}: it must be at least 1")
    if model is None:
        if out.exists() and (not out.is_dir() or any(out.iterdir())):
            raise InputError(f"--out {out} is not an empty folder: name a new one, or --resume {out}")
        start = out.with_name(f"{out.name}-start")
        model = make_start(start, TASKS[settings.task], start_steps, settings.seed, say=print)
    return run(loop := Loop(settings, model, out), "rl", words(loop), line)


def words(loop: Loop) -> str:
    return f"{loop.settings.task}, {loop.settings.method}"


def line(record: dict, steps: int) -> str:
    failed = sum(number for name, number in record.items() if name.startswith("failed/"))
    return (
        f"step {record['step']:>{len(str(steps))}}/{steps}  reward {record['reward']:.3f}  answers of"
        f" {record['answer_tokens']:.1f} tokens  clipped {record['clipped']:.3f}  grad norm {record['grad_norm']:.2f}"
        f"  {record['seconds']:.1f} s" + (f"  {failed} rewards failed" if failed else "")
    )


if __name__ == "__main__":
    sys.exit(main())
