"""The processes that torchrun started, how they share the work, and how they agree.

    rank = stage * dp + d      d of 0..dp-1: ranks of a stage take different rows of the batch
                               d % ep: the experts that it holds; ranks with equal d % ep hold the same

So the ranks that exchange rows of experts are neighbours, and with ep up to the GPUs of a node in one node. A `Ranks()`
without processes is one process: every method then returns at once what it was given.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from ..errors import InputError, OtherRank

T = TypeVar("T")
# Outside a step ranks wait for rank 0 to tokenise or to write a checkpoint, however long that takes. One that dies
# meanwhile is seen at once, by torchrun.
PATIENCE = timedelta(days=1)


@dataclass(frozen=True)
class Ranks:
    """dp, ep, pp: their numbers of ranks. The groups are of this rank, None where they hold it alone; they are for the
    work of a step, and what ranks agree on goes over torch's default group, which is patient."""

    rank: int = 0
    size: int = 1
    dp: int = 1
    ep: int = 1
    pp: int = 1
    world: dist.ProcessGroup | None = field(default=None, repr=False)
    replicas: dist.ProcessGroup | None = field(default=None, repr=False)  # the dp ranks of this stage
    experts: dist.ProcessGroup | None = field(default=None, repr=False)  # the ep ranks that share a layer's experts
    twins: dist.ProcessGroup | None = field(default=None, repr=False)  # the dp / ep ranks that hold the same experts
    stages: dist.ProcessGroup | None = field(default=None, repr=False)  # the pp ranks of this rank's rows
    writers: dist.ProcessGroup | None = field(default=None, repr=False)  # all, for the threads that write checkpoints
    talk: dist.ProcessGroup | None = field(default=None, repr=False)  # over which ranks agree; None: torch's default

    @property
    def first(self) -> bool:
        """Whether this is rank 0, which prints and writes."""
        return self.rank == 0

    @property
    def stage(self) -> int:
        return self.rank // self.dp

    @property
    def replica(self) -> int:
        return self.rank % self.dp

    @property
    def expert_part(self) -> int:
        return self.replica % self.ep

    def arranged(self, dp: int | None, ep: int, pp: int, timeout: float | None = None) -> "Ranks":
        """These processes as dp x pp, groups of ep among the dp ranks; dp None: as many as there are.

        timeout: seconds that a rank waits for another during training, None for torch's. Every rank calls it. Raises
        InputError where the numbers do not fit the processes.
        """
        dp = max(self.size // pp, 1) if dp is None else dp
        check_sizes(self.size, dp, ep, pp)
        if self.size == 1:
            return self
        limit = None if timeout is None else timedelta(seconds=timeout)

        def mine(groups: list[list[int]]) -> dist.ProcessGroup | None:
            """Every rank makes every group, in the same order, as torch asks."""
            made = {tuple(g): dist.new_group(g, timeout=limit) for g in groups if len(g) > 1}
            return next((group for members, group in made.items() if self.rank in members), None)

        by_stage = [list(range(s * dp, (s + 1) * dp)) for s in range(pp)]
        return replace(
            self,
            dp=dp, ep=ep, pp=pp,
            world=mine([list(range(self.size))]),
            replicas=mine(by_stage),
            experts=mine([stage[i : i + ep] for stage in by_stage for i in range(0, dp, ep)]),
            twins=mine([stage[i::ep] for stage in by_stage for i in range(ep)]),
            stages=mine([list(range(d, self.size, dp)) for d in range(dp)]),
            writers=dist.new_group(timeout=PATIENCE, backend="gloo"),
        )  # fmt: skip

    def in_thread(self) -> "Ranks":
        """These ranks for a thread, whose messages do not mix with those of the main one; they stay on the hosts."""
        return replace(self, talk=self.writers)

    def exchange(self, value: T, error: str | None = None) -> list[T]:
        """Every rank's value, by rank. Where any rank has an error, all raise InputError: rank 0 with the first rank's
        message, the others OtherRank."""
        if self.size == 1:
            return [value]
        found: list[Any] = [None] * self.size
        dist.all_gather_object(found, (error, value), group=self.talk)
        wrong = [(rank, message) for rank, (message, _) in enumerate(found) if message is not None]
        if wrong:
            rank, message = wrong[0]
            message = message if rank == 0 else f"rank {rank}: {message}"
            raise agreed(InputError(message) if self.first else OtherRank(message))
        return [value for _, value in found]

    @contextmanager
    def agreed(self) -> Iterator[None]:
        """An InputError of any rank inside becomes one of all ranks, so that none waits for another."""
        error = None
        try:
            yield
        except InputError as found:
            if self.size == 1 or is_agreed(found):
                raise
            error = str(found)
        self.exchange(None, error)

    def from_first(self, make: Callable[[], T]) -> T:
        """What `make()` returns on rank 0, where alone it is called; a value that pickle takes."""
        value = error = None
        try:
            value = make() if self.first else None
        except InputError as found:
            if self.size == 1:
                raise
            error = str(found)
        return self.exchange(value, error)[0]  # type: ignore[return-value]

    def in_turn(self, make: Callable[[], T]) -> T:
        """`make()` on rank 0, and when that is done on the others: rank 0 writes files that the others find."""
        value = None
        for turn in (True, False):
            with self.agreed():
                if self.first == turn:
                    value = make()
            if self.size == 1:
                break
        return value  # type: ignore[return-value]

    def compare(self, **values: Any) -> None:
        """Raise InputError, naming the rank, where a value is not the same on every rank."""
        found = self.exchange(values)
        for rank, theirs in enumerate(found):
            for name, value in theirs.items():
                if value != found[0][name]:
                    error = f"rank {rank} has {name.replace('_', ' ')} {value}, rank 0 {found[0][name]}"
                    raise agreed(InputError(error) if self.first else OtherRank(error))

    def any(self, value: bool) -> bool:
        """Whether it is true on any rank."""
        if self.size == 1:
            return value
        flag = torch.tensor([value], dtype=torch.int32)
        dist.all_reduce(flag, dist.ReduceOp.MAX)
        return bool(flag)

    def share(self, items: list[T]) -> list[T]:
        """This rank's of the items that the dp ranks divide equally, neighbours on one rank."""
        number = len(items) // self.dp
        return items[self.replica * number : (self.replica + 1) * number]

    def sum_(self, t: Tensor, stages: bool = False) -> Tensor:
        """Add up a tensor over the dp ranks, in place; over all ranks where `stages` have parts of it too."""
        if (group := self.world if stages else self.replicas) is not None:
            dist.all_reduce(t, group=group)
        return t


def agreed(error: InputError) -> InputError:
    """Mark an error that every rank raises."""
    error.on_all_ranks = True  # type: ignore[attr-defined]
    return error


def is_agreed(error: InputError) -> bool:
    return getattr(error, "on_all_ranks", False)


def check_sizes(size: int, dp: int, ep: int, pp: int) -> None:
    """Raise InputError where dp x pp are not the processes, and where ep does not divide dp."""
    if dp * pp != size:
        raise InputError(
            f"--dp {dp} times --pp {pp} are {dp * pp} processes, and there {'is' if size == 1 else 'are'} {size}:"
            f" start them with torchrun, --nproc-per-node times --nnodes"
        )
    if dp % ep:
        raise InputError(f"--ep {ep} does not divide the {dp} data-parallel ranks, which share the experts")


def start() -> Ranks:
    """The processes that torchrun started, or this one alone. Each takes the GPU of its number on its machine."""
    size, rank = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("RANK", "0"))
    if size == 1:
        return Ranks()
    gpu = torch.cuda.is_available()
    if gpu:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    if not dist.is_initialized():
        store, _, _ = next(dist.rendezvous("env://", rank, size, timeout=PATIENCE))
        if os.environ.get("GROUP_WORLD_SIZE") == "1":
            # torchrun keeps its store over restarts on one machine, with the addresses of the processes before. With
            # several machines each counts its own restarts: docs/scale-out.md names the variable for a new store.
            store = dist.PrefixStore(f"restart {os.environ.get('TORCHELASTIC_RESTART_COUNT')}", store)
        backend = "cpu:gloo,cuda:nccl" if gpu else "gloo"
        dist.init_process_group(backend, timeout=PATIENCE, store=store, rank=rank, world_size=size)
    return Ranks(rank, size, dp=size, world=dist.group.WORLD)


def is_lost_rank(error: RuntimeError) -> bool:
    """Whether this is NCCL's or gloo's error, where another rank has gone or does not answer in time."""
    return isinstance(error, dist.DistError) or "gloo" in str(error).lower()  # gloo's are plain RuntimeErrors


def stop() -> None:
    """Take leave of the other processes."""
    if dist.is_initialized():
        dist.destroy_process_group()
