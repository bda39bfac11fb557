"""Triton kernels of route.py: the choice of experts, the weights of forced experts, and the gradient to the logits.

The score function is `row_statistic`, `score_of` and `score_derivative`. A key is an fp32 number as an int32 in the
same order: integers compare without NaN, and a warp finds their maximum in one instruction.
"""

from .triton_import import tl, triton


@triton.jit
def row_statistic(x):
    """What `score_of` needs of logits [BLOCK_T, n], n all experts or the chosen ones -> [BLOCK_T, 1]; sigmoid: nothing.

    The weights are normalised, so that the scores of the chosen experts may lack a factor of their row.
    """
    return tl.zeros((x.shape[0], 1), tl.float32)


@triton.jit
def score_of(x, statistic):
    return tl.sigmoid(x)


@triton.jit
def score_derivative(s):
    """ds/dx at score s, for the gradient through the weights."""
    return s * (1 - s)


LOWEST = tl.constexpr(-(2**31))  # below the key of every number: no such expert, or already chosen
HIGHEST = tl.constexpr(2**31 - 1)


@triton.jit
def key_of(x):
    """fp32 without NaN -> int32 in the same order, whose maximum a warp finds in one instruction."""
    bits = x.to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def take_best(key, index, AXIS: tl.constexpr):
    """Along AXIS: the largest key, the lowest index with that key, and the keys with this one set to LOWEST."""
    best = tl.max(key, AXIS)
    best_index = tl.min(tl.where(key == tl.expand_dims(best, AXIS), index, HIGHEST), AXIS)
    return best, best_index, tl.where(index == tl.expand_dims(best_index, AXIS), LOWEST, key)


@triton.jit
def group_scores(key, p, PER_GROUP: tl.constexpr):
    """Keys [BLOCK_T, BLOCK_G, BLOCK_P] -> the key of the sum of each group's two largest numbers."""
    first, index, rest = take_best(key, p, 2)
    score = key_of(first).to(tl.float32, bitcast=True)  # key_of is its own inverse
    if PER_GROUP > 1:
        score += key_of(tl.max(rest, 2)).to(tl.float32, bitcast=True)
    return key_of(score)


@triton.jit
def route_kernel(
    logits, bias, mask, experts, weights, counts, lse, T, ld, scale,
    GROUPS: tl.constexpr, PER_GROUP: tl.constexpr, GROUP_TOPK: tl.constexpr, TOPK: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    t = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    row = logits + t.to(tl.int64) * ld
    lane = tl.arange(0, BLOCK_G * BLOCK_P)
    exists = (lane // BLOCK_P < GROUPS) & (lane % BLOCK_P < PER_GROUP)
    expert = lane if BLOCK_P == PER_GROUP else lane // BLOCK_P * PER_GROUP + lane % BLOCK_P
    x = tl.load(row[:, None] + expert[None, :], mask=(t < T)[:, None] & exists[None, :], other=-float("inf"))

    # Biased scores; torch.nan_to_num(nan=-1e30) in the reference
    b = score_of(x, row_statistic(x)) + tl.load(bias + expert, mask=exists, other=0.0)[None, :]
    b = tl.where(b != b, -1e30, tl.minimum(tl.maximum(b, -3.4028234663852886e38), 3.4028234663852886e38))
    key = tl.where(exists[None, :], key_of(b), LOWEST)

    # Keep the best groups
    key = tl.reshape(key, (BLOCK_T, BLOCK_G, BLOCK_P))
    if GROUP_TOPK < GROUPS:
        g = tl.arange(0, BLOCK_G)[None, :]
        score = tl.where(g < GROUPS, group_scores(key, tl.arange(0, BLOCK_P)[None, None, :], PER_GROUP), LOWEST)
        keep = tl.zeros((BLOCK_T, BLOCK_G), tl.int32)
        for _ in tl.static_range(GROUP_TOPK):
            best, group, score = take_best(score, g, 1)
            keep = tl.where(g == group[:, None], 1, keep)
        key = tl.where(keep[:, :, None] != 0, key, LOWEST)
    key = tl.reshape(key, (BLOCK_T, BLOCK_G * BLOCK_P))

    # Choose the best of their experts, in order
    k = tl.arange(0, BLOCK_K)[None, :]
    chosen = tl.zeros((BLOCK_T, BLOCK_K), tl.int32)
    for i in tl.static_range(TOPK):
        best, index, key = take_best(key, lane[None, :], 1)
        chosen = tl.where(k == i, (index // BLOCK_P * PER_GROUP + index % BLOCK_P)[:, None], chosen)

    routed = t < T
    if mask is not None:
        routed &= tl.load(mask + t, mask=t < T, other=0) != 0
    valid = (t < T)[:, None] & (k < TOPK)
    w = routing_weights(row, chosen, valid & routed[:, None], scale, TOPK)
    choice = t.to(tl.int64)[:, None] * TOPK + k
    tl.store(weights + choice, w, mask=valid)
    tl.store(experts + choice, tl.where(routed[:, None], chosen, -1), mask=valid)
    tl.atomic_add(counts + chosen, 1, mask=valid & routed[:, None], sem="relaxed")
    if lse is not None:
        tl.store(lse + t, tl.where(routed, log_sum_exp(x), 0.0), mask=t < T)


@triton.jit
def routing_weights(row, chosen, routed, scale, TOPK: tl.constexpr):
    """The scores of the chosen experts, of several over their sum, times scale; 0 where `routed` is False."""
    s = chosen_scores(row, chosen, routed)
    if TOPK > 1:
        s = s / (tl.sum(s, 1)[:, None] + 1e-20)
    return s * scale


@triton.jit
def chosen_scores(row, chosen, routed):
    x = tl.load(row[:, None] + chosen, mask=routed, other=-float("inf"))
    return tl.where(routed, score_of(x, row_statistic(x)), 0.0)


@triton.jit
def log_sum_exp(x):
    top = tl.max(x, 1)
    top = tl.where(tl.abs(top) == float("inf"), 0.0, top)
    return tl.log(tl.sum(tl.exp(x - top[:, None]), 1)) + top


@triton.jit
def route_forced_kernel(
    logits, experts, weights, counts, lse, T, E, ld, scale,
    TOPK: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    t = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    row = logits + t.to(tl.int64) * ld
    k = tl.arange(0, BLOCK_K)[None, :]
    valid = (t < T)[:, None] & (k < TOPK)
    choice = t.to(tl.int64)[:, None] * TOPK + k
    chosen = tl.load(experts + choice, mask=valid, other=-1)
    routed = chosen >= 0
    tl.store(weights + choice, routing_weights(row, chosen, routed, scale, TOPK), mask=valid)
    tl.atomic_add(counts + chosen, 1, mask=routed, sem="relaxed")
    if lse is not None:
        e = tl.arange(0, BLOCK_E)[None, :]
        x = tl.load(row[:, None] + e, mask=(t < T)[:, None] & (e < E), other=-float("inf"))
        tl.store(lse + t, tl.where(tl.max(chosen, 1) >= 0, log_sum_exp(x), 0.0), mask=t < T)


@triton.jit
def route_bwd_kernel(
    logits, experts, dweights, lse, dlse, dlogits, T, E, ld, scale,
    TOPK: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    # With z = sum + 1e-20:  ds = scale / z * (dw - sum(s * dw) / z),  dlogits = ds * score'(x) + dlse * softmax.
    # With topk = 1:  ds = scale * dw
    t = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    row = logits + t.to(tl.int64) * ld
    k, e = tl.arange(0, BLOCK_K)[None, :], tl.arange(0, BLOCK_E)[None, :]
    choice = t.to(tl.int64)[:, None] * TOPK + k
    chosen = tl.load(experts + choice, mask=(t < T)[:, None] & (k < TOPK), other=-1)
    routed = chosen >= 0
    s = chosen_scores(row, chosen, routed)
    dw = tl.load(dweights + choice, mask=routed, other=0.0)
    d = dw * scale * score_derivative(s)
    if TOPK > 1:
        z = tl.sum(s, 1)[:, None] + 1e-20
        d = scale / z * (dw - tl.sum(s * dw, 1)[:, None] / z) * score_derivative(s)
    dx = tl.sum(tl.where(routed[:, :, None] & (chosen[:, :, None] == e[:, None, :]), d[:, :, None], 0.0), 1)
    valid = (t < T)[:, None] & (e < E)
    if lse is not None:
        routed = tl.load(experts + t.to(tl.int64) * TOPK, mask=t < T, other=-1) >= 0
        x = tl.load(row[:, None] + e, mask=valid, other=0.0)
        softmax = tl.exp(x - tl.load(lse + t, mask=t < T, other=0.0)[:, None])
        dx += tl.where(routed[:, None], tl.load(dlse + t, mask=t < T, other=0.0)[:, None] * softmax, 0.0)
    tl.store(dlogits + t.to(tl.int64)[:, None] * E + e, dx, mask=valid)
