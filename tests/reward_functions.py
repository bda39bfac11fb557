"""Reward functions of tests: a module without torch, which a process imports in no time."""

import math
import os
import sys
import time


def count_spread(response: str, answer: str) -> float:
    """Any text gets another reward, so that every group has a signal."""
    return (sum(map(ord, response)) % 97) / 97


def hang_at_hang(response: str, answer: str) -> float:
    time.sleep(600 if answer == "hang" else 0)
    return count_spread(response, answer)


def longer(a: str, b: str) -> float:
    return 0.5 if len(a) == len(b) else float(len(a) > len(b))


def arena(responses: list[str], answer: str) -> list[float]:
    """Group Arena Reward by a judge that prefers longer answers."""
    from ling_kernels.posttrain import win_rates

    return win_rates(responses, longer)


def misjudge(responses: list[str], answer: str) -> list[float]:
    wrong = {"few": [1.0], "nan": [math.nan] * len(responses), "one": 1.0, "hang": None}
    if answer == "hang":
        time.sleep(600)
    return wrong.get(answer, [float(len(r)) for r in responses])


class Wordless(Exception):
    def __str__(self) -> str:
        raise ValueError("no words")


def misbehave(kind: str, value: float) -> float:
    print("a reward may print")
    if kind == "hang":
        time.sleep(600)
    if kind == "die":
        os._exit(3)
    if kind == "raise":
        raise KeyError("answer")
    if kind == "interrupt":
        raise KeyboardInterrupt
    if kind == "wordless":
        raise Wordless
    if kind == "huge":
        return 1e39
    if kind == "nan":
        return math.nan
    assert sys.stdin.read() == "" or kind != "read"
    return value
