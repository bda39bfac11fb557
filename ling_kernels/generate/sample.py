"""How the next token is chosen from the logits.

repetition penalty r over what stands so far:  l -> l / r where l > 0, else l r      (CTRL, arXiv 1909.05858)
temperature T:                                 p = softmax(l / T), or the largest l where T = 0
top-k:                                         the k likeliest
top-p:                                         of those the fewest likeliest that hold p of their probability
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from ..errors import InputError


def sampler(
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    repetition_penalty: float = 1.0,
    seed: int | None = None,
) -> Callable[[Tensor, Tensor], Tensor]:
    """choose(logits [B, V], ids_so_far [B, n] int64) -> [B] int64, in the order above. top_k 0 and top_p 1 keep all.

    One seed gives the same tokens again for the same calls on the same kind of device; None takes a fresh seed.
    InputError for what has no meaning, and from choose for logits that are NaN or infinite."""
    _check(math.isfinite(temperature) and temperature >= 0, "temperature", temperature, "a number >= 0")
    _check(top_k >= 0, "top_k", top_k, "a whole number >= 0")
    _check(0 < top_p <= 1, "top_p", top_p, "above 0 and at most 1")
    _check(
        math.isfinite(repetition_penalty) and repetition_penalty > 0, "repetition_penalty", repetition_penalty, "> 0"
    )
    _check(seed is None or 0 <= seed < 1 << 63, "seed", seed, "a whole number from 0 to 2^63 - 1")
    if temperature == 0 and (top_k or top_p < 1):
        raise InputError("top_k and top_p narrow what is drawn at random: they need a temperature above 0")
    generators: dict[torch.device, torch.Generator] = {}

    def generator(device: torch.device) -> torch.Generator:
        if device not in generators:
            generators[device] = torch.Generator(device)
            generators[device].seed() if seed is None else generators[device].manual_seed(seed)
        return generators[device]

    def choose(logits: Tensor, ids_so_far: Tensor) -> Tensor:
        logits = logits.float()
        if repetition_penalty != 1:
            seen = logits.gather(1, ids_so_far)
            seen = torch.where(seen > 0, seen / repetition_penalty, seen * repetition_penalty)
            logits = logits.scatter(1, ids_so_far, seen)
        largest = logits.amax(1, keepdim=True)
        if not largest.isfinite().all():  # asks the GPU, which whoever shows the text does anyway
            raise InputError("the model gives logits that are no numbers: its weights are damaged or training diverged")
        if temperature == 0:
            return logits.argmax(1)
        logits = (logits - largest) / temperature  # at most 0, so that a small temperature gives no inf - inf
        if 0 < top_k < logits.shape[1]:
            logits = logits.masked_fill(logits < logits.topk(top_k).values[:, -1:], -math.inf)
        p = logits.softmax(1)
        if top_p < 1:
            ordered, order = p.sort(descending=True, stable=True)
            before = ordered.cumsum(1) - ordered
            p = torch.zeros_like(p).scatter(1, order, ordered.masked_fill(before >= top_p, 0))
        return p.multinomial(1, generator=generator(p.device)).squeeze(1)

    return choose


def _check(condition: bool, name: str, value: float | None, contract: str) -> None:
    if not condition:
        raise InputError(f"{name} is {value}; it must be {contract}")
