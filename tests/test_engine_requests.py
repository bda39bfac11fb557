"""How requests end: stop tokens, cancellation, timeouts, errors; from threads and asyncio tasks; invalid requests."""

# ruff: noqa: F811 (a fixture is imported)
import asyncio
import gc
import pickle
import subprocess
import sys
import threading
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch

from ling_kernels.errors import Busy, InputError
from ling_kernels.generate import Engine, Sampling
from tests.engines import NO_STOP, drain, engine, load, make_engine, references  # noqa: F401


def test_stop_token(engine):
    prompt, new = references()[0]
    e = engine()
    r = e.submit(prompt, max_new_tokens=len(new), stop_token_ids=[new[3]])
    drain(e)
    assert r.finished == "stop" and r.new_tokens == new[: new.index(new[3])]


def test_closing_a_stream_cancels(engine):
    e = engine()
    stream = e.stream(references()[0][0], max_new_tokens=5, **NO_STOP)
    next(stream)
    (r,) = e.scheduler.running
    stream.close()
    assert r.finished == "cancelled" and e.pages.available == e.pages.count


@pytest.mark.parametrize("leave", ["drop", "close"])
def test_dropping_a_stream_before_its_first_token_cancels(engine, leave):
    e = engine()
    stream = e.follow(e.submit([1, 2], max_new_tokens=50, **NO_STOP))
    (request,) = e.scheduler.submitted
    if leave == "close":
        stream.close()
    else:
        del stream
        gc.collect()
    assert not e.step() and request.finished == "cancelled" and request.new_tokens == []
    drain(e)


def test_a_stream_costs_nothing_until_it_starts(engine):
    (prompt, new), e = references()[0], engine()
    stream = e.stream(prompt, max_new_tokens=3, **NO_STOP)
    assert not e.step() and not e.scheduler.queued
    assert list(stream) == new[:3]
    with pytest.raises(InputError, match="at least one token"):
        next(e.stream([]))


def test_each_prompt_has_its_sampling_and_n_texts(engine):
    prompt, options = references()[0][0], dict(max_new_tokens=5, **NO_STOP)
    samplings = [Sampling(1.0, seed=3), None, Sampling(1.0, logit_bias={7: 100})]
    requests = engine().finish([prompt] * 3, sampling=samplings, n=2, logprobs=0, **options)
    seeded = [make_engine().generate([prompt], sampling=Sampling(1.0, seed=s), **options)[0] for s in (3, 4)]
    greedy = references()[0][1][:5]
    assert [r.new_tokens for r in requests] == [*seeded, greedy, greedy, [7] * 5, [7] * 5]
    assert all(r.finished == "length" and len(r.logprobs) == 5 for r in requests)
    for wrong, message in ((dict(sampling=samplings[:2]), "3 prompts, but 2"), (dict(n=0), "n is 0"),
                           (dict(sampling={}), "must be a Sampling"), (dict(client=[]), "client")):  # fmt: skip
        with pytest.raises(InputError, match=message):
            engine().finish([prompt] * 3, **wrong)


def test_close(engine):
    """Requests end, also in the pass that runs; the memory is free; nothing more is taken."""
    with engine() as e:
        memory = weakref.ref(e.forward.caches[0].k)
        first, second = (e.submit(references()[0][0], max_new_tokens=9, **NO_STOP) for _ in range(2))
        e.step()
        e.step()
    gc.collect()
    assert first.finished == second.finished == "cancelled" and memory() is None
    assert e.pages.available == e.pages.count and not e.step()
    e.close()
    with pytest.raises(InputError, match="closed"):
        e.submit([1])
    with pytest.raises(InputError, match="another process"):
        pickle.dumps(e)

    async def run():
        async with engine() as e:
            async for _ in e.astream(references()[0][0], max_new_tokens=9, **NO_STOP):
                return e

    assert asyncio.run(run()).closed


def test_optimised_python():
    """python -O removes asserts, which must not contain work."""
    code = """
from tests.engines import NO_STOP, make_engine, references
prompt, new = references()[0]
engine = make_engine()
assert 0, "python -O would not get here"
outputs = [engine.generate([prompt], max_new_tokens=len(new), **NO_STOP)[0]]
outputs.append(list(engine.stream(prompt, max_new_tokens=len(new), **NO_STOP)))
print(outputs == [new, new])
"""
    command = [sys.executable, "-O", "-c", code]
    assert subprocess.check_output(command, cwd=Path(__file__).parents[1], text=True, timeout=600) == "True\n"


def test_timeout(engine):
    e = engine()
    assert list(e.stream(references()[0][0], max_new_tokens=5, timeout=0.0)) == []
    queued = e.submit(references()[0][0], timeout=0.0)
    assert queued.finished is None
    assert not e.step() and queued.finished == "timeout"
    drain(e)


def test_threads_and_tasks(engine):
    """Each caller gets its own output, whichever of them runs the steps."""
    e, got = engine(cache_tokens=100), {}

    def run(i):
        prompt, new = references()[i % len(references())]
        got[i] = list(e.stream(prompt, max_new_tokens=len(new), **NO_STOP)) == new

    threads = [threading.Thread(target=run, args=(i,)) for i in range(6)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert got == dict.fromkeys(range(6), True)

    async def task(i):
        prompt, new = references()[i % len(references())]
        tokens = []
        async for token in e.astream(prompt, max_new_tokens=len(new), **NO_STOP):
            tokens.append(token)
            if i % 5 == 4:
                return tokens == new[:1]
        return tokens == new

    async def tasks():
        return await asyncio.gather(*(task(i) for i in range(10)))

    assert all(asyncio.run(tasks()))
    drain(e)


def test_more_prompts_than_max_waiting(engine):
    prompts, new = zip(*references() * 3, strict=True)
    e = engine(max_waiting=1, max_running=2)
    assert e.generate(prompts, max_new_tokens=len(new[0]), **NO_STOP) == list(new)


def test_nan_logits_fail_only_their_request(engine):
    (prompt, _), (other, new) = references()[:2]
    poisoned = load("base")
    bad = next(t for t in range(poisoned.config.vocab_size) if t not in (*prompt, *other, *new))
    with torch.no_grad():
        poisoned.word_embeddings.weight[bad] = torch.nan
    e = engine(cache_tokens=200)
    e.forward.model = poisoned
    a, b = e.submit([*prompt, bad], max_new_tokens=4, **NO_STOP), e.submit(other, max_new_tokens=len(new), **NO_STOP)
    drain(e)
    assert a.finished == "error" and a.new_tokens == [] and b.new_tokens == new
    with pytest.raises(InputError, match="NaN or infinite"):
        list(e.stream([bad]))


def test_an_exception_in_a_pass_fails_only_its_requests(engine):
    e, (prompt, new) = engine(max_running=1), references()[0]
    hook = e.model.norm.register_forward_pre_hook(lambda *_: 1 / 0)
    a, b = (e.submit(prompt, max_new_tokens=len(new), **NO_STOP) for _ in range(2))
    e.step()
    hook.remove()
    drain(e)
    assert a.finished == "error" and isinstance(a.error, ZeroDivisionError) and b.new_tokens == new


@pytest.mark.parametrize("prompt, options, message", [
    ([], {}, "at least one token"),
    ([1], dict(max_new_tokens=0), "at least 1"),
    ([1], dict(max_new_tokens=10**9), "positions"),
    ([1, 10**6], {}, "1000000"),
    ([-1], {}, "-1"),
    ([1], dict(max_new_tokens=30), "the cache holds 24"),
    ("hello", {}, "token ids"), ([1.0], {}, "token ids"), (3, {}, "token ids"),
    (torch.tensor([[1, 2]]), {}, "token ids"),
    ([1], dict(max_new_tokens=2.5), "max_new_tokens is 2.5"), ([1], dict(max_new_tokens="3"), "max_new_tokens is '3'"),
    ([1], dict(stop_token_ids="ab"), "stop_token_ids"), ([1], dict(stop_token_ids=5), "stop_token_ids"),
    ([1], dict(timeout=float("nan")), "timeout is nan"), ([1], dict(timeout="1"), "timeout is '1'"),
    ([1], dict(sampling=dict(temperature=1)), "sampling is"),
])  # fmt: skip
def test_invalid_requests(prompt, options, message):
    with pytest.raises(InputError, match=message):
        make_engine(cache_tokens=24).submit(prompt, **dict(max_new_tokens=8) | options)


@pytest.mark.parametrize("prompts", ["hello", ["hello"], [1, 2], None, 3, [[1.5]], [None]])
def test_prompts_that_are_no_lists_of_ids(prompts):
    with pytest.raises(InputError, match="token ids"):
        make_engine().generate(prompts)


def test_ids_may_be_numpys_and_tensors():
    engine, prompt = make_engine(), [1, 2, 3]
    want = engine.generate([prompt], max_new_tokens=4)
    assert engine.generate(torch.tensor([prompt]), max_new_tokens=torch.tensor(4)) == want
    assert engine.generate(np.array([prompt]), max_new_tokens=np.int32(4), stop_token_ids=np.array([10**6])) == want


@pytest.mark.parametrize("options, message", [
    (dict(max_running=3, max_rows=2), "max_rows 2 is less than max_running 3"), (dict(cache_tokens=0), "cache_tokens"),
    (dict(max_running=0), "max_running is 0"), (dict(max_waiting=0), "max_waiting"), (dict(draft=8), "draft is 8"),
    (dict(page_size=1.5), "page_size is 1.5"), (dict(max_running="2"), "max_running is '2'"), (dict(draft=-1), "draft"),
    (dict(cache_tokens=float("nan")), "cache_tokens is nan"), (dict(cache_tokens=10**18), "cache_tokens is 10000"),
    (dict(cache_dtype="fp8"), "cache_dtype is 'fp8'"), (dict(cache_dtype=torch.int8), "torch.int8; it must be one of"),
    (dict(max_running=10**18, max_rows=10**18), "at most 65536"),
])  # fmt: skip
def test_invalid_engines(options, message):
    with pytest.raises(InputError, match=message):
        make_engine(**options)


def test_an_engine_of_a_path():
    with pytest.raises(InputError, match="load_model returns"):
        Engine("runs/mine/model")


def test_clients_share_an_engine(engine):
    """Who has the fewest running requests is next, then the smallest priority, then the first."""
    e = engine(max_running=2, max_waiting=500)
    many = [e.submit([3, 4], max_new_tokens=2, stop_token_ids=(), client="many") for _ in range(400)]
    one = e.submit([5, 6], max_new_tokens=2, stop_token_ids=(), client="one")
    urgent = e.submit([5, 7], max_new_tokens=2, stop_token_ids=(), client="many", priority=-1)
    while not (one.finished and urgent.finished):
        e.step()
    assert sum(request.finished is not None for request in many) <= 8
    for request in many:
        e.cancel(request)


def test_a_client_cannot_fill_the_queue_for_others(engine):
    e = engine(max_running=1, max_waiting=10)
    waiting = [e.submit([3], client="many") for _ in range(10)]
    with pytest.raises(Busy):
        e.submit([3], client="many")
    waiting += [e.submit([3], client="one") for _ in range(5)]
    with pytest.raises(Busy):
        e.submit([3], client="one")
    for i in range(3, 8):  # an equal part for each of i clients, and never more than twice the queue
        for _ in range(10 // i):
            if e.scheduler.queued < 20:
                waiting.append(e.submit([3], client=f"client {i}"))
    with pytest.raises(Busy):
        e.submit([3], client="last")
    assert e.scheduler.queued == 20
    for request in waiting:
        e.cancel(request)
