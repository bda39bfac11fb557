"""Sampling: the next token from the logits l.

repetition penalty r over the tokens so far:  l -> l / r if l > 0, else l r      (CTRL, arXiv 1909.05858)
temperature T:                                p = softmax(l / T), or the argmax if T = 0
top-k:                                        keep the k likeliest tokens
top-p:                                        keep the fewest likeliest of them with p of their probability
min-p:                                        of these keep tokens at least min-p times as likely as the likeliest
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ..errors import InputError

BAD_LOGITS = "the model's logits are NaN or infinite: its weights are damaged or training diverged"


@dataclass(frozen=True)
class Sampling:
    """Sampling parameters of one request; top_k 0, top_p 1 and min_p 0 keep every token.

    temperature 0 is greedy. The same seed gives the same tokens, whatever else is in the batch; None draws a new seed.
    Raises InputError for values out of range.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int | None = None

    def __post_init__(self):
        t, r = self.temperature, self.repetition_penalty
        _check(math.isfinite(t) and t >= 0, "temperature", t, "a number >= 0")
        _check(self.top_k >= 0, "top_k", self.top_k, "an integer >= 0")
        _check(0 < self.top_p <= 1, "top_p", self.top_p, "above 0 and at most 1")
        _check(0 <= self.min_p <= 1, "min_p", self.min_p, "from 0 to 1")
        _check(math.isfinite(r) and r > 0, "repetition_penalty", r, "> 0")
        seed = self.seed
        _check(seed is None or 0 <= seed < 1 << 63, "seed", seed, "an integer from 0 to 2^63 - 1")
        if t == 0 and (self.top_k or self.top_p < 1 or self.min_p > 0):
            raise InputError("top_k, top_p and min_p restrict random sampling: they need a temperature above 0")


class SamplingMode(NamedTuple):
    """The steps that any row of a batch needs. The host knows it, so a pass computes nothing else."""

    random: bool  # a temperature above 0
    truncated: bool  # top-k or top-p, which sort the logits
    penalised: bool  # a repetition penalty

    @classmethod
    def of(cls, sampling: Iterable[Sampling]) -> "SamplingMode":
        sampling = list(sampling)
        return cls(
            any(s.temperature > 0 for s in sampling),
            any(s.top_k or s.top_p < 1 for s in sampling),
            any(s.repetition_penalty != 1 for s in sampling),
        )


class SamplingTensors(NamedTuple):
    """The parameters of every row as tensors [B], fp32 unless noted."""

    temperature: Tensor
    top_p: Tensor
    min_p: Tensor
    repetition_penalty: Tensor
    top_k: Tensor  # int64, 1 to vocabulary size

    @classmethod
    def of(cls, sampling: Sequence[Sampling], vocabulary: int, device: torch.device | None = None) -> "SamplingTensors":
        floats = [[s.temperature, s.top_p, s.min_p, s.repetition_penalty] for s in sampling]
        top_k = [min(s.top_k or vocabulary, vocabulary) for s in sampling]
        floats = torch.tensor(floats, dtype=torch.float32, device=device)
        return cls._make((*floats.unbind(1), torch.tensor(top_k, device=device)))


def sample(
    logits: Tensor,
    parameters: SamplingTensors | None,
    mode: SamplingMode,
    uniform: Tensor | None = None,
    seen: Tensor | None = None,
) -> Tensor:
    """logits [B, V] -> tokens [B] int64; -1 for a row with NaN, +inf, or nothing but -inf.

    parameters: needed unless mode is all False. uniform [B] fp32 in [0, 1): random numbers, needed if mode.random.
    seen [B, V] bool: the tokens of each sequence so far, needed if mode.penalised. A row's token does not depend on the
    other rows. Does not synchronise with the device.
    """
    logits = logits.float()
    if mode.penalised:
        r = parameters.repetition_penalty[:, None]
        logits = torch.where(seen, torch.where(logits > 0, logits / r, logits * r), logits)
    largest = logits.amax(1, keepdim=True)
    tokens = logits.argmax(1)
    if mode.random:
        drawn = draw(logits - largest, parameters, mode, uniform)
        tokens = torch.where(parameters.temperature > 0, drawn, tokens)
    return torch.where(largest[:, 0].isfinite(), tokens, -1)


def draw(logits: Tensor, parameters: SamplingTensors, mode: SamplingMode, uniform: Tensor) -> Tensor:
    """logits [B, V] <= 0 -> random tokens [B]; undefined for rows of temperature 0."""
    temperature, top_p, min_p, _, top_k = (x[:, None] for x in parameters)
    logits = logits / torch.where(temperature > 0, temperature, 1)  # <= 0: a small temperature gives no inf - inf
    p = logits.softmax(1)
    if mode.truncated:
        ordered, order = logits.sort(descending=True, stable=True)
        kth = ordered.gather(1, top_k - 1)
        top = ordered.masked_fill(ordered < kth, -math.inf).softmax(1)  # keeps ties with the k-th
        top = torch.where((top_p == 1) | (top.cumsum(1) - top < top_p), top, 0)
        all_kept = (top_k == logits.shape[1]) & (top_p == 1)  # bitwise as in a batch without truncation
        p = torch.where(all_kept, p, torch.zeros_like(p).scatter(1, order, top))
    p = p.masked_fill(p < min_p * p.amax(1, keepdim=True), 0)
    cumulative = p.cumsum(1)
    total = cumulative[:, -1:]
    target = torch.minimum(uniform[:, None] * total, total.nextafter(torch.zeros_like(total)))  # < total after rounding
    return torch.searchsorted(cumulative, target, right=True).squeeze(1)


def uniforms(seed: Tensor, position: Tensor) -> Tensor:
    """seed [B], position [B] int64 -> [B] fp32 in [0, 1), a hash of both: SplitMix64 (Steele et al. 2014)."""
    golden = -0x61C8864680B583EB  # 2^64 / golden ratio as int64, which wraps around
    x = seed + (position + 1) * golden  # + 1: otherwise seed 0 at position 0 gives 0
    for shift, factor in ((30, -0x40A7B892E31B1A47), (27, -0x6B2FB644ECCEEE15)):
        x = (x ^ (x >> shift & (1 << 64 - shift) - 1)) * factor
    x = x ^ (x >> 31 & (1 << 33) - 1)
    return (x >> 40 & (1 << 24) - 1).float() / (1 << 24)


def sampler(**options) -> Callable[[Tensor, Tensor], Tensor]:
    """The `choose` of Ling.stream: (logits [B, V], ids so far [B, n] int64) -> [B] int64, with Sampling(**options).

    The same seed gives the same tokens for the same sequence of calls. Raises InputError for values out of range, and
    in the call for logits that are NaN or infinite.
    """
    sampling = Sampling(**options)
    mode = SamplingMode.of([sampling])
    generator = torch.Generator()
    generator.seed() if sampling.seed is None else generator.manual_seed(sampling.seed)

    def choose(logits: Tensor, ids: Tensor) -> Tensor:
        (B, V), device = logits.shape, logits.device
        seen = None
        if mode.penalised:
            seen = torch.zeros(B, V, dtype=torch.bool, device=device).scatter(1, ids, True)
        uniform = torch.rand(B, generator=generator).to(device)
        tokens = sample(logits, SamplingTensors.of([sampling] * B, V, device), mode, uniform, seen)
        if bool((tokens < 0).any()):  # waits for the device, as the caller does anyway to show the text
            raise InputError(BAD_LOGITS)
        return tokens

    return choose


def _check(condition: bool, name: str, value: float | None, contract: str) -> None:
    if not condition:
        raise InputError(f"{name} is {value}; it must be {contract}")
