"""Learning rate and batch size by step: a linear warm-up, then constant; a linear ramp of the batch."""

from ..errors import InputError


def learning_rate(step: int, lr: float, warmup: int) -> float:
    """For the step of this number, counted from 1: lr is reached at step `warmup` and kept."""
    return lr * min(1.0, step / warmup) if warmup else lr


def rows_at(step: int, batch: int, ramp: tuple[int, int] | None, multiple: int) -> int:
    """Rows in the step of this number, counted from 1; `ramp` is (rows in the first step, steps until `batch`)."""
    if ramp is None:
        return batch
    start, steps = ramp
    grown = (batch - start) * min(step - 1, steps) // steps
    return start + grown // multiple * multiple


def parse_ramp(text: str) -> tuple[int, int]:
    """START:STEPS"""
    start, colon, steps = text.partition(":")
    if not (colon and start.isdecimal() and steps.isdecimal() and int(steps) > 0):
        raise InputError(f"--batch-ramp {text!r} is not START:STEPS, two whole numbers")
    return int(start), int(steps)
