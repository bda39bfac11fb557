"""The processes that torchrun started, how they share the work, and how they agree.

    rank = ((stage * dp + d) * cp + c) * tp + t    d of 0..dp-1: takes its own sequences of the batch
                                                   c of 0..cp-1: takes its own tokens of these sequences
                                                   t of 0..tp-1: its own of those, and its own heads

The dp x cp x tp ranks of a stage are replicas: what is not divided they hold alike. Among them ep neighbours divide
the experts, and vocab neighbours the rows of embedding and head. The optimizer's state is divided over all of them, or
there are several copies of it, each divided over as many neighbours. So ranks that exchange much are neighbours, and up
to the GPUs of a node in one node. A `Ranks()` without processes is one process: every method then returns at once what
it was given.
"""

import math
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from ..errors import InputError, OtherRank, counted
from .collectives import is_fake

T = TypeVar("T")
# Outside a step ranks wait for rank 0 to tokenise or to write a checkpoint, however long that takes. One that dies
# meanwhile is seen at once, by torchrun.
PATIENCE = timedelta(days=1)


@dataclass(frozen=True)
class Division:
    """Weights of which each of `number` ranks holds a part. Groups are None where they hold this rank alone."""

    number: int = 1
    part: int = 0  # this rank's
    group: dist.ProcessGroup | None = field(default=None, repr=False)  # the ranks with the other parts
    twins: dist.ProcessGroup | None = field(default=None, repr=False)  # the ranks of a copy with the same part


@dataclass(frozen=True)
class Ranks:
    """dp, cp, pp: numbers of ranks; copies: of the optimizer's state. The groups are of this rank, None where they
    hold it alone; they are for the work of a step, and what ranks agree on goes over torch's default group, which is
    patient."""

    rank: int = 0
    size: int = 1
    dp: int = 1
    cp: int = 1
    pp: int = 1
    copies: int = 1
    tensor: Division = Division()  # of the weights of attention and MLPs; its group also shares sequences
    experts: Division = Division()
    vocabulary: Division = Division()
    world: dist.ProcessGroup | None = field(default=None, repr=False)
    replicas: dist.ProcessGroup | None = field(default=None, repr=False)  # the dp x cp x tp ranks of this stage
    copy: dist.ProcessGroup | None = field(default=None, repr=False)  # those of them that divide a copy of the state
    equals: dist.ProcessGroup | None = field(default=None, repr=False)  # those with the same of it, one of each copy
    context: dist.ProcessGroup | None = field(default=None, repr=False)  # the cp ranks of one part of heads and rows
    stages: dist.ProcessGroup | None = field(default=None, repr=False)  # the pp ranks of this rank's tokens
    nodes: DeviceMesh | None = field(default=None, repr=False)  # the ranks of `experts`, as nodes x ranks of a node
    writers: dist.ProcessGroup | None = field(default=None, repr=False)  # all, for the threads that write checkpoints
    talk: dist.ProcessGroup | None = field(default=None, repr=False)  # over which ranks agree; None: torch's default

    @property
    def first(self) -> bool:
        """Whether this is rank 0, which prints and writes."""
        return self.rank == 0

    @property
    def stage(self) -> int:
        return self.rank // (self.dp * self.sharing)

    @property
    def replica(self) -> int:
        """This rank's number among the replicas of its stage."""
        return self.rank % (self.dp * self.sharing)

    @property
    def copy_size(self) -> int:
        """How many replicas divide a copy of the optimizer's state: neighbours."""
        return self.dp * self.sharing // self.copies

    @property
    def sequences(self) -> int:
        """This rank's number among the dp that take their own sequences."""
        return self.replica // self.sharing

    @property
    def sharing(self) -> int:
        """How many ranks of a stage share the tokens of the same sequences."""
        return self.cp * self.tensor.number

    @property
    def tokens_multiple(self) -> int:
        """What divides a number of tokens that these ranks can share."""
        return self.cp * math.lcm(2, self.tensor.number) if self.cp > 1 else self.tensor.number

    def arranged(
        self, dp: int | None = None, ep: int = 1, pp: int = 1, cp: int = 1, vocab: int = 1, by_nodes: bool = False,
        timeout: float | None = None, tp: int = 1, copies: int = 1,
    ) -> "Ranks":  # fmt: skip
        """These processes as pp x dp x cp x tp, where ep of dp x cp x tp divide the experts and `vocab` of them the
        vocabulary, and dp / `copies` x cp x tp the optimizer's state; dp None: as many as there are.

        by_nodes: make the mesh of nodes that the ranks of `experts` are on. timeout: seconds that a rank waits for
        another during training, None for torch's. Every rank calls it. Raises InputError where the numbers do not fit
        the processes.
        """
        dp = max(self.size // (pp * cp * tp), 1) if dp is None else dp
        check_sizes(self.size, dp, ep, pp, cp, vocab, tp, copies)
        local = int(os.environ.get("LOCAL_WORLD_SIZE", self.size))
        if by_nodes and (ep <= local or ep % local):
            raise InputError(f"--exchange-by-nodes: --ep {ep} are not all processes of two or more machines, each with"
                             f" {local}")  # fmt: skip
        if self.size == 1:
            return self
        limit = None if timeout is None else timedelta(seconds=timeout)

        def mine(groups: list[list[int]]) -> dist.ProcessGroup | None:
            """This rank's one of the groups, which only its members make: there are many in a large job."""
            members = next(g for g in groups if self.rank in g)
            if len(members) == 1:
                return None
            return dist.new_group(members, timeout=limit, use_local_synchronization=True)

        n = dp * cp * tp
        by_stage = [list(range(s * n, (s + 1) * n)) for s in range(pp)]

        def neighbours(number: int, among: list[list[int]] = by_stage) -> list[list[int]]:
            return [ranks[i : i + number] for ranks in among for i in range(0, len(ranks), number)]

        replicas, by_copy = mine(by_stage), neighbours(n // copies)

        def divided(number: int) -> Division:
            twins = [ranks[i::number] for ranks in by_copy for i in range(number)]
            return Division(number, self.rank % n % number, mine(neighbours(number)), mine(twins))

        on_hosts = "fake" if is_fake() else "gloo"
        nodes = None
        if by_nodes:
            crossing = [ranks[i::local] for ranks in neighbours(ep) for i in range(local)]
            groups = [mine(crossing), mine(neighbours(local))]
            first = self.rank // ep * ep
            device = "cuda" if torch.cuda.is_available() else "cpu"
            members = torch.arange(first, first + ep).view(-1, local)
            nodes = DeviceMesh.from_group(groups, device, members, mesh_dim_names=("nodes", "ranks"))  # type: ignore[arg-type]
        return replace(
            self,
            dp=dp, cp=cp, pp=pp, copies=copies,
            tensor=divided(tp), experts=divided(ep), vocabulary=divided(vocab),
            world=mine([list(range(self.size))]),
            replicas=replicas,
            copy=replicas if copies == 1 else mine(by_copy),
            equals=mine([ranks[i :: n // copies] for ranks in by_stage for i in range(n // copies)]),
            context=mine([ranks[t::tp] for ranks in neighbours(cp * tp) for t in range(tp)]),
            stages=mine([list(range(i, self.size, n)) for i in range(n)]),
            nodes=nodes,
            writers=dist.new_group(timeout=PATIENCE, backend=on_hosts),
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

    def of_stages(self, value: T) -> list[T]:
        """The value of the first rank of each stage."""
        return self.exchange(value)[:: self.dp * self.sharing]

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
        return items[self.sequences * number : (self.sequences + 1) * number]

    def sum_(self, t: Tensor, stages: bool = False) -> Tensor:
        """Add up a tensor over the replicas, in place; over all ranks where `stages` have parts of it too."""
        if (group := self.world if stages else self.replicas) is not None:
            dist.all_reduce(t, group=group)
        return t


def agreed(error: InputError) -> InputError:
    """Mark an error that every rank raises."""
    error.on_all_ranks = True  # type: ignore[attr-defined]
    return error


def is_agreed(error: InputError) -> bool:
    return getattr(error, "on_all_ranks", False)


def check_sizes(
    size: int, dp: int, ep: int, pp: int, cp: int = 1, vocab: int = 1, tp: int = 1, copies: int = 1
) -> None:  # fmt: skip
    """Raise InputError where dp x cp x tp x pp are not the processes, where ep or vocab does not divide the processes
    of a stage, and where these or dp are not multiples for copies of the optimizer's state."""
    n, sharing = dp * cp * tp, {"--cp": cp, "--tp": tp}
    if n * pp != size:
        numbers = f"--dp {dp} times --pp {pp}" + "".join(f" times {f} {v}" for f, v in sharing.items() if v > 1)
        raise InputError(
            f"{numbers} are {counted(n * pp, 'process')}, and there {'is' if size == 1 else 'are'} {size}:"
            f" start them with torchrun, --nproc-per-node times --nnodes"
        )
    flags = " and ".join(["--dp", *(f for f, v in sharing.items() if v > 1)])
    for flag, number, what in (("--ep", ep, "experts"), ("--vocab-parallel", vocab, "vocabulary")):
        if n % number:
            raise InputError(
                f"{flag} {number} does not divide the {counted(n, 'process')} of {flags}: groups of {number} share the"
                f" {what}"
            )
        if dp % copies == 0 and n // copies % number:
            raise InputError(f"{flag} {number} does not divide the {counted(n // copies, 'process')} of each of"
                             f" --dp-replicate {copies} copies, which divide the {what} themselves")  # fmt: skip
    if dp % copies:
        raise InputError(f"--dp-replicate {copies} does not divide --dp {dp}: each copy of the optimizer's state is of"
                         " equally many processes")  # fmt: skip


def rank_of_torchrun() -> int:
    """This process's number among those that torchrun started."""
    return int(os.environ.get("RANK", "0"))


def start() -> Ranks:
    """The processes that torchrun started, or this one alone. Each takes the GPU of its number on its machine."""
    size, rank = int(os.environ.get("WORLD_SIZE", "1")), rank_of_torchrun()
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
