"""Functions that take the part of a transformers module: experts, attention with its mask, RMSNorm.

The first three are registered under the name "ling_kernels" in transformers 5. Each refuses in one line what no kernel
computes, so that no field of a configuration is ignored silently.
"""

from typing import Any

import torch
from torch import Tensor, nn

from ...errors import InputError
from ...op import upcast
from ...ops.attention import attention
from ...ops.dispatch import dispatch_here
from ...ops.moe import expert_mlp
from ...ops.rms_norm import rms_norm

NAME = "ling_kernels"
SILU = ("SiLU", "SiLUActivation")
CLAMPS = ("limit", "swiglu_limit", "clamp_limit", "alpha", "beta")  # attributes of experts whose SwiGLU is another one


def experts_forward(self: nn.Module, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """hidden_states [T, H], top_k_index and top_k_weights [T, topk] -> [T, H].

    The module has gate_up_proj [E, 2F, H] and down_proj [E, H, F].

    A choice outside 0..E-1 is dropped: no row is read for it, and its weight gets no gradient. Expert parallelism marks
    choices of other ranks so. Weights are applied after the down projection, in fp32. Raises InputError for experts of
    another formula or layout.
    """
    refuse_experts(self)
    gate_up, down = self.gate_up_proj, self.down_proj
    x = hidden_states if torch.is_autocast_enabled(hidden_states.device.type) else hidden_states.to(gate_up.dtype)
    y = expert_mlp(x, dispatch_here(top_k_index, len(gate_up)), upcast(top_k_weights), gate_up, down)
    return y.to(hidden_states.dtype)


def refuse_experts(module: nn.Module) -> None:
    """Raise InputError for experts that are not SwiGLU without bias over stacked [E, 2F, H] and [E, H, F] weights."""
    kind = type(module).__name__
    gate = getattr(type(module), "_apply_gate", None)
    wrong = [
        f"{name} {getattr(module, name)}"
        for name, value in dict(has_gate=True, has_bias=False, is_transposed=False, is_concatenated=True,
                                has_post_expert_norm=False).items()
        if getattr(module, name, value) != value
    ]  # fmt: skip
    wrong += [f"{name} {getattr(module, name)}" for name in CLAMPS if getattr(module, name, None) is not None]
    activation = type(getattr(module, "act_fn", None)).__name__
    if activation not in SILU:
        wrong.append(f"the activation {activation}")
    if gate is not None and gate.__name__ != "_default_apply_gate":
        wrong.append("a gate of its own")
    if wrong:
        raise InputError(f"ling_kernels has no kernel for {kind} with {', '.join(wrong)}; use another"
                         " experts_implementation")  # fmt: skip


def attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """query [B, Hq, Lq, D], key and value [B, Hkv, Lk, D] -> out [B, Lq, Hq, D], and None for the probabilities.

    attention_mask: [B, Lk], True at tokens, from `attention_mask_of`; None: no padding. In causal attention the last Lq
    of the Lk tokens are the queries', and outputs at padding are 0; in other attention, which may be that of a decoder
    to an encoder, the mask is of keys alone. Documents packed in rows come as cu_seq_lens_q [documents + 1], or by
    position_ids [1 or B, L] that start anew. Raises InputError for masks that are not causal with padding, windows,
    sinks, soft caps and dropout.
    """
    refuse_attention(attention_mask, dropout, kwargs)
    B, _, Lq, _ = query.shape
    Lk = key.shape[2]
    q, k, v = (x.transpose(1, 2).flatten(0, 1) for x in (query, key, value))  # [B L, heads, D]
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    documents, rows = kwargs.get("cu_seq_lens_q"), None
    if documents is None and attention_mask is None and Lq == Lk:
        documents = documents_of(kwargs.get("position_ids"), B)
    if documents is not None:
        cu_q, cu_k = documents.int(), kwargs.get("cu_seq_lens_k", documents).int()
    else:
        row = torch.arange(B + 1, device=q.device, dtype=torch.int32)
        cu_k = row * Lk
        cu_q = cu_k if Lq == Lk else row * Lq
    if documents is None and attention_mask is not None:
        rows_k, cu_k = tokens_of(attention_mask, Lk)
        k, v = k[rows_k], v[rows_k]
        if causal:
            rows, cu_q = tokens_of(attention_mask, Lq)
            q = q[rows]
    out, _ = attention(q, k, v, cu_q, None if cu_k is cu_q else cu_k, causal, scaling)
    if rows is not None:
        out = out.new_zeros(B * Lq, *out.shape[1:]).index_copy(0, rows, out)
    return out.unflatten(0, (B, Lq)), None


def tokens_of(mask: Tensor, last: int) -> tuple[Tensor, Tensor]:
    """mask [B, L] bool -> the indices of the tokens in its flattened last columns, and cu_seqlens [B + 1] int32.

    They are kept at the mask, which all layers of a forward share: the host waits for the GPU once, not in each.
    """
    kept = vars(mask).setdefault("tokens_of_ling_kernels", {})
    if last not in kept:
        columns = mask[:, mask.shape[1] - last :]
        bounds = nn.functional.pad(columns.sum(-1).cumsum(0), (1, 0)).int()
        kept[last] = columns.flatten().nonzero().flatten(), bounds
    return kept[last]


def documents_of(position_ids: Tensor | None, batch_size: int) -> Tensor | None:
    """position_ids [1 or B, L] -> cu_seqlens [documents + 1] int32, where they start anew inside of a row; else None.

    It is kept at position_ids, which all layers share: the host waits for the GPU once.
    """
    if not isinstance(position_ids, Tensor) or position_ids.ndim != 2 or position_ids.shape[1] < 2:
        return None
    kept = vars(position_ids)
    if "documents_of_ling_kernels" not in kept:
        starts = ~nn.functional.pad(same_document(position_ids, 1)[:, :-1], (1, 0)).expand(batch_size, -1).flatten()
        bounds = starts.nonzero().flatten()
        one_each = len(bounds) == batch_size
        bounds = None if one_each else nn.functional.pad(bounds, (0, 1), value=len(starts)).int()
        kept["documents_of_ling_kernels"] = bounds
    return kept["documents_of_ling_kernels"]


def same_document(position_ids: Tensor, ahead: int) -> Tensor:
    """position_ids [1 or B, L] -> whether a token and the one `ahead` later in its row belong to the same document."""
    return nn.functional.pad(position_ids, (0, ahead), value=-1)[:, ahead:] == position_ids + ahead


def refuse_attention(mask: Tensor | None, dropout: float, kwargs: dict[str, Any]) -> None:
    """Raise InputError for arguments that ask for another attention than a causal one with padding."""
    wrong = [f"{name} {kwargs[name]!r}" for name in ("sliding_window", "softcap") if kwargs.get(name) is not None]
    if kwargs.get("s_aux") is not None:
        wrong.append("attention sinks (s_aux)")
    if dropout:
        wrong.append(f"dropout {dropout}")
    if mask is not None and mask.ndim != 2:
        wrong.append(f"a mask of {mask.ndim} dimensions")
    if type(kwargs.get("cache")).__name__ == "PagedAttentionCache":
        wrong.append("a paged cache")
    if wrong:
        raise InputError(f"ling_kernels has no attention kernel for {', '.join(wrong)}; use another"
                         " attn_implementation")  # fmt: skip


def attention_mask_of(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    mask_function: Any = None,
    attention_mask: Tensor | None = None,
    **kwargs: Any,
) -> Tensor | None:
    """The mask that `attention_forward` takes: attention_mask [B, Lk] where it has padding, else None.

    Raises InputError for masks other than causal ones with padding, and for caches of a fixed length.
    """
    name = getattr(mask_function, "__name__", None)
    if name not in (None, "causal_mask_function", "bidirectional_mask_function"):
        raise InputError("ling_kernels has no attention kernel for this mask, which is not causal with padding (it has"
                         " a window, or documents packed by position_ids alone); use another"
                         " attn_implementation")  # fmt: skip
    if name == "bidirectional_mask_function":  # perhaps of a decoder that attends to an encoder: any number of queries
        pass
    elif isinstance(q_offset, Tensor) or kv_offset or kv_length != q_offset + q_length:
        raise InputError(f"ling_kernels has no attention kernel for {q_length} new tokens and {kv_length} positions (a"
                         " cache of a fixed length, or an attention_mask of another one); use a dynamic cache or"
                         " another attn_implementation")  # fmt: skip
    if attention_mask is None:
        return None
    mask = attention_mask[:, -kv_length:].bool()
    return None if mask.all() else mask


def rms_norm_forward(self: nn.Module, hidden_states: Tensor) -> Tensor:
    """The forward of a norm with `weight` [N] and `variance_epsilon`: y in the type that x * weight has."""
    y: Any = rms_norm(hidden_states, self.weight, None, self.variance_epsilon)
    return y.to(torch.promote_types(hidden_states.dtype, self.weight.dtype))


def register() -> None:
    """Put the functions into the registries of transformers 5 under `NAME`."""
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    ALL_EXPERTS_FUNCTIONS.register(NAME, experts_forward)
    ALL_ATTENTION_FUNCTIONS.register(NAME, attention_forward)
    ALL_MASK_ATTENTION_FUNCTIONS.register(NAME, attention_mask_of)
