"""Mixtures of sources: proportions, epochs of each source, the grammar of --data."""

from collections import Counter
from fractions import Fraction

import numpy as np
import pytest
import torch

from ling_kernels.errors import InputError
from ling_kernels.train.data import Packed
from ling_kernels.train.data.mixture import PERIOD, Mixture, parse_sources, schedule, shares_of
from tests.test_data import documents_of


@pytest.mark.parametrize("weights", [
    ("0.7", "0.2", "0.1"), ("1", "1"), ("3",), ("0.5", "0.3", "0.1", "0.05", "0.05"), ("0.97", "0.01", "0.01", "0.01"),
    ("5", "4", "3", "2", "1", "1"),
])  # fmt: skip
def test_proportions_are_exact_within_one_row(weights):
    weights = [Fraction(w) for w in weights]
    shares = shares_of(weights)
    assert [Fraction(s, sum(shares)) for s in shares] == [w / sum(weights) for w in weights]
    table = schedule(shares)
    assert np.bincount(table).tolist() == shares
    drawn = np.cumsum(np.eye(len(shares))[np.tile(table, 3)], 0)
    wanted = np.arange(1, len(drawn) + 1)[:, None] * np.array(shares) / sum(shares)
    assert np.abs(drawn - wanted).max() < 1


def test_weights_finer_than_a_period_are_rounded_to_it():
    shares = shares_of([Fraction("0.333333333"), Fraction("0.666666666"), Fraction("1e-9")])
    assert sum(shares) == PERIOD and shares[2] == 1
    assert abs(shares[0] - PERIOD / 3) < 1 and abs(shares[1] - 2 * PERIOD / 3) < 2


def mixture(seed=3, seq_len=4):
    """Three sources whose tokens tell which one they are from: 0..99, 100..299, 300..359."""
    sources, first = [], 0
    for lengths in ([10] * 10, [40] * 5, [7, 13, 40]):
        docs = documents_of(*lengths)
        docs.arrays[0][:] = np.arange(first, first + sum(lengths))
        sources.append(Packed(docs, seq_len, seed))
        first += sum(lengths)
    return Mixture(sources, shares_of([Fraction(w) for w in ("0.5", "0.3", "0.2")]))


def test_a_source_has_each_of_its_tokens_once_in_an_epoch():
    rows = 100  # of 4 tokens: 50, 30 and 20 rows, epochs of 25, 50 and 15
    mixed = mixture()
    seen = Counter(mixed.batch(range(rows)).ids.flatten().tolist())
    assert all(seen[i] == 2 for i in range(100))  # two epochs
    assert all(seen[i] <= 1 for i in range(100, 300)) and sum(seen[i] for i in range(100, 300)) == 120
    assert {seen[i] for i in range(300, 360)} == {1, 2}
    assert mixed.drawn(rows) == [50, 30, 20] and mixed.epochs(rows) == [2.0, 0.6, 20 / 15]
    for n in (0, 1, 7, 33):
        sources = Counter(mixed.source_of(row)[0] for row in range(n))
        assert mixed.drawn(n) == [sources[k] for k in range(3)]


def test_a_row_depends_on_its_number_and_the_seed_alone():
    whole = mixture().batch(range(60))
    for first, rows in ((59, 1), (17, 5), (0, 3)):
        part = mixture().batch(range(first, first + rows))
        assert torch.equal(part.ids, whole.ids[first : first + rows]) and part.masked is None
    assert not torch.equal(mixture(seed=4).batch(range(60)).ids, whole.ids)
    source = mixture().sources[0]  # its own stream, in order
    rows = [row for row in range(60) if mixture().source_of(row)[0] == 0]
    assert torch.equal(whole.ids[rows], source.batch(range(len(rows))).ids)


def test_grammar(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("a=1", "b=x", "web"):
        (tmp_path / name).mkdir()
    assert parse_sources(["web/=0.7", "a=1=2", "b=x=1e-1"]) == [
        ("web/", Fraction(7, 10)), ("a=1", Fraction(2)), ("b=x", Fraction(1, 10)),
    ]  # fmt: skip
    assert parse_sources(["a=1", "b=x", "gone=y"]) == [("a=1", None), ("b=x", None), ("gone=y", None)]
    for wrong, message in (
        ("web=0", "more than 0"),
        ("web=-1", "more than 0"),
        ("web=nan", "finite"),
        ("web=inf", "finite"),
    ):
        with pytest.raises(InputError, match=message):
            parse_sources([wrong])
    with pytest.raises(InputError, match="web has a weight and b=x has none"):
        parse_sources(["web=1", "b=x"])
