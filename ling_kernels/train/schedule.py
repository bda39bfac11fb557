"""What changes with the step: the learning rate and the rows of a step. Steps count from 1.

The learning rate rises over the warm-up, stays at `lr`, and with a decay falls towards `min_lr` over the last steps of
the run (WSD: warm-up, stable, decay). It depends on step and settings alone, so a resumed run needs no state for it;
more steps move the decay to their end.
"""

import math

from ..errors import InputError

DECAYS = {  # share of the run's decay that is done, from 0 to 1 -> share of lr - min_lr that is left
    "linear": lambda done: 1 - done,
    "1-sqrt": lambda done: 1 - math.sqrt(done),  # arXiv 2405.18392: better than linear in a short decay
    "cosine": lambda done: (1 + math.cos(math.pi * done)) / 2,
}
COOLDOWN = 5  # 1-sqrt takes 1/COOLDOWN of the steps, arXiv 2405.18392; linear and cosine all those after the warm-up


def decay_length(kind: str, given: int | None, warmup: int, steps: int) -> int:
    """The number of steps with a falling learning rate, the last ones of the run."""
    if kind == "none":
        return 0
    after_warmup = max(steps - warmup, 0)
    if given is not None:
        return given
    return min(max(steps // COOLDOWN, 1), after_warmup) if kind == "1-sqrt" else after_warmup


def learning_rate(
    step: int, lr: float, warmup: int, decay: str = "none", decay_steps: int = 0, min_lr: float = 0.0, steps: int = 0
) -> float:
    """Linear warm-up that reaches lr at step `warmup`, then constant; the last `decay_steps` of `steps` fall from lr,
    and min_lr would follow the last one."""
    if warmup and step < warmup:
        return lr * step / warmup
    done = step - 1 - (steps - decay_steps)
    if decay == "none" or done <= 0:
        return lr
    return min_lr + (lr - min_lr) * DECAYS[decay](done / decay_steps)


def rows_at(step: int, batch: int, ramp: tuple[int, int] | None, multiple: int) -> int:
    """Rows of a step. ramp: (rows of the first step, steps until `batch` rows), linear between, in multiples of
    `multiple`."""
    if ramp is None:
        return batch
    start, steps = ramp
    more = (batch - start) * min(step - 1, steps) // steps
    return start + more // multiple * multiple


def parse_ramp(text: str) -> tuple[int, int]:
    """Read "START:STEPS". Raises InputError for anything else."""
    start, colon, steps = text.partition(":")
    if not (colon and start.isdecimal() and steps.isdecimal() and int(steps) > 0):
        raise InputError(f"--batch-ramp {text!r} is not START:STEPS, two whole numbers")
    return int(start), int(steps)
