"""The next token of each row of logits l: the likeliest one, or a random one.

repetition penalty r of the tokens so far: l -> l / r if l > 0, else l r (CTRL, arXiv 1909.05858)
temperature T: probability ~ exp(l / T); T = 0 chooses the largest l, of equal ones the first
top-k: keep the k likeliest tokens, and those as likely as the last of them
top-p: keep the fewest likeliest of them with p of their probability, of equal ones the first
min-p: of these keep tokens at least min-p times as likely as the likeliest

Keys and weights are integers, so that a sum is the same in any order, on any backend, in any batch:

key = (max l - l) (1 / T) in units of 2^-27, rounded down; from 32 on (a weight of e^-32) it is 2^32 - 1
weight = exp(-key) in units of 2^-31, rounded to nearest
p of top-p and u are rounded to units of 2^-24

The token is the first whose weight, added to those of the kept tokens before it, exceeds u times their sum. csrc/ has
one launch for all this, which reads the logits once and sorts nothing.
"""

import torch
from torch import Tensor

from .. import backend as backends
from ..op import expect, op, unsupported_dtype, use_cuda

KEYS, WEIGHTS, SHARES = 1 << 27, 1 << 31, 1 << 24
LARGEST = 400_000  # logits of a row whose keys fit into the shared memory of 8 blocks
Parameters = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


def sample(
    logits: Tensor,
    parameters: Parameters | None = None,
    mode: tuple[bool, bool, bool] = (False, False, False),
    lanes: Tensor | None = None,
    positions: Tensor | None = None,
    token_ids: Tensor | None = None,
    seeds: Tensor | None = None,
) -> Tensor:
    """logits [R, V] -> tokens [R] int64; -1 for a row with NaN, +inf, or nothing but -inf. Not differentiable.

    mode: whether any lane has a temperature above 0; top-k or top-p; a repetition penalty. It must not say no where a
    lane has one, which a backend may then leave out or not; without any, the arguments after it are not needed.
    parameters: temperature, top_p, min_p, repetition_penalty fp32 and top_k int64 (1 to V) of each lane, [L].
    lanes [B] int64: the lane of R / B neighbouring rows. positions [R] int64: a row's sequence is token_ids[lane, 0 ..
    position], token_ids [L, P] int32. seeds [L] int64: u is `uniforms(seed, position)`.
    A row's token does not depend on the other rows. Raises ValueError for operands that do not fit.
    """
    wide = logits.is_floating_point() and logits.element_size() > 1
    expect(logits.ndim == 2 and logits.shape[1] > 0 and wide, "logits [R, V > 0] in fp16 or wider", logits)
    state: tuple = lanes, positions, token_ids, seeds
    if any(mode):
        needed = parameters, *state
        expect(all(x is not None for x in needed), "all arguments for a mode that is not greedy", mode, *needed)
        check_state(logits, parameters, *state)
    else:
        parameters, state = None, (None,) * 4
    with torch.no_grad():
        if backends.backend(logits) == "cuda" and use_cuda("sample", unsupported(logits, parameters)):
            tokens = torch.empty(len(logits), dtype=torch.int64, device=logits.device)
            values = (None,) * 5 if parameters is None else parameters
            sample_fwd(logits if logits.stride(1) == 1 else logits.contiguous(), *state, *values, tokens, *mode[::2])
            return tokens
        return sample_ref(logits, parameters, mode, *state)


def check_state(logits, parameters, lanes, positions, token_ids, seeds) -> None:
    R, B, L = len(logits), len(lanes), len(seeds)
    expect(lanes.ndim == 1 and lanes.dtype == torch.int64 and (R % B == 0 if B else R == 0),
           "lanes [B] int64 of R / B rows each", lanes, logits)  # fmt: skip
    expect(positions.shape == (R,) and positions.dtype == torch.int64, "positions [R] int64", positions, logits)
    expect(token_ids.ndim == 2 and len(token_ids) == L and token_ids.dtype == torch.int32,
           "token_ids [L, P] int32", token_ids, seeds)  # fmt: skip
    expect(seeds.shape == (L,) and seeds.dtype == torch.int64, "seeds [L] int64", seeds)
    expect(len(parameters) == 5 and all(x.shape == (L,) for x in parameters) and parameters[4].dtype == torch.int64,
           "temperature, top_p, min_p, repetition_penalty [L] and top_k [L] int64", parameters, seeds)  # fmt: skip


def unsupported(logits: Tensor, parameters: Parameters | None) -> str | None:
    if dtype := unsupported_dtype((logits,)):
        return dtype
    if parameters is not None and any(x.dtype != torch.float32 or not x.is_contiguous() for x in parameters[:4]):
        return "parameters that are not fp32, or strided"
    if logits.shape[1] > LARGEST:
        return f"{logits.shape[1]} logits of {logits.dtype}"
    return None


def sample_ref(logits, parameters, mode, lanes, positions, token_ids, seeds):
    (random, truncated, penalised), logits = mode, logits.float()
    if random or penalised:
        lane = lanes.repeat_interleave(len(logits) // max(len(lanes), 1))
        *floats, top_k = (x[lane, None] for x in parameters)
        temperature, top_p, min_p, penalty = (x.float() for x in floats)
    if penalised:
        seen = seen_tokens(token_ids[lane], positions, logits.shape[1])
        logits = torch.where(seen, torch.where(logits > 0, logits / penalty, logits * penalty), logits)
    largest, tokens = logits.max(1)  # the first of equal ones
    if random:
        scale = torch.where(temperature > 0, 1 / temperature, 1).clamp(max=torch.finfo(torch.float32).max)
        gap = (largest[:, None] - logits) * scale
        key = torch.where(gap < 32, (gap * KEYS).long(), (1 << 32) - 1)
        weight = ((key.float() / -KEYS).exp() * WEIGHTS).round().long()
        if truncated:
            weight = truncate(key, weight, top_k.clamp(1, logits.shape[1]), top_p)
        weight = torch.where(weight < (min_p * WEIGHTS).ceil().long(), 0, weight)
        drawn = draw(weight, uniforms(seeds[lane], positions)[:, None])
        tokens = torch.where(temperature[:, 0] > 0, drawn, tokens)
    return tokens.masked_fill(~largest.isfinite(), -1)


def truncate(key: Tensor, weight: Tensor, top_k: Tensor, top_p: Tensor) -> Tensor:
    """weight [R, V] with 0 for the tokens that top-k and top-p leave out."""
    ordered, order = key.sort(dim=1, stable=True)
    weights = weight.gather(1, order).masked_fill(ordered > ordered.gather(1, top_k - 1), 0)
    cumulative = weights.cumsum(1)
    goal = share_of(cumulative[:, -1:], top_p).clamp(min=1)
    kept = torch.where(cumulative - weights < goal, weights, 0)
    return torch.zeros_like(weight).scatter(1, order, kept)


def draw(weight: Tensor, uniform: Tensor) -> Tensor:
    """weight [R, V], uniform [R, 1] -> [R]: the first token up to which the weights exceed that share of their sum."""
    cumulative = weight.cumsum(1)
    return torch.searchsorted(cumulative, share_of(cumulative[:, -1:], uniform), right=True)[:, 0]


def share_of(total: Tensor, share: Tensor) -> Tensor:
    """total int64 times share fp32 in units of 2^-24, rounded down. Their product would not fit into 64 bits."""
    share = (share * SHARES).round().long()
    return total // SHARES * share + total % SHARES * share // SHARES


def seen_tokens(token_ids: Tensor, positions: Tensor, V: int) -> Tensor:
    """token_ids [R, P], positions [R] -> [R, V] bool: the tokens up to each row's position."""
    index = torch.arange(token_ids.shape[1], device=token_ids.device)
    token = torch.where(index <= positions[:, None], token_ids.long().clamp(min=0), V)
    return torch.zeros(len(token), V + 1, dtype=torch.bool, device=token.device).scatter_(1, token, True)[:, :V]


def uniforms(seed: Tensor, position: Tensor) -> Tensor:
    """seed [B], position [B] int64 -> [B] fp32 in [0, 1), a hash of both: SplitMix64 (Steele et al. 2014)."""
    golden = -0x61C8864680B583EB  # 2^64 / golden ratio as int64, which wraps around
    x = seed + (position + 1) * golden  # + 1: otherwise seed 0 at position 0 gives 0
    for shift, factor in ((30, -0x40A7B892E31B1A47), (27, -0x6B2FB644ECCEEE15)):
        x = (x ^ (x >> shift & (1 << 64 - shift) - 1)) * factor
    x = x ^ (x >> 31 & (1 << 33) - 1)
    return (x >> 40 & (1 << 24) - 1).float() / (1 << 24)


@op("tokens", runs="cuda")
def sample_fwd(
    logits: Tensor,
    lanes: Tensor | None,
    positions: Tensor | None,
    token_ids: Tensor | None,
    seeds: Tensor | None,
    temperature: Tensor | None,
    top_p: Tensor | None,
    min_p: Tensor | None,
    repetition_penalty: Tensor | None,
    top_k: Tensor | None,
    tokens: Tensor,
    random: bool,
    penalised: bool,
) -> None:
    backends._C.sample_fwd(
        logits, lanes, positions, token_ids, seeds, temperature, top_p, min_p, repetition_penalty, top_k, tokens,
        random, penalised,
    )  # fmt: skip
