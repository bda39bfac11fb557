"""The engine's greedy output equals the official model's, whatever else is in the batch, and no page is lost."""

# ruff: noqa: F811 (a fixture is imported)
import random

import pytest
import torch

from ling_kernels.generate import Busy, Sampling, sampler
from ling_kernels.generate.pages.pool import PagePool, hash_page
from tests.engines import NO_STOP, check, drain, engine, make_engine, model, references  # noqa: F401
from tests.test_model import NAMES


@pytest.mark.parametrize("name", NAMES)
def test_single_requests_and_batches(name, engine):
    e = engine(name)
    for prompt, new in references(name):
        assert list(e.stream(prompt, max_new_tokens=len(new), **NO_STOP)) == new
    prompts, new = zip(*references(name), strict=True)
    assert e.generate(prompts, max_new_tokens=len(new[0]), **NO_STOP) == list(new)
    drain(e)


@pytest.mark.parametrize("rows", range(1, 13))
def test_prefill_chunks_of_any_size(rows, engine):
    """Later requests enter while the first decodes."""
    e = engine(max_rows=rows, max_running=min(rows, 3))
    requests = []
    for prompt, new in references():
        requests.append((e.submit(prompt, max_new_tokens=len(new), **NO_STOP), new))
        e.step()
        e.step()
    drain(e)
    assert all(r.new_tokens == new and r.finished == "length" for r, new in requests)


def test_a_request_joins_a_running_batch(engine):
    (first, first_new), (second, second_new) = references()[:2]
    for late in range(1, len(first_new)):
        e = engine()
        a = e.submit(first, max_new_tokens=len(first_new), **NO_STOP)
        for _ in range(late):
            e.step()
        b = e.submit(second, max_new_tokens=len(second_new), **NO_STOP)
        drain(e)
        assert (a.new_tokens, b.new_tokens) == (first_new, second_new)


def test_preemption(engine):
    """The cache holds one and a half sequences: the younger is preempted, more than once, with the same output."""
    (prompt, new), (other, other_new) = references()[:2]
    room = max(len(prompt) + len(new), len(other) + len(other_new))
    e = engine(cache_tokens=room + 8, page_size=2)
    a = e.submit(prompt, max_new_tokens=len(new), **NO_STOP)
    b = e.submit(other, max_new_tokens=len(other_new), **NO_STOP)
    preempted = 0
    while e.step():
        check(e)
        preempted += b in e.scheduler.waiting and len(b.new_tokens) > 0
    assert preempted and (a.new_tokens, b.new_tokens) == (new, other_new)
    assert a.cached_tokens == b.cached_tokens == 0, "its own pages do not count as a cache hit"
    drain(e)


def test_prefix_caching(engine):
    prompt, new = references()[0]
    e = engine(page_size=2)
    assert list(e.stream(prompt, max_new_tokens=len(new), **NO_STOP)) == new
    cached = len(e.pages.evictable)
    assert cached == (len(prompt) + len(new) - 1) // 2, "every full page is cached"
    repeats = [e.submit(prompt, max_new_tokens=len(new), **NO_STOP) for _ in range(3)]
    e.step()
    assert all(r.cached_tokens == (len(prompt) - 1) // 2 * 2 for r in repeats)
    assert len({tuple(r.pages[: r.cached_tokens // 2]) for r in repeats}) == 1, "the same pages"
    drain(e)
    assert all(r.new_tokens == new for r in repeats)
    other = [*prompt[:4], (prompt[4] + 1) % e.config.vocab_size, *prompt[5:]]
    different = e.submit(other, max_new_tokens=1, **NO_STOP)
    e.step()
    assert different.cached_tokens == 4, "the pages before the first difference"


def test_page_hashes_and_page_pool():
    assert hash_page(hash_page(b"", [1, 2]), [3, 4]) != hash_page(hash_page(b"", [1, 5]), [3, 4])
    pages = PagePool(2, 1)
    first, second = pages.allocate(), pages.allocate()
    pages.register(first, b"a")
    pages.register(second, b"a")
    pages.release([first, second])
    assert list(pages.free) == [second] and list(pages.evictable) == [first]
    assert pages.share_prefix([b"a", b"b"]) == [first] and pages.available == 1
    assert pages.allocate() == second
    with pytest.raises(IndexError):
        pages.allocate()
    pages.release([first])
    assert pages.allocate() == first and pages.share_prefix([b"a"]) == [], "an allocated page is no longer cached"


@pytest.mark.parametrize("seed", range(5))
def test_random_arrivals_and_cancellations(seed, engine):
    rng = random.Random(seed)
    draft = rng.choice([0, 1])
    options = dict(cache_tokens=rng.choice([36, 60, 200]), max_rows=rng.choice([8, 9, 50]))
    e = engine(draft=draft, max_running=4, max_waiting=5, **options)
    requests, refused = [], 0
    for _ in range(60):
        prompt, new = rng.choice(references())
        if rng.random() < 0.5:
            options = dict(timeout=0.0) if rng.random() < 0.1 else {}
            try:
                requests.append((e.submit(prompt, max_new_tokens=rng.randint(1, len(new)), **NO_STOP, **options), new))
            except Busy:
                refused += 1
        if requests and rng.random() < 0.1:
            e.cancel(rng.choice(requests)[0])
        if rng.random() < 0.7:
            e.step()
        check(e)
    drain(e)
    reasons = {r.finished for r, _ in requests}
    assert reasons <= {"length", "cancelled", "timeout"} and {"length", "cancelled"} <= reasons
    for r, new in requests:
        assert r.new_tokens == new[: len(r.new_tokens)]
        assert r.finished != "length" or len(r.new_tokens) == r.max_new_tokens
    assert e.scheduler.running == [] and not e.scheduler.waiting and (refused or seed)


def test_a_seed_gives_the_same_output_in_any_batch(engine):
    (prompt, _), (other, _) = references()[:2]
    options = dict(sampling=Sampling(temperature=1.5, top_p=0.95, seed=5), max_new_tokens=8, **NO_STOP)
    single = list(engine().stream(prompt, **options))
    e = engine(max_rows=5, max_running=3)
    requests = [e.submit(other, Sampling(temperature=2.0), 10, ()), e.submit(prompt, **options)]
    requests.append(e.submit(prompt, Sampling(temperature=1.5, seed=6), 8, ()))
    drain(e)
    assert requests[1].new_tokens == single != requests[2].new_tokens
    assert single != references()[0][1][:8]


def test_repetition_penalty_counts_prompt_and_new_tokens(engine):
    """As in Ling.stream, whose sampler gets all ids so far."""
    prompts, new = zip(*references(), strict=True)
    n, choose = len(new[0]), sampler(repetition_penalty=3.0)
    want = [[int(t) for t in model().stream(torch.tensor([p]), n, choose=choose)] for p in prompts]
    options = dict(sampling=Sampling(repetition_penalty=3.0), max_new_tokens=n, **NO_STOP)
    assert engine().generate(prompts, **options) == want != list(new)
    assert engine(draft=3).generate(prompts, **options) == want


def test_no_wasted_passes(engine):
    """Except one after a stop token, which the host sees too late when passes overlap."""
    e, (prompt, new) = engine(), references()[0]
    launch, passes = e.launch, []
    e.launch = lambda scheduled: passes.append(scheduled) or launch(scheduled)
    assert list(e.stream(prompt, max_new_tokens=len(new), **NO_STOP)) == new
    assert len(passes) == len(new) and not e.step()
    passes.clear()
    got = list(e.stream(prompt, max_new_tokens=len(new), stop_token_ids=new[4:5]))
    while e.step():
        pass
    assert len(passes) == len(got) + 1 + e.overlap


def test_fp8_cache():
    """Keys and values with 3 mantissa bits give logits near the exact ones, and not equal."""
    logits, prompt = {}, references()[0][0]
    for dtype in (torch.float32, torch.float8_e4m3fn):
        e, seen = make_engine(cache_dtype=dtype, max_rows=3, max_running=1), []
        hook = e.model.lm_head.register_forward_hook(lambda _, __, out, seen=seen: seen.append(out))
        list(e.stream(prompt, max_new_tokens=1, **NO_STOP))
        hook.remove()
        (logits[dtype],) = seen
    exact, rounded = logits.values()
    error = ((rounded - exact).norm() / exact.norm()).item()
    assert 1e-4 < error < 0.05
