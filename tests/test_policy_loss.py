"""posttrain's policy losses against their published formulas, written out with loops, and where they coincide."""

import json
import math
import re
from pathlib import Path

import pytest
import torch

import ling_kernels as lk
from ling_kernels.errors import InputError
from ling_kernels.posttrain import group_advantages, icepop, policy_loss, sentence_lengths
from ling_kernels.tokenizer import Tokenizer, load_tokenizer

LENGTHS, SENTENCES = [5, 1, 7, 3], [2, 3, 1, 4, 1, 2, 3]
ENDS = [0, 5, 6, 13, 16]


@pytest.fixture
def batch():
    g = torch.Generator().manual_seed(0)
    old = -torch.rand(16, generator=g, dtype=torch.float64) * 4
    logp = (old + 0.3 * torch.randn(16, generator=g, dtype=torch.float64)).requires_grad_()
    advantages = torch.tensor([1.3, -0.7, 0.4, -1.1], dtype=torch.float64)
    return logp, old, advantages, torch.tensor(LENGTHS)


def written_out(logp, old, advantages, units, clip, average) -> torch.Tensor:
    """units: (response, its tokens) of every unit."""
    total = 0
    for i, tokens in units:
        r = (sum(logp[t] - old[t] for t in tokens) / len(tokens)).exp()
        gain = torch.min(r * advantages[i], r.clamp(1 - clip, 1 + clip) * advantages[i])
        total = total + len(tokens) * gain / (sum(LENGTHS) if average == "tokens" else LENGTHS[i] * len(LENGTHS))
    return -total


def units_of(level: str) -> list[tuple[int, range]]:
    responses = [range(a, b) for a, b in zip(ENDS, ENDS[1:], strict=False)]
    if level == "sequence":
        return [*enumerate(responses)]
    sizes = [1] * 16 if level == "token" else SENTENCES
    starts = [sum(sizes[:k]) for k in range(len(sizes))]
    spans = [range(a, a + n) for a, n in zip(starts, sizes, strict=True)]
    return [(next(i for i, r in enumerate(responses) if s[0] in r), s) for s in spans]


def loss_of(batch, level, **options):
    sentences = torch.tensor(SENTENCES) if level == "sentence" else None
    return policy_loss(*batch, level=level, sentences=sentences, **options)


@pytest.mark.parametrize("average", ["tokens", "responses"])
@pytest.mark.parametrize("level", ["token", "sentence", "sequence"])
@pytest.mark.parametrize("clip", [0.03, 0.2])
def test_the_formula(batch, level, average, clip):
    logp, old, advantages, _ = batch
    got = loss_of(batch, level, average=average, clip=clip)
    want = written_out(logp, old, advantages, units_of(level), clip, average)
    torch.testing.assert_close(got.loss, want)
    torch.testing.assert_close(*(torch.autograd.grad(x, logp)[0] for x in (got.loss, want)))


def test_levels_coincide(batch):
    logp, old, advantages, lengths = batch
    each = loss_of(batch, "token").loss
    assert torch.equal(each, policy_loss(*batch, level="sentence", sentences=torch.ones(16, dtype=torch.int64)).loss)
    whole = loss_of(batch, "sequence").loss
    assert torch.equal(whole, policy_loss(*batch, level="sentence", sentences=lengths).loss)
    gradients = []
    for level in ("token", "sentence", "sequence"):  # at the policy that wrote them, all are the policy gradient
        loss = loss_of((logp, logp.detach(), advantages, lengths), level).loss
        gradients.append(torch.autograd.grad(loss, logp)[0])
        torch.testing.assert_close(gradients[0], gradients[-1])
    torch.testing.assert_close(gradients[0], -advantages.repeat_interleave(lengths) / 16)


def test_clipped_units_have_no_gradient():
    logp = torch.tensor([0.5, -0.5, 0.5, -0.5], dtype=torch.float64, requires_grad=True)
    loss = policy_loss(
        logp, torch.zeros(4), torch.tensor([1.0, 1, -1, -1]), torch.ones(4, dtype=torch.int64), clip=(0.1, 0.3)
    )
    (grad,) = torch.autograd.grad(loss.loss, logp)
    want = [0, -math.exp(-0.5) / 4, math.exp(0.5) / 4, 0]  # beyond the clip only where the gain would grow
    torch.testing.assert_close(grad, torch.tensor(want, dtype=torch.float64))
    assert loss.clipped == 0.5


@pytest.mark.parametrize("level", ["token", "sequence"])
def test_ratios_that_overflow(level):
    """A clipped unit, and one without an advantage, has no gradient, not 0 x inf; one that is not clipped is inf."""
    logp = torch.tensor([-1.0, -1.0, -2.0], requires_grad=True)
    old, lengths = torch.tensor([-300.0, -math.inf, -2.5]), torch.ones(3, dtype=torch.int64)
    out = policy_loss(logp, old, torch.tensor([2.0, 0.0, -1.0]), lengths, level)
    torch.testing.assert_close(out.loss, torch.tensor(-(2.0 * 1.2 - math.exp(0.5)) / 3))
    (grad,) = torch.autograd.grad(out.loss, logp)
    torch.testing.assert_close(grad, torch.tensor([0.0, 0.0, math.exp(0.5) / 3]))
    assert policy_loss(logp, old, torch.tensor([-1.0, 0.0, 1.0]), lengths, level).loss == math.inf


@pytest.mark.parametrize("level", ["token", "sentence", "sequence"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_computed_with_in_fp32(level, dtype):
    g = torch.Generator().manual_seed(0)
    old = -torch.rand(3000, generator=g)
    logp, old = (old + 0.1 * torch.randn(3000, generator=g)).to(dtype), old.to(dtype)
    rest = torch.tensor([1.0, -1.0]), torch.tensor([1000, 2000]), level
    options = dict(sentences=torch.tensor([400, 600, 2000]) if level == "sentence" else None)
    got, want = (policy_loss(a, b, *rest, **options) for a, b in ((logp, old), (logp.double(), old.double())))
    assert got.loss.dtype == torch.float32
    torch.testing.assert_close(got.loss.double(), want.loss, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("level", ["token", "sentence", "sequence"])
def test_no_responses(level):
    nothing = torch.zeros(0, requires_grad=True)
    none = torch.zeros(0, dtype=torch.int64)
    loss = policy_loss(nothing, nothing, nothing, none, level, sentences=none if level == "sentence" else None).loss
    loss.backward()
    assert loss == 0


def test_weights_of_tokens(batch):
    """A token of weight 0 counts for nothing, even NaN, and the others keep their share."""
    logp, old, advantages, lengths = batch
    weights = torch.ones(16, dtype=torch.float64)
    weights[3], weights[9] = 0, 2.5
    bad = logp.detach().clone()
    bad[3] = float("nan")
    bad.requires_grad_()
    got = policy_loss(
        bad,
        old,
        advantages,
        lengths,
        level="sentence",
        sentences=torch.tensor(SENTENCES),
        token_weights=weights,
        clip=9.0,
    )
    want = 0
    for i, tokens in units_of("sentence"):
        kept = [t for t in tokens if weights[t]]
        r = (sum(logp[t] - old[t] for t in kept) / len(kept)).exp()
        want = want - sum(weights[t] for t in kept) * r * advantages[i] / 16
    torch.testing.assert_close(got.loss, want.detach())
    (grad,) = torch.autograd.grad(got.loss, bad)
    assert grad[3] == 0 and grad.isfinite().all()


def test_divergence_from_the_reference(batch):
    logp, old, *_ = batch
    reference = old + 0.1
    without, got = loss_of(batch, "token"), loss_of(batch, "token", reference_logp=reference, kl=0.3)
    d = reference - logp
    kl = (d.exp() - d - 1).mean()
    torch.testing.assert_close(got.loss, without.loss + 0.3 * kl)
    torch.testing.assert_close(got.kl, kl.detach())


def test_icepop():
    train, rollout = torch.tensor([0.1, 1.9, 0.5, 5.5, 5.0]).log(), torch.zeros(5)
    assert icepop(train, rollout).tolist() == pytest.approx([0, 1.9, 0.5, 0, 5.0], abs=1e-5)
    assert icepop(train, rollout, "narrow").tolist() == pytest.approx([0, 1.9, 0.5, 0, 0], abs=1e-5)
    assert icepop(train, rollout, (0.0, 1.0)).tolist() == pytest.approx([0.1, 0, 0.5, 0, 0], abs=1e-5)
    with pytest.raises(InputError, match="ring, narrow"):
        icepop(train, rollout, "paper")
    for limits in (3, (1,), (2.0, 1.0), ("a", "b"), (0.0, float("nan"))):
        with pytest.raises(InputError, match="limits are two numbers"):
            icepop(train, rollout, limits)
    with pytest.raises(InputError, match="of one shape"):
        icepop(train, rollout[1:])
    with pytest.raises(InputError, match="not a tensor"):
        icepop([0.0], rollout)


def test_advantages_of_groups():
    got = group_advantages(torch.tensor([[1.0, 0, 0, 1], [2, 2, 2, 2], [3, 1, 2, 2]]))
    assert got[0].tolist() == [1, -1, -1, 1] and got[1].eq(0).all()
    torch.testing.assert_close(got[2], torch.tensor([2**0.5, -(2**0.5), 0, 0]))
    for reward, n in ((1000.1, 7), (123456.7, 6), (-1 / 3, 7)):  # in fp32 their mean may be another number
        assert group_advantages(torch.full((2, n), reward)).eq(0).all()
    assert group_advantages(torch.tensor([[1e25, -1e25]])).tolist() == [[1, -1]]
    with pytest.raises(InputError, match="at least 2"):
        group_advantages(torch.ones(3, 1))
    with pytest.raises(InputError, match=r"a group at least .* got \[0, 4\]"):
        group_advantages(torch.ones(0, 4))
    with pytest.raises(InputError, match="not a tensor"):
        group_advantages([[1.0, 0.0]])


def test_from_hidden_rows(batch):
    """The loss of rows of hidden states, without the logits of all, and its gradients."""
    _, old, advantages, lengths = batch
    g = torch.Generator().manual_seed(1)
    hidden, head = (torch.randn(n, 24, generator=g, dtype=torch.float64, requires_grad=True) for n in (16, 50))
    targets = torch.randint(0, 50, (16,), generator=g)
    fused = -lk.linear_cross_entropy(hidden, head, targets, reduction="none", chunk=5)
    plain = (hidden @ head.T).log_softmax(-1).gather(1, targets[:, None])[:, 0]
    losses = [policy_loss(logp, old, advantages, lengths, "sequence", clip=9.0).loss for logp in (fused, plain)]
    torch.testing.assert_close(*losses)
    for got, want in zip(*(torch.autograd.grad(loss, (hidden, head)) for loss in losses), strict=True):
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize(
    "change, message",
    [(dict(level="word"), "level is one of"), (dict(average="mean"), "average is one of"),
     (dict(level="sentence"), "takes sentences"), (dict(sentences=torch.ones(16)), "takes sentences"),
     (dict(lengths=torch.tensor([5, 1, 7, 4])), "add up to 17"), (dict(kl=0.1), "go together"),
     (dict(advantages=torch.ones(3)), "one for each response"), (dict(old_logp=torch.zeros(15)), "old_logp has shape"),
     (dict(old_logp=[0.0] * 16), "old_logp is list, not a tensor"), (dict(logp=None), "logp is NoneType"),
     (dict(logp=torch.tensor(0.0), old_logp=torch.tensor(0.0)), "one number for each token"),
     (dict(old_logp=torch.zeros(16, dtype=torch.int64)), "old_logp is torch.int64"),
     (dict(advantages=torch.tensor([1, float("nan"), 0, 0])), "advantages have nan"),
     (dict(advantages=torch.ones(4, device="meta")), "advantages is on meta, logp on cpu"),
     (dict(token_weights=-torch.ones(16)), "token_weights have a number that is negative"),
     (dict(kl=float("nan")), "kl is a number"), (dict(kl="0"), "kl is a number"),
     (dict(level="sentence", sentences=torch.tensor([[16]])), "sentences have shape"),
     (dict(level="sentence", sentences=torch.tensor([2, 4, 10])), "crosses the end of a response, at token 5")],
)  # fmt: skip
def test_what_does_not_fit(batch, change, message):
    logp, old, advantages, lengths = batch
    options = dict(logp=logp, old_logp=old, advantages=advantages, lengths=lengths) | change
    with pytest.raises(InputError, match=message):
        policy_loss(**options)


@pytest.mark.parametrize("clip", [-0.1, float("nan"), (0.2,), (0.2, -0.1), (0.1, 0.2, 0.3), "a", None])
def test_clips_that_are_none(clip):
    logp, one = torch.zeros(2), torch.ones(1)
    with pytest.raises(InputError, match="clip is"):
        policy_loss(logp, logp, one, torch.tensor([2]), clip=clip)


@pytest.mark.parametrize("lengths, message", [([3, -1], "below 0"), ([1.0, 1.0], "not int64")])
def test_lengths_that_are_none(lengths, message):
    with pytest.raises(InputError, match=message):
        policy_loss(torch.zeros(2), torch.zeros(2), torch.ones(2), torch.tensor(lengths))


def test_a_reward_that_is_no_number_is_seen():
    assert group_advantages(torch.tensor([[float("nan"), 1.0], [1.0, 0.0]])).isnan().tolist() == [
        [True] * 2,
        [False] * 2,
    ]


def test_no_tokens():
    none = torch.zeros(0, requires_grad=True)
    lengths = torch.zeros(2, dtype=torch.int64)
    for level in ("token", "sequence"):
        loss = policy_loss(none, none, torch.ones(2), lengths, level=level).loss
        assert loss == 0 and torch.autograd.grad(loss, none)[0].shape == (0,)


@pytest.mark.parametrize(
    "text, sentences",
    [("One. Two!", ["One. ", "Two!"]), ("Why?! Yes... \n\nNo", ["Why?! ", "Yes... \n\n", "No"]),
     ("a; b: c", ["a; ", "b: ", "c"]), ('He said "no." Then', ['He said "no." ', "Then"]),
     ("好。是的！ok", ["好。", "是的！", "ok"]), ("no pause", ["no pause"]), ("", []), ("...", ["..."])],
)  # fmt: skip
def test_sentences(text, sentences):
    tokenizer = load_tokenizer(None)
    lengths = sentence_lengths(tokenizer, tokenizer.encode(text))
    assert lengths == [len(s.encode()) for s in sentences]


def test_sentences_of_larger_tokens():
    tokenizers = pytest.importorskip("tokenizers")
    words = {"ab": 0, ".": 1, ". ab": 2, " cd": 3, "<|endoftext|>": 4}
    backend = tokenizers.Tokenizer.from_str(json.dumps(dict(
        version="1.0", added_tokens=[dict(id=4, content="<|endoftext|>", special=True, single_word=False, lstrip=False,
                                          rstrip=False, normalized=False)],
        decoder=dict(type="Fuse"), model=dict(type="WordLevel", vocab=words, unk_token="ab"),
    )))  # fmt: skip
    tokenizer = Tokenizer(backend, dict(eos_token="<|endoftext|>"))
    assert sentence_lengths(tokenizer, [0, 1, 0, 2, 3, 1, 4]) == [2, 2, 3]  # the end token stays with its sentence


def test_the_pages_code_runs():
    page = (Path(__file__).parents[1] / "docs/posttraining.md").read_text()
    seen = {}
    exec(re.search(r"```python\n(.*?)```", page, re.DOTALL)[1], seen)
    assert seen["sentences"].tolist() == [12, 13, 2, 9, 4, 8] and seen["hidden"].grad.isfinite().all()
