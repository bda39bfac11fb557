"""The order of waiting requests, against sorting them anew each time."""

import random
from collections import Counter

import pytest

from ling_kernels.generate.request import Request
from ling_kernels.generate.waiting import Waiting
from ling_kernels.model.sample import Sampling


def next_by_sorting(preempted: list[Request], others: list[Request], running: Counter[str]) -> Request:
    """Of requests in order of arrival."""
    return (preempted or sorted(others, key=lambda r: (running[r.client], r.priority)))[0]


@pytest.mark.parametrize("seed", range(30))
def test_order(seed):
    """Requests arrive, are admitted, passed, preempted, cancelled and finish; few and many clients and priorities."""
    rng = random.Random(seed)
    clients, priorities = rng.choice([1, 3, 40]), rng.choice([1, 4])
    waiting, preempted, others, running = Waiting(), [], [], []
    admitted = passed = 0
    for _ in range(60):
        for _ in range(rng.randrange(8)):
            client = str(rng.randrange(clients))
            others.append(Request([1], Sampling(), 1, frozenset(), client=client, priority=rng.randrange(priorities)))
            waiting.append(others[-1])
        for _ in range(rng.randrange(3)):
            if others or preempted:
                cancelled = rng.choice(others + preempted)
                (others if cancelled in others else preempted).remove(cancelled)
                waiting.remove(cancelled)
                assert cancelled not in waiting
        for _ in range(rng.randrange(3)):
            if running:
                preempted.insert(0, running.pop())
                waiting.preempted.appendleft(preempted[0])
        running = [r for r in running if rng.random() < 0.8]  # the rest has finished
        assert [*waiting] == preempted + others and len(waiting) == len(preempted) + len(others)
        left, left_preempted, most = [*others], [*preempted], rng.choice([1, 4, 1000])
        count = Counter(r.client for r in running)
        order = waiting.in_order(count)
        for request in order:
            assert request in waiting
            assert request is next_by_sorting(left_preempted, left, Counter(r.client for r in running))
            (left_preempted if left_preempted else left).remove(request)
            if rng.random() < 0.5:
                passed += 1
                continue
            waiting.remove(request)
            (preempted if request in preempted else others).remove(request)
            running.append(request)
            count[request.client] += 1
            admitted += 1
            most -= 1
            if not most:
                break
        else:
            assert not left and not left_preempted
    assert admitted > 20 and passed > 20
