"""Pages in host memory and in a folder: the tokens are those of an engine without a cache, and no page is lost."""

# ruff: noqa: F811 (a fixture is imported)
import copy
import gc
import random
import threading
import time
import weakref
from collections import deque

import pytest
import torch

from ling_kernels.errors import InputError
from ling_kernels.generate import Engine, Spill
from ling_kernels.generate.pages.copies import WORDS, Copies, digest_of
from ling_kernels.generate.pages.disk import HEADER
from tests.engines import NO_STOP, check, drain, engine, make_engine, model  # noqa: F401
from tests.test_engine_adapters import write

ROW = Copies(make_engine(cache_tokens=4).forward.caches).row_bytes  # of a page of 4 tokens
FILE = ROW + HEADER.size


class Later:
    """Copies as on a stream: in order, and not complete before somebody has asked three times or waits."""

    def __init__(self, copies: Copies):
        self.copies, self.row_bytes, self.most = copies, copies.row_bytes, 2
        self.queue: deque = deque()
        self.lock = threading.RLock()  # the writer of files waits too

    def event(self, do):
        queue, lock = self.queue, self.lock

        class Event:
            left = 3

            def query(self):
                with lock:
                    self.left -= 1
                    if self.left <= 0:
                        self.synchronize()
                    return self not in [e for e, _ in queue]

            def synchronize(self):
                with lock:
                    while self in [e for e, _ in queue]:
                        queue.popleft()[1]()

        with lock:
            queue.append((event := Event(), do))
        return event

    def save(self, pages, rows):
        staged = [torch.empty(self.row_bytes, dtype=torch.uint8) for _ in rows]
        self.run_loads(pages)
        self.copies.save(pages, staged)  # a later pass waits for this part
        return self.event(lambda: [row.copy_(s) for row, s in zip(rows, staged, strict=True)])

    def load(self, pages, rows):
        event = self.event(lambda: self.copies.load(pages, rows))
        event.pages = pages
        return event

    def run_loads(self, pages):
        for event, _ in [*self.queue]:
            if {*getattr(event, "pages", ())} & {*pages}:
                event.synchronize()


def spilling(make, pages, folder=None, files=1000, device_tokens=40, later=False, **options) -> Engine:
    e = make(cache_tokens=device_tokens, spill=Spill(pages * ROW, folder, files * FILE), **options)
    if later:
        e.pages.levels.copies = Later(e.pages.levels.copies)
    return e


def prompts_of(number, length=17):
    draw = random.Random(7)
    return [[draw.randrange(2, 60) for _ in range(length)] for _ in range(number)]


def without_cache(prompts, n=6):
    return [make_engine().generate([p], max_new_tokens=n, **NO_STOP)[0] for p in prompts]


def answers(e, prompts, n=6):
    return [e.finish([p], max_new_tokens=n, **NO_STOP)[0] for p in prompts]


@pytest.mark.parametrize("later", [False, True], ids=["at once", "later"])
def test_pages_go_to_host_memory_and_come_back(engine, later):
    prompts = prompts_of(5)
    e = spilling(engine, 40, device_tokens=28, later=later)  # the device holds one sequence
    want = without_cache(prompts)
    first = answers(e, prompts)
    again = answers(e, prompts)
    assert [r.new_tokens for r in first] == [r.new_tokens for r in again] == want
    assert [r.cached_tokens for r in first] == [0] * 5 and [r.cached_tokens for r in again] == [16] * 5
    assert e.pages.levels.hits["host"] == 5 * 16
    assert all(not page.users for page in e.pages.levels.host.pages.values()) or later
    drain(e)


@pytest.mark.parametrize("draft, name", [(0, "base"), (2, "base"), (2, "mtp1")])
def test_a_restarted_engine_answers_from_the_folder(engine, tmp_path, draft, name):
    prompts = prompts_of(4)
    want = [make_engine(name).generate([p], max_new_tokens=6, **NO_STOP)[0] for p in prompts]
    options = dict(device_tokens=160, draft=draft, max_running=4)
    with spilling(lambda **o: engine(name, **o), 128, tmp_path, **options) as e:
        assert e.generate(prompts, max_new_tokens=6, **NO_STOP) == want
    e = spilling(lambda **o: engine(name, **o), 64, tmp_path, **options)
    computed, forward = [], e.forward.with_chunks
    e.forward.with_chunks = lambda layout, chunks: computed.extend(c.rows for c in chunks) or forward(layout, chunks)
    requests = e.finish(prompts, max_new_tokens=6, **NO_STOP)
    assert [r.new_tokens for r in requests] == want
    assert [r.cached_tokens for r in requests] == [16] * 4 and e.pages.levels.hits["disk"] == 64
    assert not computed, "of 17 tokens 16 come from files, and the last is decoded"
    drain(e)
    e.close()


def test_a_killed_engine_leaves_its_pages(tmp_path):
    prompts = prompts_of(3)
    e = spilling(make_engine, 64, tmp_path)
    want = e.generate(prompts, max_new_tokens=6, **NO_STOP)
    wait_until(lambda: len([*tmp_path.glob("*/*.page")]) == 3 * 5)  # 17 + 5 tokens have keys and values
    other = spilling(make_engine, 64, tmp_path)
    assert other.generate(prompts, max_new_tokens=6, **NO_STOP) == want
    assert other.pages.levels.hits["disk"] == 3 * 16


def wait_until(true):
    for _ in range(400):
        if true():
            return
        time.sleep(0.05)
    raise AssertionError("it does not come about")


@pytest.mark.parametrize("what", ["weights", "page_size", "cache_dtype", "draft"])
def test_what_makes_a_page_valid(tmp_path, what):
    prompts = prompts_of(2)
    with spilling(make_engine, 64, tmp_path) as e:
        e.generate(prompts, max_new_tokens=6, **NO_STOP)
    options = dict(page_size=8) if what == "page_size" else {}
    options |= dict(cache_dtype=torch.float8_e4m3fn) if what == "cache_dtype" else {}
    options |= dict(draft=1) if what == "draft" else {}
    other = copy.deepcopy(model("mtp1" if what == "draft" else "base"))
    if what == "weights":
        with torch.no_grad():
            next(other.layers[0].mlp.parameters())[0, 0] += 1e-3
    make = lambda **o: Engine(other, **dict(page_size=4) | o)  # noqa: E731
    e = spilling(make, 64, tmp_path, **options)
    requests = e.finish(prompts, max_new_tokens=6, **NO_STOP)
    assert [r.cached_tokens for r in requests] == [0, 0]
    fresh = Engine(other, **dict(page_size=4, cache_tokens=40) | options)
    assert [r.new_tokens for r in requests] == fresh.generate(prompts, max_new_tokens=6, **NO_STOP)
    e.close()


def test_new_weights_serve_no_old_page(tmp_path):
    """Neither from host memory, nor from files, nor from a file that was being read meanwhile."""
    (prompt,) = prompts_of(1)
    e = spilling(lambda **o: Engine(copy.deepcopy(model()), page_size=4, **o), 64, tmp_path)
    levels = e.pages.levels
    old = e.generate([prompt], max_new_tokens=6, **NO_STOP)
    wait_until(lambda: not levels.writing)
    hashes = [*levels.host.pages]
    go, read = threading.Event(), levels.disk.read
    levels.disk.read = lambda *a: go.wait(60) and read(*a)
    levels.host.forget()
    e.pages.levels = None
    e.pages.forget()  # of the device alone
    e.pages.levels = levels
    fetch = levels.fetch(hashes)
    other = copy.deepcopy(model())
    with torch.no_grad():
        for p in other.parameters():
            p.copy_(p.flip(0))
    e.new_weights(other)
    go.set()
    wait_until(lambda: not fetch.unread)
    assert not levels.host.pages, "what was read is of the old weights"
    (request,) = answers(e, [prompt])
    want = Engine(other, page_size=4, cache_tokens=40).generate([prompt], max_new_tokens=6, **NO_STOP)
    assert request.cached_tokens == 0 and [request.new_tokens] == want != old
    e.new_weights(model())
    (request,) = answers(e, [prompt])
    assert [request.new_tokens] == old and request.cached_tokens == 16, "files of these weights are there"
    e.close()


@pytest.mark.parametrize("close", [True, False], ids=["closed", "dropped"])
def test_an_engine_frees_its_cache(tmp_path, close):
    e = spilling(make_engine, 64, tmp_path)
    e.generate(prompts_of(3), max_new_tokens=6, **NO_STOP)
    wait_until(lambda: len([*tmp_path.glob("*/*.page")]) == 3 * 5)
    cache, kept = weakref.ref(e.forward.caches[0].k), e
    if close:
        e.close()
    else:
        del kept
    del e
    wait_until(lambda: gc.collect() is not None and cache() is None)


@pytest.mark.parametrize("seed", range(4))
def test_random_prompts_with_tiny_bounds(engine, tmp_path, seed):
    """Requests that come, end, are cancelled and preempted, over pages that are always too few: no page is lost, nobody
    gets another's, every answer is that of an engine without a cache."""
    draw = random.Random(seed)
    stems = prompts_of(3, 12)
    e = spilling(
        engine, draw.randint(1, 12), tmp_path if seed % 2 else None, files=draw.randint(1, 30), device_tokens=48,
        later=seed > 1, max_running=draw.randint(1, 4), draft=draw.choice([0, 2]),
    )  # fmt: skip
    requests, cancelled = [], []
    for _ in range(40):
        stem = draw.choice(stems)[: draw.randint(1, 12)]
        prompt = [*stem, *(draw.randrange(2, 6) for _ in range(draw.randint(0, 6)))]
        requests.append(e.submit(prompt, max_new_tokens=draw.randint(1, 8), **NO_STOP))
        for _ in range(draw.randint(0, 3)):
            e.step()
            check(e)
        if draw.random() < 0.15:
            e.cancel(draw.choice(requests))
        if draw.random() < 0.03:
            cancelled += [r for r in requests if not r.finished]
            for r in cancelled:
                e.cancel(r)
            e.new_weights()
    drain(e)
    levels, plain = e.pages.levels, make_engine()
    for r, want in zip(
        requests, plain.generate([r.prompt for r in requests], max_new_tokens=8, **NO_STOP), strict=True
    ):
        assert r.new_tokens == want[: r.max_new_tokens if r.finished == "length" else r.num_new_tokens]
    assert sum(r.finished == "length" for r in requests) > 10
    wait_until(lambda: not (levels.writing or levels.reading))
    assert levels.loaded([]) or levels.loaded([]) or levels.loaded([])
    assert not any(page.users for page in levels.host.pages.values())
    assert len(levels.host.free) + len(levels.host.pages) == levels.host.count
    e.close()


def test_a_file_is_not_read_to_a_row_that_a_copy_is_on_its_way_to(tmp_path):
    prompts = prompts_of(2)
    with spilling(make_engine, 64, tmp_path) as e:
        e.generate(prompts, max_new_tokens=1, **NO_STOP)
        (page_hash, want) = next((h, p.row.clone()) for h, p in e.pages.levels.host.pages.items())
    e = spilling(make_engine, 1, tmp_path, later=True)
    levels = e.pages.levels
    levels.write = lambda *_: None  # as where too many wait for that
    levels.unsaved[0] = b"other"
    levels.save([0])  # the row's content is on its way
    fetch = levels.fetch([page_hash])
    wait_until(lambda: not fetch.unread)
    levels.copies.event(lambda: None).synchronize()
    assert torch.equal(levels.host.pages[page_hash].row, want)
    e.close()


@pytest.mark.parametrize("again", [False, True], ids=["other", "same"])
def test_a_request_is_cancelled_while_its_pages_arrive(engine, again):
    """Its pages go to another one at once, which computes them, or has them copied again."""
    first, second = prompts_of(2)
    e = spilling(engine, 40, device_tokens=28, later=True)
    answers(e, [first, second])
    levels = e.pages.levels
    request = e.submit(first, max_new_tokens=6, **NO_STOP)
    e.step()
    assert levels.loading and not request.new_tokens
    e.cancel(request)
    for page in [*e.pages.evictable]:  # nothing on the device is of use to the next
        e.pages.page_of_hash.pop(e.pages.hash_of_page[page])
        e.pages.page_of_hash[bytes([page])], e.pages.hash_of_page[page] = page, bytes([page])
    prompt = first if again else second
    other = e.submit(prompt, max_new_tokens=6, logprobs=0, **NO_STOP)
    while e.step():
        if other.new_tokens:  # now at the latest the copy arrives
            levels.copies.event(lambda: None).synchronize()
    (plain,) = make_engine().finish([prompt], max_new_tokens=6, logprobs=0, **NO_STOP)
    assert other.new_tokens == plain.new_tokens and other.cached_tokens == 16 * again
    assert [t.logprob for t in other.logprobs] == pytest.approx([t.logprob for t in plain.logprobs], abs=1e-4)
    while levels.loading:
        levels.loaded([])
    assert not any(page.users for page in levels.host.pages.values())


def test_a_digest_sees_every_change():
    gen = torch.Generator().manual_seed(1)
    a = torch.randn(2 * WORDS + 5, generator=gen).bfloat16()[1:]  # of an odd number of bytes in words of 4
    same = digest_of([("a", a)])
    assert digest_of([("a", a.clone())]) == same and len(same) == 16
    changed = {same, digest_of([("b", a)]), digest_of([("a", a.half())]), digest_of([("a", a[:-1])])}
    for i in (0, 1, WORDS, len(a) - 1):
        for bit in (0, 15):
            other = a.clone()
            other.view(torch.int16)[i] ^= -(1 << 15) if bit else 1
            changed.add(digest_of([("a", other)]))
    swapped = a.clone()
    swapped[[4, 2]] = a[[2, 4]]
    negated = -a  # the highest bit of every word changes
    changed |= {digest_of([("a", swapped)]), digest_of([("a", negated)]), digest_of([("a", a.roll(2 * WORDS))])}
    assert len(changed) == 4 + 8 + 3


def test_bad_bounds(tmp_path):
    (tmp_path / "file").write_text("")
    for spill, message in [
        (Spill(ROW - 1), "hold no page of the cache"),
        (Spill(ROW, tmp_path, 10), "hold no page of the cache"),
        (Spill(ROW, tmp_path / "file", FILE), "cannot be kept in"),
    ]:
        with pytest.raises(InputError, match=message):
            make_engine(spill=spill)
    with pytest.raises(InputError, match="record_routing needs all pages on the device"):
        make_engine(spill=Spill(ROW), record_routing=True)


def test_an_adapters_pages_are_by_its_content(tmp_path):
    """A file of an adapter does not serve another of the same name, nor the model alone."""
    prompts = prompts_of(2)
    folders = [tmp_path / "a", tmp_path / "b"]
    for seed, folder in enumerate(folders):
        write(folder, model(), "query_key_value|dense", 2, seed)
    found = []
    for folder, name in [(folders[0], "x"), (folders[1], "x"), (folders[0], "y"), (folders[0], None)]:
        make = lambda **o: make_engine(adapters={name or "x": folder}, **o)  # noqa: B023, E731
        with spilling(make, 64, tmp_path / "pages") as e:
            requests = e.finish(prompts, max_new_tokens=6, adapter=name, **NO_STOP)
            want = make_engine(adapters={"x": folder}).generate(
                prompts, max_new_tokens=6, adapter=name and "x", **NO_STOP
            )
            assert [r.new_tokens for r in requests] == want
            found.append([r.cached_tokens for r in requests])
    assert found == [[0, 0], [0, 0], [16, 16], [0, 0]]
