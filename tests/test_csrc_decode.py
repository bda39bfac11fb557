"""The kernels around the layers of a decode pass, on the virtual GPU: inputs, sampling, accepted tokens."""

import pytest
import torch

from ling_kernels.ops.accept_tokens import accept_tokens_ref
from ling_kernels.ops.decode_inputs import decode_inputs_ref
from ling_kernels.ops.sample import LARGEST, sample_ref, uniforms
from tests.cases import Rand, accept_tokens_args, sample_args
from tests.gpu.build import load, missing
from tests.test_draws import check as check_shares

if missing():
    pytest.skip(f"csrc/ needs {missing()} to run on the virtual GPU", allow_module_level=True)

C = load()
BF16, FP16, FP32, I32, I64 = torch.bfloat16, torch.float16, torch.float32, torch.int32, torch.int64
RANDOM, PENALISED = (True, True, False), (True, True, True)


def check_decode_inputs(C):
    """Rows of one vector and of more than a block's threads; lanes of length 0 and 1; negative tokens."""
    for n, H, dtype, width, lengths in ((1, 8, BF16, 5, (3,)), (3, 24, FP32, 0, (0, 1, 9, 7)),
                                        (8, 1048, FP16, 2, (1, 20, 0)), (2, 64, BF16, 5, ())):  # fmt: skip
        rand, L = Rand(dtype), len(lengths) + 2
        state = rand.ints(-2, 50, L, 40), torch.tensor([*lengths, 0, 4], dtype=I64), rand.ints(0, 99, L, 5)
        lanes = torch.randperm(len(lengths), generator=rand.g)
        embeddings = rand.data(50, H)
        got = (
            torch.full((len(lanes) * n, H), torch.nan, dtype=dtype), torch.full((len(lanes) * n,), -7),
            torch.full((len(lanes),), -7, dtype=I32), torch.full((len(lanes), width), -7, dtype=I32),
        )  # fmt: skip
        C.decode_inputs_fwd(lanes, *state, embeddings, *got)
        for g, w in zip(got, decode_inputs_ref(lanes, *state, embeddings, n, width), strict=True):
            assert torch.equal(g, w) and g.dtype == w.dtype


def check_accept_tokens(C):
    for B, n, P, kinds in ((1, 1, 10, 3), (5, 1, 40, 2), (6, 2, 60, 3), (7, 4, 90, 9), (9, 8, 3000, 12), (0, 3, 20, 2)):
        for seed in range(6):
            *args, token_ids, lengths, lookup = accept_tokens_args(Rand(FP32, seed), B, n, P, kinds, seed % 2 > 0)
            state, got = (token_ids.clone(), lengths.clone()), torch.full((B, n + 1), -7)
            want = accept_tokens_ref(*args, *state, lookup)
            C.accept_tokens_fwd(*args, token_ids, lengths, got, lookup)
            assert torch.equal(got, want) and all(map(torch.equal, state, (token_ids, lengths)))


def check_lookup(C):
    """The cases of tests/test_drafts.py, and a sequence longer than a block."""
    for ids, count, drafts in (([1, 2, 3, 4, 9, 1, 2, 3], 3, [4, 9, 1]), ([5, 3, 7, 3], 2, [7, 3]), ([1], 1, [1]),
                               ([1, 2, 1, 2], 5, [1, 2, 1, 2, 1]), ([1, 2], 2, [2, 2]), ([4] * 3, 3, [4, 4, 4]),
                               ([*range(3000), 7, 8], 2, [9, 10])):  # fmt: skip
        n, length = count + 1, len(ids) - 1
        token_ids = torch.full((1, len(ids) + 20), ids[-1], dtype=I32)  # ids past the end must not count
        token_ids[0, :length] = torch.tensor(ids[:-1], dtype=I32)
        token_ids[0, length : length + n] = -5  # wrong drafts
        positions = (length - 1 + torch.arange(n)).clamp(min=0)[None]
        if not length:  # a lane that begins
            continue
        tokens, lengths, output = torch.full((1, n), ids[-1]), torch.tensor([length]), torch.full((1, n + 1), -7)
        C.accept_tokens_fwd(tokens, torch.tensor([0]), positions, token_ids, lengths, output, True)
        assert lengths.item() == len(ids) and output[0, -1] == 0
        assert token_ids[0, len(ids) : len(ids) + count].tolist() == drafts


def launched(C, logits, parameters, mode, lanes, positions, token_ids, seeds):
    tokens = torch.full((len(logits),), -7)
    C.sample_fwd(logits, lanes, positions, token_ids, seeds, *parameters, tokens, *mode[::2])
    return tokens


def check_sample(C, *args):
    got, want = launched(C, *args), sample_ref(*args)
    assert torch.equal(got, want), (got, want)
    return got


def check_greedy(C):
    """Ties, -0 and 0, NaN, inf; vocabularies that leave blocks without logits; unaligned rows."""
    for V, dtype in ((1, FP32), (7, BF16), (64, FP16), (515, FP32), (1000, BF16), (9000, BF16)):
        rand = Rand(dtype)
        logits = rand.ints(-3, 4, 6, V).to(dtype)  # ties in every row
        logits[1] = rand.data(V)
        logits[2] = 0.0 * logits[2].clamp(max=0)
        logits[3, V // 2], logits[4, V - 1] = torch.nan, torch.inf
        logits[5] = -torch.inf
        tokens = torch.full((6,), -7)
        C.sample_fwd(logits, *(None,) * 9, tokens, False, False)
        assert torch.equal(tokens[:3], logits[:3].float().argmax(1)) and tokens[3:].tolist() == [-1] * 3


def check_random(C):
    """All parameters at once, in many rows of several lanes; ties; -inf and NaN."""
    for V, n, dtype in ((7, 1, FP32), (300, 2, BF16), (3001, 3, FP32), (4096, 1, FP16)):
        for seed in range(3):
            logits, *args = sample_args(Rand(dtype, seed), 4, V, n, mode=PENALISED if seed else RANDOM, ties=seed < 2)
            logits[1, :: 2 if V > 7 else 9] = -torch.inf
            if seed == 2:
                logits[0, V // 3] = torch.nan
            check_sample(C, logits, *args)


def check_smallest_temperature(C):
    logits, *args = sample_args(Rand(FP32), 4, 300, mode=RANDOM, temperature=1e-42)
    assert torch.equal(check_sample(C, logits, *args), logits.argmax(1))


def check_seen(C):
    """Tokens of the sequence up to the row's position count, at any distance; greedy and random."""
    for mode in ((False, False, True), PENALISED):
        fixed = dict(repetition_penalty=2.0, temperature=1.0 if mode[0] else 0.0)
        logits, parameters, _, *state = sample_args(Rand(FP32), 3, 700, 2, P=2500, **fixed)
        tokens = check_sample(C, logits, parameters, mode, *state)
        assert not torch.equal(tokens, launched(C, logits, parameters, (mode[0], True, False), *state))


CHECKS = [
    check_decode_inputs,
    check_accept_tokens,
    check_lookup,
    check_greedy,
    check_random,
    check_smallest_temperature,
    check_seen,
]


@pytest.mark.parametrize("check", CHECKS, ids=lambda f: f.__name__[6:])
def test_correct(check, schedule):
    check(C)


def test_a_large_vocabulary():
    """Ling's, the largest that fits, and a larger one."""
    for V, fixed in ((157184, dict(top_k=40, top_p=0.95)), (LARGEST, dict(top_p=0.9, top_k=LARGEST))):
        rand = Rand(BF16)
        logits, parameters, _, lanes, *state = sample_args(rand, 1, V, 1, temperature=0.8, min_p=0.0, **fixed)
        check_sample(C, logits, parameters, PENALISED, lanes, *state)
    with pytest.raises(ValueError, match="kSharedMemory"):
        check_sample(C, rand.data(1, LARGEST + 50_000), parameters, PENALISED, lanes, *state)


def exact_intervals(logits, temperature, top_k, top_p, min_p):
    """By softmax in fp64: where each token's interval ends, as a share; the kept tokens."""
    p = (logits.double() / temperature).softmax(0)
    order = p.argsort(descending=True, stable=True)
    kept = p >= p[order[top_k - 1]]
    p = torch.where(kept, p, 0) / p[kept].sum()
    before = torch.empty_like(p)
    before[order] = p[order].cumsum(0) - p[order]
    kept &= (before < top_p) & (p >= min_p * p.max())
    p = torch.where(kept, p, 0)
    return (p / p.sum()).cumsum(0), kept


@pytest.mark.parametrize("top_k, top_p, min_p", [(600, 1.0, 0.0), (50, 1.0, 0.0), (600, 0.8, 0.0), (30, 0.9, 0.02)])
def test_draws_are_those_of_the_formula(top_k, top_p, min_p):
    """Each token's interval holds the random number, up to rounding; and many seeds draw tokens by their shares."""
    V, n, temperature, mode = 600, 1 << 13, 0.7, (True, True, False)
    (row,) = Rand(FP32).data(1, V) * 2
    parameters = [torch.tensor([x]) for x in (temperature, top_p, min_p, 1.0)] + [torch.tensor([top_k])]
    ends, kept = exact_intervals(row, temperature, top_k, top_p, min_p)
    assert (top_k, top_p, min_p) == (V, 1.0, 0.0) or kept.sum() < V / 2
    begins = ends.roll(1)
    begins[0] = 0
    state = torch.tensor([0]), torch.arange(n), torch.zeros(1, 1, dtype=I32), torch.tensor([7])
    tokens = sample_ref(row.expand(n, V), parameters, mode, *state)
    u = uniforms(state[3].expand(n), state[1]).double()
    assert kept[tokens].all() and (begins[tokens] - 1e-5 < u).all() and (u < ends[tokens] + 1e-5).all()
    check_shares(torch.bincount(tokens, minlength=V), ends.diff(prepend=ends.new_zeros(1)))
    few = state[0], state[1][:25], *state[2:]
    assert torch.equal(launched(C, row.repeat(25, 1), parameters, mode, *few), tokens[:25])


def test_rows_do_not_depend_on_the_batch():
    logits, parameters, mode, lanes, positions, *state = sample_args(Rand(BF16), 6, 900, 2)
    together = launched(C, logits, parameters, mode, lanes, positions, *state)
    for row in range(12):
        alone = [t[row : row + 1].contiguous() for t in (logits, lanes.repeat_interleave(2), positions)]
        assert launched(C, alone[0], parameters, mode, *alone[1:], *state) == together[row]
