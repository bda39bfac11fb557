"""Embedding and head divided by vocabulary over two processes, against one with all rows: losses, gradients, steps."""

import copy
import sys
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from torch import nn

from ling_kernels.backend import force
from ling_kernels.errors import InputError
from ling_kernels.model import Ling
from ling_kernels.ops.linear_cross_entropy import linear_cross_entropy
from ling_kernels.parallel.shares import Shares
from ling_kernels.parallel.vocabulary import VocabularyEmbedding, shard_vocabulary_, vocabulary_cross_entropy
from tests.cases import DEVICE, runs
from tests.ranks import group_of_one, ranks_of, run, summed
from tests.training import tiniest

WORLD, V, H = 2, 96, 24
CONFIG = replace(tiniest(), num_nextn_predict_layers=1, vocab_size=V)


def test_two_processes_equal_one(tmp_path):
    checks = [losses_agree, rows_that_do_not_count, embeddings_agree, logits_agree, a_model_trains_as_on_one_process,
              misuse_is_one_line]  # fmt: skip
    run(tmp_path, checks, WORLD)


@pytest.mark.skipif(DEVICE == "cuda" or not runs("triton"), reason="for the virtual GPU")
@pytest.mark.parametrize("narrow", [False, True])
def test_kernels_give_the_references_values(tmp_path, monkeypatch, narrow):
    """narrow: the products of bf16 of a GPU, for which torch.mm lacks out_dtype on a CPU."""
    x, w, targets = inputs(0, 11, torch.bfloat16 if narrow else torch.float32)
    if narrow:
        mm, file = torch.mm, sys.modules[linear_cross_entropy.__module__]
        monkeypatch.setattr(file, "mm_gives_fp32", lambda x: True)
        monkeypatch.setattr(torch, "mm", lambda a, b, out_dtype: mm(a.float(), b.float()))
    with group_of_one(tmp_path) as group, force("triton"):
        want, got = (
            linear_cross_entropy(x, w, targets, reduction="sum"),
            vocabulary_cross_entropy(x, w, targets, group, chunk=4),
        )
        torch.testing.assert_close(got, want, rtol=1e-5, atol=0)
        grads = [torch.autograd.grad(loss, (x, w)) for loss in (want, got)]
        for a, b in zip(*grads, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-2 if narrow else 1e-5, atol=1e-2 if narrow else 1e-6)


def inputs(rank, T, dtype, requires_grad=True):
    g = torch.Generator().manual_seed(0)
    w = (torch.randn(V, H, generator=g) / 3).to(dtype)
    g = torch.Generator().manual_seed(7 + rank)
    x = torch.randn(T, H, generator=g).to(dtype)
    targets = torch.randint(0, V, (T,), generator=g)
    targets[::5] = -100
    return x.requires_grad_(requires_grad), w.requires_grad_(requires_grad), targets


def losses_agree(rank, group):
    """Ranks have different numbers of rows, and chunks end in the middle of them. fp32 within its rounding; bf16 within
    one rounding of the results, since sums are fp32 in both."""
    for dtype, rtol in ((torch.float32, 2e-5), (torch.bfloat16, 1e-2), (torch.float64, 1e-12)):
        x, w, targets = inputs(rank, 37 - 20 * rank, dtype)
        alone = linear_cross_entropy(x, w, targets, reduction="sum")
        (alone * 0.3).backward()
        part = w.detach().chunk(WORLD)[rank].clone().requires_grad_()
        other = x.detach().clone().requires_grad_()
        loss = vocabulary_cross_entropy(other, part, targets, group, chunk=24)
        (loss * 0.3).backward()
        assert loss.dtype == alone.dtype and other.grad.dtype == part.grad.dtype == dtype
        torch.testing.assert_close(loss, alone, rtol=min(rtol, 2e-5), atol=0)
        atol = rtol * x.grad.abs().max().item()
        torch.testing.assert_close(other.grad, x.grad, rtol=rtol, atol=atol)
        total = w.grad.double()
        dist.all_reduce(total, group=group)
        total = total.chunk(WORLD)[rank].to(dtype)
        torch.testing.assert_close(part.grad, total, rtol=rtol, atol=rtol * total.abs().max().item())


def rows_that_do_not_count(rank, group):
    """Ignored rows may hold NaN, and a rank may have ignored rows alone, or none."""
    for T in (0, 6):
        x, w, targets = inputs(rank, T if rank else 9, torch.float32)
        if rank:
            targets[:] = -100
        with torch.no_grad():
            x[targets == -100] = torch.nan
        part = w.detach().chunk(WORLD)[rank].clone().requires_grad_()
        loss = vocabulary_cross_entropy(x, part, targets, group)
        loss.backward()
        assert x.grad.isfinite().all() and (x.grad[targets == -100] == 0).all() and part.grad.isfinite().all()
        assert (loss == 0) == bool(rank) and part.grad.abs().sum() > 0


def embeddings_agree(rank, group):
    whole = nn.Embedding(V, H)
    with torch.no_grad():
        whole.weight.copy_(inputs(0, 0, torch.float32)[1])
    divided = VocabularyEmbedding(whole.weight, group)
    g = torch.Generator().manual_seed(rank)
    ids = torch.randint(0, V, (2, 9 - 4 * rank), generator=g), torch.full((5,), 3)
    for i in ids:
        want, got = whole(i), divided(i)
        assert torch.equal(want, got)
        dy = torch.randn(want.shape, generator=g)
        for y in (want, got):
            (y * dy).sum().backward()
    torch.testing.assert_close(divided.weight.grad, summed(whole.weight.grad, group).chunk(WORLD)[rank])


def logits_agree(rank, group):
    alone = Ling(CONFIG).eval()
    alone.init_weights(torch.Generator().manual_seed(0))
    model = copy.deepcopy(alone)
    shard_vocabulary_(model, group)
    ids = torch.arange(14 - 3 * rank)[None] + rank
    want, got = (m(ids).logits for m in (alone, model))
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)


def a_model_trains_as_on_one_process(rank, group):
    """Three clipped steps, with divided experts, MTP, z-loss, several documents, and labels that are ignored."""
    alone = Ling(CONFIG).train()
    alone.init_weights(torch.Generator().manual_seed(0))
    shared = copy.deepcopy(alone)
    shares = Shares(shared, ranks_of(group).arranged(ep=WORLD, vocab=WORLD))
    optimizers = [torch.optim.AdamW(m.parameters(), 1e-2) for m in (alone, shared)]
    g = torch.Generator().manual_seed(5)
    for _ in range(3):
        ids = torch.randint(0, V, (WORLD, 40), generator=g)
        labels = ids.clone()
        labels[0, :11] = -100
        cu_seqlens = [torch.tensor([0, 13, 40], dtype=torch.int32), torch.tensor([0, 40], dtype=torch.int32)]
        counts = [40 + 40 - 3 - 10, 40 + 40 - 2 * 3 - 9]  # the same on every rank, whatever is a rank's share
        for optimizer in optimizers:
            optimizer.zero_grad()
        losses = []
        for model, rows in ((alone, range(WORLD)), (shared, [rank])):
            sums = torch.zeros(3)
            for r in rows:
                out = model(ids[r : r + 1], labels[r : r + 1], cu_seqlens=cu_seqlens[r], logits=False, z_loss=1e-2,
                            target_counts=counts)  # fmt: skip
                (out.loss - out.z_loss / 2).backward()
                sums += torch.stack([out.main_loss, out.mtp_loss, out.z_loss]).detach()
            losses.append(sums)
        torch.testing.assert_close(summed(losses[1], group), losses[0], rtol=1e-5, atol=0)
        shares.sum_gradients_()
        norm = shares.norm()
        torch.testing.assert_close(norm, torch.nn.utils.clip_grad_norm_(alone.parameters(), 0.05), rtol=1e-5, atol=0)
        for p in shared.parameters():
            if p.grad is not None:
                p.grad *= 0.05 / norm
        for optimizer in optimizers:
            optimizer.step()
        shares.spread_weights_()
    for (name, p), q in zip(alone.named_parameters(), shared.parameters(), strict=True):
        mine = p.chunk(WORLD)[rank] if len(q) < len(p) else p
        divided = name.startswith(("word_embeddings", "lm_head")) or ".experts." in name
        assert divided == (len(q) < len(p)), name
        torch.testing.assert_close(q, mine, rtol=1e-4, atol=2e-5, msg=lambda m, name=name: f"{name}: {m}")


def misuse_is_one_line(rank, group):
    with pytest.raises(InputError, match="a vocabulary of 97 is not a multiple of 2 ranks"):
        shard_vocabulary_(Ling(replace(CONFIG, vocab_size=97)), group)
    x, w, targets = inputs(rank, 5, torch.float32)
    loss = vocabulary_cross_entropy(x, w.detach().chunk(WORLD)[rank].requires_grad_(), targets, group)
    with pytest.raises(InputError, match="multiplies by the same number: "):
        (loss * (1 + rank)).backward()
    with pytest.raises(ValueError, match="targets in 0..95 or -100"):
        vocabulary_cross_entropy(x, w.detach().chunk(WORLD)[rank], targets + V, group)
    embedding = VocabularyEmbedding(nn.Parameter(w.detach()), group)
    for ids in (torch.tensor([V]), torch.tensor([3, -1])):
        with pytest.raises(ValueError, match="ids in 0..95"):
            embedding(ids)
