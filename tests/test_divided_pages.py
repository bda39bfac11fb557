"""The prefix cache of an engine over two processes, on gloo, in host memory and in files: no page is another's."""

# ruff: noqa: F811 (a fixture is imported)
import os
import signal
from contextlib import contextmanager

import pytest
import torch

from ling_kernels.errors import InputError, LostRank
from ling_kernels.generate import Engine, Spill
from ling_kernels.generate.pages.disk import HEADER
from ling_kernels.model import load_model, save_model
from tests.engines import NO_STOP, drain
from tests.test_divided_engine import OPTIONS, divided_engine, forked  # noqa: F401
from tests.test_model import DATA
from tests.test_pages import ROW, Later, prompts_of, wait_until

FILE = ROW + HEADER.size  # ROW: of both parts of a page of 4 tokens


def without_cache(folder, prompts, draft=0):
    plain = Engine(load_model(folder, torch.float32), **OPTIONS, draft=draft)
    return plain.generate(prompts, max_new_tokens=6, **NO_STOP)


@contextmanager
def spilling(pages, folder=None, model=DATA / "base", device_tokens=28, **options):
    spill = Spill(pages * ROW, folder, 1000 * FILE)
    with divided_engine(model, cache_tokens=device_tokens, spill=spill, **options) as engine:
        yield engine
        engine.close()


def served(engine, prompts):
    """New tokens of each prompt, one after the other, and how many of its tokens were cached."""
    requests = [engine.finish([p], max_new_tokens=6, **NO_STOP)[0] for p in prompts]
    return [r.new_tokens for r in requests], [r.cached_tokens for r in requests]


def test_pages_go_to_host_memory_and_come_back():
    prompts = prompts_of(5)
    want = without_cache(DATA / "base", prompts)
    with spilling(40) as engine:  # the device holds one sequence
        levels = engine.pages.levels
        assert levels.host.count == 40, "the limit is of both parts together"
        assert served(engine, prompts) == (want, [0] * 5)
        parts = levels.host.pages[next(iter(levels.host.pages))].row.chunk(2)
        assert parts[0].any() and parts[1].any() and not torch.equal(*parts)
        assert served(engine, prompts) == (want, [16] * 5)
        assert levels.hits["host"] == 5 * 16
        drain(engine)


@pytest.mark.parametrize("files", [False, True], ids=["host", "files"])
@pytest.mark.parametrize("later", [False, True], ids=["at once", "later"])
def test_few_rows_and_many_requests(later, files, tmp_path):
    """Pages leave host memory too, rows are used again at once, requests run together and are preempted. later: rank
    0's own copies end after the other's."""
    prompts = [p[:n] for p in prompts_of(4) for n in (17, 13, 9)]
    want = without_cache(DATA / "base", prompts, draft=2)
    with spilling(7, tmp_path if files else None, device_tokens=60, draft=2) as engine:
        levels = engine.pages.levels
        if later:
            levels.copies.here = Later(levels.copies.here)
        assert engine.generate(prompts, max_new_tokens=6, **NO_STOP) == want
        for _ in range(2):
            assert served(engine, prompts)[0] == want
        drain(engine)
        assert levels.hits["disk" if files else "host"]


@pytest.mark.parametrize("name", ["base", "mtp1"])
def test_a_restarted_engine_answers_from_the_folder(name, tmp_path):
    prompts, options = prompts_of(3), dict(device_tokens=160, draft=2, model=DATA / name)
    want = without_cache(DATA / name, prompts, draft=2)
    with spilling(128, tmp_path, **options) as engine:
        assert served(engine, prompts) == (want, [0] * 3)
    files = [*tmp_path.glob("*/*.page")]
    assert len(files) == 3 * 5, "a file has all parts of a page"
    with spilling(64, tmp_path, **options) as engine:
        levels = engine.pages.levels
        assert served(engine, prompts) == (want, [16] * 3) and levels.hits["disk"] == 48
        drain(engine)


def test_pages_depend_on_the_weights_of_every_rank(tmp_path):
    """A weight that rank 1 alone has makes the files foreign; one more digest of the same weights does not."""
    other = load_model(DATA / "base", torch.float32)
    with torch.no_grad():
        other.layers[0].mlp.down.weight[:, -1] += 0.5
    save_model(other, tmp_path / "other", torch.float32)
    save_model(load_model(DATA / "base", torch.float32), tmp_path / "same", torch.float32)
    prompts, found = prompts_of(2), []
    for folder in (DATA / "base", tmp_path / "other", tmp_path / "same"):
        with spilling(64, tmp_path / "pages", folder, device_tokens=160) as engine:
            want = without_cache(folder, prompts)
            tokens, cached = served(engine, prompts)
            assert tokens == want
            found.append(cached)
    assert found == [[0, 0], [0, 0], [16, 16]]


def test_no_file_without_a_part(tmp_path):
    """Of pages whose copies a lost rank has not ended nothing is written; the requests get its error."""
    prompts = prompts_of(2)
    with spilling(64, tmp_path, device_tokens=160) as engine:
        levels, worker = engine.pages.levels, engine.workers.workers[0]
        request = engine.submit(prompts[0], max_new_tokens=2, **NO_STOP)
        while request.num_new_tokens < 1:
            engine.step()
        os.kill(worker.process.process.pid, signal.SIGSTOP)
        engine.cancel(request)
        levels.save_released(all_of_them=True)
        assert levels.writing == 4 and not [*tmp_path.glob("*/*.page")]
        waiting = [engine.submit(p, max_new_tokens=2, **NO_STOP) for p in prompts]
        with pytest.warns(UserWarning, match="the cache's files: LostRank"):
            os.kill(worker.process.process.pid, signal.SIGKILL)
            wait_until(lambda: not levels.writing)
        while not all(r.finished for r in waiting):
            engine.step()
        assert all(isinstance(r.error, LostRank) and "rank 1 of 2 has ended" in str(r.error) for r in waiting)
    assert not [*tmp_path.glob("*/*.page")]


def test_bad_bounds(tmp_path):
    (tmp_path / "file").write_text("")
    for spill, message in [
        (Spill(ROW - 1), f"{ROW - 1} bytes of host memory hold no page of the cache, {ROW} bytes"),
        (Spill(ROW, tmp_path, 10), "10 bytes of files hold no page of the cache"),
        (Spill(ROW, tmp_path / "file", FILE), "cannot be kept in"),
    ]:
        with pytest.raises(InputError, match=message), divided_engine(DATA / "base", spill=spill):
            pass
        assert not torch.distributed.is_initialized()
