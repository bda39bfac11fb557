"""Heads, MLPs and rows divided over processes against one process: losses, gradients, clipped steps, logits, counts."""

import copy
from dataclasses import replace

import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh

from ling_kernels.errors import InputError
from ling_kernels.model import Ling
from ling_kernels.nn.fp8 import to_fp8
from ling_kernels.parallel.context import context_parallel_
from ling_kernels.parallel.exchange import expert_parameters, global_norm, shard_experts_, sum_counts_, sum_gradients_
from ling_kernels.parallel.tensor import Cut, TensorContextAttention, TensorFp8MLP, tensor_parallel_
from ling_kernels.parallel.vocabulary import shard_vocabulary_
from tests.ranks import run, summed
from tests.training import tiniest

B, L, V, CLIP, Z = 2, 12, 64, 0.05, 1e-2
CONFIG = replace(tiniest(), num_nextn_predict_layers=1, vocab_size=V, num_attention_heads=4, num_key_value_heads=2)
FP8 = replace(CONFIG, hidden_size=128, head_dim=128, intermediate_size=256, moe_intermediate_size=256)
BOUNDS = [0, 5, 11, 12, 13, 24]  # documents over the border between two ranks, of one row, and at a border


def test_two_processes_equal_one(tmp_path):
    run(tmp_path, [models_agree, rounded_products_agree, misuse_is_one_line], 2)


def test_four_processes_equal_one(tmp_path):
    run(tmp_path, [with_other_tokens_beside, with_longer_context], 4)


def test_cuts():
    """qkv [q0 q1 q2 q3 | k0 k1 | v0 v1] of heads of two rows."""
    cut = Cut(0, (8, 4, 4))
    assert cut.ranges(2, 1) == [(4, 8), (10, 12), (14, 16)]
    assert cut.part(torch.arange(16), 2, 0).tolist() == [0, 1, 2, 3, 8, 9, 12, 13]
    assert Cut(1, (4,)).part(torch.arange(8).view(2, 4), 4, 3).tolist() == [[3], [7]]


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


def part(name: str, whole: torch.Tensor, cuts: dict, mesh: dict) -> torch.Tensor:
    """What a rank holds; mesh: for tp, experts and vocabulary the number of ranks and which this one is."""
    if name in cuts:
        return cuts[name].part(whole, *mesh["tp"])
    kind = "ep" if ".experts." in name else "vocabulary" if name.startswith(("word_emb", "lm_head")) else None
    n, rank = mesh.get(kind, (1, 0))
    return whole.chunk(n)[rank]


def agree(alone, model, cuts, mesh, groups, data, mine):
    """Three clipped steps of SGD, which sees the scale of gradients: losses, norms, gradients and weights of both.

    data: the batches of a step; mine: those of this rank. groups: over which gradients add up, the last has all ranks.
    """
    optimizers = [torch.optim.SGD(m.parameters(), 1.0, 0.9) for m in (alone, model)]
    for step in range(3):
        batches = [batch(10 * step + i) for i in range(data)]
        counts = [sum(len(ids.flatten()) for ids, _ in batches) / 2 + k for k in range(2)]  # divisors, equal everywhere
        losses = []
        for m, which in ((alone, range(data)), (model, mine)):
            m.zero_grad()
            losses.append(torch.zeros(()))
            for i in which:
                ids, labels = batches[i]
                out = m(ids, labels, cu_seqlens=bounds(), logits=False, z_loss=Z, target_counts=counts)
                out.loss.backward()
                losses[-1] += out.loss.detach()
        torch.testing.assert_close(summed(losses[1], groups[-1]), losses[0], rtol=1e-5, atol=0)
        for group in groups[:-1] if len(groups) > 1 else groups:
            sum_gradients_(model, group)
            sum_counts_(model, group)
        want, norm = torch.nn.utils.clip_grad_norm_(alone.parameters(), CLIP), global_norm(model, groups[-1])
        torch.testing.assert_close(norm, want, rtol=1e-5, atol=0)
        assert want > 2 * CLIP
        for (name, p), q in zip(alone.named_parameters(), model.parameters(), strict=True):
            q.grad *= CLIP / norm
            expected = part(name, p.grad, cuts, mesh)
            assert expected.abs().max() > 0, name
            atol = 1e-5 * p.grad.abs().max().item()
            torch.testing.assert_close(q.grad, expected, rtol=1e-4, atol=atol, msg=lambda m, n=name: f"{n}: {m}")
        for optimizer in optimizers:
            optimizer.step()
        for a, b in zip(alone.routers(), model.routers(), strict=True):
            assert torch.equal(a.counts, b.counts)
        for m in (alone, model):
            m.balance_(0.01)
    for (name, p), q in zip(alone.named_parameters(), model.parameters(), strict=True):
        expected = part(name, p.detach(), cuts, mesh)
        torch.testing.assert_close(q.detach(), expected, rtol=1e-4, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")


def models_agree(rank, group):
    """Alone; with experts and vocabulary divided over the same ranks, and layers computed again in the backward."""
    for divide in (False, True):
        alone, model = made()
        cuts = tensor_parallel_(model, group)
        assert len(cuts) == 2 * 3 + 2 * 3  # of two layers and MTP's: attention, and a dense MLP or a shared expert
        mesh = dict(tp=(2, rank))
        if divide:
            shard_experts_(model, group)
            shard_vocabulary_(model, group)
            model.recompute_()
            mesh |= dict(ep=(2, rank), vocabulary=(2, rank))
        agree(alone, model, cuts, mesh, [group], 1, [0])
        with torch.no_grad():
            want, got = (m.eval()(batch(0)[0], cu_seqlens=bounds()).logits for m in (alone, model))
        torch.testing.assert_close(summed(got, group), want, rtol=1e-3, atol=1e-3)


def rounded_products_agree(rank, group):
    """In bf16 by autocast, whole models: each sum over ranks is of summands that are rounded once more. In FP8 dense
    ones, as other roundings choose other experts: weights and rows have the blocks of 128 of one process."""
    for fp8, config in ((False, FP8), (True, replace(FP8, first_k_dense_replace=2, num_nextn_predict_layers=0))):
        alone, model = made(config)
        cuts = tensor_parallel_(model, group)
        if fp8:
            replaced = [to_fp8(m, wgrad="bf16")[0] for m in (alone, model)]
            assert replaced[0] and len(replaced[0]) == len(replaced[1])
            assert isinstance(model.layers[1].mlp, TensorFp8MLP)
        losses, (ids, labels) = [], batch(0)
        for m in (alone, model):
            with torch.autocast("cpu", torch.bfloat16, enabled=not fp8):
                out = m(ids, labels, cu_seqlens=bounds(), logits=False, z_loss=Z)
            out.loss.backward()
            losses.append(out.loss.detach())
        torch.testing.assert_close(summed(losses[1], group), losses[0], rtol=1e-6 if fp8 else 2e-4, atol=0)
        sum_gradients_(model, group)
        for (name, p), q in zip(alone.named_parameters(), model.parameters(), strict=True):
            want = part(name, p.grad, cuts, dict(tp=(2, rank)))
            error = ((q.grad - want).norm() / want.norm()).item()
            assert error < (1e-5 if fp8 else 0.04), (fp8, name, error)


def with_other_tokens_beside(rank, group):
    """Two pairs of ranks with other tokens each; the four share the experts, each pair the vocabulary."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    alone, model = made()
    cuts = tensor_parallel_(model, mesh["tp"].get_group())
    shard_experts_(model, group)
    shard_vocabulary_(model, mesh["tp"].get_group())
    parts = dict(tp=(2, rank % 2), vocabulary=(2, rank % 2), ep=(4, rank))
    groups = [mesh["tp"].get_group(), mesh["dp"].get_group(), group]
    agree(alone, model, cuts, parts, groups, 2, [rank // 2])


def with_longer_context(rank, group):
    """Two pairs of ranks with half of the rows each, in a pair half of the heads and of the experts."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("cp", "tp"))
    alone, model = made()
    context_parallel_(model, mesh["cp"].get_group())
    cuts = tensor_parallel_(model, mesh["tp"].get_group())
    assert type(model.layers[0].attention) is TensorContextAttention
    shard_experts_(model, mesh["tp"].get_group())
    parts = dict(tp=(2, rank % 2), ep=(2, rank % 2))
    groups = [mesh["tp"].get_group(), mesh["cp"].get_group(), group]
    agree(alone, model, cuts, parts, groups, 1, [0])


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
