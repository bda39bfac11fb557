"""Two pipelines of two stages each process: a stage's sums of gradients begin once its last backward has run, while
another stage of the process still has some; the sums have the bits of those after the step, and are one process's."""

import copy
from contextlib import nullcontext
from dataclasses import replace
from functools import partial

import pytest
import torch
import torch.distributed as dist
from torch.distributed.pipelining import PipelineStage

from ling_kernels.model import Ling
from ling_kernels.parallel.pipeline import MicroBatch, Pipeline
from ling_kernels.parallel.pipeline_layout import PipelineLayout
from ling_kernels.parallel.schedules import Action
from ling_kernels.parallel.shares import Shares
from tests.ranks import ranks_of, run
from tests.training import tiniest

WORLD, MICRO, ROWS = 4, 4, (1, 16)
TARGETS = [2.0 * MICRO * 14, 2.0 * MICRO * 12]  # of the main loss and of MTP: documents of 7 and 9 tokens
CONFIG = replace(tiniest(), num_hidden_layers=4, num_nextn_predict_layers=1, vocab_size=64)
JOBS = {  # schedule, layout, how ranks divide the model
    "interleaved": ("Interleaved1F1B", "Et|t|t|tmL", {}),
    "interleaved, with experts": ("Interleaved1F1B", "Et|t|tt|mL", dict(ep=2)),
    "embedding in both stages of a process": ("Interleaved1F1B", "Et|tt|tm|LL", {}),
    "zero bubble": ("InterleavedZeroBubble", "Et|t|t|tmL", dict(ep=2)),
    "zero bubble in a V": ("ZBVZeroBubble", "E|tt|t|tmL", dict(vocab=2)),
    "forward and backward at once": ("DualPipeV", "Et|t|t|tmL", dict(ep=2)),
    "one stage each": ("1F1B", "Ett|ttmL", dict(ep=2)),
}


def batches(which: int, few: bool) -> list[MicroBatch]:
    """Micro batches of one of the pipelines. few: the rank with the second half of the experts gets no row."""
    g = torch.Generator().manual_seed(which)
    ids = [torch.randint(0, CONFIG.vocab_size, ROWS, generator=g) for _ in range(MICRO)]
    number = CONFIG.num_experts // 2 if few else CONFIG.num_experts
    experts = [torch.rand(*ROWS, CONFIG.num_hidden_layers, number, generator=g) for _ in ids]
    ends = torch.tensor([0, 7, 16], dtype=torch.int32)
    topk = CONFIG.num_experts_per_tok
    return [MicroBatch(i, ends, experts=e.topk(topk).indices) for i, e in zip(ids, experts, strict=True)]


def recorded(patch: pytest.MonkeyPatch, events: list) -> None:
    """Append each action when it has run, and each gradient whose sum begins."""

    def record(name: str, kind: str) -> None:
        genuine = getattr(PipelineStage, name)

        def action(stage, m, *args, **options):
            result = genuine(stage, m, *args, **options)
            events.append(Action(kind if options.get("full_backward", True) else "I", stage.stage_index, m))
            return result

        patch.setattr(PipelineStage, name, action)

    record("forward_one_chunk", "F")
    record("backward_one_chunk", "B")
    record("backward_weight_one_chunk", "W")
    reduce = dist.reduce

    def begun(t, *args, **options):
        events.append(t)
        return reduce(t, *args, **options)

    patch.setattr(dist, "reduce", begun)


def gradients(whole: Ling, job: str, group, few: bool, in_backward: bool):
    """Gradients of the weights that this rank owns, the events, and what was divided."""
    schedule, layout, division = JOBS[job]
    model = copy.deepcopy(whole)
    events: list[Action | torch.Tensor] = []
    ranks = ranks_of(group).arranged(dp=2, pp=2, **division)
    make = partial(Pipeline, model, PipelineLayout.parse(layout), schedule, MICRO, ROWS, ranks.stages)
    shares = Shares(model, ranks, make)
    with pytest.MonkeyPatch.context() as patch:
        recorded(patch, events)
        step = partial(shares.pipeline.step, batches(ranks.replica, few), TARGETS, 1e-2)
        with shares.sums_in_backward() if in_backward else nullcontext():
            step()
        names = {id(p.grad): name for name, p in model.named_parameters()}
        shares.sum_gradients_()
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return found, [names.get(id(e), e) if isinstance(e, torch.Tensor) else e for e in events], shares


def one_process(whole: Ling, few: bool) -> dict[str, torch.Tensor]:
    alone = copy.deepcopy(whole)
    for which in range(2):
        for ids, cu_seqlens, _, experts in batches(which, few):
            options = dict(cu_seqlens=cu_seqlens, logits=False, z_loss=1e-2, target_counts=TARGETS)
            alone(ids, ids, **options, experts=experts).loss.backward()
    return {name: p.grad for name, p in alone.named_parameters()}


def sums_agree(job, rank, group):
    whole = Ling(CONFIG).train()
    whole.init_weights(torch.Generator().manual_seed(0))
    for few in (False, True):
        found, events, shares = gradients(whole, job, group, few, in_backward=True)
        after, late, _ = gradients(whole, job, group, few, in_backward=False)
        assert found.keys() == after.keys() and all(torch.equal(found[n], after[n]) for n in found), job
        assert {*found} == {n for n, _ in shares.model.named_parameters() if shares.owns(n)}
        want = one_process(whole, few)
        for n, grad in found.items():
            part = shares.part_of(n).take(want[n])
            torch.testing.assert_close(grad, part, rtol=1e-4, atol=1e-7, msg=lambda m, at=(job, n): f"{at}: {m}")
        in_order(job, events, shares)
        of_actions = [isinstance(e, Action) for e in late]
        assert of_actions == sorted(of_actions, reverse=True)  # without `sums_in_backward` sums come after all actions


def in_order(job, events, shares):
    """Every sum begins after the last action of the stages that add to the gradient, and those of the stage that ends
    first before the last action of another one."""
    stages, shared = shares.pipeline.stages, shares.pipeline.shared
    last = {s: max(i for i, e in enumerate(events) if isinstance(e, Action) and e.stage == s) for s in stages}
    begun = {name: events.index(name) for name in {e for e in events if isinstance(e, str)}}
    expected = {n for n, _ in shares.model.named_parameters() if shares.group[n] is not None}
    assert {*begun} == expected and sum(isinstance(e, str) for e in events) == len(begun)
    for name, i in begun.items():
        users = {s for s, stage in stages.items() if any(name.startswith(f"{m}.") for m in stage.modules_used)}
        ended = max(last.values()) if name in shared else max(last[s] for s in users)
        assert users and i > ended, (job, name)
        assert not any(isinstance(e, Action) for e in events[ended + 1 : i]), (job, name)  # no later than that
    if len(stages) > 1:
        assert any(i < max(last.values()) for i in begun.values()), (job, events)


def test_sums_begin_in_the_backward(tmp_path):
    run(tmp_path, [partial(sums_agree, job) for job in JOBS], WORLD)
