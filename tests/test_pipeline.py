"""Pipelines of unequal stages on two processes against one: losses, gradients, norms, the counts of experts."""

import copy
from dataclasses import replace
from functools import partial

import pytest
import torch
import torch.distributed as dist

from ling_kernels.errors import InputError
from ling_kernels.model import Ling
from ling_kernels.nn.fp8 import to_fp8
from ling_kernels.parallel.pipeline import MicroBatch, Pipeline
from ling_kernels.parallel.pipeline_layout import PipelineLayout
from ling_kernels.parallel.schedules import Action, schedule_order, step_text
from ling_kernels.parallel.shares import Shares
from ling_kernels.plan.simulate import Times, simulate
from tests.ranks import ranks_of, run
from tests.test_pipeline_sums import recorded
from tests.training import tiniest

WORLD, ROWS, LENGTH, MICRO = 2, 2, 24, 4
CONFIG = replace(tiniest(), num_hidden_layers=4, num_nextn_predict_layers=1, vocab_size=64)
Z = 1e-2


def own_order():
    """Five stages on two ranks, three of them on rank 0; weights' gradients at the end."""
    place = [0, 1, 0, 1, 0]
    rows = [[], []]
    for kind, stages in (("F", range(5)), ("I", range(4, -1, -1)), ("W", range(5))):
        for i in range(MICRO):
            for s in stages:
                rows[place[s]].append((Action(kind, s, i),))
    return rows


LAYOUTS = {  # schedule, layout, MTP layers
    "uneven, with an empty stage": ("Interleaved1F1B", "Et|ttt||mL", 1),
    "MTP and each loss apart": ("Interleaved1F1B", "Ettt|t|m|LL", 1),
    "losses on two ranks": ("LoopedBFS", "E|tttt|mL|L", 1),
    "two MTP layers": ("Interleaved1F1B", "Ett|ttm|m|L", 2),
    "no MTP": ("1F1B", "Et|tttL", 0),
    "one stage each": ("GPipe", "Ett|ttmL", 1),
    "zero bubble": ("InterleavedZeroBubble", "Et||tttm|L", 1),
    "zero bubble in a V": ("ZBVZeroBubble", "Et|tt|tmL|L", 1),
    "a rank with MTP alone": ("ZBVZeroBubble", "Etttt|m||L", 1),
    "forward and backward at once": ("DualPipeV", "Et|t|tt|mL", 1),
    "an order of one's own": (own_order(), "E|tt|tt|m|L", 1),
}


def pipelines_agree(rank, group):
    for name in LAYOUTS:
        a_pipeline_equals_one_process(name, rank)


def test_two_processes_equal_one(tmp_path):
    run(tmp_path, [pipelines_agree], WORLD)


def batches(mtp: int) -> list[MicroBatch]:
    """One of them with a choice of experts that is replayed, where there are MTP layers also for these."""
    g = torch.Generator().manual_seed(3)
    found = []
    for i in range(MICRO):
        ids = torch.randint(0, CONFIG.vocab_size, (ROWS, LENGTH), generator=g)
        labels = ids.clone()
        labels[0, : 3 * i] = -100
        if i == 2:
            labels[:] = -100  # a micro batch without targets, whose routers have a loss all the same
        ends = [0, 5 + i, LENGTH, LENGTH + 11 + i, 2 * LENGTH]
        scores = torch.rand(ROWS, LENGTH, CONFIG.num_hidden_layers - 1 + mtp, CONFIG.num_experts, generator=g)
        experts = scores.topk(CONFIG.num_experts_per_tok).indices.to(torch.uint8) if i == 1 else None
        found.append(MicroBatch(ids, torch.tensor(ends, dtype=torch.int32), labels, experts))
    return found


def a_pipeline_equals_one_process(name, rank):
    schedule, layout, mtp = LAYOUTS[name]
    alone = Ling(replace(CONFIG, num_nextn_predict_layers=mtp)).train()
    alone.init_weights(torch.Generator().manual_seed(0))
    model = copy.deepcopy(alone)
    counts = [150.0, 140.0, 130.0][: 1 + mtp]
    totals = torch.zeros(4)
    for ids, cu_seqlens, labels, experts in batches(mtp):
        options = dict(cu_seqlens=cu_seqlens, logits=False, z_loss=Z, target_counts=counts)
        out = alone(ids, labels, **options, experts=experts)
        out.loss.backward()
        zero = torch.zeros(())
        totals += torch.stack([out.loss, out.main_loss, out.mtp_loss if mtp else zero, out.z_loss]).detach()
    make = partial(Pipeline, model, PipelineLayout.parse(layout), schedule, MICRO, (ROWS, LENGTH))
    shares = Shares(model, ranks_of(dist.group.WORLD).arranged(pp=WORLD), make)
    pipeline = shares.pipeline
    ran: list[Action] = []
    with pytest.MonkeyPatch.context() as patch:
        recorded(patch, ran)
        record = pipeline.step(batches(mtp), counts, Z)
    order = schedule if isinstance(schedule, list) else schedule_order(schedule, WORLD, len(pipeline.ranks), MICRO)
    steps = [event.step for event in simulate(order, [Times(1, 1, 1)] * len(pipeline.ranks)).events[rank]]
    # What ran is what is simulated; a forward and a backward at once end in any order.
    assert ran == [a for step in steps for a in sorted(step, key=ran.index)], name
    run = [str(a) for a in pipeline.schedule.pipeline_order_with_comms[rank] if a.is_compute_op]
    assert run == [step_text(step) for step in steps]
    if record is not None:
        assert rank == pipeline.ranks[-1]
        torch.testing.assert_close(torch.tensor([*record.values()]), totals, rtol=1e-5, atol=1e-6)
    want = dict(alone.named_parameters())
    names = [n for n, _ in model.named_parameters()]
    seen = [None] * WORLD
    dist.all_gather_object(seen, names)
    assert {*seen[0], *seen[1]} == {*want} and len(names) < len(want), name
    for n, p in model.named_parameters():
        torch.testing.assert_close(p.grad, want[n].grad, rtol=1e-4, atol=1e-7, msg=lambda m, n=n: f"{name}, {n}: {m}")
    norm = torch.nn.utils.clip_grad_norm_(alone.parameters(), 1e9)
    torch.testing.assert_close(shares.norm(), norm, rtol=1e-5, atol=0)
    counted = {n: b for n, b in alone.named_buffers() if n.endswith("counts")}
    for n, b in model.named_buffers():
        if n.endswith("counts"):
            assert torch.equal(b, counted[n]) and b.sum() > 0, (name, n)


def low_precision_agrees(rank, group):
    """The same in bf16 and FP8, whose layers are made after the stages, as in the trainer. Products have the same bits,
    and sums of gradients are in fp32: their order alone differs. A pipeline without autocast was 5e-3 off or more."""
    sizes = dict(hidden_size=128, intermediate_size=128, moe_intermediate_size=128, head_dim=64)
    for name in ("zero bubble in a V", "forward and backward at once"):
        schedule, layout, _ = LAYOUTS[name]
        for fp8 in (False, True):
            alone = Ling(replace(CONFIG, num_nextn_predict_layers=1, **sizes)).train()
            alone.init_weights(torch.Generator().manual_seed(0))
            model = copy.deepcopy(alone)
            counts, device = [150.0, 140.0], torch.device("cpu")
            make = partial(Pipeline, model, PipelineLayout.parse(layout), schedule, MICRO, (ROWS, LENGTH),
                           precision=torch.bfloat16, device=device)  # fmt: skip
            shares = Shares(model, ranks_of(group).arranged(pp=WORLD), make)
            if fp8:
                assert to_fp8(alone)[0] and to_fp8(model)[0]
            total = torch.zeros(())
            for ids, cu_seqlens, labels, experts in batches(1):
                options = dict(cu_seqlens=cu_seqlens, logits=False, z_loss=Z, target_counts=counts)
                with torch.autocast("cpu", torch.bfloat16):
                    loss = alone(ids, labels, **options, experts=experts).loss
                loss.backward()
                total += loss.detach()
            record = shares.pipeline.step(batches(1), counts, Z)
            if record is not None:
                torch.testing.assert_close(torch.tensor(record["loss"]), total, rtol=1e-6, atol=0)
            want = dict(alone.named_parameters())
            for n, p in model.named_parameters():
                error, size = (p.grad - want[n].grad).norm(), want[n].grad.norm()
                assert error <= 1e-6 * size and size > 0, (name, fp8, n, error, size)


def test_bf16_and_fp8(tmp_path):
    run(tmp_path, [low_precision_agrees], WORLD)


def test_layouts_are_megatrons():
    layout = PipelineLayout.parse("Et*3|(tt|)*8,m|L")
    assert layout.stages == ("Ettt", *["tt"] * 8, "m", "L")
    assert PipelineLayout.parse("E|(t|)*3,m|m||L").stages == ("E", "t", "t", "t", "m", "m", "", "L")
    assert str(PipelineLayout.parse("Ett|tmL")) == "Ett|tmL"
    layout.check(replace(CONFIG, num_hidden_layers=19))
    assert layout.units(1) == [("t", 3), ("t", 4)] and layout.hidden_states(9) == 2
    split = PipelineLayout.parse("Et|m|L|L")
    assert [split.hidden_states(s) for s in range(3)] == [1, 2, 1]
    assert split.ranks(2) == [0, 1, 0, 1]
    assert split.holders("L", [0, 1, 0, 1]) == [0, 1] and split.holders("Em", [0, 1, 0, 1]) == [0, 1]


@pytest.mark.parametrize("text, message", [
    ("Et|x", "'x' is none of"), ("Et*|L", r"'\*' is none of"), ("(t)*99999|(t)*99999", "more than 100000 units"),
    ("Ettt|mL", "3 t, but the model has 4 layers"), ("EttttL", "0 m, but the model has 1 MTP layers"),
    ("tttt|mL", "0 E, but"), ("Etttt|mLLL", "3 L; there is 1 or 2"), ("Ettmtt|L", "the order is E"),
    ("Etttt|mL|", "the last one L"), ("", "0 E, but"),
])  # fmt: skip
def test_wrong_layouts_are_one_line(text, message):
    with pytest.raises(InputError, match=message):
        PipelineLayout.parse(text).check(CONFIG)


def test_layouts_that_do_not_fit_the_ranks():
    with pytest.raises(InputError, match="3 stages on 2 ranks"):
        PipelineLayout.parse("Et|t|tL").ranks(2)
