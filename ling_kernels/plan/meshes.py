"""The best division of a number of GPUs into ranks of a pipeline, data parallel processes and those that share experts,
for `plan pipeline --gpus`."""

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

from ..errors import InputError, counted
from ..files import format_bytes
from ..gpu import Gpu
from ..model import LingConfig
from ..train.settings import Settings
from .memory import RESERVE
from .search import Problem, Result
from .step_time import last_seconds
from .train import span
from .units import Gpus, rank_units

BEST = 5  # meshes whose layouts are searched, and that are shown


class MeshPlan(NamedTuple):
    problem: Problem
    result: Result
    seconds: float  # of the whole step, with the optimizer and the sums over dp

    def flags(self) -> str:
        """Those of the trainer."""
        gpus, layout = self.problem.gpus, f' --pipeline "{self.result.layout}" --schedule {self.result.schedule}'
        return f"--dp {gpus.dp} --ep {gpus.ep} --pp {gpus.pp}" + layout * (gpus.pp > 1)


def meshes_of(
    number: int, c: LingConfig, s: Settings, pp: int | None = None, dp: int | None = None, ep: int | None = None
) -> list[Gpus]:  # fmt: skip
    """The meshes of so many GPUs that the trainer takes, with those of pp, dp and ep that are given. s: with a micro
    batch. Raises InputError where there are none."""
    found = []
    for ranks in (n for n in range(1, number + 1) if number % n == 0 and pp in (None, n)):
        rows = number // ranks  # of the mesh: data parallel GPUs
        micro_batches, rest = divmod(s.batch, rows * (s.micro_batch or 1))
        if dp not in (None, rows) or rest or micro_batches % ranks:
            continue
        if ranks > c.num_hidden_layers + c.num_nextn_predict_layers:
            continue
        sharing = [n for n in range(1, rows + 1) if rows % n == 0 == c.num_experts % n and ep in (None, n)]
        found += [Gpus(rows, n, ranks) for n in sharing]
    if not found:
        flags = "".join(f" --{name} {n}" for name, n in dict(pp=pp, dp=dp, ep=ep).items() if n is not None)
        raise InputError(f"--gpus {number}{flags}: nothing divides --batch {s.batch} and {c.num_experts} experts so")
    return found


def best_meshes(
    problems: list[Problem], solve: Callable[..., list[Result]], tries: int, gpu: Gpu
) -> list[MeshPlan]:  # fmt: skip
    """The plans of the meshes that fit the memory, the shortest step first. All meshes are tried with even layouts, and
    layouts are searched for the best ones. solve(problem, tries=): the plans of one, as of plan pipeline. Raises
    InputError where nothing fits."""
    least = min(least_bytes(problem) for problem in problems)
    possible = [problem for problem in problems if least_bytes(problem) <= problem.memory]
    tried = plans_of(possible, solve, 0, gpu)
    searched = plans_of([plan.problem for plan in tried[:BEST]], solve, tries, gpu)
    found = [plan for plan in searched if plan.result.peak <= plan.problem.memory]
    if not found:
        least = min((plan.result.peak for plan in [*tried, *searched]), default=least)
        raise InputError(f"--gpus: no plan fits {format_bytes(problems[0].memory)}: the least that was found is"
                         f" {format_bytes(least)}")  # fmt: skip
    return found


def plans_of(problems: list[Problem], solve: Callable[..., list[Result]], tries: int, gpu: Gpu) -> list[MeshPlan]:
    """The best plan of each mesh that the trainer takes, what fits the memory first, then the shortest step."""
    found = []
    for problem in problems:
        try:
            results = solve(problem, tries=tries)
        except InputError:  # no schedule can have these numbers
            continue
        results = [r for r in results if every_rank_has_a_layer(problem, r)]
        plans = [MeshPlan(problem, r, whole_step(problem, r, gpu)) for r in results]
        found += sorted(plans, key=order_of)[:1]
    return sorted(found, key=order_of)


def order_of(plan: MeshPlan) -> tuple[bool, float]:
    return plan.result.peak > plan.problem.memory, plan.seconds


def whole_step(problem: Problem, result: Result, gpu: Gpu) -> float:
    """Seconds of a step with what comes once."""
    c, gpus = problem.config, problem.gpus
    s = replace(problem.settings, dp=gpus.dp, ep=gpus.ep, pp=gpus.pp)
    last = []
    for held, u in zip(rank_units(result.layout, result.ranks, c), result.usage, strict=True):
        peak = {"weights": u.weights, "optimizer": u.optimizer, "FP8 weights": u.copies}
        last.append(last_seconds(c, s, held.count("t") + held.count("m"), peak, gpu))
    return result.timeline.seconds + max(last)


def every_rank_has_a_layer(problem: Problem, result: Result) -> bool:
    return all(set(held) & set("dtm") for held in rank_units(result.layout, result.ranks, problem.config))


def least_bytes(problem: Problem) -> float:
    """No layout takes less of the fullest GPU: each weight is there once, all ranks have equally much."""
    gpus, numbers = problem.gpus, {**Counter(problem.atoms + "n"), "L": 1}
    every = [w for kind, n in numbers.items() for w in n * problem.units[kind].weights]
    state = sum(w.state * (gpus.ep if w.expert else 1) for w in every) / gpus.dp
    return (2 * sum(w.bytes for w in every) + state) / gpus.pp + RESERVE


def mesh_lines(plans: list[MeshPlan], number: int) -> list[str]:
    memory = format_bytes(plans[0].problem.memory)
    lines = [
        f"{counted(number, 'GPU')} of {memory}: the best that fit; steps with optimizer and sums over dp",
        f"{'step':>10}{'idle':>8}{'memory':>11}  flags of the trainer",
    ]
    for plan in plans:
        idle = 100 * plan.result.timeline.bubble()
        lines.append(f"{span(plan.seconds):>10}{idle:>6.1f} %{format_bytes(plan.result.peak):>11}  {plan.flags()}")
    return lines
