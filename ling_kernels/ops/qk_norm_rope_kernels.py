"""Triton kernels of qk_norm_rope.py.

A program has BLOCK_T tokens of BLOCK_H heads, all of q, of k or of v. A head has three parts: two halves that are
rotated, and the rest.
"""

from .triton_import import tl, triton


@triton.jit
def load_parts(
    x, offset, valid, D: tl.constexpr, HALF: tl.constexpr, BLOCK_HALF: tl.constexpr, BLOCK_REST: tl.constexpr
):
    """Heads at x + offset [BLOCK_T, BLOCK_H, 1], fp32: the two halves that are rotated, and the rest."""
    i = tl.arange(0, BLOCK_HALF)[None, None, :]
    j = tl.arange(0, BLOCK_REST)[None, None, :]
    a = tl.load(x + (offset + i), mask=valid & (i < HALF), other=0.0).to(tl.float32)
    b = tl.load(x + (offset + HALF + i), mask=valid & (i < HALF), other=0.0).to(tl.float32)
    rest = tl.load(x + (offset + 2 * HALF + j), mask=valid & (j < D - 2 * HALF), other=0.0).to(tl.float32)
    return a, b, rest


@triton.jit
def store_parts(
    x, offset, valid, a, b, rest,
    D: tl.constexpr, HALF: tl.constexpr, BLOCK_HALF: tl.constexpr, BLOCK_REST: tl.constexpr,
):  # fmt: skip
    i = tl.arange(0, BLOCK_HALF)[None, None, :]
    j = tl.arange(0, BLOCK_REST)[None, None, :]
    tl.store(x + (offset + i), a, mask=valid & (i < HALF))
    tl.store(x + (offset + HALF + i), b, mask=valid & (i < HALF))
    tl.store(x + (offset + 2 * HALF + j), rest, mask=valid & (j < D - 2 * HALF))


@triton.jit
def load_angles(
    cos, sin, positions, first, valid, P, HALF: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_HALF: tl.constexpr
):
    """cos and sin [BLOCK_T, 1, BLOCK_HALF] of the tokens from `first` on; NaN for a position outside the tables."""
    t = tl.arange(0, BLOCK_T)[:, None, None]
    position = tl.load(positions + first + t, mask=valid, other=0).to(tl.int64)
    in_table = (position >= 0) & (position < P)
    i = tl.arange(0, BLOCK_HALF)[None, None, :]
    offset, inside = position * HALF + i, valid & in_table & (i < HALF)
    c, s = tl.load(cos + offset, mask=inside, other=0.0), tl.load(sin + offset, mask=inside, other=0.0)
    return tl.where(in_table, c, float("nan")), tl.where(in_table, s, float("nan"))


@triton.jit
def rstd_of(a, b, rest, eps, D: tl.constexpr):
    return tl.rsqrt((tl.sum(a * a, 2) + tl.sum(b * b, 2) + tl.sum(rest * rest, 2)) / D + eps)[:, :, None]


@triton.jit
def heads_forward(
    qkv, w, cos, sin, positions, slots, out, cache, T, P, cells, eps, group, FIRST: tl.constexpr, NUM: tl.constexpr,
    H: tl.constexpr, D: tl.constexpr, HALF: tl.constexpr, BLOCK_T: tl.constexpr,
    BLOCK_H: tl.constexpr, BLOCK_HALF: tl.constexpr, BLOCK_REST: tl.constexpr,
):  # fmt: skip
    """Norm and rotate a tile of the NUM heads that start at head FIRST of qkv; copy it if there is no weight (v)."""
    first = tl.program_id(0).to(tl.int64) * BLOCK_T
    t, h = tl.arange(0, BLOCK_T)[:, None, None], group * BLOCK_H + tl.arange(0, BLOCK_H)[None, :, None]
    valid = (t < T - first) & (h < NUM)
    a, b, rest = load_parts(qkv + first * (H * D), (t * H + FIRST + h) * D, valid, D, HALF, BLOCK_HALF, BLOCK_REST)
    if w is not None:
        c, s = load_angles(cos, sin, positions, first, t < T - first, P, HALF, BLOCK_T, BLOCK_HALF)
        zero = tl.zeros((1, 1, 1), tl.int32)
        wa, wb, wrest = load_parts(w, zero, zero == 0, D, HALF, BLOCK_HALF, BLOCK_REST)
        r = rstd_of(a, b, rest, eps, D)
        a, b, rest = a * r * wa, b * r * wb, rest * r * wrest
        a, b = a * c - b * s, b * c + a * s
    store_parts(out + first * (NUM * D), (t * NUM + h) * D, valid, a, b, rest, D, HALF, BLOCK_HALF, BLOCK_REST)
    if cache is not None:
        slot = tl.load(slots + first + t, mask=t < T - first, other=-1).to(tl.int64)
        valid = valid & (slot >= 0) & (slot < cells)
        dtype: tl.constexpr = out.dtype.element_ty
        a, b, rest = a.to(dtype).to(tl.float32), b.to(dtype).to(tl.float32), rest.to(dtype).to(tl.float32)
        store_parts(cache, (slot * NUM + h) * D, valid, a, b, rest, D, HALF, BLOCK_HALF, BLOCK_REST)


@triton.jit
def qk_norm_rope_fwd_kernel(
    qkv, q_weight, k_weight, cos, sin, positions, slots, q, k, v, k_cache, v_cache, T, P, cells, eps,
    NUM_Q: tl.constexpr, NUM_KV: tl.constexpr, D: tl.constexpr, HALF: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_HALF: tl.constexpr, BLOCK_REST: tl.constexpr,
):  # fmt: skip
    Q_GROUPS: tl.constexpr = (NUM_Q + BLOCK_H - 1) // BLOCK_H
    KV_GROUPS: tl.constexpr = (NUM_KV + BLOCK_H - 1) // BLOCK_H
    H: tl.constexpr = NUM_Q + 2 * NUM_KV
    group = tl.program_id(1)
    if q is None:  # only the keys
        heads_forward(
            qkv, k_weight, cos, sin, positions, slots, k, k_cache, T, P, cells, eps, group, NUM_Q, NUM_KV,
            H, D, HALF, BLOCK_T, BLOCK_H, BLOCK_HALF, BLOCK_REST,
        )  # fmt: skip
    elif group < Q_GROUPS:
        heads_forward(
            qkv, q_weight, cos, sin, positions, None, q, None, T, P, cells, eps, group, 0, NUM_Q,
            H, D, HALF, BLOCK_T, BLOCK_H, BLOCK_HALF, BLOCK_REST,
        )  # fmt: skip
    elif group < Q_GROUPS + KV_GROUPS:
        heads_forward(
            qkv, k_weight, cos, sin, positions, slots, k, k_cache, T, P, cells, eps, group - Q_GROUPS, NUM_Q, NUM_KV,
            H, D, HALF, BLOCK_T, BLOCK_H, BLOCK_HALF, BLOCK_REST,
        )  # fmt: skip
    else:
        heads_forward(
            qkv, None, cos, sin, positions, slots, v, v_cache, T, P, cells, eps, group - Q_GROUPS - KV_GROUPS,
            NUM_Q + NUM_KV, NUM_KV, H, D, HALF, BLOCK_T, BLOCK_H, BLOCK_HALF, BLOCK_REST,
        )  # fmt: skip


@triton.jit
def heads_backward(
    dout, qkv, w, cos, sin, positions, dqkv, dw, T, P, PROGRAMS, eps, group, FIRST: tl.constexpr, NUM: tl.constexpr,
    H: tl.constexpr, D: tl.constexpr, HALF: tl.constexpr, BLOCK_T: tl.constexpr,
    BLOCK_H: tl.constexpr, BLOCK_HALF: tl.constexpr, BLOCK_REST: tl.constexpr,
):  # fmt: skip
    # With z the gradient before the rotation, g = z * w and x^ = x * rstd:
    # dx = rstd * (g - x^ * mean(g * x^)),  dw = sum of z * x^
    t, h = tl.arange(0, BLOCK_T)[:, None, None], group * BLOCK_H + tl.arange(0, BLOCK_H)[None, :, None]
    zero = tl.zeros((1, 1, 1), tl.int32)
    if w is not None:
        wa, wb, wrest = load_parts(w, zero, zero == 0, D, HALF, BLOCK_HALF, BLOCK_REST)
        dwa = tl.zeros((BLOCK_T, BLOCK_H, BLOCK_HALF), tl.float32)
        dwb = tl.zeros((BLOCK_T, BLOCK_H, BLOCK_HALF), tl.float32)
        dwrest = tl.zeros((BLOCK_T, BLOCK_H, BLOCK_REST), tl.float32)
    p = tl.program_id(0).to(tl.int64)
    for first in tl.range(p * BLOCK_T, T, PROGRAMS * BLOCK_T, num_stages=2):
        valid = (t < T - first) & (h < NUM)
        offset = (t * H + FIRST + h) * D
        za, zb, zrest = load_parts(
            dout + first * (NUM * D), (t * NUM + h) * D, valid, D, HALF, BLOCK_HALF, BLOCK_REST
        )  # fmt: skip
        if w is not None:
            a, b, rest = load_parts(qkv + first * (H * D), offset, valid, D, HALF, BLOCK_HALF, BLOCK_REST)
            c, s = load_angles(cos, sin, positions, first, t < T - first, P, HALF, BLOCK_T, BLOCK_HALF)
            r = rstd_of(a, b, rest, eps, D)
            a, b, rest = a * r, b * r, rest * r
            za, zb = za * c + zb * s, zb * c - za * s
            dwa += za * a
            dwb += zb * b
            dwrest += zrest * rest
            za, zb, zrest = za * wa, zb * wb, zrest * wrest
            mean = ((tl.sum(za * a, 2) + tl.sum(zb * b, 2) + tl.sum(zrest * rest, 2)) / D)[:, :, None]
            za, zb, zrest = r * (za - a * mean), r * (zb - b * mean), r * (zrest - rest * mean)
        store_parts(dqkv + first * (H * D), offset, valid, za, zb, zrest, D, HALF, BLOCK_HALF, BLOCK_REST)
    if w is not None:
        da = tl.sum(tl.sum(dwa, 0), 0)[None, None, :]
        db = tl.sum(tl.sum(dwb, 0), 0)[None, None, :]
        drest = tl.sum(tl.sum(dwrest, 0), 0)[None, None, :]
        store_parts(dw, zero, zero == 0, da, db, drest, D, HALF, BLOCK_HALF, BLOCK_REST)


@triton.jit
def qk_norm_rope_bwd_kernel(
    dq, dk, dv, qkv, q_weight, k_weight, cos, sin, positions, dqkv, dw, T, P, PROGRAMS, eps,
    NUM_Q: tl.constexpr, NUM_KV: tl.constexpr, D: tl.constexpr, HALF: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_HALF: tl.constexpr, BLOCK_REST: tl.constexpr,
):  # fmt: skip
    group = tl.program_id(1)
    Q_GROUPS: tl.constexpr = (NUM_Q + BLOCK_H - 1) // BLOCK_H
    KV_GROUPS: tl.constexpr = (NUM_KV + BLOCK_H - 1) // BLOCK_H
    H: tl.constexpr = NUM_Q + 2 * NUM_KV
    dw += (tl.program_id(0) * (Q_GROUPS + KV_GROUPS) + group) * D
    if group < Q_GROUPS:
        heads_backward(
            dq, qkv, q_weight, cos, sin, positions, dqkv, dw, T, P, PROGRAMS, eps, group, 0, NUM_Q,
            H, D, HALF, BLOCK_T, BLOCK_H, BLOCK_HALF, BLOCK_REST,
        )  # fmt: skip
    elif group < Q_GROUPS + KV_GROUPS:
        heads_backward(
            dk, qkv, k_weight, cos, sin, positions, dqkv, dw, T, P, PROGRAMS, eps, group - Q_GROUPS, NUM_Q, NUM_KV,
            H, D, HALF, BLOCK_T, BLOCK_H, BLOCK_HALF, BLOCK_REST,
        )  # fmt: skip
    else:
        heads_backward(
            dv, qkv, None, cos, sin, positions, dqkv, dw, T, P, PROGRAMS, eps, group - Q_GROUPS - KV_GROUPS,
            NUM_Q + NUM_KV, NUM_KV, H, D, HALF, BLOCK_T, BLOCK_H, BLOCK_HALF, BLOCK_REST,
        )  # fmt: skip
