"""The engine's forward pass, and what the device remembers from one pass to the next.

Every running request has a lane: its text, how long that is, where its pages lie, how it is sampled. A pass decodes
some lanes, 1 + draft rows of each (the last token, and the guesses that stand after it), and writes what comes next
into them, so that the next pass can be launched before the host has seen any of it. Beside them it computes chunks of
prompts. A pass without chunks asks nothing of the host and is a CUDA graph on a GPU, one for each of a few batch sizes.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..model import Ling
from ..nn import Rows
from ..ops.attention_decode import KVCache
from .graphs import Graphs
from .sample import Asked, Mode, Sampling, choose, uniforms
from .scheduler import Request

NGRAM = 3  # tokens: how much of a text's end is looked for in it


class Chunk(NamedTuple):
    """Some of a request's tokens, one after another, whose keys and values enter the cache."""

    request: Request
    start: int
    rows: int


class Flight:
    """What a pass finds for the requests that it decodes, on its way to the host."""

    def __init__(self, requests: Sequence[Request], found: Tensor):
        self.requests, self.found, self.landed = requests, found, None
        if found.is_cuda:
            self.found = torch.empty(found.shape, dtype=found.dtype, pin_memory=True)
            self.found.copy_(found, non_blocking=True)
            self.landed = torch.cuda.Event()
            self.landed.record()

    def tokens(self) -> list[list[int]]:
        """For each request those that are right, or would be if no end came before. Waits for the device."""
        if self.landed is not None:
            self.landed.synchronize()
        return [tokens[: right + 1] for *tokens, right in self.found.tolist()]


class Forward:
    """caches: of each layer, then of the MTP layer if that is to guess; pages of page_size tokens."""

    def __init__(self, model: Ling, caches: list[KVCache], page_size: int, lanes: int, draft: int):
        c, self.device = model.config, model.word_embeddings.weight.device
        self.model, self.page_size, self.draft = model, page_size, draft
        layers = len(model.layers)
        self.caches, self.draft_cache = caches[:layers], caches[layers] if len(caches) > layers else None
        self.nobody = lanes  # one lane more, of length 0, fills up the batch of a graph

        def per_lane(*shape: int, dtype: torch.dtype) -> Tensor:
            return torch.zeros(lanes + 1, *shape, dtype=dtype, device=self.device)

        self.text = per_lane(c.max_positions + 2 * (1 + draft), dtype=torch.int32)  # and guesses past the longest
        self.length = per_lane(dtype=torch.int64)
        self.table = per_lane(-(-c.max_positions // page_size), dtype=torch.int32)
        self.seed = per_lane(dtype=torch.int64)
        self.asked = Asked.of([Sampling()] * (lanes + 1), c.vocab_size, self.device)
        self.no_chunks = torch.zeros(1, dtype=torch.int32, device=self.device)
        # A lane of length 0 writes to no page, which only the op that norms, appends and attends at once knows.
        graphs = self.device.type == "cuda" and c.use_qk_norm
        self.graphs = Graphs(self.compute, self.nobody, lanes, self.device) if graphs else None

    def begin(self, request: Request) -> None:
        """Fill its lane."""
        lane, tokens = request.lane, np.array(request.tokens, np.int32)
        self.text[lane, : len(tokens)] = self.on_device(tokens)
        self.length[lane] = len(tokens)
        self.seed[lane] = request.seed
        for of_all, its in zip(self.asked, Asked.of([request.sampling], self.model.config.vocab_size), strict=True):
            of_all[lane] = its.item()

    @torch.inference_mode()
    def __call__(self, decoding: Sequence[Request], chunks: Sequence[Chunk]) -> Flight | None:
        """One pass; None where nothing is decoded. Waits for nothing on the device."""
        self.take_pages([*decoding, *(chunk.request for chunk in chunks)])
        lanes, mode = [r.lane for r in decoding], Mode.of(r.sampling for r in decoding)
        if self.graphs is not None and not chunks:
            found = self.graphs(lanes, mode)
        else:
            width = max((len(r.pages) for r in decoding), default=0)
            found = self.compute(self.on_device(np.array(lanes, np.int64)), mode, width, chunks)
        return Flight(decoding, found) if decoding else None

    def take_pages(self, requests: Sequence[Request]) -> None:
        """Bring the table of pages up to date."""
        new = [(r.lane, i, r.pages[i]) for r in requests for i in range(r.placed, len(r.pages))]
        if new:
            lane, i, page = self.on_device(np.array(new).T.copy())
            self.table[lane, i] = page.int()
        for r in requests:
            r.placed = len(r.pages)

    def compute(self, lanes: Tensor, mode: Mode, width: int | None = None, chunks: Sequence[Chunk] = ()) -> Tensor:
        """lanes [B] int64 -> [B, 2 + draft]: the token after every row, and how many of its guesses were right.

        width: of the table, as far as these lanes need it.
        """
        n, B, P, text = 1 + self.draft, len(lanes), self.text.shape[1], self.text.view(-1)
        length = self.length[lanes]
        place = (length[:, None] + torch.arange(-1, n - 1, device=self.device)).clamp(min=0)
        at = lanes[:, None] * P + place
        rows, every = self.rows(lanes, place, width), at.flatten()
        if chunks:
            rows, every = self.with_chunks(rows, every, chunks)
        h, _ = self.model.backbone(text[every].clamp(min=0), rows, self.caches)  # -1: its host will hear of it

        tokens = self.choose(h[: B * n], lanes, place, mode) if B else place
        right = (tokens[:, :-1] == text[at[:, 1:]]).int().cumprod(1).sum(1)
        after = torch.where(length > 0, length + 1 + right, 0)
        text[at + 1], self.length[lanes] = tokens.int(), after
        if self.draft_cache is not None:
            (mtp,) = self.model.mtp[:1]
            x, _ = mtp(self.model.word_embeddings(text[every + 1].clamp(min=0)), h, rows, cache=self.draft_cache)
            last = torch.arange(B, device=self.device) * n + right
            if B:
                self.guess(mtp, lanes, after, x[last], width)
        elif self.draft:
            ahead = torch.arange(self.draft, device=self.device)
            text[lanes[:, None] * P + after[:, None] + ahead] = lookup(self.text[lanes], after, self.draft)
        return torch.cat([tokens, right[:, None]], 1)

    def rows(self, lanes: Tensor, place: Tensor, width: int | None) -> Rows:
        """Of the lanes' tokens at place [B, n]."""
        lengths = torch.where(self.length[lanes] > 0, place[:, -1] + 1, 0).int()
        m, table = self.model, self.table[lanes, :width]
        rows = Rows(m.cos, m.sin, place.flatten(), self.no_chunks, None, place.numel(), table, lengths)
        return rows if m.config.use_qk_norm else rows._replace(slots=self.decode_slots(table, place))

    def decode_slots(self, table: Tensor, place: Tensor) -> Tensor:
        """As `slots`, of lanes; the op that norms, appends and attends at once finds them by itself."""
        page, cell = table.gather(1, place // self.page_size), place % self.page_size
        return (page * self.page_size + cell).flatten()

    def with_chunks(self, rows: Rows, at: Tensor, chunks: Sequence[Chunk]) -> tuple[Rows, Tensor]:
        """Rows of chunks after those that decode, and at [T] where in all lanes' texts each row's token stands."""
        P, requests = self.text.shape[1], [c.request for c in chunks]
        places = [np.arange(start, start + n) for _, start, n in chunks]
        its_at = [r.lane * P + p for r, p in zip(requests, places, strict=True)]
        slots = [self.slots(r, p) for r, p in zip(requests, places, strict=True)]
        decoded = self.decode_slots(rows.block_table, rows.positions.view(-1, 1 + self.draft))
        rows = rows._replace(
            positions=torch.cat([rows.positions, self.on_device(np.concatenate(places))]),
            slots=torch.cat([decoded, self.on_device(np.concatenate(slots))]),
            cu_seqlens=self.on_device(np.cumsum([0, *(c.rows for c in chunks)], dtype=np.int32)),
        )
        if any(c.start for c in chunks):
            seen = [c.start + c.rows for c in chunks]
            context = np.concatenate([self.slots(r, np.arange(n)) for r, n in zip(requests, seen, strict=True)])
            bounds = np.cumsum([0, *seen], dtype=np.int32)
            rows = rows._replace(context=self.on_device(context), cu_seqlens_k=self.on_device(bounds))
        return rows, torch.cat([at, self.on_device(np.concatenate(its_at))])

    def slots(self, request: Request, places: np.ndarray) -> np.ndarray:
        """Where the tokens at these places of its text lie in the cache."""
        return np.array(request.pages)[places // self.page_size] * self.page_size + places % self.page_size

    def choose(self, h: Tensor, lanes: Tensor, place: Tensor, mode: Mode) -> Tensor:
        """h [B n, H] -> the token after each row, [B, n]."""
        logits = self.model.logits(h)
        if not any(mode):
            return choose(logits, None, mode).view(place.shape)
        lane = lanes.repeat_interleave(place.shape[1])
        asked = Asked(*(x[lane] for x in self.asked))
        uniform = uniforms(self.seed[lane], place.flatten()) if mode.drawn else None
        seen = self.seen(lanes, place) if mode.penalised else None
        return choose(logits, asked, mode, uniform, seen).view(place.shape)

    def seen(self, lanes: Tensor, place: Tensor) -> Tensor:
        """[B n, V] bool: the tokens of the text up to each row, guesses included."""
        B, n, V = *place.shape, self.model.config.vocab_size
        text, where = self.text[lanes].long(), torch.arange(self.text.shape[1], device=self.device)
        seen = []
        for i in range(n):
            token = torch.where(where <= place[:, i, None], text.clamp(min=0), V)
            seen.append(torch.zeros(B, V + 1, dtype=torch.bool, device=self.device).scatter_(1, token, True)[:, :V])
        return torch.stack(seen, 1).flatten(0, 1)

    def guess(self, mtp: torch.nn.Module, lanes: Tensor, length: Tensor, x: Tensor, width: int | None) -> None:
        """By the MTP layer, whose row before the last token gave x [B, H]; then a row for each further guess.

        A row is made of the token after it, so the layer follows the model by one place. What a wrong guess left in
        its cache is overwritten. At a shared page's end its row may be another text's, which makes a guess worse and no
        text wrong.
        """
        text, P, m = self.text.view(-1), self.text.shape[1], self.model
        for ahead in range(self.draft):
            token = m.logits(x).argmax(-1)
            text[lanes * P + length + ahead] = token.int()
            if ahead + 1 < self.draft:
                rows = self.rows(lanes, (length - 1 + ahead).clamp(min=0)[:, None], width)
                x, _ = mtp(m.word_embeddings(token), x, rows, cache=self.draft_cache)

    def on_device(self, x: np.ndarray) -> Tensor:
        return torch.from_numpy(x).to(self.device, non_blocking=True)


def lookup(text: Tensor, length: Tensor, count: int) -> Tensor:
    """text [B, P] int32, of which the first length [B] int64 count -> [B, count] that may follow.

    That is what followed when a text last had the same end, of three tokens or, where there was none, two or one; and
    where that end is new, its last token again. What followed is repeated where it is too short.
    """
    where, last = torch.arange(text.shape[1], device=text.device), (length - 1).clamp(min=0)
    same, start = where < last[:, None], torch.zeros_like(length)
    for back in range(NGRAM):
        its = text.gather(1, (last - back).clamp(min=0)[:, None])
        same = same & (text.roll(back, 1) == its) & (where >= back)
        start = torch.maximum(start, torch.where(same.any(1), back * text.shape[1] + (where * same).amax(1) + 1, 0))
    known = start > 0
    start = torch.where(known, start % text.shape[1], last)
    period = torch.where(known, length - start, 1).clamp(min=1)
    ahead = torch.arange(count, device=text.device)
    return text.gather(1, start[:, None] + ahead % period[:, None])
