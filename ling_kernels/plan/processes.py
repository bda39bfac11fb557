"""What each process of a run on several GPUs holds: the trainer's own code divides a model without memory over a group
without processes, and what each one has then is counted."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode

from ..backend import force
from ..model import Ling, LingConfig
from ..parallel.collectives import Sizes
from ..parallel.exchange import AllToAll
from ..parallel.fake_group import fake_processes
from ..parallel.shares import Shares
from ..parallel.whole import Stepped
from ..train.building import divide
from ..train.optimizer import make_optimizer, to_masters
from ..train.prepare.checks_parallel import check_parallel, mesh_of
from ..train.settings import Settings


class Held(NamedTuple):
    """What one process holds, in bytes but for the parameters."""

    parameters: int
    weights: int  # the masters
    gradients: int  # after a backward, before they are summed on their owners
    optimizer: int  # the state of the parameters that it steps, and the whole matrices that --tp divides
    written: int  # of a checkpoint, which its host holds while it is written
    stages: str = ""  # of a pipeline, their units


class WorstLoad(AllToAll):
    """An exchange of a plan where every token of the ranks that share experts chooses as many of this rank's experts as
    it can."""

    def exchanged(self, experts: Tensor, counts: Tensor) -> tuple[Tensor, Sizes]:
        tokens, topk = experts.shape
        theirs, (to, _) = super().exchanged(experts, counts)
        return theirs, (to, [tokens * min(topk, theirs.shape[1])] * self.ep)


def processes_of(s: Settings) -> int:
    """Number of processes of the flags. --dp that is not given is the least that --ep and --vocab-parallel need in each
    of the copies."""
    dp = s.dp or s.dp_replicate * -(-max(s.ep, s.vocab_parallel) // (s.cp * s.tp))
    return dp * s.cp * s.tp * s.pp


@contextmanager
def one_process(config: LingConfig, s: Settings, rank: int = 0, worst_load: bool = False) -> Iterator[Shares]:
    """One process of a run, under FakeTensorMode: its share of the model, with master weights. Raises InputError as the
    trainer does."""
    with fake_processes(processes_of(s), rank) as everyone, FakeTensorMode():
        ranks = everyone.arranged(**mesh_of(s))
        check_parallel(s, config, ranks)
        model, group = Ling(config), ranks.experts.group
        to_masters(model, s.master)
        exchange: str | Callable = "fp8" if s.exchange == "fp8" else "bf16"
        if group and (worst_load or s.exchange == "symmetric"):  # whose rows are always those of the worst load
            exchange = partial(WorstLoad, group=group, fp8=s.exchange == "fp8")
        precision = torch.float32 if s.precision == "fp32" else torch.bfloat16
        yield divide(model, s, ranks, precision, torch.device("cpu"), exchange)


def held_by_processes(config: LingConfig, s: Settings) -> list[Held]:
    """What each process holds, by rank. Of each stage one is made, since the others differ in what they own alone.
    Raises InputError as the trainer does."""
    size = processes_of(s)
    return [held for stage in range(s.pp) for held in held_by_stage(config, s, stage * size // s.pp)]


def held_by_stage(config: LingConfig, s: Settings, first: int) -> list[Held]:
    """What each process of the stage of rank `first` holds."""
    with one_process(config, s, first) as shares:
        model, ranks = shares.model, shares.ranks
        tensors = dict(model.named_parameters()) | dict(model.named_buffers())
        wholes = {n: nn.Parameter(tensors[n].new_empty(shares.official[n].shape)) for n in shares.keeper}
        states, weights = state_bytes(Stepped(model, wholes), s), [*model.parameters()]
    units = shares.pipeline.stages_here() if shares.pipeline else ""
    size, found = sum(p.nbytes for p in weights), []
    for replica in range(ranks.dp * ranks.sharing):
        steps = {name for name in states if shares.steps(name, replica)}
        owned = sum(states[name] + (wholes[name].nbytes if name in wholes else 0) for name in steps)
        written = sum(
            tensors[n].nbytes + (states[n] if n in steps else 0) + (8 * tensors[n].numel() if s.merge_last else 0)
            for n in shares.owned(replica)
        )
        found.append(Held(sum(p.numel() for p in weights), size, size, owned, written, units))
    return found


def state_bytes(model: Stepped, s: Settings) -> dict[str, int]:
    """Bytes of the optimizer's state of each parameter, under FakeTensorMode."""
    optimizer = make_optimizer(model, s.optimizer, s.lr, s.weight_decay)
    for p in model.parameters():
        p.grad = torch.empty_like(p)
    with force("triton"):
        optimizer.step()
    return {name: sum(t.nbytes for t in optimizer.state[p].values()) for name, p in model.named_parameters()}
