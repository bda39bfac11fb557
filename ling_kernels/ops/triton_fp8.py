"""Device functions of FP8 (e4m3) in Triton: the scale of a block, a tile's codes, and the rows of a tile.

They equal `quantize_blocks` of quantize.py bit for bit. `x.to(tl.float8e4nv)` equals its `to_e4m3`: the conversion
rounds to nearest even, saturates at +-448 and keeps NaN.
"""

from .triton_import import tl, triton


@triton.jit
def fp8_amax(x, AXIS: tl.constexpr):
    """The largest |x| along AXIS of an fp32 tile; NaN where one is NaN."""
    # A float maximum drops NaN on a GPU. As integers, NaN > inf > every number.
    bits = tl.max(x.to(tl.int32, bitcast=True) & 0x7FFFFFFF, AXIS)
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def fp8_scale(amax, POW2: tl.constexpr):
    """max(amax / 448, 1e-30), rounded up to a power of two if POW2; NaN and inf stay."""
    scale = tl.div_rn(amax, 448.0)
    scale = tl.where(scale < 1e-30, 1e-30, scale)
    if POW2:
        bits = scale.to(tl.int32, bitcast=True)
        up = ((bits + 0x7FFFFF) & -0x800000).to(tl.float32, bitcast=True)
        scale = tl.where(bits < 0x7F800000, up, scale)
    return scale


@triton.jit
def fp8_round(x, scale, POW2: tl.constexpr):
    """x / scale as e4m3, for a scale that broadcasts to x."""
    # The reciprocal of a power of two is exact, and a product is many instructions cheaper than a correct quotient.
    return (x * tl.div_rn(1.0, scale) if POW2 else tl.div_rn(x, scale)).to(tl.float8e4nv)


@triton.jit
def quantize_along(x, AXIS: tl.constexpr, POW2: tl.constexpr):
    """Quantise an fp32 tile of 128 along AXIS: e4m3 of the same shape, and one scale per block, without AXIS."""
    scale = fp8_scale(fp8_amax(x, AXIS), POW2)
    return fp8_round(x, tl.expand_dims(scale, AXIS), POW2), scale


@triton.jit
def store_rows(x, rows, valid, k, x_q, x_scale, K, ld_scale, POW2: tl.constexpr):
    """Store the k-th 128 columns of the valid rows to x_q [M, K] and x_scale [M, K/128], strides 1 and ld_scale."""
    q, scale = quantize_along(x, 1, POW2)
    columns = k * 128 + tl.arange(0, 128)
    tl.store(x_q + rows.to(tl.int64)[:, None] * K + columns[None, :], q, mask=valid[:, None])
    tl.store(x_scale + k.to(tl.int64) * ld_scale + rows, scale, mask=valid)


@triton.jit
def store_columns(x, tile, k, xt_q, xt_scale, K, M_pad, POW2: tl.constexpr):
    """Store a 128 x 128 tile, transposed, to xt_q [K, M_pad] and xt_scale [K, M_pad/128], strides 1 and K."""
    q, scale = quantize_along(x, 0, POW2)
    columns = (k * 128 + tl.arange(0, 128)).to(tl.int64)
    m = tile * 128 + tl.arange(0, 128)
    tl.store(xt_q + columns[:, None] * M_pad + m[None, :], tl.trans(q))
    tl.store(xt_scale + tile.to(tl.int64) * K + columns, scale)


@triton.jit
def tile_rows(tile, M, offsets, padded_offsets, E, BLOCK_M: tl.constexpr, BLOCK_E: tl.constexpr):
    """(rows, valid, active): the rows of x in a tile, the mask of existing rows, and whether an expert owns the tile.

    padded_offsets None: tiles cover the rows of x up to M or, with a plan's offsets, up to its last routed row.
    Otherwise `tile` counts 128 columns of a column-wise copy, in which every expert starts a new tile.
    """
    i = tl.arange(0, BLOCK_M)
    if padded_offsets is None:
        rows = tile * BLOCK_M + i
        end = M if offsets is None else tl.load(offsets + E)
        active = tile * BLOCK_M < end
    else:
        start = tile * BLOCK_M
        e = tl.arange(0, BLOCK_E)
        ends = tl.load(padded_offsets + 1 + e, mask=e < E, other=2147483647)
        expert = tl.sum((ends <= start).to(tl.int32))
        active = expert < E
        first = tl.load(offsets + expert, mask=active, other=0)
        end = tl.load(offsets + expert + 1, mask=active, other=0)
        rows = first + start - tl.load(padded_offsets + expert, mask=active, other=0) + i
    return rows, rows < end, active
