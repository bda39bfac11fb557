"""Pipelines of two ranks, of which two share the vocabulary or every batch's rows, against one process."""

import copy
from dataclasses import replace
from functools import partial

import torch

from ling_kernels.model import Ling
from ling_kernels.parallel.pipeline import MicroBatch, Pipeline
from ling_kernels.parallel.pipeline_layout import PipelineLayout
from ling_kernels.parallel.shares import Shares
from tests.ranks import ranks_of, run, summed
from tests.training import tiniest

WORLD, SHARE, ROWS, LENGTH, MICRO, Z = 4, 2, 2, 12, 2, 1e-2
CONFIG = replace(tiniest(), num_nextn_predict_layers=0, vocab_size=64)


def test_four_processes_equal_one(tmp_path):
    run(tmp_path, [pipelines_agree], WORLD)


def batches(which: int) -> list[MicroBatch]:
    g = torch.Generator().manual_seed(which)
    ids = [torch.randint(0, CONFIG.vocab_size, (ROWS, LENGTH), generator=g) for _ in range(MICRO)]
    scores = torch.rand(MICRO, ROWS, LENGTH, CONFIG.num_hidden_layers - 1, CONFIG.num_experts, generator=g)
    experts = scores.topk(CONFIG.num_experts_per_tok).indices  # replayed
    ends = torch.tensor([0, 5 + which, 17, ROWS * LENGTH], dtype=torch.int32)
    return [MicroBatch(i, ends, experts=e) for i, e in zip(ids, experts, strict=True)]


def pipelines_agree(rank, group):
    for by_rows in (False, True):
        alone = Ling(CONFIG).train()
        alone.init_weights(torch.Generator().manual_seed(0))
        model = copy.deepcopy(alone)
        every = batches(0) if by_rows else batches(0) + batches(1)
        counts = [len(every) * (ROWS * LENGTH - 3.0)]
        want, sums = torch.zeros(()), []
        for ids, cu_seqlens, _, experts in every:
            options = dict(cu_seqlens=cu_seqlens, logits=False, z_loss=Z, target_counts=counts)
            out = alone(ids, ids, **options, experts=experts)
            out.loss.backward()
            want += out.loss.detach()
            sums.append(out.main_loss.detach() * counts[0])
        ranks = ranks_of(group).arranged(ep=SHARE, vocab=SHARE, cp=SHARE if by_rows else 1, pp=WORLD // SHARE)
        share, layout = ranks.replicas, PipelineLayout.parse("Et|tL")
        make = partial(Pipeline, model, layout, "GPipe", MICRO, (ROWS, LENGTH), group=ranks.stages)
        shares = Shares(model, ranks, make)
        pipeline = shares.pipeline
        mine = 0 if by_rows else rank % SHARE
        found = pipeline.evaluate(batches(mine))
        if rank >= SHARE:
            found = summed(found, share) if by_rows else found.float()
            torch.testing.assert_close(found, torch.stack(sums[mine * MICRO :][:MICRO]), rtol=1e-5, atol=0)
        for router in model.routers():
            router.counts.zero_()
        record = pipeline.step(batches(mine), counts, Z)
        assert (record is not None) == (rank >= SHARE)
        if record is not None:
            torch.testing.assert_close(summed(torch.tensor(record["loss"]), share), want, rtol=1e-5, atol=0)
        shares.sum_gradients_()
        shares.sum_counts_()
        torch.testing.assert_close(
            shares.norm(), torch.nn.utils.clip_grad_norm_(alone.parameters(), 1e9), rtol=1e-5, atol=0
        )
        whole = dict(alone.named_parameters())
        for n, p in model.named_parameters():
            assert shares.owns(n) == (p.grad is not None)
            if p.grad is None:
                continue
            grad = whole[n].grad
            grad = grad.chunk(SHARE)[rank % SHARE] if len(p) < len(grad) else grad
            torch.testing.assert_close(p.grad, grad, rtol=1e-4, atol=1e-7, msg=lambda m, at=(by_rows, n): f"{at}: {m}")
        counted = dict(alone.named_buffers())
        for n, b in model.named_buffers():
            assert not n.endswith("counts") or torch.equal(b, counted[n]), n
