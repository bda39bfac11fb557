"""qk_norm_rope and causal self-attention over packed sequences in one op."""

from torch import Tensor

from .attention import attention, attention_ref
from .qk_norm_rope import qk_norm_rope, qk_norm_rope_ref


def qk_norm_attention(
    qkv: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor,
    num_kv_heads: int,
    cu_seqlens: Tensor,
    causal: bool = True,
    scale: float | None = None,
    eps: float = 1e-6,
    round_first: bool = False,
) -> tuple[Tensor, Tensor]:
    """qkv [T, Hq + 2 Hkv, D], packed as cu_seqlens [B + 1] int32 says -> out [T, Hq, D] and lse [Hq, T] fp32.

    The other arguments, dtypes and errors are those of `qk_norm_rope` and `attention`, which this composes. Gradient:
    to qkv and both weights; lse is not differentiable.
    """
    q, k, v = qk_norm_rope(qkv, q_weight, k_weight, cos, sin, positions, num_kv_heads, eps, round_first)
    return attention(q, k, v, cu_seqlens, None, causal, scale)


def qk_norm_attention_ref(
    qkv, q_weight, k_weight, cos, sin, positions, num_kv_heads, cu_seqlens,
    causal=True, scale=None, eps=1e-6, round_first=False,
):  # fmt: skip
    q, k, v = qk_norm_rope_ref(qkv, q_weight, k_weight, cos, sin, positions, num_kv_heads, eps, round_first)
    return attention_ref(q, k, v, cu_seqlens, None, causal, scale)
