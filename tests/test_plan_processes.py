"""What a plan says that each process holds, against processes that have trained a step; the lines of the command."""

import re
import shlex
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from ling_kernels.model import Ling
from ling_kernels.parallel.checkpoints import own_part, own_pieces
from ling_kernels.parallel.fake_group import fake_processes
from ling_kernels.plan.__main__ import main
from ling_kernels.plan.processes import Held, held_by_processes
from ling_kernels.train.building import divide
from ling_kernels.train.checkpoint import optimizer_tensors
from ling_kernels.train.optimizer import make_optimizer, to_masters
from ling_kernels.train.prepare.checks_parallel import mesh_of
from ling_kernels.train.running_merge import RunningMerge
from ling_kernels.train.settings import Settings
from tests.ranks import ranks_of, run
from tests.training import tiniest

WORLD = 4
CONFIG = replace(tiniest(), num_nextn_predict_layers=1, num_attention_heads=4, num_key_value_heads=2)
RUNS = [
    dict(dp=4, ep=2, vocab_parallel=4, optimizer="muon"),
    dict(dp=1, cp=2, ep=2, vocab_parallel=2, pp=2, pipeline="Et|t|m|LL", optimizer="adamw8bit", master="bf16",
         precision="bf16"),
    dict(tp=2, ep=4, vocab_parallel=4),
    dict(dp=2, tp=2, ep=2, optimizer="muon"),
    dict(dp=4, dp_replicate=2, ep=2, optimizer="adamw8bit"),
    dict(dp=2, dp_replicate=2, pp=2, pipeline="Et|t|m|LL"),
    dict(dp=2, tp=2, ep=2, vocab_parallel=2, optimizer="muon", steps=3, merge_last=2, merge_every=1),
]  # fmt: skip


def test_processes_hold_what_is_planned(tmp_path):
    plans = [held_by_processes(CONFIG, settings(given)) for given in RUNS]
    assert all(len({held.optimizer for held in plan}) > 1 for plan in plans)
    run(tmp_path, [partial(holds, settings(given), plan) for given, plan in zip(RUNS, plans, strict=True)], WORLD)


def settings(given: dict) -> Settings:
    return Settings(batch=8, micro_batch=1, seq_len=32, lr=1e-3, **given)


def holds(s: Settings, plan: list[Held], rank, group):
    """After gradients of a backward in which every rank has used all that it holds, their sums and the optimizer."""
    ranks, model = ranks_of(group).arranged(**mesh_of(s)), Ling(CONFIG)
    model.init_weights()
    to_masters(model, s.master)
    shares = divide(model, s, ranks, torch.float32, torch.device("cpu"), s.exchange)
    optimizer = make_optimizer(shares.stepped, s.optimizer, s.lr, s.weight_decay)
    parameters = [*model.parameters()]
    for p in parameters:
        p.grad = torch.randn_like(p)
    gradients = sum(p.grad.nbytes for p in parameters)
    shares.sum_gradients_()
    optimizer.step()
    state = sum(t.nbytes for values in optimizer.state.values() for t in values.values())
    state += sum(p.nbytes for p in shares.stepped.wholes.values())
    weights = sum(p.nbytes for p in parameters)
    part = own_part(shares, optimizer_tensors(shares.stepped, optimizer))
    found = Held(sum(p.numel() for p in parameters), weights, gradients, state, plan[rank].written)
    assert found == plan[rank]._replace(stages=""), (rank, s)
    written = part.bytes()
    if s.merge_last:
        merge = RunningMerge(s)
        merge.add(min(merge.plan), own_pieces(shares))
        written += merge.part(shares).bytes()
    steps = 4 * len(shares.divided)  # a scalar of each, which one of those that have parts writes
    assert plan[rank].written - steps <= written <= plan[rank].written, (rank, s)


def test_a_fake_group_has_sizes_alone():
    with fake_processes(12, 7) as everyone:
        ranks = everyone.arranged(ep=2, pp=3)
        assert (ranks.stage, ranks.replica, ranks.experts.part) == (1, 3, 1)
        assert dist.get_process_group_ranks(ranks.experts.twins) == [5, 7]
        dist.all_reduce(torch.ones(3), group=ranks.world)
    assert not dist.is_initialized()


def test_the_command_prints_what_the_docs_show(capsys):
    page = (Path(__file__).parents[1] / "docs" / "scale-out.md").read_text()
    command, shown = re.search(r"\$ python -m ling_kernels.plan (train .*?[^\\])\n(.*?)```", page, re.S).groups()
    assert main(shlex.split(command.replace("\\\n", ""))) == 0
    assert capsys.readouterr().out.startswith(shown)


@pytest.mark.parametrize("flags, message", [
    ("--dp 2 --ep 3", "--ep 3 does not divide the 2 processes of --dp"),
    ("--pp 2 --schedule Late", "--schedule Late: it must be one of"),
    ("--cp 3 --seq-len 64", "--seq-len 64 is not a multiple of 6"),
    ("--pipeline Et|tL", "--pipeline Et|tL needs --pp"),
    ("--exchange fp8", "--exchange fp8 needs --ep"),
    ("--mtp 0 --recompute-mtp", "--recompute-mtp: tiny has no MTP layers"),
])  # fmt: skip
def test_bad_input_is_one_line(flags, message, capsys):
    assert main(["train", "--batch", "8", "--micro-batch", "1", *flags.split()]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {message}") and error.count("\n") == 1
