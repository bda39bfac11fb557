"""Requests with a common beginning: computed once, also by requests that come together and by those that are scored."""

import pytest
import torch

from ling_kernels.errors import InputError
from ling_kernels.generate import Engine, forward
from ling_kernels.generate.logprobs import score
from tests.engines import NO_STOP, drain, engine, make_engine, model
from tests.test_batch_invariant import pinned

assert engine  # a fixture
CONTEXT = [3 + 5 * i % 61 for i in range(30)]
ENDS = [[7, 9, 4], [11, 2], [13, 5, 6, 7, 8], [17]]


def counted(e: Engine) -> list[int]:
    """The numbers of prompt tokens that the next passes prefill."""
    rows, compute = [], e.forward.compute

    def count(lanes, mode, width=None, chunks=(), *rest):
        rows.append(sum(chunk.rows for chunk in chunks))
        return compute(lanes, mode, width, chunks, *rest)

    e.forward.compute = count
    return rows


def scored(e: Engine, **options) -> list:
    """The log-probabilities of each end behind the context, with their requests."""
    requests = [e.submit(CONTEXT + end, max_new_tokens=1, prompt_logprobs=2, **options, **NO_STOP) for end in ENDS]
    drain(e)
    return requests


@pytest.mark.parametrize(
    "options",
    [dict(), dict(max_rows=7, max_running=3), dict(draft=2, max_rows=13, max_running=4)],
    ids=["together", "chunks", "drafts"],
)
def test_ends_of_one_context(engine, options, monkeypatch):
    """Their numbers are those without a start, and the context is computed once although all are there at once."""
    whole, e = scored(make_engine()), engine(**options)
    rows, logits = counted(e), []
    monkeypatch.setattr(forward, "score", lambda x, tokens: (logits.append(len(x)), score(x, tokens))[1])
    got = scored(e, prompt_logprobs_start=len(CONTEXT))
    for end, request, want in zip(ENDS, got, whole, strict=True):
        assert [t.token for t in request.prompt_logprobs] == end
        for t, w in zip(request.prompt_logprobs, want.prompt_logprobs[-len(end) :], strict=True):
            assert t.logprob == pytest.approx(w.logprob, abs=1e-4)
            assert [token for token, _ in t.top] == [token for token, _ in w.top]
    shared = (len(CONTEXT) - 1) // 4 * 4  # pages before the row of the first token that is scored
    assert sorted(r.cached_tokens for r in got) == [0, shared, shared, shared]
    last = sum(len(CONTEXT) + len(end) - 1 - r.cached_tokens for end, r in zip(ENDS, got, strict=True))
    assert sum(rows) == last and sum(logits) == sum(map(len, ENDS))


@pytest.mark.parametrize("start", range(1, 10))
def test_every_start(start):
    """Also within a page, and where the prompt is cached already."""
    prompt, e = CONTEXT[:9], make_engine()
    want = model()(torch.tensor([prompt])).logits[0].log_softmax(-1)
    for cached in (0, min(8, (start - 1) // 4 * 4)):
        (r,) = e.finish([prompt], max_new_tokens=1, prompt_logprobs=0, prompt_logprobs_start=start, **NO_STOP)
        assert [t.token for t in r.prompt_logprobs] == prompt[start:] and r.cached_tokens == cached
        got = torch.tensor([t.logprob for t in r.prompt_logprobs])
        want_logp = torch.tensor([want[i - 1, prompt[i]].item() for i in range(start, 9)])
        torch.testing.assert_close(got, want_logp, rtol=1e-4, atol=1e-4)


def test_the_same_bits_in_batch_invariant_mode():
    whole, e = scored(Engine(pinned(), page_size=4)), Engine(pinned(), page_size=4)
    for end, got, want in zip(ENDS, scored(e, prompt_logprobs_start=30), whole, strict=True):
        assert got.prompt_logprobs == want.prompt_logprobs[-len(end) :] and got.new_tokens == want.new_tokens


def test_a_preempted_request_goes_on_where_it_was():
    e = Engine(model(), page_size=4, cache_tokens=48, max_running=3)
    prompts = [[*range(1 + i, 14 + i)] for i in range(3)]
    requests = e.finish(prompts, max_new_tokens=12, prompt_logprobs=0, prompt_logprobs_start=6, **NO_STOP)
    assert [len(r.prompt_logprobs) for r in requests] == [7, 7, 7]
    assert [[t.token for t in r.prompt_logprobs] for r in requests] == [p[6:] for p in prompts]


def test_texts_of_one_prompt_compute_it_once(engine):
    e = engine(max_running=8)
    alone, rows = make_engine().generate([CONTEXT], max_new_tokens=5, **NO_STOP), counted(e)
    requests = e.finish([CONTEXT], n=6, max_new_tokens=5, **NO_STOP)
    assert [r.new_tokens for r in requests] == alone * 6
    assert sum(rows) == 29 + 5  # 28 of the 29 rows before the last token are full pages


def test_others_pass_a_request_that_waits_for_a_page():
    """It costs them nothing; and a request whose page nobody computes any more goes on by itself."""
    e = make_engine(max_rows=8, max_running=3)
    first, same, other = (e.submit(p, max_new_tokens=2, **NO_STOP) for p in (CONTEXT, CONTEXT + [1], [9, 9, 9]))
    e.step()
    assert first.admitted and not same.admitted and not other.admitted  # the first takes all rows
    drain(e)
    assert other.admitted < same.admitted and same.cached_tokens == 28
    e = make_engine(max_rows=8, max_running=3)
    first, same = (e.submit(p, max_new_tokens=2, **NO_STOP) for p in (CONTEXT, CONTEXT + [1]))
    e.step()
    e.cancel(first)
    drain(e)
    assert same.finished == "length" and same.cached_tokens == 8


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(prompt_logprobs=0, prompt_logprobs_start=0), "at least 1|1 or more"),
        (dict(prompt_logprobs=0, prompt_logprobs_start=4), "is 4; the prompt has 3 tokens"),
        (dict(prompt_logprobs=0, prompt_logprobs_start=1.5), "prompt_logprobs_start"),
        (dict(prompt_logprobs_start=2), "give prompt_logprobs too"),
    ],
)
def test_starts_that_do_not_fit(options, message):
    with pytest.raises(InputError, match=message):
        make_engine().submit([1, 2, 3], **options)
