"""Triton kernels of attention_decode.py and qk_norm_attention_decode.py: one over the cache, one that combines."""

from .attention_kernels import norm_and_rotate
from .triton_fp8 import quantize_along
from .triton_import import tl, triton


@triton.jit
def split_work(lengths, B, W, cells, BLOCK_B: tl.constexpr, BLOCK_N: tl.constexpr):
    """The number of tiles of each sequence, its cumulative sum, and the number of tiles of a program."""
    b = tl.arange(0, BLOCK_B)
    used = tl.minimum(tl.maximum(tl.load(lengths + b, mask=b < B, other=0), 0), cells)
    tiles = (used + BLOCK_N - 1) // BLOCK_N
    share = (tl.sum(tiles, 0) + W - 1) // W
    return tiles, tl.cumsum(tiles, 0), tl.maximum(share, 1)


@triton.jit
def softmax_tile(s, seen, largest, total):
    """Scores [keys, rows] of a tile, in units of log2 -> P, the factor for earlier sums, the new maximum and total."""
    s = tl.where(seen, s, float("-inf"))
    larger = tl.maximum(largest, tl.max(s, 0))
    base = tl.where(larger == float("-inf"), 0.0, larger)  # -inf - -inf would be NaN
    p = tl.exp2(s - base[None, :])
    shrink = tl.exp2(largest - base)
    return p, shrink, larger, total * shrink + tl.sum(p, 0)


@triton.jit
def write_cells(x, cells, scales, cell, writes, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Rows x in the cache's dtype and their scales. Rows where `writes` are stored in the cache."""
    d = tl.arange(0, BLOCK_D)
    if scales is None:
        rows, scale = x.to(cells.dtype.element_ty), tl.full(cell.shape, 1.0, tl.float32)
    else:
        rows, scale = quantize_along(x.to(tl.float32), 1, False)
        tl.store(scales + cell, scale, mask=writes)
    tl.store(cells + cell[:, None] * D + d[None, :], rows, mask=writes[:, None] & (d < D)[None, :])
    return rows, scale


# The cache is the left factor of both products, S^T = K Q^T and O^T = V^T P^T: wgmma takes 64 rows of the left factor
# and few columns, and the left factor may come from registers, where FP8 is converted.
#
# With weights, q is qkv of new tokens that are not in the cache. The program with a sequence's last tile of keys
# computes their keys and values, attends to them as a separate tile and stores them; no program reads those cells.
@triton.jit
def attention_decode_kernel(
    q, k, v, k_scale, v_scale, table, lengths, partial, lse_log2, q_weight, k_weight, cos, sin, scale, eps, P,
    B, W, n, max_blocks, num_blocks, HALF: tl.constexpr, PAGE: tl.constexpr,
    D: tl.constexpr, HKV: tl.constexpr, G: tl.constexpr,
    BLOCK_B: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    APPENDS: tl.constexpr = q_weight is not None
    H: tl.constexpr = HKV * (G + 2) if APPENDS else HKV * G
    same: tl.constexpr = k_scale is not None or k.dtype.element_ty == q.dtype.element_ty
    dtype: tl.constexpr = q.dtype.element_ty if same else tl.float32
    w, h = tl.program_id(0), tl.program_id(1) % HKV
    b, r, d = tl.arange(0, BLOCK_B), tl.program_id(1) // HKV * BLOCK_M + tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_D)
    cells, log2_scale = max_blocks * PAGE, scale * 1.4426950408889634
    tiles, ends, share = split_work(lengths, B, W, cells, BLOCK_B, BLOCK_N)
    first = w * share
    stop = tl.minimum(first + share, tl.sum(tiles, 0))
    valid_rows = (r < n * G)[:, None] & (d < D)[None, :]
    for seq in range(
        tl.sum((ends <= first).to(tl.int32), 0), tl.sum(((ends - tiles < stop) & (b < B)).to(tl.int32), 0)
    ):
        end = tl.sum(tl.where(b == seq, ends, 0), 0)
        begin = end - tl.sum(tl.where(b == seq, tiles, 0), 0)
        length = tl.load(lengths + seq)
        cached = tl.minimum(length, cells)
        newest = length - n + r // G  # the last key that row r sees
        q_offset = ((tl.cast(seq, tl.int64) * n + r // G) * H + h * G + r % G) * D
        last_tile = end
        if APPENDS:
            cached = tl.minimum(tl.maximum(length - n, 0), cells)
            last_tile = begin + (cached + BLOCK_N - 1) // BLOCK_N
            qs = norm_and_rotate(
                q, q_offset, r < n * G, q_weight, cos, sin, tl.maximum(newest, 0), P, eps, D, HALF, BLOCK_D
            )  # fmt: skip
        else:
            qs = tl.load(q + q_offset[:, None] + d[None, :], mask=valid_rows, other=0.0)
        qs = tl.trans(qs).to(dtype)

        largest = tl.full((BLOCK_M,), float("-inf"), tl.float32)
        total = tl.zeros((BLOCK_M,), tl.float32)
        acc = tl.zeros((BLOCK_D, BLOCK_M), tl.float32)
        if APPENDS:
            if end <= stop:
                i = tl.arange(0, 16)
                key = length - n + i
                valid = (i < n) & (key >= 0) & (key < cells)
                offset = ((tl.cast(seq, tl.int64) * n + i) * H + HKV * G + h) * D
                page = tl.load(table + tl.cast(seq, tl.int64) * max_blocks + key // PAGE, mask=valid, other=-1)
                cell = (page.to(tl.int64) * PAGE + key % PAGE) * HKV + h
                writes = valid & (page >= 0) & (page < num_blocks) & (tl.program_id(1) < HKV)
                ks = norm_and_rotate(
                    q, offset, valid, k_weight, cos, sin, tl.maximum(key, 0), P, eps, D, HALF, BLOCK_D
                )  # fmt: skip
                vs = tl.load(
                    q + (offset + HKV * D)[:, None] + d[None, :], mask=valid[:, None] & (d < D)[None, :], other=0.0
                )
                ks, k_scales = write_cells(ks, k, k_scale, cell, writes, D, BLOCK_D)
                vs, v_scales = write_cells(vs, v, v_scale, cell, writes, D, BLOCK_D)
                # The 16 new keys are the right factor: as left factor, every warp would hold all queries.
                s = tl.trans(tl.dot(tl.trans(qs), tl.trans(ks.to(dtype)), input_precision="ieee"))
                s *= log2_scale * k_scales[:, None]
                seen = valid[:, None] & (key[:, None] <= newest[None, :])
                p, shrink, largest, total = softmax_tile(s, seen, largest, total)
                p *= v_scales[:, None]
                acc = tl.dot(tl.trans(vs.to(dtype)), p.to(dtype), input_precision="ieee")
        for tile in range(tl.maximum(first, begin), tl.minimum(stop, last_tile)):
            key = (tile - begin) * BLOCK_N + tl.arange(0, BLOCK_N)
            used = key < cached
            page = tl.load(table + tl.cast(seq, tl.int64) * max_blocks + key // PAGE, mask=used, other=0)
            page = tl.minimum(tl.maximum(page, 0), num_blocks - 1)
            cell = (page.to(tl.int64) * PAGE + key % PAGE) * HKV + h
            inside = used[:, None] & (d < D)[None, :]
            ks = tl.load(k + cell[:, None] * D + d[None, :], mask=inside, other=0.0).to(dtype)
            s = tl.dot(ks, qs, input_precision="ieee") * log2_scale
            if k_scale is not None:
                s *= tl.load(k_scale + cell, mask=used, other=0.0)[:, None]
            seen = used[:, None] & (key[:, None] <= newest[None, :])
            p, shrink, largest, total = softmax_tile(s, seen, largest, total)
            if v_scale is not None:
                p *= tl.load(v_scale + cell, mask=used, other=0.0)[:, None]
            vs = tl.load(v + cell[:, None] * D + d[None, :], mask=inside, other=0.0).to(dtype)
            acc = acc * shrink[None, :] + tl.dot(tl.trans(vs), p.to(dtype), input_precision="ieee")

        row = (tl.cast(w + seq, tl.int64) * HKV + h) * (n * G) + r
        acc = tl.trans(acc / tl.where(total == 0, 1.0, total)[None, :])
        tl.store(partial + row[:, None] * D + d[None, :], acc, mask=valid_rows)
        log_sum = tl.where(total == 0, float("-inf"), largest + tl.log2(total))
        tl.store(lse_log2 + row, log_sum, mask=r < n * G)


@triton.jit
def attention_decode_combine_kernel(
    partial, lse_log2, lengths, out, out_q, out_scale, ld_scale, B, W, n, cells,
    D: tl.constexpr, HKV: tl.constexpr, G: tl.constexpr,
    BLOCK_B: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    # One row of a sequence: programs first .. stop - 1 have its partial results.
    seq, row = tl.program_id(0), tl.program_id(1)
    b, d = tl.arange(0, BLOCK_B), tl.arange(0, BLOCK_D)
    tiles, ends, share = split_work(lengths, B, W, cells, BLOCK_B, BLOCK_N)
    end = tl.sum(tl.where(b == seq, ends, 0), 0)
    num_tiles = tl.sum(tl.where(b == seq, tiles, 0), 0)
    first, stop = (end - num_tiles) // share, tl.where(num_tiles > 0, (end - 1) // share + 1, 0)
    largest = tl.full((), float("-inf"), tl.float32)
    total = tl.zeros((), tl.float32)
    acc = tl.zeros((BLOCK_D,), tl.float32)
    for p0 in range(first, stop, BLOCK_P):
        p = p0 + tl.arange(0, BLOCK_P)
        offset = (p + seq).to(tl.int64) * (HKV * n * G) + row
        log_sum = tl.load(lse_log2 + offset, mask=p < stop, other=float("-inf"))
        inside = (p < stop)[:, None] & (d < D)[None, :]
        piece = tl.load(partial + offset[:, None] * D + d[None, :], mask=inside, other=0.0)
        larger = tl.maximum(largest, tl.max(log_sum, 0))
        base = tl.where(larger == float("-inf"), 0.0, larger)
        weight = tl.exp2(log_sum - base)
        shrink = tl.exp2(largest - base)
        total = total * shrink + tl.sum(weight, 0)
        acc = acc * shrink + tl.sum(weight[:, None] * piece, 0)
        largest = larger
    h, r = row // (n * G), row % (n * G)
    out_offset = ((seq.to(tl.int64) * n + r // G) * (HKV * G) + h * G + r % G) * D
    acc = acc / tl.where(total == 0, 1.0, total)
    acc = acc.to(out.dtype.element_ty)
    tl.store(out + out_offset + d, acc, mask=d < D)
    if out_q is not None:  # D = BLOCK_D = 128: a head is one block of scales
        q, scale = quantize_along(acc.to(tl.float32), 0, False)
        tl.store(out_q + out_offset + d, q)
        tl.store(out_scale + (h * G + r % G).to(tl.int64) * ld_scale + seq * n + r // G, scale)
