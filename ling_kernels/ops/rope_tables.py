"""Cosines and sines of rotary position embedding, plain or stretched by YaRN (arXiv 2309.00071)."""

import math

import torch
from torch import Tensor

from ..op import expect


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
    """The angle per position of each of the rotary_dim / 2 pairs, fp32, and the factor of cos and sin.

    YaRN (arXiv 2309.00071, with the defaults of transformers, which the official model uses): pairs with more than
    beta_fast rotations over the original length keep their frequency; that of pairs with less than beta_slow rotations
    is divided by `factor`; a linear ramp joins the two. cos and sin are scaled by 0.1 ln(factor) + 1.
    """
    pair = torch.arange(0, rotary_dim, 2, dtype=torch.float32, device=device)
    plain = 1.0 / float(theta) ** (pair / rotary_dim)
    kind = "default" if not scaling else scaling.get("rope_type") or scaling.get("type")
    if kind == "default":
        return plain, 1.0
    expect(kind == "yarn", "rope scaling of type default or yarn", kind)
    unknown = sorted(scaling.keys() - YARN_KEYS)
    expect(not unknown, f"rope scaling with keys among {', '.join(sorted(YARN_KEYS))}", *unknown)
    missing = sorted({"factor", "original_max_position_embeddings"} - scaling.keys())
    expect(not missing, "rope scaling of type yarn with factor and original_max_position_embeddings", scaling)
    factor, length = float(scaling["factor"]), scaling["original_max_position_embeddings"]

    def pair_with_rotations(number: float) -> float:
        return rotary_dim * math.log(length / (number * 2 * math.pi)) / (2 * math.log(theta))

    low = max(math.floor(pair_with_rotations(scaling.get("beta_fast") or 32)), 0)
    high = min(math.ceil(pair_with_rotations(scaling.get("beta_slow") or 1)), rotary_dim - 1)
    ramp = ((torch.arange(len(plain), dtype=torch.float32, device=device) - low) / (high - low or 0.001)).clamp(0, 1)
    default_factor = 0.1 * math.log(factor) + 1 if factor > 1 else 1.0
    attention_factor = scaling.get("attention_factor")
    return plain / factor * ramp + plain * (1 - ramp), attention_factor or default_factor
