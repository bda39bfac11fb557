"""An order of a pipeline's work made for its own times, as torch's schedules are not: they count on equal stages."""

import heapq
from collections.abc import Sequence

from ..errors import InputError
from ..parallel.schedules import Action, Order
from .simulate import Times


def greedy_order(
    ranks: Sequence[int], times: Sequence[Times], micro_batches: int, kept: Sequence[float], limit: Sequence[float],
    transfer: float = 0.0,
) -> Order:  # fmt: skip
    """The order in which ranks, whenever they are free, take an input's gradient, else a forward, else the gradients of
    weights.

    ranks: of each stage. kept: what a micro batch of each stage keeps, from its forward to the gradients of its
    weights; limit: the most of it on each rank. Raises InputError where the limit lets the pipeline stop.
    """
    return Greedy(ranks, times, micro_batches, kept, limit, transfer).run()


class Greedy:
    def __init__(self, ranks, times, micro_batches, kept, limit, transfer):
        self.ranks, self.times, self.number, self.kept, self.limit = ranks, times, micro_batches, kept, limit
        self.transfer, self.size = transfer, max(ranks) + 1
        self.stages = [[s for s, r in enumerate(ranks) if r == rank] for rank in range(self.size)]
        self.next = {kind: [0] * len(ranks) for kind in "FIW"}  # micro batch of each stage
        self.ready: dict[tuple[str, int], list[float]] = {  # when a micro batch's input is there, in their order
            (kind, s): [] for kind in "FIW" for s in range(len(ranks))
        }
        self.ready["F", 0] = [0.0] * micro_batches
        self.holds, self.free = [0.0] * self.size, [0.0] * self.size
        self.order: Order = [[] for _ in range(self.size)]

    def run(self) -> Order:
        events = [0.0]
        while events:
            now = heapq.heappop(events)
            while events and events[0] == now:
                heapq.heappop(events)
            for rank in range(self.size):
                action = self.choice(rank, now) if self.free[rank] <= now else None
                if action is not None:
                    for moment in self.start(rank, action, now):
                        heapq.heappush(events, moment)
        if sum(map(len, self.order)) < 3 * self.number * len(self.ranks):
            raise InputError("--schedule greedy: too little memory, the pipeline would stop")
        return self.order

    def choice(self, rank: int, now: float) -> Action | None:
        def possible(kind: str) -> list[Action]:
            return [Action(kind, s, m) for s in self.stages[rank] for m in [self.next[kind][s]]
                    if m < len(self.ready[kind, s]) and self.ready[kind, s][m] <= now]  # fmt: skip

        if backward := possible("I"):
            return min(backward, key=lambda a: (a.micro_batch, -a.stage))
        last = self.stages[rank][-1]
        forward = [
            a for a in possible("F")
            # a forward of an earlier stage leaves memory for one of the last, whose backward frees some
            if self.holds[rank] + self.kept[a.stage] + (a.stage != last) * self.kept[last] <= self.limit[rank]
        ]  # fmt: skip
        if forward:  # rounds of as many micro batches as ranks, the deepest stage first, as in interleaved 1F1B
            return min(forward, key=lambda a: (a.micro_batch // self.size, -a.stage))
        return min(possible("W"), key=lambda a: (a.micro_batch, -a.stage), default=None)

    def start(self, rank: int, action: Action, now: float) -> list[float]:
        """Do it; returns the moments at which something else becomes possible."""
        kind, s, m = action
        end = now + self.times[s].of(kind)
        self.order[rank].append((action,))
        self.next[kind][s], self.free[rank] = m + 1, end
        moments = [end]
        if kind == "F":
            self.holds[rank] += self.kept[s]
            moments.append(
                self.give("F", s + 1, rank, end) if s + 1 < len(self.ranks) else self.give("I", s, rank, end)
            )
        elif kind == "I":
            self.ready["W", s].append(end)
            moments.append(self.give("I", s - 1, rank, end) if s else end)
        else:
            self.holds[rank] -= self.kept[s]
        return moments

    def give(self, kind: str, s: int, rank: int, end: float) -> float:
        moment = end + (self.transfer if self.ranks[s] != rank else 0)
        self.ready[kind, s].append(moment)
        return moment
