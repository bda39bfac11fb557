"""Log-probabilities of new and of prompt tokens, against the model's own over the whole text."""

import pytest
import torch

from ling_kernels.errors import InputError
from ling_kernels.generate import Engine
from ling_kernels.model.sample import Sampling
from tests.engines import NO_STOP, make_engine, make_overlapped_engine, model, references

RANDOM = Sampling(temperature=0.9, top_p=0.8, repetition_penalty=1.3, seed=7)


def check(request, name="base", alternatives=0):
    """Of a finished request: every number is the model's log_softmax, the alternatives are its likeliest tokens."""
    ids = request.tokens
    want = model(name)(torch.tensor([ids])).logits[0].float().log_softmax(-1)
    first = len(request.prompt)
    for got, rows in ((request.logprobs, range(first, len(ids))), (request.prompt_logprobs, range(1, first))):
        if not got:
            continue
        assert [t.token for t in got] == [ids[i] for i in rows]
        of_tokens = torch.tensor([want[i - 1, ids[i]].item() for i in rows])
        torch.testing.assert_close(torch.tensor([t.logprob for t in got]), of_tokens, rtol=1e-4, atol=1e-4)
        for t, i in zip(got, rows, strict=True):
            assert len(t.top) == alternatives
            best = want[i - 1].topk(max(alternatives, 1)).values[:alternatives]
            torch.testing.assert_close(torch.tensor([p for _, p in t.top]), best, rtol=1e-4, atol=1e-4)
            for token, p in t.top:
                assert abs(want[i - 1, token].item() - p) < 1e-3


@pytest.mark.parametrize("make", [make_engine, make_overlapped_engine])
@pytest.mark.parametrize("name, draft", [("base", 0), ("base", 2), ("mtp1", 2)])
@pytest.mark.parametrize("sampling", [Sampling(), RANDOM], ids=["greedy", "random"])
def test_log_probabilities(make, name, draft, sampling):
    """Some requests of the batch want them, in chunks of few rows; the tokens are those without them."""
    e, prompts = (
        make(name, draft=draft, max_running=3, max_rows=11),
        [*(p for p, _ in references(name)), [5, 9, 5, 7]][:3],
    )
    options = dict(sampling=sampling, max_new_tokens=9, **NO_STOP)
    plain = e.generate(prompts, **options)
    wanted = [dict(logprobs=3, prompt_logprobs=3), dict(), dict(logprobs=3)]
    requests = [e.submit(p, **options, **w) for p, w in zip(prompts, wanted, strict=True)]
    while not all(r.finished for r in requests):
        e.step()
    assert [r.new_tokens for r in requests] == plain
    counts = [(len(r.logprobs), len(r.prompt_logprobs)) for r in requests]
    assert counts == [(9, len(prompts[0]) - 1), (0, 0), (9, 0)]
    for r in requests:
        check(r, name, 3)


def test_scores_of_prompts():
    e, prompts = make_engine(), [p for p, _ in references()]
    e.generate(prompts[:1], max_new_tokens=1)  # its pages are cached now, and no row may be left out all the same
    for prompt, got in zip(prompts, e.score(prompts), strict=True):
        want = model()(torch.tensor([prompt])).logits[0].float().log_softmax(-1)[:-1]
        torch.testing.assert_close(
            torch.tensor(got), want.gather(1, torch.tensor(prompt[1:])[:, None])[:, 0], rtol=1e-4, atol=1e-4
        )
    assert e.score([[5]]) == [[]]


def test_a_preempted_request_has_each_once():
    """Too few pages for three texts: the youngest give theirs back and prefill again."""
    prompts = [[*range(1 + i, 14 + i)] for i in range(3)]
    e = Engine(model(), page_size=4, cache_tokens=48, max_running=3)
    admitted, lanes = [], e.forward.fill_lane
    e.forward.fill_lane = lambda r: (admitted.append(r), lanes(r))
    requests = e.finish(prompts, max_new_tokens=12, logprobs=1, prompt_logprobs=1, **NO_STOP)
    assert len(admitted) > len(requests)
    for r in requests:
        assert len(r.logprobs) == 12 and len(r.prompt_logprobs) == 12
        check(r, alternatives=1)


def test_a_stop_token_is_not_scored():
    (prompt, new), e = references()[0], make_engine()
    request = e.finish([prompt], max_new_tokens=9, logprobs=0, stop_token_ids=[new[3]])[0]
    assert request.finished == "stop" and [t.token for t in request.logprobs] == request.new_tokens == new[:3]


@pytest.mark.parametrize("option", ["logprobs", "prompt_logprobs"])
@pytest.mark.parametrize("value, message", [(21, "at most 20"), (-1, "0 or more|at least 0"), (1.5, "integer|whole")])
def test_numbers_that_do_not_fit(option, value, message):
    with pytest.raises(InputError, match=f"{option}.*({message})"):
        make_engine().submit([1, 2], **{option: value})
