"""Basic blocks of a kernel, its loops, and the path that a warp takes as a rule."""

import re
from collections.abc import Iterator, Set
from typing import NamedTuple

from tests.sass.decode import TILES, Instruction, global_bytes, tensor_clocks

TILE_BYTES = 4096  # what a TMA instruction counts in the choice of a path; its true size is in a descriptor
LOADS = ("LDG", "LD")
ENDS = ("EXIT", "RET", "BPT")
Edges = list[list[int]]  # the blocks that may follow each block
Work = tuple[int, int, int, int]


class Loop(NamedTuple):
    head: int  # the block that is entered first
    blocks: frozenset[int]
    latches: frozenset[int]  # blocks from which it goes back to the head, perhaps through the end of an inner loop


class Flow:
    """The control flow of a kernel. A block is a number; `blocks[b]` are its instructions.

    without: blocks with an "OPCODE FILE:LINE" that this regular expression matches are closed, e.g. those of an option.
    """

    def __init__(self, code: list[Instruction], without: str = "(?!)"):
        starts = {code[0].address} | {t for i in code if jumps(i) for t in i.targets}
        starts |= {i.address + 16 for i in code if jumps(i) or i.base in ENDS}
        self.blocks: list[list[Instruction]] = []
        for i in code:
            if i.address in starts:
                self.blocks.append([])
            self.blocks[-1].append(i)
        self.at = {block[0].address: b for b, block in enumerate(self.blocks)}
        closed = {
            b for b, block in enumerate(self.blocks) if any(re.match(without, f"{i.opcode} {i.line}") for i in block)
        }
        self.next: Edges = [[n for n in self.successors(b) if n not in closed] for b in range(len(self.blocks))]
        self.reached = {*postorder(self.next, 0)}
        self.onward: Edges = [[*e] for e in self.next]
        self.loops = [self.unroll(*found) for found in cycles(self.reached, self.next)]
        self.order = [*postorder(self.onward, 0)][::-1]  # topological: `onward` has no cycles

    def successors(self, b: int) -> list[int]:
        last = self.blocks[b][-1]
        if jumps(last) and not last.targets:
            raise ValueError(f"it is not known where this goes: {last}")
        ends = last.base in ENDS or jumps(last)
        found = [self.at[t] for t in last.targets] if jumps(last) else []
        goes_on = (not ends or is_conditional(last)) and b + 1 < len(self.blocks)
        return [*dict.fromkeys(found + [b + 1] * goes_on)]

    def unroll(self, blocks: set[int], head: int) -> Loop:
        """Let the loop run once in `onward`: a jump back to its head goes on to where the loop may be left."""
        latches = frozenset(b for b in blocks if head in self.onward[b])
        exits = [n for b in blocks for n in self.next[b] if n not in blocks]
        for b in latches:
            self.onward[b] = [*dict.fromkeys([n for n in self.onward[b] if n != head] + exits)]
        return Loop(head, frozenset(blocks), latches)

    def path(self, start: int, ends: Set[int], among: Set[int], least: bool = False) -> list[int]:
        """The usual path from block `start` to one of `ends` through blocks of `among`; [] where there is none.

        Of all paths that run each loop once: the most tensor work, then the most bytes of global memory, then the
        fewest CALLs (the slow paths of divisions), then the fewest instructions. least: loads that can be left out are.
        """
        best: dict[int, tuple[Work, int | None]] = {start: (work(self.blocks[start], least), None)}
        for b in self.order:
            for n in self.onward[b] if b in best else ():
                if n in among:
                    total = add(best[b][0], work(self.blocks[n], least))
                    if n not in best or total < best[n][0]:
                        best[n] = total, b
        path = []
        b = min((b for b in ends if b in best), key=lambda b: best[b][0], default=None)
        while b is not None:
            path.append(b)
            b = best[b][1]
        return path[::-1]

    def code(self, path: list[int]) -> list[Instruction]:
        return [i for b in path for i in self.blocks[b]]

    def once(self, loop: Loop, least: bool = False) -> list[Instruction]:
        """One round of a loop, with one round of each loop within it."""
        return self.code(self.path(loop.head, loop.latches, loop.blocks, least))

    def whole(self, least: bool = False) -> list[Instruction]:
        """From the kernel's start to its end, with one round of each loop on the way."""
        return self.code(self.path(0, {b for b in self.reached if not self.onward[b]}, self.reached, least))


def jumps(i: Instruction) -> bool:
    """Whether a block ends there by a jump. BRA.DIV is left out: only a warp whose lanes have diverged takes it."""
    return i.base in ("BRA", "BRX", "JMP", "JMX") and "DIV" not in i.modifiers


def is_conditional(i: Instruction) -> bool:
    """By its guard, or by a predicate among its operands as in BRA P1, target."""
    return i.guard not in ("", "PT", "UPT") or re.match(r"!?U?P\d", i.operands) is not None


def work(block: list[Instruction], least: bool = False) -> Work:
    """(-tensor clocks, -bytes, CALLs, instructions): of two paths the smaller tuple is the usual one."""
    moved = [i for i in block if not (least and i.base in LOADS)]
    waits = sum(i.opcode == "WARPGROUP.DEPBAR.LE" for i in block)  # a path that does the work also waits for it
    return (
        -sum(map(tensor_clocks, block)) - waits,
        -sum(TILE_BYTES if i.base in TILES else global_bytes(i) for i in moved),
        sum(i.base == "CALL" for i in block),
        len(block),
    )


def add(a: Work, b: Work) -> Work:
    return a[0] + b[0], a[1] + b[1], a[2] + b[2], a[3] + b[3]


def postorder(edges: Edges, start: int, seen: set[int] | None = None) -> Iterator[int]:
    """Blocks reached from `start` that are not in `seen`, each after those that it leads to."""
    seen = set() if seen is None else seen
    seen.add(start)
    stack = [(start, iter(edges[start]))]
    while stack:
        b, rest = stack[-1]
        n = next((n for n in rest if n not in seen), None)
        if n is None:
            stack.pop()
            yield b
        else:
            seen.add(n)
            stack.append((n, iter(edges[n])))


def cycles(blocks: set[int], edges: Edges) -> Iterator[tuple[set[int], int]]:
    """(blocks, head) of the loops among `blocks`, inner ones first.

    A loop is a strongly connected component; within one, loops are what is left without the jumps back to its head.
    """
    for part in components(blocks, edges):
        first = min(part)
        if len(part) > 1 or first in edges[first]:
            entered = [n for b in blocks - part for n in edges[b] if n in part]
            head = min(entered, default=first)
            yield from cycles(part, [[n for n in e if n != head] for e in edges])
            yield part, head


def components(blocks: set[int], edges: Edges) -> list[set[int]]:
    """Strongly connected components (Kosaraju): searches along the edges, then backwards in the first one's order."""
    forward = [[n for n in e if n in blocks] if b in blocks else [] for b, e in enumerate(edges)]
    back: Edges = [[] for _ in edges]
    for b, e in enumerate(forward):
        for n in e:
            back[n].append(b)
    seen: set[int] = set()
    order = [x for b in sorted(blocks) if b not in seen for x in postorder(forward, b, seen)]
    seen.clear()
    return [{*postorder(back, b, seen)} for b in reversed(order) if b not in seen]
