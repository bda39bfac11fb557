"""The exchange of fixed sizes against one process with all experts and against the exchange of uneven sizes: rows,
skewed routing, ranks without tokens, bytes; and that nothing in a layer with it is read on the host."""

import copy

import pytest
import torch
import torch.distributed as dist
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from ling_kernels.backend import force
from ling_kernels.errors import InputError
from ling_kernels.model import Ling
from ling_kernels.parallel import collectives
from ling_kernels.parallel.deep_ep import plan_of_slabs
from ling_kernels.parallel.exchange import shard_experts_
from ling_kernels.parallel.fake_group import fake_processes
from ling_kernels.parallel.low_latency import low_latency
from tests.cases import DEVICE, runs
from tests.ranks import group_of_one, run
from tests.test_expert_parallel import TOPK, E, H, layer, recorded_bytes
from tests.training import tiniest

MOST = 9  # tokens of a rank
KINDS = ("own", "one expert", "nothing", "some left out")


@pytest.mark.parametrize("world", [2, 4])
def test_processes_equal_one(world, tmp_path):
    run(tmp_path, [layers_agree, fp8_rows_keep_the_bits, sums_agree, a_model_agrees, wrong_calls], world)


def choices(kind: str, rank: int, tokens: int) -> torch.Tensor | None:
    """Experts of this rank's tokens, None for the router's own."""
    torch.manual_seed(7 + rank)
    experts = torch.rand(tokens, E).argsort(1)[:, :TOPK].int()
    if kind == "one expert":  # of the last rank, the most rows that an expert can have; the others far away
        return torch.tensor([E - 1, 0, 1], dtype=torch.int32).expand(tokens, -1).contiguous()
    if kind == "nothing":
        return torch.full_like(experts, -1)
    if kind == "some left out":
        experts[::3] = -1
        return experts
    return None


def tokens_of(rank: int, world: int, turn: int) -> torch.Tensor:
    """As many as fit on the first rank, none on the last, or the other way round."""
    number = MOST * (world - 1 - rank) // (world - 1)
    torch.manual_seed(100 + rank + 10 * turn)
    return torch.randn(number if turn % 2 == 0 else MOST - number, H).bfloat16()


@torch.no_grad()
def layers_agree(rank, group):
    world = dist.get_world_size(group)
    for fold, fp8 in ((False, False), (True, False), (True, True)):
        moe = layer(fold, fp8, torch.bfloat16)
        uneven, fixed = copy.deepcopy(moe), copy.deepcopy(moe)
        shard_experts_(uneven, group)
        shard_experts_(fixed, group, low_latency(group, MOST))
        rows = [computed_rows(m) for m in (uneven, fixed)]
        for turn, kind in enumerate(KINDS):
            x = tokens_of(rank, world, turn)
            experts = choices(kind, rank, len(x))
            want, z = moe(x, 0.1, experts)
            (got, got_z), (again, again_z) = (m(x, 0.1, experts) for m in (uneven, fixed))
            assert torch.equal(got, again) and torch.equal(z, got_z) and torch.equal(z, again_z), (fold, fp8, kind)
            # A product's bits may depend on how many rows the experts have from all ranks: an ulp of bf16.
            torch.testing.assert_close(got, want, rtol=0.02, atol=0.02)
            assert (want.abs().sum() > 0) == (len(x) > 0)
        assert rows[0] == rows[1] and (len({*rows[0]}) > 1 or rank), rows


def computed_rows(moe) -> list[int]:
    """How many rows this rank's experts compute in each forward."""
    rows = []
    moe.experts.register_forward_pre_hook(lambda module, args: rows.append(int(args[1].offsets[-1])))
    return rows


@torch.no_grad()
def fp8_rows_keep_the_bits(rank, group):
    """A token takes H + H / 32 bytes in FP8, and 8 for each choice; every rank sends the same, whatever it has."""
    world = dist.get_world_size(group)
    moe = layer(True, True, torch.bfloat16, pow2=True)
    shared = copy.deepcopy(moe)
    shard_experts_(shared, group, low_latency(group, MOST, fp8=True))
    for turn, kind in enumerate(KINDS):
        x = tokens_of(rank, world, turn) * torch.logspace(-3, 3, H)
        x = x.bfloat16()
        experts = choices(kind, rank, len(x))
        with recorded_bytes() as sent, recorded_bytes(collectives, "all_gather") as gathered:
            got = shared(x, None, experts)[0]
        assert torch.equal(moe(x, None, experts)[0], got), kind
        assert gathered == [MOST * (H + H // 32 + 8 * TOPK)] and sent == [world * MOST * TOPK * 2 * H]
    moe = layer(True, True, torch.bfloat16)
    shard_experts_(moe, group, low_latency(group, MOST, fp8=True))
    with pytest.raises(InputError, match="FP8 experts with scales that are powers of two"):
        moe(x)


@torch.no_grad()
def sums_agree(rank, group):
    """A row for each token comes back, rounded to bf16 before the sum over the ranks."""
    world = dist.get_world_size(group)
    for fold, fp8 in ((False, False), (True, True)):
        moe = layer(fold, fp8, torch.bfloat16)
        shared = copy.deepcopy(moe)
        shard_experts_(shared, group, low_latency(group, MOST, sums=True))
        for turn, kind in enumerate(KINDS):
            x = tokens_of(rank, world, turn)
            experts = choices(kind, rank, len(x))
            with recorded_bytes() as sent:
                got = shared(x, None, experts)[0]
            assert sent == [world * MOST * 2 * H]
            want = moe(x, None, experts)[0]
            error = (got.float() - want.float()).norm()
            assert error <= 3e-3 * want.float().norm(), (fold, fp8, kind, error)
            if kind == "nothing":
                assert torch.equal(got, want)


@torch.no_grad()
def a_model_agrees(rank, group):
    """Several layers, and a forward after another: nothing of the first is left."""
    alone = Ling(tiniest())
    alone.init_weights(torch.Generator().manual_seed(0))
    uneven, fixed = copy.deepcopy(alone), copy.deepcopy(alone)
    shard_experts_(uneven, group)
    shard_experts_(fixed, group, low_latency(group, 12))
    for length in (12, 1, 7):
        torch.manual_seed(rank + length)
        ids = torch.randint(0, alone.config.vocab_size, (1, length))
        want, of_uneven, got = (m(ids).logits for m in (alone, uneven, fixed))
        assert torch.equal(of_uneven, got), length
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)  # fp32 products of other numbers of rows


def wrong_calls(rank, group):
    moe = layer(False, False, torch.bfloat16)
    with pytest.raises(InputError, match="max_tokens is 0; it must be at least 1"):
        low_latency(group, 0)
    shard_experts_(moe, group, low_latency(group, MOST))
    with pytest.raises(InputError, match="has no gradients: call the model under torch.no_grad"):
        moe(torch.randn(2, H).bfloat16())
    with torch.no_grad(), pytest.raises(InputError, match=f"10 tokens in a pass, for which .* has {MOST} rows"):
        moe(torch.randn(10, H).bfloat16())


@pytest.mark.parametrize("fp8", [False, True])
@pytest.mark.parametrize("sums", [False, True])
def test_the_host_reads_nothing(fp8, sums, monkeypatch):
    """Tensors without values raise where a value is read, as the sizes of the uneven exchange are."""
    monkeypatch.setattr(collectives, "is_fake", lambda group=None: False)  # which plans give even sizes
    with fake_processes(4) as ranks, force("triton"), torch.no_grad():
        made = layer(fp8, fp8, torch.bfloat16, **dict(pow2=True) if fp8 else {})
        uneven = copy.deepcopy(made)
        shard_experts_(made, ranks.world, low_latency(ranks.world, MOST, fp8, sums))
        shard_experts_(uneven, ranks.world)
        with FakeTensorMode(allow_non_fake_inputs=True) as mode:
            x = mode.from_tensor(torch.randn(5, H).bfloat16())
            y, _ = made(x)
            assert y.shape == x.shape and y.dtype == x.dtype
            with pytest.raises(DataDependentOutputException):
                uneven(x)


@pytest.mark.skipif(DEVICE != "cpu", reason="the group is of gloo")
@pytest.mark.parametrize("backend, fp8", [c for c in (("triton", True), ("cuda", False), ("cuda", True)) if runs(c[0])])
@torch.no_grad()
def test_kernels_compute_the_rows_that_came(backend, fp8, tmp_path):
    """Of buffers whose other rows are NaN: those of the exchange, and slabs of a fixed number of rows for each expert,
    as masked grouped GEMMs take them."""
    moe = layer(fp8, fp8, torch.bfloat16)
    fixed, x = copy.deepcopy(moe), torch.randn(3, H).bfloat16()
    slabs, counts = torch.full((E, 5, H), torch.nan).bfloat16(), torch.tensor([0, 5, 1, 0, 0, 2, 0, 3]).int()
    used = torch.arange(5) < counts[:, None]
    slabs[used] = torch.randn(int(counts.sum()), H).bfloat16()
    want = moe(x)[0], moe.experts(slabs.flatten(0, 1), plan_of_slabs(counts, 5), None)
    with group_of_one(tmp_path) as group, force(backend):
        shard_experts_(fixed, group, low_latency(group, MOST))
        got = fixed(x)[0], fixed.experts(slabs.flatten(0, 1), plan_of_slabs(counts, 5), None)
    assert (got[1].abs().sum(1) > 0).equal(used.flatten())
    for g, w in zip(got, want, strict=True):
        torch.testing.assert_close(g, w, rtol=0.02, atol=0.02 * w.abs().max().item())
