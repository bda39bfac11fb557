"""What each process of a run on several GPUs holds: the trainer's own code divides a model without memory over a group
without processes, and what each one has then is counted."""

from functools import partial
from typing import NamedTuple

import torch
from torch import nn
from torch._subclasses import FakeTensorMode

from ..backend import force
from ..files import format_bytes
from ..model import Ling, LingConfig
from ..parallel.fake_group import fake_processes
from ..parallel.shares import Shares
from ..parallel.whole import Stepped
from ..train.building import make_pipeline
from ..train.optimizer import OF_WHOLE, make_optimizer, to_masters
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


def processes_of(s: Settings) -> int:
    """Number of processes of the flags. --dp that is not given is the least that --ep and --vocab-parallel need in each
    of the copies."""
    dp = s.dp or s.dp_replicate * -(-max(s.ep, s.vocab_parallel) // (s.cp * s.tp))
    return dp * s.cp * s.tp * s.pp


def held_by_processes(config: LingConfig, s: Settings) -> list[Held]:
    """What each process holds, by rank. Of each stage one is made, since the others differ in what they own alone.
    Raises InputError as the trainer does."""
    size = processes_of(s)
    found: list[Held] = []
    for stage in range(s.pp):
        with fake_processes(size, stage * size // s.pp) as everyone, FakeTensorMode():
            ranks = everyone.arranged(**mesh_of(s))
            check_parallel(s, config, ranks)
            model = Ling(config)
            to_masters(model, s.master)
            make = partial(make_pipeline, model, s, ranks, torch.float32, torch.device("cpu"))
            shares = Shares(model, ranks, make if s.pp > 1 else None, s.exchange, whole=s.optimizer in OF_WHOLE)
            tensors = dict(model.named_parameters()) | dict(model.named_buffers())
            wholes = {n: nn.Parameter(tensors[n].new_empty(shares.official[n].shape)) for n in shares.keeper}
            states, weights = state_bytes(Stepped(model, wholes), s), [*model.parameters()]
        units = shares.pipeline.stages_here() if shares.pipeline else ""
        size_of = sum(p.nbytes for p in weights)
        for replica in range(ranks.dp * ranks.sharing):
            steps = {name for name in states if shares.steps(name, replica)}
            owned = sum(states[name] + (wholes[name].nbytes if name in wholes else 0) for name in steps)
            written = sum(
                tensors[n].nbytes + (states[n] if n in steps else 0) + (8 * tensors[n].numel() if s.merge_last else 0)
                for n in shares.owned(replica)
            )
            found.append(Held(sum(p.numel() for p in weights), size_of, size_of, owned, written, units))
    return found


def state_bytes(model: Stepped, s: Settings) -> dict[str, int]:
    """Bytes of the optimizer's state of each parameter, under FakeTensorMode."""
    optimizer = make_optimizer(model, s.optimizer, s.lr, s.weight_decay)
    for p in model.parameters():
        p.grad = torch.empty_like(p)
    with force("triton"):
        optimizer.step()
    return {name: sum(t.nbytes for t in optimizer.state[p].values()) for name, p in model.named_parameters()}


def process_lines(held: list[Held], s: Settings) -> list[str]:
    """The mesh, and a line for the processes of each stage. held: of every process."""
    number = len(held) // s.pp
    lines = [
        f"{'processes':<12}  {len(held)}: dp {number // (s.cp * s.tp)} x cp {s.cp} x tp {s.tp} x pp {s.pp}; of a"
        f" stage's {number}, {s.ep} divide the experts, {s.vocab_parallel} the vocabulary"
        + f", {number // s.dp_replicate} the optimizer's state"
        * (s.dp_replicate > 1),
        f"{'rank':<12}{'parameters':>18}{'weights':>12}{'gradients':>12}{'optimizer':>24}{'most in all':>13}"
        + "  stages" * (s.pp > 1),
    ]
    for stage in range(s.pp):
        of_stage = held[stage * number : (stage + 1) * number]
        first, states = of_stage[0], sorted(h.optimizer for h in of_stage)
        optimizer = " to ".join(dict.fromkeys(format_bytes(n) for n in (states[0], states[-1])))
        name = f"{stage * number}" + f" to {(stage + 1) * number - 1}" * (number > 1)
        most = format_bytes(first.weights + first.gradients + states[-1])
        sizes = f"{format_bytes(first.weights):>12}{format_bytes(first.gradients):>12}{optimizer:>24}{most:>13}"
        lines.append(f"{name:<12}{first.parameters:>18,}{sizes}  {first.stages}".rstrip())
    return lines
