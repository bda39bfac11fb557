"""How the next token is chosen from the logits.

repetition penalty r over what stands so far:  l -> l / r where l > 0, else l r      (CTRL, arXiv 1909.05858)
temperature T:                                 p = softmax(l / T), or the largest l where T = 0
top-k:                                         the k likeliest
top-p:                                         of those the fewest likeliest that hold p of their probability
min-p:                                         of those the ones at least min-p times as likely as the likeliest
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ..errors import InputError


@dataclass(frozen=True)
class Sampling:
    """What one request asks for; top_k 0, top_p 1 and min_p 0 keep all. InputError for what has no meaning.

    One seed gives the same tokens again, whatever else is being generated; None takes a fresh one.
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
        _check(self.top_k >= 0, "top_k", self.top_k, "a whole number >= 0")
        _check(0 < self.top_p <= 1, "top_p", self.top_p, "above 0 and at most 1")
        _check(0 <= self.min_p <= 1, "min_p", self.min_p, "from 0 to 1")
        _check(math.isfinite(r) and r > 0, "repetition_penalty", r, "> 0")
        seed = self.seed
        _check(seed is None or 0 <= seed < 1 << 63, "seed", seed, "a whole number from 0 to 2^63 - 1")
        if t == 0 and (self.top_k or self.top_p < 1 or self.min_p > 0):
            raise InputError("top_k, top_p and min_p narrow what is drawn at random: they need a temperature above 0")


class Mode(NamedTuple):
    """What a batch needs at all: the host knows before the device has the logits."""

    drawn: bool  # some row has a temperature
    narrowed: bool  # some draw is by top-k or top-p, which sort
    penalised: bool

    @classmethod
    def of(cls, sampling: Iterable[Sampling]) -> "Mode":
        sampling = list(sampling)
        return cls(
            any(s.temperature > 0 for s in sampling),
            any(s.top_k or s.top_p < 1 for s in sampling),
            any(s.repetition_penalty != 1 for s in sampling),
        )


class Asked(NamedTuple):
    """`Sampling` of every row [B], on the device; top_k of at least 1."""

    temperature: Tensor
    top_p: Tensor
    min_p: Tensor
    repetition_penalty: Tensor
    top_k: Tensor  # int64

    @classmethod
    def of(cls, sampling: Sequence[Sampling], vocabulary: int, device: torch.device | None = None) -> "Asked":
        floats = [[s.temperature, s.top_p, s.min_p, s.repetition_penalty] for s in sampling]
        top_k = [min(s.top_k or vocabulary, vocabulary) for s in sampling]
        floats = torch.tensor(floats, dtype=torch.float32, device=device)
        return cls(*floats.unbind(1), torch.tensor(top_k, device=device))


def choose(
    logits: Tensor, asked: Asked | None, mode: Mode, uniform: Tensor | None = None, seen: Tensor | None = None
) -> Tensor:
    """logits [B, V] -> tokens [B] int64. Where mode has any: asked, of it uniform [B] in [0, 1) where mode.drawn, and
    seen [B, V] bool where mode.penalised.

    A row's token depends on nothing of the others. It is -1 where the row's logits are no numbers, or all infinite.
    Waits for nothing on the device.
    """
    logits = logits.float()
    if mode.penalised:
        r = asked.repetition_penalty[:, None]
        logits = torch.where(seen, torch.where(logits > 0, logits / r, logits * r), logits)
    largest = logits.amax(1, keepdim=True)
    tokens = logits.argmax(1)
    if mode.drawn:
        tokens = torch.where(asked.temperature > 0, draw(logits - largest, asked, mode, uniform), tokens)
    return torch.where(largest[:, 0].isfinite(), tokens, -1)


def draw(logits: Tensor, asked: Asked, mode: Mode, uniform: Tensor) -> Tensor:
    """logits [B, V] at most 0; rows of temperature 0 give anything."""
    temperature, top_p, min_p, _, top_k = (x[:, None] for x in asked)
    logits = logits / torch.where(temperature > 0, temperature, 1)  # at most 0: a small one gives no inf - inf
    p = logits.softmax(1)
    if mode.narrowed:
        ordered, order = logits.sort(descending=True, stable=True)
        last = ordered.gather(1, top_k - 1)
        kept = ordered.masked_fill(ordered < last, -math.inf).softmax(1)  # what is as likely as the k-th stays
        kept = torch.where((top_p == 1) | (kept.cumsum(1) - kept < top_p), kept, 0)
        whole = (top_k == logits.shape[1]) & (top_p == 1)  # the same bits as in a batch that narrows nothing
        p = torch.where(whole, p, torch.zeros_like(p).scatter(1, order, kept))
    p = p.masked_fill(p < min_p * p.amax(1, keepdim=True), 0)
    total = p.cumsum(1)
    end = total[:, -1:]
    place = torch.minimum(uniform[:, None] * end, end.nextafter(torch.zeros_like(end)))  # rounding may reach the end
    return torch.searchsorted(total, place, right=True).squeeze(1)


def uniforms(seed: Tensor, place: Tensor) -> Tensor:
    """seed [B], place [B] int64 -> [B] fp32 in [0, 1): what a seed has for a place. SplitMix64 (Steele et al. 2014)."""
    golden = -0x61C8864680B583EB  # 2^64 over the golden ratio, as int64, which wraps
    x = seed + (place + 1) * golden  # without the 1 seed 0 has 0 for place 0
    for shift, factor in ((30, -0x40A7B892E31B1A47), (27, -0x6B2FB644ECCEEE15)):
        x = (x ^ (x >> shift & (1 << 64 - shift) - 1)) * factor
    x = x ^ (x >> 31 & (1 << 33) - 1)
    return (x >> 40 & (1 << 24) - 1).float() / (1 << 24)


def sampler(**asked) -> Callable[[Tensor, Tensor], Tensor]:
    """choose(logits [B, V], ids_so_far [B, n] int64) -> [B] int64 for Ling.stream, every row as `Sampling(**asked)`.

    One seed gives the same tokens again for the same calls. InputError for what has no meaning, and from choose for
    logits that are NaN or infinite.
    """
    asked = Sampling(**asked)
    mode = Mode.of([asked])
    generator = torch.Generator()
    generator.seed() if asked.seed is None else generator.manual_seed(asked.seed)

    def of_batch(logits: Tensor, ids_so_far: Tensor) -> Tensor:
        (B, V), device = logits.shape, logits.device
        seen = None
        if mode.penalised:
            seen = torch.zeros(B, V, dtype=torch.bool, device=device).scatter(1, ids_so_far, True)
        uniform = torch.rand(B, generator=generator).to(device)
        tokens = choose(logits, Asked.of([asked] * B, V, device), mode, uniform, seen)
        if bool((tokens < 0).any()):  # asks the GPU, which whoever shows the text does anyway
            raise InputError(NO_NUMBERS)
        return tokens

    return of_batch


NO_NUMBERS = "the model gives logits that are no numbers: its weights are damaged or training diverged"


def _check(condition: bool, name: str, value: float | None, contract: str) -> None:
    if not condition:
        raise InputError(f"{name} is {value}; it must be {contract}")
