"""A search for the layout and the schedule of the shortest step, by simulating it."""

import math
import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache, partial
from itertools import accumulate, combinations_with_replacement
from typing import NamedTuple

from ..errors import InputError
from ..model import LingConfig
from ..parallel.pipeline_layout import PipelineLayout
from ..parallel.schedules import ONE_STAGE, SCHEDULES, V_SHAPED, Order, check, placement, schedule_order
from ..train.settings import Settings
from .greedy import greedy_order
from .memory import RESERVE
from .simulate import Timeline, simulate
from .units import Gpus, Share, StageWork, Unit, rank_share, rank_units, stage_work

CHOICES = (*(name for name in SCHEDULES if name not in ("LoopedBFS", "GPipe")), "greedy")
TRIES = 150
SEARCH_ROUNDS = 3  # a layout is searched with this many micro batches a rank


known_order = lru_cache(schedule_order)  # torch takes long to make one


class Usage(NamedTuple):
    """Of the fullest GPU of a rank: numbers of parameters, then bytes."""

    plain: int  # parameters without experts
    experts: int  # those of experts
    weights: int  # the masters
    optimizer: int  # its state
    copies: int  # FP8 weights that are kept
    activations: float  # at their peak

    @property
    def state(self) -> int:
        """Weights, gradients, the optimizer's state."""
        return 2 * self.weights + self.optimizer + self.copies

    @property
    def bytes(self) -> float:
        return self.state + self.activations + RESERVE


@dataclass(frozen=True)
class Result:
    layout: PipelineLayout
    schedule: str
    order: Order
    timeline: Timeline
    ranks: list[int]  # of each stage
    usage: list[Usage]  # of each rank

    @property
    def peak(self) -> float:
        return max(u.bytes for u in self.usage)


@dataclass(frozen=True)
class Problem:
    """What is fixed: a model's units, the GPUs, the micro batches of a step."""

    config: LingConfig
    settings: Settings
    units: dict[str, Unit]
    gpus: Gpus
    micro_batches: int
    transfer: float
    memory: float = math.inf  # bytes of a GPU
    measured_on: str = ""  # where the units' times were measured; else they are predicted

    @cached_property
    def atoms(self) -> str:
        c = self.config
        dense, mtp = c.first_k_dense_replace, c.num_nextn_predict_layers
        return "E" + "d" * dense + "t" * (c.num_hidden_layers - dense) + "m" * mtp + "L" * (1 + mtp)

    def evaluate(self, layout: PipelineLayout, schedule: str, order: Order | None = None) -> Result:
        """Simulate a layout. order: of the schedule, where it is none of CHOICES. Raises InputError where they do not
        fit."""
        order = self.order(layout, schedule) if order is None else order
        ranks = check(order, self.gpus.pp, len(layout.stages), self.micro_batches, schedule)
        stages = stage_work(layout, self.config, self.units)
        timeline = simulate(order, [s.times for s in stages], self.transfer)
        return Result(layout, schedule, order, timeline, ranks, self.usage(layout, ranks, stages, timeline))

    def order(self, layout: PipelineLayout, schedule: str) -> Order:
        stages, pp = len(layout.stages), self.gpus.pp
        if schedule != "greedy":
            return known_order(schedule, pp, stages, self.micro_batches)
        work = stage_work(layout, self.config, self.units)
        times, kept = [s.times for s in work], [s.kept for s in work]
        usual = known_order("1F1B" if stages == pp else "Interleaved1F1B", pp, stages, self.micro_batches)
        timeline = simulate(usual, times, self.transfer)
        limit = [timeline.peak(r, kept) for r in range(pp)]  # no more memory than the usual schedule takes
        return greedy_order([s % pp for s in range(stages)], times, self.micro_batches, kept, limit, self.transfer)

    def usage(
        self, layout: PipelineLayout, ranks: Sequence[int], work: list[StageWork], timeline: Timeline
    ) -> list[Usage]:
        kept = [stage.kept for stage in work]
        shares = [self.share(held) for held in rank_units(layout, ranks, self.config)]
        fp8 = self.settings.precision == "fp8" and self.settings.fp8_weights == "kept"
        return [
            Usage(*share, fp8 * (share.plain + share.experts), timeline.peak(rank, kept))
            for rank, share in enumerate(shares)
        ]

    def share(self, held: str) -> Share:
        """Of a rank with these units."""
        if held not in self.shares:
            self.shares[held] = rank_share(held, self.units, self.gpus)
        return self.shares[held]

    @cached_property
    def shares(self) -> dict[str, Share]:
        """Those of ranks that a search has met."""
        return {}

    def layout(self, cuts: Sequence[int]) -> PipelineLayout:
        """The stages between cuts of the units."""
        bounds = [0, *cuts, len(self.atoms)]
        stages = [self.atoms[a:b].replace("d", "t") for a, b in zip(bounds, bounds[1:], strict=False)]
        if stages[-1].count("L") == self.atoms.count("L"):  # Megatron's form, for all losses together
            stages[-1] = stages[-1].rstrip("L") + "L"
        return PipelineLayout(tuple(stages))

    def search_layout(self, schedule: str, stages: int, tail: int = 1, tries: int = TRIES) -> PipelineLayout:
        """The best layout found for a schedule: from even ones, by moving cuts of the units, one or several together;
        the same for the same numbers. tail: the last stage holds at least so many of the last units."""
        small = replace(self, micro_batches=min(self.micro_batches, SEARCH_ROUNDS * self.gpus.pp))
        last = len(self.atoms) - tail
        score, cuts = min((small.score(cuts, schedule), cuts) for cuts in small.even_cuts(schedule, stages, tail))
        current, best, found, chance = score, cuts, score, random.Random(0)
        for i in range(tries):
            moved = move(cuts, last, chance)
            if moved is None:
                continue
            new = small.score(moved, schedule, at_most=current * 1.02)
            heat = 0.01 * (1 - i / tries) * found
            if new <= current or chance.random() < math.exp((current - new) / max(heat, 1e-12)):
                cuts, current = moved, new
            if new < found:
                best, found = moved, new
        return self.layout(best)

    def score(self, cuts: Sequence[int], schedule: str, at_most: float = math.inf) -> float:
        """Seconds of a step, ten times as many and more where the memory is too small. Infinite without a simulation
        where the fullest rank alone takes longer than at_most."""
        layout = self.layout(cuts)
        place = placement(schedule, self.gpus.pp, len(layout.stages))
        work = stage_work(layout, self.config, self.units)
        load = [0.0] * self.gpus.pp
        for rank, stage in zip(place, work, strict=True):
            load[rank] += stage.times.total * self.micro_batches
        if max(load) > at_most:
            return math.inf
        timeline = simulate(self.order(layout, schedule), [s.times for s in work], self.transfer)
        over = max(u.bytes for u in self.usage(layout, place, work, timeline)) / self.memory
        return timeline.seconds * (1.0 if over <= 1 else 10 * over**4)

    def even_cuts(self, schedule: str, stages: int, tail: int) -> set[tuple[int, ...]]:
        """Cuts into stages whose ranks have about equal work: the last units divided in each way over the last stages,
        and the layers where there is least."""
        c, place = self.config, placement(schedule, self.gpus.pp, stages)
        layers, found = "d" * c.first_k_dense_replace + "t" * (c.num_hidden_layers - c.first_k_dense_replace), set()
        ends = self.atoms[1 + len(layers) :]
        parts = min(len(ends), stages)
        for inner in combinations_with_replacement(range(len(ends) - min(tail, len(ends)) + 1), parts - 1):
            bounds = [0, *inner, len(ends)]
            lengths = [b - a for a, b in zip(bounds, bounds[1:], strict=False)]
            load = [0.0] * self.gpus.pp
            for s, a, b in zip(range(stages - parts, stages), bounds, bounds[1:], strict=False):
                load[place[s]] += sum(self.units[letter].times.total for letter in ends[a:b])
            counts = [0] * stages
            room = range(stages - parts + next(i for i, n in enumerate(lengths) if n) + 1)  # up to the first of them
            for letter in layers:
                s = min(room, key=lambda s: (load[place[s]], counts[s], s))
                counts[s] += 1
                load[place[s]] += self.units[letter].times.total
            sizes = [n + (s == 0) for s, n in enumerate(counts)]
            for s, n in zip(range(stages - parts, stages), lengths, strict=True):
                sizes[s] += n
            found.add(tuple(accumulate(sizes[:-1])))
        return found


def move(cuts: tuple[int, ...], last: int, chance: random.Random) -> tuple[int, ...] | None:
    """Shift one cut, or several neighbours, by one unit; None if that leaves the order of the cuts."""
    if not cuts:
        return None
    i = chance.randrange(len(cuts))
    j = min(len(cuts), i + chance.choice((1, 1, 1, 2, 3, 4, 8, len(cuts))))
    d = chance.choice((-1, 1))
    moved = (*cuts[:i], *(c + d for c in cuts[i:j]), *cuts[j:])
    ordered = all(a <= b for a, b in zip(moved, moved[1:], strict=False))
    return moved if ordered and moved[0] >= 1 and moved[-1] <= last else None


def candidates(pp: int, per_rank: Iterable[int]) -> list[tuple[str, int]]:
    """(schedule, stages) that exist for these numbers of stages a rank."""
    found = []
    for v in per_rank:
        for name in CHOICES:
            if (name in V_SHAPED and v != 2) or (name in ONE_STAGE and v > 1) or (name == "Interleaved1F1B" and v == 1):
                continue
            found.append((name, v * pp))
    return found


def search(problem: Problem, wanted: list[tuple[str, int]], tail: int = 1, tries: int = TRIES) -> list[Result]:
    """The best layout of each schedule, the shortest step that fits the memory first; tail: of search_layout. Raises
    InputError where no schedule can have these numbers."""

    def searched(name: str, stages: int) -> Result:
        return problem.evaluate(problem.search_layout(name, stages, tail, tries), name)

    return ranked(problem, [partial(searched, *pair) for pair in wanted])


def ranked(problem: Problem, plans: Iterable[Callable[[], Result]]) -> list[Result]:
    """The results of those plans that can be, what fits the memory first, then the shortest step. Raises the first
    plan's InputError where none can."""
    results, errors = [], []
    for plan in plans:
        try:
            results.append(plan())
        except InputError as error:
            errors.append(error)
    if not results:
        raise errors[0]
    return sorted(results, key=lambda r: (r.peak > problem.memory, r.timeline.seconds))
