"""The order of a pipeline's work: what each rank does, one action after another.

    0F3    forward of stage 0 on micro batch 3
    0B3    its backward; or in two parts:
    0I3    the gradient of the stage's input
    0W3    the gradients of its weights, at any time after
    (2F3;1B0)OVERLAP_F_B    a forward and a backward at the same time

This is the text of torch's and torchtitan's schedule files: CSV, a line for each rank. A schedule is one of SCHEDULES,
or any order that `check` accepts. Nothing here needs processes.
"""

import csv
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from ..errors import InputError
from .torch_schedules import schedule_actions

ONE_STAGE = ("1F1B", "GPipe")  # schedules with one stage on each rank
V_SHAPED = ("ZBVZeroBubble", "DualPipeV")  # with two, the first and the last on rank 0
SCHEDULES = ("Interleaved1F1B", "LoopedBFS", "InterleavedZeroBubble", *V_SHAPED, *ONE_STAGE)
ACTION = re.compile(r"(\d{1,6})([FBIW])(\d{1,6})")


class Action(NamedTuple):
    kind: str  # F, B, I or W
    stage: int
    micro_batch: int

    def __str__(self) -> str:
        return f"{self.stage}{self.kind}{self.micro_batch}"


Step = tuple[Action, ...]  # one action, or a forward and a backward that overlap
Order = list[list[Step]]  # by rank


def schedule_order(name: str, ranks: int, stages: int, micro_batches: int) -> Order:
    """The order of one of SCHEDULES. Raises InputError where the schedule cannot have these numbers."""
    if name not in SCHEDULES:
        raise InputError(f"--schedule {name}: it must be one of {', '.join(SCHEDULES)}")
    if name in ONE_STAGE and stages != ranks:
        raise InputError(f"--schedule {name} needs one stage a rank: {stages} on {ranks} ranks")
    if stages % ranks or (name in V_SHAPED and stages != 2 * ranks):
        raise InputError(f"--schedule {name}: {stages} stages on {ranks} ranks;"
                         f" {'it needs two each' if name in V_SHAPED else 'each rank takes equally many'}")  # fmt: skip
    if name in ONE_STAGE:
        warm_up = [micro_batches if name == "GPipe" else ranks - 1 - r for r in range(ranks)]
        return [one_stage(r, warm_up[r], micro_batches) for r in range(ranks)]
    try:
        texts = schedule_actions(name, ranks, stages, micro_batches)
    except ValueError as error:
        raise InputError(f"--schedule {name}: {error}") from None
    return [[parse_step(text) for text in row] for row in texts]


def placement(name: str, ranks: int, stages: int) -> list[int]:
    """The rank of each stage in one of SCHEDULES: in turn, or in a V there and back."""
    return [min(s, stages - 1 - s) if name in V_SHAPED else s % ranks for s in range(stages)]


def one_stage(rank: int, warm_up: int, micro_batches: int) -> list[Step]:
    """Forwards of the warm-up, then a forward and a backward by turns, then the backwards that are left."""
    warm_up = min(warm_up, micro_batches)
    order = [Action("F", rank, i) for i in range(warm_up)]
    for i in range(warm_up, micro_batches):
        order += [Action("F", rank, i), Action("B", rank, i - warm_up)]
    order += [Action("B", rank, i) for i in range(micro_batches - warm_up, micro_batches)]
    return [(action,) for action in order]


def is_split(order: Order) -> bool:
    """Whether any backward is in two parts."""
    return any(a.kind == "W" for row in order for step in row for a in step)


def gives(action: Action) -> tuple[str, int, int]:
    """What is there after an action: I gives what B gives to the stage before."""
    return ("B" if action.kind == "I" else action.kind, *action[1:])


def needs(action: Action, stages: int) -> list[tuple[str, int, int]]:
    """What must be there before an action begins; the results of the other stages have to be sent where these are on
    another rank."""
    kind, s, m = action
    if kind == "F":
        return [("F", s - 1, m)] if s else []
    if kind == "W":
        return [("B", s, m)]
    return [("F", s, m), *([("B", s + 1, m)] if s < stages - 1 else [])]


def check(order: Order, ranks: int, stages: int, micro_batches: int, name: str = "the schedule") -> list[int]:
    """The rank of each stage. Raises InputError unless every stage is on one rank and has a forward and a backward of
    every micro batch once, in an order that comes to its end."""
    if len(order) != ranks:
        raise InputError(f"--schedule: {name} is for {len(order)} ranks, not {ranks}")
    rank_of: dict[int, int] = {}
    seen: set[Action] = set()
    for rank, row in enumerate(order):
        for action in (a for step in row for a in step):
            if action.stage >= stages or action.micro_batch >= micro_batches:
                raise InputError(
                    f"--schedule: {action} in {name}, with {stages} stages and {micro_batches} micro batches"
                )
            if action in seen or rank_of.setdefault(action.stage, rank) != rank:
                raise InputError(f"--schedule: {action} is twice in {name}, or its stage on two ranks")
            seen.add(action)
    for s in range(stages):
        for m in range(micro_batches):
            kinds = {k for k in "FBIW" if Action(k, s, m) in seen}
            if kinds not in ({"F", "B"}, {"F", "I", "W"}):
                found = ", ".join(sorted(kinds)) or "nothing"
                raise InputError(
                    f"--schedule: {name} has {found} of stage {s} and micro batch {m}; F and B, or F, I and W"
                )
    if stuck := next(blocked(order, stages), None):
        raise InputError(f"--schedule: {name} stops before {step_text(stuck)}, which waits for what never comes")
    return [rank_of[s] for s in range(stages)]


def blocked(order: Order, stages: int) -> Iterator[Step]:
    """The steps at which ranks stop for ever, one for each rank that does."""
    done: set[tuple[str, int, int]] = set()
    at = [0] * len(order)
    moved = True
    while moved:
        moved = False
        for r, row in enumerate(order):
            while at[r] < len(row) and all(done.issuperset(needs(a, stages)) for a in row[at[r]]):
                done.update(gives(a) for a in row[at[r]])
                at[r], moved = at[r] + 1, True
    return (row[at[r]] for r, row in enumerate(order) if at[r] < len(row))


def step_text(step: Step) -> str:
    return str(step[0]) if len(step) == 1 else f"({';'.join(map(str, step))})OVERLAP_F_B"


def parse_step(text: str) -> Step:
    """Raises InputError for anything else than the actions above."""
    text = text.strip()
    inner = re.fullmatch(r"\((.*);(.*)\)OVERLAP_F_B", text)
    found = [ACTION.fullmatch(part.strip()) for part in (inner.groups() if inner else (text,))]
    actions = tuple(Action(m[2], int(m[1]), int(m[3])) for m in found if m)
    if len(actions) < len(found) or (inner and "".join(a.kind for a in actions) not in ("FB", "BF")):
        raise InputError(f"--schedule: {text!r} is no action such as 0F3, 0B3, 0I3, 0W3 or (2F3;1B0)OVERLAP_F_B")
    return actions


def write_csv(order: Order, path: str | Path) -> None:
    """Write the file that torch's and torchtitan's schedules read."""
    with open(path, "w", newline="") as file:
        csv.writer(file).writerows([map(step_text, row) for row in order])


def read_csv(path: str | Path) -> Order:
    """Read such a file; cells may be empty. Raises InputError for a file that cannot be read or is none."""
    try:
        with open(path, newline="") as file:
            rows = [*csv.reader(file)]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"--schedule {path}: {error}") from None
    return [[parse_step(text) for text in row if text.strip()] for row in rows]
