"""Experiments on small models on a CPU, with their results beside them. Each says how to repeat it."""

import datetime
import platform
import subprocess
from pathlib import Path

import torch


def origin() -> dict:
    """Commit (with -dirty where files have changed), date and versions, for a study's results."""
    command = ["git", "describe", "--always", "--abbrev=40", "--dirty", "--exclude=*"]
    done = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True)
    date = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
    commit = done.stdout.strip() or "unknown"
    versions = dict(python=platform.python_version(), torch=torch.__version__)
    return dict(commit=commit, date=date, threads=torch.get_num_threads()) | versions
