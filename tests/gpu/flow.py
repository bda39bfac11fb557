"""The flow of control between basic blocks: which registers live across them, and in what order they run."""


def live_at_begin(reads: list[int], writes: list[int], following: list[list[int]]) -> list[int]:
    """For each block the registers, as bits, that some path from its beginning reads before it writes them.

    reads: of each block, before it has written them itself; writes: what it writes in any case.
    """
    live, changed = [0] * len(following), True
    while changed:
        changed = False
        for i in reversed(range(len(following))):
            later = 0
            for to in following[i]:
                later |= live[to]
            now = reads[i] | later & ~writes[i]
            changed |= now != live[i]
            live[i] = now
    return live


def running_order(following: list[list[int]]) -> list[int]:
    """The blocks in such an order that lanes which parted meet again if the earliest block runs first.

    Every loop lies together, and before what follows it: Bourdoncle's weak topological order.
    """
    order: list[int] = []
    cut: set[tuple[int, int]] = set()  # edges back to the head of a loop

    def components(nodes, start):
        """Strongly connected components in topological order, each with the node that was met first (Tarjan)."""
        index, low, stack, on, out = {start: 0}, {start: 0}, [start], {start}, []
        work = [(start, iter(following[start]))]
        while work:
            v, rest = work[-1]
            for u in rest:
                if u not in nodes or (v, u) in cut:
                    continue
                if u not in index:
                    index[u] = low[u] = len(index)
                    stack.append(u), on.add(u), work.append((u, iter(following[u])))
                    break
                if u in on:
                    low[v] = min(low[v], index[u])
            else:
                work.pop()
                if work:
                    low[work[-1][0]] = min(low[work[-1][0]], low[v])
                if low[v] == index[v]:
                    part = stack[stack.index(v) :]
                    del stack[len(stack) - len(part) :]
                    on.difference_update(part)
                    out.append((v, part))
        return out[::-1]

    def visit(nodes, start):
        for head, part in components(nodes, start):
            if len(part) == 1:
                order.append(head)
            else:
                cut.update((v, head) for v in part)
                visit(set(part), head)

    visit(set(range(len(following))), 0)
    return order
