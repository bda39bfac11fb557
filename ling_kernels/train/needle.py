"""Needle retrieval: whether a model repeats a value that stands once, far back, in a long text.

A text of `length` tokens is prose with a line `key K=4817;` after a share `depth` of it, and ends with `key K=`. The
model has found the needle where every token of `4817` is the likeliest one (greedy decoding would write it).
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ..errors import InputError
from ..model import Ling
from ..tokenizer import Tokenizer
from .data.toy import KEYS, needle, python_texts, question

DEPTHS = (0.0, 0.25, 0.5, 0.75, 0.95)


def needle_text(
    tokenizer: Tokenizer, prose: np.ndarray, length: int, depth: float, rng: np.random.Generator
) -> tuple[Tensor, int]:
    """ids [length] int64 of a text that ends with the value, and how many tokens the value has. prose: ids."""
    key, value = str(rng.choice(list(KEYS))), int(rng.integers(1000, 10000))
    line, ask, answer = (tokenizer.encode(text) for text in (needle(key, value), question(key), str(value)))
    room = length - len(line) - len(ask) - len(answer)
    if room < 0:
        raise InputError(f"a text of {length} tokens has no room for a needle and its question")
    start = int(rng.integers(0, max(len(prose) - room, 1)))
    filler = np.resize(prose[start : start + room], room).tolist()
    before = int(depth * room)
    return torch.tensor([*filler[:before], *line, *filler[before:], *ask, *answer]), len(answer)


@torch.inference_mode()
def retrieval(
    model: Ling, tokenizer: Tokenizer, length: int, texts: int = 8, depths: Sequence[float] = DEPTHS, seed: int = 0
) -> dict:
    """found: the share of `texts` texts at each depth; nats: the mean loss of a token of the values, over all.

    Raises InputError for a length beyond the model's positions.
    """
    if length > model.config.max_positions:
        raise InputError(f"a text of {length} tokens is longer than the model's {model.config.max_positions} positions")
    prose = np.array(tokenizer.encode("\n".join(python_texts()[:60])))
    found, nats, training = [], [], model.training
    device = model.lm_head.weight.device
    model.eval()
    for at, depth in enumerate(depths):
        hits = 0
        for text in range(texts):
            ids, number = needle_text(tokenizer, prose, length, depth, np.random.default_rng((seed, length, at, text)))
            ids = ids.to(device)
            logits = model(ids[None, :-1]).logits[0, -number:].float()
            nats.append(torch.nn.functional.cross_entropy(logits, ids[-number:]).item())
            hits += bool((logits.argmax(-1) == ids[-number:]).all())
        found.append(hits / texts)
    model.train(training)
    return dict(length=length, texts=texts, depths=list(depths), found=found, nats=float(np.mean(nats)))


def check_needles(folder: Path, lengths: Sequence[int], texts: int = 8) -> list[dict]:
    """`retrieval` of a model's folder at each length, in fp32."""
    from ..model import load_model
    from ..tokenizer import load_tokenizer

    model, tokenizer = load_model(folder, torch.float32), load_tokenizer(folder)
    return [retrieval(model, tokenizer, length, texts) for length in lengths]


def needle_line(row: dict) -> str:
    by_depth = ", ".join(f"{share:.2f} at {depth:g}" for share, depth in zip(row["found"], row["depths"], strict=True))
    return f"needles    {row['length']:,} tokens, found by depth: {by_depth}; {row['nats']:.3f} nats a token"
