"""Atomic writes: a file is complete or absent."""

import os

import pytest

from ling_kernels.files import atomic_write


@pytest.mark.parametrize("durable", [False, True])
def test_the_file_is_replaced_on_exit(tmp_path, monkeypatch, durable):
    path, synced = tmp_path / "x.json", []
    path.write_text("old")
    monkeypatch.setattr(os, "fsync", lambda fd: synced.append(path.read_text()))
    with atomic_write(path, durable) as partial:
        partial.write_text("new")
        assert path.read_text() == "old"
    assert path.read_text() == "new" and os.listdir(tmp_path) == ["x.json"]
    assert synced == (["old"] if durable else [])


@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
def test_an_error_keeps_the_old_file_and_removes_the_partial_one(tmp_path, error):
    path = tmp_path / "x.json"
    path.write_text("old")
    with pytest.raises(error), atomic_write(path) as partial:
        partial.write_text("half")
        raise error
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["x.json"]
