"""The engine's forward pass, and the sequence state that stays on the device between passes.

A decode step, from the API down to the kernels:

    Engine.stream -> Engine.wait_for_tokens -> Engine.run_pass     engine.py; holds the engine's lock
      Scheduler.schedule                     scheduler.py; chooses requests, reserves pages
      Engine.launch -> Forward.__call__      copies new page numbers to the block tables
        CudaGraphs.__call__                  graphs.py; replays Forward.compute, or runs it eagerly (CPU, prefill)
          Forward.compute                    gathers token ids, and writes tokens and drafts back
            Ling.backbone                    model/transformer.py
              Layer.compute, per layer:      attention(norm(x)), then the MLP or MoE
                Attention.forward            nn/attention.py -> ops/qk_norm_attention_decode.py
                MoE.decode                   nn/moe.py -> ops/moe_decode.py; MoE.forward above 8 rows
            Forward.sample                   final norm and lm_head, then sample() of model/sample.py
            Forward.mtp_drafts               the next draft tokens; lookup_drafts() without MTP layer
      Engine.collect -> Engine.accept        reads the tokens of the previous pass, finishes requests

docs/serving.md lists the kernels of a layer; tests/test_decode_layer.py counts them.

Each running request has a lane, a row of the device state: its token ids, their number, its block table, its sampling
parameters. A pass decodes lanes, 1 + draft rows each (the last token and the draft tokens after it), and writes the
next tokens into them, so the next pass can be launched before the host has these tokens. In the same pass it prefills
chunks of other requests. A pass without chunks needs no data from the host, and on a GPU is a CUDA graph.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..model import Ling
from ..model.sample import Sampling, SamplingMode, SamplingTensors, sample, uniforms
from ..nn import BatchLayout
from ..ops.attention_decode import KVCache
from .graphs import CudaGraphs
from .scheduler import Request

NGRAM = 3  # longest n-gram at a sequence's end that lookup_drafts searches for


class Chunk(NamedTuple):
    """Tokens start .. start + rows of a request, to prefill."""

    request: Request
    start: int
    rows: int


class PendingTokens:
    """The output of a decode pass [B, 2 + draft], being copied to the host."""

    def __init__(self, requests: Sequence[Request], output: Tensor):
        self.requests, self.output, self.copied = requests, output, None
        if output.is_cuda:
            self.output = torch.empty(output.shape, dtype=output.dtype, pin_memory=True)
            self.output.copy_(output, non_blocking=True)
            self.copied = torch.cuda.Event()
            self.copied.record()

    def tokens(self) -> list[list[int]]:
        """For each request its next token after each accepted draft token; waits for the copy."""
        if self.copied is not None:
            self.copied.synchronize()
        return [tokens[: accepted + 1] for *tokens, accepted in self.output.tolist()]


class Forward:
    """caches: one per layer, then one for the MTP layer if it drafts; their pages have page_size tokens.

    Shapes: B lanes, n = 1 + draft rows per lane, P token ids per lane, T rows of the pass.
    """

    def __init__(self, model: Ling, caches: list[KVCache], page_size: int, lanes: int, draft: int):
        c, self.device = model.config, model.word_embeddings.weight.device
        self.model, self.page_size, self.draft = model, page_size, draft
        layers = len(model.layers)
        self.caches, self.mtp_cache = caches[:layers], caches[layers] if len(caches) > layers else None
        self.padding_lane = lanes  # an extra lane of length 0 pads a graph's batch

        def per_lane(*shape: int, dtype: torch.dtype) -> Tensor:
            return torch.zeros(lanes + 1, *shape, dtype=dtype, device=self.device)

        self.token_ids = per_lane(c.max_positions + 2 * (1 + draft), dtype=torch.int32)  # drafts may exceed the longest
        self.lengths = per_lane(dtype=torch.int64)  # token ids without drafts
        self.block_tables = per_lane(-(-c.max_positions // page_size), dtype=torch.int32)
        self.seeds = per_lane(dtype=torch.int64)
        self.sampling = SamplingTensors.of([Sampling()] * (lanes + 1), c.vocab_size, self.device)
        self.no_chunks = torch.zeros(1, dtype=torch.int32, device=self.device)  # cu_seqlens of no sequence
        # Only qk_norm_attention_decode skips the cache write of a lane of length 0.
        graphs = self.device.type == "cuda" and c.use_qk_norm
        self.graphs = CudaGraphs(self.compute, self.padding_lane, lanes, self.device) if graphs else None

    def fill_lane(self, request: Request) -> None:
        """Copy an admitted request's tokens and sampling parameters to its lane."""
        lane, tokens = request.lane, np.array(request.tokens, np.int32)
        self.token_ids[lane, : len(tokens)] = self.to_device(tokens)
        self.lengths[lane] = len(tokens)
        self.seeds[lane] = request.seed
        parameters = SamplingTensors.of([request.sampling], self.model.config.vocab_size)
        for of_lanes, of_request in zip(self.sampling, parameters, strict=True):
            of_lanes[lane] = of_request.item()

    @torch.inference_mode()
    def __call__(self, decoding: Sequence[Request], chunks: Sequence[Chunk]) -> PendingTokens | None:
        """Launch a pass; None if nothing is decoded. Does not synchronise with the device."""
        self.update_block_tables([*decoding, *(chunk.request for chunk in chunks)])
        lanes, mode = [r.lane for r in decoding], SamplingMode.of(r.sampling for r in decoding)
        if self.graphs is not None and not chunks:
            output = self.graphs(lanes, mode)
        else:
            width = max((len(r.pages) for r in decoding), default=0)
            output = self.compute(self.to_device(np.array(lanes, np.int64)), mode, width, chunks)
        return PendingTokens(decoding, output) if decoding else None

    def update_block_tables(self, requests: Sequence[Request]) -> None:
        """Copy the numbers of newly allocated pages."""
        new = [(r.lane, i, r.pages[i]) for r in requests for i in range(r.pages_on_device, len(r.pages))]
        if new:
            lane, i, page = self.to_device(np.array(new).T.copy())
            self.block_tables[lane, i] = page.int()
        for r in requests:
            r.pages_on_device = len(r.pages)

    def compute(
        self, lanes: Tensor, mode: SamplingMode, width: int | None = None, chunks: Sequence[Chunk] = ()
    ) -> Tensor:
        """lanes [B] int64 -> [B, 2 + draft] int64: the token after each row, and the number of accepted draft tokens.

        width: columns of the block tables that these lanes use; None: all.
        """
        n, B, P, token_ids = 1 + self.draft, len(lanes), self.token_ids.shape[1], self.token_ids.view(-1)
        lengths = self.lengths[lanes]
        positions = (lengths[:, None] + torch.arange(-1, n - 1, device=self.device)).clamp(min=0)  # [B, n]
        decoded = lanes[:, None] * P + positions  # indices in token_ids
        layout, inputs = self.decode_layout(lanes, positions, width), decoded.flatten()
        if chunks:
            layout, inputs = self.with_chunks(layout, inputs, chunks)
        # -1 marks NaN logits; Engine.accept turns it into an error.
        h, _ = self.model.backbone(token_ids[inputs].clamp(min=0), layout, self.caches, norm=self.mtp_cache is not None)

        tokens = self.sample(h[: B * n], lanes, positions, mode) if B else positions
        accepted = (tokens[:, :-1] == token_ids[decoded[:, 1:]]).int().cumprod(1).sum(1)
        new_lengths = torch.where(lengths > 0, lengths + 1 + accepted, 0)
        token_ids[decoded + 1], self.lengths[lanes] = tokens.int(), new_lengths
        if self.mtp_cache is not None:
            (mtp,) = self.model.mtp[:1]
            next_embeddings = self.model.word_embeddings(token_ids[inputs + 1].clamp(min=0))
            x, _ = mtp(next_embeddings, h, layout, cache=self.mtp_cache)
            if B:
                last_accepted = torch.arange(B, device=self.device) * n + accepted
                self.mtp_drafts(mtp, lanes, new_lengths, x[last_accepted], width)
        elif self.draft:
            drafts = lanes[:, None] * P + new_lengths[:, None] + torch.arange(self.draft, device=self.device)
            token_ids[drafts] = lookup_drafts(self.token_ids[lanes], new_lengths, self.draft)
        return torch.cat([tokens, accepted[:, None]], 1)

    def decode_layout(self, lanes: Tensor, positions: Tensor, width: int | None) -> BatchLayout:
        """The attention layout of the lanes' rows at positions [B, n]."""
        lengths = torch.where(self.lengths[lanes] > 0, positions[:, -1] + 1, 0).int()
        m, block_table = self.model, self.block_tables[lanes, :width]
        layout = BatchLayout(
            m.cos, m.sin, positions.flatten(), self.no_chunks, None, positions.numel(), block_table, lengths
        )
        return layout if m.config.use_qk_norm else layout._replace(slots=self.decode_slots(block_table, positions))

    def decode_slots(self, block_table: Tensor, positions: Tensor) -> Tensor:
        """Cache slots [B n] of decode rows, which qk_norm_attention_decode does not need."""
        page, offset = block_table.gather(1, positions // self.page_size), positions % self.page_size
        return (page * self.page_size + offset).flatten()

    def with_chunks(self, layout: BatchLayout, inputs: Tensor, chunks: Sequence[Chunk]) -> tuple[BatchLayout, Tensor]:
        """Append the rows of chunks to the layout, and to inputs [T], the rows' indices in token_ids."""
        P, requests = self.token_ids.shape[1], [c.request for c in chunks]
        positions = [np.arange(start, start + n) for _, start, n in chunks]
        chunk_inputs = [r.lane * P + p for r, p in zip(requests, positions, strict=True)]
        slots = [self.slots(r, p) for r, p in zip(requests, positions, strict=True)]
        decode_slots = self.decode_slots(layout.block_table, layout.positions.view(-1, 1 + self.draft))
        layout = layout._replace(
            positions=torch.cat([layout.positions, self.to_device(np.concatenate(positions))]),
            slots=torch.cat([decode_slots, self.to_device(np.concatenate(slots))]),
            cu_seqlens=self.to_device(np.cumsum([0, *(c.rows for c in chunks)], dtype=np.int32)),
        )
        if any(c.start for c in chunks):  # chunks attend to the cached tokens before them
            lengths = [c.start + c.rows for c in chunks]
            context = np.concatenate([self.slots(r, np.arange(n)) for r, n in zip(requests, lengths, strict=True)])
            cu_seqlens_k = np.cumsum([0, *lengths], dtype=np.int32)
            layout = layout._replace(context=self.to_device(context), cu_seqlens_k=self.to_device(cu_seqlens_k))
        return layout, torch.cat([inputs, self.to_device(np.concatenate(chunk_inputs))])

    def slots(self, request: Request, positions: np.ndarray) -> np.ndarray:
        """Cache slots of a request's positions."""
        return np.array(request.pages)[positions // self.page_size] * self.page_size + positions % self.page_size

    def sample(self, h: Tensor, lanes: Tensor, positions: Tensor, mode: SamplingMode) -> Tensor:
        """h [B n, H], normed where the MTP layer reads it too -> the token after each row, [B, n]."""
        logits = self.model.logits(h, norm=self.mtp_cache is None)
        if not any(mode):
            return sample(logits, None, mode).view(positions.shape)
        lane = lanes.repeat_interleave(positions.shape[1])
        parameters = SamplingTensors(*(x[lane] for x in self.sampling))
        uniform = uniforms(self.seeds[lane], positions.flatten()) if mode.random else None
        seen = self.seen_tokens(lanes, positions) if mode.penalised else None
        return sample(logits, parameters, mode, uniform, seen).view(positions.shape)

    def seen_tokens(self, lanes: Tensor, positions: Tensor) -> Tensor:
        """[B n, V] bool: the tokens of the sequence up to each row, draft tokens included."""
        (B, n), V = positions.shape, self.model.config.vocab_size
        tokens, index = self.token_ids[lanes].long(), torch.arange(self.token_ids.shape[1], device=self.device)
        seen = []
        for i in range(n):
            token = torch.where(index <= positions[:, i, None], tokens.clamp(min=0), V)
            seen.append(torch.zeros(B, V + 1, dtype=torch.bool, device=self.device).scatter_(1, token, True)[:, :V])
        return torch.stack(seen, 1).flatten(0, 1)

    def mtp_drafts(self, mtp: torch.nn.Module, lanes: Tensor, lengths: Tensor, x: Tensor, width: int | None) -> None:
        """Write the next draft tokens behind each sequence.

        The first comes from x [B, H], the MTP layer's output at the position before the last token, each further one
        from another pass of the MTP layer. Its input at a position contains the embedding of the next token, so its
        cache is one position behind the model's. Rows of rejected drafts are overwritten. The row at the end of a
        shared page may belong to another sequence: then a draft token is worse, but no output changes.
        """
        token_ids, P, m = self.token_ids.view(-1), self.token_ids.shape[1], self.model
        for i in range(self.draft):
            token = m.logits(x).argmax(-1)
            token_ids[lanes * P + lengths + i] = token.int()
            if i + 1 < self.draft:
                layout = self.decode_layout(lanes, (lengths - 1 + i).clamp(min=0)[:, None], width)
                x, _ = mtp(m.word_embeddings(token), x, layout, cache=self.mtp_cache)

    def to_device(self, x: np.ndarray) -> Tensor:
        return torch.from_numpy(x).to(self.device, non_blocking=True)


def lookup_drafts(token_ids: Tensor, lengths: Tensor, count: int) -> Tensor:
    """Prompt lookup: token_ids [B, P] int32 with lengths [B] int64 valid ids each -> draft tokens [B, count].

    The drafts are the tokens after the latest earlier occurrence of the sequence's last three tokens, else of its last
    two, else of its last one, repeated periodically up to `count`; without an occurrence they are its last token.
    """
    index, last = torch.arange(token_ids.shape[1], device=token_ids.device), (lengths - 1).clamp(min=0)
    match, start = index < last[:, None], torch.zeros_like(lengths)
    for back in range(NGRAM):
        wanted = token_ids.gather(1, (last - back).clamp(min=0)[:, None])
        match = match & (token_ids.roll(back, 1) == wanted) & (index >= back)
        # start encodes (n-gram length, position after the match): longer n-grams win, then later positions
        found = back * token_ids.shape[1] + (index * match).amax(1) + 1
        start = torch.maximum(start, torch.where(match.any(1), found, 0))
    has_match = start > 0
    start = torch.where(has_match, start % token_ids.shape[1], last)
    period = torch.where(has_match, lengths - start, 1).clamp(min=1)
    offset = torch.arange(count, device=token_ids.device)
    return token_ids.gather(1, start[:, None] + offset % period[:, None])
