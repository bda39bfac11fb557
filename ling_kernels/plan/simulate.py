"""A pipeline's step, simulated: an action begins when its rank is free and what it needs has arrived.

Times are in any unit, usually seconds. Sending takes no time of the ranks; a result arrives `transfer` later on another
rank. The order of each rank is kept, as torch's runtime keeps it. Ranks are alike in speed, and nothing else disturbs
them: a real step is slower.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from ..errors import InputError
from ..parallel.schedules import Order, Step, gives, needs, step_text


class Times(NamedTuple):
    """Of one stage and micro batch. A whole backward takes input_gradient and weight_gradient together."""

    forward: float
    input_gradient: float
    weight_gradient: float
    exchange: float = 0.0  # of rows with experts on other GPUs, in the forward
    exchange_back: float = 0.0  # in the backward, with the input's gradient

    def __add__(self, other: "Times") -> "Times":  # type: ignore[override]
        return Times(*(a + b for a, b in zip(self, other, strict=True)))

    def of(self, kind: str) -> float:
        """Of F, B, I or W, by itself."""
        return self.computing(kind) + self.sending(kind)

    def computing(self, kind: str) -> float:
        forward, input_gradient, weight_gradient, *_ = self
        return dict(F=forward, I=input_gradient, W=weight_gradient, B=input_gradient + weight_gradient)[kind]

    def sending(self, kind: str) -> float:
        return dict(F=self.exchange, I=self.exchange_back, W=0.0, B=self.exchange_back)[kind]

    @property
    def total(self) -> float:
        return self.of("F") + self.of("B")


class Event(NamedTuple):
    begin: float
    end: float
    step: Step


@dataclass(frozen=True)
class Timeline:
    """What each rank does when: events[rank], in their order."""

    events: list[list[Event]]

    @property
    def seconds(self) -> float:
        return max(events[-1].end for events in self.events if events)

    def busy(self, rank: int) -> float:
        return sum(e.end - e.begin for e in self.events[rank])

    def bubble(self, rank: int | None = None) -> float:
        """The share of the step in which a rank, or the average one, does nothing."""
        ranks = range(len(self.events)) if rank is None else [rank]
        return 1 - sum(map(self.busy, ranks)) / len(ranks) / self.seconds

    def peak(self, rank: int, kept: Sequence[float]) -> float:
        """The most that a rank keeps for backwards at one moment. kept: of one micro batch of each stage, from the
        begin of its forward to the end of its backward, or of W where this comes last."""
        now = most = 0.0
        for _, _, step in self.events[rank]:
            for a in step:
                now += kept[a.stage] if a.kind == "F" else 0
            most = max(most, now)
            for a in step:
                now -= kept[a.stage] if a.kind in "BW" else 0
        return most


def simulate(order: Order, times: Sequence[Times], transfer: float = 0.0) -> Timeline:
    """Run an order. times: of each stage; transfer: of a stage's results to another rank.

    A forward and a backward that overlap, which the trainer runs by turns (parallel/turns.py), take their computing
    together, or their exchanges where these are longer: each hides the other's.
    Raises InputError for an order that stops.
    """
    rank_of = {a.stage: r for r, row in enumerate(order) for step in row for a in step}
    events: list[list[Event]] = [[] for _ in order]
    done: dict[tuple[str, int, int], float] = {}
    free, at, waiting = [0.0] * len(order), [0] * len(order), [*range(len(order))]
    while waiting:
        moved = False
        for r in waiting:
            row = order[r]
            while at[r] < len(row):
                step = row[at[r]]
                begin = arrival(step, r, rank_of, done, transfer, len(times))
                if begin is None:
                    break
                begin = max(begin, free[r])
                free[r] = end = begin + duration(step, times)
                for a in step:
                    done[gives(a)] = end
                events[r].append(Event(begin, end, step))
                at[r], moved = at[r] + 1, True
        waiting = [r for r in waiting if at[r] < len(order[r])]
        if waiting and not moved:
            stuck = order[waiting[0]][at[waiting[0]]]
            raise InputError(f"--schedule: it stops before {step_text(stuck)}, which waits for what never comes")
    return Timeline(events)


def arrival(step: Step, rank: int, rank_of: dict, done: dict, transfer: float, stages: int) -> float | None:
    """When all that a step needs is on its rank; None if that is not known yet."""
    latest = 0.0
    for action in step:
        for need in needs(action, stages):
            if need not in done:
                return None
            latest = max(latest, done[need] + (transfer if rank_of[need[1]] != rank else 0))
    return latest


def duration(step: Step, times: Sequence[Times]) -> float:
    computing = sum(times[a.stage].computing(a.kind) for a in step)
    sending = sum(times[a.stage].sending(a.kind) for a in step)
    return max(computing, sending) if len(step) > 1 else computing + sending
