"""csrc/'s attention kernels on the virtual GPU."""

import pytest
import torch

from ling_kernels.op import round_up
from ling_kernels.ops.attention import attention_ref
from ling_kernels.ops.qk_norm_attention import qk_norm_attention_ref
from tests.cases import Rand
from tests.gpu.build import load, missing

if missing():
    pytest.skip(f"csrc/ needs {missing()} to run on the virtual GPU", allow_module_level=True)

pytestmark = pytest.mark.usefixtures("schedule")
C = load()
BF16 = torch.bfloat16
PLAIN = None, None, None, None, 0.0  # without norm and rotation of q

# lengths of queries and of keys, heads, KV heads, causal
PACKED = [
    ([5], [5], 2, 1, True),
    ([128], [128], 1, 1, True),
    ([300], [300], 2, 2, True),
    ([3, 0, 130, 17], [3, 0, 130, 17], 4, 2, True),
    ([20, 150, 1, 0], [300, 40, 128, 7], 2, 1, True),
    ([20, 150, 1, 0], [300, 40, 128, 0], 2, 1, False),
    ([1] * 40, [2] * 40, 1, 1, True),
    ([4, 4], [0, 9], 1, 1, True),
]


def bounds(lengths):
    return torch.tensor([0, *lengths]).cumsum(0).int()


def check_packed(C, which=PACKED):
    """Outputs of packed sequences equal the reference's."""
    for queries, keys, Hq, Hkv, causal in which:
        rand = Rand(BF16)
        cu_q, cu_k = bounds(queries), bounds(keys)
        q, k, v = (rand.data(int(cu[-1]), h, 128) for cu, h in ((cu_q, Hq), (cu_k, Hkv), (cu_k, Hkv)))
        out, lse = torch.full_like(q, -7), torch.full((Hq, len(q)), -7.0)
        C.attention_fwd(q, k, v, cu_q, cu_k, out, lse, causal, 0.11, *PLAIN)
        want, want_lse = attention_ref(q, k, v, cu_q, cu_k, causal, 0.11)
        error = (out.float() - want.float()).abs().max().item()
        assert error <= 2**-6 * want.float().abs().max().item(), (queries, keys, error)
        torch.testing.assert_close(lse, want_lse, rtol=1e-5, atol=1e-5)


def check_neighbours(C):
    """NaN in another sequence's keys and values reaches no query."""
    rand = Rand(BF16)
    lengths = [140, 10, 33]
    cu = bounds(lengths)
    q, k, v = rand.data(183, 2, 128), rand.data(183, 1, 128), rand.data(183, 1, 128)
    k[140:150], v[140:150] = torch.nan, torch.nan
    out, lse = torch.empty_like(q), torch.empty(2, 183)
    C.attention_fwd(q, k, v, cu, cu, out, lse, True, 0.11, *PLAIN)
    want, _ = attention_ref(q[:140], k[:140], v[:140], cu[:2], None, True, 0.11)
    assert (out[:140].float() - want.float()).abs().max() <= 2**-6 * want.float().abs().max()
    assert out[150:].isfinite().all() and out[140:150].isnan().all()


def check_bwd(C, which=PACKED):
    for queries, keys, Hq, Hkv, causal in which:
        if not (sum(queries) and sum(keys)):
            continue
        rand = Rand(BF16)
        cu_q, cu_k = bounds(queries), bounds(keys)
        q, k, v = (rand(int(cu[-1]), h, 128) for cu, h in ((cu_q, Hq), (cu_k, Hkv), (cu_k, Hkv)))
        dout = rand.data(*q.shape)
        out, lse = attention_ref(q, k, v, cu_q, cu_k, causal, 0.11)
        want = torch.autograd.grad(out, (q, k, v), dout)
        got = [torch.full_like(x, -7).detach() for x in (q, k, v)]
        scratch = torch.full((2, Hq, round_up(len(q), 4)), torch.nan)
        q, k, v, out = (x.detach() for x in (q, k, v, out))
        C.attention_bwd(dout, q, k, v, out, lse, cu_q, cu_k, *got, causal, 0.11, scratch)
        for name, mine, right in zip(("dq", "dk", "dv"), got, want, strict=True):
            error = (mine.float() - right.float()).abs().max().item()
            assert error <= 2**-6 * right.float().abs().max().item(), (name, queries, keys, error)


def check_neighbours_bwd(C):
    rand = Rand(BF16)
    lengths = [140, 10, 33]
    cu = bounds(lengths)
    q, k, v = rand(183, 2, 128), rand(183, 1, 128), rand(183, 1, 128)
    dout = rand.data(183, 2, 128)
    out, lse = attention_ref(q, k, v, cu, cu, True, 0.11)
    want = torch.autograd.grad(out, (q, k, v), dout)
    q, k, v, out = (x.detach().clone() for x in (q, k, v, out))
    for x in (q, k, v, out, dout):
        x[140:150] = torch.nan
    lse[:, 140:150] = torch.nan
    got = [torch.empty_like(x) for x in (q, k, v)]
    C.attention_bwd(dout, q, k, v, out, lse, cu, cu, *got, True, 0.11, torch.empty(2, 2, 184))
    for mine, right in zip(got, want, strict=True):
        for rows in (slice(0, 140), slice(150, 183)):
            assert (mine[rows].float() - right[rows].float()).abs().max() <= 2**-6 * right.float().abs().max()


def check_norm(C):
    """The kernel norms and rotates q, which lies in wider rows; int64 and int32 positions."""
    rand = Rand(BF16)
    for lengths, int_type, w_type in (([5, 130], torch.int64, BF16), ([70], torch.int32, torch.float32)):
        cu, T = bounds(lengths), sum(lengths)
        qkv, q_weight, k_weight = rand.data(T, 4, 128), *(rand.data(128, dtype=w_type) for _ in range(2))
        cos, sin = (t[:, :32].contiguous() for t in rand.data(2, 200, 64, dtype=torch.float32))
        positions = torch.cat([torch.arange(n) + 7 for n in lengths]).to(int_type)
        rotation = q_weight, cos, sin, positions
        want, want_lse = qk_norm_attention_ref(qkv, q_weight, k_weight, *rotation[1:], 1, cu, True, 0.11, 0.1)
        k, out, lse = torch.empty(T, 1, 128, dtype=BF16), torch.empty(T, 2, 128, dtype=BF16), torch.empty(2, T)
        C.qk_norm_rope_fwd(qkv, q_weight, k_weight, *rotation[1:], None, None, k, *[None] * 3, 0.1)
        C.attention_fwd(qkv[:, :2], k, qkv[:, 3:], cu, None, out, lse, True, 0.11, *rotation, 0.1)
        assert (out.float() - want.float()).abs().max() <= 2**-5 * want.float().abs().max()
        torch.testing.assert_close(lse, want_lse, rtol=1e-2, atol=1e-2)


CHECKS = [check_packed, check_neighbours, check_norm, check_bwd, check_neighbours_bwd]


@pytest.mark.parametrize("check", CHECKS, ids=lambda f: f.__name__[6:])
def test_correct(check):
    check(C)


@pytest.mark.parametrize("schedule", [0], indirect=True)
@pytest.mark.parametrize("wrong", [(0, 4), (1, 6), (0, 4, 3, 6), (0, 9), (0, -2, 6)])
@pytest.mark.parametrize("keys", [False, True])
def test_a_debug_build_checks_bounds(wrong, keys):
    q, k = Rand(BF16).data(6, 2, 128), Rand(BF16).data(6, 1, 128)
    wrong = torch.tensor(wrong, dtype=torch.int32)
    good = torch.linspace(0, 6, len(wrong)).int()
    cu = (good, wrong) if keys else (wrong, good)
    C = load(debug="attention")
    out, lse, dk = torch.zeros_like(q), torch.zeros(2, 6), torch.zeros_like(k)
    with pytest.raises(RuntimeError, match="trap"):
        C.attention_fwd(q, k, k, *cu, out, lse, True, 0.11, *PLAIN)
    with pytest.raises(RuntimeError, match="trap"):
        C.attention_bwd(q, q, k, k, out, lse, *cu, q.clone(), dk, dk.clone(), True, 0.11, torch.zeros(2, 2, 8))
