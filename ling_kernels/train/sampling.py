"""A sample of the model in training: the continuation of a held-out document."""

from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from ..model import Ling
from ..model.sample import sampler
from ..parallel.exchange import OVER_BUFFERS
from ..parallel.ranks import Ranks
from ..parallel.shares import Shares
from ..tokenizer import TextStream, Tokenizer
from .data import Documents
from .settings import Settings

if TYPE_CHECKING:
    from .trainer import Trainer

PROMPT = 24  # tokens of a held-out document that the sample continues
TEMPERATURE = 0.8


def sampled(trainer: "Trainer") -> tuple[str, str] | None:
    """`sample`, in which every rank takes part; None with --sample-tokens 0."""
    if not trainer.settings.sample_tokens:
        return None
    return sample(trainer.model, trainer.tokenizer, trainer.held_out, trainer.settings, trainer.shares)


def sample(
    model: Ling, tokenizer: Tokenizer, held_out: Documents, settings: Settings, shares: Shares | None = None
) -> tuple[str, str]:
    """The beginning of a held-out document, and the model's continuation up to a token that ends a text or an answer;
    both depend on the weights and the settings alone. Without any text held out it continues the end token."""
    starts = ([int(i) for i in beginning(held_out, d) if i != tokenizer.eos_id] for d in range(len(held_out)))
    prompt = next(filter(None, starts), [tokenizer.eos_id])
    ranks, most = shares.ranks if shares else Ranks(), model.config.max_positions
    if settings.exchange in OVER_BUFFERS:  # which have room for a row of the training
        most = min(most, settings.seq_len)
    longest = most // ranks.tokens_multiple * ranks.tokens_multiple
    prompt = prompt[: longest - 1]
    ids = torch.tensor([prompt], device=next(model.parameters()).device)
    new = min(settings.sample_tokens, longest - len(prompt))
    choose = sampler(temperature=TEMPERATURE, seed=settings.seed)

    def agreed(logits: Tensor, ids: Tensor) -> Tensor:
        return ranks.from_first(lambda: choose(logits, ids))

    ends, training = tokenizer.ends(), model.training
    model.eval()
    if shares is not None and (ranks.pp > 1 or ranks.sharing > 1):
        tokens = [*without_cache(shares, ids, new, agreed, ends)]
    else:
        tokens = [int(t) for t in model.stream(ids, new, choose=agreed, eos_token_id=ends)]
    model.train(training)
    prompt, tokens = [t for t in prompt if t != tokenizer.eos_id], [t for t in tokens if t not in ends]
    text = TextStream(tokenizer, prompt)
    return tokenizer.decode(prompt), "".join(map(text.add, tokens)) + text.end()


def beginning(held_out: Documents, d: int) -> np.ndarray:
    """The first ids of a text; of a chat those before its first answer."""
    return held_out[d][: int(held_out.trained(d).argmax()) if held_out.masks else PROMPT]


@torch.no_grad()
def without_cache(shares: Shares, ids: Tensor, new: int, choose, ends) -> Iterator[int]:
    """`Ling.stream` of ids [1, n] for a model whose layers or rows are divided over ranks, which keep no keys and
    values: every token takes a forward of the whole text. All ranks call it."""
    ranks, multiple = shares.ranks, shares.ranks.tokens_multiple
    for _ in range(new):
        n = ids.shape[1]
        padded = torch.nn.functional.pad(ids, (0, -n % multiple))  # no row sees what is after it
        forward = shares.pipeline.logits if shares.pipeline else lambda ids: shares.model(ids).logits
        logits = forward(padded)[:, n - 1].clone()
        if ranks.sequences > 0:  # these ranks compute the same
            logits.zero_()
        token = choose(ranks.sum_(logits, stages=True), ids)
        yield int(token)
        if int(token) in ends:
            return
        ids = torch.cat([ids, token[:, None]], 1)
