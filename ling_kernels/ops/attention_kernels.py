"""Triton kernels of attention.py: forward, dq, and dk with dv; qk_norm_attention.py runs the forward one too.

A tile of rows belongs to one sequence. Only tiles of keys that the causal mask or the sequence's end cuts are masked:
two loops with the same body, one without and one with a mask. Scores are in units of log2, as exp2 is the hardware's
exponential. The kernels do not use `warp_specialize`: on sm_90 Triton 3.8 aborts on it; 3.6 fails with 4 warps and
builds the same code with 8.
"""

from .triton_import import tl, triton


@triton.jit
def find_tile(cu, tile, B, BLOCK: tl.constexpr, BLOCK_B: tl.constexpr):
    """Which sequence tile number `tile` of BLOCK rows belongs to, and the tile's first row in that sequence.

    The sequence is B or more for a number past the last tile.
    """
    b = tl.arange(0, BLOCK_B)
    rows = tl.load(cu + b + 1, mask=b < B, other=0) - tl.load(cu + b, mask=b < B, other=0)
    tiles = (rows + BLOCK - 1) // BLOCK
    ends = tl.cumsum(tiles, 0)
    seq = tl.sum((ends <= tile).to(tl.int32), 0)
    return seq, (tile - tl.sum(tl.where(b == seq, ends - tiles, 0), 0)) * BLOCK


@triton.jit
def valid_cu_seqlens(cu, T, B, BLOCK_B: tl.constexpr):
    """Whether cu ascends from 0 to T."""
    b = tl.arange(0, BLOCK_B)
    falls = tl.load(cu + b + 1, mask=b < B, other=0) < tl.load(cu + b, mask=b < B, other=0)
    return (tl.sum(falls.to(tl.int32), 0) == 0) & (tl.load(cu) == 0) & (tl.load(cu + B) == T)


@triton.jit
def fill_nan(x, tile, T, h, H, D: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr):
    """Write NaN to rows tile * BLOCK.. of all T, the result for cu_seqlens that are not valid."""
    nan = tl.full((BLOCK, BLOCK_D), float("nan"), tl.float32)
    store_rows(x, nan, 0, tile * BLOCK + tl.arange(0, BLOCK), T, h, H, D, BLOCK_D)


@triton.jit
def extents(cu_q, cu_k, seq):
    """The first query of a sequence, its number of queries, its first key, its number of keys."""
    q0, k0 = tl.load(cu_q + seq), tl.load(cu_k + seq)
    return q0, tl.load(cu_q + seq + 1) - q0, k0, tl.load(cu_k + seq + 1) - k0


@triton.jit
def sequence(x, first, rows, row, H, D: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr, TMA: tl.constexpr):
    """A TMA descriptor of, or a pointer to, one sequence of x [T, H, D] for load_tile; `row` is the stride of rows."""
    x += first.to(tl.int64) * row
    if TMA:  # ends with this sequence: a neighbour's NaN in its last tile would spread, as 0 * NaN is NaN
        return tl.make_tensor_descriptor(x, [tl.maximum(rows, 1), H * D], [row, 1], [BLOCK, BLOCK_D])
    else:
        return x


@triton.jit
def load_tile(x, first, rows, h, row, D: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr, TMA: tl.constexpr):
    """Rows first : first + BLOCK of head h of a `sequence`; zeros past its end and past D."""
    if TMA:
        return x.load([first, h * D])
    else:
        r, d = first + tl.arange(0, BLOCK), tl.arange(0, BLOCK_D)
        offset = r.to(tl.int64)[:, None] * row + h * D + d[None, :]
        return tl.load(x + offset, mask=(r < rows)[:, None] & (d < D)[None, :], other=0.0)


@triton.jit
def load_keys(
    x, table, first, rows, h, row, PAGE: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr,
    TMA: tl.constexpr,
):  # fmt: skip
    """`load_tile` of a `sequence`; with a table, of the pages [PAGE, H, D] of x that it names."""
    if table is None:
        return load_tile(x, first, rows, h, row, D, BLOCK, BLOCK_D, TMA)
    else:
        r, d = first + tl.arange(0, BLOCK), tl.arange(0, BLOCK_D)
        cell = tl.load(table + r // PAGE, mask=r < rows, other=0) * PAGE + r % PAGE
        offset = cell.to(tl.int64)[:, None] * row + h * D + d[None, :]
        return tl.load(x + offset, mask=(r < rows)[:, None] & (d < D)[None, :], other=0.0)


@triton.jit
def store_rows(x, value, first, row, rows, h, H, D: tl.constexpr, BLOCK_D: tl.constexpr):
    d = tl.arange(0, BLOCK_D)
    offset = (first + row).to(tl.int64)[:, None] * (H * D) + h * D + d[None, :]
    tl.store(x + offset, value.to(x.dtype.element_ty), mask=(row < rows)[:, None] & (d < D)[None, :])


@triton.jit
def norm_and_rotate(
    x, offset, valid, w, cos, sin, position, P, eps, D: tl.constexpr, HALF: tl.constexpr,
    BLOCK_D: tl.constexpr,
):  # fmt: skip
    """qk_norm_rope of the heads at x + offset, in x's dtype: 0 where not `valid`, NaN for a position past the tables.

    Each element and the one that it is rotated with are both loaded: the second load hits L1, and no exchange between
    threads is needed.
    """
    d = tl.arange(0, BLOCK_D)
    other = tl.where(d < HALF, d + HALF, tl.where(d < 2 * HALF, d - HALF, d))
    mask = valid[:, None] & (d < D)[None, :]
    dtype: tl.constexpr = x.dtype.element_ty
    a = tl.load(x + offset[:, None] + d[None, :], mask=mask, other=0.0).to(tl.float32)
    b = tl.load(x + offset[:, None] + other[None, :], mask=mask, other=0.0).to(tl.float32)
    r = tl.rsqrt(tl.sum(a * a, 1) / D + eps)[:, None]
    a, b = a * r, b * r
    a *= tl.load(w + d, mask=d < D, other=0.0).to(tl.float32)[None, :]
    b *= tl.load(w + other, mask=d < D, other=0.0).to(tl.float32)[None, :]

    in_table = (position >= 0) & (position < P)
    rotates = (d < 2 * HALF)[None, :]
    angle = position[:, None] * HALF + tl.where(d < HALF, d, d - HALF)[None, :]
    c = tl.load(cos + angle, mask=(valid & in_table)[:, None] & rotates, other=0.0)
    s = tl.load(sin + angle, mask=(valid & in_table)[:, None] & rotates, other=0.0)
    rotated = a * c + tl.where(d < HALF, -b, b) * s
    return tl.where(rotates, tl.where(in_table[:, None], rotated, float("nan")), a).to(dtype)


@triton.jit
def attend_keys(
    qs, k, v, table, largest, total, acc, begin, end, m, shift, Lk, g, k_row, v_row, log2_scale,
    MASKED: tl.constexpr, CAUSAL: tl.constexpr, TMA: tl.constexpr, PAGE: tl.constexpr, D: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """The running softmax of a tile of queries over the tiles of keys from `begin` to `end`.

    A query's row depends on no other row: tiles of keys that it does not see leave it as it is, and both values of
    MASKED compute the same. So its bits depend on BLOCK_N, but neither on BLOCK_M nor on the queries beside it.
    """
    for n0 in range(begin, end, BLOCK_N):
        ks = load_keys(k, table, n0, Lk, g, k_row, PAGE, D, BLOCK_N, BLOCK_D, TMA)
        s = tl.dot(qs, tl.trans(ks), input_precision="ieee")
        if MASKED:
            n = n0 + tl.arange(0, BLOCK_N)
            seen = (n < Lk)[None, :]
            if CAUSAL:
                seen &= n[None, :] <= m[:, None] + shift
            s = tl.where(seen, s, float("-inf"))
        larger = tl.maximum(largest, tl.max(s, 1) * log2_scale)
        base = tl.where(larger == float("-inf"), 0.0, larger) if MASKED else larger  # -inf - -inf would be NaN
        p = tl.exp2(s * log2_scale - base[:, None])
        shrink = tl.exp2(largest - base)
        total = total * shrink + tl.sum(p, 1)
        vs = load_keys(v, table, n0, Lk, g, v_row, PAGE, D, BLOCK_N, BLOCK_D, TMA)
        acc = tl.dot(p.to(vs.dtype), vs, acc * shrink[:, None], input_precision="ieee")
        largest = larger
    return largest, total, acc


@triton.jit
def attention_fwd_kernel(
    q, k, v, cu_q, cu_k, out, lse, q_weight, cos, sin, positions, scale, eps, Tq, Tk, P, B, q_row, k_row, v_row,
    Hq, Hkv, HALF: tl.constexpr, CAUSAL: tl.constexpr, TMA: tl.constexpr, D: tl.constexpr,
    BLOCK_B: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    # The last tiles of a sequence have the most keys: they start first, so that short ones fill the end.
    tile, h = tl.num_programs(0) - 1 - tl.program_id(0), tl.program_id(1)
    cu_k = cu_q if cu_k is None else cu_k
    row = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    if not (valid_cu_seqlens(cu_q, Tq, B, BLOCK_B) & valid_cu_seqlens(cu_k, Tk, B, BLOCK_B)):
        fill_nan(out, tile, Tq, h, Hq, D, BLOCK_M, BLOCK_D)
        tl.store(lse + h.to(tl.int64) * Tq + row, float("nan"), mask=row < Tq)
        return
    seq, m0 = find_tile(cu_q, tile, B, BLOCK_M, BLOCK_B)
    if seq >= B:
        return
    q0, Lq, k0, Lk = extents(cu_q, cu_k, seq)
    m, g = m0 + tl.arange(0, BLOCK_M), h // (Hq // Hkv)
    if q_weight is None:
        Q = sequence(q, q0, Lq, q_row, Hq, D, BLOCK_M, BLOCK_D, TMA)
        qs = load_tile(Q, m0, Lq, h, q_row, D, BLOCK_M, BLOCK_D, TMA)
    else:
        Q = sequence(q, q0, Lq, q_row, Hq, D, BLOCK_M, BLOCK_D, False)
        position = tl.load(positions + q0 + m, mask=m < Lq, other=0).to(tl.int64)
        offset = m.to(tl.int64) * q_row + h * D
        qs = norm_and_rotate(
            Q, offset, m < Lq, q_weight, cos, sin, position, P, eps, D, HALF, BLOCK_D
        )  # fmt: skip
    K = sequence(k, k0, Lk, k_row, Hkv, D, BLOCK_N, BLOCK_D, TMA)
    V = sequence(v, k0, Lk, v_row, Hkv, D, BLOCK_N, BLOCK_D, TMA)

    shift, last, unmasked = Lk - Lq, Lk, Lk // BLOCK_N * BLOCK_N
    if CAUSAL:
        last = tl.minimum(Lk, m0 + BLOCK_M + shift)
        unmasked = tl.minimum(Lk, tl.maximum(m0 + 1 + shift, 0)) // BLOCK_N * BLOCK_N
    largest = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    acc = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    log2_scale = scale * 1.4426950408889634
    largest, total, acc = attend_keys(
        qs, K, V, None, largest, total, acc, 0, unmasked, m, shift, Lk, g, k_row, v_row, log2_scale,
        False, CAUSAL, TMA, 1, D, BLOCK_N, BLOCK_D,
    )  # fmt: skip
    largest, total, acc = attend_keys(
        qs, K, V, None, largest, total, acc, unmasked, last, m, shift, Lk, g, k_row, v_row, log2_scale,
        True, CAUSAL, TMA, 1, D, BLOCK_N, BLOCK_D,
    )  # fmt: skip

    store_rows(out, acc / tl.where(total == 0, 1.0, total)[:, None], q0, m, Lq, h, Hq, D, BLOCK_D)
    log_sum = (largest + tl.log2(total)) * 0.6931471805599453
    tl.store(lse + h.to(tl.int64) * Tq + q0 + m, tl.where(total == 0, float("-inf"), log_sum), mask=m < Lq)


@triton.jit
def dq_of_keys(
    acc, qs, douts, k, v, log2_lse, delta, begin, end, m, shift, Lk, g, row, log2_scale,
    MASKED: tl.constexpr, CAUSAL: tl.constexpr, TMA: tl.constexpr, D: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    for n0 in range(begin, end, BLOCK_N):
        ks = load_tile(k, n0, Lk, g, row, D, BLOCK_N, BLOCK_D, TMA)
        vs = load_tile(v, n0, Lk, g, row, D, BLOCK_N, BLOCK_D, TMA)
        s = tl.dot(qs, tl.trans(ks), input_precision="ieee")
        p = tl.exp2(s * log2_scale - log2_lse[:, None])
        if MASKED:
            n = n0 + tl.arange(0, BLOCK_N)
            seen = (n < Lk)[None, :]
            if CAUSAL:
                seen &= n[None, :] <= m[:, None] + shift
            p = tl.where(seen, p, 0.0)
        ds = p * (tl.dot(douts, tl.trans(vs), input_precision="ieee") - delta[:, None])
        acc = tl.dot(ds.to(ks.dtype), ks, acc, input_precision="ieee")
    return acc


@triton.jit
def attention_dq_kernel(
    q, k, v, out, dout, lse, cu_q, cu_k, dq, delta, scale, Tq, Tk, B, Hq, Hkv,
    CAUSAL: tl.constexpr, TMA: tl.constexpr, D: tl.constexpr,
    BLOCK_B: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Writes dq, and delta [Hq, Tq] for the dkv kernel."""
    tile, h = tl.num_programs(0) - 1 - tl.program_id(0), tl.program_id(1)
    cu_k = cu_q if cu_k is None else cu_k
    if not (valid_cu_seqlens(cu_q, Tq, B, BLOCK_B) & valid_cu_seqlens(cu_k, Tk, B, BLOCK_B)):
        fill_nan(dq, tile, Tq, h, Hq, D, BLOCK_M, BLOCK_D)
        return
    seq, m0 = find_tile(cu_q, tile, B, BLOCK_M, BLOCK_B)
    if seq >= B:
        return
    q0, Lq, k0, Lk = extents(cu_q, cu_k, seq)
    m, g, row = m0 + tl.arange(0, BLOCK_M), h // (Hq // Hkv), Hq * D
    Q = sequence(q, q0, Lq, row, Hq, D, BLOCK_M, BLOCK_D, TMA)
    OUT = sequence(out, q0, Lq, row, Hq, D, BLOCK_M, BLOCK_D, TMA)
    DOUT = sequence(dout, q0, Lq, row, Hq, D, BLOCK_M, BLOCK_D, TMA)
    qs = load_tile(Q, m0, Lq, h, row, D, BLOCK_M, BLOCK_D, TMA)
    douts = load_tile(DOUT, m0, Lq, h, row, D, BLOCK_M, BLOCK_D, TMA)
    outs = load_tile(OUT, m0, Lq, h, row, D, BLOCK_M, BLOCK_D, TMA)
    deltas = tl.sum(outs.to(tl.float32) * douts.to(tl.float32), 1)
    offset = h.to(tl.int64) * Tq + q0 + m
    tl.store(delta + offset, deltas, mask=m < Lq)
    log2_lse = tl.load(lse + offset, mask=m < Lq, other=0.0) * 1.4426950408889634
    K = sequence(k, k0, Lk, Hkv * D, Hkv, D, BLOCK_N, BLOCK_D, TMA)
    V = sequence(v, k0, Lk, Hkv * D, Hkv, D, BLOCK_N, BLOCK_D, TMA)

    shift, last, unmasked = Lk - Lq, Lk, Lk // BLOCK_N * BLOCK_N
    if CAUSAL:
        last = tl.minimum(Lk, m0 + BLOCK_M + shift)
        unmasked = tl.minimum(Lk, tl.maximum(m0 + 1 + shift, 0)) // BLOCK_N * BLOCK_N
    acc = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    acc = dq_of_keys(
        acc, qs, douts, K, V, log2_lse, deltas, 0, unmasked, m, shift, Lk, g, Hkv * D, scale * 1.4426950408889634,
        False, CAUSAL, TMA, D, BLOCK_N, BLOCK_D,
    )  # fmt: skip
    acc = dq_of_keys(
        acc, qs, douts, K, V, log2_lse, deltas, unmasked, last, m, shift, Lk, g, Hkv * D, scale * 1.4426950408889634,
        True, CAUSAL, TMA, D, BLOCK_N, BLOCK_D,
    )  # fmt: skip
    store_rows(dq, acc * scale, q0, m, Lq, h, Hq, D, BLOCK_D)


@triton.jit
def attention_dkv_kernel(
    q, k, v, dout, lse, delta, cu_q, cu_k, dk, dv, scale, Tq, Tk, B, Hq, Hkv,
    CAUSAL: tl.constexpr, TMA: tl.constexpr, D: tl.constexpr,
    BLOCK_B: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    tile, g = tl.program_id(0), tl.program_id(1)
    cu_k = cu_q if cu_k is None else cu_k
    if not (valid_cu_seqlens(cu_q, Tq, B, BLOCK_B) & valid_cu_seqlens(cu_k, Tk, B, BLOCK_B)):
        fill_nan(dk, tile, Tk, g, Hkv, D, BLOCK_N, BLOCK_D)
        fill_nan(dv, tile, Tk, g, Hkv, D, BLOCK_N, BLOCK_D)
        return
    seq, n0 = find_tile(cu_k, tile, B, BLOCK_N, BLOCK_B)
    if seq >= B:
        return
    q0, Lq, k0, Lk = extents(cu_q, cu_k, seq)
    n, row = n0 + tl.arange(0, BLOCK_N), Hkv * D
    K = sequence(k, k0, Lk, row, Hkv, D, BLOCK_N, BLOCK_D, TMA)
    V = sequence(v, k0, Lk, row, Hkv, D, BLOCK_N, BLOCK_D, TMA)
    ks = load_tile(K, n0, Lk, g, row, D, BLOCK_N, BLOCK_D, TMA)
    vs = load_tile(V, n0, Lk, g, row, D, BLOCK_N, BLOCK_D, TMA)
    Q = sequence(q, q0, Lq, Hq * D, Hq, D, BLOCK_M, BLOCK_D, TMA)
    DOUT = sequence(dout, q0, Lq, Hq * D, Hq, D, BLOCK_M, BLOCK_D, TMA)

    shift, first = Lk - Lq, 0
    if CAUSAL:  # the tile of the first query that sees key n0
        first = tl.minimum(tl.maximum(n0 - shift, 0), Lq) // BLOCK_M * BLOCK_M
    tiles = tl.cdiv(Lq - first, BLOCK_M)
    log2_scale = scale * 1.4426950408889634
    dks, dvs = tl.zeros((BLOCK_N, BLOCK_D), tl.float32), tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    # One loop over the tiles of all heads, so that loads are prefetched across heads. P and dS are transposed,
    # [N, M], to stay in registers as left operands of the next products.
    for i in range(0, Hq // Hkv * tiles):
        h, m0 = g * (Hq // Hkv) + i // tiles, first + i % tiles * BLOCK_M
        m = m0 + tl.arange(0, BLOCK_M)
        offset = h.to(tl.int64) * Tq + q0 + m
        qs = load_tile(Q, m0, Lq, h, Hq * D, D, BLOCK_M, BLOCK_D, TMA)
        douts = load_tile(DOUT, m0, Lq, h, Hq * D, D, BLOCK_M, BLOCK_D, TMA)
        # Queries past the end have q, dout, lse and delta 0 and add nothing; keys past the end are not stored.
        log2_lse = tl.load(lse + offset, mask=m < Lq, other=0.0) * 1.4426950408889634
        deltas = tl.load(delta + offset, mask=m < Lq, other=0.0)
        p = tl.exp2(tl.dot(ks, tl.trans(qs), input_precision="ieee") * log2_scale - log2_lse[None, :])
        if CAUSAL:
            p = tl.where(n[:, None] <= m[None, :] + shift, p, 0.0)
        dvs = tl.dot(p.to(douts.dtype), douts, dvs, input_precision="ieee")
        ds = p * (tl.dot(vs, tl.trans(douts), input_precision="ieee") - deltas[None, :])
        dks = tl.dot(ds.to(qs.dtype), qs, dks, input_precision="ieee")
    store_rows(dk, dks * scale, k0, n, Lk, g, Hkv, D, BLOCK_D)
    store_rows(dv, dvs, k0, n, Lk, g, Hkv, D, BLOCK_D)
