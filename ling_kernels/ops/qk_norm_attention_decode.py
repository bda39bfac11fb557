"""qk_norm_rope of new tokens, their append to a paged cache and attention over it, in one kernel (Triton: two).

The n new tokens of a sequence with `length` tokens, those n included, have positions length - n + i; a negative one is
no token. Query i sees keys 0 .. length - n + i. Several programs work on a sequence, so none reads cells that another
writes: a program that attends to new keys computes them from qkv, and rounds or quantises them as the cache does.
"""

import torch
from torch import Tensor

from ..op import E4M3, expect, op, use_reference, values_on_host
from .attention_decode import (
    KVCache,
    attention_decode_ref,
    expect_cache,
    expect_table,
    launch_decode,
    scratch,
    unsupported_cache,
    write,
)
from .qk_norm_rope import expect_norm, qk_norm_rope_ref, unsupported_heads
from .quantize import BLOCK, empty_fp8, quantize_ref
from .quantize import quantize as quantize_rows


def qk_norm_attention_decode(
    qkv: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    cos: Tensor,
    sin: Tensor,
    cache: KVCache,
    block_table: Tensor,
    lengths: Tensor,
    scale: float | None = None,
    eps: float = 1e-6,
    quantize: bool = False,
) -> Tensor | tuple[Tensor, Tensor, Tensor]:
    """qkv [B, n, Hq + 2 Hkv, D] of n = 1..8 new tokens, counted in lengths [B] int32 -> out [B, n, Hq, D] in its dtype.

    Also writes the new keys and values into the cache, quantised if it is FP8, in the cells that block_table
    [B, max_blocks] int32 gives for their positions; no two tokens may share a cell. Equals `qk_norm_rope` with that
    cache at positions length - n + i and then `attention_decode`, up to a last bit of a query; other arguments, dtypes
    and errors are as in the two ops. quantize appends quantize(out as [B n, Hq D]) to the result, in the same kernel
    if D = 128 (Hq D % 128 == 0). Rows of length 0 are padding: they write nothing and give 0. No gradient.
    Deterministic. Raises ValueError also, on a CPU, for a length beyond the rows of cos and sin. On a GPU csrc/ built
    with LING_DEBUG=1 stops at it; otherwise the token is NaN. A token whose page is outside the cache is not written.
    """
    B, n, H, D = qkv.shape if qkv.ndim == 4 else (-1, 0, 0, 0)
    wide = qkv.is_floating_point() and qkv.dtype != E4M3
    expect(B >= 0 and 1 <= n <= 8 and D > 0 and wide,
           "qkv [B, n, Hq + 2 Hkv, D] with n in 1..8 and D > 0", qkv)  # fmt: skip
    expect_cache(cache)
    num_blocks, block_size, Hkv, _ = cache.k.shape
    expect(cache.k.shape[3] == D and H > 2 * Hkv > 0 and H % Hkv == 0, "a cache of qkv's D and Hkv, which divides Hq",
           qkv, cache.k)  # fmt: skip
    expect_norm(qkv, q_weight, k_weight, cos, sin)
    expect_table(block_table, lengths, qkv, cache)
    if values_on_host(lengths):
        longest = int(lengths.max()) if B else 0
        expect(longest <= len(cos), f"positions in 0..{len(cos) - 1}, the rows of cos and sin", longest - 1)
    Hq = H - 2 * Hkv
    expect(not quantize or Hq * D % BLOCK == 0, "heads of 128 for FP8", qkv)
    scale = D**-0.5 if scale is None else scale
    norm = q_weight, k_weight, cos, sin
    if use_reference("qk_norm_attention_decode", qkv, q_weight, k_weight, cache.k):
        return qk_norm_attention_decode_ref(qkv, *norm, cache, block_table, lengths, scale, eps, quantize)
    out = qkv.new_empty(B, n, Hq, D)
    if 0 in (B, num_blocks, block_size, block_table.shape[1]):
        out.zero_()
        return (out, *quantize_rows(out.flatten(2).flatten(0, 1))) if quantize else out
    quantize_in_kernel = quantize and D == BLOCK
    out_q, out_scale, *_ = empty_fp8(out, B * n, Hq * D, quantize_in_kernel, False, None)
    qkv, *norm, block_table, lengths = (t.detach().contiguous() for t in (qkv, *norm, block_table, lengths))
    qk_norm_attention_decode_fwd(
        qkv, *norm, *cache, block_table, lengths, out, out_q, out_scale, *scratch(out, cache, block_table, True),
        scale, eps,
    )  # fmt: skip
    if quantize and not quantize_in_kernel:
        out_q, out_scale = quantize_rows(out.flatten(2).flatten(0, 1))
    return (out, out_q, out_scale) if quantize else out


@torch.no_grad()
def qk_norm_attention_decode_ref(
    qkv, q_weight, k_weight, cos, sin, cache, block_table, lengths, scale=None, eps=1e-6,
    quantize=False,
):  # fmt: skip
    B, n, H, D = qkv.shape
    num_blocks, block_size, Hkv, _ = cache.k.shape
    out = qkv.new_zeros(B, n, H - 2 * Hkv, D)
    if B and num_blocks and block_table.shape[1] * block_size:
        norm = q_weight, k_weight, cos, sin
        out = attend_and_append(qkv, *norm, cache, block_table, lengths, scale, eps)
    return (out, *quantize_ref(out.flatten(2).flatten(0, 1))) if quantize else out


def attend_and_append(qkv, q_weight, k_weight, cos, sin, cache, block_table, lengths, scale, eps):
    B, n, _, D = qkv.shape
    num_blocks, block_size, Hkv, _ = cache.k.shape
    position = lengths[:, None] + torch.arange(-n, 0, device=qkv.device)  # [B, n]
    q, k, v = qk_norm_rope_ref(
        qkv.flatten(0, 1), q_weight, k_weight, cos, sin, position.flatten().clamp(min=0), Hkv, eps
    )
    column = position // block_size
    page = block_table.gather(1, column.clamp(0, block_table.shape[1] - 1)).long()
    if values_on_host(lengths):  # whose table has been checked
        real = position >= 0
    else:
        real = (position >= 0) & (column < block_table.shape[1]) & (page >= 0) & (page < num_blocks)
    slots = torch.where(real, page * block_size + position % block_size, -1)
    append_some(k, v, slots.flatten(), *cache)
    scale = D**-0.5 if scale is None else scale
    return attention_decode_ref(q.unflatten(0, (B, n)), cache, block_table, lengths, scale)


@op("k_cache", "v_cache", "k_scale", "v_scale", runs="torch")
def append_some(
    k: Tensor, v: Tensor, slots: Tensor,
    k_cache: Tensor, v_cache: Tensor, k_scale: Tensor | None, v_scale: Tensor | None,
) -> None:  # fmt: skip
    """`write` of the rows whose slot is not negative. An op, because a compiler does not know their number."""
    real = slots >= 0
    if not bool(real.all()):  # on a CPU a mask costs more than the rows
        k, v, slots = k[real], v[real], slots[real]
    write(KVCache(k_cache, v_cache, k_scale, v_scale), k, v, slots)


def unsupported(
    qkv, q_weight, k_weight, cos, sin, k, v, k_scale, v_scale, block_table, lengths, out, out_q, out_scale, partial,
    *others,
) -> str | None:  # fmt: skip
    return unsupported_heads(qkv, q_weight, k_weight, cos, sin) or unsupported_cache(
        qkv, k, v, k_scale, v_scale, out, partial
    )


@op("k", "v", "k_scale", "v_scale", "out", "out_q", "out_scale", "partial", "lse_log2", cuda=unsupported)
def qk_norm_attention_decode_fwd(
    qkv: Tensor, q_weight: Tensor, k_weight: Tensor, cos: Tensor, sin: Tensor,
    k: Tensor, v: Tensor, k_scale: Tensor | None, v_scale: Tensor | None, block_table: Tensor, lengths: Tensor,
    out: Tensor, out_q: Tensor | None, out_scale: Tensor | None, partial: Tensor, lse_log2: Tensor,
    scale: float, eps: float,
) -> None:  # fmt: skip
    """partial and lse_log2 come from attention_decode.scratch, out_q and out_scale from `empty_fp8` for out's rows."""
    cells = k, v, k_scale, v_scale, block_table, lengths
    norm = q_weight, k_weight, cos, sin
    launch_decode(qkv, *cells, out, partial, lse_log2, scale, norm, eps, out_q, out_scale)
