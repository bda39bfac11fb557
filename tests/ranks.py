"""Processes that form a group on gloo, for tests of ling_kernels.parallel."""

from contextlib import contextmanager
from multiprocessing import set_forkserver_preload

import torch
import torch.distributed as dist
import torch.multiprocessing as processes

from ling_kernels.parallel.ranks import Ranks

# Imported once, not by every process.
set_forkserver_preload(["tests.training", "torch.distributed.pipelining", "ling_kernels.generate.worker"])


def in_group(rank, world, folder, checks):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{folder / 'store'}", rank=rank, world_size=world)
    try:
        for check in checks:
            check(rank, dist.group.WORLD)
    finally:
        dist.destroy_process_group()


def run(folder, checks, world: int = 2) -> None:
    """Run check(rank, group) for each of `checks` in `world` processes."""
    start(in_group, (world, folder, checks), world)


def start(work, arguments: tuple, world: int) -> None:
    """Run work(rank, *arguments) in `world` processes, which may form groups."""
    processes.start_processes(work, arguments, nprocs=world, start_method="forkserver")


def ranks_of(group) -> Ranks:
    """All ranks of a group, to be arranged."""
    size = dist.get_world_size(group)
    return Ranks(dist.get_rank(group), size, dp=size, world=group)


@contextmanager
def group_of_one(folder):
    """A group of this process alone, for kernels on the virtual GPU, which this process has."""
    dist.init_process_group("gloo", f"file://{folder / 'store'}", rank=0, world_size=1)
    try:
        yield dist.group.WORLD
    finally:
        dist.destroy_process_group()


def summed(t: torch.Tensor, group) -> torch.Tensor:
    """The sum over the ranks, in fp32."""
    total = t.detach().float().clone()
    dist.all_reduce(total, group=group)
    return total
