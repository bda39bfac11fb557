"""Schedules: the learning rate and the rows of every step, and what a resumed run may change of them."""

# ruff: noqa: F811 (fixtures are imported)
import math

import pytest

from ling_kernels.train.schedule import learning_rate, rows_at
from ling_kernels.train.settings import Settings
from tests.training import one_line_error, small, text  # noqa: F401


def rates(steps=10, **settings):
    s = Settings(steps=steps, **dict(lr=1.0, warmup=0) | settings)
    return [learning_rate(step, **s.lr_schedule) for step in range(1, steps + 1)]


def test_warm_up_then_constant():
    assert rates(6, warmup=4) == [0.25, 0.5, 0.75, 1, 1, 1]
    assert rates(2, warmup=40) == [1 / 40, 2 / 40]


@pytest.mark.parametrize("kind, left", [
    ("linear", [1, 0.75, 0.5, 0.25]),
    ("1-sqrt", [1, 0.5, 1 - math.sqrt(0.5), 1 - math.sqrt(0.75)]),
    ("cosine", [1, (1 + math.sqrt(0.5)) / 2, 0.5, (1 - math.sqrt(0.5)) / 2]),
])  # fmt: skip
def test_the_last_steps_decay(kind, left):
    """Towards min_lr, which would follow the last step: no step is without effect where min_lr is 0."""
    assert rates(10, warmup=2, decay=kind, decay_steps=4) == pytest.approx([0.5, 1, 1, 1, 1, 1, *left])
    floor = [0.2 + 0.8 * x for x in left]
    assert rates(10, warmup=2, decay=kind, decay_steps=4, min_lr=0.2) == pytest.approx([0.5, 1, 1, 1, 1, 1, *floor])


def test_length_of_a_decay():
    assert rates(6, warmup=2, decay="linear") == pytest.approx([0.5, 1, 1, 0.75, 0.5, 0.25])
    assert [x < 1 for x in rates(20, decay="1-sqrt")] == 17 * [False] + 3 * [True]  # 4 steps, the first with all of lr
    assert rates(3, warmup=5, decay="cosine") == rates(3, warmup=5)  # the warm-up takes the whole run
    assert rates(1, decay="1-sqrt") == [1]


def test_the_ramp_of_rows():
    assert [rows_at(s, 16, (4, 6), 4) for s in range(1, 9)] == [4, 4, 8, 8, 12, 12, 16, 16]
    assert [rows_at(s, 5, (2, 3), 1) for s in range(1, 6)] == [2, 3, 4, 5, 5]
    assert rows_at(1, 16, None, 4) == 16


@pytest.mark.parametrize("flags, says", [
    ("--decay wsd", "--decay: invalid choice"), ("--decay-steps 5", "--decay-steps 5 needs a decay"),
    ("--min-lr 1e-5", "--min-lr 1e-05 needs a decay"), ("--decay linear --min-lr 1", "more than --lr"),
    ("--decay linear --warmup 3 --steps 9 --decay-steps 7", "more than --steps 9"), ("--min-lr nan", "--min-lr"),
    ("--decay cosine --warmup 9 --steps 9", "--decay cosine has no step after --warmup 9 of --steps 9"),
])  # fmt: skip
def test_a_bad_schedule_is_one_line(tmp_path, small, text, flags, says, capsys):
    argv = f"--model {small} --data {text} --out {tmp_path / 'run'} --seq-len 32 {flags}"
    assert says in one_line_error(argv.split(), capsys)
