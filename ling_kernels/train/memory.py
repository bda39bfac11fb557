"""What a MoE layer keeps of its forward for its backward: bytes a token, by part and by recompute level."""

from ..errors import InputError
from ..model import LingConfig
from ..nn.fp8 import RECOMPUTE
from ..ops.quantize import BLOCK, padded_slots

FP8 = 1 + 4 / BLOCK  # a column-wise copy: a byte and its share of an fp32 scale for each 128


def kept_bytes(c: LingConfig, precision: str = "fp8", recompute: str = "none", wgrad: str = "fp8") -> dict[str, float]:
    """Of a token in a MoE layer, bf16 activations: {part: bytes}. precision bf16 knows none and full.

    A tensor that several operations keep counts once, where it is first kept: the router keeps the input of experts
    and shared expert. Whatever does not grow with the tokens, FP8 weights and padding (`padding_bytes`), is left out.
    """
    if recompute not in (RECOMPUTE if precision == "fp8" else ("none", "full")):
        raise InputError(f"recompute {recompute!r} with precision {precision!r}")
    H, D, k = c.hidden_size, c.head_dim, c.num_experts_per_tok
    F, Fs = k * c.moe_intermediate_size, c.num_shared_experts * c.moe_intermediate_size
    if recompute == "full":
        return {"layer's input": 2 * H}
    heads, all_heads = c.num_attention_heads * D, (c.num_attention_heads + 2 * c.num_key_value_heads) * D
    fp8 = precision == "fp8"
    columns, again = fp8 and wgrad == "fp8", recompute in ("norm_act", "experts")
    parts = {
        "norms": 2 * (2 * H + 4) - 4 * again,  # their inputs, and one over the root mean square
        "qkv": 0 if again else FP8 * H if columns else 2 * H,
        "attention": 2 * all_heads + 2 * heads + 4 * c.num_attention_heads,  # q, k, v; output; log-sum-exp
        "attention output": FP8 * heads if columns else 0,  # in bf16 it is the attention's own
        "router": 2 * H + 4 * c.num_experts + 4 * k,  # input, logits, choices
        "plan": (3 if fp8 else 2) * 4 * k,  # slot, weights, and FP8's source
    }
    keep = columns and recompute == "none"
    if not fp8:
        parts |= {"experts": 2 * H * k + 3 * 2 * F + 2 * H * k, "shared expert": 3 * 2 * Fs}  # in, h, SwiGLU, out
    else:
        h = 0 if recompute == "experts" else 4
        parts["experts"] = h * F + (FP8 * (k * H + F) if keep else 0)
        parts["shared expert"] = 4 * Fs + (FP8 * (H + Fs) if keep else 0)
    return parts


def padding_bytes(c: LingConfig, slots: int, recompute: str = "none", wgrad: str = "fp8", ep: int = 1) -> float:
    """Of the experts' column-wise copies in a layer and micro batch, whose runs start at multiples of 128; where so
    many GPUs share the experts, of the slots that come to one of them."""
    if recompute != "none" or wgrad != "fp8":
        return 0
    return FP8 * (padded_slots(slots, c.num_experts // ep) - slots) * (c.hidden_size + c.moe_intermediate_size)
