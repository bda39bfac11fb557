"""Expert parallelism on two processes against one with all experts: rows, gradients, norms, clipped steps, balance."""

import copy
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist

from ling_kernels.errors import InputError
from ling_kernels.model import Ling
from ling_kernels.nn import MLP, Experts, Local, MoE, Router
from ling_kernels.nn.fp8 import to_fp8
from ling_kernels.parallel.exchange import (
    expert_parameters,
    shard_experts_,
)
from ling_kernels.parallel.shares import Shares
from tests.ranks import ranks_of, run
from tests.training import tiniest

WORLD, T, E, H, F, TOPK = 2, 24, 8, 128, 128, 3
CLIP = 0.05


def test_two_processes_equal_one(tmp_path):
    checks = [layers_agree, fp8_rows_keep_the_bits, a_model_trains_as_on_one_process, experts_that_do_not_divide]
    run(tmp_path, checks, WORLD)


def layer(fold: bool, fp8: bool, dtype: torch.dtype, **options) -> MoE:
    torch.manual_seed(0)
    moe = MoE(Router(H, E, num_groups=4, group_topk=2, topk=TOPK), Experts(E, H, F, fold), MLP(H, F)).to(dtype)
    if fp8:
        to_fp8(moe, **options)
    return moe


def choices(kind: str, rank: int) -> torch.Tensor | None:
    """Experts of this rank's tokens, None for the router's own: all on one rank; none here; choices left out."""
    torch.manual_seed(7 + rank)
    experts = torch.rand(T, E).argsort(1)[:, :TOPK].int()
    if kind == "one rank":
        return torch.rand(T, E // WORLD).argsort(1)[:, :TOPK].int()
    if kind == "no tokens":
        return torch.full_like(experts, -1) if rank else experts
    if kind == "some left out":
        experts[::3] = -1
        return experts
    return None


def results_of(moe: MoE, x: torch.Tensor, dy: torch.Tensor, experts: torch.Tensor | None) -> list[torch.Tensor]:
    """The layer's output, and the gradients of its input and router."""
    x = x.clone().requires_grad_()
    y, z = moe(x, 0.1, experts)
    ((y.float() * dy.float()).sum() + z).backward()
    return [y, x.grad, moe.router.weight.grad]


def layers_agree(rank, group):
    for fold, fp8 in ((False, False), (True, False), (True, True)):
        for kind in ("own", "one rank", "no tokens", "some left out"):
            moe = layer(fold, fp8, torch.bfloat16)
            shared = copy.deepcopy(moe)
            shard_experts_(shared, group)
            assert isinstance(moe.exchange, Local) and len(shared.experts.gate_up) == E // WORLD
            torch.manual_seed(100 + rank)
            x, dy = torch.randn(2, T, H).bfloat16()
            experts = choices(kind, rank)
            results = [results_of(m, x, dy, experts) for m in (moe, shared)]
            for (i, want), got in zip(enumerate(results[0]), results[1], strict=True):
                assert torch.equal(want, got), (fold, fp8, kind, i)
            for name in ("gate_up", "down"):  # one process that had both ranks' tokens: the sum of its two gradients
                total = getattr(moe.experts, name).grad.float()
                dist.all_reduce(total, group=group)
                mine = total.chunk(WORLD)[rank]
                got = getattr(shared.experts, name).grad.float()
                torch.testing.assert_close(got, mine, rtol=0.02, atol=0.01 * total.abs().max().item())


def fp8_rows_keep_the_bits(rank, group):
    """Rows that travel in FP8 are quantised once: where scales are powers of two, their experts find the same numbers.
    A row and the scales of its 128-element blocks take H + H / 32 bytes, instead of 2 H."""
    for kind in ("own", "one rank", "no tokens", "some left out"):
        moe = layer(True, True, torch.bfloat16, pow2=True, wgrad="bf16")
        shared = copy.deepcopy(moe)
        shard_experts_(shared, group, "fp8")
        torch.manual_seed(100 + rank)
        x, dy = torch.randn(2, T, H).bfloat16()
        x *= torch.logspace(-3, 3, T)[:, None]  # scales of many sizes
        experts = choices(kind, rank)
        with recorded_bytes() as sent:
            results = [results_of(m, x, dy, experts) for m in (moe, shared)]
        for (i, want), got in zip(enumerate(results[0]), results[1], strict=True):
            assert torch.equal(want, got), (kind, i)
        rows = int((experts >= 0).sum()) if experts is not None else T * TOPK
        counts, codes, scales, weights, results_back, *gradients = sent
        assert (codes, scales, weights) == (rows * H, rows * H // 32, rows * 4)
        for name in ("gate_up", "down"):
            total = getattr(moe.experts, name).grad.float()
            dist.all_reduce(total, group=group)
            mine = total.chunk(WORLD)[rank]
            got = getattr(shared.experts, name).grad.float()
            assert (got - mine).norm() <= 0.03 * mine.norm(), name  # of rows rounded to 4 significant bits
    moe = layer(True, True, torch.bfloat16)
    shard_experts_(moe, group, "fp8")
    with pytest.raises(InputError, match="FP8 experts with scales that are powers of two"):
        moe(x)
    with pytest.raises(InputError, match="exchange 'int8': it must be one of bf16, fp8"):
        shard_experts_(moe, group, "int8")


@contextmanager
def recorded_bytes(module=dist, name: str = "all_to_all_single"):
    """The bytes of what this process gives to each all-to-all, or to each call of another collective."""
    sent, collective = [], getattr(module, name)

    def record(out, rows, *sizes, group=None):
        sent.append(rows.numel() * rows.element_size())
        return collective(out, rows, *sizes, group=group)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, name, record)
        yield sent


def a_model_trains_as_on_one_process(rank, group):
    """Three clipped steps. The other process's experts get gradients many times larger, so that a norm without them,
    or one that counts dense gradients twice, clips otherwise."""
    alone = Ling(replace(tiniest(), num_nextn_predict_layers=1))
    alone.init_weights(torch.Generator().manual_seed(0))
    with torch.no_grad():
        for p in expert_parameters(alone):
            p[E // WORLD :] *= 8
    shared = copy.deepcopy(alone.train())
    shares = Shares(shared, ranks_of(group).arranged(ep=WORLD))
    optimizers = [torch.optim.AdamW(m.parameters(), 1e-2) for m in (alone, shared)]
    g = torch.Generator().manual_seed(5)
    for _ in range(3):
        ids = torch.randint(0, alone.config.vocab_size, (WORLD, 40), generator=g)
        for optimizer in optimizers:
            optimizer.zero_grad()
        sum(alone(row, labels=row).loss / WORLD for row in ids.split(1)).backward()
        want = torch.nn.utils.clip_grad_norm_(alone.parameters(), CLIP)
        loss = shared(ids[rank : rank + 1], labels=ids[rank : rank + 1]).loss / WORLD
        with shares.sums_in_backward():
            loss.backward()
            assert len(shares.begun) > len(shares.to_sum()) // 2  # the rest follows where this ends
        shares.sum_gradients_()
        norm = shares.norm()
        torch.testing.assert_close(norm, want, rtol=1e-5, atol=0)
        assert norm > 2 * CLIP
        for p in shared.parameters():
            if p.grad is not None:
                p.grad *= CLIP / norm
        for optimizer in optimizers:
            optimizer.step()
        shares.spread_weights_()
        shares.sum_counts_()
        for model in (alone, shared):
            model.balance_(0.01)
    experts = {id(p) for p in expert_parameters(shared)}
    for (name, p), q in zip(alone.named_parameters(), shared.parameters(), strict=True):
        mine = p.chunk(WORLD)[rank] if id(q) in experts else p
        torch.testing.assert_close(q, mine, rtol=1e-4, atol=2e-5, msg=lambda m, name=name: f"{name}: {m}")
        if id(q) not in experts:
            first = q.detach().clone()
            dist.broadcast(first, 0, group=group)
            assert torch.equal(first, q), name
    for a, b in zip(alone.routers(), shared.routers(), strict=True):
        assert torch.equal(a.expert_bias, b.expert_bias) and a.expert_bias.abs().sum() > 0


def experts_that_do_not_divide(rank, group):
    moe = MoE(Router(H, 9, num_groups=3, group_topk=1, topk=2), Experts(9, H, F), None)
    with pytest.raises(InputError, match="has 9 experts, which 2 ranks cannot share equally"):
        shard_experts_(moe, group)
