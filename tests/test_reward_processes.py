"""Reward functions in processes of their own: one that hangs, dies or raises costs its answer alone."""

import math

import pytest

from ling_kernels.errors import InputError
from ling_kernels.posttrain import RewardProcesses, exact
from tests.reward_functions import misbehave, misjudge


def test_each_fault_costs_its_answer_alone(capfd):
    kinds = ["good", "hang", "good", "die", "raise", "nan", "good", "die", "hang", "read"]
    with RewardProcesses(misbehave, processes=2, timeout=0.5) as rewards:
        scores = rewards([(kind, float(i)) for i, kind in enumerate(kinds)])
        assert [s.failure for s in scores] == [
            None, "timeout", None, "died", "raised", "not a number", None, "died", "timeout", None,
        ]  # fmt: skip
        assert [s.value for s in scores] == [0, 0, 2, 0, 0, 0, 6, 0, 0, 9]
        assert "KeyError" in scores[4].message and scores[3].message == "exit code 3" and "0.5 s" in scores[1].message
        assert [s.value for s in rewards([("good", 5.0)] * 3)] == [5, 5, 5], "the processes are used again"
        assert rewards([]) == []
        assert rewards([("good", 1.0, "one argument too many")])[0].failure == "raised"
    assert "a reward may print" in capfd.readouterr().err


def test_rewards_of_whole_groups():
    """One list of responses in a call; what is no reward for each of them costs the group."""
    groups = [(["a", "bcd"], kind) for kind in ("few", "good", "nan", "one", "hang")] + [(["abc"], "good")]
    with RewardProcesses(misjudge, processes=2, timeout=1.0, of_group=True) as rewards:
        scores = rewards(groups)
    assert [s.value for s in scores] == [0, 0, 1, 3, 0, 0, 0, 0, 0, 0, 3]
    kinds = ["raised", None, "not a number", "raised", "timeout"]
    assert [s.failure for s in scores] == [kind for kind in kinds for _ in range(2)] + [None]
    assert "1 rewards for 2 responses" in scores[0].message


def test_rewards_that_fp32_does_not_hold_and_errors_without_words():
    with RewardProcesses(misbehave, processes=2, timeout=60) as rewards:
        scores = rewards([("huge", 0.0), ("wordless", 0.0), ("interrupt", 0.0), ("interrupt", 0.0), ("good", 4.0)])
    assert [s.failure for s in scores] == ["not a number", "raised", "died", "died", None]
    assert scores[1].message == "Wordless" and [s.message for s in scores[2:4]] == ["exit code -2"] * 2  # not a kill


def test_calls_that_are_given_up_do_not_answer_the_next(monkeypatch):
    with RewardProcesses(misbehave, processes=2, timeout=60) as rewards:
        with pytest.raises(InputError, match="what JSON holds: Object of type set"):
            rewards([("good", 1.0), ("good", {2.0})])

        def interrupted(*_):
            raise KeyboardInterrupt

        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(rewards, "until_deadline", interrupted)
            rewards([("good", 1.0)])
        assert [s.value for s in rewards([("good", 2.0), ("good", 3.0)])] == [2, 3]


def test_long_answers_and_dead_processes_between_calls():
    with RewardProcesses(exact, processes=1, timeout=30) as rewards:
        text = "é" * 300_000
        assert [s.value for s in rewards([(text, text), (f"So. {text}", text), (text, "")])] == [1, 1, 0]
        rewards.workers[0].process.kill()
        rewards.workers[0].process.wait()
        assert rewards([("7", "7")])[0].failure == "died" and rewards([("7", "7")])[0].value == 1


@pytest.mark.parametrize("function, text", [
    (lambda response: 1.0, "no lambda"), ("exact", "can be imported"), ("no_such_module_here:f", "No module named"),
    ("ling_kernels.posttrain.tasks:none", "has no attribute 'none'"),
])  # fmt: skip
def test_functions_that_cannot_be_imported(function, text):
    with pytest.raises(InputError, match=text), RewardProcesses(function) as rewards:
        rewards([("a", "a")])


@pytest.mark.parametrize("options", [dict(processes=0), dict(timeout=0.0), dict(timeout=math.nan)])
def test_numbers_that_cannot_work(options):
    with pytest.raises(InputError, match="at least 1 process and a timeout above 0"):
        RewardProcesses(exact, **options)
