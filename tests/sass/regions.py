"""Parts of a kernel by what they do, so that edits of the source do not move them."""

import re
from collections import Counter
from collections.abc import Iterable

from tests.sass.decode import Instruction
from tests.sass.flow import Edges, Flow, postorder, work

# What a loop is called after, the first that occurs in it.
WORK = {
    "products": "[QHI]GMMA", "mma": "[HI]MMA", "tiles": "UTMALDG|UBLKCP", "copies": "LDGSTS", "loads": "LDG|LD",
    "stores": "UTMASTG|STG|ST",
}  # fmt: skip


def kind_of(path: list[Instruction]) -> str | None:
    return next((kind for kind, opcode in WORK.items() if any(re.fullmatch(opcode, i.base) for i in path)), None)


def whole(flow: Flow) -> list[Instruction]:
    """From the kernel's start to its end; of a kernel with wgmma the way of a warp that multiplies."""
    return flow.whole(least=kind_of([i for block in flow.blocks for i in block]) == "products")


def loops(flow: Flow) -> list[tuple[str, list[Instruction]]]:
    """(name, one round) of every loop that does one of WORK; "around" those that hold another of their kind.

    Warps that multiply by wgmma have no loads to do but options: adding to old results.
    """
    found = []
    for loop in sorted(flow.loops, key=lambda loop: (loop.head, -len(loop.blocks))):
        path = flow.once(loop)
        repeats = any(flow.blocks[b][-1].opcode == "BRA.U.ANY" for b in loop.latches)  # TMA, if lanes differ: never
        if not repeats and (kind := kind_of(path)):
            found.append((loop, kind, flow.once(loop, least=True) if kind == "products" else path))
    named, seen = [], Counter()
    for loop, kind, path in found:
        name = "around " * any(other.blocks < loop.blocks and k == kind for other, k, _ in found) + kind
        seen[name] += 1
        named.append((name if seen[name] == 1 else f"{name} {seen[name]}", path))
    return named


def segments(path: list[Instruction]) -> list[tuple[str, list[Instruction]]]:
    """A path, cut before every group of wgmma and after every wait for one."""
    parts: list[tuple[str, list[Instruction]]] = [("start", [])]
    for i in path:
        if i.opcode == "WARPGROUP.ARRIVE":
            parts.append(("issue", []))
        parts[-1][1].append(i)
        if i.opcode == "WARPGROUP.DEPBAR.LE":
            parts.append(("waited " + i.operands.split()[-1], []))
    return [(f"{k} {name}", part) for k, (name, part) in enumerate(parts) if part]


def between(flow: Flow, start: str, end: str, least: bool = False) -> list[Instruction]:
    """The usual path from after the last opcode that matches `start` to the last one that matches `end`, included.

    Last: no other match can follow before a loop repeats. least: loads that can be left out are. [] where there is no
    such path.
    """

    def matching(pattern: str) -> dict[int, list[int]]:
        """{block: places of its instructions that match}"""
        places = {b: [k for k, i in enumerate(flow.blocks[b]) if re.match(pattern, i.opcode)] for b in flow.reached}
        return {b: found for b, found in places.items() if found}

    starts, ends = matching(start), matching(end)
    found = []
    for first in last_of(starts, flow.onward):
        begin = starts[first][-1] + 1
        after = {*postorder(flow.onward, first)}
        for final in last_of({b for b in ends if b in after and (b != first or ends[b][-1] >= begin)}, flow.onward):
            path = flow.code(flow.path(first, {final}, after, least))[begin:]
            found.append(path[: len(path) - len(flow.blocks[final]) + ends[final][-1] + 1])
    return min(found, key=lambda path: work(path, least), default=[])


def last_of(blocks: Iterable[int], edges: Edges) -> list[int]:
    """Those of `blocks` that no other of them follows."""
    return [b for b in sorted(blocks) if not ({*postorder(edges, b)} - {b}) & {*blocks}]
