"""Decode attention: properties on every backend, and csrc/ itself on the virtual GPU."""

import sys

import pytest
import torch

from ling_kernels.backend import force
from ling_kernels.op import E4M3
from ling_kernels.ops.attention_decode import (
    KVCache,
    append,
    attention_decode,
    attention_decode_fwd,
    attention_decode_ref,
    programs,
    unsupported_cache,
)
from ling_kernels.ops.qk_norm_attention_decode import qk_norm_attention_decode
from ling_kernels.ops.quantize import empty_fp8, quantize, quantize_ref
from tests.cases import DEVICE, Rand, decode_args, norm_decode_args, runs
from tests.gpu.build import load, missing
from tests.test_ops import near_codes, same_bits

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
BACKENDS = [
    pytest.param(b, marks=() if runs(b) else pytest.mark.skip(f"{b} cannot run here"))
    for b in ("torch", "triton", "cuda")
]
on_every_backend = pytest.mark.parametrize("backend", BACKENDS)
with_and_without_fp8 = pytest.mark.parametrize("fp8", [False, True], ids=["bf16", "fp8"])
on_csrc = pytest.mark.skipif(
    DEVICE != "cpu" or missing() is not None, reason="csrc/ does not run on the virtual GPU here"
)


def close(got, want, dtype=BF16):
    """Equal up to the rounding of P and of the result."""
    assert got.dtype == want.dtype and got.isfinite().all()
    largest = want.abs().max().item() if want.numel() else 0
    error = (got.double() - want.double()).abs().max().item() if want.numel() else 0
    assert error <= 3 * max(torch.finfo(dtype).eps, 1e-6) * largest


def moved(cache: KVCache, seed=1) -> tuple[KVCache, torch.Tensor]:
    """The pages in another order, and the new index of each."""
    order = torch.randperm(len(cache.k), generator=torch.Generator().manual_seed(seed)).to(DEVICE)
    to = KVCache(*(x if x is None else torch.empty_like(x) for x in cache))
    for x, y in zip(cache, to, strict=True):
        if x is not None:
            y.view(torch.uint8)[order] = x.view(torch.uint8)
    return to, order


def spoil(cache: KVCache, table, lengths) -> torch.Tensor:
    """Write NaN to every cell that no sequence uses; returns a table whose unused entries are not valid pages."""
    num_blocks, page = cache.k.shape[:2]
    unused = torch.ones(num_blocks * page, dtype=torch.bool, device=DEVICE)
    table = table.clone()
    for pages, length in zip(table, lengths.tolist(), strict=True):
        token = torch.arange(length, device=DEVICE)
        unused[pages.long()[token // page] * page + token % page] = False
        pages[-(-length // page) :] = torch.randint(-(2**31), 2**31 - 1, (1,)).item()
    for x in cache:
        if x is not None:
            cells = x.view(torch.uint8) if x.dtype == E4M3 else x
            cells.view(num_blocks * page, *x.shape[2:])[unused] = 0x7F if x.dtype == E4M3 else torch.nan
    return table


ARGS = dict(lengths=(40, 0, 1, 17), n=2, Hq=8, Hkv=2, D=128, block_size=16)


@on_every_backend
@with_and_without_fp8
def test_where_pages_lie_changes_no_bit(backend, fp8):
    q, cache, table, lengths, scale = decode_args(Rand(BF16), **ARGS, fp8=fp8)
    to, order = moved(cache)
    with force(backend):
        one = attention_decode(q, cache, table, lengths, scale)
        two = attention_decode(q, to, order.int()[table.long()].int(), lengths, scale)
    assert torch.equal(one, two) and (one[1] == 0).all() and (one[2, 0] == 0).all() and (one[2, 1] != 0).all()


@on_every_backend
@with_and_without_fp8
def test_unused_pages_do_not_change_the_output(backend, fp8):
    q, cache, table, lengths, scale = decode_args(Rand(BF16), **ARGS, fp8=fp8)
    with force(backend):
        one = attention_decode(q, cache, table, lengths, scale)
        two = attention_decode(q, cache, spoil(cache, table, lengths), lengths, scale)
    assert torch.equal(one, two) and one.isfinite().all()


@on_every_backend
def test_a_wider_table_is_another_split_of_the_same(backend, monkeypatch):
    args = dict(ARGS, lengths=(150, 0, 70, 17))
    q, cache, table, lengths, scale = decode_args(Rand(BF16), **args)
    want = attention_decode_ref(q, cache, table, lengths, scale)
    wider = torch.nn.functional.pad(table, (0, 40), value=-1)
    seen = []
    monkeypatch.setattr(
        sys.modules["ling_kernels.ops.attention_decode"], "programs", lambda *a: seen.append(programs(*a)) or seen[-1]
    )
    with force(backend):
        for t in (table, wider):
            close(attention_decode(q, cache, t, lengths, scale), want)
    assert backend == "torch" or seen[0] < seen[1]


@on_every_backend
@with_and_without_fp8
def test_many_tokens_are_as_many_steps(backend, fp8):
    n = 4
    q, cache, table, lengths, scale = decode_args(Rand(BF16), (20, 4, 64), n, 4, 1, 128, 32, fp8)
    with force(backend):
        at_once = attention_decode(q, cache, table, lengths, scale)
        steps = [attention_decode(q[:, i : i + 1], cache, table, lengths - (n - 1 - i), scale) for i in range(n)]
    close(at_once, torch.cat(steps, 1))


@on_every_backend
@with_and_without_fp8
def test_new_tokens_enter_their_cells_and_no_other(backend, fp8):
    """In any order of pages. Old contents of the cells are not read; padding and negative positions write nothing."""
    args = norm_decode_args(Rand(BF16), (67, 0, 2, 17), 3, 4, 2, 128, 64, 67, 16, fp8)
    norms, cache, table, lengths, options = args[:5], args[5], args[6], args[7], args[8:]
    new = torch.zeros(cache.k.shape[:2], dtype=torch.bool, device=DEVICE)
    for pages, length in zip(table.long(), lengths.tolist(), strict=True):
        at = torch.arange(max(length - 3, 0), length, device=DEVICE)
        new[pages[at // 16], at % 16] = True
    (k, v), bits = ((x.view(torch.uint8) if fp8 else x for x in cache[:2]), 0x7F if fp8 else torch.nan)
    k[new], v[new] = bits, bits
    before = [x if x is None else x.clone() for x in cache]
    to, order = moved(cache)
    with force("torch"):
        kept = KVCache(*(x if x is None else x.clone() for x in cache))
        want = qk_norm_attention_decode(*norms, kept, table, lengths, *options)
    with force(backend):
        out = qk_norm_attention_decode(*norms, cache, table, lengths, *options)
        other = qk_norm_attention_decode(*norms, to, order.int()[table.long()].int(), lengths, *options)
    assert same_bits(out, other) and (out[1] == 0).all() and (out[2, 0] == 0).all() and (out[2, 1] != 0).all()
    close(out, want)
    for x, was, there in zip(cache, before, to, strict=True):
        if x is not None:
            x, was, there = (t.view(torch.uint8) if fp8 else t for t in (x, was, there))
            assert same_bits(x, there[order]) and same_bits(x[~new], was[~new]) and not same_bits(x[new], was[new])
    for i in range(2):
        if not fp8:
            close(cache[i][new], kept[i][new])
            continue
        assert near_codes(*(x[i].view(torch.uint8)[new].view(E4M3) for x in (cache, kept)))
        close(cache[i + 2][new], kept[i + 2][new])


@pytest.mark.skipif(not runs("triton"), reason="triton cannot run here")
@on_every_backend
@pytest.mark.parametrize("D", [128, 64])
def test_queries_in_fp8_are_those_of_quantize(backend, D):
    for lengths in ((70, 3, 0), ()):
        args = norm_decode_args(Rand(BF16), lengths, 2, 4, 2, D, 64, 200, 16)
        with force(backend):
            out, *fp8 = qk_norm_attention_decode(*args, quantize=True)
            want = quantize(out.flatten(2).flatten(0, 1))
            assert same_bits(out, qk_norm_attention_decode(*args))
        assert all(same_bits(g, w) and g.stride() == w.stride() for g, w in zip(fp8, want, strict=True))


@pytest.mark.parametrize("W", [1, 2, 3, 5, 40])
def test_any_number_of_programs_gives_the_same(W):
    """Runs that end inside sequences, have many or none; kernels read only slots of scratch that they wrote."""
    q, cache, table, lengths, scale = decode_args(Rand(BF16), (0, 0, 150, 3, 64, 0, 65, 0), 2, 4, 2, 16, 16)
    partial = torch.full((W + 8, 2, 4, 16), torch.nan, device=DEVICE)
    out, lse = torch.full_like(q, torch.nan), torch.full_like(partial[..., 0], torch.nan)
    with force("triton"):
        attention_decode_fwd(q, *cache, table, lengths, out, partial, lse, scale)
    close(out, attention_decode_ref(q, cache, table, lengths, scale))


@pytest.mark.skipif(not runs("triton"), reason="triton cannot run here")
@pytest.mark.parametrize("dtype, of_cache", [(BF16, FP32), (FP32, BF16), (FP16, FP16), (FP16, BF16)])
def test_a_cache_of_another_dtype(dtype, of_cache):
    q, cache, table, lengths, scale = decode_args(Rand(of_cache), (37, 3), 2, 4, 2, 24, 16)
    q = q.to(dtype)
    with force("triton"):
        close(attention_decode(q, cache, table, lengths, scale), attention_decode_ref(q, cache, table, lengths, scale),
              dtype)  # fmt: skip


def test_the_split_fills_the_gpu_and_no_more():
    for sms in (78, 132):
        at_once = 2 * sms
        for B, cells, tiles in ((1, 131072, 4), (256, 2048, 4), (64, 8192, 8), (1, 131072, 2)):
            assert 0.9 * at_once <= programs(B, cells, tiles, at_once) * tiles <= at_once
    assert programs(1, 1024, 4, 264) == 16 and programs(1, 1, 512, 264) == 1


@pytest.mark.skipif(DEVICE != "cpu", reason="only a CPU's lengths are known to the host")
@on_every_backend
def test_positions_and_slots_out_of_range_are_named(backend):
    q, cache, table, lengths, scale = decode_args(Rand(BF16), (40, 17), 1, 4, 2, 128, 16)
    with force(backend):
        for wrong in (49, -1):
            with pytest.raises(ValueError, match="lengths that block_table holds; got"):
                attention_decode(q, cache, table, torch.tensor([40, wrong], dtype=torch.int32), scale)
        for wrong in (6, -1):
            with pytest.raises(ValueError, match=r"pages in 0\.\.5; got"):
                attention_decode(q, cache, table.clone().index_fill_(1, torch.tensor(1), wrong), lengths, scale)


# csrc/ itself


def decode(C, args, W):
    q, cache, table, lengths, scale = args
    (B, n, Hq, D), Hkv = q.shape, cache.k.shape[2]
    partial = torch.full((W + B, Hkv, n * Hq // Hkv, D), torch.nan)
    out, lse = torch.full_like(q, torch.nan), torch.full_like(partial[..., 0], torch.nan)
    C.attention_decode_fwd(q, *cache, table, lengths, out, partial, lse, scale)
    return out


def check_decode(C):
    """Rows of one and several tiles, runs of part of a sequence and of many, unused cells of NaN."""
    for dtype, fp8, W, lengths, n, Hq, Hkv, page in (
        (FP16, False, 1, (0, 67, 0, 5, 1), 1, 4, 1, 16), (BF16, False, 3, (0, 130, 6), 2, 8, 1, 48),
        (FP16, True, 2, (70, 0, 20), 3, 4, 2, 32), (BF16, True, 5, (64, 129), 8, 3, 1, 16),
        (FP16, False, 2, (), 1, 2, 1, 16),
    ):  # fmt: skip
        q, cache, table, lengths, scale = decode_args(Rand(dtype), lengths, n, Hq, Hkv, 128, page, fp8)
        args = q, cache, spoil(cache, table, lengths), lengths, scale
        close(decode(C, args, W), attention_decode_ref(*args), dtype)


def check_again(C):
    """Launches of other lengths, and of other rows, find the counters of runs at zero."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LING_GPU_EAGER", "1")
        for n in (1, 5):
            q, cache, table, lengths, scale = decode_args(Rand(FP16), (130, 0, 200), n, 8, 2, 128, 16)
            for now in (lengths, lengths // 2, lengths):
                args = q, cache, table, now, scale
                close(decode(C, args, 4), attention_decode_ref(*args), FP16)


def check_many_sequences(C):
    """More sequences than a warp has lanes, many of them empty."""
    lengths = [130 if i % 34 == 33 else i % 20 if i % 3 == 1 else 0 for i in range(71)]
    args = decode_args(Rand(FP16), lengths, 1, 1, 1, 128, 32)
    for W in (1, 6):
        close(decode(C, args, W), attention_decode_ref(*args), FP16)
    assert (decode(C, (*args[:3], args[3] * 0, 0.3), 6) == 0).all()


def check_a_long_sequence(C):
    """More steps of a warp than it looks up pages for at once; pages in random order."""
    args = decode_args(Rand(FP16), (2200,), 1, 2, 1, 128, 16)
    close(decode(C, args, 1), attention_decode_ref(*args), FP16)


def check_rising_scores(C):
    """Every key has a higher score than those before it, within and across steps, warps and blocks."""
    q, cache, table, lengths, _ = decode_args(Rand(FP16), (330, 200), 1, 2, 1, 128, 16)
    for b in range(2):
        rising = torch.linspace(-1, 1, table.shape[1] * 16).view(-1, 16, 1, 1)
        cache.k[table[b].long()] = (rising * q[b, 0, 0]).half()
    args = q, cache, table, lengths, 0.2
    for W in (1, 4):
        close(decode(C, args, W), attention_decode_ref(*args), FP16)


def check_nan(C):
    """A NaN or inf in a visible key or value shows in the query's row, and in no other sequence."""
    for bad in (torch.nan, torch.inf):
        for i in range(2):
            args = decode_args(Rand(FP16), (70, 20), 1, 2, 1, 128, 16)
            args[1][i][args[2][0, 4].long(), 2] = bad
            out = decode(C, args, 2)
            assert not out[0].isfinite().all(-1).any()
            close(out[1], attention_decode_ref(*args)[1], FP16)


def check_wide_numbers(C):
    """An FP8 cache, whose products are in f16: queries too large for it, infinite ones, and values of any size."""
    q, cache, table, lengths, _ = decode_args(Rand(BF16), (330, 20), 1, 4, 1, 128, 16, True)
    q[:, :, 1] *= 2.0**20
    q[:, :, 2, 5] = torch.inf
    rising = 2.0 ** (torch.arange(table.shape[1] * 16).view(-1, 16, 1) / 50 - 40)
    for b in range(2):
        cache.v_scale[table[b].long()] *= rising
    args = q, cache, table, lengths, 2.0**-23
    want = attention_decode_ref(*args)
    for W in (1, 4):
        out = decode(C, args, W)
        assert not out[:, :, 2].isfinite().any()
        for head in (0, 1, 3):
            close(out[:, :, head], want[:, :, head])


def norm_decode(C, args, W):
    """Results of the kernel that norms and appends, and of qk_norm_rope, append and attention_decode."""
    qkv, q_weight, k_weight, cos, sin, cache, table, lengths, scale, eps = args
    (B, n, H, D), (_, page, Hkv, _) = qkv.shape, cache.k.shape
    at = lengths[:, None] - n + torch.arange(n)
    slots = (table.gather(1, at.clamp(min=0) // page) * page + at % page).where(at >= 0, -1).flatten().long()
    norms = q_weight, k_weight, cos, sin
    q, k, v = (torch.empty(B * n, h, D, dtype=qkv.dtype) for h in (H - 2 * Hkv, Hkv, Hkv))
    C.qk_norm_rope_fwd(qkv.flatten(0, 1), *norms, at.flatten().clamp(min=0), None, q, k, v, None, None, eps)
    caches = [KVCache(*(x if x is None else x.clone() for x in cache)) for _ in range(2)]
    for x in caches:  # the cells of the new tokens hold NaN, which no kernel may read
        fill = 0x7F if x.k.dtype == E4M3 else torch.nan
        for t in x[:2]:
            (t.view(torch.uint8) if t.dtype == E4M3 else t).flatten(0, 1)[slots[slots >= 0]] = fill
    append(caches[1], k[slots >= 0], v[slots >= 0], slots[slots >= 0])
    want = decode(C, (q.view(B, n, q.shape[1], D), caches[1], table, lengths, scale), W)
    partial = torch.full((W + B, Hkv, n * (H // Hkv - 2), D), torch.nan)
    out, lse = torch.full_like(want, torch.nan), torch.full_like(partial[..., 0], torch.nan)
    fp8 = empty_fp8(out, B * n, (H - 2 * Hkv) * D, True, False, None)[:2]
    C.qk_norm_attention_decode_fwd(qkv, *norms, *caches[0], table, lengths, out, *fp8, partial, lse, scale, eps)
    return (out, *fp8, *caches[0]), (want, *quantize_ref(want.flatten(2).flatten(0, 1)), *caches[1])


def check_append(C):
    """New tokens across tiles, runs and pages, tiles of rows that share them, padding: the bits of the three ops."""
    for dtype, fp8, W, lengths, n, Hq, Hkv, page in (
        (FP16, False, 3, (0, 66, 5, 1), 3, 12, 2, 32),
        (BF16, False, 2, (70, 2, 129), 4, 10, 1, 16), (BF16, True, 4, (130, 0, 3), 8, 3, 1, 16),
        (FP16, True, 1, (65,), 1, 4, 2, 48), (BF16, False, 2, (), 1, 2, 1, 16),
    ):  # fmt: skip
        args = [*norm_decode_args(Rand(dtype), lengths, n, Hq, Hkv, 128, 64, 200, page, fp8)]
        if n != 3:
            args[1:3] = (w.float() for w in args[1:3])
        got, want = norm_decode(C, args, W)
        assert all(g is w is None or same_bits(g, w) for g, w in zip(got, want, strict=True))
        assert got[0].isfinite().all() and (not lengths or got[0].any())


CHECKS = [
    check_again,
    check_append,
    check_decode,
    check_many_sequences,
    check_a_long_sequence,
    check_rising_scores,
    check_nan,
    check_wide_numbers,
]


@on_csrc
@pytest.mark.parametrize("check", CHECKS, ids=lambda f: f.__name__[6:])
@pytest.mark.parametrize("seed", range(4))
def test_correct(check, seed, monkeypatch):
    monkeypatch.setenv("LING_GPU_SEED", str(seed))
    check(load())


@pytest.mark.parametrize("fp8", [False, True])
def test_reasons_why_csrc_does_not_support(fp8):
    """One reason at a time; test_ops.py runs the calls without a reason."""
    q, cache, *_ = decode_args(Rand(BF16), (20,), 2, 8, 1, 128, 16, fp8)

    def reason(q=q, cache=cache):
        return unsupported_cache(q, *cache, q, q) or ""

    assert reason() == ""
    too_many = "32 queries of a KV head, more than 16, with a cache that is not FP8"
    assert reason(q.repeat(1, 2, 1, 1)) == ("" if fp8 else too_many)
    assert "float32 tokens" in reason(q.float())
    assert "heads of 64" in reason(q[..., :64])
    assert "pages of 8" in reason(cache=KVCache(*(x if x is None else x[:, :8] for x in cache)))
    assert "16 bytes" in reason(torch.cat([q.flatten()[:4], q.flatten()])[4:].view(q.shape))
    assert "float16 tokens" in reason(q.half()) or fp8


@on_csrc
def test_a_debug_build_checks_lengths_and_pages():
    C = load(debug="attention")
    q, cache, table, lengths, scale = decode_args(Rand(BF16), (40, 17), 1, 4, 2, 128, 16)
    for wrong in (49, -1):
        with pytest.raises(RuntimeError, match="trap"):
            decode(C, (q, cache, table, torch.tensor([40, wrong], dtype=torch.int32), scale), 2)
    for wrong in (6, -1):
        with pytest.raises(RuntimeError, match="trap"):
            decode(C, (q, cache, table.clone().index_fill_(1, torch.tensor(1), wrong), lengths, scale), 2)


@on_csrc
def test_a_debug_build_checks_new_tokens():
    C = load(debug="attention")
    args = norm_decode_args(Rand(BF16), (40, 17), 2, 4, 2, 128, 64, 40, 16)
    norm_decode(C, args, 2)
    with pytest.raises(RuntimeError, match="trap"):
        norm_decode(C, [*args[:3], *(t[:39] for t in args[3:5]), *args[5:]], 2)
