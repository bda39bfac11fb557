"""Properties of attention on every backend, and calls that must raise. cases.py covers values and gradients."""

import math

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks

from ling_kernels import attention, attention_decode, qk_norm_attention, qk_norm_attention_decode, qk_norm_rope
from ling_kernels.backend import force
from ling_kernels.nn.attention import Attention, BatchLayout
from ling_kernels.ops.attention import attention_bwd, attention_fwd, config, max_tiles
from ling_kernels.ops.attention_decode import KVCache
from ling_kernels.ops.qk_norm_attention import QKNormAttention, qk_norm_attention_ref
from ling_kernels.ops.rope_tables import rope_tables
from tests.cases import DEVICE, Rand, cu_seqlens, norm_decode_args, qk_norm_rope_args, runs
from tests.graphs import replayed_side_by_side
from tests.test_ops import same_bits as equal_bits

BF16, FP32 = torch.bfloat16, torch.float32
BACKENDS = [pytest.param(b, marks=() if runs(b) else pytest.mark.skip(f"{b} cannot run here")) for b in
            ("torch", "triton", "cuda")]  # fmt: skip
kernels = pytest.mark.skipif(not runs("triton"), reason="triton cannot run here")


def same_bits(a, b):
    return len(a) == len(b) and all(map(equal_bits, a, b))


def qkv_of(T, Hq=4, Hkv=2, D=16, dtype=BF16, seed=0):
    rand = Rand(dtype, seed)
    return rand(T, Hq, D), rand(T, Hkv, D), rand(T, Hkv, D)


def positions_of(*lens):
    return torch.cat([torch.arange(n, device=DEVICE) for n in lens])


def fused_args(lens, dtype=BF16, Hq=4, Hkv=2, D=16, R=8, seed=0):
    """Arguments of qk_norm_attention up to cu_seqlens."""
    rand, T = Rand(dtype, seed), sum(lens)
    tables = rope_tables(max(*lens, 1), R, 1e4, device=DEVICE)
    return rand(T, Hq + 2 * Hkv, D), rand(D), rand(D), *tables, positions_of(*lens), Hkv, cu_seqlens(lens)


@pytest.mark.parametrize("D", [16, 128])
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_packed_batch_is_its_sequences_one_by_one(backend, D):
    lens = (7, 1, 0, 130, 33)
    with force(backend):
        packed = qkv_of(sum(lens), 2, 1, D)
        got = attention(*packed, cu_seqlens(lens))
        grads = torch.autograd.grad(got[0].float().square().sum(), packed)
        at = 0
        for n in lens:
            one = [x.detach()[at : at + n].clone().requires_grad_() for x in packed]
            out, lse = attention(*one, cu_seqlens((n,)))
            alone = torch.autograd.grad(out.float().square().sum(), one)
            assert same_bits((got[0][at : at + n], got[1][:, at : at + n]), (out, lse))
            assert same_bits([g[at : at + n] for g in grads], alone)
            at += n


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_packed_qkv_is_its_sequences_one_by_one(backend):
    lens = (7, 1, 0, 130, 33)
    with force(backend):
        qkv, *rest = fused_args(lens, Hq=2, Hkv=1)
        out, lse = qk_norm_attention(qkv, *rest)
        (grad,) = torch.autograd.grad(out.float().square().sum(), qkv)
        at = 0
        for n in lens:
            one, rows = qkv.detach()[at : at + n].clone().requires_grad_(), slice(at, at + n)
            args = one, *rest[:4], rest[4][rows], rest[5], cu_seqlens((n,))
            out1, lse1 = qk_norm_attention(*args)
            (grad1,) = torch.autograd.grad(out1.float().square().sum(), one)
            assert same_bits((out[rows], lse[:, rows], grad[rows]), (out1, lse1, grad1))
            at += n


@pytest.mark.parametrize("which", range(3))
@pytest.mark.parametrize("backend", BACKENDS)
def test_one_of_q_k_and_v_need_not_be_aligned(backend, which):
    """Triton loads such a tensor in another way than its neighbours, and must still wait for all of them."""
    tensors = qkv_of(40, D=128)
    apart = [torch.cat([x.new_zeros(3), x.detach().flatten()])[3:].view(x.shape) for x in tensors]
    apart = [x if i == which else y.detach() for i, (x, y) in enumerate(zip(apart, tensors, strict=True))]
    results = []
    with force(backend):
        for heads in (tensors, [x.requires_grad_() for x in apart]):
            out, lse = attention(*heads, cu_seqlens((33, 7)))
            results.append((out, lse, *torch.autograd.grad(out.float().square().sum(), heads)))
    torch.testing.assert_close(*results, rtol=2e-2, atol=2e-2)


@kernels
@pytest.mark.parametrize("T", [1, 63, 64, 127, 128])
def test_one_token_more_changes_no_bit_before_it(T):
    q, k, v = (x.detach() for x in qkv_of(T + 1, 2, 1, 32))
    qkv, *rest = (x.detach() if isinstance(x, torch.Tensor) else x for x in fused_args((T + 1,), Hq=2, Hkv=1))
    with force("triton"):
        longer = attention(q, k, v, cu_seqlens((T + 1,)))
        shorter = attention(q[:T], k[:T], v[:T], cu_seqlens((T,)))
        assert same_bits((longer[0][:T], longer[1][:, :T]), shorter)
        longer = qk_norm_attention(qkv, *rest)
        shorter = qk_norm_attention(qkv[:T], *rest[:4], rest[4][:T], 1, cu_seqlens((T,)))
        assert same_bits((longer[0][:T], longer[1][:, :T]), shorter)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_later_tokens_values_change_no_bit_before_it(backend):
    q, k, v = (x.detach() for x in qkv_of(150, 2, 1, 128))
    with force(backend):
        before, lse_before = attention(q, k, v, cu_seqlens((150,)))
        k[140:], v[140:] = 1e4, -1e4
        after, lse_after = attention(q, k, v, cu_seqlens((150,)))
    assert same_bits((before[:140], lse_before[:, :140]), (after[:140], lse_after[:, :140]))
    assert not torch.equal(before[140], after[140])


@pytest.mark.parametrize("one_launch", [False, True])
@pytest.mark.parametrize("dtype", [FP32, BF16])
@pytest.mark.parametrize("backend", BACKENDS)
def test_prefill_then_decode_is_one_prefill(backend, dtype, one_launch):
    """Two sequences: prefill, then steps of three tokens and of one, equal one prefill of all tokens up to rounding."""
    lens, steps, Hq, Hkv, D, page = (19, 6), (3, 1), 4, 2, 128, 16
    new = sum(steps)
    qkv, *norms = fused_args([n + new for n in lens], dtype, Hq, Hkv, D, 64)
    qkv, norms = qkv.detach(), [x.detach() for x in norms[:4]]
    cache = KVCache(*(torch.full((6, page, Hkv, D), torch.nan, dtype=dtype, device=DEVICE) for _ in range(2)))
    table = torch.tensor([[4, 1, 5], [2, 0, 3]], dtype=torch.int32, device=DEVICE)
    rows = qkv.split([n + new for n in lens])

    def step(begins, ends):
        """q of rows begins[b] : ends[b] of each sequence; writes their keys and values into the cache."""
        spans = [torch.arange(a, b, device=DEVICE) for a, b in zip(begins, ends, strict=True)]
        slots = torch.cat([pages[at // page].long() * page + at % page for pages, at in zip(table, spans, strict=True)])
        packed = torch.cat([r[a:b] for r, a, b in zip(rows, begins, ends, strict=True)])
        return qk_norm_rope(packed, *norms, torch.cat(spans), Hkv, cache=cache, slots=slots)

    with force(backend):
        want, _ = qk_norm_attention(qkv, *norms, positions_of(*(n + new for n in lens)), Hkv,
                                    cu_seqlens([n + new for n in lens]))  # fmt: skip
        first, _ = attention(*step((0, 0), lens), cu_seqlens(lens))
        got = [[part] for part in first.split(lens)]
        done = list(lens)
        for n in steps:
            ends = [d + n for d in done]
            lengths = torch.tensor(ends, dtype=torch.int32, device=DEVICE)
            if one_launch:
                batch = torch.stack([r[a:b] for r, a, b in zip(rows, done, ends, strict=True)])
                out = qk_norm_attention_decode(batch, *norms, cache, table, lengths)
            else:
                q, _, _ = step(done, ends)
                out = attention_decode(q.unflatten(0, (2, n)), cache, table, lengths)
            for b, part in enumerate(out):
                got[b].append(part)
            done = ends
    got = torch.cat([torch.cat(parts) for parts in got])
    tolerance = 2**-6 if dtype == BF16 else 1e-5
    torch.testing.assert_close(got.float(), want.float(), rtol=tolerance, atol=tolerance)


@kernels
def test_queries_are_normed_and_rotated_as_qk_norm_rope_does_it():
    """Up to the last bit of a few elements."""
    args = fused_args((70, 9), Hq=4, Hkv=2, D=64, R=32)

    def run(fn):
        out, lse = fn(*args, eps=0.1)
        return [out, lse, *torch.autograd.grad(out.float().square().sum(), args[:3])]

    def two_ops(*args, eps):
        return attention(*qk_norm_rope(*args[:-1], eps=eps), args[-1])

    with force("triton"):
        got, composed = run(qk_norm_attention), run(two_ops)
    want = run(qk_norm_attention_ref)
    for a, b, w in zip(got, composed, want, strict=True):
        assert a.dtype == b.dtype and (a.float() - b.float()).norm() <= 2**-9 * w.float().norm()
    assert (got[0] == want[0]).float().mean() > 0.97


@kernels
def test_only_one_qkv_is_saved_for_backward():
    saved = {}

    def save(x):
        saved[x.data_ptr()] = x.untyped_storage().nbytes()
        return x

    args = fused_args((40,), Hq=8, Hkv=2, D=32)
    with force("triton"), saved_tensors_hooks(save, lambda x: x):
        out, lse = qk_norm_attention(*args)
    tensors = [a for a in args if isinstance(a, torch.Tensor)]
    assert sum(saved.values()) <= sum(x.untyped_storage().nbytes() for x in (*tensors, out, lse))
    assert args[0].data_ptr() in saved


@pytest.mark.parametrize("backend", BACKENDS)
def test_bounds_may_be_strided(backend):
    q, k, v = (x.detach() for x in qkv_of(40, 2, 1, 128))
    cu = cu_seqlens((7, 33))
    strided = torch.stack([cu, cu + 1], 1)[:, 0]
    with force(backend):
        assert same_bits(attention(q, k, v, strided, strided.clone()), attention(q, k, v, cu, cu.clone()))


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_keys_at_all_give_zero_and_no_gradient(backend):
    q, k, v = qkv_of(5, 2, 1, 128)
    with force(backend):
        out, lse = attention(q, k[:0], v[:0], cu_seqlens((5,)), cu_seqlens((0,)))
        grads = torch.autograd.grad(out.sum(), (q, k, v))
    assert not out.any() and lse.isneginf().all() and not any(g.any() for g in grads)


@kernels
def test_the_module_trains_through_it():
    torch.manual_seed(0)
    lens = (20, 13)
    layer = Attention(48, 4, 2, 32, eps=0.1).to(DEVICE)
    rows = BatchLayout(*rope_tables(20, 16, 1e4, device=DEVICE), positions_of(*lens), cu_seqlens(lens))
    x = torch.randn(33, 48, device=DEVICE, requires_grad=True)
    results, saved = [], []
    for backend in ("torch", "triton"):
        sizes = []
        with force(backend), saved_tensors_hooks(lambda t, sizes=sizes: sizes.append(t.numel()) or t, lambda t: t):
            out = layer(x, rows)
        with force(backend):
            results.append([out, *torch.autograd.grad(out.sin().sum(), [x, *layer.parameters()])])
        saved.append(sum(sizes))
    for got, want in zip(results[1], results[0], strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
    assert saved[1] < saved[0]


@kernels
def test_a_position_past_the_table_is_nan():
    """On a GPU, where the host does not check positions: queries that see the token are NaN, and no others."""
    qkv, *rest = fused_args((5, 4), FP32)
    rest[4][2] = 99
    with force("triton"):
        out, _ = QKNormAttention.apply(qkv, *rest, True, 0.3, 0.1)
    assert out[2:5].isnan().all() and out[:2].isfinite().all() and out[5:].isfinite().all()


@kernels
@pytest.mark.parametrize("bounds", [(0, 4), (1, 6), (0, 4, 3, 6), (0, 9), (0, -2, 6)])
@pytest.mark.parametrize("keys", [False, True])
def test_bounds_that_do_not_fit_give_nan_on_a_gpu(bounds, keys):
    """On a GPU the host does not check cu_seqlens. Kernels write all of the results, and nothing outside them."""
    q, k, v = (x.detach() for x in qkv_of(6, 2, 1, 16))
    bad = torch.tensor(bounds, dtype=torch.int32, device=DEVICE)
    good = torch.linspace(0, 6, len(bounds), device=DEVICE).int()
    cu_q, cu_k = (good, bad) if keys else (bad, None)
    out, lse = torch.zeros_like(q), torch.zeros(2, 6, device=DEVICE)
    grads = [torch.zeros_like(x) for x in (q, k, v)]
    with force("triton"):
        attention_fwd(q, k, v, cu_q, cu_k, out, lse, True, 0.3, None, None, None, None, 0.0)
        attention_bwd(q, q, k, v, out, lse, cu_q, cu_k, *grads, True, 0.3, torch.empty(2, 2, 8, device=DEVICE))
    assert all(x.isnan().all() for x in (out, lse, *grads))


def test_yarn_scales_the_rotated_half_only():
    """Factor 4 from 32768, through the op: the rotated dims of q grow by 0.1 ln 4 + 1, the others not at all."""
    scaling = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}
    plain, stretched = (rope_tables(131072, 64, 600000.0, s, DEVICE) for s in (None, scaling))
    factor = 0.1 * math.log(4) + 1
    positions = torch.tensor([0, 1, 1000, 32768, 131071], device=DEVICE)
    x, ones = Rand(FP32).data(5, 3, 128), torch.ones(128, device=DEVICE)
    q0, k0, v0 = qk_norm_rope(x, ones, ones, *plain, positions, 1)
    q, k, v = qk_norm_rope(x, ones, ones, *stretched, positions, 1)
    for a, b in ((q0, q), (k0, k)):
        assert same_bits([a[..., 64:]], [b[..., 64:]])
        torch.testing.assert_close(b[..., :64].norm(dim=-1), a[..., :64].norm(dim=-1) * factor)
        torch.testing.assert_close(b[0, :, :64], a[0, :, :64] * factor)
    assert same_bits([v0], [v])
    # Pairs 0 to 12 save their frequency, those from 21 on have a quarter of it.
    fast, slow = slice(0, 13), slice(21, 32)
    for was, now in zip(plain, stretched, strict=True):
        torch.testing.assert_close(now[:2000, fast], was[:2000, fast] * factor)
        torch.testing.assert_close(now[::4, slow], was[:32768, slow] * factor, rtol=1e-4, atol=1e-4)


@pytest.mark.skipif(DEVICE == "cpu", reason="there is no GPU")
def test_in_graphs_and_on_two_streams():
    """Replays, and two graphs side by side: blocks of one may not take tiles of the other."""
    inputs, cu = qkv_of(3000, 16, 4, 128), cu_seqlens((1000, 1700, 300))
    dout = torch.ones_like(inputs[0])

    def run():
        out, lse = attention(*inputs, cu)
        return out, lse, *torch.autograd.grad(out, inputs, dout)

    want = run()
    assert all(same_bits(got, want) for got in replayed_side_by_side(run))


def test_max_tiles_is_an_upper_bound_and_every_dtype_has_tiles():
    for lens in ((), (0,), (1, 1, 1), (127, 1, 130), (64, 64)):
        for block in (16, 64, 128):
            assert max_tiles(sum(lens), len(lens), block) >= sum(-(-n // block) for n in lens)
    for kernel in ("fwd", "fwd_norm", "dq", "dkv"):
        for dtype in (BF16, torch.float16, FP32):
            assert config(kernel, dtype, 132).keys() == config(kernel, dtype, 78).keys()


def wrong_calls():
    rand = Rand(FP32)
    q, k, cu = rand.data(6, 4, 8), rand.data(6, 2, 8), cu_seqlens((6,))
    falls = torch.tensor([0, 4, 3, 6], dtype=torch.int32, device=DEVICE)
    elsewhere = "meta"
    yield "k elsewhere", attention, (q, k.to(elsewhere), k.to(elsewhere), cu)
    yield "cu elsewhere", attention, (q, k, k, cu.to(elsewhere))
    yield "cu_k elsewhere", attention, (q, k, k, cu, cu.to(elsewhere))
    yield "scale 0", attention, (q, k, k, cu, None, True, 0.0)
    yield "float cu", attention, (q, k, k, cu.float())
    yield "3 heads for 2", attention, (q[:, :3], k, k, cu)
    norm = [x.detach() if isinstance(x, torch.Tensor) else x for x in qk_norm_rope_args(rand, 6, 4, 2, 8, 4)[:7]]
    qkv, w, _, cos, sin, positions, _ = norm

    def args(**changed):
        names = (
            "qkv",
            "q_weight",
            "k_weight",
            "cos",
            "sin",
            "positions",
            "num_kv_heads",
            "cu_seqlens",
            "causal",
            "scale",
        )
        return tuple((dict(zip(names, (*norm, cu, True, None), strict=True)) | changed).values())

    wrong = dict(
        qkv=[qkv[0], qkv.int(), qkv[:, :3]], q_weight=[w[:4]], k_weight=[w[None]], num_kv_heads=[0, 3, 4],
        cos=[cos[:, :1], cos.double(), cos.to(elsewhere)], sin=[sin[:3]],
        positions=[positions[:5], positions.float(), positions.to(elsewhere)],
        cu_seqlens=[cu.long(), cu[None], cu[:0], cu[:1], cu.to(elsewhere)], scale=[-1.0],
    )  # fmt: skip
    new = norm_decode_args(rand, (5, 3), 2, 4, 2, 8, 4, 6)
    qkv4, w, _, cos, sin, cache, table, lengths = new[:8]
    wrong_new = dict(
        qkv=[qkv4[0], qkv4.int(), qkv4[:, :, :3], qkv4.repeat(1, 5, 1, 1)], q_weight=[w[:4]], k_weight=[w[None]],
        cos=[cos[:, :1], cos.double(), cos.to(elsewhere)], sin=[sin[:3]], block_table=[table.long(), table[:1]],
        cache=[cache._replace(k=cache.k[..., :4]), cache._replace(k_scale=cache.k)],
        lengths=[lengths.long(), lengths[:1]],
    )  # fmt: skip
    if DEVICE == "cpu":
        wrong_new["lengths"] += [lengths - 4, lengths + 2, lengths + 9]
    for name, values in wrong_new.items():
        for i, value in enumerate(values):
            names = "qkv", "q_weight", "k_weight", "cos", "sin", "cache", "block_table", "lengths"
            yield f"{name} {i}", qk_norm_attention_decode, tuple(
                value if name == other else x for other, x in zip(names, new[:8], strict=True)
            )  # fmt: skip
    if DEVICE == "cpu":
        for bounds in (cu + 1, cu - 1, cu_seqlens((5,)), cu_seqlens((7,)), falls):
            yield f"bounds {bounds.tolist()}", attention, (q, k, k, bounds)
            yield f"bounds of k {bounds.tolist()}", attention, (q, k, k, cu_seqlens((6, 0, 0))[: len(bounds)], bounds)
            wrong["cu_seqlens"].append(bounds)
        wrong["positions"] += [positions - 50, positions + 50]
    for name, values in wrong.items():
        for i, value in enumerate(values):
            yield f"{name} {i}", qk_norm_attention, args(**{name: value})


@pytest.mark.parametrize("backend", [BACKENDS[0], BACKENDS[1]])
@pytest.mark.parametrize("fn, args", [pytest.param(f, a, id=f"{f.__name__}-{name}") for name, f, a in wrong_calls()])
def test_wrong_arguments_raise(fn, args, backend):
    with force(backend), pytest.raises(ValueError, match="expected .*; got"):
        fn(*args)
