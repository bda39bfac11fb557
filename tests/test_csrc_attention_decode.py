"""Decode attention: what holds on every backend, csrc/ on the CPU, and wrong kernels that must not get through."""

import pytest
import torch

from ling_kernels.backend import force
from ling_kernels.op import E4M3
from ling_kernels.ops import attention_decode as attention_decode_file
from ling_kernels.ops.attention_decode import (
    KVCache,
    attention_decode,
    attention_decode_fwd,
    attention_decode_ref,
    programs,
    serves,
)
from tests.cases import DEVICE, Rand, decode_args, runs
from tests.host.build import SANITIZE, load, missing

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
BACKENDS = [
    pytest.param(b, marks=() if runs(b) else pytest.mark.skip(f"{b} cannot run here"))
    for b in ("torch", "triton", "cuda")
]
on_every_backend = pytest.mark.parametrize("backend", BACKENDS)
with_and_without_fp8 = pytest.mark.parametrize("fp8", [False, True], ids=["bf16", "fp8"])
on_host = pytest.mark.skipif(DEVICE != "cpu" or missing() is not None, reason="csrc/ is not run on the host here")


def close(got, want, dtype=BF16):
    """As near as roundings of P and of the result leave them."""
    assert got.dtype == want.dtype and got.isfinite().all()
    largest = want.abs().max().item() if want.numel() else 0
    error = (got.double() - want.double()).abs().max().item() if want.numel() else 0
    assert error <= 3 * max(torch.finfo(dtype).eps, 1e-6) * largest


def moved(cache: KVCache, seed=1) -> tuple[KVCache, torch.Tensor]:
    """The pages in another order, and where each is now."""
    order = torch.randperm(len(cache.k), generator=torch.Generator().manual_seed(seed)).to(DEVICE)
    to = KVCache(*(x if x is None else torch.empty_like(x) for x in cache))
    for x, y in zip(cache, to, strict=True):
        if x is not None:
            y.view(torch.uint8)[order] = x.view(torch.uint8)
    return to, order


def spoil(cache: KVCache, table, lengths) -> torch.Tensor:
    """NaN into every cell that no sequence uses; a table whose unused entries are nobody's pages."""
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
def test_what_no_sequence_uses_changes_no_bit(backend, fp8):
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
    monkeypatch.setattr(attention_decode_file, "programs", lambda *a: seen.append(programs(*a)) or seen[-1])
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


@pytest.mark.skipif(not runs("triton"), reason="triton cannot run here")
@pytest.mark.parametrize("W", [1, 2, 3, 5, 40])
def test_any_number_of_programs_gives_the_same(W):
    """Runs that end inside sequences, hold many, and are empty; every slot of scratch that is read was written."""
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
def test_what_the_table_or_the_cache_does_not_hold_is_named(backend):
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


def check_many_sequences(C):
    """More than a warp looks at once, of which many are empty."""
    lengths = [130 if i % 34 == 33 else i % 20 if i % 3 == 1 else 0 for i in range(71)]
    args = decode_args(Rand(FP16), lengths, 1, 1, 1, 128, 32)
    for W in (1, 6):
        close(decode(C, args, W), attention_decode_ref(*args), FP16)
    assert (decode(C, (*args[:3], args[3] * 0, 0.3), 6) == 0).all()


def check_a_long_sequence(C):
    """More steps of a warp than it looks up pages of at once; pages in no order."""
    args = decode_args(Rand(FP16), (2200,), 1, 2, 1, 128, 16)
    close(decode(C, args, 1), attention_decode_ref(*args), FP16)


def check_rising_scores(C):
    """Every key outdoes those before it, in and among steps, warps and blocks."""
    q, cache, table, lengths, _ = decode_args(Rand(FP16), (330, 200), 1, 2, 1, 128, 16)
    for b in range(2):
        rising = torch.linspace(-1, 1, table.shape[1] * 16).view(-1, 16, 1, 1)
        cache.k[table[b].long()] = (rising * q[b, 0, 0]).half()
    args = q, cache, table, lengths, 0.2
    for W in (1, 4):
        close(decode(C, args, W), attention_decode_ref(*args), FP16)


def check_nan(C):
    """A NaN or inf that a query sees is seen in its row, and in no other sequence."""
    for bad in (torch.nan, torch.inf):
        for i in range(2):
            args = decode_args(Rand(FP16), (70, 20), 1, 2, 1, 128, 16)
            args[1][i][args[2][0, 4].long(), 2] = bad
            out = decode(C, args, 2)
            assert not out[0].isfinite().all(-1).any()
            close(out[1], attention_decode_ref(*args)[1], FP16)


CHECKS = [
    check_decode,
    check_many_sequences,
    check_a_long_sequence,
    check_rising_scores,
    check_nan,
]


@on_host
@pytest.mark.parametrize("check", CHECKS, ids=lambda f: f.__name__[6:])
@pytest.mark.parametrize("seed", range(4))
def test_correct(check, seed, monkeypatch):
    monkeypatch.setenv("LING_HOST_SEED", str(seed))
    check(load())


@on_host
@pytest.mark.parametrize("fp8", [False, True])
def test_which_calls_are_its(fp8):
    q, cache, *_ = decode_args(Rand(BF16), (20,), 2, 8, 1, 128, 16, fp8)
    assert serves(q, *cache)
    assert not serves(q.float(), *cache) and serves(q.repeat(1, 2, 1, 1), *cache) == fp8
    assert not serves(q[..., :64], *cache) and not serves(q.flatten()[4:].view(-1, 1, 1, 4), *cache)
    assert not serves(q, *(x if x is None else x[:, :8] for x in cache)) and fp8 or not serves(q.half(), *cache)


@on_host
def test_a_debug_build_checks_lengths_and_pages():
    C = load()
    q, cache, table, lengths, scale = decode_args(Rand(BF16), (40, 17), 1, 4, 2, 128, 16)
    for wrong in (49, -1):
        with pytest.raises(RuntimeError, match="__trap"):
            decode(C, (q, cache, table, torch.tensor([40, wrong], dtype=torch.int32), scale), 2)
    for wrong in (6, -1):
        with pytest.raises(RuntimeError, match="__trap"):
            decode(C, (q, cache, table.clone().index_fill_(1, torch.tensor(1), wrong), lengths, scale), 2)


FILE, MMA = "attention/attention_decode.cu", "attention/mma.cuh"
BROKEN = {  # name: (check that must fail, right, wrong)
    "values past the end": (check_decode, "key(step) + at < used ? *", "true ? *"),
    "one more key": (check_decode, "min(length - n + r / G,", "min(length - n + 1 + r / G,"),
    "no barrier before the warps' parts are read": (
        check_decode, "__syncthreads();\n            const int64_t to", "const int64_t to"),
    "keys of a pair swapped": (check_decode, "0x7632 : 0x5410", "0x3276 : 0x1054"),
    "a neighbour's scale": (check_decode, "k_scale[t][i % 2] * scale_log2", "k_scale[t][i / 2] * scale_log2"),
    "values unscaled": (check_decode, "x *= v_scale[i / 2][i % 2];", ";"),
    "two pieces in a slot": (check_decode, "int64_t{blockIdx.x + seq}", "int64_t{blockIdx.x}"),
    "the last piece left out": (check_decode, "(begin + tiles - 1) / share + 1", "(begin + tiles - 1) / share"),
    "one warp's sums": (check_decode, "y[i] += sums[w][threadIdx.x * 8 + i]", "y[i] = sums[w][threadIdx.x * 8 + i]"),
    "a run starts late": (check_many_sequences, "begin += past ? skipped : 0;", "begin += 0 * skipped;"),
    "the first 32 only": (check_many_sequences, "if (past < 32) return;", "return;"),
    "the first 32 pages again": (check_a_long_sequence, "if (step % 32 == 0)", "if (step == 0)"),
    "what was summed does not shrink": (check_rising_scores, "total[r] *= shrink;", "total[r] *= 1;"),
    "values do not shrink": (check_rising_scores, "o[i][2 * r] *= shrink,", ""),
    "the maximum of half the keys": (
        check_rising_scores, "larger = fmaxf(larger, __shfl_xor_sync(~0u, larger, 2));", ""),
    "pieces of equal weight": (check_rising_scores, "exp2f(lse[int64_t{p} * rows] - largest)", "1"),
    "a NaN outdone": (check_nan, "x = exp2f(x - base);", "x = fmaxf(exp2f(x - base), 0.f);"),
}  # fmt: skip


@on_host
@pytest.mark.parametrize("name", BROKEN)
def test_broken(name, monkeypatch):
    monkeypatch.setenv("LING_HOST_SEED", "1")
    check, *patch = BROKEN[name]
    broken = load((FILE, *patch))
    with pytest.raises((AssertionError, RuntimeError)):
        check(broken)


@on_host
@pytest.mark.skipif(SANITIZE, reason="starts its own")
@pytest.mark.parametrize("name", [None, "pages past the table"])
def test_sanitizer(name):
    from tests.test_host import sanitized

    module = "from tests.test_csrc_attention_decode import *"
    if name is None:
        result = sanitized(f"{module}; [check(load()) for check in CHECKS]")
        assert result.returncode == 0, result.stderr
        return
    patch = FILE, "mine < stop ? cache.table", "true ? cache.table"
    result = sanitized(f"{module}; check_nan(load({patch!r}))")
    assert result.returncode != 0 and "AddressSanitizer" in result.stderr, result.stderr
