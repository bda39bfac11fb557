"""python -m ling_kernels.plan interval: the minutes or steps between two checkpoints, from what one costs and how often
a run fails.

With C the time that a save costs, s the time between saves, F the failures of a day and A the time to be back, all in
minutes, a day loses (arXiv 2510.22115, appendix A)

    E(s) = 1440 C / s + F s / 2 + F A,      least at s = sqrt(2880 C / F), Young's formula, where it is
                                            2 sqrt(720 C F) + F A.

It takes failures to be rare: at most one between two saves. Daly's (Future Generation Computer Systems 22, 2006) counts
failures that come again before the next save, at random times.
"""

import math
import sys
from collections.abc import Sequence
from functools import partial

from ..commands import Parser, command
from ..errors import InputError, counted

DAY = 1440  # minutes


def lost_minutes(every: float, save: float, failures: float, back: float = 0.0) -> float:
    """Minutes that a day loses with a save of `save` minutes every `every`, for so many failures a day, each of which
    takes `back` minutes until the run is where it began again."""
    return DAY * save / every + failures * every / 2 + failures * back


def young(save: float, failures: float) -> float:
    """The minutes between saves that lose least."""
    return math.sqrt(2 * DAY * save / failures)


def daly(save: float, failures: float) -> float:
    """The minutes of work between the end of a save and the begin of the next, for failures at random times."""
    mean = DAY / failures  # minutes between failures
    if save >= 2 * mean:
        return mean
    x = save / (2 * mean)
    return math.sqrt(2 * save * mean) * (1 + math.sqrt(x) / 3 + x / 9) - save


@command
def main(argv: Sequence[str] | None = None) -> int:
    flags = Parser(
        "python -m ling_kernels.plan interval", description="The time between two checkpoints that loses least."
    )
    add = partial(flags.add_argument, type=float, metavar="X")
    add("--save-seconds", required=True, help="for which a save holds up training")
    add("--failures", required=True, help="of the whole run in a day")
    add("--back-minutes", default=10.0, help="until a failed run trains again (default: 10)")
    add("--step-seconds", help="of a step, for --save-every")
    args = flags.parse_args(argv)
    for name in ("save_seconds", "failures", "back_minutes", "step_seconds"):
        value = getattr(args, name)
        least = name == "back_minutes"
        if value is not None and not (math.isfinite(value) and (value >= 0 if least else value > 0)):
            bound = "at least 0" if least else "more than 0"
            raise InputError(f"--{name.replace('_', '-')} {value:g}: it must be {bound}")
    save = args.save_seconds / 60
    every = young(save, args.failures)
    lost = lost_minutes(every, save, args.failures, args.back_minutes)
    print(f"a save every {every:.1f} minutes (Young), {daly(save, args.failures):.1f} of work between two (Daly)")
    print(f"lost {lost:.1f} minutes a day, {lost / DAY:.2%}: saves {save * DAY / every:.1f}, work done again"
          f" {args.failures * every / 2:.1f}, coming back {args.failures * args.back_minutes:.1f}")  # fmt: skip
    for factor in (0.5, 2):
        other = lost_minutes(factor * every, save, args.failures, args.back_minutes)
        print(f"a save every {factor * every:.1f} minutes would lose {other:.1f}")
    if args.step_seconds:
        steps = max(1, round(60 * every / args.step_seconds))
        print(f"--save-every {steps}: {counted(steps, 'step')} of {args.step_seconds:g} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
