"""Writes the tokens of a decode pass into the lanes (decode_inputs.py), and proposes draft tokens for the next pass.

A draft token is accepted if it equals the token that was sampled in its place, and all before it are accepted.
"""

import torch
from torch import Tensor

from .. import backend as backends
from ..op import expect, op, use_cuda
from .decode_inputs import ROWS, expect_lanes

NGRAM = 3  # longest n-gram at a sequence's end that lookup_drafts searches for; kNgram in csrc/


def accept_tokens(
    tokens: Tensor, lanes: Tensor, positions: Tensor, token_ids: Tensor, lengths: Tensor, lookup: bool
) -> Tensor:
    """tokens [B, n] int64, one after each row; lanes [B], positions [B, n] int64 of the rows -> [B, n + 1] int64.

    Returns the tokens and the number of accepted draft tokens. Changes token_ids [L, P] int32 and lengths [L] int64:
    each token is written behind its row, and a length grows by 1 and the accepted draft tokens. lookup: write n - 1
    draft tokens by prompt lookup (`lookup_drafts`) behind them. Lanes of length 0 do not change; the others must
    differ. Raises ValueError for operands that do not fit.
    """
    expect(tokens.ndim == 2 and 1 <= tokens.shape[1] <= ROWS and tokens.dtype == torch.int64,
           f"tokens [B, 1..{ROWS}] int64", tokens)  # fmt: skip
    expect(positions.shape == tokens.shape and positions.dtype == torch.int64, "positions as tokens", positions, tokens)
    expect(lanes.shape == tokens.shape[:1] and lanes.dtype == torch.int64, "lanes [B] int64", lanes, tokens)
    expect_lanes(token_ids, lengths)
    args = tokens, lanes, positions, token_ids, lengths
    if backends.backend(tokens) == "cuda" and use_cuda("accept_tokens", unsupported(token_ids, lengths)):
        output = tokens.new_empty(len(tokens), tokens.shape[1] + 1)
        accept_tokens_fwd(*args, output, lookup)
        return output
    return accept_tokens_ref(*args, lookup)


def unsupported(token_ids: Tensor, lengths: Tensor) -> str | None:
    strided = not token_ids.is_contiguous() or not lengths.is_contiguous()
    return "token_ids or lengths that are strided" if strided else None


def accept_tokens_ref(tokens, lanes, positions, token_ids, lengths, lookup):
    lane, n, length = lanes[:, None], tokens.shape[1], lengths.index_select(0, lanes)
    accepted = torch.zeros_like(length)
    if n > 1:
        accepted = (tokens[:, :-1] == token_ids[lane, positions[:, 1:]]).int().cumprod(1).sum(1)
    live = length > 0
    new_lengths = (length + 1 + accepted) * live

    def write(columns: Tensor, values: Tensor) -> None:
        token_ids[lane, columns] = torch.where(live[:, None], values.int(), token_ids[lane, columns])

    write(positions + 1, tokens)
    lengths.index_copy_(0, lanes, new_lengths)
    if lookup:
        columns = new_lengths[:, None] + torch.arange(n - 1, device=lanes.device)
        write(columns, lookup_drafts(token_ids[lanes], new_lengths, n - 1))
    return torch.cat([tokens, accepted[:, None]], 1)


def lookup_drafts(token_ids: Tensor, lengths: Tensor, count: int) -> Tensor:
    """Prompt lookup: token_ids [B, P] int32 with lengths [B] int64 valid ids each -> draft tokens [B, count].

    The drafts are the tokens after the latest earlier occurrence of the sequence's last three tokens, else of its last
    two, else of its last one, repeated periodically up to `count`; without an occurrence they are its last token.
    """
    index, last = torch.arange(token_ids.shape[1], device=token_ids.device), (lengths - 1).clamp(min=0)
    match, start = index < last[:, None], torch.zeros_like(lengths)
    for back in range(NGRAM):
        wanted = token_ids.gather(1, (last - back).clamp(min=0)[:, None])
        match = match & (token_ids.roll(back, 1) == wanted) & (index >= back)
        # start encodes (n-gram length, position after the match): longer n-grams win, then later positions
        found = back * token_ids.shape[1] + (index * match).amax(1) + 1
        start = torch.maximum(start, torch.where(match.any(1), found, 0))
    has_match = start > 0
    start = torch.where(has_match, start % token_ids.shape[1], last)
    period = torch.where(has_match, lengths - start, 1).clamp(min=1)
    offset = torch.arange(count, device=token_ids.device)
    return token_ids.gather(1, start[:, None] + offset % period[:, None])


@op("token_ids", "lengths", "output", runs="cuda")
def accept_tokens_fwd(
    tokens: Tensor,
    lanes: Tensor,
    positions: Tensor,
    token_ids: Tensor,
    lengths: Tensor,
    output: Tensor,
    lookup: bool,
) -> None:
    backends._C.accept_tokens_fwd(tokens, lanes, positions, token_ids, lengths, output, lookup)
