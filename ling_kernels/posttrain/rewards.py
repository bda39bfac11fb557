"""Rewards and choices of Ling-2.0's reinforcement learning (arXiv 2510.22115, section 4), for any trainer."""

import math
from collections.abc import Callable, Hashable, Mapping, Sequence
from itertools import combinations
from numbers import Integral, Real
from typing import TypeVar

from ..errors import InputError

Response = TypeVar("Response")
Name = TypeVar("Name", bound=Hashable)


def length_rewards(lengths: Sequence[int], correct: Sequence[bool]) -> list[float]:
    """Evo-CoT's length term of a group of responses to one prompt, in -0.5..0.5, without its factor alpha.

    p(l) = 0.5 - (l - shortest) / (longest - shortest + 1e-9); a wrong response gets min(p, 0). lengths in tokens.
    """
    same_size(lengths, correct, "lengths", "correct")
    if not all(isinstance(n, Real) and 0 <= n < math.inf for n in lengths):
        raise InputError(f"lengths are numbers of tokens; got {[*lengths]}")
    shortest, longest = min(lengths), max(lengths)
    p = [0.5 - (n - shortest) / (longest - shortest + 1e-9) for n in lengths]
    return [x if right else min(x, 0.0) for x, right in zip(p, correct, strict=True)]


def evo_cot_rewards(
    responses: Sequence[str],
    lengths: Sequence[int],
    correct: Sequence[bool],
    alpha: float,
    task: Sequence[float] | None = None,
) -> list[float]:
    """Evo-CoT's reward of a group: 1 if correct, alpha times the length term, -0.5 for a response with <think>, which
    the instant format lacks, and the task's own reward. alpha is larger for easy prompts; the paper gives no value."""
    same_size(responses, correct, "responses", "correct")
    same_size(responses, task if task is not None else responses, "responses", "task")
    if not (isinstance(alpha, Real) and 0 <= alpha < math.inf):
        raise InputError(f"alpha is a number of at least 0; got {alpha!r}")
    by_length = length_rewards(lengths, correct)
    formats = [-0.5 if "<think>" in text else 0.0 for text in responses]
    parts = zip(map(float, correct), by_length, formats, task or [0.0] * len(responses), strict=True)
    return [right + alpha * length + form + own for right, length, form, own in parts]


def win_rates(responses: Sequence[Response], judge: Callable[[Response, Response], float]) -> list[float]:
    """Group Arena Reward: every pair of a group's responses is compared; a response's reward is its mean result.

    judge(a, b) is 1 where a is better, 0 where b is, 0.5 for a draw, or a probability between. The paper gives no
    formula for the cumulative result; this mean is ours, and so is `bradley_terry`.
    """
    wins = round_robin(responses, judge)
    return [sum(row) / (len(responses) - 1) for row in wins]


def bradley_terry(
    responses: Sequence[Response], judge: Callable[[Response, Response], float], prior: float = 0.5, steps: int = 200
) -> list[float]:
    """Group Arena Reward by strengths s with P(i beats j) = 1 / (1 + exp(s_j - s_i)), fitted to all pairs; mean 0.

    Each response also has `prior` wins and as many losses against one of strength 0, which keeps strengths finite where
    one wins or loses all. Fitted by the minorisation of Hunter (2004).
    """
    if not (isinstance(prior, Real) and 0 < prior < math.inf):
        raise InputError(f"prior is a number above 0; got {prior!r}")
    wins = round_robin(responses, judge)
    n = len(responses)
    power = [1.0] * n
    for _ in range(steps):
        power = [
            (sum(wins[i]) + prior)
            / (sum(1 / (power[i] + power[j]) for j in range(n) if j != i) + 2 * prior / (power[i] + 1))
            for i in range(n)
        ]
    strengths = [math.log(p) for p in power]
    return [s - sum(strengths) / n for s in strengths]


def round_robin(responses: Sequence[Response], judge: Callable[[Response, Response], float]) -> list[list[float]]:
    """wins[i][j]: the judge's result of i against j; 0 on the diagonal."""
    if len(responses) < 2:
        raise InputError(f"an arena needs at least 2 responses; got {len(responses)}")
    wins = [[0.0] * len(responses) for _ in responses]
    for i, j in combinations(range(len(responses)), 2):
        given = judge(responses[i], responses[j])
        try:
            result = float(given)
        except (TypeError, ValueError):
            result = math.nan
        if not 0 <= result <= 1:
            raise InputError(f"the judge's result is between 0 and 1; got {given!r}")
        wins[i][j], wins[j][i] = result, 1 - result
    return wins


def pass_at_k(samples: int, correct: int, k: int) -> float:
    """The chance that at least one of k samples is correct, unbiased from `correct` of `samples` (arXiv 2107.03374)."""
    whole = all(isinstance(n, Integral) for n in (samples, correct, k))
    if not whole or not 0 <= correct <= samples or not 1 <= k <= samples:
        raise InputError(f"0 <= correct <= samples and 1 <= k <= samples; got {correct=}, {samples=}, {k=}")
    if samples - correct < k:
        return 1.0
    return 1 - math.prod(1 - k / i for i in range(samples - correct + 1, samples + 1))


def apex_eval(results: Mapping[Name, Sequence[tuple[int, int]]], k: int) -> tuple[Name, dict[Name, float]]:
    """The checkpoint from which reinforcement learning starts: the one with the highest mean pass@k, and all means.

    results: for each checkpoint (samples, correct) of each prompt. Of equal ones the first.
    """
    if not results or not all(results.values()):
        raise InputError("every checkpoint needs at least one prompt")
    means = {name: sum(pass_at_k(*row, k) for row in rows) / len(rows) for name, rows in results.items()}
    return max(means, key=means.__getitem__), means


def same_size(a: Sequence, b: Sequence, name_a: str, name_b: str) -> None:
    if not len(a) and not len(b):
        raise InputError(f"{name_a} and {name_b} are empty: a group has at least 1 response")
    if len(a) != len(b):
        raise InputError(f"{name_a} and {name_b} are one for each response; got {len(a)} and {len(b)}")
