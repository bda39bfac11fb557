"""linghe's names (linghe.facade, of February 2026) over our ops.

`from ling_kernels.integrations import linghe`. Gradients as there; nothing is read on the host. Layouts that are
copied say so. An argument that would change the result and that we lack raises InputError. The facade's functions
whose results are FP8 tensors of Transformer Engine are in linghe_block.py.
"""

import torch
from torch import Tensor

from ..errors import InputError
from ..op import expect, values_on_host
from ..ops.cross_entropy import cross_entropy
from ..ops.qk_norm_rope import qk_norm_rope
from ..ops.rms_norm import rms_norm as norm_op
from ..ops.router_gemm import router_gemm
from .transformer_engine import dense_route


def group_topk_score(
    x: Tensor,
    topk: int,
    expert_bias: Tensor | None = None,
    num_groups: int = 32,
    group_topk: int = 4,
    scaling_factor: float = 1.0,
    score_function: str = "sigmoid",
) -> tuple[Tensor, Tensor, Tensor]:
    """x [T, E] or [S, B, E] -> probs as x, 0 off the chosen experts, routing_map bool as x, and its sum(0).

    topk // group_topk must be 2: the scores that a group adds up. Gradient: to x.
    """
    if score_function != "sigmoid":
        raise InputError(f"score_function is {score_function!r}; linghe and our router have sigmoid")
    probs, routing_map, counts = dense_route(x, topk, expert_bias, num_groups, group_topk, scaling_factor)
    return probs, routing_map, counts.long() if x.ndim == 2 else routing_map.sum(0)


def fp32_gemm(input: Tensor, weight: Tensor) -> Tensor:
    """input [..., H], weight [E, H] -> [..., E] fp32, with fp32's precision. Gradients in the dtypes of both."""
    return router_gemm(input.reshape(-1, input.shape[-1]), weight).view(*input.shape[:-1], len(weight))


def rms_norm(x: Tensor, weight: Tensor, eps: float = 1e-6) -> Tensor:
    return norm_op(x, weight, eps=eps)


def qk_norm_half_rope(
    qkv: Tensor,
    q_norm_weight: Tensor,
    k_norm_weight: Tensor,
    freqs: Tensor,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_kv: Tensor | None = None,
    H: int = 32,
    h: int = 4,
    eps: float = 1e-6,
    cp_rank: int = 0,
    cp_size: int = 1,
    mscale: float = 1.0,
    silu: bool = False,
    reuse: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """qkv [S, B, dim] -> q [B, S, H, D], k and v [B, S, h, D]; or with cu_seqlens_q qkv [T, dim] -> [T, H or h, D].

    dim = (H + 2h) D, as Megatron orders it: for each of h groups its query heads, its key, its value. Heads of q and k
    are normed, and their first D / 2 dims rotated, in halves; freqs [positions, .., D / 2] are angles, twice the same
    D / 4. mscale scales cosines and sines, cp_rank and cp_size say which two chunks of every sequence are here, both
    with cu_seqlens_q [sequences + 1] int32 only, whose lengths are those of whole sequences. Gradients: to qkv and both
    weights. qkv is copied once, into our order of heads.
    """
    if silu or reuse:
        raise InputError("qk_norm_half_rope: silu and reuse are not supported")
    if cu_seqlens_q is None and mscale != 1:
        raise InputError("qk_norm_half_rope: mscale counts with cu_seqlens_q only, as in linghe")
    packed = cu_seqlens_q is not None
    fits = qkv.ndim == (2 if packed else 3) and H % h == 0 and qkv.shape[-1] % (4 * (H + 2 * h)) == 0
    expect(fits, f"qkv [{'T' if packed else 'S, B'}, ({H} + 2 x {h}) D] with D % 4 == 0", qkv)
    D = qkv.shape[-1] // (H + 2 * h)
    expect(freqs.ndim > 1 and freqs.shape[-1] == D // 2 and freqs.numel() == len(freqs) * D // 2,
           f"freqs [positions, {D // 2}]", freqs)  # fmt: skip
    angles, again = freqs.reshape(len(freqs), D // 2).float().chunk(2, -1)
    if values_on_host(freqs):
        expect(torch.equal(angles, again), "freqs of two equal halves", freqs)
    if packed:
        heads, shape = qkv.view(len(qkv), H + 2 * h, D), (len(qkv),)
        positions = packed_positions(cu_seqlens_q, cu_seqlens_kv, len(qkv), cp_rank, cp_size)
    else:
        S, B = shape = qkv.shape[:2]
        expect(len(freqs) == S, f"freqs of {S} positions", freqs)
        heads, shape = qkv.view(S, B, H + 2 * h, D).transpose(0, 1), (B, S)
        positions = torch.arange(S, device=qkv.device).repeat(B)
    heads = heads.index_select(-2, query_heads_first(H, h, qkv.device)).view(-1, H + 2 * h, D)
    cos, sin = angles.cos() * mscale, angles.sin() * mscale
    q, k, v = qk_norm_rope(heads, q_norm_weight, k_norm_weight, cos, sin, positions, h, eps)
    return tuple(t.view(*shape, -1, D) for t in (q, k, v))


def query_heads_first(H: int, h: int, device: torch.device) -> Tensor:
    """The heads of Megatron's order, group by group, in ours: all queries, all keys, all values."""
    groups = torch.arange(H + 2 * h, device=device).view(h, H // h + 2)
    return torch.cat([part.flatten() for part in groups.split([H // h, 1, 1], 1)])


def packed_positions(cu_seqlens: Tensor, cu_seqlens_kv: Tensor | None, T: int, rank: int, size: int) -> Tensor:
    """[T] int64: the position in its sequence of each row here.

    With several ranks a sequence is cut into 2 x size chunks, and rank r has chunks r and 2 x size - 1 - r.
    """
    if cu_seqlens_kv is not None and cu_seqlens_kv is not cu_seqlens and values_on_host(cu_seqlens_kv):
        expect(torch.equal(cu_seqlens, cu_seqlens_kv), "cu_seqlens_kv equal to cu_seqlens_q", cu_seqlens_kv)
    starts = cu_seqlens.long() // size
    row = torch.arange(T, device=cu_seqlens.device)
    sequence = torch.searchsorted(starts[1:], row, right=True).clamp(max=len(starts) - 2)
    offset = row - starts[sequence]
    if size == 1:
        return offset
    chunk = (starts[sequence + 1] - starts[sequence]) // 2
    return torch.where(offset < chunk, offset + rank * chunk, offset + (2 * size - rank - 2) * chunk)


def softmax_cross_entropy(
    logits: Tensor, labels: Tensor, ignore_index: int = -100, inplace: bool = False, tp_group=None
) -> Tensor:
    """logits [..., V], labels [...] int64 -> the loss of each token, [...] fp32, 0 where it is ignored."""
    if inplace:
        raise InputError("softmax_cross_entropy: inplace is not supported; the gradient is a tensor of its own")
    if tp_group is not None and tp_group.size() > 1:
        raise InputError(
            "softmax_cross_entropy: no tp_group of several ranks; see vocabulary_cross_entropy in ling_kernels/parallel"
        )
    loss = cross_entropy(logits.reshape(-1, logits.shape[-1]), labels.reshape(-1), ignore_index, "none")
    return loss.view(labels.shape)
