"""Files of the prefix cache: damaged, shared, bounded, on a folder that fails."""

# ruff: noqa: F811 (a fixture is imported)
import random
import threading
import warnings

import pytest

from ling_kernels.generate.pages import levels
from ling_kernels.generate.pages.disk import DiskPages
from tests.engines import NO_STOP, check, drain, engine, make_engine, model  # noqa: F401
from tests.test_pages import answers, prompts_of, spilling, wait_until, without_cache


def damaged(content: bytes, kind: str) -> bytes:
    if kind == "a bit":
        return content[:-9] + bytes([content[-9] ^ 4]) + content[-8:]
    if kind == "foreign":
        return b"#!/bin/sh\n"
    return {"cut": content[:-1], "longer": content + b"x", "empty": b"", "header": content[:20]}[kind]


@pytest.mark.parametrize("kind", ["a bit", "foreign", "cut", "longer", "empty", "header", "of another page"])
def test_damaged_files_are_removed_with_one_warning(tmp_path, kind):
    prompts = prompts_of(3)
    with spilling(make_engine, 64, tmp_path) as e:
        want = e.generate(prompts, max_new_tokens=6, **NO_STOP)
    (tmp_path / "notes.txt").write_text("mine")
    files = sorted(tmp_path.glob("*/*.page"))
    contents = [file.read_bytes() for file in files]
    for i, file in enumerate(files):
        file.write_bytes(contents[i - 1] if kind == "of another page" else damaged(contents[i], kind))
    e = spilling(make_engine, 64, tmp_path)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert e.generate(prompts, max_new_tokens=6, **NO_STOP) == want
        assert e.pages.levels.hits["disk"] == 0 and e.pages.levels.disk.damaged >= 3
        e.close()
    assert [str(w.message).partition(" is ")[2] for w in caught] == [
        "damaged or no page of this cache: it is removed; more of them are removed without a word"
    ]
    assert (tmp_path / "notes.txt").read_text() == "mine"
    with spilling(make_engine, 64, tmp_path) as e:  # written again
        assert e.generate(prompts, max_new_tokens=6, **NO_STOP) == want and e.pages.levels.disk.damaged == 0


def test_the_folder_is_bounded_and_keeps_what_was_used_last(tmp_path, monkeypatch):
    monkeypatch.setattr(levels, "REFRESH_SECONDS", 0.0)
    prompts = prompts_of(6)
    with spilling(make_engine, 64, tmp_path, files=12) as e:
        for prompt in [*prompts[:2], prompts[0], *prompts[2:4]]:
            e.generate([prompt], max_new_tokens=1, **NO_STOP)
            wait_until(lambda: not e.pages.levels.writing)
            assert len([*tmp_path.glob("*/*.page")]) <= 12
        assert e.pages.levels.disk.bytes == sum(f.stat().st_size for f in tmp_path.glob("*/*.page"))
    e = spilling(make_engine, 64, tmp_path, files=12)
    cached = [r.cached_tokens for r in answers(e, [*prompts[3:1:-1], *prompts[:2]], 1)]
    assert cached == [16, 16, 16, 0]
    e.close()


def test_engines_that_share_a_folder(tmp_path):
    """They write, read and remove the same files at once."""
    prompts = prompts_of(12)
    want = without_cache(prompts, 2)
    faults = []

    def run(seed):
        try:
            draw = random.Random(seed)
            with spilling(make_engine, 8, tmp_path, files=20, device_tokens=24) as e:
                for _ in range(12):
                    i = draw.randrange(12)
                    assert e.generate([prompts[i]], max_new_tokens=2, **NO_STOP) == [want[i]]
                assert e.pages.levels.disk.damaged == e.pages.levels.disk.failed == 0
        except BaseException as error:
            faults.append(error)

    threads = [threading.Thread(target=run, args=[seed]) for seed in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not faults and not [*tmp_path.glob("*/.*")], "nothing unfinished is left"
    assert len([*tmp_path.glob("*/*.page")]) <= 20 + 3 * 2


def test_a_folder_that_hangs_or_fails_costs_no_answer(tmp_path, monkeypatch):
    monkeypatch.setattr(levels, "FETCH_SECONDS", 0.2)
    prompts = prompts_of(3)
    want = without_cache(prompts)
    with spilling(make_engine, 64, tmp_path) as e:
        assert e.generate(prompts, max_new_tokens=6, **NO_STOP) == want
    e, go = spilling(make_engine, 64, tmp_path), threading.Event()
    e.pages.levels.disk.touch = lambda *a: go.wait(60) and False
    with pytest.warns(UserWarning, match="takes longer than 0.2 s to read: the cache goes on without for now"):
        assert e.generate(prompts, max_new_tokens=6, **NO_STOP) == want
        assert e.generate(prompts_of(4)[3:], max_new_tokens=6, **NO_STOP)
    go.set()
    e.pages.levels.disk.path = lambda *a: tmp_path / "notes" / "a" / "b.page"
    drain(e)


def test_a_file_with_the_name_of_a_subfolder_costs_no_page(tmp_path):
    (tmp_path / ("a" * 32)).write_text("not a folder")
    with spilling(make_engine, 64, tmp_path) as e:
        e.generate(prompts_of(3), max_new_tokens=6, **NO_STOP)
        wait_until(lambda: len([*tmp_path.glob("*/*.page")]) == 3 * 5)
        assert not e.pages.levels.disk.failed


def test_a_full_disk_costs_no_answer(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    prompts = prompts_of(3)
    e = spilling(make_engine, 64, tmp_path)
    disk = e.pages.levels.disk
    monkeypatch.setattr("ling_kernels.generate.pages.disk.os.replace", full)
    with pytest.warns(UserWarning, match="No space left on device; further errors are only counted") as caught:
        assert e.generate(prompts, max_new_tokens=6, **NO_STOP) == without_cache(prompts)
        e.close()
    assert len(caught) == 1 and disk.failed == 15 and not [*tmp_path.glob("*/*")]


def test_files_abandoned_by_a_killed_process_are_removed(tmp_path):
    import os

    folder = tmp_path / ("0" * 32)
    folder.mkdir()
    old, new = folder / f".{'1' * 32}.aa.partial", folder / f".{'1' * 32}.bb.partial"
    for file in (old, new):
        file.write_bytes(b"x")
    os.utime(old, (1, 1))
    DiskPages(tmp_path, 1000).make_room(0)
    assert [*folder.iterdir()] == [new]
