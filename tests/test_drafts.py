"""Tokens that the engine guesses ahead: they change no text, and are what lookup and the MTP layer say."""

# ruff: noqa: F811 (a fixture is imported)
import pytest
import torch

from ling_kernels.generate import Sampling
from ling_kernels.generate.forward import lookup
from ling_kernels.nn import Rows
from tests.test_engine import NO_ENDS, check, drive, engine, model, plain, texts  # noqa: F401


@pytest.mark.parametrize("draft", [1, 2, 4])
@pytest.mark.parametrize("name", ["base", "mtp1"])
def test_drafts_change_no_text(name, draft, engine):
    """By lookup in base, by the MTP layer in mtp1; greedy and sampled, alone, together and with too few pages."""
    prompts, new = zip(*texts(name), strict=True)
    n = len(new[0])
    room = len(prompts[0]) + n + 8
    for options in (dict(max_running=1), dict(), dict(cache_tokens=room, page_size=2, max_running=2)):
        e = engine(name, draft=draft, max_rows=40, **dict(max_running=8) | options)
        assert e.generate(prompts, max_new_tokens=n, **NO_ENDS) == list(new)
        drive(e)
        assert e.guessed > 0
    sampling = Sampling(temperature=1.2, top_k=40, repetition_penalty=1.3, seed=3)
    without, drafting = (engine(name, draft=d, max_rows=99, max_running=8).generate(
        prompts, sampling=sampling, max_new_tokens=n, **NO_ENDS) for d in (0, draft))  # fmt: skip
    assert without == drafting


def test_right_drafts_save_steps():
    prompt, _ = texts("mtp1")[0]

    def prophet(new):
        """An engine whose lanes have the whole text from the beginning, where guesses stand."""
        e = plain("mtp1", draft=3, max_running=2)
        begin = e.forward.begin

        def knowing(request):
            begin(request)
            e.forward.text[request.lane, len(prompt) : len(prompt) + len(new)] = torch.tensor(new, dtype=torch.int32)

        e.forward.begin, e.forward.guess = knowing, lambda *_: None
        return e

    for sampling in (Sampling(), Sampling(temperature=1.1, repetition_penalty=1.5, seed=1)):
        new = list(plain("mtp1").stream(prompt, sampling=sampling, max_new_tokens=16, **NO_ENDS))
        e, steps, rows = prophet(new), 0, []
        hook = e.model.norm.register_forward_hook(lambda _, __, h, rows=rows: rows.append(len(h)))
        r = e.submit(prompt, sampling, max_new_tokens=len(new), **NO_ENDS)
        while e.step():
            steps += 1
            check(e)
        hook.remove()
        assert r.new_tokens == new and e.right == e.guessed == 3 * 3
        assert steps == 4, "four tokens a step, the prompt's own among them"
        assert sum(rows) == len(prompt) - 1 + len(new), "no row is computed twice"
    e = prophet(new)
    r = e.submit(prompt, sampling, len(new), ends=[new[4]])
    drive(e)
    assert r.finished == "stop" and r.new_tokens == new[: new.index(new[4])], "an end among the drafts ends the text"


def test_the_mtp_layer_guesses_what_it_would_in_one_pass():
    """Its cache, filled step by step and over wrong guesses, gives the guesses of the whole text at once."""
    m, (prompt, new) = model("mtp1"), texts("mtp1")[0]
    e, guesses = plain("mtp1", draft=3, max_rows=9, max_running=2, page_size=1), {}
    r = e.submit(prompt, max_new_tokens=len(new), **NO_ENDS)
    while e.step():
        if r.guessed and not r.finished:
            n = len(r.tokens)
            guesses[n] = e.forward.text[r.lane, n : n + 2].tolist()
    assert len(guesses) > 3
    (mtp,), ids = m.mtp, torch.tensor(r.tokens)
    for n, (first, second) in guesses.items():
        with torch.no_grad():
            h = m(ids[None, :n], output_hidden_states=True).hidden_states[-2][0, : n - 1]
            rows = Rows(m.cos, m.sin, torch.arange(n - 1), torch.tensor([0, n - 1], dtype=torch.int32))
            x, _ = mtp(m.word_embeddings(ids[1:n]), h, rows)
            assert int(m.logits(x[-1:]).argmax()) == first
            rows = Rows(m.cos, m.sin, torch.arange(n), torch.tensor([0, n], dtype=torch.int32))
            x, _ = mtp(m.word_embeddings(torch.tensor([*r.tokens[1:n], first])), torch.cat([h, x[-1:]]), rows)
            assert int(m.logits(x[-1:]).argmax()) == second


@pytest.mark.parametrize("text, count, follows", [
    ([1, 2, 3, 4, 9, 1, 2, 3], 3, [4, 9, 1]),
    ([2, 3, 8, 1, 2, 3, 9, 7, 2, 3, 6, 1, 2, 3], 1, [9]),
    ([5, 3, 7, 3], 2, [7, 3]),
    ([1, 2, 1, 2], 5, [1, 2, 1, 2, 1]),
    ([1, 2], 2, [2, 2]),
    ([1], 1, [1]),
    ([4, 4, 4, 4, 4], 3, [4, 4, 4]),
])  # fmt: skip
def test_lookup(text, count, follows):
    lanes = torch.full((2, 20), text[-1], dtype=torch.int32)  # what stands past a text's end is not looked at
    lanes[1, : len(text)] = torch.tensor(text)
    assert lookup(lanes, torch.tensor([0, len(text)]), count)[1].tolist() == follows
