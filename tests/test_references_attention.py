"""The references of the attention ops against torch's attention and against one another."""

import importlib

import pytest
import torch
from torch.nn import functional as F

from ling_kernels import attention, attention_decode, qk_norm_attention, qk_norm_rope
from ling_kernels.backend import force
from ling_kernels.op import E4M3
from ling_kernels.ops.attention import attention_ref
from ling_kernels.ops.attention_cpu import attention_cpu_bwd, attention_cpu_fwd
from ling_kernels.ops.attention_decode import KVCache, append
from ling_kernels.ops.rope_tables import rope_tables
from tests.cases import DEVICE, Rand, cache_of, cu_seqlens, decode_args
from tests.test_ops import same_bits as equal_bits

attention_file = importlib.import_module("ling_kernels.ops.attention")
FP64, BF16 = torch.float64, torch.bfloat16


def qkv_of(lens_q, lens_k=None, Hq=4, Hkv=2, D=16, dtype=FP64, seed=0):
    rand = Rand(dtype, seed)
    Tk = sum(lens_q if lens_k is None else lens_k)
    return rand(sum(lens_q), Hq, D), rand(Tk, Hkv, D), rand(Tk, Hkv, D)


def dense(q, k, v, causal, scale=None):
    """torch's attention of one sequence; the causal mask is aligned at the bottom right."""
    Lq, Lk, G = len(q), len(k), q.shape[1] // k.shape[1]
    seen = torch.ones(Lq, Lk, dtype=torch.bool, device=q.device).tril(Lk - Lq if causal else Lk)
    q, k, v = q.transpose(0, 1), *(x.transpose(0, 1).repeat_interleave(G, 0) for x in (k, v))
    return F.scaled_dot_product_attention(q, k, v, seen, scale=scale).transpose(0, 1)


def same_bits(a, b):
    return all(map(equal_bits, a, b))


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("lens_q, lens_k", [((1, 9, 0, 130), None), ((3, 140, 1), (9, 300, 1))])
def test_attention_is_sdpa_of_every_sequence(lens_q, lens_k, causal):
    args = qkv_of(lens_q, lens_k)
    cu_k = None if lens_k is None else cu_seqlens(lens_k)
    out, lse = attention(*args, cu_seqlens(lens_q), cu_k, causal, 0.3)
    lens_k = lens_k or lens_q
    q, k, v = (x.split(n) for x, n in zip(args, (lens_q, lens_k, lens_k), strict=True))
    want = torch.cat([dense(*rows, causal, 0.3) for rows in zip(q, k, v, strict=True)])
    torch.testing.assert_close(out, want)
    cotangent = torch.sin(torch.arange(out.numel(), device=DEVICE, dtype=FP64)).view_as(out)
    for got, true in zip(*(torch.autograd.grad(o, args, cotangent) for o in (out, want)), strict=True):
        torch.testing.assert_close(got, true)
    assert not lse.requires_grad and lse.dtype == FP64
    scores = q[-1][:, 1] @ k[-1][:, 0].mT * 0.3  # head 1 of the last sequence; of causal rows the last sees every key
    torch.testing.assert_close(lse[1, -1], scores[-1].logsumexp(0))


@pytest.mark.skipif(DEVICE != "cpu", reason="torch's kernel on a CPU")
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("Hq, Hkv, D", [(4, 2, 32), (3, 3, 5), (8, 1, 128)])
def test_torchs_kernel_has_the_references_values(monkeypatch, Hq, Hkv, D, causal):
    """In fp32 on a CPU, for views that lie apart too; LING_BACKEND=torch runs the reference itself."""
    lens = (1, 9, 0, 130, 256, 256)
    wide = Rand(torch.float32, 3)(sum(lens), Hq + 2 * Hkv, 2 * D)
    q, k, v = wide[..., ::2].split([Hq, Hkv, Hkv], 1)
    calls = []
    monkeypatch.setattr(attention_file, "attention_cpu_fwd", lambda *a: calls.append(attention_cpu_fwd(*a)))
    monkeypatch.setattr(attention_file, "attention_cpu_bwd", lambda *a: calls.append(attention_cpu_bwd(*a)))
    cotangent = torch.randn(sum(lens), Hq, D)
    results = []
    for fn in (attention, attention_ref):
        out, lse = fn(q, k, v, cu_seqlens(lens), None, causal, 0.3)
        results.append([out, lse, torch.autograd.grad(out, wide, cotangent, retain_graph=True)[0]])
        assert len(calls) == 2
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=5e-6 * want.abs().max().item())
    with force("torch"):
        attention(q, k, v, cu_seqlens(lens), None, causal, 0.3)
    attention(*(x.bfloat16() for x in (q, k, v)), cu_seqlens(lens))
    attention(q, k, v, cu_seqlens(lens), cu_seqlens(lens))
    assert len(calls) == 2


def test_attention_gradient_matches_numerical_differentiation():
    args = qkv_of((3, 0, 4), (2, 3, 6), D=3)
    assert torch.autograd.gradcheck(lambda *qkv: attention(*qkv, cu_seqlens((3, 0, 4)), cu_seqlens((2, 3, 6)))[0], args)


def test_queries_that_see_no_key():
    q, k, v = qkv_of((5, 2), (2, 0), dtype=torch.float32)
    out, lse = attention(q, k, v, cu_seqlens((5, 2)), cu_seqlens((2, 0)))
    blind = torch.tensor([True, True, True, False, False, True, True], device=DEVICE)
    assert (out[blind] == 0).all() and (lse[:, blind] == -torch.inf).all() and lse[:, ~blind].isfinite().all()
    grads = torch.autograd.grad(out.sum(), (q, k, v))
    assert all(g.isfinite().all() for g in grads) and (grads[0][blind] == 0).all() and (grads[2] != 0).any()


@pytest.mark.parametrize("dtype", [torch.float32, BF16])
def test_a_packed_batch_is_its_sequences_one_by_one(dtype):
    lens = (7, 1, 0, 200, 33)
    packed = qkv_of(lens, dtype=dtype)
    out, lse = attention(*packed, cu_seqlens(lens))
    grads = torch.autograd.grad(out.float().square().sum(), packed)
    at = 0
    for n in lens:
        one = [x.detach()[at : at + n].requires_grad_() for x in packed]
        out1, lse1 = attention(*one, cu_seqlens((n,)))
        grads1 = torch.autograd.grad(out1.float().square().sum(), one)
        assert same_bits((out[at : at + n], lse[:, at : at + n]), (out1, lse1))
        assert same_bits([g[at : at + n] for g in grads], grads1)
        at += n


def test_no_token_sees_a_later_one_or_another_sequence():
    q, k, v = (x.detach() for x in qkv_of((150, 150), dtype=torch.float32))
    before, _ = attention(q, k, v, cu_seqlens((150, 150)))
    k[140:150], v[140:150] = 1e4, -1e4
    k[170:], v[170:] = -3, 50
    after, _ = attention(q, k, v, cu_seqlens((150, 150)))
    assert same_bits([before[:140], before[150:170]], [after[:140], after[150:170]])
    assert not torch.equal(before[140], after[140]) and not torch.equal(before[170], after[170])
    shorter, _ = attention(q[:140], k[:140], v[:140], cu_seqlens((140,)))
    torch.testing.assert_close(shorter, after[:140])


def test_nan_stays_in_its_sequence():
    q, k, v = (x.detach() for x in qkv_of((9, 9), dtype=torch.float32))
    v[4] = torch.nan
    out, _ = attention(q, k, v, cu_seqlens((9, 9)))
    assert out[8].isnan().all() and out[9:].isfinite().all()


def test_attention_in_bf16_is_as_near_the_truth_as_sdpa():
    exact = qkv_of((200,), D=64)
    rounded = [x.detach().to(BF16).requires_grad_() for x in exact]
    exact = [x.detach().double().requires_grad_() for x in rounded]
    errors = []
    true = dense(*exact, True)
    true = [true, *torch.autograd.grad(true.sum(), exact)]
    for out in (attention(*rounded, cu_seqlens((200,)))[0], dense(*rounded, True)):
        got = [out, *torch.autograd.grad(out.sum(), rounded)]
        assert all(g.dtype == BF16 for g in got)
        errors.append([(g - t).norm() / t.norm() for g, t in zip(got, true, strict=True)])
    assert all(e < 2 * other + 1e-4 for e, other in zip(*errors, strict=True)), errors


def test_attention_rounds_p_and_ds():
    """The formulas at the top of attention.py written out; all but a few ties in rounding must agree."""
    q, k, v = args = qkv_of((64,), Hq=1, Hkv=1, dtype=BF16)
    out, lse = attention(*args, cu_seqlens((64,)), scale=0.3)
    dout = Rand(BF16, 1).data(64, 1, 16)
    got = [out, *torch.autograd.grad(out, args, dout)]

    def rounded(x):
        return x.to(BF16).float()

    q, k, v, dout, out = (x.detach()[:, 0].float() for x in (q, k, v, dout, out))
    seen = torch.ones(64, 64, device=DEVICE).tril()
    s = (0.3 * q @ k.T).masked_fill(seen == 0, -torch.inf)
    p = (s - s.amax(1, True)).exp()
    want = [rounded(p) @ v / p.sum(1, True)]
    p = (s - lse[0, :, None]).exp()
    ds = rounded(p * (dout @ v.T - (dout * out).sum(1, True)))
    want += [0.3 * ds @ k, 0.3 * ds.T @ q, rounded(p).T @ dout]
    for g, w in zip(got, want, strict=True):
        assert (g[:, 0] != w.to(BF16)).float().mean() < 0.02


def test_attention_under_autocast():
    args = qkv_of((9,), dtype=torch.float32)
    with torch.autocast(DEVICE, dtype=BF16):
        out, _ = attention(*args, cu_seqlens((9,)))
    want, _ = attention(*(x.to(BF16) for x in args), cu_seqlens((9,)))
    assert out.dtype == BF16 and torch.equal(out, want)
    assert all(g.dtype == torch.float32 for g in torch.autograd.grad(out.sum(), args))


@pytest.mark.parametrize("n", [1, 3, 8])
def test_decode_is_attention_with_the_whole_prefix(n):
    lengths = (n, 40, 12)
    q, cache, table, counts, scale = decode_args(Rand(torch.float32), lengths, n=n)
    out = attention_decode(q, cache, table, counts, scale)
    for b, length in enumerate(lengths):
        k, v = (x[table[b].long()].flatten(0, 1)[:length] for x in (cache.k, cache.v))
        want, _ = attention(q[b], k, v, cu_seqlens((n,)), cu_seqlens((length,)), True, scale)
        torch.testing.assert_close(out[b], want)


@pytest.mark.parametrize("fp8", [False, True])
def test_where_pages_lie_changes_no_bit(fp8):
    q, cache, table, lengths, scale = decode_args(Rand(BF16), (7, 0, 13, 2), n=2, fp8=fp8)
    out = attention_decode(q, cache, table, lengths, scale)
    order = torch.randperm(len(cache.k), generator=torch.Generator().manual_seed(1)).to(DEVICE)
    moved = KVCache(*(x if x is None else torch.empty_like(x) for x in cache))
    for x, y in zip(cache, moved, strict=True):
        if x is not None:
            y.view(torch.uint8)[order] = x.view(torch.uint8)
    assert same_bits([out], [attention_decode(q, moved, order.int()[table.long()].int(), lengths, scale)])
    assert (out[1] == 0).all() and (out[3] != 0).all()


def test_decode_reads_nothing_past_a_length():
    q, cache, table, lengths, scale = decode_args(Rand(torch.float32), (6, 9))
    out = attention_decode(q, cache, table, lengths, scale)
    table[0, 2:] = 99
    for b, length in enumerate((6, 9)):
        page, offset = divmod(length, 4)
        for x in (cache.k, cache.v):
            x[table[b, page].long(), offset:] = torch.nan
    assert same_bits([out], [attention_decode(q, cache, table, lengths, scale)])
    speculative = attention_decode(q.expand(2, 8, -1, -1), cache, table, lengths, scale)
    assert (speculative[0, :2] == 0).all() and speculative.isfinite().all()  # 8 new tokens of 6: two see nothing


def test_fp8_cache_is_near_the_exact_one():
    rand = Rand(torch.float32)
    q, exact, table, lengths, scale = decode_args(rand, (70, 33), n=2, Hq=8, D=128)
    pages, block_size, Hkv, D = exact.k.shape
    zeros = torch.zeros(exact.k.shape, device=DEVICE)
    cache = KVCache(zeros.to(E4M3), zeros.to(E4M3), zeros[..., 0].clone(), zeros[..., 0].clone())
    slots = torch.randperm(pages * block_size, generator=rand.g, device=DEVICE)
    append(cache, *(x.flatten(0, 1)[slots] for x in exact[:2]), slots)
    for x, x_q, x_scale in zip(exact[:2], cache[:2], cache[2:], strict=True):
        error = (x_q.float() * x_scale[..., None] - x).abs()
        bound = torch.maximum(x.abs() * 2**-4, x_scale[..., None] * 2**-10)  # half a step, subnormals
        assert (error <= bound * 1.0001).all()
    got, want = (attention_decode(q, c, table, lengths, 0.1) for c in (cache, exact))
    assert (got - want).norm() < 0.04 * want.norm() and (got != want).any()


def test_append_writes_its_slots_only():
    cache = cache_of(Rand(torch.float32), 3, 4, 2, 8)
    before = [x.clone() for x in cache[:2]]
    k, v = (Rand(torch.float32, seed).data(2, 2, 8) for seed in (1, 2))
    append(cache, k, v, torch.tensor([11, 5], device=DEVICE))
    for x, old, new in zip(cache, before, (k, v), strict=False):
        assert torch.equal(x[2, 3], new[0]) and torch.equal(x[1, 1], new[1])
        old[2, 3], old[1, 1] = new
        assert torch.equal(x, old)


def test_qk_norm_attention_is_the_two_ops():
    rand = Rand(torch.float32)
    args = rand(12, 8, 16), rand(16), rand(16), *rope_tables(20, 8, 1e4, device=DEVICE)
    positions = torch.tensor([*range(5), *range(7)], device=DEVICE)
    got = qk_norm_attention(*args, positions, 2, cu_seqlens((5, 7)), True, 0.3, 0.1)
    want = attention(*qk_norm_rope(*args, positions, 2, 0.1), cu_seqlens((5, 7)), scale=0.3)
    assert same_bits(got, want)


def wrong_calls():
    rand = Rand(torch.float32)
    q, k, cu = rand.data(6, 4, 8), rand.data(6, 2, 8), cu_seqlens((6,))
    positions = torch.arange(6, device=DEVICE)
    pages, table = KVCache(rand.data(3, 4, 2, 8), rand.data(3, 4, 2, 8)), torch.zeros(1, 3, dtype=torch.int32)
    table, lengths = table.to(DEVICE), torch.tensor([5], dtype=torch.int32, device=DEVICE)
    fp8 = pages.k.to(E4M3)
    yield "q 2-D", attention, (q[0], k, k, cu)
    yield "heads", attention, (q, rand.data(6, 3, 8), rand.data(6, 3, 8), cu)
    yield "no heads", attention, (q, k[:, :0], k[:, :0], cu)
    yield "D", attention, (q, k[..., :4], k[..., :4], cu)
    yield "no D", attention, (q[..., :0], k[..., :0], k[..., :0], cu)
    yield "no D", attention_decode, (q[None, :, :, :0], KVCache(*(t[..., :0] for t in pages[:2])), table, lengths)
    yield "v", attention, (q, k, k[:5], cu)
    yield "dtype", attention, (q, k.to(BF16), k, cu)
    yield "int q", attention, (q.int(), k.int(), k.int(), cu)
    yield "int64 cu", attention, (q, k, k, cu.long())
    yield "2-D cu", attention, (q, k, k, cu[None])
    yield "empty cu", attention, (q, k, k, cu[:0])
    yield "other cu_k", attention, (q, k, k, cu, cu_seqlens((3, 3)))
    yield "rows of k", attention, (q, k[:5], k[:5], cu)
    yield "cu covers less", attention, (q, k, k, cu_seqlens((5,)))
    yield "cu from 1", attention, (q, k, k, cu_seqlens((5,)) + 1)
    yield "cu falls", attention, (q, k, k, torch.tensor([0, 4, 3, 6], dtype=torch.int32, device=DEVICE))
    if DEVICE == "cpu":
        yield "slot", append, (pages, k[:1], k[:1], torch.tensor([12]))
    yield "int32 slots", append, (pages, k[:1], k[:1], positions[:1].int())
    yield "k of the cache", append, (pages, k[:1, :1], k[:1, :1], positions[:1])
    yield "q of 9", attention_decode, (rand.data(1, 9, 4, 8), pages, table, lengths)
    yield "q of 0", attention_decode, (rand.data(1, 0, 4, 8), pages, table, lengths)
    yield "q 3-D", attention_decode, (rand.data(1, 4, 8), pages, table, lengths)
    yield "heads of the cache", attention_decode, (rand.data(1, 1, 3, 8), pages, table, lengths)
    yield "D of the cache", attention_decode, (rand.data(1, 1, 4, 6), pages, table, lengths)
    yield "lengths", attention_decode, (rand.data(1, 1, 4, 8), pages, table, lengths.long())
    yield "rows of the table", attention_decode, (rand.data(2, 1, 4, 8), pages, table, lengths)
    yield "fp8 without scales", attention_decode, (rand.data(1, 1, 4, 8), KVCache(fp8, fp8), table, lengths)
    yield "scales", attention_decode, (rand.data(1, 1, 4, 8), pages._replace(k_scale=pages.k[..., 0]), table, lengths)


@pytest.mark.parametrize("fn, args", [pytest.param(f, a, id=f"{f.__name__}-{name}") for name, f, a in wrong_calls()])
def test_wrong_arguments_raise(fn, args):
    with pytest.raises(ValueError, match="expected .*; got"):
        fn(*args)
