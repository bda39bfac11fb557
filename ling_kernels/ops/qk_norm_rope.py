"""Split of a fused QKV projection, RMS norm of every query and key head, rotation of their first R dims.

y = x / sqrt(mean(x^2) + eps) * w per head; then, with (a, b) the halves of y[:R] and the angles of the position,
(a, b) -> (a cos - b sin, b cos + a sin), which is NeoX's rotate-half. Dims from R on and the values pass unrotated.
"""

import math

import torch
from torch import Tensor

from ..op import expect, wide
from .attention_decode import KVCache, append


def qk_norm_rope(
    qkv: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor,
    num_kv_heads: int,
    eps: float = 1e-6,
    round_first: bool = False,
    cache: KVCache | None = None,
    slots: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """qkv [T, Hq + 2 Hkv, D], q_weight and k_weight [D] -> q [T, Hq, D], k and v [T, Hkv, D], in qkv's dtype.

    cos and sin [P, R/2] fp32 are those of `rope_tables`, R <= D; positions [T] int32 or int64 are their rows. Computed
    in fp32 and rounded once; round_first also rounds x / rms to qkv's dtype before the weight, as the official model's
    code does. Given a cache, k and v are also written into it at slots [T], see `append` of attention_decode. Gradient:
    to qkv and both weights, not through the cache. Raises ValueError for another shape or dtype, and on a CPU for a
    position outside 0..P-1.
    """
    T, H, D = qkv.shape if qkv.ndim == 3 else (-1, 0, 0)
    expect(T >= 0 and qkv.is_floating_point() and num_kv_heads > 0 and H > 2 * num_kv_heads and H % num_kv_heads == 0,
           "qkv [T, Hq + 2 Hkv, D], Hq % Hkv == 0", qkv, num_kv_heads)  # fmt: skip
    expect(q_weight.shape == k_weight.shape == (D,), "q_weight and k_weight [D]", q_weight, k_weight, qkv)
    expect(cos.ndim == 2 and cos.shape == sin.shape and cos.dtype == sin.dtype == torch.float32
           and 2 * cos.shape[1] <= D, "cos and sin [P, R/2] fp32, R <= D", cos, sin, qkv)  # fmt: skip
    expect(positions.shape == (T,) and positions.dtype in (torch.int32, torch.int64),
           "positions [T] int32 or int64", positions, qkv)  # fmt: skip
    expect((cache is None) == (slots is None), "cache and slots together", slots)
    if positions.device.type == "cpu" and not torch.compiler.is_compiling() and T:
        low, high = int(positions.min()), int(positions.max())
        expect(low >= 0 and high < len(cos), f"positions in 0..{len(cos) - 1}, the rows of cos and sin", low, high)
    return qk_norm_rope_ref(
        qkv, q_weight, k_weight, cos, sin, positions, num_kv_heads, eps, round_first, cache, slots
    )  # fmt: skip


def qk_norm_rope_ref(
    qkv, q_weight, k_weight, cos, sin, positions, num_kv_heads, eps=1e-6, round_first=False, cache=None, slots=None
):
    num_heads = qkv.shape[1] - 2 * num_kv_heads
    q, k, v = qkv.split([num_heads, num_kv_heads, num_kv_heads], dim=1)
    cos, sin = (table[positions.long()][:, None] for table in (cos, sin))  # [T, 1, R/2]
    q, k = (
        rotate(head_norm(x, w, eps, round_first), cos, sin).to(qkv.dtype) for x, w in ((q, q_weight), (k, k_weight))
    )
    v = v.contiguous()
    if cache is not None:
        append(cache, k, v, slots)
    return q, k, v


def head_norm(x: Tensor, w: Tensor, eps: float, round_first: bool) -> Tensor:
    xw = wide(x)
    xhat = xw * (xw.square().mean(-1, keepdim=True) + eps).rsqrt()
    return (wide(xhat.to(x.dtype)) if round_first else xhat) * wide(w)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    half = cos.shape[-1]
    a, b, rest = x.split([half, half, x.shape[-1] - 2 * half], dim=-1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin, rest], dim=-1)


def rope_tables(
    max_positions: int,
    rotary_dim: int,
    theta: float,
    scaling: dict | None = None,
    device: torch.device | str | None = None,
) -> tuple[Tensor, Tensor]:
    """cos and sin [max_positions, rotary_dim/2] fp32 of position * theta^(-2i / rotary_dim).

    scaling is a config's rope_scaling: None, or a dict whose `rope_type` (or `type`) is "default" or "yarn". Raises
    ValueError for another type, or a key that is missing or not understood.
    """
    expect(rotary_dim > 0 and rotary_dim % 2 == 0, "an even rotary_dim > 0", rotary_dim)
    inv_freq, attention_factor = rope_frequencies(rotary_dim, theta, scaling, device)
    angle = torch.arange(max_positions, dtype=torch.float32, device=device)[:, None] * inv_freq
    return angle.cos() * attention_factor, angle.sin() * attention_factor


YARN_KEYS = {
    "type", "rope_type", "factor", "original_max_position_embeddings", "beta_fast", "beta_slow", "attention_factor"
}  # fmt: skip


def rope_frequencies(
    rotary_dim: int, theta: float, scaling: dict | None, device: torch.device | str | None = None
) -> tuple[Tensor, float]:
    """Angle per position of each of the rotary_dim / 2 pairs, fp32, and the factor of cos and sin.

    YaRN (arXiv 2309.00071, with the defaults of transformers, which the official model calls): pairs that turn more
    than beta_fast times over the original length keep their frequency, those that turn less than beta_slow times have
    it divided by `factor`, a ramp lies between; cos and sin are scaled by 0.1 ln(factor) + 1.
    """
    pair = torch.arange(0, rotary_dim, 2, dtype=torch.float32, device=device)
    plain = 1.0 / theta ** (pair / rotary_dim)
    kind = "default" if not scaling else scaling.get("rope_type", scaling.get("type"))
    if kind == "default":
        return plain, 1.0
    expect(kind == "yarn", "rope scaling of type default or yarn", kind)
    unknown = sorted(scaling.keys() - YARN_KEYS)
    expect(not unknown, f"rope scaling with keys among {', '.join(sorted(YARN_KEYS))}", *unknown)
    missing = sorted({"factor", "original_max_position_embeddings"} - scaling.keys())
    expect(not missing, "rope scaling of type yarn with factor and original_max_position_embeddings", scaling)
    factor, length = float(scaling["factor"]), scaling["original_max_position_embeddings"]

    def pair_that_turns(times: float) -> float:
        return rotary_dim * math.log(length / (times * 2 * math.pi)) / (2 * math.log(theta))

    low = max(math.floor(pair_that_turns(scaling.get("beta_fast") or 32)), 0)
    high = min(math.ceil(pair_that_turns(scaling.get("beta_slow") or 1)), rotary_dim - 1)
    ramp = (torch.arange(len(plain), dtype=torch.float32, device=device) - low) / (high - low or 0.001)
    slowed = ramp.clamp(0, 1)
    default_factor = 0.1 * math.log(factor) + 1 if factor > 1 else 1.0
    attention_factor = scaling.get("attention_factor")
    return plain / factor * slowed + plain * (1 - slowed), attention_factor or default_factor
