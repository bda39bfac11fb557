"""A forward and a backward that take turns: while rows of one travel to their experts, the other computes.

Each has a thread, and one of them runs at a time. It starts an exchange, lets the other go on, and waits for its rows
at its next turn. So collectives have the same order on all ranks, results have the bits of one after the other, and on
a GPU both fill the same stream, beside the one of the exchange.
"""

import threading
from collections.abc import Callable

import torch

FORWARD, BACKWARD = 0, 1


class Turns:
    def __init__(self):
        self.changed, self.turn, self.ended = threading.Condition(), FORWARD, [False, False]

    def wait(self, lane: int) -> None:
        with self.changed:
            self.changed.wait_for(lambda: self.turn == lane)

    def hand_over(self) -> None:
        """Let the other go on, until it hands over or has ended."""
        lane = BACKWARD if torch._C._current_graph_task_id() >= 0 else FORWARD  # autograd has threads of its own
        if self.ended[1 - lane]:
            return
        with self.changed:
            self.turn = 1 - lane
            self.changed.notify_all()
        self.wait(lane)

    def end(self, lane: int) -> None:
        with self.changed:
            self.ended[lane], self.turn = True, 1 - lane
            self.changed.notify_all()


_turns: Turns | None = None  # no thread-local: on GPUs autograd's own threads run the backward


def turns() -> Turns | None:
    """Those that are under way."""
    return _turns


def take_turns(forward: Callable[[], None], backward: Callable[[], None]) -> None:
    """Run both, forward first. An error of either is raised when both have ended."""
    global _turns
    _turns = mine = Turns()
    errors: list[BaseException] = []
    stream = torch.cuda.current_stream() if torch.cuda.is_available() else None

    def run(lane: int, work: Callable[[], None]) -> None:
        try:
            mine.wait(lane)
            work()
        except BaseException as error:  # noqa: BLE001 (raised below)
            errors.append(error)
        finally:
            mine.end(lane)

    def run_forward() -> None:
        with torch.cuda.stream(stream):  # also sets the device, which a new thread does not inherit
            run(FORWARD, forward)

    thread = threading.Thread(target=run_forward)
    thread.start()
    try:
        run(BACKWARD, backward)
        thread.join()
    finally:
        _turns = None
    if errors:
        raise errors[0]
