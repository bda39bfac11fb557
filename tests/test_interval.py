"""The time between checkpoints: the formulas against their own minimum, and Ling-1T's published interval."""

import numpy as np
import pytest

from ling_kernels.plan.__main__ import main
from ling_kernels.plan.interval import DAY, daly, lost_minutes, young


@pytest.mark.parametrize("save, failures", [(0.5, 0.6), (4.5, 3.0), (0.05, 20.0)])
def test_youngs_interval_loses_least(save, failures):
    best = young(save, failures)
    others = np.geomspace(best / 4, best * 4, 401)
    lost = [lost_minutes(s, save, failures, 7.0) for s in others]
    assert others[int(np.argmin(lost))] == pytest.approx(best, rel=0.01)
    assert lost_minutes(best, save, failures, 7.0) == pytest.approx(2 * np.sqrt(720 * save * failures) + 7.0 * failures)


@pytest.mark.parametrize("save, failures", [(0.5, 0.6), (5.0, 10.0), (10.0, 20.0)])
def test_dalys_interval_takes_the_least_time(save, failures):
    """The expected time of work with failures at random times, by its exact formula."""
    mean, work = DAY / failures, np.geomspace(0.5, 600, 20001)
    expected = (np.exp((work + save) / mean) - 1) / work
    assert daly(save, failures) == pytest.approx(work[int(expected.argmin())], rel=0.01)


def test_they_agree_where_failures_are_rare():
    assert daly(0.01, 0.01) == pytest.approx(young(0.01, 0.01), rel=1e-3)
    assert daly(5000.0, 1.0) == DAY  # a save that takes longer than a run lives


def test_the_published_interval():
    """Section 5.3.5: saves of 269 s took 2.43 % and of 30 s 0.82 %, every 48 minutes. The share of E without A at the
    best interval goes with sqrt(C), so 30 s gives 2.43 % sqrt(30 / 269) = 0.81 %."""
    assert 2.43 * np.sqrt(30 / 269) == pytest.approx(0.82, abs=0.02)
    failures = 2880 * 0.5 / 48**2
    assert young(0.5, failures) == pytest.approx(48)


def test_the_command(capsys):
    assert main("interval --save-seconds 30 --failures 0.625 --step-seconds 20".split()) == 0
    out = capsys.readouterr().out
    assert "every 48.0 minutes" in out and "--save-every 144" in out and "lost 36.2 minutes" in out
    for flags in ("--save-seconds 0 --failures 1", "--save-seconds 1 --failures inf", "--failures 1"):
        assert main(["interval", *flags.split()]) == 2
        assert capsys.readouterr().err.count("\n") == 1
