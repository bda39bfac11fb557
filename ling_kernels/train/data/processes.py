"""A function of many batches, in processes, since Python's lock allows the threads of one process a single core.

A process is a new Python that imports no torch. It is started as a command, so that neither threads of this process nor
its main module matter, and talks by its standard input and output: where this process ends, however that happens, its
input ends, and so does it.
"""

import os
import pickle
import subprocess
import sys
from collections import deque
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import chain, islice
from queue import SimpleQueue
from typing import Any

from ...errors import InputError
from .cores import free_cores

ALONE = 8  # batches, before processes are worth the time of their start
MOST = 16  # processes, which one that reads and writes can keep busy
AHEAD = 2  # batches that wait, beside one in each process
SERVE = "import sys; sys.path[:] = sys.argv[1:]; from ling_kernels.train.data.processes import serve; serve()"


def in_order(function: Callable, batches: Iterator, alone: bool = False) -> Generator[Any, None, None]:
    """function(batch) of each batch, in order.

    This process does the first ones, with `alone` all. Then as many processes as there are free cores take the
    function, with what it has learned, by pickle. Raises what the function raises, and InputError where a process is
    killed. To be closed unless it is read to its end, as the processes end then.
    """
    yield from map(function, batches if alone else islice(batches, ALONE))
    rest = [*islice(batches, 1)]
    number = min(free_cores(), MOST) if rest and sys.executable else 1
    batches = chain(rest, batches)
    if number == 1:
        yield from map(function, batches)
        return
    with ThreadPoolExecutor(number) as threads, processes(function, number) as call:
        waiting: deque = deque()
        for batch in batches:
            waiting.append(threads.submit(call, batch))
            if len(waiting) == number + AHEAD:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


@contextmanager
def processes(function: Callable, number: int) -> Iterator[Callable]:
    """The function, done in one of `number` processes, for calls in as many threads; without waiting for the last of
    them they are killed at the end."""
    content = pickle.dumps(function)
    started: list[Process] = []
    idle: SimpleQueue = SimpleQueue()

    def call(batch: Any) -> Any:
        process = idle.get()
        try:
            return process.call(batch)
        finally:
            idle.put(process)

    try:
        for _ in range(number):
            started.append(Process())
            idle.put(started[-1])
        for process in started:
            process.send(content)
        yield call
    finally:
        for process in started:
            process.end()


class Process:
    def __init__(self):
        # A session of its own, as Ctrl-C in a terminal is for this process alone, which then ends the others.
        try:
            self.popen = subprocess.Popen(
                [sys.executable, "-c", SERVE, *sys.path], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                env=os.environ | {"RAYON_NUM_THREADS": "1"}, start_new_session=True,
                creationflags=getattr(subprocess, "CREATE_NEW_PROCESS_GROUP", 0),
            )  # fmt: skip
        except OSError as error:
            raise InputError(f"cannot start a process that tokenises: {error}") from None

    def send(self, content: bytes) -> None:
        try:
            self.popen.stdin.write(content)
            self.popen.stdin.flush()
        except OSError:
            raise self._fault() from None

    def call(self, batch: Any) -> Any:
        self.send(pickle.dumps(batch))
        try:
            result, error = pickle.load(self.popen.stdout)
        except (OSError, EOFError, pickle.UnpicklingError):
            raise self._fault() from None
        if error is not None:
            raise error
        return result

    def _fault(self) -> InputError:
        code = self.popen.wait()
        why = f"signal {-code}, as where memory is full" if code < 0 else f"exit code {code}"
        return InputError(f"a process that tokenises was ended by {why}; the data is not written")

    def end(self) -> None:
        self.popen.kill()
        self.popen.wait()
        for file in (self.popen.stdin, self.popen.stdout):
            try:
                file.close()
            except OSError:  # what was not sent
                pass


def serve() -> None:
    """The work of a process."""
    batches, results = sys.stdin.buffer, os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what a function prints
    try:
        function = pickle.load(batches)
        while True:
            batch = pickle.load(batches)
            try:
                answer = function(batch), None
            except Exception as error:
                answer = None, error
            pickle.dump(answer, results)
            results.flush()
    except (EOFError, OSError):  # nobody asks any more
        pass
