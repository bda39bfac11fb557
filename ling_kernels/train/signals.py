"""How SIGTERM and Ctrl-C end the work of a command: what is half-written is removed, a step is finished."""

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager

STOPPED = 75  # exit code of work that a signal stopped early: EX_TEMPFAIL of sysexits.h, start it again


@contextmanager
def interrupted_by_sigterm() -> Iterator[None]:
    """Within it SIGTERM raises KeyboardInterrupt, as Ctrl-C does, so that files half-written are removed."""
    process = os.getpid()

    def interrupt(number, frame):
        if os.getpid() == process:
            raise KeyboardInterrupt
        os._exit(128 + number)  # a process that this one has forked

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextmanager
def stop_on_signals() -> Iterator[list[str]]:
    """Yields a list that gets the name of the first SIGINT or SIGTERM. A second signal ends the process at once."""
    received = []

    def on_first(number, frame):
        received.append(signal.Signals(number).name)
        for s in (signal.SIGINT, signal.SIGTERM):
            signal.signal(s, signal.SIG_DFL)

    if threading.current_thread() is not threading.main_thread():  # Python handles signals only there
        yield received
        return
    before = {s: signal.signal(s, on_first) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield received
    finally:
        for s, handler in before.items():
            signal.signal(s, handler)
