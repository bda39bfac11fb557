"""The engine: the official model's greedy texts whatever else is in the batch, and not a page lost."""

import asyncio
import itertools
import random
import threading
from dataclasses import replace
from functools import cache

import pytest
import torch
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from ling_kernels.backend import force
from ling_kernels.errors import InputError
from ling_kernels.generate import Busy, Engine, Sampling
from ling_kernels.generate.cache import Pages, digest
from ling_kernels.generate.graphs import Graphs, sizes
from ling_kernels.generate.sample import Mode, sampler
from ling_kernels.model import Ling
from ling_kernels.nn.fp8 import to_fp8
from ling_kernels.nn.frozen import freeze_
from tests.test_model import NAMES, expected, load

NO_ENDS = dict(ends=())


@cache
def model(name="base"):
    return load(name)


@cache
def texts(name="base") -> list[tuple[list[int], list[int]]]:
    """Prompts, and what the official model adds."""
    want = expected(name)
    prompts, greedy = want["generate.prompt"].tolist(), want["generate.greedy"].tolist()
    return [(p, g[len(p) :]) for p, g in zip(prompts, greedy, strict=True)]


class Replayed(Graphs):
    """What CUDA graphs are, on a CPU: one tensor in and one out for each size, and lanes of nobody."""

    def __call__(self, lanes, mode):
        return super().__call__(lanes, mode).clone()  # as the copy to the host has it, before the next replay

    def capture(self, size, mode):
        lanes = torch.full([size], self.nobody)
        found = self.compute(lanes, mode).clone()
        compute = self.compute

        class Graph:
            def replay(self):
                found.copy_(compute(lanes, mode))

        return lanes, Graph(), found


def plain(name="base", **options) -> Engine:
    return Engine(model(name), **dict(page_size=4, cache_tokens=400) | options)


def as_on_gpu(name="base", **options) -> Engine:
    """Graphs, and tokens that the host sees when the next pass has been launched."""
    e = plain(name, **options)
    e.late = True
    e.forward.graphs = Replayed(e.forward.compute, e.forward.nobody, len(e.scheduler.lanes), e.device)
    return e


@pytest.fixture(params=[plain, as_on_gpu], ids=["plain", "as_on_gpu"])
def engine(request):
    return request.param


def drive(engine: Engine) -> None:
    while engine.step():
        check(engine)
    check(engine)
    pages, scheduler = engine.pages, engine.scheduler
    assert pages.available == pages.count and not any(pages.holders), "every page has come back"
    assert len({*scheduler.lanes}) == len(scheduler.lanes) == engine.forward.nobody and engine.flight is None


def check(engine: Engine) -> None:
    """Every page is blank, idle or held, and held by as many as say so."""
    pages, held = engine.pages, [p for r in engine.scheduler.running for p in r.pages]
    assert [held.count(p) for p in range(pages.count)] == pages.holders
    free = [*pages.blank, *pages.idle]
    assert sorted({*free, *held}) == list(range(pages.count)) and not {*free} & {*held} and len({*free}) == len(free)
    assert set(pages.idle) <= set(pages.digests) and {p: d for d, p in pages.known.items()} == pages.digests
    assert not any(r.pages for r in engine.scheduler.waiting)
    for r in engine.scheduler.running:
        assert r.computed < len(r.tokens) and pages.needed(r.computed) <= len(r.pages)


@pytest.mark.parametrize("name", NAMES)
def test_alone_and_together(name, engine):
    e = engine(name)
    for prompt, new in texts(name):
        assert list(e.stream(prompt, max_new_tokens=len(new), **NO_ENDS)) == new
    prompts, new = zip(*texts(name), strict=True)
    assert e.generate(prompts, max_new_tokens=len(new[0]), **NO_ENDS) == list(new)
    drive(e)


@pytest.mark.parametrize("rows", range(1, 13))
def test_chunks_end_anywhere(rows, engine):
    """Prompts in chunks of `rows`, the last request entering when the first decodes."""
    e = engine(max_rows=rows, max_running=min(rows, 3))
    requests = []
    for prompt, new in texts():
        requests.append((e.submit(prompt, max_new_tokens=len(new), **NO_ENDS), new))
        e.step()
        e.step()
    drive(e)
    assert all(r.new_tokens == new and r.finished == "length" for r, new in requests)


def test_joined_late(engine):
    (first, first_new), (second, second_new) = texts()[:2]
    for late in range(1, len(first_new)):
        e = engine()
        a = e.submit(first, max_new_tokens=len(first_new), **NO_ENDS)
        for _ in range(late):
            e.step()
        b = e.submit(second, max_new_tokens=len(second_new), **NO_ENDS)
        drive(e)
        assert (a.new_tokens, b.new_tokens) == (first_new, second_new)


def test_preempted_and_resumed(engine):
    """The cache holds one text and a half: the younger gives way, more than once, and ends as it would have."""
    (prompt, new), (other, other_new) = texts()[:2]
    room = max(len(prompt) + len(new), len(other) + len(other_new))
    e = engine(cache_tokens=room + 8, page_size=2)
    a = e.submit(prompt, max_new_tokens=len(new), **NO_ENDS)
    b = e.submit(other, max_new_tokens=len(other_new), **NO_ENDS)
    gave_way = 0
    while e.step():
        check(e)
        gave_way += b in e.scheduler.waiting and len(b.new_tokens) > 0
    assert gave_way and (a.new_tokens, b.new_tokens) == (new, other_new)
    assert a.shared == b.shared == 0, "what a request finds of its own is not told as shared"
    drive(e)


def test_prefix_is_shared(engine):
    prompt, new = texts()[0]
    e = engine(page_size=2)
    assert list(e.stream(prompt, max_new_tokens=len(new), **NO_ENDS)) == new
    known = len(e.pages.idle)
    assert known == (len(prompt) + len(new) - 1) // 2, "every full page is remembered"
    again = [e.submit(prompt, max_new_tokens=len(new), **NO_ENDS) for _ in range(3)]
    e.step()
    assert all(r.shared == (len(prompt) - 1) // 2 * 2 for r in again)
    assert len({tuple(r.pages[: r.shared // 2]) for r in again}) == 1, "the same pages"
    drive(e)
    assert all(r.new_tokens == new for r in again)
    other = [*prompt[:4], (prompt[4] + 1) % e.config.vocab_size, *prompt[5:]]
    wrong = e.submit(other, max_new_tokens=1, **NO_ENDS)
    e.step()
    assert wrong.shared == 4, "only what is before the first difference"


def test_digests_say_all_that_is_before():
    assert digest(digest(b"", [1, 2]), [3, 4]) != digest(digest(b"", [1, 5]), [3, 4])
    pages = Pages(2, 1)
    first, second = pages.take(), pages.take()
    pages.publish(first, b"a")
    pages.publish(second, b"a")
    pages.release([first, second])
    assert list(pages.blank) == [second] and list(pages.idle) == [first]
    assert pages.share([b"a", b"b"]) == [first] and pages.available == 1
    assert pages.take() == second
    with pytest.raises(IndexError):
        pages.take()
    pages.release([first])
    assert pages.take() == first and pages.share([b"a"]) == [], "what is overwritten is forgotten"


@pytest.mark.parametrize("seed", range(5))
def test_random_arrivals_and_cancellations(seed, engine):
    rng = random.Random(seed)
    draft = rng.choice([0, 1])
    options = dict(cache_tokens=rng.choice([36, 60, 200]), max_rows=rng.choice([8, 9, 50]))
    e = engine(draft=draft, max_running=4, max_waiting=5, **options)
    requests, refused = [], 0
    for _ in range(60):
        prompt, new = rng.choice(texts())
        if rng.random() < 0.5:
            options = dict(timeout=0.0) if rng.random() < 0.1 else {}
            try:
                requests.append((e.submit(prompt, max_new_tokens=rng.randint(1, len(new)), **NO_ENDS, **options), new))
            except Busy:
                refused += 1
        if requests and rng.random() < 0.1:
            e.cancel(rng.choice(requests)[0])
        if rng.random() < 0.7:
            e.step()
        check(e)
    drive(e)
    reasons = {r.finished for r, _ in requests}
    assert reasons <= {"length", "cancelled", "timeout"} and {"length", "cancelled"} <= reasons
    for r, new in requests:
        assert r.new_tokens == new[: len(r.new_tokens)]
        assert r.finished != "length" or len(r.new_tokens) == r.max_new_tokens
    assert e.scheduler.running == [] and not e.scheduler.waiting and (refused or seed)


def test_a_seed_gives_the_same_text_in_any_company(engine):
    (prompt, _), (other, _) = texts()[:2]
    asked = dict(sampling=Sampling(temperature=1.5, top_p=0.95, seed=5), max_new_tokens=8, **NO_ENDS)
    alone = list(engine().stream(prompt, **asked))
    e = engine(max_rows=5, max_running=3)
    requests = [e.submit(other, Sampling(temperature=2.0), 10, ()), e.submit(prompt, **asked)]
    requests.append(e.submit(prompt, Sampling(temperature=1.5, seed=6), 8, ()))
    drive(e)
    assert requests[1].new_tokens == alone != requests[2].new_tokens
    assert alone != texts()[0][1][:8]


def test_a_penalty_sees_prompt_and_text(engine):
    """As Ling.stream's sampler, which is handed the ids so far."""
    prompts, new = zip(*texts(), strict=True)
    n, choose = len(new[0]), sampler(repetition_penalty=3.0)
    want = [[int(t) for t in model().stream(torch.tensor([p]), n, choose=choose)] for p in prompts]
    asked = dict(sampling=Sampling(repetition_penalty=3.0), max_new_tokens=n, **NO_ENDS)
    assert engine().generate(prompts, **asked) == want != list(new)
    assert engine(draft=3).generate(prompts, **asked) == want


def test_sizes_of_graphs():
    """No row of nobody where few rows would share no experts with it; the largest always."""
    assert [sizes(n) for n in (1, 3, 8)] == [[1], [1, 2, 3], [*range(1, 9)]]
    assert sizes(20) == [*range(1, 9), 16, 20]


def test_warm_up():
    """Once for each size, and no lane is any the wiser."""
    e, (prompt, new) = as_on_gpu(max_running=3), texts()[0]
    e.warm_up()
    assert {size for size, _ in e.forward.graphs.captured} == {1, 2, 3} and len(e.forward.graphs.captured) == 9
    graphs = dict(e.forward.graphs.captured)
    assert list(e.stream(prompt, max_new_tokens=len(new), **NO_ENDS)) == new
    assert e.forward.graphs.captured == graphs and not e.forward.length[e.forward.nobody]
    plain().warm_up()


def test_a_row_has_seen_what_stands_up_to_it():
    forward = plain(draft=1, max_running=2).forward
    forward.text[:, :4] = torch.tensor([[5, 7, 7, 3], [9, 2, -1, 4], [1, 1, 1, 1]])
    seen = forward.seen(torch.tensor([1, 0]), torch.tensor([[0, 1], [2, 3]]))
    assert [row.nonzero().flatten().tolist() for row in seen] == [[9], [2, 9], [5, 7], [3, 5, 7]]


def test_no_pass_is_computed_in_vain(engine):
    """But for an end that the host did not see coming."""
    e, (prompt, new) = engine(), texts()[0]
    launch, passes = e.launch, []
    e.launch = lambda plan: passes.append(plan) or launch(plan)
    assert list(e.stream(prompt, max_new_tokens=len(new), **NO_ENDS)) == new
    assert len(passes) == len(new) and not e.step()
    passes.clear()
    got = list(e.stream(prompt, max_new_tokens=len(new), ends=new[4:5]))
    while e.step():
        pass
    assert len(passes) == len(got) + 1 + e.late


def test_ends(engine):
    prompt, new = texts()[0]
    e = engine()
    r = e.submit(prompt, max_new_tokens=len(new), ends=[new[3]])
    drive(e)
    assert r.finished == "stop" and r.new_tokens == new[: new.index(new[3])]


def test_who_leaves_cancels(engine):
    e = engine()
    stream = e.stream(texts()[0][0], max_new_tokens=5, **NO_ENDS)
    next(stream)
    (r,) = e.scheduler.running
    stream.close()
    assert r.finished == "cancelled" and e.pages.available == e.pages.count


def test_timeout(engine):
    e = engine()
    assert list(e.stream(texts()[0][0], max_new_tokens=5, timeout=0.0)) == []
    queued = e.submit(texts()[0][0], timeout=0.0)
    assert queued.finished is None
    assert not e.step() and queued.finished == "timeout"
    drive(e)


def test_threads_and_tasks(engine):
    """Each gets its own text, whoever computes the steps."""
    e, got = engine(cache_tokens=100), {}

    def run(i):
        prompt, new = texts()[i % len(texts())]
        got[i] = list(e.stream(prompt, max_new_tokens=len(new), **NO_ENDS)) == new

    threads = [threading.Thread(target=run, args=(i,)) for i in range(6)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert got == dict.fromkeys(range(6), True)

    async def task(i):
        prompt, new = texts()[i % len(texts())]
        tokens = []
        async for token in e.astream(prompt, max_new_tokens=len(new), **NO_ENDS):
            tokens.append(token)
            if i % 5 == 4:
                return tokens == new[:1]
        return tokens == new

    async def tasks():
        return await asyncio.gather(*(task(i) for i in range(10)))

    assert all(asyncio.run(tasks()))
    drive(e)


def test_more_prompts_than_may_wait(engine):
    prompts, new = zip(*texts() * 3, strict=True)
    e = engine(max_waiting=1, max_running=2)
    assert e.generate(prompts, max_new_tokens=len(new[0]), **NO_ENDS) == list(new)


def test_fp8_cache():
    """Keys and values with 3 bits of mantissa: near the exact logits, and not equal to them."""
    heads, prompt = {}, texts()[0][0]
    for dtype in (torch.float32, torch.float8_e4m3fn):
        e, seen = plain(cache_dtype=dtype, max_rows=3, max_running=1), []
        hook = e.model.lm_head.register_forward_hook(lambda _, __, out, seen=seen: seen.append(out))
        list(e.stream(prompt, max_new_tokens=1, **NO_ENDS))
        hook.remove()
        (heads[dtype],) = seen
    exact, rounded = heads.values()
    error = ((rounded - exact).norm() / exact.norm()).item()
    assert 1e-4 < error < 0.05


def test_what_is_no_number_stays_with_its_request(engine):
    (prompt, _), (other, new) = texts()[:2]
    poisoned = load("base")
    bad = next(t for t in range(poisoned.config.vocab_size) if t not in (*prompt, *other, *new))
    with torch.no_grad():
        poisoned.word_embeddings.weight[bad] = torch.nan
    e = engine(cache_tokens=200)
    e.forward.model = poisoned
    a, b = e.submit([*prompt, bad], max_new_tokens=4, **NO_ENDS), e.submit(other, max_new_tokens=len(new), **NO_ENDS)
    drive(e)
    assert a.finished == "error" and a.new_tokens == [] and b.new_tokens == new
    with pytest.raises(InputError, match="no numbers"):
        list(e.stream([bad]))


def test_a_step_that_fails_ends_only_its_requests(engine):
    e, (prompt, new) = engine(max_running=1), texts()[0]
    hook = e.model.norm.register_forward_pre_hook(lambda *_: 1 / 0)
    a, b = (e.submit(prompt, max_new_tokens=len(new), **NO_ENDS) for _ in range(2))
    e.step()
    hook.remove()
    drive(e)
    assert a.finished == "error" and isinstance(a.error, ZeroDivisionError) and b.new_tokens == new


@pytest.mark.parametrize("prompt, options, said", [
    ([], {}, "at least one token"),
    ([1], dict(max_new_tokens=0), "at least 1"),
    ([1], dict(max_new_tokens=10**9), "positions"),
    ([1, 10**6], {}, "1000000"),
    ([-1], {}, "-1"),
    ([1], dict(max_new_tokens=30), "the cache holds 24"),
])  # fmt: skip
def test_bad_requests(prompt, options, said):
    with pytest.raises(InputError, match=said):
        plain(cache_tokens=24).submit(prompt, **dict(max_new_tokens=8) | options)


@pytest.mark.parametrize("options, said", [
    (dict(max_running=3, max_rows=2), "max_rows"), (dict(cache_tokens=0), "cache_tokens"),
    (dict(max_waiting=0), "max_waiting"),
])  # fmt: skip
def test_bad_engines(options, said):
    with pytest.raises(InputError, match=said):
        plain(**options)


class HostData(TorchDispatchMode):
    """Refuses what would copy the host's data to the device."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert "lift_fresh" not in str(func)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", ["base", "mtp1"])
@pytest.mark.parametrize("fp8", [False, True])
def test_a_pass_asks_nothing_of_the_host(name, fp8):
    """On tensors without values, as kernels take them: who asks for a value raises. So a CUDA graph can have it."""
    config = replace(model(name).config, hidden_size=256, moe_intermediate_size=128, intermediate_size=256)
    with FakeTensorMode(), force("triton"), torch.inference_mode():
        m = Ling(config)
        if fp8:
            to_fp8(m)
            freeze_(m)
        e = Engine(m, page_size=4, cache_tokens=400, max_running=4, draft=2)
        for mode in (Mode(*bits) for bits in itertools.product((False, True), repeat=3)):
            lanes = torch.zeros(2, dtype=torch.int64)
            with HostData():
                found = e.forward.compute(lanes, mode)
            assert found.shape == (2, 4)
        with pytest.raises(RuntimeError):
            found.tolist()
