"""Attention on a CPU by torch's own kernel, a sequence at a time: the values of `attention_ref` in less time.

torch.nn.functional.scaled_dot_product_attention runs this kernel; its log-sum-exp, which `attention` returns, is behind
the aten name alone. It aligns the causal mask at the top left, so queries and keys must be equally many.
"""

from collections.abc import Iterator
from itertools import groupby, pairwise

import torch
from torch import Tensor

from ..backend import forced
from ..op import op

aten = torch.ops.aten


def sdpa_fits(q: Tensor, cu_k: Tensor | None) -> bool:
    """Whether torch's kernel runs for these operands: not where LING_BACKEND asks for the references."""
    return q.device.type == "cpu" and q.dtype == torch.float32 and cu_k is None and not forced()


@op("out", "lse", runs="torch")
def attention_cpu_fwd(
    q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, out: Tensor, lse: Tensor, causal: bool, scale: float
) -> None:
    for rows, B in sequences(cu_q):
        heads = [as_heads(x[rows], B, q.shape[1]) for x in (q, k, v)]
        heads_out, heads_lse = aten._scaled_dot_product_flash_attention_for_cpu(*heads, 0.0, causal, scale=scale)
        out[rows] = heads_out.transpose(1, 2).flatten(0, 1)
        lse[:, rows] = heads_lse.transpose(0, 1).flatten(1)


@op("dq", "dk", "dv", runs="torch")
def attention_cpu_bwd(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, cu_q: Tensor,
    dq: Tensor, dk: Tensor, dv: Tensor, causal: bool, scale: float,
) -> None:  # fmt: skip
    Hq, Hkv = q.shape[1], k.shape[1]
    for rows, B in sequences(cu_q):
        dout_, q_, k_, v_, out_ = (as_heads(x[rows], B, Hq) for x in (dout, q, k, v, out))
        lse_ = lse[:, rows].unflatten(1, (B, -1)).transpose(0, 1).contiguous()
        grads = aten._scaled_dot_product_flash_attention_for_cpu_backward(
            dout_, q_, k_, v_, out_, lse_, 0.0, causal, scale=scale
        )
        for x, grad in zip((dq, dk, dv), grads, strict=True):
            heads = grad if x is dq else grad.unflatten(1, (Hkv, Hq // Hkv)).sum(2)
            x[rows] = heads.transpose(1, 2).flatten(0, 1)


def sequences(cu_seqlens: Tensor) -> Iterator[tuple[slice, int]]:
    """Rows of neighbouring sequences of one length, which the kernel takes together, and how many they are."""
    first = 0
    for length, group in groupby(b - a for a, b in pairwise(cu_seqlens.tolist())):
        number = len([*group])
        if length:
            yield slice(first, first + number * length), number
        first += number * length


def as_heads(x: Tensor, B: int, heads: int) -> Tensor:
    """[B L, H, D] -> [B, heads, L, D], dense in D; fewer heads are repeated, each for as many neighbours."""
    x = x if x.stride(-1) == 1 else x.contiguous()
    repeats = heads // x.shape[1]
    return (x.repeat_interleave(repeats, 1) if repeats > 1 else x).unflatten(0, (B, -1)).transpose(1, 2)
