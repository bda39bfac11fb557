"""A file is whole or absent."""

import os

import pytest

from ling_kernels.files import whole


@pytest.mark.parametrize("durable", [False, True])
def test_a_file_takes_its_name_when_it_is_written(tmp_path, monkeypatch, durable):
    path, synced = tmp_path / "x.json", []
    path.write_text("old")
    monkeypatch.setattr(os, "fsync", lambda fd: synced.append(path.read_text()))
    with whole(path, durable) as partial:
        partial.write_text("new")
        assert path.read_text() == "old"
    assert path.read_text() == "new" and os.listdir(tmp_path) == ["x.json"]
    assert synced == (["old"] if durable else [])


@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
def test_an_error_leaves_the_old_file_and_nothing_else(tmp_path, error):
    path = tmp_path / "x.json"
    path.write_text("old")
    with pytest.raises(error), whole(path) as partial:
        partial.write_text("half")
        raise error
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["x.json"]
