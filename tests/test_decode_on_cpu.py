"""The forms of ops that a decode step on a CPU takes, against the ops, and the cache that they rely on."""

from functools import cache

import pytest
import torch

from ling_kernels.backend import force
from ling_kernels.generate import Engine
from ling_kernels.model import Ling, LingConfig
from ling_kernels.op import few_calls_on_cpu
from ling_kernels.ops.attention_decode import KVCache
from ling_kernels.ops.attention_decode_cpu import decode_cells, decode_on_cpu
from ling_kernels.ops.moe import moe
from ling_kernels.ops.moe_cpu import moe_cpu
from ling_kernels.ops.qk_norm_attention_decode import qk_norm_attention_decode
from ling_kernels.ops.rope_tables import rope_tables
from tests.cases import Rand, moe_args


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.mark.parametrize("Hq, Hkv, D, R", [(4, 2, 32, 16), (6, 2, 24, 24), (1, 1, 8, 2)])
@pytest.mark.parametrize("lengths, n", [([1], 1), ([64, 65, 7, 128], 1), ([8, 9, 30, 17], 8), ([3, 64], 3)])
def test_attention(lengths, n, Hq, Hkv, D, R):
    """Pages lie in any order; cells past a sequence's end hold NaN, and columns past it any number."""
    page, columns, B = 16, 9, len(lengths)
    table = (torch.randperm(B * columns + 5)[: B * columns]).view(B, columns).int()
    ends, caches = torch.tensor(lengths, dtype=torch.int32), []
    cells = torch.randn(2, B * columns + 5, page, Hkv, D)
    for b, length in enumerate(lengths):
        of_tokens = (table[b].long()[:, None] * page + torch.arange(page)).flatten()
        cells.view(2, -1, Hkv, D)[:, of_tokens[length:]] = torch.nan
        table[b, -(-length // page) :] = 1 << 30
    caches = [KVCache(*cells.clone()) for _ in range(2)]
    qkv = torch.randn(B, n, Hq + 2 * Hkv, D)
    norm = torch.randn(D), torch.randn(D)
    tables = rope_tables(200, R, 10000.0)
    want = qk_norm_attention_decode(qkv, *norm, *tables, caches[0], table, ends, eps=0.1)
    found = decode_cells(*tables, caches[1], table, ends, n)
    got = decode_on_cpu(qkv, *norm, found, caches[1], 0.1)
    torch.testing.assert_close(got, want.flatten(0, 1).flatten(1))
    torch.testing.assert_close(caches[1], caches[0], equal_nan=True)


@pytest.mark.parametrize("T, E, groups, group_topk, topk, Fs", [
    (1, 16, 4, 2, 4, 12), (1, 64, 8, 4, 8, 0), (3, 16, 1, 1, 1, 8), (40, 16, 4, 2, 4, 8), (2, 4, 1, 1, 4, 4),
])  # fmt: skip
def test_moe(T, E, groups, group_topk, topk, Fs):
    rand = Rand(torch.float32)
    sizes = dict(T=T, E=E, H=24, F=20, Fs=Fs, groups=groups, group_topk=group_topk, topk=topk)
    x, router_w, bias, gate_up, down, shared, _, *routing = moe_args(rand, **sizes)
    with torch.no_grad():
        want = moe(x, router_w, bias, gate_up, down, shared, None, *routing)[0]
        got = moe_cpu(x, router_w, bias, gate_up, down, shared, *routing)
    torch.testing.assert_close(got, want)


def test_where_these_forms_run():
    x = torch.randn(2, 2)
    assert not few_calls_on_cpu(x)
    with torch.no_grad():
        assert few_calls_on_cpu(x, x) and not few_calls_on_cpu(x, (x, x)) and not few_calls_on_cpu(x, x.double())
        with torch.autocast("cpu", torch.bfloat16):
            assert not few_calls_on_cpu(x)


@cache
def tiny() -> Ling:
    m = Ling(LingConfig.tiny())
    m.init_weights(torch.Generator().manual_seed(1))
    for p in m.parameters():
        p.data *= 3 if p.ndim > 1 else 1  # far from uniform
    return m.eval()


def texts(number: int) -> list[list[int]]:
    return [torch.randint(0, 320, (n,)).tolist() for n in (1, 5, 16, 17, 40, 3, 15, 8, 33, 2)[:number]]


@pytest.mark.parametrize("draft", [0, 2])
@pytest.mark.parametrize("number", [2, 10])
def test_an_engine_gives_what_the_references_give(number, draft, monkeypatch):
    """Also where every page that a sequence gets held NaN before."""
    prompts, options = texts(number), dict(max_new_tokens=20, stop_token_ids=(), logprobs=0)

    def run():
        engine = Engine(tiny(), page_size=16, cache_tokens=700, draft=draft)
        for cells in (engine.forward.caches, [engine.forward.mtp_cache] if draft else []):
            for k, v, *_ in cells:
                k.fill_(torch.nan), v.fill_(torch.nan)
        first = engine.finish(prompts, **options)
        return [*first, *engine.finish([r.tokens + [7] for r in first], **options)]  # which find cached pages

    got, calls = run(), []
    monkeypatch.setattr("ling_kernels.nn.attention.decode_on_cpu", lambda *args: calls.append(args))
    with force("torch"):
        want = run()
    assert not calls
    for a, b in zip(got, want, strict=True):
        assert a.new_tokens == b.new_tokens and a.cached_tokens == b.cached_tokens
        ours, theirs = (torch.tensor([t.logprob for t in r.logprobs]) for r in (a, b))
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    assert any(r.cached_tokens for r in got)
