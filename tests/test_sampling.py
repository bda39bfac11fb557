"""Sampling parameters: temperature, top-k, top-p, min-p, repetition penalty, seeds."""

import math

import pytest
import torch

from ling_kernels.errors import InputError
from ling_kernels.generate import sampler
from ling_kernels.model.sample import Sampling
from ling_kernels.ops.sample import seen_tokens


def draws(logits: list[float], n: int = 20_000, seed: int = 0, **options) -> torch.Tensor:
    """The share of n samples of each token."""
    rows = torch.tensor(logits).expand(n, -1)
    tokens = sampler(seed=seed, **options)(rows, torch.zeros(n, 1, dtype=torch.long))
    return torch.bincount(tokens, minlength=len(logits)) / n


def test_temperature_zero_is_greedy():
    logits = torch.randn(50, 30, generator=torch.Generator().manual_seed(0))
    ids = torch.zeros(50, 1, dtype=torch.long)
    assert torch.equal(sampler()(logits, ids), logits.argmax(1))
    assert torch.equal(sampler(temperature=1e-30, seed=0)(1e10 * logits, ids), logits.argmax(1))
    assert torch.equal(sampler(temperature=1e-42, seed=0)(logits, ids), logits.argmax(1)), "1 / T exceeds fp32"
    assert torch.equal(sampler(temperature=5.0, top_k=1, seed=0)(logits.bfloat16(), ids), logits.bfloat16().argmax(1))


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_draws_follow_softmax(temperature):
    logits = [2.0, 1.0, 0.0, -1.0, 0.5]
    p = (torch.tensor(logits) / temperature).softmax(0)
    share = draws(logits, temperature=temperature)
    # Five standard deviations of a share of 20000 draws.
    assert ((share - p).abs() < 5 * (p * (1 - p) / 20_000).sqrt()).all()


# Probabilities 0.5, 0.3, 0.1, 0.06, 0.04, not in order.
SHARES = [0.1, 0.5, 0.04, 0.3, 0.06]


@pytest.mark.parametrize("options, kept", [
    (dict(), {0, 1, 2, 3, 4}),
    (dict(top_k=2), {1, 3}),
    (dict(top_k=9), {0, 1, 2, 3, 4}),
    (dict(top_p=0.49), {1}),
    (dict(top_p=0.51), {1, 3}),
    (dict(top_p=0.85), {1, 3, 0}),
    (dict(top_p=1e-9), {1}),
    (dict(top_p=0.6), {1, 3}),
    (dict(top_p=0.6, top_k=2), {1}),  # of the two, the first has 0.625
    (dict(top_p=0.6, top_k=2, temperature=2.0), {1, 3}),  # now 0.564
    (dict(min_p=0.19), {1, 3, 0}),
    (dict(min_p=1.0), {1}),
    (dict(min_p=0.19, top_p=0.51), {1, 3}),
])  # fmt: skip
def test_top_k_top_p_and_min_p(options, kept):
    logits = [math.log(p) for p in SHARES]
    share = draws(logits, **{"temperature": 1.0} | options)
    assert set(share.nonzero().flatten().tolist()) == kept
    p = (torch.tensor(logits) / options.get("temperature", 1.0)).softmax(0)
    p = torch.where(torch.tensor([i in kept for i in range(5)]), p, 0)
    assert torch.allclose(share, p / p.sum(), atol=0.02), "the kept tokens keep their proportions"


def test_repetition_penalty():
    logits = torch.tensor([[2.0, 1.5, -1.0, -1.5], [2.0, 1.5, -1.0, -1.5]])
    choose = sampler(repetition_penalty=1.5)
    assert choose(logits, torch.tensor([[0, 0, 0], [2, 3, 2]])).tolist() == [1, 0], (
        "it applies once, however often a token occurs"
    )
    negative = torch.tensor([[-1.0, -1.2]])
    assert choose(negative, torch.tensor([[0]])).tolist() == [1], "it multiplies negative logits"
    assert choose(negative, torch.tensor([[1]])).tolist() == [0]
    share = draws([1.5, 0.0], temperature=0.5, repetition_penalty=3.0)  # 1.5 / 3 / 0.5 = 1
    assert abs(share[0] - torch.tensor(1.0).sigmoid()) < 0.02


def test_seen_tokens_are_those_up_to_the_row():
    token_ids = torch.tensor([[9, 2, -1, 4], [9, 2, -1, 4], [5, 7, 7, 3], [5, 7, 7, 3]], dtype=torch.int32)
    seen = seen_tokens(token_ids, torch.tensor([0, 1, 2, 3]), 10)
    assert [row.nonzero().flatten().tolist() for row in seen] == [[9], [2, 9], [5, 7], [3, 5, 7]]


def test_seed():
    def tokens(seed):
        choose, ids = sampler(temperature=1.0, seed=seed), torch.zeros(1, 1, dtype=torch.long)
        return [int(choose(torch.zeros(1, 100), ids)) for _ in range(20)]

    state = torch.get_rng_state()
    assert tokens(1) == tokens(1) != tokens(2)
    assert tokens(None) != tokens(None)
    assert len(set(tokens(1))) > 10
    assert torch.equal(state, torch.get_rng_state()), "torch's global generator is not used"


@pytest.mark.parametrize("options", [
    dict(temperature=-0.1), dict(temperature=math.nan), dict(temperature=math.inf), dict(temperature=1.0, top_k=-1),
    dict(temperature=1.0, top_p=0.0), dict(temperature=1.0, top_p=1.1), dict(temperature=1.0, top_p=math.nan),
    dict(repetition_penalty=0.0), dict(repetition_penalty=-1.0), dict(seed=-1), dict(seed=1 << 63),
    dict(temperature=1.0, min_p=-0.1), dict(temperature=1.0, min_p=1.1), dict(top_k=5), dict(top_p=0.5),
    dict(min_p=0.1),
])  # fmt: skip
def test_invalid_parameters(options):
    with pytest.raises(InputError, match=list(options)[-1]):
        sampler(**options)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_nan_and_infinite_logits(temperature):
    choose, ids = sampler(temperature=temperature), torch.zeros(1, 1, dtype=torch.long)
    for bad in ([0.0, math.nan], [math.inf, 0.0], [-math.inf, -math.inf]):
        with pytest.raises(InputError, match="NaN or infinite"):
            choose(torch.tensor([bad]), ids)
    assert int(choose(torch.tensor([[-math.inf, 0.0]]), ids)) == 1, "a masked token is allowed"


@pytest.mark.parametrize("options", [
    dict(temperature="1"), dict(temperature=None), dict(top_k=2.5), dict(top_k="3"), dict(top_p="1"), dict(top_p=1e-50),
    dict(top_p=None), dict(min_p="x"), dict(repetition_penalty="x"), dict(repetition_penalty=1e-50),
    dict(repetition_penalty=1e50), dict(seed=1.5), dict(seed="1"),
], ids=str)  # fmt: skip
def test_parameters_of_other_types_and_outside_fp32_are_refused(options):
    """top_p = 1e-50 is 0 in fp32: it kept no token, and the token drawn was one past the vocabulary."""
    (name,) = options
    with pytest.raises(InputError, match=f"{name} is "):
        Sampling(**dict(temperature=1.0) | options)
