"""The exchange by DeepEP against all experts on one process. DeepEP needs GPUs: a stand-in with its documented
interface checks the arguments and moves rows by gloo."""

import copy
import sys
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

from ling_kernels.errors import InputError
from ling_kernels.parallel.collectives import gather
from ling_kernels.parallel.deep_ep import deep_ep, deep_ep_low_latency
from ling_kernels.parallel.exchange import shard_experts_
from tests.ranks import run
from tests.test_expert_parallel import TOPK, WORLD, E, H, T, choices, layer, results_of


def test_two_processes_equal_one(tmp_path):
    run(tmp_path, [without_deep_ep, layers_agree, decode_passes_agree], WORLD)


class Buffers:
    """What both versions have: rows to the ranks that have one of their experts, and sums of rows on the way back.
    Handles: for each rank the tokens that go there, and how many come from each."""

    tokens = T

    def __init__(self, group):
        self.group, self.n, self.rank = group, dist.get_world_size(group), dist.get_rank(group)

    def move(self, t, to, from_):
        out = t.new_empty(sum(from_), *t.shape[1:])
        dist.all_to_all_single(out, t.contiguous(), from_, to, group=self.group)
        return out

    def spread(self, handle, t):
        tokens, from_, _ = handle
        return self.move(t[torch.cat(tokens)], [len(i) for i in tokens], from_)

    def sent(self, x, experts, weights, number):
        assert x.dtype == torch.bfloat16 and x.is_contiguous() and experts.dtype == torch.int64
        assert weights.dtype == torch.float32 and experts.shape == weights.shape and len(x) <= self.tokens
        here = number // self.n
        tokens = [((experts // here == r) & (experts >= 0)).any(1).nonzero()[:, 0] for r in range(self.n)]
        to = torch.tensor([len(i) for i in tokens])
        from_ = torch.empty_like(to)
        dist.all_to_all_single(from_, to, group=self.group)
        handle = tokens, from_.tolist(), len(x)
        x, experts, weights = (self.spread(handle, t) for t in (x, experts, weights))
        experts = experts.where(experts // here == self.rank, -1 + self.rank * here) - self.rank * here
        return x, experts, weights, handle

    def summed(self, handle, t):
        tokens, from_, number = handle
        out = torch.zeros(number, t.shape[1])
        back = self.move(t, from_, [len(i) for i in tokens])
        return out.index_add_(0, torch.cat(tokens), back.float()).to(t.dtype)

    def combine(self, x, handle, topk_weights=None):
        assert x.dtype == torch.bfloat16 and len(x) == sum(handle[1])
        assert topk_weights is None or topk_weights.shape[0] == len(x)
        weights = None if topk_weights is None else self.summed(handle, topk_weights)
        return self.summed(handle, x), weights, None


class ElasticBuffer(Buffers):
    model = H, TOPK

    def __init__(self, group, *, num_max_tokens_per_rank, hidden, num_topk, deterministic):
        assert (hidden, num_topk, deterministic) == (*self.model, True)
        self.tokens = num_max_tokens_per_rank
        super().__init__(group)

    def dispatch(self, x, topk_idx=None, topk_weights=None, num_experts=None, handle=None):
        if handle is not None:
            assert topk_idx is topk_weights is None
            return self.spread(handle, x), None, None, handle, None
        return *self.sent(x, topk_idx, topk_weights, num_experts), None


class Buffer(Buffers):
    config = SimpleNamespace(get_nvl_buffer_size_hint=lambda b, n: 7 * b, get_rdma_buffer_size_hint=lambda b, n: 0)
    get_dispatch_config = get_combine_config = staticmethod(lambda n: Buffer.config)

    def __init__(self, group, num_nvl_bytes, num_rdma_bytes):
        assert (num_nvl_bytes, num_rdma_bytes) == (7 * 2 * H, 0)
        super().__init__(group)

    def get_dispatch_layout(self, topk_idx, num_experts):
        assert topk_idx.dtype == torch.int64 and num_experts == E
        return "per rank", None, "per expert", "in rank", None

    def dispatch(
        self, x, handle=None, num_tokens_per_rank=None, num_tokens_per_rdma_rank=None, is_token_in_rank=None,
        num_tokens_per_expert=None, topk_idx=None, topk_weights=None,
    ):  # fmt: skip
        if handle is not None:
            assert topk_idx is topk_weights is None
            return self.spread(handle, x), None, None, None, None, None
        layout = num_tokens_per_rank, num_tokens_per_rdma_rank, num_tokens_per_expert, is_token_in_rank
        assert layout == ("per rank", None, "per expert", "in rank")
        rows, experts, weights, handle = self.sent(x, topk_idx, topk_weights, E)
        return rows, experts, weights, [], handle, None


VERSIONS = [SimpleNamespace(topk_idx_t=torch.int64, ElasticBuffer=ElasticBuffer, Buffer=Buffer),
            SimpleNamespace(topk_idx_t=torch.int64, Buffer=Buffer)]  # fmt: skip


def without_deep_ep(rank, group):
    sys.modules["deep_ep"] = None
    for make in (lambda: deep_ep(group, H, TOPK, T), lambda: deep_ep_low_latency(group, H, E, T)):
        with pytest.raises(InputError, match="deep_ep .* cannot be imported"):
            make()


def layers_agree(rank, group):
    for package, fold, fp8 in ((VERSIONS[0], False, False), (VERSIONS[0], True, True), (VERSIONS[1], True, False)):
        sys.modules["deep_ep"] = package
        for kind in ("own", "one rank", "no tokens", "some left out"):
            moe = layer(fold, fp8, torch.bfloat16)
            shared = copy.deepcopy(moe)
            shard_experts_(shared, group, deep_ep(group, H, TOPK, T))
            torch.manual_seed(100 + rank)
            x, dy = torch.randn(2, T, H).bfloat16()
            experts = choices(kind, rank)
            results = [results_of(m, x, dy, experts) for m in (moe, shared)]
            for (i, want), got in zip(enumerate(results[0]), results[1], strict=True):
                error, size = (t.float().norm().item() for t in (want - got, want))
                assert error <= 2e-3 * size, (fold, fp8, kind, i, error)
            for name in ("gate_up", "down"):
                total = getattr(moe.experts, name).grad.float()
                dist.all_reduce(total, group=group)
                mine, got = total.chunk(WORLD)[rank], getattr(shared.experts, name).grad.float()
                assert (got - mine).norm() <= 0.01 * mine.norm(), (fold, fp8, kind, name)


class LowLatencyBuffer(Buffers):
    """Slabs of T rows for each rank and expert; rows of an expert come in any order, and NaN is in all others."""

    @staticmethod
    def get_low_latency_rdma_size_hint(tokens, hidden, ranks, experts):
        assert (tokens, hidden, ranks, experts) == (T, H, WORLD, E)
        return 1 << 20

    def __init__(self, group, num_nvl_bytes, num_rdma_bytes, *, low_latency_mode, num_qps_per_rank):
        assert (num_nvl_bytes, num_rdma_bytes, low_latency_mode, num_qps_per_rank) == (0, 1 << 20, True, E // WORLD)
        super().__init__(group)

    def low_latency_dispatch(self, x, topk_idx, tokens, number, *, use_fp8):
        assert x.dtype == torch.bfloat16 and x.is_contiguous() and topk_idx.dtype == torch.int64
        assert (tokens, number, use_fp8) == (T, E, False) and topk_idx.shape == (len(x), TOPK) and len(x) <= T
        x = gather(torch.nn.functional.pad(x, (0, 0, 0, T - len(x))), self.group)
        chosen = gather(torch.nn.functional.pad(topk_idx, (0, 0, 0, T - len(topk_idx)), value=-1), self.group)
        here = E // self.n
        slabs, counts, places = torch.full((here, self.n * T, H), torch.nan).bfloat16(), [], []
        for e in range(here):
            of_expert = (chosen == self.rank * here + e).nonzero()
            of_expert = of_expert[torch.randperm(len(of_expert))]
            slabs[e, : len(of_expert)] = x[of_expert[:, 0]]
            counts.append(len(of_expert))
            places.append(of_expert)
        return slabs, torch.tensor(counts, dtype=torch.int32), places, "event", None

    def low_latency_combine(self, x, topk_idx, topk_weights, handle):
        assert x.shape == (E // self.n, self.n * T, H) and x.dtype == torch.bfloat16
        assert topk_weights.dtype == torch.float32
        results = torch.zeros(self.n * T, TOPK, H).bfloat16()
        for slab, places in zip(x, handle, strict=True):
            results[places[:, 0], places[:, 1]] = slab[: len(places)]
        back = torch.empty_like(results)
        dist.all_to_all_single(back, results, group=self.group)
        back = back.view(self.n, T, TOPK, H).float().sum(0)[: len(topk_idx)]  # all but one rank's are 0
        return (back * topk_weights[..., None]).sum(1).bfloat16(), "event", None


@torch.no_grad()
def decode_passes_agree(rank, group):
    """FP8 experts apply the routing weights at another place, which their rounding shows."""
    sys.modules["deep_ep"] = SimpleNamespace(topk_idx_t=torch.int64, Buffer=LowLatencyBuffer)
    for fp8 in (False, True):
        for kind in ("own", "one rank", "no tokens", "some left out"):
            moe = layer(fp8, fp8, torch.bfloat16)
            shared = copy.deepcopy(moe)
            shard_experts_(shared, group, deep_ep_low_latency(group, H, E, T))
            torch.manual_seed(100 + rank)
            x, experts = torch.randn(T, H).bfloat16(), choices(kind, rank)
            if rank and kind == "own":
                x = x[:0]
            want, got = (m(x, None, experts)[0].float() for m in (moe, shared))
            assert (got - want).norm() <= (1e-2 if fp8 else 1e-3) * want.norm(), (fp8, kind)
    with pytest.raises(InputError, match=f"{T + 1} tokens in a pass"):
        shared(torch.randn(T + 1, H).bfloat16())
    with torch.enable_grad(), pytest.raises(InputError, match="has no gradients"):
        shared(x)
