"""Heads, MLPs and rows divided over processes against one process: losses, gradients, clipped steps, logits, counts."""

import copy
from dataclasses import replace

import pytest
import torch

from ling_kernels.errors import InputError
from ling_kernels.model import Ling
from ling_kernels.nn.fp8 import to_fp8
from ling_kernels.parallel.exchange import expert_parameters
from ling_kernels.parallel.shares import Shares
from ling_kernels.parallel.tensor import TensorContextAttention, TensorFp8MLP, TensorMLP, blocks_part, tensor_parallel_
from ling_kernels.train.monitor import to_bf16
from tests.ranks import ranks_of, run, summed
from tests.training import tiniest

B, L, V, CLIP, Z = 2, 12, 64, 0.05, 1e-2
CONFIG = replace(tiniest(), num_nextn_predict_layers=1, vocab_size=V, num_attention_heads=4, num_key_value_heads=2)
FP8 = replace(CONFIG, hidden_size=128, head_dim=128, intermediate_size=256, moe_intermediate_size=256)
BOUNDS = [0, 5, 11, 12, 13, 24]  # documents over the border between two ranks, of one row, and at a border


def test_two_processes_equal_one(tmp_path):
    run(tmp_path, [models_agree, rounded_products_agree, misuse_is_one_line], 2)


def test_four_processes_equal_one(tmp_path):
    run(tmp_path, [with_other_tokens_beside, with_longer_context], 4)


def test_parts():
    """qkv [q0 q1 q2 q3 | k0 k1 | v0 v1] of heads of two rows."""
    part = blocks_part(0, (8, 4, 4), 2, 1)
    assert part.ranges == ((4, 8), (10, 12), (14, 16))
    assert blocks_part(0, (8, 4, 4), 2, 0).take(torch.arange(16)).tolist() == [0, 1, 2, 3, 8, 9, 12, 13]
    assert blocks_part(1, (4,), 4, 3).take(torch.arange(8).view(2, 4)).tolist() == [[3], [7]]


def made(config=CONFIG, dtype=torch.float32) -> tuple[Ling, Ling]:
    """A model and its copy; experts of the second half get gradients many times larger, QK norms differ by row."""
    alone = Ling(config).train().to(dtype)
    alone.init_weights(torch.Generator().manual_seed(0))
    g = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in expert_parameters(alone):
            p[len(p) // 2 :] *= 8
        for p in alone.parameters():
            if p.ndim == 1:
                p += 0.3 * torch.randn(p.shape, generator=g)
    return alone, copy.deepcopy(alone)


def batch(which: int):
    g = torch.Generator().manual_seed(10 + which)
    ids = torch.randint(0, V, (B, L), generator=g)
    return ids, ids.masked_fill(torch.rand(B, L, generator=g) < 0.3, -100)


def bounds():
    return torch.tensor(BOUNDS, dtype=torch.int32)


def replayed(config, ids):
    """A choice of experts for every token and layer, which follows from the ids."""
    g = torch.Generator().manual_seed(int(ids.sum()))
    layers = config.num_hidden_layers - config.first_k_dense_replace
    return torch.rand(*ids.shape, layers, config.num_experts, generator=g).topk(config.num_experts_per_tok).indices


def agree(alone, model, shares, data=1):
    """Three clipped steps of SGD, which sees the scale of gradients: losses, norms, gradients and weights of both.

    data: the batches of a step, of which each of the dp takes one."""
    optimizers = [torch.optim.SGD(m.parameters(), 1.0, 0.9) for m in (alone, model)]
    for step in range(3):
        batches = [batch(10 * step + i) for i in range(data)]
        counts = [sum(len(ids.flatten()) for ids, _ in batches) / 2 + k for k in range(2)]  # divisors, equal everywhere
        losses = []
        for m, mine in ((alone, batches), (model, batches[shares.ranks.sequences :][:1])):
            m.zero_grad()
            losses.append(torch.zeros(()))
            for ids, labels in mine:
                options = dict(cu_seqlens=bounds(), logits=False, z_loss=Z, target_counts=counts)
                out = m(ids, labels, **options, experts=replayed(m.config, ids) if step == 1 else None)
                out.loss.backward()
                losses[-1] += out.loss.detach()
        torch.testing.assert_close(summed(losses[1], shares.ranks.world), losses[0], rtol=1e-5, atol=0)
        shares.sum_gradients_()
        shares.sum_counts_()
        want, norm = torch.nn.utils.clip_grad_norm_(alone.parameters(), CLIP), shares.norm()
        torch.testing.assert_close(norm, want, rtol=1e-5, atol=0)
        assert want > 2 * CLIP
        for (name, p), q in zip(alone.named_parameters(), model.parameters(), strict=True):
            assert shares.owns(name) == (q.grad is not None) and p.grad.abs().max() > 0, name
            if q.grad is not None:
                q.grad *= CLIP / norm
                atol = 1e-5 * p.grad.abs().max().item()
                expected = shares.part_of(name).take(p.grad)
                torch.testing.assert_close(q.grad, expected, rtol=1e-4, atol=atol, msg=lambda m, n=name: f"{n}: {m}")
        for optimizer in optimizers:
            optimizer.step()
        shares.spread_weights_()
        for a, b in zip(alone.routers(), model.routers(), strict=True):
            assert torch.equal(a.counts, b.counts)
        for m in (alone, model):
            m.balance_(0.01)
    for (name, p), q in zip(alone.named_parameters(), model.parameters(), strict=True):
        expected = shares.part_of(name).take(p.detach())
        torch.testing.assert_close(q.detach(), expected, rtol=1e-4, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")


def models_agree(rank, group):
    """Alone; with experts and vocabulary divided over the same ranks, and layers computed again in the backward."""
    for number in (1, 2):
        alone, model = made()
        shares = Shares(model, ranks_of(group).arranged(tp=2, ep=number, vocab=number))
        assert len(shares.cuts) == 3 * 2 * 2  # of two layers and MTP's: attention, and a dense MLP or a shared expert
        if number > 1:
            model.recompute_()
        agree(alone, model, shares)
        with torch.no_grad():
            want, got = (m.eval()(batch(0)[0], cu_seqlens=bounds()).logits for m in (alone, model))
        torch.testing.assert_close(summed(got, group), want, rtol=1e-3, atol=1e-3)


def rounded_products_agree(rank, group):
    """In bf16 by autocast, whole models: each sum over ranks is of summands that are rounded once more. In FP8 dense
    ones, as other roundings choose other experts: weights and rows have the blocks of 128 of one process."""
    for fp8, config in ((False, FP8), (True, replace(FP8, first_k_dense_replace=2, num_nextn_predict_layers=0))):
        alone, model = made(config)
        shares = Shares(model, ranks_of(group).arranged(tp=2))
        if fp8:
            replaced = [to_fp8(m, wgrad="bf16")[0] for m in (alone, model)]
            assert replaced[0] and len(replaced[0]) == len(replaced[1])
            for m in (alone, model):
                to_bf16(m, "layers.0.mlp")
            assert isinstance(model.layers[1].mlp, TensorFp8MLP) and type(model.layers[0].mlp) is TensorMLP
        losses, (ids, labels) = [], batch(0)
        for m in (alone, model):
            with torch.autocast("cpu", torch.bfloat16, enabled=not fp8):
                out = m(ids, labels, cu_seqlens=bounds(), logits=False, z_loss=Z)
            out.loss.backward()
            losses.append(out.loss.detach())
        torch.testing.assert_close(summed(losses[1], group), losses[0], rtol=1e-6 if fp8 else 2e-4, atol=0)
        shares.sum_gradients_()
        for (name, p), q in zip(alone.named_parameters(), model.parameters(), strict=True):
            if shares.owns(name):
                want = shares.part_of(name).take(p.grad)
                error = ((q.grad - want).norm() / want.norm()).item()
                assert error < (1e-5 if fp8 else 0.04), (fp8, name, error)


def with_other_tokens_beside(rank, group):
    """Two pairs of ranks with other tokens each; the four share the experts, each pair the vocabulary."""
    alone, model = made()
    agree(alone, model, Shares(model, ranks_of(group).arranged(dp=2, tp=2, ep=4, vocab=2)), data=2)


def with_longer_context(rank, group):
    """Two pairs of ranks with half of the rows each, in a pair half of the heads and of the experts."""
    alone, model = made()
    shares = Shares(model, ranks_of(group).arranged(cp=2, tp=2, ep=2))
    assert type(model.layers[0].attention) is TensorContextAttention
    agree(alone, model, shares)


def misuse_is_one_line(rank, group):
    model = Ling(CONFIG).eval()
    tensor_parallel_(model, group)
    with pytest.raises(InputError, match="2 ranks cannot share 13 rows of a batch equally"):
        model(torch.zeros(1, 13, dtype=torch.int64))
    with pytest.raises(InputError, match="does not decode"):
        model.generate(torch.zeros(1, 4, dtype=torch.int64), max_new_tokens=2)
    with pytest.raises(InputError, match="layers.0.attention has 1 key heads, which 2 ranks cannot share equally"):
        tensor_parallel_(Ling(replace(CONFIG, num_key_value_heads=1)), group)
    model = Ling(FP8)
    to_fp8(model)
    with pytest.raises(InputError, match="before to_fp8"):
        tensor_parallel_(model, group)
