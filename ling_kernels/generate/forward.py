"""Forward passes of the engine over spans of rows, and the tokens it guesses ahead.

A span is some of a request's tokens, one after another, whose keys and values enter the cache. Spans of one length, up
to 8 rows, go through attention_decode together; the others, chunks of prompts, through attention over what the cache
holds of their beginnings.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..model import Ling
from ..nn import Rows
from ..ops.attention_decode import KVCache
from .scheduler import Request

NGRAM = 3  # tokens: how much of a text's end is looked for in it


class Span(NamedTuple):
    request: Request
    start: int
    rows: int


class Forward:
    """caches: of each layer, then of the MTP layer if that is to guess; pages of page_size tokens."""

    def __init__(self, model: Ling, caches: list[KVCache], page_size: int):
        self.model, self.page_size, self.device = model, page_size, model.word_embeddings.weight.device
        layers = len(model.layers)
        self.caches, self.draft_cache = caches[:layers], caches[layers] if len(caches) > layers else None

    def hidden(self, spans: Sequence[Span], rows: Rows) -> Tensor:
        """[T, H], normed."""
        ids = np.concatenate([r.rows(start, n) for r, start, n in spans])
        return self.model.backbone(self.on_device(ids), rows, self.caches)[0]

    def logits(self, h: Tensor, rows: Sequence[int]) -> Tensor:
        """[len(rows), V] fp32."""
        return self.model.logits(h[self.on_device(np.array(rows))])

    def rows(self, spans: Sequence[Span], each: int) -> Rows:
        """The spans at the front that have `each` rows go through attention_decode."""
        positions = [np.arange(start, start + n) for _, start, n in spans]
        slots = [self.slots(span.request, p) for span, p in zip(spans, positions, strict=True)]
        short = [s for s in spans if s.rows == each]
        chunks = spans[len(short) :]
        rows = Rows(
            self.model.cos,
            self.model.sin,
            self.on_device(np.concatenate(positions)),
            self.on_device(np.cumsum([0, *(s.rows for s in chunks)], dtype=np.int32)),
            self.on_device(np.concatenate(slots)),
        )
        if short:
            table = np.zeros((len(short), max(len(s.request.pages) for s in short)), np.int32)
            for line, span in zip(table, short, strict=True):
                line[: len(span.request.pages)] = span.request.pages
            lengths = self.on_device(np.array([s.start + each for s in short], np.int32))
            rows = rows._replace(decoding=each * len(short), block_table=self.on_device(table), lengths=lengths)
        if any(s.start for s in chunks):
            seen = [s.start + s.rows for s in chunks]
            context = np.concatenate([self.slots(s.request, np.arange(n)) for s, n in zip(chunks, seen, strict=True)])
            bounds = np.cumsum([0, *seen], dtype=np.int32)
            rows = rows._replace(context=self.on_device(context), cu_seqlens_k=self.on_device(bounds))
        return rows

    def slots(self, request: Request, positions: np.ndarray) -> np.ndarray:
        """Where the tokens at these positions lie in the cache."""
        return np.array(request.pages)[positions // self.page_size] * self.page_size + positions % self.page_size

    def draft(self, spans: Sequence[Span], rows: Rows, h: Tensor, counts: dict[Request, int]) -> None:
        """Set the drafts of the requests in counts, so many for each, by the MTP layer.

        Its row at a position is made of the token after it, so it follows the model by one step: it computes the rows
        that the model just has, now that the next tokens are known, then a row for each further guess. What a wrong
        guess left in its cache is overwritten. At a shared page's end its row may be another text's, which makes a
        guess worse and no text wrong.
        """
        (mtp,), embed = self.model.mtp[:1], self.model.word_embeddings
        after = np.concatenate([(r.tokens[start + 1 : start + n + 1] + n * [0])[:n] for r, start, n in spans])
        x, _ = mtp(embed(self.on_device(after)), h, rows, cache=self.draft_cache)
        first = np.cumsum([0, *(s.rows for s in spans)])
        where = {s.request: i + len(s.request.tokens) - 2 - s.start for s, i in zip(spans, first, strict=False)}
        live, guesses = [r for r in counts if counts[r] > 0], []
        x = x[self.on_device(np.array([where[r] for r in live], np.int64))]
        for ahead in range(max(counts.values(), default=0)):
            if ahead:
                keep = [i for i, r in enumerate(live) if counts[r] > ahead]
                live, x = [live[i] for i in keep], x[self.on_device(np.array(keep))]
                step = self.rows([Span(r, len(r.tokens) - 2 + ahead, 1) for r in live], 1)
                x, _ = mtp(embed(guesses[-1][1][self.on_device(np.array(keep))]), x, step, cache=self.draft_cache)
            guesses.append((live, self.model.logits(x).argmax(-1)))
        for requests, tokens in guesses:
            for request, token in zip(requests, tokens.tolist(), strict=True):
                request.drafts.append(token)

    def on_device(self, x: np.ndarray) -> Tensor:
        return torch.from_numpy(x).to(self.device, non_blocking=True)


def lookup(tokens: Sequence[int], count: int) -> list[int]:
    """count tokens that may follow: what followed when the text last had the same end, else its last token again."""
    for n in range(min(NGRAM, len(tokens) - 1), 0, -1):
        for i in range(len(tokens) - n - 1, -1, -1):
            if tokens[i : i + n] == tokens[-n:]:
                return [tokens[i + n + j % (len(tokens) - i - n)] for j in range(count)]
    return [tokens[-1]] * count
