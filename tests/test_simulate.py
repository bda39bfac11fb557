"""The simulator of pipelines against cases computed by hand and the formulas of the papers."""

import pytest

from ling_kernels.errors import InputError
from ling_kernels.parallel.schedules import parse_step, schedule_order
from ling_kernels.plan.simulate import Times, simulate


def order(*rows):
    return [[parse_step(text) for text in row.split()] for row in rows]


def test_by_hand():
    """Two ranks, unequal stages: F 1 and 3, B 2 and 4, one unit between the ranks.

    rank 0: 0F0 0-1, 0F1 1-2, then waits; rank 1: 1F0 2-5, 1B0 5-9, 1F1 9-12, 1B1 12-16; 0B0 10-12, 0B1 17-19.
    """
    line = simulate(order("0F0 0F1 0B0 0B1", "1F0 1B0 1F1 1B1"), [Times(1, 1, 1), Times(3, 3, 1)], transfer=1)
    assert [e[:2] for e in line.events[0]] == [(0, 1), (1, 2), (10, 12), (17, 19)]
    assert [e[:2] for e in line.events[1]] == [(2, 5), (5, 9), (9, 12), (12, 16)]
    assert line.seconds == 19 and line.busy(0) == 6 and line.bubble(1) == 1 - 14 / 19
    assert line.bubble() == pytest.approx(1 - 20 / 38)
    assert line.peak(0, [5, 7]) == 10 and line.peak(1, [5, 7]) == 7


def test_the_halves_of_a_backward():
    """The stage before waits for I only; W keeps its activations until it ends."""
    line = simulate(order("0F0 0I0 0W0", "1F0 1I0 1W0"), [Times(1, 2, 4)] * 2)
    assert [e.begin for e in line.events[0]] == [0, 4, 6] and line.seconds == 10
    assert simulate(order("0F0 0F1 0I0 0I1 0W0 0W1"), [Times(1, 1, 1)]).peak(0, [3]) == 6
    assert simulate(order("0F0 0I0 0F1 0W0 0I1 0W1"), [Times(1, 1, 1)]).peak(0, [3]) == 6
    assert simulate(order("0F0 0B0 0F1 0B1"), [Times(1, 1, 1)]).peak(0, [3]) == 3


def test_an_overlap_hides_the_shorter_of_both():
    alone, both = order("0F0 0B0 0F1 0B1"), order("0F0 (0F1;0B0)OVERLAP_F_B 0B1")
    times = [Times(2, 3, 1, exchange=1.5, exchange_back=1.5)]
    assert simulate(alone, times).seconds == 2 * (2 + 4 + 3)
    assert simulate(both, times).seconds == 3.5 + 6 + 5.5  # computing 6 hides 3 of exchange
    assert simulate(both, [Times(1, 1, 1, exchange=4, exchange_back=4)]).seconds == 5 + 8 + 6


@pytest.mark.parametrize("p", [2, 4, 5])
@pytest.mark.parametrize("v", [1, 2, 3])
def test_bubbles_of_1f1b(p, v):
    """(p - 1) / (v m) of the ideal time, with one stage a rank and interleaved (arXiv 2104.04473, 2.2)."""
    m, name = 4 * p, "1F1B" if v == 1 else "Interleaved1F1B"
    line = simulate(schedule_order(name, p, p * v, m), [Times(1, 1, 1)] * (p * v))
    ideal = 3 * m * v
    assert line.seconds - ideal == 3 * (p - 1)
    assert [line.busy(r) for r in range(p)] == [ideal] * p
    kept = [line.peak(r, [1] * p * v) for r in range(p)]
    warm_up = [p - 1 - r if v == 1 else (v - 1) * p + 2 * (p - 1 - r) for r in range(p)]
    assert kept == [w + 1 for w in warm_up]


@pytest.mark.parametrize("p", [2, 4])
def test_bubbles_of_zero_bubble_schedules(p):
    """ZB-H1 leaves (p - 1)(F + I - W) of 1F1B's (p - 1)(F + I + W); ZBV none but the fill (arXiv 2401.10241)."""
    m = 4 * p
    line = simulate(schedule_order("InterleavedZeroBubble", p, p, m), [Times(1, 1, 1)] * p)
    assert line.seconds - 3 * m == p - 1
    assert max(line.peak(r, [1] * p) for r in range(p)) == p  # no more than 1F1B
    v = simulate(schedule_order("ZBVZeroBubble", p, 2 * p, m), [Times(1, 1, 1)] * 2 * p)
    assert v.seconds - 6 * m == p - 1
    dual = schedule_order("DualPipeV", p, 2 * p, m)
    assert simulate(dual, [Times(1, 1, 1)] * 2 * p).seconds - 6 * m < 6 * (p - 1)


def test_gpipe_and_breadth_first():
    assert simulate(schedule_order("GPipe", 3, 3, 5), [Times(1, 1, 1)] * 3).seconds == 3 * (5 + 2)
    line = simulate(schedule_order("LoopedBFS", 3, 6, 5), [Times(1, 1, 1)] * 6)
    assert line.seconds == 3 * (10 + 2) and line.peak(0, [1] * 6) == 10


def test_an_order_that_stops():
    with pytest.raises(InputError, match="stops before 0B0"):
        simulate(order("0F0 0B0", "1B0 1F0"), [Times(1, 1, 1)] * 2)
