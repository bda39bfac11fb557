"""The training command in several processes, job after job."""

import contextlib
import io
import json
import os
import random
import socket
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path

import torch

from ling_kernels.train import cli
from ling_kernels.train.__main__ import main
from ling_kernels.train.prepare import device
from tests.ranks import start

Job = tuple[str, list[list[str]]]


def command(argv: list[str]) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of the command."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), warnings.catch_warnings(action="ignore"):
        code = main(argv)
    return code, out.getvalue(), err.getvalue()


def run_jobs(jobs: list[Job], results: Path, processes: int, others: Mapping[str, Callable] | None = None) -> None:
    """Run the jobs, (name, argv of each rank) each, one after the other, in so many processes or fewer. What a rank's
    `command`, or the function that `others` has for the job, returns is then in the file NAME.RANK of the folder
    `results`."""
    assert len({name for name, _ in jobs}) == len(jobs)
    start(work, (jobs, results, free_ports(len(jobs)), others or {}), processes)


def free_ports(number: int) -> list[int]:
    """Below those that Linux gives to sockets without a port of their own, which other tests open meanwhile."""
    found: set[int] = set()
    while len(found) < number:
        port = random.SystemRandom().randrange(10_000, 32_000)
        with contextlib.suppress(OSError), socket.socket() as s:
            s.bind(("127.0.0.1", port))
            found.add(port)
    return [*found]


def work(rank, jobs, results, ports, others):
    torch.set_num_threads(1)
    cli.draw = lambda *args: []  # plots take seconds
    device.measured_flops = lambda *args: 1e12
    for (name, argv), port in zip(jobs, ports, strict=True):
        if rank >= len(argv):
            continue
        os.environ |= dict(RANK=str(rank), WORLD_SIZE=str(len(argv)), LOCAL_RANK=str(rank), MASTER_ADDR="127.0.0.1")
        os.environ |= dict(MASTER_PORT=str(port), LOCAL_WORLD_SIZE="2")
        (results / f"{name}.{rank}").write_text(json.dumps(others.get(name, command)(argv[rank])))
