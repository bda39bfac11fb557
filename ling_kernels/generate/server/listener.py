"""A listening socket that bounds the connections without a whole request, each of which holds a file descriptor.

Without a bound, clients that connect and send nothing take all descriptors, and nobody else can connect.
"""

import contextlib
import errno
import os
import resource
import socket
import sys
import time
from collections import Counter

EXHAUSTED = (errno.EMFILE, errno.ENFILE)
QUIET = 60.0  # seconds between two lines about refused connections
AT_ONCE = 100  # connections that are refused before other events have their turn


def raise_descriptors() -> None:
    """Raise the soft limit of open files, often 1024, to the hard one."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(OSError, ValueError):  # macOS has a hard limit that it does not allow
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


class Waiting:
    """The connections without a whole request: at most three quarters of the descriptors, and half for an address.

    A connection is known by its descriptor. Between two requests it waits, too.
    """

    def __init__(self) -> None:
        soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        descriptors = sys.maxsize if soft == resource.RLIM_INFINITY else soft
        self.most, self.most_of_one = descriptors * 3 // 4, descriptors // 2
        self.addresses: dict[int, str] = {}  # of all connections
        self.waiting: set[int] = set()
        self.counts: Counter[str] = Counter()  # of those that wait

    def is_full(self, address: str) -> bool:
        return len(self.waiting) >= self.most or self.counts[address] >= self.most_of_one

    def opened(self, number: int, address: str) -> None:
        self.addresses[number] = address
        self.begin(number)

    def closed(self, number: int) -> None:
        self.end(number)
        self.addresses.pop(number, None)

    def begin(self, number: int) -> None:
        """It waits for a request. Those of a Unix socket are not counted: they are the router's."""
        if number in self.addresses and number not in self.waiting:
            self.waiting.add(number)
            self.counts[self.addresses[number]] += 1

    def end(self, number: int) -> None:
        if number in self.waiting:
            self.waiting.remove(number)
            address = self.addresses[number]
            self.counts[address] -= 1
            if not self.counts[address]:
                del self.counts[address]


class Accepted(socket.socket):
    """A connection that says when it is closed, also where TLS has not begun."""

    waiting: Waiting

    def close(self) -> None:
        self.waiting.closed(self.fileno())
        super().close()


class Listener(socket.socket):
    """Takes the place of a TCP socket that listens. The newest connections over a bound are closed."""

    def __init__(self, listening: socket.socket, waiting: Waiting):
        super().__init__(fileno=listening.detach())
        self.waiting = waiting
        self.spare: int | None = os.open(os.devnull, os.O_RDONLY)  # used to refuse where no other is left
        self.quiet_until = 0.0

    def accept(self) -> tuple[socket.socket, tuple]:
        """Raises BlockingIOError where there is no more to accept."""
        for _ in range(AT_ONCE):
            try:
                connection, address = super().accept()
            except OSError as error:
                if error.errno not in EXHAUSTED:
                    raise
                self.refuse_one(error)
                continue
            if self.waiting.is_full(address[0]):
                connection.close()
                self.say("too many connections without a request")
                continue
            accepted = Accepted(fileno=connection.detach())
            accepted.waiting = self.waiting
            self.waiting.opened(accepted.fileno(), address[0])
            return accepted, address
        raise BlockingIOError

    def refuse_one(self, error: OSError) -> None:
        """Take a connection off the queue, which asyncio would log thousands of times."""
        self.say(error.strerror)
        self.close_spare()
        try:
            super().accept()[0].close()
        except OSError:  # none waits, or another thread was faster
            raise BlockingIOError from None
        finally:
            with contextlib.suppress(OSError):
                self.spare = os.open(os.devnull, os.O_RDONLY)

    def close_spare(self) -> None:
        if self.spare is not None:
            os.close(self.spare)
            self.spare = None

    def say(self, reason: str) -> None:
        now = time.monotonic()
        if now >= self.quiet_until:
            print(f"new connections are refused: {reason}", file=sys.stderr, flush=True)
            self.quiet_until = now + QUIET

    def close(self) -> None:
        self.close_spare()
        super().close()
