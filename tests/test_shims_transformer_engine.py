"""Transformer Engine's names over our ops, against loops over tokens and experts in fp64."""

import pytest
import torch

from ling_kernels import InputError, backend
from ling_kernels.integrations.transformer_engine import (
    fused_topk_with_score_function,
    moe_permute,
    moe_permute_with_probs,
    moe_unpermute,
)
from tests.cases import BF16, FP32, Rand

BACKENDS = ("torch", "triton", "cuda")
T, E, H = 21, 6, 40


def random_map(rand: Rand, dtype) -> torch.Tensor:
    """Tokens with 0 to E experts, and an expert without tokens."""
    chosen = rand.bools(T, E)
    chosen[:, 2], chosen[3], chosen[4] = False, False, torch.arange(E) != 2
    return chosen.to(dtype)


def pairs(chosen: torch.Tensor, num_rows: int) -> list[tuple[int, int]]:
    """(token, expert) of each row: expert by expert, tokens ascending, cut off after num_rows."""
    return [(t, e) for e in range(E) for t in range(T) if chosen[t, e]][:num_rows]


def close(got: torch.Tensor, want: torch.Tensor, dtype) -> None:
    limit = 2**-8 if dtype == BF16 else 1e-6
    assert got.dtype == dtype and torch.isfinite(got).all()
    assert ((got.double() - want).abs() <= limit * (want.abs() + want.abs().max() / 4)).all()


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("dtype", [BF16, FP32])
@pytest.mark.parametrize("rows", ["all", "counted", "dropped", "more"])
def test_permute(name, dtype, rows):
    rand = Rand(dtype)
    chosen = random_map(rand, torch.bool if dtype == BF16 else torch.int32)
    total = int(chosen.sum())
    num = {"all": total, "counted": -1, "dropped": total - 5, "more": total + 7}[rows]
    x, probs = rand(T, H), rand.fp32(T, E)
    with backend.force(name):
        out, permuted, _ = moe_permute_with_probs(x, probs, chosen, num)
        dout, dpermuted = rand.data(*out.shape), rand.data(*permuted.shape, dtype=FP32)
        listed = pairs(chosen, total if num < 0 else num)
        dout[len(listed) :] = torch.nan  # rows that no expert owns
        torch.autograd.backward([out, permuted], [dout, dpermuted])
    assert len(out) == len(permuted) == (total if num < 0 else num)
    token, expert = (torch.tensor(of) for of in zip(*listed, strict=True))
    assert torch.equal(out[: len(listed)], x[token]) and torch.equal(permuted[: len(listed)], probs[token, expert])
    assert not permuted[len(listed) :].any()
    dx = torch.zeros(T, H, dtype=torch.float64).index_add(0, token, dout[: len(listed)].double())
    close(x.grad, dx, dtype)
    dprobs = torch.zeros(T, E)
    dprobs[token, expert] = dpermuted[: len(listed)]
    assert torch.equal(probs.grad, dprobs)
    assert torch.equal(moe_permute(x, chosen, num)[0][: len(listed)], out[: len(listed)])


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("dtype", [BF16, FP32])
@pytest.mark.parametrize("merged", [False, True])
@pytest.mark.parametrize("rows", ["all", "dropped", "more"])
def test_unpermute(name, dtype, merged, rows):
    rand = Rand(dtype, seed=1)
    chosen = random_map(rand, torch.bool)
    num = int(chosen.sum()) + {"all": 0, "dropped": -5, "more": 7}[rows]
    listed = pairs(chosen, num)
    token, expert = (torch.tensor(of) for of in zip(*listed, strict=True))
    y, probs = rand(num, H), rand.fp32(T, E) if merged else None
    with torch.no_grad():
        y[len(listed) :] = torch.nan
    with backend.force(name):
        row_id_map = moe_permute(rand.data(T, H), chosen, num)[1]
        out = moe_unpermute(y, row_id_map, probs, restore_shape=torch.Size((T, H)))
        dout = rand.data(T, H)
        out.backward(dout)
    y64, g64 = y.detach().double()[: len(listed)], dout.double()
    weight = probs.detach().double()[token, expert] if merged else torch.ones(len(listed), dtype=torch.float64)
    close(out, torch.zeros(T, H, dtype=torch.float64).index_add(0, token, weight[:, None] * y64), dtype)
    assert not y.grad[len(listed) :].any()
    close(y.grad[: len(listed)], weight[:, None] * g64[token], dtype)
    if merged:
        dprobs = torch.zeros(T, E, dtype=torch.float64)
        dprobs[token, expert] = (y64 * g64[token]).sum(1)
        close(probs.grad, dprobs, FP32)


def reference_topk(logits, topk, groups, group_topk, scale, bias):
    """Transformer Engine's documented sigmoid router, token by token -> probs and chosen experts."""
    probs, routed = torch.zeros_like(logits), torch.zeros_like(logits, dtype=torch.bool)
    scores = logits.sigmoid()
    for t, row in enumerate(scores):
        choice = row if bias is None else row + bias
        if groups:
            by_group = choice.view(groups, -1)
            best = by_group.topk(topk // group_topk).values.sum(1).topk(group_topk).indices
            keep = torch.zeros(groups, dtype=torch.bool).index_fill(0, best, True)
            choice = by_group.masked_fill(~keep[:, None], -torch.inf).flatten()
        chosen = choice.topk(topk).indices
        weight = row[chosen] / (row[chosen].sum() + 1e-20) if topk > 1 else row[chosen]
        probs[t] = probs[t].index_put((chosen,), weight * (1 if scale is None else scale))
        routed[t, chosen] = True
    return probs, routed


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("dtype", [BF16, FP32])
@pytest.mark.parametrize(
    "topk, groups, group_topk, scale, biased",
    [(4, 4, 2, 2.5, True), (3, None, None, None, False), (1, None, None, 2.0, True), (8, 8, 4, 1.5, True)],
)
def test_topk(name, dtype, topk, groups, group_topk, scale, biased):
    rand = Rand(dtype)
    logits = rand(3, 5, 32 if groups == 8 else 16)
    bias = rand.data(logits.shape[-1], dtype=FP32) if biased else None
    with backend.force(name):
        probs, routed = fused_topk_with_score_function(
            logits, topk, False, groups, group_topk, scale, "sigmoid", bias, routing_map_format=0
        )
        dprobs = rand.data(*probs.shape)
        probs.backward(dprobs)
    wide = logits.detach().double().flatten(0, 1).requires_grad_()
    want, want_routed = reference_topk(wide, topk, groups, group_topk, scale, None if bias is None else bias.double())
    want.backward(dprobs.double().flatten(0, 1))
    assert torch.equal(routed, want_routed.view(logits.shape)) and probs.dtype == logits.dtype
    close(probs, want.detach().view(logits.shape), dtype)
    close(logits.grad, wide.grad.view(logits.shape), dtype)


def test_router_permute_experts_unpermute():
    """The four calls of a Megatron layer together."""
    rand = Rand(FP32)
    x, logits, w = rand(T, H), rand(T, 8), rand(8, H, H)
    probs, routed = fused_topk_with_score_function(logits, 4, False, 4, 2, 2.5, "sigmoid", None)
    rows, weights, row_id_map = moe_permute_with_probs(x, probs, routed, 4 * T)
    parts = rows.split(routed.sum(0).tolist())
    y = torch.cat([part @ w[e] for e, part in enumerate(parts)]) * weights[:, None]
    out = moe_unpermute(y, row_id_map, restore_shape=x.shape)
    out.sum().backward()
    got = [t.grad.clone() for t in (x, logits, w)]
    for t in (x, logits, w):
        t.grad = None
    want = torch.einsum("te,th,ehd->td", probs_of(logits), x, w)
    want.sum().backward()
    torch.testing.assert_close(out, want, rtol=1e-5, atol=1e-4)
    for ours, t in zip(got, (x, logits, w), strict=True):
        torch.testing.assert_close(ours, t.grad, rtol=1e-4, atol=1e-4)


def layer(x, logits):
    probs, routed = fused_topk_with_score_function(logits, 4, False, 4, 2, 2.5, "sigmoid", None)
    rows, weights, row_id_map = moe_permute_with_probs(x, probs, routed, 4 * len(x))
    return moe_unpermute(rows * weights[:, None], row_id_map)


def test_no_tokens_and_no_routed_tokens():
    x, logits, chosen = torch.randn(0, 8, requires_grad=True), torch.randn(0, 16), torch.zeros(5, 4, dtype=torch.bool)
    layer(x, logits).sum().backward()
    assert x.grad.shape == (0, 8)
    rows, row_id_map = moe_permute(torch.randn(5, 8), chosen)
    assert rows.shape == (0, 8) and torch.equal(moe_unpermute(rows, row_id_map), torch.zeros(5, 8))


def test_compiles():
    rand = Rand(FP32)
    x, logits = rand(5, 8), rand(5, 16)
    torch.autograd.backward(layer(x, logits).sum())
    got = torch.autograd.grad(torch.compile(layer, backend="aot_eager", fullgraph=True)(x, logits).sum(), [x, logits])
    assert torch.equal(got[0], x.grad) and torch.equal(got[1], logits.grad)


def probs_of(logits):
    return reference_topk(logits, 4, 4, 2, 2.5, None)[0]


def test_refused():
    rand = Rand(FP32)
    x, chosen, logits = rand.data(T, H), rand.bools(T, E), rand.data(T, 16)
    row_id_map = moe_permute(x, chosen)[1]
    route = dict(logits=logits, topk=4, use_pre_softmax=False, num_groups=4, group_topk=2, scaling_factor=1.0,
                 score_function="sigmoid", expert_bias=None)  # fmt: skip
    calls = [
        (lambda: moe_permute(x, chosen, map_type="index"), "map_type is 'index'"),
        (lambda: moe_unpermute(x, row_id_map, map_type="index"), "map_type is 'index'"),
        (lambda: moe_unpermute(x, row_id_map, pad_offsets=row_id_map), "no pad_offsets"),
        (
            lambda: fused_topk_with_score_function(**route | dict(score_function="softmax")),
            "score_function is 'softmax'",
        ),
        (lambda: fused_topk_with_score_function(**route | dict(group_topk=4)), "topk // group_topk is 1"),
        (lambda: fused_topk_with_score_function(**route, routing_map_format="bitmap_u8"), "bitmap_u8"),
        (lambda: fused_topk_with_score_function(**route, topk_indices=row_id_map), "topk_indices is not supported"),
        (lambda: fused_topk_with_score_function(**route, qb_histogram_mode="two_kernel"), "qb_histogram_mode"),
    ]
    for call, match in calls:
        with pytest.raises(InputError, match=match):
            call()
    for wrong, match in (
        (lambda: moe_unpermute(x, row_id_map, restore_shape=(T + 1, H)), "restore_shape"),
        (lambda: moe_unpermute(x, row_id_map, x), "merging_probs"),
        (lambda: moe_unpermute(x, row_id_map.long()), "row_id_map"),
        (lambda: moe_permute_with_probs(x, x, chosen), "probs"),
        (lambda: moe_permute(x, chosen[:3]), "routing_map"),
        (lambda: fused_topk_with_score_function(**route | dict(logits=logits.double())), "not fp64"),
    ):
        with pytest.raises(ValueError, match=match):
            wrong()
