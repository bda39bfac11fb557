"""The rows of a decode pass, from the sequences that lie on the device: embeddings, positions, lengths, block tables.

A lane is a row of the state: token_ids [L, P], their number lengths [L], block_tables [L, pages]. A pass computes n
rows of each lane: its last token, and n - 1 draft tokens after it. csrc/ gathers all that in one launch.
"""

import torch
from torch import Tensor

from .. import backend as backends
from ..op import expect, op, unsupported_dtype, use_cuda
from .moe_decode import aligned_copy

ROWS = 8  # of a lane, the most that attention_decode takes


def decode_inputs(
    lanes: Tensor, token_ids: Tensor, lengths: Tensor, block_tables: Tensor, embeddings: Tensor, n: int, width: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """lanes [B] int64; token_ids [L, P] int32; lengths [L] int64; block_tables [L, pages] int32; embeddings [V, H].

    Returns x [B n, H], the embeddings of the rows' tokens; positions [B n] int64; the lanes' lengths [B] int32 with
    these rows; block_table [B, width] int32. A lane of length 0 has length 0, and rows that mean nothing. A negative
    token id counts as 0. Not differentiable. Raises ValueError for operands that do not fit.
    """
    expect(lanes.ndim == 1 and lanes.dtype == torch.int64, "lanes [B] int64", lanes)
    expect_lanes(token_ids, lengths)
    pages = block_tables.shape[-1]
    expect(block_tables.ndim == 2 and len(block_tables) == len(lengths) and block_tables.dtype == torch.int32,
           "block_tables [L, pages] int32", block_tables, lengths)  # fmt: skip
    expect(embeddings.ndim == 2 and 1 <= n <= ROWS and 0 <= width <= pages,
           f"embeddings [V, H], n 1..{ROWS}, width 0..pages", embeddings, n, width, block_tables)  # fmt: skip
    args = lanes, token_ids, lengths, block_tables, embeddings
    with torch.no_grad():
        if backends.backend(lanes) == "cuda" and use_cuda("decode_inputs", unsupported(embeddings)):
            rows, B = len(lanes) * n, len(lanes)
            x, positions = embeddings.new_empty(rows, embeddings.shape[1]), lanes.new_empty(rows)
            attended, block_table = block_tables.new_empty(B), block_tables.new_empty(B, width)
            decode_inputs_fwd(*args, x, positions, attended, block_table)
            return x, positions, attended, block_table
        return decode_inputs_ref(*args, n, width)


def expect_lanes(token_ids: Tensor, lengths: Tensor) -> None:
    expect(lengths.ndim == 1 and lengths.dtype == torch.int64, "lengths [L] int64", lengths)
    expect(token_ids.ndim == 2 and token_ids.dtype == torch.int32 and len(token_ids) == len(lengths),
           "token_ids [L, P] int32", token_ids, lengths)  # fmt: skip


def unsupported(embeddings: Tensor) -> str | None:
    if dtype := unsupported_dtype((embeddings,)):
        return dtype
    size = embeddings.element_size()
    if size < 2 or not embeddings.is_contiguous() or embeddings.shape[1] * size % 16:
        return "embeddings in FP8, strided, or of rows that 16 bytes do not divide"
    return None


def decode_inputs_ref(lanes, token_ids, lengths, block_tables, embeddings, n, width):
    length = lengths.index_select(0, lanes)
    positions = (length[:, None] + torch.arange(-1, n - 1, device=lanes.device)).clamp(min=0)
    tokens = token_ids[lanes[:, None], positions].clamp(min=0).flatten()
    attended = ((length + n - 1) * (length > 0)).int()
    x = embeddings.detach().index_select(0, tokens)
    return x, positions.flatten(), attended, block_tables[:, :width].index_select(0, lanes)


@op("x", "positions", "attended", "block_table", runs="cuda")
def decode_inputs_fwd(
    lanes: Tensor,
    token_ids: Tensor,
    lengths: Tensor,
    block_tables: Tensor,
    embeddings: Tensor,
    x: Tensor,
    positions: Tensor,
    attended: Tensor,
    block_table: Tensor,
) -> None:
    embeddings = aligned_copy(embeddings)  # a parameter always is
    backends._C.decode_inputs_fwd(
        lanes, token_ids, lengths, block_tables, embeddings, x, positions, attended, block_table
    )
