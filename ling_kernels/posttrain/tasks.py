"""Toy tasks whose answers a program can check: arithmetic and sorting, for trying reinforcement learning on a CPU.

The import needs no torch: a process that only computes rewards loads it in milliseconds.
"""

from collections.abc import Callable
from random import Random
from typing import NamedTuple


class Problem(NamedTuple):
    prompt: str  # what a user asks
    answer: str  # what an answer must end with
    demonstration: str  # an answer in the format that the model is to learn, thoughts included


def arithmetic(random: Random) -> Problem:
    """The sum of three digits, one after the other: "3+8+5" -> "3+8=11; 11+5=16. 16"."""
    a, b, c = (random.randrange(10) for _ in range(3))
    return Problem(f"{a}+{b}+{c}", f"{a + b + c}", f"{a}+{b}={a + b}; {a + b}+{c}={a + b + c}. {a + b + c}")


def sorting(random: Random) -> Problem:
    """Four to six digits in ascending order: "sort 5 3 9 3" -> "3 3 5 9"."""
    digits = [random.randrange(10) for _ in range(random.randint(4, 6))]
    answer = " ".join(map(str, sorted(digits)))
    return Problem(f"sort {' '.join(map(str, digits))}", answer, answer)


TASKS: dict[str, Callable[[Random], Problem]] = dict(arithmetic=arithmetic, sorting=sorting)


def exact(response: str, answer: str) -> float:
    """1 where what follows the response's last full stop is the answer, otherwise 0."""
    return float(response.rpartition(".")[2].strip() == answer)
