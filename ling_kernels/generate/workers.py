"""The other processes of an engine whose model is divided over several, as rank 0 sees them.

Rank 0 starts `python -m ling_kernels.generate.worker` for each, on its own machine, and sends it messages over a socket
that they inherit: (name, content), pickled. Only rank 0 has the other end, so that a worker sees the end of rank 0,
however it comes, as the end of the socket, and ends too; and rank 0 sees a worker's end.
"""

import queue
import subprocess
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from typing import Any

from ..errors import InputError, LostRank, one_line
from ..parallel.ranks import is_lost_rank

KILL_AFTER = 5.0  # seconds that a worker has to end
SEEN_WITHIN = 5.0  # seconds in which the end of a process is seen after a message to it, or an all-reduce, has failed


class Worker:
    def __init__(self, rank: int, connection: Connection, process: subprocess.Popen):
        self.rank, self.connection, self.process = rank, connection, process
        self.replies: queue.SimpleQueue = queue.SimpleQueue()  # (name, content), or None when it has ended
        self.copies = 0  # of pages that it has made, see divided_pages.py


class Workers:
    """Ranks 1 to n - 1. `on_loss(error)` is called in a thread, once, when one has ended; then `lost` is set."""

    def __init__(self, n: int):
        self.n, self.closing = n, False
        self.lost: LostRank | None = None
        self.on_loss: Callable[[LostRank], None] = lambda error: None
        self.lock, self.noticed = threading.Lock(), threading.Event()
        self.changed = threading.Condition()  # of copies, lost and closing
        self.workers: list[Worker] = []
        for rank in range(1, n):
            lead, follower = Pipe()
            with follower:
                self.workers.append(Worker(rank, lead, start_process(follower, rank)))
        for worker in self.workers:
            threading.Thread(target=self.watch, args=[worker], daemon=True).start()

    def watch(self, worker: Worker) -> None:
        """Receive a worker's messages until it ends."""
        why = None
        try:
            while True:
                message = worker.connection.recv()
                if message[0] == "copied":
                    with self.changed:
                        worker.copies += 1
                        self.changed.notify_all()
                    continue
                if message[0] == "failed":
                    why = message[1]
                worker.replies.put(message)
        except (EOFError, OSError):
            pass
        worker.replies.put(None)
        if not self.closing:
            try:
                code = f"with exit code {worker.process.wait(KILL_AFTER)}"
            except subprocess.TimeoutExpired:
                code = "but its process runs"
            self.lose(f"rank {worker.rank} of {self.n} " + (f"has failed: {why}" if why else f"has ended {code}"))

    def lose(self, why: str) -> LostRank:
        """Say that the ranks cannot go on; the first reason stays."""
        with self.lock:
            if self.lost is None:
                self.lost = LostRank(f"{why}; the engine's {self.n} processes cannot go on")
                self.noticed.set()
                with self.changed:
                    self.changed.notify_all()
                self.on_loss(self.lost)
            return self.lost

    def check(self) -> None:
        if self.lost is not None:
            raise self.lost

    def send(self, name: str, content: Any) -> None:
        """Send a message to all. Raises LostRank."""
        self.check()
        for worker in self.workers:
            try:
                worker.connection.send((name, content))
            except OSError:
                self.noticed.wait(SEEN_WITHIN)
                raise self.lose(f"rank {worker.rank} of {self.n} does not listen") from None
            except BaseException as error:  # Ctrl-C: some ranks have the message, others have not
                self.failed(error)
                raise

    def receive(self, name: str) -> list[Any]:
        """What each answers under this name. Raises LostRank, and InputError for bad input that one reports."""
        answers = []
        for worker in self.workers:
            message = worker.replies.get()
            if message is None or message[0] == "failed":
                self.noticed.wait(SEEN_WITHIN)
                raise self.lost or LostRank(f"rank {worker.rank} has ended")
            if message[0] == "refused":
                raise InputError(f"rank {worker.rank}: {message[1]}")
            if message[0] != name:
                raise AssertionError(f"rank {worker.rank} answers {message[0]}, not {name}")
            answers.append(message[1])
        return answers

    @property
    def cannot_go_on(self) -> bool:
        return self.lost is not None or self.closing

    def have_copied(self, number: int) -> bool:
        """Whether each has made so many copies of pages."""
        return all(worker.copies >= number for worker in self.workers)

    def wait_for_copies(self, number: int) -> None:
        """Wait until each has made so many, or they cannot go on."""
        with self.changed:
            self.changed.wait_for(lambda: self.have_copied(number) or self.cannot_go_on)

    def failed(self, error: BaseException) -> LostRank:
        """What an error of a pass on rank 0 means: another rank may have ended, or waits for this one for ever."""
        message = one_line(str(error) or type(error).__name__)
        if isinstance(error, RuntimeError) and is_lost_rank(error):
            self.noticed.wait(SEEN_WITHIN)
            return self.lose(f"a rank of {self.n} does not answer: {message}")
        return self.lose(f"rank 0 of {self.n} has failed: {message}")

    def close(self) -> None:
        """End all."""
        with self.changed:
            self.closing = True
            self.changed.notify_all()
        for worker in self.workers:
            with suppress(OSError):
                worker.connection.send(("end", None))
        for worker in self.workers:
            try:
                worker.process.wait(KILL_AFTER)
            except subprocess.TimeoutExpired:
                worker.process.kill()
                worker.process.wait()
            worker.connection.close()


def start_process(connection: Connection, rank: int) -> subprocess.Popen:
    """A process that follows this end of a connection, apart from the terminal's signals."""
    command = [sys.executable, "-m", "ling_kernels.generate.worker", str(connection.fileno()), str(rank)]
    return subprocess.Popen(command, pass_fds=[connection.fileno()], stdin=subprocess.DEVNULL, start_new_session=True)
