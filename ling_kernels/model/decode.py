"""A plain decode loop over a paged KV cache, one batch at a time. ling_kernels.generate has the serving engine."""

from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor

from ..errors import InputError
from ..nn import BatchLayout
from ..op import expect
from ..ops.attention_decode import KVCache
from ..ops.sample import sample
from .config import token_ids
from .packing import pack
from .sample import BAD_LOGITS

PAGE = 64  # tokens per page of the KV cache


def greedy(logits: Tensor, ids: Tensor) -> Tensor:
    """logits [B, V] -> [B] int64, the lowest index among equal maxima. Raises InputError for NaN or infinite logits."""
    tokens = sample(logits)
    if bool((tokens < 0).any()):
        raise InputError(BAD_LOGITS)
    return tokens


@torch.inference_mode()
def stream(
    model,
    input_ids: Tensor,
    max_new_tokens: int,
    attention_mask: Tensor | None = None,
    choose: Callable[[Tensor, Tensor], Tensor] | None = None,
    eos_token_id: int | Iterable[int] | None = None,
) -> Iterator[Tensor]:
    """Yield the next token of every sequence, [B] int64, at most max_new_tokens times.

    input_ids [B, L] int64; attention_mask [B, L] is 1 at tokens and 0 at padding, on either side. choose(logits [B, V]
    fp32, ids [B, n] int64) -> [B] int64 selects the tokens, default greedy; ids are the prompt and the tokens so far,
    with each sequence's first token in the place of padding. After eos_token_id, one token or several, a sequence
    repeats it; when all sequences have ended, so does the stream. MTP layers are not used. Raises ValueError for an
    empty prompt or if prompt and new tokens exceed config.max_positions.
    """
    config, choose = model.config, choose or greedy
    expect(isinstance(max_new_tokens, int), "max_new_tokens of an integer", max_new_tokens)
    batch = pack(input_ids, attention_mask, None, config.max_positions)
    B, device = len(input_ids), input_ids.device
    lengths = batch.cu_seqlens.diff()
    longest = int(lengths.max()) if B else 0
    expect(B == 0 or int(lengths.min()) > 0, "at least one token in every prompt", lengths.tolist())
    expect(longest + max_new_tokens <= config.max_positions,
           f"prompt and new tokens within the model's {config.max_positions} positions",
           longest, max_new_tokens)  # fmt: skip
    if B == 0 or max_new_tokens <= 0:
        return
    pages = -(-(longest + max_new_tokens) // PAGE)  # per sequence
    block_table = torch.arange(B * pages, device=device, dtype=torch.int32).view(B, pages)
    dtype = model.word_embeddings.weight.dtype
    caches = empty_caches(config, len(model.layers), B * pages, PAGE, dtype, device)

    sequence = torch.arange(B, device=device)
    sequence_of_row = sequence.repeat_interleave(lengths)
    slots = sequence_of_row * pages * PAGE + batch.positions
    layout = BatchLayout(model.cos, model.sin, batch.positions, batch.cu_seqlens, slots)
    h, _ = model.backbone(batch.ids, layout, caches, norm=False)
    h = h[batch.cu_seqlens[1:].long() - 1]  # the last row of each prompt
    ids, done = input_ids, torch.zeros(B, dtype=torch.bool, device=device)
    if attention_mask is not None:  # padding is not part of the sequence: a repetition penalty must not see it
        ids = torch.where(attention_mask.bool(), ids, batch.ids[batch.cu_seqlens[:-1].long(), None])
    ends = torch.tensor(token_ids(eos_token_id), dtype=torch.long, device=device)
    for step in range(max_new_tokens):
        token = choose(model.logits(h, norm=True), ids)
        if len(ends):
            token = torch.where(done, ids[:, -1], token)
            done = done | torch.isin(token, ends)
        yield token
        if step + 1 == max_new_tokens or (len(ends) and bool(done.all())):
            return
        ids = torch.cat([ids, token[:, None]], 1)
        slots = sequence * pages * PAGE + lengths
        positions, lengths = lengths.long(), lengths + 1
        layout = BatchLayout(model.cos, model.sin, positions, batch.cu_seqlens, slots, B, block_table, lengths)
        layout = layout.with_cells(caches[0])
        h, _ = model.backbone(token, layout, caches, norm=False)


def generate(model, input_ids: Tensor, max_new_tokens: int, **options) -> Tensor:
    """input_ids [B, L] -> [B, L + new] int64: the prompt and the tokens of `stream`, which has the same options."""
    new = list(stream(model, input_ids, max_new_tokens, **options))
    return torch.cat([input_ids, *(t[:, None] for t in new)], 1)


def empty_caches(
    config, layers: int, pages: int, page_size: int, dtype: torch.dtype, device: torch.device
) -> list[KVCache]:
    """One KV cache per layer: k and v [pages, page_size, Hkv, D], in FP8 with fp32 scales [pages, page_size, Hkv]."""
    shape = (pages, page_size, config.num_key_value_heads, config.head_dim)

    def cache() -> KVCache:
        k_and_v = [torch.zeros(shape, dtype=dtype, device=device) for _ in range(2)]
        scales = [torch.ones(shape[:3], device=device) for _ in range(2)] if dtype == torch.float8_e4m3fn else []
        return KVCache(*k_and_v, *scales)

    return [cache() for _ in range(layers)]
