"""Sampling parameters of requests, which ops/sample.py defines and applies."""

import math
import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral, Real
from typing import NamedTuple

import torch
from torch import Tensor

from ..errors import InputError
from ..ops.sample import sample

BAD_LOGITS = "the model's logits are NaN or infinite: its weights are damaged or training diverged"

MOST_BIAS = 100  # of a logit; at its ends a token is certain, or never comes
BIASES = f"from -{MOST_BIAS} to {MOST_BIAS}"
TINY = 1e-30  # a smaller top_p may be 0 in fp32 and keep no token; logits over a smaller penalty would be infinite


@dataclass(frozen=True)
class Sampling:
    """Sampling parameters of one request; top_k 0, top_p 1 and min_p 0 keep every token.

    temperature 0 is greedy. The same seed gives the same tokens, whatever else is in the batch; None draws a new seed.
    Rounding differs from batch to batch, though, and can change a token, in bf16 the sooner; a model with
    `nn.batch_invariant.batch_invariant_` has the same to the bit.
    presence_penalty is subtracted from the logit of every token that has been generated, frequency_penalty once for
    each time; logit_bias maps tokens to what is added to their logits, and is kept as pairs. These three are the
    engine's (generate/edits.py), not `sampler`'s. Raises InputError for values out of range.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int | None = None
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] | tuple[tuple[int, float], ...] = ()

    def __post_init__(self):
        t, r = self.temperature, self.repetition_penalty
        for name in ("temperature", "top_p", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty"):
            value = getattr(self, name)
            _check(isinstance(value, Real), name, value, "a number")
        for name in ("top_k", "seed"):
            value = getattr(self, name)
            _check(isinstance(value, Integral) or (name == "seed" and value is None), name, value, "an integer")
        _check(math.isfinite(t) and t >= 0, "temperature", t, "a number >= 0")
        _check(self.top_k >= 0, "top_k", self.top_k, "an integer >= 0")
        _check(TINY <= self.top_p <= 1, "top_p", self.top_p, f"from {TINY} to 1")
        _check(0 <= self.min_p <= 1, "min_p", self.min_p, "from 0 to 1")
        _check(TINY <= r <= 1 / TINY, "repetition_penalty", r, f"from {TINY} to {1 / TINY}")
        seed = self.seed
        _check(seed is None or 0 <= seed < 1 << 63, "seed", seed, "an integer from 0 to 2^63 - 1")
        for name in ("presence_penalty", "frequency_penalty"):
            _check(abs(getattr(self, name)) <= MOST_BIAS, name, getattr(self, name), BIASES)
        object.__setattr__(self, "logit_bias", bias_pairs(self.logit_bias))
        if t == 0 and (self.top_k or self.top_p < 1 or self.min_p > 0):
            raise InputError("top_k, top_p and min_p restrict random sampling: they need a temperature above 0")


def bias_pairs(bias: Mapping[int, float] | tuple[tuple[int, float], ...]) -> tuple[tuple[int, float], ...]:
    """logit_bias as pairs. Raises InputError for anything but tokens with numbers."""
    try:
        pairs = tuple((operator.index(token), float(value)) for token, value in dict(bias).items())
    except (TypeError, ValueError):
        raise InputError(f"logit_bias is {bias!r}; it must map token ids to numbers") from None
    for token, value in pairs:
        _check(abs(value) <= MOST_BIAS, f"logit_bias: the bias of token {token}", value, BIASES)
    return pairs


class SamplingMode(NamedTuple):
    """The steps that any lane of a batch needs. The host knows it, so a pass computes nothing else."""

    random: bool  # a temperature above 0
    truncated: bool  # top-k or top-p
    penalised: bool  # a repetition penalty
    scored: bool = False  # log-probabilities are wanted
    edited: bool = False  # logits are edited before
    guided: bool = False  # a grammar allows some tokens only
    adapted: bool = False  # rows have adapters

    @classmethod
    def of(cls, sampling: Iterable[Sampling], **others: bool) -> "SamplingMode":
        sampling = list(sampling)
        return cls(
            any(s.temperature > 0 for s in sampling),
            any(s.top_k or s.top_p < 1 for s in sampling),
            any(s.repetition_penalty != 1 for s in sampling),
            **others,
        )


class SamplingTensors(NamedTuple):
    """The parameters of every lane as tensors [B], fp32 unless noted."""

    temperature: Tensor
    top_p: Tensor
    min_p: Tensor
    repetition_penalty: Tensor
    top_k: Tensor  # int64, 1 to vocabulary size

    @classmethod
    def of(cls, sampling: Sequence[Sampling], vocabulary: int, device: torch.device | None = None) -> "SamplingTensors":
        names = "temperature", "top_p", "min_p", "repetition_penalty"
        floats = torch.tensor([[getattr(s, name) for s in sampling] for name in names], dtype=torch.float32)
        top_k = [min(s.top_k or vocabulary, vocabulary) for s in sampling]
        return cls._make((*floats.to(device).unbind(), torch.tensor(top_k, device=device)))


def sampler(**options) -> Callable[[Tensor, Tensor], Tensor]:
    """The `choose` of Ling.stream: (logits [B, V], ids so far [B, n] int64) -> [B] int64, with Sampling(**options).

    The same seed gives the same tokens for the same sequence of calls. Raises InputError for values out of range, and
    in the call for logits that are NaN or infinite.
    """
    sampling = Sampling(**options)
    if sampling.presence_penalty or sampling.frequency_penalty or sampling.logit_bias:
        raise InputError("presence_penalty, frequency_penalty and logit_bias need the engine")
    mode = SamplingMode.of([sampling])
    generator = torch.Generator()
    generator.seed() if sampling.seed is None else generator.manual_seed(sampling.seed)

    def choose(logits: Tensor, ids: Tensor) -> Tensor:
        (B, V), device = logits.shape, logits.device
        seeds = torch.randint((1 << 63) - 1, (B,), generator=generator).to(device)
        lanes, positions = torch.arange(B, device=device), torch.full((B,), ids.shape[1] - 1, device=device)
        parameters = SamplingTensors.of([sampling] * B, V, device)
        tokens = sample(logits, parameters, mode[:3], lanes, positions, ids.int(), seeds)
        if bool((tokens < 0).any()):  # waits for the device, as the caller does anyway to show the text
            raise InputError(BAD_LOGITS)
        return tokens

    return choose


def _check(condition: bool, name: str, value: float | None, contract: str) -> None:
    if not condition:
        raise InputError(f"{name} is {value!r}; it must be {contract}")
