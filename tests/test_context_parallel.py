"""Rows of packed batches divided over two processes against one with all rows: losses, gradients, logits, counts."""

import copy
from dataclasses import replace

import pytest
import torch

from ling_kernels.backend import force
from ling_kernels.errors import InputError
from ling_kernels.model import Ling
from ling_kernels.nn.fp8 import to_fp8
from ling_kernels.ops.attention import attention
from ling_kernels.parallel.context import ChooseRows, SharedAttention, context_parallel_
from ling_kernels.parallel.shares import Shares
from tests.cases import DEVICE, runs
from tests.ranks import group_of_one, ranks_of, run, summed
from tests.training import tiniest

WORLD, B, L = 2, 2, 24
CONFIG = replace(tiniest(), num_nextn_predict_layers=2, vocab_size=64)
# Sequences over one border of the four pieces of 12 rows, over several, of one row, and one that ends at a border.
BOUNDS = [0, 5, 31, 32, 36, 48]


def test_two_processes_equal_one(tmp_path):
    run(
        tmp_path, [rows_are_shared_out, attention_agrees, models_agree, padded_batches_agree, misuse_is_one_line], WORLD
    )


@pytest.mark.skipif(DEVICE == "cuda" or not runs("triton"), reason="for the virtual GPU")
def test_kernels_give_the_references_values(tmp_path):
    """Two pieces on one process: sequences without queries in a piece have keys there all the same."""
    cu, q, k, v, dout = bounds([0, 3, 14, 16, 20]), *(torch.randn(20, h, 16) for h in (2, 1, 1, 2))
    results = []
    with group_of_one(tmp_path) as group, force("triton"):
        for run_ in (lambda *heads: attention(*heads, cu)[0], lambda *heads: SharedAttention.apply(*heads, cu, group)):
            heads = [t.clone().requires_grad_() for t in (q, k, v)]
            out = run_(*heads)
            results.append([out, *torch.autograd.grad(out, heads, dout)])
    for want, got in zip(*results, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


def bounds(ends=BOUNDS):
    return torch.tensor(ends, dtype=torch.int32)


def rows_of(rank):
    return torch.arange(B * L).view(4, -1)[[rank, 3 - rank]].flatten()


def rows_are_shared_out(rank, group):
    model = Ling(CONFIG)
    context_parallel_(model, group)
    assert isinstance(model.choose_rows, ChooseRows)
    model.init_weights(torch.Generator().manual_seed(0))
    out = model(torch.arange(B * L).view(B, L), logits=False, output_hidden_states=True)
    for h in out.hidden_states:
        assert torch.equal(h.flatten(0, 1).abs().sum(1).nonzero()[:, 0], rows_of(rank))


def attention_agrees(rank, group):
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.bfloat16, 2e-2), (torch.float64, 1e-12)):
        for ends in (BOUNDS, [0, B * L], [0, 0, 24, 24, 48, 48]):
            torch.manual_seed(0)
            q, k, v, dout = (torch.randn(B * L, h, 16).to(dtype) for h in (4, 2, 2, 4))
            whole = [t.clone().requires_grad_() for t in (q, k, v)]
            want = attention(*whole, bounds(ends))[0]
            want.backward(dout)
            mine = rows_of(rank)
            own = [t[mine].clone().requires_grad_() for t in (q, k, v)]
            got = SharedAttention.apply(*own, bounds(ends), group)
            got.backward(dout[mine])
            for a, b in zip([got, *(t.grad for t in own)], [want, *(t.grad for t in whole)], strict=True):
                assert a.dtype == dtype
                torch.testing.assert_close(a, b[mine], rtol=tolerance, atol=tolerance)


def models_agree(rank, group):
    """MTP over borders, ignored labels, z-loss, recomputation; with experts and vocabulary divided too; in FP8."""
    for divide, fp8, ends in ((False, False, BOUNDS), (True, False, BOUNDS), (False, True, None)):
        config = CONFIG
        if fp8:
            config = replace(CONFIG, hidden_size=128, num_attention_heads=4, head_dim=32, num_key_value_heads=2,
                             intermediate_size=128, moe_intermediate_size=128, num_nextn_predict_layers=1)  # fmt: skip
        alone = Ling(config).train()
        alone.init_weights(torch.Generator().manual_seed(0))
        model = copy.deepcopy(alone)
        number = WORLD if divide else 1
        shares = Shares(model, ranks_of(group).arranged(cp=WORLD, ep=number, vocab=number))
        if divide:
            model.recompute_()
        if fp8:
            to_fp8(alone, wgrad="bf16"), to_fp8(model, wgrad="bf16")
        ids = torch.randint(0, 64, (B, L), generator=torch.Generator().manual_seed(3))
        labels = ids.masked_fill(torch.rand(B, L, generator=torch.Generator().manual_seed(4)) < 0.3, -100)
        options = dict(cu_seqlens=ends and bounds(ends), z_loss=1e-2)
        outs = [m(ids, labels, logits=False, **options) for m in (alone, model)]
        for out in outs:
            out.loss.backward()
        for name in ("loss", "main_loss", "mtp_loss", "z_loss"):
            want, share = (getattr(out, name) for out in outs)
            torch.testing.assert_close(summed(share, group), want, rtol=1e-5, atol=0, msg=lambda m, n=name: f"{n}: {m}")
        shares.sum_gradients_()
        shares.sum_counts_()
        norm = torch.nn.utils.clip_grad_norm_(alone.parameters(), 1e9)
        torch.testing.assert_close(shares.norm(), norm, rtol=1e-4, atol=0)
        for (name, p), q in zip(alone.named_parameters(), model.parameters(), strict=True):
            if q.grad is None:
                assert not shares.owns(name)
                continue
            want = p.grad.chunk(WORLD)[rank] if len(q) < len(p) else p.grad
            atol = (1e-2 if fp8 else 1e-5) * want.abs().max().item()
            torch.testing.assert_close(q.grad, want, rtol=1e-4, atol=atol, msg=lambda m, n=name: f"{n}: {m}")
        for a, b in zip(alone.routers(), model.routers(), strict=True):
            assert torch.equal(a.counts, b.counts)
        if not fp8:
            with torch.no_grad():
                want, part = (m.eval()(ids, cu_seqlens=bounds()).logits for m in (alone, model))
            torch.testing.assert_close(summed(part, group), want, rtol=1e-4, atol=1e-5)


def padded_batches_agree(rank, group):
    """Rows are those without padding, on either side of a sequence."""
    alone = Ling(CONFIG).train()
    alone.init_weights(torch.Generator().manual_seed(0))
    model = copy.deepcopy(alone)
    shares = Shares(model, ranks_of(group).arranged(cp=WORLD))
    ids = torch.randint(0, 64, (B, L), generator=torch.Generator().manual_seed(3))
    mask = torch.ones_like(ids)
    mask[0, :3], mask[1, -5:] = 0, 0
    want, got = (m(ids, ids, mask) for m in (alone, model))
    torch.testing.assert_close(summed(got.loss, group), want.loss.detach(), rtol=1e-5, atol=0)
    torch.testing.assert_close(summed(got.logits, group), want.logits.detach(), rtol=1e-4, atol=1e-5)
    got.loss.backward(), want.loss.backward()
    shares.sum_gradients_()
    for (name, p), q in zip(alone.named_parameters(), model.parameters(), strict=True):
        assert shares.owns(name) == (q.grad is not None)
        if shares.owns(name):
            torch.testing.assert_close(q.grad, p.grad, rtol=1e-4, atol=1e-6)


def misuse_is_one_line(rank, group):
    model = Ling(CONFIG).eval()
    context_parallel_(model, group)
    with pytest.raises(InputError, match="2 ranks cannot share 26 rows of a batch equally: it takes a multiple of 4"):
        model(torch.zeros(2, 13, dtype=torch.int64))
    with pytest.raises(InputError, match="does not decode"):
        model.generate(torch.zeros(1, 4, dtype=torch.int64), max_new_tokens=2)
