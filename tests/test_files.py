"""Atomic writes: a file is complete or absent."""

import os
import subprocess
from datetime import datetime, timedelta, timezone

import pytest

from ling_kernels import files
from ling_kernels.files import atomic_write, origin


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


def test_results_name_their_commit_and_date(tmp_path, monkeypatch):
    """The commit of the code's own repository; one around the place where it is installed is not it."""
    package = tmp_path / "ling_kernels/files.py"
    monkeypatch.setattr(files, "__file__", str(package))
    package.parent.mkdir()
    git = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b"]
    subprocess.run([*git, "init", "-q"], check=True)
    package.write_text("1")
    subprocess.run([*git, "add", "-A"], check=True)
    subprocess.run([*git, "commit", "-qm", "one"], check=True)
    head = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
    found = origin()
    assert found["commit"] == head and len(head) == 40
    assert datetime.now(timezone.utc) - datetime.fromisoformat(found["date"]) < timedelta(minutes=1)
    package.write_text("2")
    assert origin()["commit"] == f"{head}-dirty"
    monkeypatch.setattr(files, "__file__", str(tmp_path / "env/site-packages/ling_kernels/files.py"))
    assert origin()["commit"] == "unknown"
