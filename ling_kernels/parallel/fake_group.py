"""Process groups without processes, for plans. The private names of torch that this takes are all here."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch.distributed as dist

from .ranks import Ranks


@contextmanager
def fake_processes(size: int, rank: int = 0) -> Iterator[Ranks]:
    """This process as one of `size`, whose messages go nowhere and bring tensors of any values; or as the only one."""
    if size == 1:
        yield Ranks()
        return
    from torch.testing._internal.distributed.fake_pg import FakeStore  # its import registers the backend

    dist.init_process_group("fake", rank=rank, world_size=size, store=FakeStore())
    try:
        yield Ranks(rank, size, dp=size, world=dist.group.WORLD)
    finally:
        dist.destroy_process_group()
