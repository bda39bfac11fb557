"""A pipeline's forward and backward at once, with experts on two ranks each: the bits of one after the other, and an
order of exchanges in which each is under way while the other one computes."""

import copy
from dataclasses import replace
from functools import partial

import pytest
import torch
import torch.distributed as dist

from ling_kernels.model import Ling
from ling_kernels.parallel import collectives, torch_schedules
from ling_kernels.parallel.pipeline import MicroBatch, Pipeline
from ling_kernels.parallel.pipeline_layout import PipelineLayout
from ling_kernels.parallel.shares import Shares
from ling_kernels.parallel.turns import take_turns, turns
from tests.ranks import ranks_of, run
from tests.training import tiniest

WORLD, MICRO, ROWS = 4, 4, (1, 16)
CONFIG = replace(tiniest(), num_hidden_layers=4, num_nextn_predict_layers=0, vocab_size=64)


def test_four_processes(tmp_path):
    run(tmp_path, [both_orders_agree], WORLD)


def test_errors_end_both():
    seen = []

    def fails():
        seen.append(turns())
        raise ValueError("of the forward")

    with pytest.raises(ValueError, match="of the forward"):
        take_turns(fails, lambda: seen.append("backward"))
    assert seen[1] == "backward" and turns() is None


class Recorded:
    """Starts and ends of exchanges, F in a forward and B in a backward, as in "F( B( )F"."""

    def __init__(self, patch):
        self.events, exchange = [], dist.all_to_all_single

        def start(*args, async_op=False, **options):
            work = exchange(*args, async_op=async_op, **options)
            if not async_op:
                return work
            lane = "B" if torch._C._current_graph_task_id() >= 0 else "F"
            self.events.append(f"{lane}(")
            wait = work.wait

            class Work:
                def wait(_):
                    wait()
                    self.events.append(f"){lane}")

            return Work()

        patch.setattr(collectives.dist, "all_to_all_single", start)

    def overlapped(self) -> tuple[int, int]:
        """Exchanges during which the other one has started its own, and all."""
        starts = [i for i, e in enumerate(self.events) if e.endswith("(")]
        ends = [
            next(j for j in range(i, len(self.events)) if self.events[j] == f"){self.events[i][0]}") for i in starts
        ]
        other = {"F": "B(", "B": "F("}
        return sum(other[self.events[i][0]] in self.events[i:j] for i, j in zip(starts, ends, strict=True)), len(starts)


def both_orders_agree(rank, group):
    whole = Ling(CONFIG).train()
    whole.init_weights(torch.Generator().manual_seed(0))
    ranks = ranks_of(group).arranged(dp=2, ep=2, pp=2)
    results = []
    for at_once in (True, False):
        model = copy.deepcopy(whole)
        model.recompute_()
        make = partial(Pipeline, model, PipelineLayout.parse("Et|t|t|tL"), "DualPipeV", MICRO, ROWS, ranks.stages)
        shares = Shares(model, ranks, make)
        g = torch.Generator().manual_seed(5 + ranks.replica)
        ids = [torch.randint(0, 64, ROWS, generator=g) for _ in range(MICRO)]
        batches = [MicroBatch(i, torch.tensor([0, 7, 16], dtype=torch.int32)) for i in ids]
        with pytest.MonkeyPatch.context() as patch:
            recorded = Recorded(patch)
            if not at_once:
                patch.setattr(torch_schedules, "take_turns", lambda forward, backward: (forward(), backward()))
            record = shares.pipeline.step(batches, [2.0 * MICRO * 14], 1e-2)
        overlapped, number = recorded.overlapped()
        if ranks.stage == 1:  # the first stage's layer is dense: it has no exchange with which another could overlap
            assert (overlapped >= number / 2 > 0) if at_once else (number == 0), recorded.events
        results.append((record, {n: p.grad for n, p in model.named_parameters()}, shares.sum_counts_()))
    assert results[0][0] == results[1][0]
    for name, grad in results[0][1].items():
        assert torch.equal(grad, results[1][1][name]), name
    assert torch.equal(results[0][2], results[1][2])
