"""The engine when anything happens at any moment: requests that come, leave and give way, passes that fail or are
interrupted. No text is other than alone, no page is lost, and what the cache is known to hold it does hold."""

# ruff: noqa: F811 (a fixture is imported)
import asyncio
import gc
import random
import threading
from functools import cache

import pytest
import torch

from ling_kernels.errors import InputError
from ling_kernels.generate import Busy, Sampling
from ling_kernels.generate.engine import raise_error
from tests.test_engine import NO_ENDS, as_on_gpu, check, drive, engine, plain, texts  # noqa: F401

ASKED = [Sampling(), Sampling(temperature=1.3, seed=0), Sampling(temperature=1.1, repetition_penalty=1.5, seed=7)]


@cache
def alone(name, i, j):
    """Text i as ASKED[j] has it, from an engine of its own."""
    prompt, new = texts(name)[i]
    return tuple(plain(name).stream(prompt, sampling=ASKED[j], max_new_tokens=len(new), **NO_ENDS))


def wrap(monkeypatch, thing, name, around):
    inner = getattr(thing, name)
    monkeypatch.setattr(thing, name, lambda *args: around(lambda: inner(*args)))


class Fault(Exception):
    pass


@pytest.mark.parametrize("seed", range(12))
def test_any_moment(seed, engine, monkeypatch):
    rng = random.Random(seed)
    name, draft = rng.choice(["base", "mtp1"]), rng.choice([0, 1, 3])
    running, size = rng.choice([1, 2, 4]), rng.choice([2, 4])
    longest = max(len(p) + len(n) for p, n in texts(name))
    rows, room = running * (1 + draft) + rng.choice([0, 1, 7]), longest + rng.choice([1, 9, 60])
    e = engine(name, draft=draft, page_size=size, cache_tokens=room, max_running=running, max_rows=rows)
    taken = [e.pages.take() for _ in range(e.pages.count - e.pages.needed(longest + 3 * draft) - rng.choice([0, 2]))]
    chance = rng.choice([0.0, 0.03])  # of a fault, at each of the places where one may be

    def faulty(inner):
        before, error = rng.random() < 0.5, rng.choice([Fault, Fault, KeyboardInterrupt])
        fails = rng.random() < chance
        if fails and before:
            raise error
        result = inner()
        if fails:
            raise error
        return result

    for thing, method in ((e, "launch"), (e.forward, "begin"), (e.forward, "compute"), (e.forward, "choose"),
                          (e, "accept"), (e.scheduler, "advance"), (e.scheduler, "plan")):  # fmt: skip
        wrap(monkeypatch, thing, method, faulty)

    def step():
        try:
            return e.step()
        except (KeyboardInterrupt, Fault):  # the latter from a place that is nobody's fault: plan
            return True

    def look():
        pages = [*taken]
        e.scheduler.running.append(holder := type("Holder", (), dict(pages=pages, computed=0, tokens=[0])))
        check(e)
        e.scheduler.running.remove(holder)

    requests = []
    for _ in range(40):
        if rng.random() < 0.4:
            i, j = rng.randrange(len(texts(name))), rng.randrange(len(ASKED))
            want = alone(name, i, j)
            timeout = 0.0 if rng.random() < 0.05 else None
            request = e.submit(texts(name)[i][0], ASKED[j], rng.randint(1, len(want)), timeout=timeout, **NO_ENDS)
            requests.append((request, want))
        if requests and rng.random() < 0.08:
            e.cancel(rng.choice(requests)[0])
        if rng.random() < 0.8:
            step()
        look()
    steps = 0
    while step():
        look()
        steps += 1
        assert steps < 1500, "somebody waits for ever"
    for request, want in requests:
        got = tuple(request.new_tokens)
        assert got == want[: len(got)]
        assert request.finished in ("length", "cancelled", "timeout", *["error"] * (chance > 0))
        assert request.finished != "length" or len(got) == request.max_new_tokens
    chance = 0
    e.pages.release(taken)
    prompts, new = zip(*texts(name), strict=True)
    assert e.generate(prompts * 2, max_new_tokens=len(new[0]), **NO_ENDS) == [*new * 2], "the cache is sound"
    drive(e)


def test_an_interrupt_loses_no_token_in_silence(engine, monkeypatch):
    """Ctrl-C between a launch and its tokens: who ran is told, who waited is served, and no page lies."""
    e, (prompt, new) = engine(max_running=1), texts()[0]
    a, b = (e.submit(prompt, max_new_tokens=len(new), **NO_ENDS) for _ in range(2))
    for _ in range(3):
        e.step()
    with monkeypatch.context() as patch:
        patch.setattr(e, "land", lambda: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            e.step()
    assert a.finished == "error" and a.new_tokens == new[: len(a.new_tokens)]
    with pytest.raises(RuntimeError, match="interrupted"):
        raise_error(a)
    drive(e)
    assert b.new_tokens == new


def test_a_stream_collected_in_the_middle_of_a_step(engine, monkeypatch):
    """Its generator ends, and so cancels, inside of whatever the thread does."""
    e, (prompt, new), (other, others) = engine(), *texts()[:2]
    stream = e.stream(other, max_new_tokens=len(others), **NO_ENDS)
    streams = [stream, next(stream)]
    left = e.scheduler.running[0]
    del stream
    choose = e.scheduler.choose

    def collecting(request, chosen):
        given = choose(request, chosen)
        if request is left:
            streams.clear()
            gc.collect()
        return given

    monkeypatch.setattr(e.scheduler, "choose", collecting)
    assert list(e.stream(prompt, max_new_tokens=len(new), **NO_ENDS)) == new
    assert left.finished == "cancelled" and left.new_tokens == others[: len(left.new_tokens)]
    monkeypatch.undo()
    drive(e)


def test_generate_leaves_nothing_behind(engine):
    e, (prompt, new) = engine(), texts()[0]
    with pytest.raises(InputError, match="at least one token"):
        e.generate([prompt, prompt, []], max_new_tokens=len(new), **NO_ENDS)
    assert not e.scheduler.running and not e.scheduler.queued
    hook = e.model.layers[0].register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        e.generate([prompt] * 3, max_new_tokens=len(new), **NO_ENDS)
    hook.remove()
    assert not e.scheduler.running and not e.scheduler.queued and not e.pages.known, "no page that was never written"
    assert e.generate([prompt], max_new_tokens=len(new), **NO_ENDS) == [new]
    drive(e)


def test_tasks_wait_for_one_step_together(engine):
    """A hop to a thread for every step, not for every token of every task."""
    e, hops = engine(max_running=8), 0
    prompts, new = zip(*(texts() * 3)[:8], strict=True)

    async def main():
        nonlocal hops
        loop = asyncio.get_running_loop()
        hop = loop.run_in_executor

        def counted(*args):
            nonlocal hops
            hops += 1
            return hop(*args)

        loop.run_in_executor = counted

        async def text(prompt):
            return [t async for t in e.astream(prompt, max_new_tokens=len(new[0]), **NO_ENDS)]

        return await asyncio.gather(*map(text, prompts))

    for _ in range(2):  # each in a loop of its own
        hops = 0
        assert asyncio.run(main()) == list(new)
        assert hops <= 3 * len(new[0]) < 8 * len(new[0])
    drive(e)


def test_threads_that_submit_cancel_and_look(engine):
    e, stop, wrong = engine(max_running=3, max_waiting=4, cache_tokens=120), threading.Event(), []

    def user(number):
        rng = random.Random(number)
        for _ in range(6):
            prompt, new = rng.choice(texts())
            try:
                stream = e.stream(prompt, max_new_tokens=len(new), **NO_ENDS)
            except Busy:
                continue
            length = rng.choice([1, 3, len(new)])
            got = [token for token, _ in zip(stream, range(length), strict=False)]
            stream.close()
            if got != new[:length]:
                wrong.append((got, new))

    def onlooker():
        while not stop.wait(0.001):
            if not 0 <= e.pages.available <= e.pages.count or e.scheduler.queued > 4 + 6:
                wrong.append("counts")

    looking = threading.Thread(target=onlooker)
    users = [threading.Thread(target=user, args=(number,)) for number in range(6)]
    for thread in (looking, *users):
        thread.start()
    for thread in users:
        thread.join(60)
    stop.set()
    looking.join()
    assert not wrong
    drive(e)


def test_what_remains_of_many_requests(engine):
    """Nothing but the pages' digests, of which there are no more than pages."""
    e, (prompt, _) = engine(cache_tokens=60, draft=1), texts()[0]
    for i in range(60):
        e.generate([[*prompt[:5], i], prompt], max_new_tokens=2, **NO_ENDS)
    drive(e)
    assert len(e.pages.known) == len(e.pages.digests) <= e.pages.count
    assert not e.scheduler.arrived and torch.all(e.forward.length >= 0)
