"""Reward functions in processes with a time limit: one that hangs or dies costs its answer, not the run."""

import json
import math
import selectors
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

from ..errors import InputError, one_line

WORKER = Path(__file__).with_name("reward_worker.py")
LARGEST = 3.4e38  # reward, which is fp32
EXIT = 1.0  # seconds that a process may take to exit after its last output
START = 120.0  # seconds in which a process must have imported the function's module


class Score(NamedTuple):
    value: Any  # a float, 0 where it failed; within `RewardProcesses` also a group's list
    failure: str | None = None  # timeout, died, raised or not a number
    message: str = ""  # of the exception, or how the process ended


class RewardProcesses:
    """Calls function(*arguments) -> float in `processes` processes, `timeout` seconds for each call.

    of_group: the function rewards several responses in a call, function(responses, ...) -> a float for each of them.
    function: of a module that can be imported, or "MODULE:FUNCTION"; its arguments are what JSON holds, as strings and
    numbers. What it prints goes to stderr. A process that takes longer or ends is replaced by another.
    Raises InputError for a function that cannot be imported. `close` ends the processes, as leaving `with` does.
    """

    def __init__(
        self, function: Callable[..., Any] | str, processes: int = 2, timeout: float = 5.0, of_group: bool = False
    ):  # fmt: skip
        self.module, self.name = import_name(function)
        if processes < 1 or not timeout > 0:
            raise InputError(f"a reward needs at least 1 process and a timeout above 0; got {processes} and {timeout}")
        self.timeout, self.of_group = timeout, of_group
        self.workers: list[Worker | None] = [None] * processes

    def __call__(self, calls: Sequence[Sequence[Any]]) -> list[Score]:
        """The score of each call's arguments, in their order; with `of_group` of each response of each call, which all
        fail together. Raises InputError for arguments that no JSON holds."""
        try:
            lines = [line_of(list(call)) for call in calls]
        except (TypeError, ValueError) as error:
            raise InputError(f"a reward's arguments are what JSON holds: {error}") from None
        try:
            scores = self.scores(lines)
        except BaseException:  # KeyboardInterrupt: the answers of these calls must not be taken for those of the next
            self.close()
            raise
        if not self.of_group:
            return scores
        each = [[s] * len(call[0]) if s.failure else map(Score, s.value) for call, s in zip(calls, scores, strict=True)]
        return [*chain.from_iterable(each)]

    def scores(self, lines: Sequence[bytes]) -> list[Score]:
        scores: list[Score | None] = [None] * len(lines)
        waiting = deque(range(len(lines)))
        with selectors.DefaultSelector() as selector:
            for i in range(min(len(self.workers), len(lines))):
                self.begin(i, waiting, lines, selector)
            while selector.get_map():
                keys = [key for key, _ in selector.select(self.until_deadline(selector))]
                late = [k for k in selector.get_map().values() if k.data[0].deadline <= time.monotonic()]
                for key in [*keys, *(k for k in late if k not in keys)]:
                    worker, number, i = key.data
                    score = worker.read() if key in keys else worker.ended("timeout", f"more than {self.timeout} s")
                    if score is None:  # half a line
                        continue
                    selector.unregister(key.fileobj)
                    scores[number] = score
                    if worker.process.returncode is not None:
                        self.workers[i] = None
                    self.begin(i, waiting, lines, selector)
        return [score for score in scores if score is not None]

    def begin(self, i: int, waiting: deque[int], lines: Sequence[bytes], selector) -> None:
        """Give process i the next call, if there is one."""
        if not waiting:
            return
        number = waiting.popleft()
        worker = self.workers[i] = self.workers[i] or Worker(self.module, self.name, self.of_group)
        worker.send(lines[number], self.timeout)
        selector.register(worker.process.stdout, selectors.EVENT_READ, (worker, number, i))

    def until_deadline(self, selector) -> float:
        """Seconds until the first call is late."""
        return max(0.0, min(key.data[0].deadline for key in selector.get_map().values()) - time.monotonic())

    def close(self) -> None:
        for worker in filter(None, self.workers):
            worker.ended("closed")
        self.workers = [None] * len(self.workers)

    def __enter__(self) -> "RewardProcesses":
        return self

    def __exit__(self, *_) -> None:
        self.close()


class Worker:
    """One process, which computes one reward at a time."""

    def __init__(self, module: str, name: str, of_group: bool):
        command = [sys.executable, str(WORKER)]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0)
        self.half = b""  # what has come of a line
        self.deadline = math.inf
        self.write(line_of([sys.path, module, name, of_group]))
        with selectors.DefaultSelector() as selector:
            selector.register(self.process.stdout, selectors.EVENT_READ)
            first = self.read() if selector.select(START) else self.ended("timeout", f"more than {START:.0f} s")
        if first is None or first.failure:
            self.ended("died")
            why = first.message if first else "it printed something else"
            raise InputError(f"the reward function {module}:{name} cannot be imported: {why}")

    def send(self, line: bytes, timeout: float) -> None:
        try:
            self.write(line)
        except BrokenPipeError:
            pass  # it has ended since its last answer, which `read` finds
        self.deadline = time.monotonic() + timeout

    def write(self, line: bytes) -> None:
        rest = memoryview(line)
        while rest:
            rest = rest[self.process.stdin.write(rest) :]  # type: ignore[union-attr]

    def read(self) -> Score | None:
        """The score that the process has written; None where its line is incomplete."""
        part = self.process.stdout.read(1 << 16)  # type: ignore[union-attr]
        self.half += part
        if not part:
            return self.ended("died")
        if not self.half.endswith(b"\n"):
            return None
        (line, self.half), self.deadline = (json.loads(self.half), b""), math.inf
        if "failure" in line:
            return Score(0.0, "raised", one_line(line["failure"]))
        value = line.get("value", 0.0)
        numbers = value if isinstance(value, list) else [value]
        within = all(abs(x) <= LARGEST for x in numbers)  # NaN is not either
        return Score(value) if within else Score(0.0, "not a number", str(value))

    def ended(self, failure: str, message: str = "") -> Score:
        """End the process, if it has not ended."""
        if failure == "died":  # it has closed its output, and its exit code says why
            with suppress(subprocess.TimeoutExpired):
                self.process.wait(EXIT)
        self.process.kill()
        code = self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout):
            pipe.close()  # type: ignore[union-attr]
        return Score(0.0, failure, message or f"exit code {code}")


def line_of(content: Any) -> bytes:
    return (json.dumps(content) + "\n").encode()


def import_name(function: Callable[..., Any] | str) -> tuple[str, str]:
    """Module and name by which another process imports a function."""
    if isinstance(function, str):
        module, colon, name = function.partition(":")
    else:
        module, colon = getattr(function, "__module__", None) or "", ":"
        name = getattr(function, "__qualname__", "<an object>")
    if not (module and colon and name) or "<" in name or module == "__main__":
        raise InputError(f"the reward function {function!r} must be one of a module that can be imported: no lambda, no"
                         " function inside another, none of the script itself")  # fmt: skip
    return module, name
