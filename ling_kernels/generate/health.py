"""Whether an engine's passes succeed: what a server's health is read from."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from ..errors import LostRank, one_line

FAILURES = 3  # failed passes in a row after which an engine counts as failing
PROBES = 10  # failed probes without a good pass between after which it counts as dead


class PassRecord:
    """The passes of an engine. Times are of time.monotonic()."""

    def __init__(self):
        self.started: float | None = None  # of the pass that runs now
        self.failures = 0  # passes in a row that failed, or whose logits were all NaN
        self.error: Exception | None = None  # of the last of them
        self.failed_probes = 0  # since the last good pass, see `Service.probe`
        self.on_pass: Callable[[float], None] | None = None  # is called with the seconds of every pass

    @contextmanager
    def running(self) -> Iterator[None]:
        self.started = start = time.monotonic()
        try:
            yield
        finally:
            self.started = None
            if self.on_pass is not None:
                self.on_pass(time.monotonic() - start)

    def fail(self, error: Exception) -> None:
        self.failures, self.error = self.failures + 1, error

    def succeed(self) -> None:
        self.failures, self.error, self.failed_probes = 0, None, 0

    def stuck_for(self) -> float:
        """Seconds since the running pass began; 0 where none runs."""
        started = self.started
        return 0.0 if started is None else time.monotonic() - started

    @property
    def fault(self) -> str | None:
        """What is wrong with the engine, in one line; None while it works."""
        if self.error is None or (self.failures < FAILURES and not self.dead):
            return None
        times = "the last pass" if self.failures == 1 else f"the last {self.failures} passes"
        return f"{times} failed: {one_line(str(self.error)[:200])}"

    @property
    def dead(self) -> bool:
        """Whether to give the engine up: a CUDA error stays until the process ends, a lost rank is lost, and what made
        PROBES probes fail (NaN weights, memory that others hold) does not pass by itself."""
        lasting = isinstance(self.error, torch.AcceleratorError | LostRank) or str(self.error).startswith("CUDA error")
        return lasting or self.failed_probes >= PROBES
