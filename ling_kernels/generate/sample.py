"""How the next token is chosen from the logits.

repetition penalty r over what stands so far:  l -> l / r where l > 0, else l r      (CTRL, arXiv 1909.05858)
temperature T:                                 p = softmax(l / T), or the largest l where T = 0
top-k:                                         the k likeliest
top-p:                                         of those the fewest likeliest that hold p of their probability
min-p:                                         of those the ones at least min-p times as likely as the likeliest
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

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


def choose(
    logits: Tensor, sampling: Sequence[Sampling], so_far: Sequence[Sequence[int] | Tensor], uniform: Sequence[float]
) -> Tensor:
    """logits [B, V]; for each row what was asked, the ids so far and a number in [0, 1) -> tokens [B] int64.

    Only a repetition penalty looks at the ids so far.
    A row's token depends on nothing of the others. It is -1 where the row's logits are no numbers, or all infinite.
    Waits for nothing on the device.
    """
    logits, device = logits.float(), logits.device
    for row, (asked, ids) in enumerate(zip(sampling, so_far, strict=True)):
        if asked.repetition_penalty != 1:
            seen = torch.as_tensor(ids, device=device).unique()
            said, r = logits[row, seen], asked.repetition_penalty
            said = torch.where(said > 0, said / r, said * r)
            logits = logits.index_put((torch.tensor(row, device=device), seen), said)
    largest = logits.amax(1, keepdim=True)
    tokens = logits.argmax(1)
    if any(s.temperature > 0 for s in sampling):
        drawn = draw(logits - largest, sampling, torch.tensor(uniform, device=device))
        tokens = torch.where(torch.tensor([s.temperature > 0 for s in sampling], device=device), drawn, tokens)
    return torch.where(largest[:, 0].isfinite(), tokens, -1)


def draw(logits: Tensor, sampling: Sequence[Sampling], uniform: Tensor) -> Tensor:
    """logits [B, V] at most 0; rows of temperature 0 give anything."""
    V, device = logits.shape[1], logits.device

    def column(values) -> Tensor:
        return torch.tensor(list(values), device=device)[:, None]

    logits = logits / column(s.temperature or 1.0 for s in sampling)  # at most 0: a small one gives no inf - inf
    if any(s.top_k or s.top_p < 1 for s in sampling):
        ordered, order = logits.sort(descending=True, stable=True)
        last = ordered.gather(1, column(min(s.top_k or V, V) - 1 for s in sampling))
        p = ordered.masked_fill(ordered < last, -math.inf).softmax(1)  # what is as likely as the k-th stays
        before = p.cumsum(1) - p
        top_p = column(s.top_p for s in sampling)
        p = torch.where((top_p == 1) | (before < top_p), p, 0)
        p = torch.zeros_like(p).scatter(1, order, p)
    else:
        p = logits.softmax(1)
    min_p = column(s.min_p for s in sampling)
    p = p.masked_fill(p < min_p * p.amax(1, keepdim=True), 0)
    total = p.cumsum(1)
    end = total[:, -1:]
    place = torch.minimum(uniform[:, None] * end, end.nextafter(torch.zeros_like(end)))  # rounding may reach the end
    return torch.searchsorted(total, place, right=True).squeeze(1)


def sampler(**asked) -> Callable[[Tensor, Tensor], Tensor]:
    """choose(logits [B, V], ids_so_far [B, n] int64) -> [B] int64 for Ling.stream, every row as `Sampling(**asked)`.

    One seed gives the same tokens again for the same calls. InputError for what has no meaning, and from choose for
    logits that are NaN or infinite.
    """
    asked = Sampling(**asked)
    generator = torch.Generator()
    generator.seed() if asked.seed is None else generator.manual_seed(asked.seed)

    def of_batch(logits: Tensor, ids_so_far: Tensor) -> Tensor:
        B = len(logits)
        tokens = choose(logits, [asked] * B, ids_so_far, torch.rand(B, generator=generator).tolist())
        if bool((tokens < 0).any()):  # asks the GPU, which whoever shows the text does anyway
            raise InputError(NO_NUMBERS)
        return tokens

    return of_batch


NO_NUMBERS = "the model gives logits that are no numbers: its weights are damaged or training diverged"


def _check(condition: bool, name: str, value: float | None, contract: str) -> None:
    if not condition:
        raise InputError(f"{name} is {value}; it must be {contract}")
