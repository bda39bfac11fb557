"""Rules of sm_90 that ptxas is trusted with, checked in the code it made, along every path."""

import re
from collections.abc import Callable, Hashable

from tests.sass.decode import Instruction, registers, results
from tests.sass.flow import Flow, jumps

Group = tuple[frozenset[int], frozenset[int]]  # registers of accumulators, and of A
NOTHING: Group = (frozenset(), frozenset())
Step = Callable[[Instruction, Hashable], Hashable]


def visit(flow: Flow, state: Hashable, step: Step, known_in: Callable[[Hashable], int] = lambda state: 0) -> None:
    """Every block in every state in which it can be entered; `step` gives the state after an instruction.

    Branches on a predicate that has not changed go the same way. known_in: of how many predicates, the latest ones,
    this is followed in a state: each doubles the states.
    """
    seen, todo = set(), [(0, state, ())]
    while todo:
        b, state, known = entered = todo.pop()
        if entered in seen:
            continue
        seen.add(entered)
        for i in flow.blocks[b]:
            state = step(i, state)
            if known:
                known = tuple((p, holds) for p, holds in known if p not in written_predicates(i))
        last = flow.blocks[b][-1]
        for n in flow.next[b]:
            after = known
            if last.guard and jumps(last) and len(flow.next[b]) == 2:
                predicate, holds = last.guard.lstrip("!"), (n == flow.at[last.targets[0]]) != last.guard.startswith("!")
                if (predicate, not holds) in known:
                    continue
                after = (*(fact for fact in known if fact[0] != predicate), (predicate, holds))
            todo.append((n, state, after[len(after) - min(len(after), known_in(state)) :]))


def written_predicates(i: Instruction) -> set[str]:
    """Those that it may write: its last operand is one that it reads."""
    if i.base == "R2P":
        return {f"P{n}" for n in range(7)}
    return {*re.findall(r"\bU?P\d\b", i.operands.rpartition(",")[0])}


def touched_in_flight(flow: Flow) -> list[Instruction]:
    """Instructions that, between a wgmma's issue and the wait for it, use its accumulators or write its A registers.

    The last wgmma of a group names the counter gsb0; WARPGROUP.DEPBAR.LE gsb0, n waits until n groups are left.
    """
    found: dict[int, Instruction] = {}

    def step(i: Instruction, groups: tuple[Group, ...]):
        """groups: those in flight, the last one not yet complete."""
        if i.base.endswith("GMMA"):
            *complete, (sums, a) = groups
            groups = (*complete, (sums | results(i), a | (registers(i) - results(i))))
            groups = (*groups, NOTHING) if "gsb0" in i.operands else groups
            return groups if len(groups) < 9 else groups[1:]  # so that a loop without waits ends
        if i.opcode == "WARPGROUP.DEPBAR.LE":
            return groups[-1 - int(i.operands.split()[-1], 16) :]
        if groups != (NOTHING,) and any(registers(i) & sums or results(i) & a for sums, a in groups):
            found[i.address] = i
        return groups

    visit(flow, (NOTHING,), step, known_in=lambda groups: 8 if groups != (NOTHING,) else 1)
    return [*found.values()]


def highest_registers(flow: Flow, registers_at_start: int) -> dict[int, int]:
    """{registers that a thread has: the highest number it uses then}, by setmaxnreg (USETMAXREG)."""
    highest: dict[int, int] = {}

    def step(i: Instruction, limit: int):
        highest[limit] = max([highest.get(limit, -1), *registers(i)])
        return int(re.search(r"0x[0-9a-f]+", i.operands)[0], 16) if i.base == "USETMAXREG" else limit

    visit(flow, registers_at_start, step)
    return highest
