"""Random sampling follows the model's distribution: the random numbers, and the engine's tokens.

All seeds are fixed, so each test always passes or always fails. Chi-square must stay within 5 standard deviations of
its mean, which a correct generator exceeds about once in 10^5 tests.
"""

import pytest
import torch
from torch import Tensor

from ling_kernels.generate import Sampling
from ling_kernels.ops.sample import uniforms
from tests.engines import drain, make_engine, make_overlapped_engine, model, references

N = 1 << 16


def check(counts: Tensor, p: Tensor | None = None) -> None:
    """Chi-square test of counts [kinds] against probabilities p, default equal ones."""
    want = counts.sum() * (torch.full(counts.shape, 1 / counts.numel()) if p is None else p).double()
    rare = want < 5  # too few for chi-square: merged into one kind
    counts, want = (torch.cat([x[~rare].double(), x[rare].sum()[None].double()]) for x in (counts, want))
    possible = want > 0
    square, free = ((counts - want)[possible] ** 2 / want[possible]).sum(), int(possible.sum()) - 1
    assert not counts[~possible].any() and free > 0 and square < free + 5 * (2 * free) ** 0.5
    assert square > free - 5 * (2 * free) ** 0.5 or free < 30, "more even than chance"


def bins(u: Tensor, n: int) -> Tensor:
    assert u.dtype == torch.float32 and (0 <= u).all() and (u < 1).all()
    return (u * n).long()


def pairs(u: Tensor, v: Tensor) -> None:
    check(torch.bincount(bins(u, 16) * 16 + bins(v, 16), minlength=256))


def numbers_at(seed: int | Tensor, position: int | Tensor) -> Tensor:
    return uniforms(*torch.broadcast_tensors(*(torch.as_tensor(x, dtype=torch.int64) for x in (seed, position))))


def test_published_numbers():
    """The first numbers of SplitMix64 for seeds 0 and 1234567."""
    want = {0: [0xE220A8397B1DCDAF], 1234567: [6457827717110365317, 3203168211198807973]}
    for seed, numbers in want.items():
        got = numbers_at(seed, torch.arange(len(numbers)))
        assert (got * 2**24).long().tolist() == [n >> 40 for n in numbers]


MANY = torch.arange(N)


@pytest.mark.parametrize("seed, position", [
    *((MANY, p) for p in (0, 1, 7, 1000, 131071)), *((s, MANY) for s in (0, 1, 5, 2**62, 2**63 - 1)),
    (MANY << 40, 3), (2**63 - 1 - MANY, 0), (MANY, MANY), (MANY, N - MANY),
])  # fmt: skip
def test_numbers_are_uniform(seed, position):
    u = numbers_at(seed, position)
    check(torch.bincount(bins(u, 256), minlength=256))
    check(torch.bincount(bins(u * 2**16 % 1, 256), minlength=256))  # the last bits
    assert abs(u.double().mean() - 0.5) < 5 * (1 / 12 / N) ** 0.5


@pytest.mark.parametrize("seeds, positions", [(1, 0), (0, 1), (1, 1), (1, -1), (2, 0), (0, 2), (1 << 32, 0), (0, 64)])
def test_neighbours_are_independent(seeds, positions):
    """Neighbouring seeds are the choices of one call; neighbouring positions are one sequence."""
    for seed, position in ((MANY, 9), (3, MANY + 2)):
        pairs(numbers_at(seed, position), numbers_at(seed + seeds, position + positions))


@pytest.mark.parametrize("name, draft", [("base", 0), ("base", 2), ("mtp1", 1)])
@pytest.mark.parametrize("engine", [make_engine, make_overlapped_engine])
def test_tokens_follow_the_logits(name, draft, engine):
    """The first token and, in groups, the pair of the first two; drafts change no token."""
    n, groups, prompt = 400, 4, references(name)[0][0]
    V = model(name).config.vocab_size

    def drawn(draft):
        e = engine(name, draft=draft, max_running=50, max_rows=400, cache_tokens=1200)
        requests = [e.submit(prompt, Sampling(temperature=1.0, seed=s), 4, ()) for s in range(n)]
        drain(e)
        assert not draft or e.accepted > 0
        return torch.tensor([r.new_tokens for r in requests])

    tokens = drawn(draft)
    if draft:
        assert torch.equal(tokens, drawn(0))
    with torch.no_grad():
        ids = torch.cat([torch.tensor(prompt).expand(V, -1), torch.arange(V)[:, None]], 1)
        first, second = model(name)(ids).logits[:, -2:].softmax(-1).unbind(1)  # [V, V], the first the same in each row
    check(torch.bincount(tokens[:, 0], minlength=V), first[0])
    group = torch.arange(V) * groups // V  # neighbours, which similar random numbers select
    of_group = torch.nn.functional.one_hot(group).float()
    both = of_group.T @ (first[0][:, None] * second) @ of_group
    kinds = group[tokens[:, 0]] * groups + group[tokens[:, 1]]
    check(torch.bincount(kinds, minlength=groups**2), both.flatten())
