"""Draft tokens do not change the output, and are those of prompt lookup or the MTP layer."""

# ruff: noqa: F811 (a fixture is imported)
import pytest
import torch

from ling_kernels.generate import Sampling
from ling_kernels.nn import BatchLayout
from ling_kernels.ops.accept_tokens import lookup_drafts
from tests.engines import NO_STOP, check, drain, engine, make_engine, model, references  # noqa: F401


@pytest.mark.parametrize("draft", [1, 2, 4])
@pytest.mark.parametrize("name", ["base", "mtp1"])
def test_drafts_do_not_change_the_output(name, draft, engine):
    """By lookup in base, by the MTP layer in mtp1; greedy and random, single, batched and preempted."""
    prompts, new = zip(*references(name), strict=True)
    n = len(new[0])
    room = len(prompts[0]) + n + 8
    for options in (dict(max_running=1), dict(), dict(cache_tokens=room, page_size=2, max_running=2)):
        e = engine(name, draft=draft, max_rows=40, **dict(max_running=8) | options)
        assert e.generate(prompts, max_new_tokens=n, **NO_STOP) == list(new)
        drain(e)
        assert e.drafted > 0
    sampling = Sampling(temperature=1.2, top_k=40, repetition_penalty=1.3, seed=3)
    without, drafting = (engine(name, draft=d, max_rows=99, max_running=8).generate(
        prompts, sampling=sampling, max_new_tokens=n, **NO_STOP) for d in (0, draft))  # fmt: skip
    assert without == drafting


def test_accepted_drafts_save_steps():
    prompt, _ = references("mtp1")[0]

    def engine_with_correct_drafts(new):
        """Its lanes have the whole output from the beginning, in the place of drafts."""
        e = make_engine("mtp1", draft=3, max_running=2)
        fill_lane = e.forward.fill_lane

        def fill_with_output(request):
            fill_lane(request)
            e.forward.token_ids[request.lane, len(prompt) : len(prompt) + len(new)] = torch.tensor(
                new, dtype=torch.int32
            )

        e.forward.fill_lane, e.forward.mtp_drafts = fill_with_output, lambda *_: None
        return e

    for sampling in (Sampling(), Sampling(temperature=1.1, repetition_penalty=1.5, seed=1)):
        new = list(make_engine("mtp1").stream(prompt, sampling=sampling, max_new_tokens=16, **NO_STOP))
        e, steps, rows = engine_with_correct_drafts(new), 0, []
        hook = e.model.norm.register_forward_hook(lambda _, __, h, rows=rows: rows.append(len(h)))
        r = e.submit(prompt, sampling, max_new_tokens=len(new), **NO_STOP)
        while e.step():
            steps += 1
            check(e)
        hook.remove()
        assert r.new_tokens == new and e.accepted == e.drafted == 3 * 3
        assert steps == 4, "four tokens per step"
        assert sum(rows) == len(prompt) - 1 + len(new), "no row is computed twice"
    e = engine_with_correct_drafts(new)
    r = e.submit(prompt, sampling, len(new), stop_token_ids=[new[4]])
    drain(e)
    assert r.finished == "stop" and r.new_tokens == new[: new.index(new[4])], (
        "a stop token among the drafts ends the request"
    )


def test_mtp_drafts_equal_those_of_one_pass():
    """The MTP layer's cache, filled step by step and across rejected drafts, equals a pass over all tokens."""
    m, (prompt, new) = model("mtp1"), references("mtp1")[0]
    e, drafts = make_engine("mtp1", draft=3, max_rows=9, max_running=2, page_size=1), {}
    r = e.submit(prompt, max_new_tokens=len(new), **NO_STOP)
    while e.step():
        if r.has_drafts and not r.finished:
            n = len(r.tokens)
            drafts[n] = e.forward.token_ids[r.lane, n : n + 2].tolist()
    assert len(drafts) > 3
    (mtp,), ids = m.mtp, torch.tensor(r.tokens)
    for n, (first, second) in drafts.items():
        with torch.no_grad():
            h = m(ids[None, :n], output_hidden_states=True).hidden_states[-2][0, : n - 1]
            rows = BatchLayout(m.cos, m.sin, torch.arange(n - 1), torch.tensor([0, n - 1], dtype=torch.int32))
            x, _ = mtp(m.word_embeddings(ids[1:n]), h, rows)
            assert int(m.logits(x[-1:]).argmax()) == first
            rows = BatchLayout(m.cos, m.sin, torch.arange(n), torch.tensor([0, n], dtype=torch.int32))
            x, _ = mtp(m.word_embeddings(torch.tensor([*r.tokens[1:n], first])), torch.cat([h, x[-1:]]), rows)
            assert int(m.logits(x[-1:]).argmax()) == second


@pytest.mark.parametrize("tokens, count, drafts", [
    ([1, 2, 3, 4, 9, 1, 2, 3], 3, [4, 9, 1]),
    ([2, 3, 8, 1, 2, 3, 9, 7, 2, 3, 6, 1, 2, 3], 1, [9]),
    ([5, 3, 7, 3], 2, [7, 3]),
    ([1, 2, 1, 2], 5, [1, 2, 1, 2, 1]),
    ([1, 2], 2, [2, 2]),
    ([1], 1, [1]),
    ([4, 4, 4, 4, 4], 3, [4, 4, 4]),
])  # fmt: skip
def test_lookup_drafts(tokens, count, drafts):
    lanes = torch.full((2, 20), tokens[-1], dtype=torch.int32)  # ids past the end must not count
    lanes[1, : len(tokens)] = torch.tensor(tokens)
    assert lookup_drafts(lanes, torch.tensor([0, len(tokens)]), count)[1].tolist() == drafts
