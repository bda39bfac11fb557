"""How many CPU threads a run begins with: as many as there are cores that it may use and that others leave idle, or one
where a trial before the first step shows that it is faster, as with a small model or a core that is not really idle.

Sums of torch's products may depend on the number of threads. So a run keeps the number it began with, also when it is
resumed, and equals an uninterrupted one to the byte; on a machine with another number of cores it chooses anew, without
a trial.
"""

import json
import os
import time
from collections.abc import Callable
from pathlib import Path

import torch

TRIAL_SECONDS, TRIAL_SHARE = 2.0, 0.01  # that a trial may take at most: seconds, or a share of the run
SHORT = 10  # a run of fewer trials is too short for one
HOPELESS = 1.5  # one thread that takes so many times as long is not timed again
STARTS = "starts.jsonl"  # in a run's folder, see starts.py


def began_elsewhere(starts: Path) -> bool:
    """Whether the last line of a run's starts.jsonl is of a machine with another number of cores."""
    try:
        return json.loads(starts.read_text().splitlines()[-1])["cores"] != os.cpu_count()
    except (OSError, ValueError, LookupError, TypeError):
        return False


def faster_threads(one_pass: Callable[[], object], threads: int, passes: int) -> tuple[int, str | None]:
    """1 or `threads`, whichever takes less time for `one_pass`, and a line that says so; without a trial `threads` and
    None. It is set for torch. passes: of the run.

    A trial is at most three passes with `threads` and two with one, each of which takes at most `threads` times as
    long. That many seconds must be below TRIAL_SECONDS, or below TRIAL_SHARE of the run.
    """
    trial = 3 + 2 * threads  # passes with `threads` that take as long
    if threads < 2 or passes < SHORT * trial:
        return threads, None

    def timed(number: int) -> float:
        torch.set_num_threads(number)
        start = time.perf_counter()
        one_pass()
        return time.perf_counter() - start

    try:
        first = timed(threads)  # fills caches, and is not counted
        if trial * first > max(TRIAL_SECONDS, TRIAL_SHARE * passes * first):
            return threads, None
        many, one = timed(threads), timed(1)
        if one < HOPELESS * many:  # interleaved, as other programs come and go
            many, one = min(many, timed(threads)), min(one, timed(1))
    finally:
        torch.set_num_threads(threads)
    chosen, other = (1, threads) if one < many else (threads, 1)
    torch.set_num_threads(chosen)
    return chosen, (
        f"threads    {chosen}, faster than {other} in a trial: {1000 * min(one, many):.3g} ms a forward and backward"
        f" against {1000 * max(one, many):.3g}"
    )
