"""Edits of logits: biases, penalties of new tokens, end tokens held off; against a loop over the model itself."""

import collections
from dataclasses import replace

import pytest
import torch

from ling_kernels.errors import InputError
from ling_kernels.generate import Sampling, sampler
from tests.engines import NO_STOP, drain, engine, make_engine, make_overlapped_engine, model, references  # noqa: F401


def greedy(prompt, count, sampling, name="base", stop=(), least=0):
    """The likeliest tokens by the definition of each edit, over the whole text again for every token."""
    ids, new = [*prompt], []
    while len(new) < count:
        logits = model(name)(torch.tensor([ids])).logits[0, -1].float()
        for token, bias in sampling.logit_bias:
            logits[token] += bias
        for token, times in collections.Counter(new).items():
            logits[token] -= sampling.presence_penalty + times * sampling.frequency_penalty
        if len(new) < least:
            logits[[*stop]] = -float("inf")
        token = int(logits.argmax())
        if token in stop:
            break
        new.append(token)
        ids.append(token)
    return new


PROMPT, NEW = references()[0]


def edits(new):
    """Samplings whose edits change the tokens `new`."""
    return [
        Sampling(logit_bias={new[1]: -100, 7: 0.5, new[2]: -0.5}),
        Sampling(presence_penalty=2.0),
        Sampling(frequency_penalty=0.3, presence_penalty=-0.1),
        Sampling(logit_bias={new[0]: -2.0}, presence_penalty=0.1, frequency_penalty=0.2),
    ]


@pytest.mark.parametrize("make", [make_engine, make_overlapped_engine])
@pytest.mark.parametrize("name, draft", [("base", 0), ("base", 2), ("mtp1", 2)])
def test_edits_are_exact_with_drafts_and_in_a_batch(make, name, draft):
    """Requests with and without edits, more than there are lanes, so that a lane is used again."""
    e, count = make(name, draft=draft, max_running=3, max_rows=11), 12
    prompt, new = references(name)[0]
    samplings = [Sampling(), *edits(new)] * 2
    requests = [e.submit(prompt, s, count, **NO_STOP) for s in samplings]
    drain(e)
    wants = [greedy(prompt, count, s, name) for s in samplings[: len(samplings) // 2]] * 2
    assert [r.new_tokens for r in requests] == wants
    assert len({tuple(w) for w in wants}) > 3, "the edits change the texts"
    assert not draft or e.drafted


def test_random_tokens_do_not_depend_on_drafts_or_the_batch(engine):  # noqa: F811
    sampling = [replace(Sampling(1.0, seed=i), frequency_penalty=0.5, logit_bias={3: 2.0}) for i in range(3)]
    alone = [make_engine().generate([PROMPT], sampling=s, max_new_tokens=15, **NO_STOP)[0] for s in sampling]
    for draft in (0, 3):
        e = engine(draft=draft)
        requests = [e.submit(PROMPT, s, 15, **NO_STOP) for s in sampling] + [e.submit([5, 6], max_new_tokens=20)]
        drain(e)
        assert [r.new_tokens for r in requests[:3]] == alone
    assert alone[0] != make_engine().generate([PROMPT], sampling=Sampling(1.0, seed=0), max_new_tokens=15, **NO_STOP)[0]


def test_min_new_tokens(engine):  # noqa: F811
    stop, wanted = [NEW[3], 10**6], (0, 3, 4, 12)  # the end comes after 3 tokens; the other token never comes
    assert NEW[3] not in NEW[:3]
    for draft in (0, 2):
        e = engine(draft=draft)
        requests = [e.submit(PROMPT, None, 12, stop, min_new_tokens=least) for least in wanted]
        drain(e)
        wants = [greedy(PROMPT, 12, Sampling(), stop=stop[:1], least=least) for least in wanted]
        assert [r.new_tokens for r in requests] == wants and wants[:2] == [NEW[:3]] * 2 and len(wants[3]) == 12


def test_a_preempted_request_keeps_its_counts():
    prompts, sampling = [[*range(1 + i, 14 + i)] for i in range(3)], Sampling(frequency_penalty=1.0)
    e = make_engine(cache_tokens=48, max_running=3)
    admitted, lanes = [], e.forward.fill_lane
    e.forward.fill_lane = lambda r: (admitted.append(r), lanes(r))
    got = e.generate(prompts, sampling=sampling, max_new_tokens=12, **NO_STOP)
    assert len(admitted) > 3 and got == [greedy(p, 12, sampling) for p in prompts]


def test_nothing_is_kept_or_computed_for_requests_without_edits():
    e = make_engine()
    e.generate([PROMPT], max_new_tokens=3)
    assert e.forward.edits is None
    e.generate([PROMPT], max_new_tokens=3, sampling=Sampling(presence_penalty=1.0))
    e.forward.edits.__class__.__call__, call = (lambda *_: 1 / 0), e.forward.edits.__class__.__call__
    try:
        assert e.generate([PROMPT], max_new_tokens=3, **NO_STOP) == [NEW[:3]]
    finally:
        e.forward.edits.__class__.__call__ = call


@pytest.mark.parametrize("options, message", [
    (dict(sampling=Sampling(logit_bias={10**6: 1})), "logit_bias has token 1000000"),
    (dict(sampling=Sampling(logit_bias={-1: 1})), "logit_bias has token -1"),
    (dict(sampling=Sampling(logit_bias=dict.fromkeys(range(513), 1.0))), "at most 512"),
    (dict(min_new_tokens=-1), "min_new_tokens is -1"),
    (dict(min_new_tokens=6, max_new_tokens=5), "at most max_new_tokens, 5"),
    (dict(min_new_tokens=1.5), "min_new_tokens is 1.5"),
])  # fmt: skip
def test_requests_that_do_not_fit(options, message):
    with pytest.raises(InputError, match=message):
        make_engine().submit(PROMPT, **options)


@pytest.mark.parametrize("options, message", [
    (dict(presence_penalty=101), "presence_penalty is 101"), (dict(frequency_penalty=float("nan")), "frequency_p"),
    
    (dict(frequency_penalty="1"), "frequency_penalty"), (dict(logit_bias={3: 101}), "token 3"),
    (dict(logit_bias={3: float("nan")}), "token 3"), (dict(logit_bias={"3": 1}), "token ids"),
    (dict(logit_bias=[3]), "token ids"), (dict(logit_bias=5), "token ids"), (dict(logit_bias={3: "x"}), "token ids"),
])  # fmt: skip
def test_parameters_that_do_not_fit(options, message):
    with pytest.raises(InputError, match=message):
        Sampling(**options)


def test_only_the_engine_edits():
    with pytest.raises(InputError, match="need the engine"):
        sampler(logit_bias={1: 1})
