"""The routing kernels of csrc/ on the virtual GPU: values, bits, untouched memory."""

import pytest
import torch

from ling_kernels.backend import force
from ling_kernels.ops.balance_bias import balance_bias_ref
from ling_kernels.ops.dispatch import dispatch_ref
from ling_kernels.ops.permute import permute_quantize, permute_quantize_ref
from ling_kernels.ops.quantize import empty_fp8
from ling_kernels.ops.route import route_ref
from ling_kernels.ops.unpermute import unpermute_ref
from tests.cases import Rand, counts_of, owned, plan_of, poison
from tests.gpu.build import load, missing

if missing():
    pytest.skip(f"csrc/ needs {missing()} to run on the virtual GPU", allow_module_level=True)

C = load()
BF16, FP16, FP32, I32 = torch.bfloat16, torch.float16, torch.float32, torch.int32


def check_route(C):
    """Both sizes; partial blocks, masks, strides; counts begin as garbage."""
    rand = Rand(FP32)
    for T, E, sizes in ((0, 256, (8, 4, 8)), (53, 256, (8, 4, 8)), (37, 16, (4, 2, 4))):
        padded, bias, mask = rand.data(T, E + 4), rand.data(E) / 10, rand.bools(T)
        few = rand.ints(-1, 2, T, E).float()  # ties in nearly every choice
        bad = rand.data(T, E).where(rand.bools(T, E), rand.ints(0, 2, T, E).div(0))  # NaN and inf
        for logits, masked in ((padded[:, :E], None), (few, mask), (bad, None)):
            check_route_one(C, logits, bias if logits is not few else torch.zeros(E), masked, *sizes)
        bias[::7], bias[3], bias[E // 2] = torch.nan, torch.inf, -torch.inf
        check_route_one(C, bad, bias, mask, *sizes)


def check_route_many(C):
    """More tokens than warps."""
    rand = Rand(FP32)
    check_route_one(C, rand.data(2300, 256), torch.zeros(256), rand.bools(2300), 8, 4, 8)


def check_route_one(C, logits, bias, mask, groups, group_topk, topk):
    T, E = logits.shape
    *want, _ = route_ref(logits, bias, mask, groups, group_topk, topk, 2.5, 0.5)
    for with_lse in (False, True):
        experts, weights = torch.full((T, topk), -7, dtype=I32), torch.full((T, topk), 7.0)
        counts, lse = torch.full((E,), 1000, dtype=I32), torch.full((T,), 7.0) if with_lse else None
        as_u8 = mask if mask is None else mask.view(torch.uint8)
        C.route_fwd(logits, bias, as_u8, experts, weights, counts, lse, groups, group_topk, topk, 2.5)
        assert torch.equal(experts, want[1]) and torch.equal(counts, want[2])
        torch.testing.assert_close(weights, want[0], rtol=1e-6, atol=0, equal_nan=True)
        if with_lse:
            lse_ref = logits.logsumexp(1) if mask is None else logits.logsumexp(1).masked_fill(~mask, 0)
            torch.testing.assert_close(lse, lse_ref, rtol=1e-6, atol=1e-6, equal_nan=True)


def check_route_bwd(C):
    rand = Rand(FP32)
    for T, E, topk in ((0, 256, 8), (21, 256, 8), (9, 132, 5), (3, 16, 16)):
        logits, dweights, dlse = rand.data(T, E + 4)[:, :E], rand.data(T, topk), rand.data(T)
        mask, bias = rand.bools(T), torch.zeros(E)
        x = logits.double().requires_grad_()
        weights, experts, _ = route_ref(x, bias.double(), mask, 1, 1, topk, 2.5)
        lse = x.logsumexp(1).masked_fill(~mask, 0)
        for with_lse in (False, True):
            outs = [weights, lse] if with_lse else [weights]
            (want,) = torch.autograd.grad(outs, x, [dweights.double(), dlse.double()][: len(outs)], retain_graph=True)
            got = torch.full((T, E), torch.nan)
            more = (lse.detach().float(), nan_where(~mask, dlse)) if with_lse else (None, None)
            C.route_bwd(nan_where(~mask, logits), experts, nan_where(~mask, dweights), *more, got, 2.5)
            torch.testing.assert_close(got, want.float(), rtol=1e-5, atol=1e-6)
            assert with_lse or (got != 0).sum() <= mask.sum() * topk


def nan_where(rows, x):
    """x with NaN in some rows, which nothing may read."""
    return x.index_fill(0, rows.nonzero()[:, 0], torch.nan)


def check_balance(C):
    rand = Rand(FP32)
    for E, dtype in ((1, I32), (3, torch.int64), (256, I32), (300, torch.int64)):
        counts = rand.ints(0, 9, E, dtype=dtype) + (0 if dtype == I32 else 1 << 40)
        bias = rand.data(E)
        want = bias.clone()
        balance_bias_ref(want, counts, 0.1)
        C.balance_bias_fwd(bias, counts, 0.1)
        assert torch.equal(bias, want)


def check_dispatch(C):
    """One block and several, whole and partial warps, tiles of one step and of two, experts without tokens."""
    rand = Rand(FP32)
    for T, topk, E, rows in ((0, 2, 4, 0), (1, 1, 1, 0), (67, 3, 8, 0), (5, 8, 256, 0), (70, 9, 512, 5), (650, 2, 5, 5),
                             (700, 2, 3, 2), (20, 2, 0, 0)):  # fmt: skip
        experts = rand.ints(-1, E, T, topk)
        counts = counts_of(experts, E)
        before = torch.full((rows, E), 999, dtype=I32) if rows else None
        slot, source = torch.full((T, topk), -7, dtype=I32), torch.full((T * topk,), -7, dtype=I32)
        offsets, padded = torch.full((E + 1,), -7, dtype=I32), torch.full((E + 1,), -7, dtype=I32)
        C.dispatch_fwd(experts, counts, before, offsets, slot, source, padded)
        for got, want in zip((offsets, slot, source, padded), dispatch_ref(experts, counts), strict=True):
            assert torch.equal(got, want)


def unpermute_args():
    """Rows of whole vectors and of none, shorter and longer than a block; more choices than load at once."""
    for T, E, topk, H, dtype, routing in ((0, 4, 2, 8, FP32, ""), (19, 8, 3, 33, BF16, "masked"),
                                          (9, 16, 9, 24, FP16, ""), (7, 4, 2, 1100, FP32, "masked"),
                                          (9, 8, 8, 264, BF16, "masked"), (5, 3, 2, 8, FP32, "one")):  # fmt: skip
        rand = Rand(dtype)
        plan = plan_of(rand, T, E, topk, routing)
        y, weights = poison(rand(T * topk, H), plan.offsets), rand.fp32(T, topk)
        yield plan, y, weights, rand.data(T, H)


def misaligned(x):
    """A copy of x that starts one element after a multiple of 16 bytes."""
    return torch.cat([x.new_zeros(1), x.detach().flatten()])[1:].view(x.shape)


def check_unpermute(C):
    for plan, y, weights, dout in unpermute_args():
        for w in (weights, None):
            out = torch.full_like(dout, torch.nan)
            poisoned = w if w is None else w.detach().masked_fill(plan.slot < 0, torch.nan)
            C.gather_sum(y.detach(), poisoned, plan.slot, out)
            assert torch.equal(out, unpermute_ref(y, plan, w).detach())
        odd = misaligned(torch.full_like(dout, torch.nan))
        C.gather_sum(misaligned(y), None, plan.slot, odd)
        assert torch.equal(odd, out)


def check_unpermute_bwd(C):
    for plan, y, weights, dout in unpermute_args():
        want, want_weights = torch.autograd.grad(unpermute_ref(y, plan, weights), (y, weights), dout)
        for dots in (True, False):
            dy, dweights = torch.full_like(y, torch.nan), torch.full_like(weights, torch.nan) if dots else None
            y_or_none = y.detach() if dots else None
            poisoned = nan_where((plan.slot < 0).all(1), dout), weights.detach().masked_fill(plan.slot < 0, torch.nan)
            C.scatter_rows(*poisoned, y_or_none, plan.offsets, plan.slot, dy.detach(), dweights)
            assert torch.equal(dy, want)
            if dots:
                torch.testing.assert_close(dweights, want_weights, rtol=1e-5, atol=1e-4)
        # permute: rows that no token owns are left alone
        rows, last = torch.full_like(y, 7.0).detach(), int(plan.offsets[-1])
        C.scatter_rows(dout, None, None, None, plan.slot, rows, None)
        token = plan.source.long() // max(plan.slot.shape[1], 1)
        assert torch.equal(rows[:last], dout[token[:last]]) and (rows[last:] == 7).all()
        odd = misaligned(torch.full_like(rows, 7.0))
        C.scatter_rows(misaligned(dout), None, None, None, plan.slot, odd, None)
        assert torch.equal(odd, rows)


def check_permute_quantize(C):
    for T, E, topk, H, dtype, routing in ((0, 4, 2, 128, BF16, ""), (37, 4, 3, 384, BF16, "masked"),
                                          (9, 32, 17, 128, FP32, ""), (5, 8, 8, 2048, FP16, "")):  # fmt: skip
        rand = Rand(dtype)
        plan = plan_of(rand, T, E, topk, routing)
        x = rand.data(T, H + 8)[:, :H]
        x.view(-1)[:0] if not T else x[0].fill_(0)
        if T > 2:
            x[1, 5], x[2, 7], x[2, 120:] = torch.nan, torch.inf, 1e-38
        for pow2 in (False, True):
            out = empty_fp8(x, T * topk, H, True, False, None)[:2]
            out[0].view(torch.uint8).fill_(77)
            out[1].fill_(77)
            C.permute_quantize_fwd(x, plan.slot, *out, plan.offsets, plan.source, pow2)
            want = owned(list(permute_quantize_ref(x, plan, pow2=pow2)), [plan])
            for g, w in zip(owned(list(out), [plan]), want, strict=True):
                nan = w.float().isnan()
                assert torch.equal(g.float().isnan(), nan)
                assert torch.equal(g.float().masked_fill(nan, 0), w.float().masked_fill(nan, 0))
            last = int(plan.offsets[-1])
            assert (out[0][last:].view(torch.uint8) == 77).all() and (out[1][last:] == 77).all()


CHECKS = [check_route, check_route_many, check_route_bwd, check_balance, check_dispatch, check_unpermute,
          check_unpermute_bwd, check_permute_quantize]  # fmt: skip


@pytest.mark.parametrize("check", CHECKS, ids=lambda f: f.__name__[6:])
def test_correct(check, schedule):
    check(C)


def test_more_tokens_than_a_warp_turns_into_weights_at_once():
    check_route_one(C, Rand(FP32).data(17000, 16), torch.zeros(16), None, 4, 2, 4)


def test_misaligned_tokens_are_quantised():
    rand = Rand(BF16)
    plan, x = plan_of(rand, 5, 4, 2), misaligned(rand.data(5, 256))
    with force("cuda"):
        got = permute_quantize(x, plan)
    for g, w in zip(got, permute_quantize_ref(x, plan), strict=True):
        assert torch.equal(g.float(), w.float())


def test_refused():
    logits, bias = torch.randn(4, 256), torch.zeros(256)
    experts, weights, counts = torch.empty(4, 8, dtype=I32), torch.empty(4, 8), torch.empty(256, dtype=I32)
    with pytest.raises(ValueError, match="expects sizes_have_a_kernel"):
        C.route_fwd(logits, bias, None, experts, weights, counts, None, 4, 4, 8, 2.5)
    with pytest.raises(ValueError, match="expects vectors"):
        shifted = torch.randn(4, 260)[:, 1:257]
        C.route_fwd(shifted, bias, None, experts, weights, counts, None, 8, 4, 8, 2.5)
    with pytest.raises(ValueError, match="expects .*E <= kThreads"):
        many = torch.empty(513, dtype=I32)
        C.dispatch_fwd(experts, many, None, torch.empty(514, dtype=I32), experts, torch.empty(32, dtype=I32),
                       torch.empty(514, dtype=I32))  # fmt: skip
    with pytest.raises(ValueError, match="expects S == T"):
        C.scatter_rows(logits, None, None, None, experts, logits, None)
