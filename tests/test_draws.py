"""What is drawn follows the model's distribution: the numbers of seeds and places, and the engine's tokens.

Everything is fixed, so a test either always passes or never does. Chi-square is held to 5 standard deviations above its
mean, which happens to a sound generator once in about 10^5 tests.
"""

import pytest
import torch
from torch import Tensor

from ling_kernels.generate import Sampling
from ling_kernels.generate.sample import uniforms
from tests.test_engine import as_on_gpu, drive, model, plain, texts

N = 1 << 16


def check(counts: Tensor, p: Tensor | None = None) -> None:
    """counts of each kind, which have equal chances or p."""
    want = counts.sum() * (torch.full(counts.shape, 1 / counts.numel()) if p is None else p).double()
    rare = want < 5  # too few for chi-square: one kind together
    counts, want = (torch.cat([x[~rare].double(), x[rare].sum()[None].double()]) for x in (counts, want))
    real = want > 0
    square, free = ((counts - want)[real] ** 2 / want[real]).sum(), int(real.sum()) - 1
    assert not counts[~real].any() and free > 0 and square < free + 5 * (2 * free) ** 0.5
    assert square > free - 5 * (2 * free) ** 0.5 or free < 30, "evener than chance"


def bins(u: Tensor, n: int) -> Tensor:
    assert u.dtype == torch.float32 and (0 <= u).all() and (u < 1).all()
    return (u * n).long()


def pairs(u: Tensor, v: Tensor) -> None:
    check(torch.bincount(bins(u, 16) * 16 + bins(v, 16), minlength=256))


def at(seed: int | Tensor, place: int | Tensor) -> Tensor:
    return uniforms(*torch.broadcast_tensors(*(torch.as_tensor(x, dtype=torch.int64) for x in (seed, place))))


def test_published_numbers():
    """SplitMix64's first ones for seeds 0 and 1234567."""
    want = {0: [0xE220A8397B1DCDAF], 1234567: [6457827717110365317, 3203168211198807973]}
    for seed, numbers in want.items():
        got = at(seed, torch.arange(len(numbers)))
        assert (got * 2**24).long().tolist() == [n >> 40 for n in numbers]


MANY = torch.arange(N)


@pytest.mark.parametrize("seed, place", [
    *((MANY, p) for p in (0, 1, 7, 1000, 131071)), *((s, MANY) for s in (0, 1, 5, 2**62, 2**63 - 1)),
    (MANY << 40, 3), (2**63 - 1 - MANY, 0), (MANY, MANY), (MANY, N - MANY),
])  # fmt: skip
def test_one_by_one(seed, place):
    u = at(seed, place)
    check(torch.bincount(bins(u, 256), minlength=256))
    check(torch.bincount(bins(u * 2**16 % 1, 256), minlength=256))  # the last bits
    assert abs(u.double().mean() - 0.5) < 5 * (1 / 12 / N) ** 0.5


@pytest.mark.parametrize("seeds, places", [(1, 0), (0, 1), (1, 1), (1, -1), (2, 0), (0, 2), (1 << 32, 0), (0, 64)])
def test_neighbours_are_independent(seeds, places):
    """Along seeds, as the choices of one call have them, and along places, as one text has them."""
    for seed, place in ((MANY, 9), (3, MANY + 2)):
        pairs(at(seed, place), at(seed + seeds, place + places))


@pytest.mark.parametrize("name, draft", [("base", 0), ("base", 2), ("mtp1", 1)])
@pytest.mark.parametrize("engine", [plain, as_on_gpu])
def test_tokens_follow_the_logits(name, draft, engine):
    """The first token and, by groups, the first two together; with guesses they are the same to the token."""
    n, groups, prompt = 400, 4, texts(name)[0][0]
    V = model(name).config.vocab_size

    def drawn(draft):
        e = engine(name, draft=draft, max_running=50, max_rows=400, cache_tokens=1200)
        requests = [e.submit(prompt, Sampling(temperature=1.0, seed=s), 4, ()) for s in range(n)]
        drive(e)
        assert not draft or e.right > 0
        return torch.tensor([r.new_tokens for r in requests])

    tokens = drawn(draft)
    if draft:
        assert torch.equal(tokens, drawn(0))
    with torch.no_grad():
        ids = torch.cat([torch.tensor(prompt).expand(V, -1), torch.arange(V)[:, None]], 1)
        first, second = model(name)(ids).logits[:, -2:].softmax(-1).unbind(1)  # [V, V], the first the same in each row
    check(torch.bincount(tokens[:, 0], minlength=V), first[0])
    group = torch.arange(V) * groups // V  # neighbours, as numbers that are alike choose them
    of_group = torch.nn.functional.one_hot(group).float()
    both = of_group.T @ (first[0][:, None] * second) @ of_group
    kinds = group[tokens[:, 0]] * groups + group[tokens[:, 1]]
    check(torch.bincount(kinds, minlength=groups**2), both.flatten())
