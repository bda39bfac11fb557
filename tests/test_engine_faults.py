"""Arrivals, cancellations, preemptions, exceptions and Ctrl-C at any moment: every output is a prefix of the request's
output in an engine of its own, no page is lost, and the prefix cache holds correct keys and values."""

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
from tests.engines import NO_STOP, check, drain, engine, make_engine, make_overlapped_engine, references  # noqa: F401

SAMPLING = [Sampling(), Sampling(temperature=1.3, seed=0), Sampling(temperature=1.1, repetition_penalty=1.5, seed=7)]


@cache
def single_output(name, i, j):
    """The output of prompt i with SAMPLING[j] in an engine of its own."""
    prompt, new = references(name)[i]
    return tuple(make_engine(name).stream(prompt, sampling=SAMPLING[j], max_new_tokens=len(new), **NO_STOP))


def wrap(monkeypatch, owner, name, around):
    inner = getattr(owner, name)
    monkeypatch.setattr(owner, name, lambda *args: around(lambda: inner(*args)))


class Fault(Exception):
    pass


@pytest.mark.parametrize("seed", range(12))
def test_random_faults(seed, engine, monkeypatch):
    rng = random.Random(seed)
    name, draft = rng.choice(["base", "mtp1"]), rng.choice([0, 1, 3])
    running, size = rng.choice([1, 2, 4]), rng.choice([2, 4])
    longest = max(len(p) + len(n) for p, n in references(name))
    rows, room = running * (1 + draft) + rng.choice([0, 1, 7]), longest + rng.choice([1, 9, 60])
    e = engine(name, draft=draft, page_size=size, cache_tokens=room, max_running=running, max_rows=rows)
    reserved = [
        e.pages.allocate() for _ in range(e.pages.count - e.pages.needed(longest + 3 * draft) - rng.choice([0, 2]))
    ]
    probability = rng.choice([0.0, 0.03])  # of a fault in each call

    def faulty(inner):
        before, error = rng.random() < 0.5, rng.choice([Fault, Fault, KeyboardInterrupt])
        fails = rng.random() < probability
        if fails and before:
            raise error
        result = inner()
        if fails:
            raise error
        return result

    for owner, method in ((e, "launch"), (e.forward, "fill_lane"), (e.forward, "compute"), (e.forward, "next_tokens"),
                          (e, "accept"), (e.scheduler, "advance"), (e.scheduler, "schedule")):  # fmt: skip
        wrap(monkeypatch, owner, method, faulty)

    def step():
        try:
            return e.step()
        except (KeyboardInterrupt, Fault):  # a Fault in schedule belongs to no request
            return True

    def check_with_reserved_pages():
        pages = [*reserved]
        e.scheduler.running.append(holder := type("Holder", (), dict(pages=pages, computed=0, tokens=[0])))
        check(e)
        e.scheduler.running.remove(holder)

    requests = []
    for _ in range(40):
        if rng.random() < 0.4:
            i, j = rng.randrange(len(references(name))), rng.randrange(len(SAMPLING))
            want = single_output(name, i, j)
            timeout = 0.0 if rng.random() < 0.05 else None
            request = e.submit(
                references(name)[i][0], SAMPLING[j], rng.randint(1, len(want)), timeout=timeout, **NO_STOP
            )
            requests.append((request, want))
        if requests and rng.random() < 0.08:
            e.cancel(rng.choice(requests)[0])
        if rng.random() < 0.8:
            step()
        check_with_reserved_pages()
    steps = 0
    while step():
        check_with_reserved_pages()
        steps += 1
        assert steps < 1500, "a request never finishes"
    for request, want in requests:
        got = tuple(request.new_tokens)
        assert got == want[: len(got)]
        assert request.finished in ("length", "cancelled", "timeout", *["error"] * (probability > 0))
        assert request.finished != "length" or len(got) == request.max_new_tokens
    probability = 0
    e.pages.release(reserved)
    prompts, new = zip(*references(name), strict=True)
    assert e.generate(prompts * 2, max_new_tokens=len(new[0]), **NO_STOP) == [*new * 2], "the prefix cache is correct"
    drain(e)


def test_an_interrupt_fails_the_running_requests(engine, monkeypatch):
    """Ctrl-C between a launch and its tokens: running requests raise, waiting ones continue."""
    e, (prompt, new) = engine(max_running=1), references()[0]
    a, b = (e.submit(prompt, max_new_tokens=len(new), **NO_STOP) for _ in range(2))
    for _ in range(3):
        e.step()
    with monkeypatch.context() as patch:
        patch.setattr(e, "collect", lambda: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            e.step()
    assert a.finished == "error" and a.new_tokens == new[: len(a.new_tokens)]
    with pytest.raises(RuntimeError, match="interrupted"):
        raise_error(a)
    drain(e)
    assert b.new_tokens == new


def test_a_stream_is_garbage_collected_during_a_step(engine, monkeypatch):
    """The generator's finally block, which cancels, then runs inside the step."""
    e, (prompt, new), (other, others) = engine(), *references()[:2]
    stream = e.stream(other, max_new_tokens=len(others), **NO_STOP)
    streams = [stream, next(stream)]
    dropped = e.scheduler.running[0]
    del stream
    schedule_request = e.scheduler.schedule_request

    def collecting(request, scheduled):
        result = schedule_request(request, scheduled)
        if request is dropped:
            streams.clear()
            gc.collect()
        return result

    monkeypatch.setattr(e.scheduler, "schedule_request", collecting)
    assert list(e.stream(prompt, max_new_tokens=len(new), **NO_STOP)) == new
    assert dropped.finished == "cancelled" and dropped.new_tokens == others[: len(dropped.new_tokens)]
    monkeypatch.undo()
    drain(e)


def test_generate_cleans_up_after_errors(engine):
    e, (prompt, new) = engine(), references()[0]
    with pytest.raises(InputError, match="at least one token"):
        e.generate([prompt, prompt, []], max_new_tokens=len(new), **NO_STOP)
    assert not e.scheduler.running and not e.scheduler.queued
    hook = e.model.layers[0].register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        e.generate([prompt] * 3, max_new_tokens=len(new), **NO_STOP)
    hook.remove()
    assert not e.scheduler.running and not e.scheduler.queued
    assert not e.pages.page_of_hash, "pages that were never written are not cached"
    assert e.generate([prompt], max_new_tokens=len(new), **NO_STOP) == [new]
    drain(e)


def test_tasks_share_steps(engine):
    """One thread call per step, not one per token of every task."""
    e, calls = engine(max_running=8), 0
    prompts, new = zip(*(references() * 3)[:8], strict=True)

    async def main():
        nonlocal calls
        loop = asyncio.get_running_loop()
        run_in_executor = loop.run_in_executor

        def counted(*args):
            nonlocal calls
            calls += 1
            return run_in_executor(*args)

        loop.run_in_executor = counted

        async def text(prompt):
            return [t async for t in e.astream(prompt, max_new_tokens=len(new[0]), **NO_STOP)]

        return await asyncio.gather(*map(text, prompts))

    for _ in range(2):  # each in a loop of its own
        calls = 0
        assert asyncio.run(main()) == list(new)
        assert calls <= 3 * len(new[0]) < 8 * len(new[0])
    drain(e)


def test_threads_submit_cancel_and_read_counters(engine):
    e, stop, wrong = engine(max_running=3, max_waiting=4, cache_tokens=120), threading.Event(), []
    ended = []

    def user(number):
        rng = random.Random(number)
        for _ in range(6):
            prompt, new = rng.choice(references())
            length = rng.choice([1, 3, len(new)])
            stream = e.stream(prompt, max_new_tokens=len(new), **NO_STOP)
            try:
                got = [token for token, _ in zip(stream, range(length), strict=False)]
            except Busy:
                continue
            stream.close()
            if got != new[:length]:
                wrong.append((got, new))
        ended.append(number)

    def reader():
        while not stop.wait(0.001):
            if not 0 <= e.pages.available <= e.pages.count or e.scheduler.queued > 4 + 6:
                wrong.append("counts")

    reading = threading.Thread(target=reader)
    users = [threading.Thread(target=user, args=(number,)) for number in range(6)]
    for thread in (reading, *users):
        thread.start()
    for thread in users:
        thread.join(60)
    stop.set()
    reading.join()
    assert not wrong and len(ended) == len(users)
    drain(e)


def test_finished_requests_leave_only_page_hashes(engine):
    """At most one hash per page."""
    e, (prompt, _) = engine(cache_tokens=60, draft=1), references()[0]
    for i in range(60):
        e.generate([[*prompt[:5], i], prompt], max_new_tokens=2, **NO_STOP)
    drain(e)
    assert len(e.pages.page_of_hash) == len(e.pages.hash_of_page) <= e.pages.count
    assert not e.scheduler.submitted and torch.all(e.forward.lengths >= 0)
