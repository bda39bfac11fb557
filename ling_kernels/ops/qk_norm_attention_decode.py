"""qk_norm_rope of new tokens, their entry into a paged cache and their attention over it, in one launch and a combine.

The n new tokens of a sequence with `length` tokens, those n included, are at places length - n + i, which are also
their positions; a place below 0 is no token. Query i sees keys 0 .. length - n + i. Other programs may be at work on
the same sequence, so none reads cells that one writes: where keys are attended to that are new, they are made of qkv
there, rounded (or quantised) as the cache will have them.
"""

import torch
from torch import Tensor

from ..op import expect, op, use_reference, values_on_host
from .attention_decode import (
    KVCache,
    append,
    attention_decode_ref,
    expect_cache,
    expect_table,
    launch_decode,
    scratch,
    unsupported_cache,
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

    Writes the new keys and values into the cache, quantised where it is FP8, at the cells that block_table
    [B, max_blocks] int32 gives their places; no two tokens may have one cell. As `qk_norm_rope` with that cache at
    positions length - n + i and `attention_decode` after it, whose other arguments, dtypes and errors these are; a
    query may differ in a last bit. quantize appends what the op `quantize` makes of out as [B n, Hq D], of D = 128 in
    the same launch (Hq D % 128 == 0). Rows of length 0 are padding, which enters nothing and gives 0. No gradient.
    Deterministic. Raises ValueError also, on a CPU, for a length beyond the rows of cos and sin. On a GPU a build of
    csrc/ with LING_DEBUG=1 stops at such; otherwise such a token is NaN, and one whose page the cache does not have is
    not kept.
    """
    B, n, H, D = qkv.shape if qkv.ndim == 4 else (-1, 0, 0, 0)
    expect(B >= 0 and 1 <= n <= 8 and D > 0 and qkv.is_floating_point(),
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
    at_once = quantize and D == BLOCK
    out_q, out_scale, *_ = empty_fp8(out, B * n, Hq * D, at_once, False, None)
    qkv, *norm, block_table, lengths = (t.detach().contiguous() for t in (qkv, *norm, block_table, lengths))
    qk_norm_attention_decode_fwd(
        qkv, *norm, *cache, block_table, lengths, out, out_q, out_scale, *scratch(out, cache, block_table, True),
        scale, eps,
    )  # fmt: skip
    if quantize and not at_once:
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
    at = lengths[:, None] - n + torch.arange(n, device=qkv.device)  # [B, n]
    q, k, v = qk_norm_rope_ref(qkv.flatten(0, 1), q_weight, k_weight, cos, sin, at.flatten().clamp(min=0), Hkv, eps)
    page = block_table.gather(1, (at // block_size).clamp(0, block_table.shape[1] - 1)).long()
    real = (at >= 0) & (at < block_table.shape[1] * block_size) & (page >= 0) & (page < num_blocks)
    slots = torch.where(real, page * block_size + at % block_size, -1)
    append_some(k, v, slots.flatten(), *cache)
    scale = D**-0.5 if scale is None else scale
    return attention_decode_ref(q.unflatten(0, (B, n)), cache, block_table, lengths, scale)


@op("k_cache", "v_cache", "k_scale", "v_scale", runs="torch")
def append_some(
    k: Tensor, v: Tensor, slots: Tensor,
    k_cache: Tensor, v_cache: Tensor, k_scale: Tensor | None, v_scale: Tensor | None,
) -> None:  # fmt: skip
    """`append` of the rows whose slot is not negative. An op, since their number is not known to a compiler."""
    real = slots >= 0
    append(KVCache(k_cache, v_cache, k_scale, v_scale), k[real], v[real], slots[real])


def unsupported(
    qkv, q_weight, k_weight, cos, sin, k, v, k_scale, v_scale, block_table, lengths, out, out_q, out_scale, partial,
    *others,
) -> str | None:  # fmt: skip
    return unsupported_heads(qkv, q_weight, k_weight, cos, sin) or unsupported_cache(
        qkv, k, v, k_scale, v_scale, out, partial
    )


@op("k", "v", "k_scale", "v_scale", "out", "out_q", "out_scale", "partial", "lse", cuda=unsupported)
def qk_norm_attention_decode_fwd(
    qkv: Tensor, q_weight: Tensor, k_weight: Tensor, cos: Tensor, sin: Tensor,
    k: Tensor, v: Tensor, k_scale: Tensor | None, v_scale: Tensor | None, block_table: Tensor, lengths: Tensor,
    out: Tensor, out_q: Tensor | None, out_scale: Tensor | None, partial: Tensor, lse: Tensor,
    scale: float, eps: float,
) -> None:  # fmt: skip
    """partial and lse are what `scratch` of attention_decode gives, out_q and out_scale `empty_fp8` for out's rows."""
    cells = k, v, k_scale, v_scale, block_table, lengths
    norm = q_weight, k_weight, cos, sin
    launch_decode(qkv, *cells, out, partial, lse, scale, norm, eps, out_q, out_scale)
