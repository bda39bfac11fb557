"""posttrain's rewards against their formulas, and their ranges."""

from itertools import combinations

import numpy as np
import pytest

from ling_kernels.errors import InputError
from ling_kernels.posttrain import (
    apex_eval,
    bradley_terry,
    evo_cot_rewards,
    length_rewards,
    pass_at_k,
    win_rates,
)


def test_length_term():
    assert length_rewards([10, 20, 30], [True, True, True]) == pytest.approx([0.5, 0, -0.5], abs=1e-9)
    assert length_rewards([10, 20, 30], [False, False, True]) == pytest.approx([0, 0, -0.5], abs=1e-9)
    assert length_rewards([7, 7], [True, False]) == [0.5, 0]
    with pytest.raises(InputError, match="lengths and correct are empty: a group has at least 1 response"):
        length_rewards([], [])
    with pytest.raises(InputError, match="got 0 and 1"):
        length_rewards([], [True])


def test_evo_cot():
    texts, right = ["short", "<think>long</think> answer", "longest"], [True, True, False]
    got = evo_cot_rewards(texts, [1, 2, 3], right, alpha=0.2, task=[0, 0, 0.7])
    assert got == pytest.approx([1 + 0.1, 1 - 0.5, -0.1 + 0.7])
    with pytest.raises(InputError, match="one for each response"):
        evo_cot_rewards(texts, [1, 2, 3], right[:2], 0.2)
    for alpha in (float("nan"), -1, None):
        with pytest.raises(InputError, match="alpha is a number of at least 0"):
            evo_cot_rewards(texts, [1, 2, 3], right, alpha)
    for length in (float("nan"), -1, None):
        with pytest.raises(InputError, match="numbers of tokens"):
            length_rewards([1, length], [True, True])


def test_arena():
    quality = [0.1, 2.0, 0.7, -1.0]
    better = lambda a, b: 1.0 if a > b else 0.5 if a == b else 0.0  # noqa: E731
    assert win_rates(quality, better) == pytest.approx([1 / 3, 1, 2 / 3, 0])
    strengths = bradley_terry(quality, better)
    assert np.argsort(strengths).tolist() == np.argsort(quality).tolist() and abs(sum(strengths)) < 1e-9
    assert win_rates([1, 1, 1], better) == [0.5] * 3 and bradley_terry([1, 1, 1], better) == pytest.approx([0] * 3)
    for arena in (win_rates, bradley_terry):
        with pytest.raises(InputError, match="at least 2"):
            arena([1], better)
        for result in (2, -0.1, float("nan"), None, "better", (1, 0), [], 1j):
            with pytest.raises(InputError, match="between 0 and 1"):
                arena([1, 2], lambda a, b, result=result: result)
        with pytest.raises(KeyError):  # the judge's own error is not hidden
            arena([1, 2], lambda a, b: {}[a])
    for prior in (0, float("nan"), float("inf"), "1"):
        with pytest.raises(InputError, match="prior is a number above 0"):
            bradley_terry([1, 2], better, prior=prior)


def test_strengths_are_recovered_from_their_probabilities():
    true = [1.0, -0.5, 0.2, -0.7]
    got = bradley_terry(true, lambda a, b: 1 / (1 + np.exp(b - a)), prior=1e-6, steps=5000)
    assert got == pytest.approx(true, abs=1e-3)


def test_pass_at_k():
    for n, c, k in ((5, 2, 1), (5, 2, 3), (6, 0, 2), (6, 6, 1), (7, 3, 5)):
        draws = [*combinations([i < c for i in range(n)], k)]
        assert pass_at_k(n, c, k) == pytest.approx(sum(map(any, draws)) / len(draws))
    for wrong in ((5, 6, 1), (5, 2, 6), (5, 2, 0), (5.5, 2, 3)):
        with pytest.raises(InputError, match="correct"):
            pass_at_k(*wrong)


def test_apex_eval():
    """At k = 1 the first is best, at k = 4 the second, which solves more prompts, each seldom."""
    results = {"sure": [(8, 8), (8, 0)], "wide": [(8, 3), (8, 3)]}
    assert apex_eval(results, 1)[0] == "sure" and apex_eval(results, 4)[0] == "wide"
    assert apex_eval(results, 4)[1]["sure"] == 0.5
    with pytest.raises(InputError, match="at least one prompt"):
        apex_eval({"none": []}, 1)
