"""Attention on a CPU by torch's own kernel, a sequence at a time: the values of `attention_ref` in less time.

torch.nn.functional.scaled_dot_product_attention runs this kernel; its log-sum-exp, which `attention` returns, is behind
the aten name alone. It aligns the causal mask at the top left, so queries and keys must be equally many.

The kernel computes up to 512 hidden scores of a row. So a causal sequence is halved until its blocks are short: each
block attends to itself, and at each halving the later half also to the earlier one, of which it sees every key.
"""

from collections.abc import Iterator
from itertools import groupby, pairwise

import torch
from torch import Tensor

from ..backend import forced
from ..op import op

aten = torch.ops.aten
SHORTEST = 64  # rows of a block


def sdpa_fits(q: Tensor, cu_k: Tensor | None) -> bool:
    """Whether torch's kernel runs for these operands: not where LING_BACKEND asks for the references."""
    return q.device.type == "cpu" and q.dtype == torch.float32 and cu_k is None and not forced()


@op("out", "lse", runs="torch")
def attention_cpu_fwd(
    q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, out: Tensor, lse: Tensor, causal: bool, scale: float
) -> None:
    def kernel(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> list[Tensor]:
        heads = (x.transpose(1, 2) for x in (q, k, v))
        found = aten._scaled_dot_product_flash_attention_for_cpu(*heads, 0.0, causal, scale=scale)
        return [x.transpose(1, 2) for x in found]

    q, k, v = (for_each_query_head(x, q.shape[1]) for x in (q, k, v))
    for rows, B, L in sequences(cu_q):
        q_, k_, v_ = (x[rows] for x in (q, k, v))
        splits = halvings(L) if causal else 0
        out_, lse_ = (x.flatten(0, 1) for x in kernel(*(blocks(x, B << splits) for x in (q_, k_, v_)), causal=causal))
        for split in reversed(range(splits)):
            number = B << split
            more, more_lse = kernel(later(q_, number), earlier(k_, number), earlier(v_, number), causal=False)
            before, before_lse = later(out_, number), later(lse_, number)
            before.lerp_(more, (more_lse - before_lse).sigmoid_()[..., None])
            before_lse.copy_(torch.logaddexp(before_lse, more_lse))
        out[rows], lse[:, rows] = out_, lse_.T


@op("dq", "dk", "dv", runs="torch")
def attention_cpu_bwd(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, cu_q: Tensor,
    dq: Tensor, dk: Tensor, dv: Tensor, causal: bool, scale: float,
) -> None:  # fmt: skip
    def kernel(dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, causal: bool) -> list[Tensor]:
        heads = (x.transpose(1, 2) for x in (dout, q, k, v, out, lse))
        grads = aten._scaled_dot_product_flash_attention_for_cpu_backward(*heads, 0.0, causal, scale=scale)
        return [x.transpose(1, 2) for x in grads]

    Hq, Hkv = q.shape[1], k.shape[1]
    q, k, v = (for_each_query_head(x, Hq) for x in (q, k, v))
    lse = lse.T.contiguous()
    for rows, B, L in sequences(cu_q):
        q_, k_, v_, dout_, out_, lse_ = (x[rows] for x in (q, k, v, dout, out, lse))
        splits = halvings(L) if causal else 0
        whole = (blocks(x, B << splits) for x in (dout_, q_, k_, v_, out_, lse_))
        dq_, dk_, dv_ = (x.flatten(0, 1) for x in kernel(*whole, causal=causal))
        for split in range(splits):
            number = B << split
            dout2, q2, out2, lse2 = (later(x, number) for x in (dout_, q_, out_, lse_))
            grads = kernel(dout2, q2, earlier(k_, number), earlier(v_, number), out2, lse2, causal=False)
            totals = later(dq_, number), earlier(dk_, number), earlier(dv_, number)
            for total, grad in zip(totals, grads, strict=True):
                total += grad
        dq[rows] = dq_
        dk[rows], dv[rows] = (x.unflatten(1, (Hkv, Hq // Hkv)).sum(2) for x in (dk_, dv_))


def sequences(cu_seqlens: Tensor) -> Iterator[tuple[slice, int, int]]:
    """Rows of neighbouring sequences of one length, which the kernel takes together, how many they are, the length."""
    first = 0
    for length, group in groupby(b - a for a, b in pairwise(cu_seqlens.tolist())):
        number = len([*group])
        if length:
            yield slice(first, first + number * length), number, length
        first += number * length


def halvings(L: int) -> int:
    """How often a sequence of L rows is halved."""
    return 0 if L % 2 or L < 2 * SHORTEST else 1 + halvings(L // 2)


def blocks(x: Tensor, number: int) -> Tensor:
    """[rows, H, ...] -> [number, rows / number, H, ...]."""
    return x.unflatten(0, (number, -1))


def earlier(x: Tensor, number: int) -> Tensor:
    """The first half of each of so many blocks, [number, rows / number / 2, H, ...]."""
    return blocks(x, 2 * number)[::2]


def later(x: Tensor, number: int) -> Tensor:
    """The second half of each."""
    return blocks(x, 2 * number)[1::2]


def for_each_query_head(x: Tensor, heads: int) -> Tensor:
    """[T, Hkv, D] -> [T, heads, D], dense in D: KV heads are repeated, each for as many neighbours."""
    x = x if x.stride(-1) == 1 else x.contiguous()
    return x if x.shape[1] == heads else x[:, :, None].expand(-1, -1, heads // x.shape[1], -1).flatten(1, 2)
