"""The engine's forward pass, and the sequence state that stays on the device between passes.

A decode step, from the API down to the kernels:

    Engine.stream -> Engine.wait_for_tokens -> Engine.run_pass     engine.py; holds the engine's lock
      Scheduler.schedule                     scheduler.py; chooses requests, reserves pages
      Engine.launch -> Forward.__call__      copies new page numbers to the block tables
        CudaGraphs.__call__                  graphs.py; replays Forward.compute, or runs it eagerly (CPU, prefill)
          Forward.compute
            decode_inputs                    ops/decode_inputs.py: positions, embeddings, block tables
            Ling.backbone                    model/transformer.py
              Layer.compute, per layer:      attention(norm(x)), then the MLP or MoE
                Attention.forward            nn/attention.py -> ops/qk_norm_attention_decode.py, attention_decode_cpu.py
                MoE.decode                   nn/moe.py -> ops/moe_decode.py, moe_cpu.py; MoE.forward above 8 rows
            Forward.next_tokens              final norm and lm_head; edits.py; ops/sample.py; ops/accept_tokens.py
            Forward.mtp_drafts               writes the next draft tokens of an MTP layer
      Engine.collect -> Engine.accept        reads the tokens of the previous pass, finishes requests

docs/serving.md lists the kernels of a layer and of a pass; tests/test_decode_layer.py counts them.

Each running request has a lane, a row of the device state: its token ids, their number, its block table, its sampling
parameters. A pass decodes lanes, 1 + draft rows each (the last token and the draft tokens after it), and writes the
next tokens into them, so the next pass can be launched before the host has these tokens. In the same pass it prefills
chunks of other requests. A pass without chunks needs no data from the host, and on a GPU is a CUDA graph.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..model import Ling
from ..model.sample import Sampling, SamplingMode, SamplingTensors
from ..nn import BatchLayout
from ..ops.accept_tokens import accept_tokens
from ..ops.attention_decode import KVCache
from ..ops.decode_inputs import decode_inputs
from ..ops.sample import sample
from .adapters import Adapters
from .edits import Edits, Masks
from .graphs import CudaGraphs
from .logprobs import MOST, TokenLogprob, read_scores, score
from .request import Request

SCORED_ROWS = 256  # of a prompt, whose logits exist at a time


class Chunk(NamedTuple):
    """Tokens start .. start + rows of a request, to prefill."""

    request: Request
    start: int
    rows: int


class PromptRows(NamedTuple):
    """Scores of a request's tokens start + 1, start + 2, ..., from the rows that prefill the tokens before them."""

    request: Request
    start: int
    scores: Tensor  # [rows, 1 + 2 K] int64, see logprobs.score


class HostBuffer:
    """Pinned memory for the output of one pass, and the event after the last copy into it."""

    def __init__(self, lanes: int, columns: int):
        self.output = torch.empty(lanes * columns, dtype=torch.int64, pin_memory=True)
        self.copied = torch.cuda.Event()


class PendingTokens:
    """The output of a pass, being copied to the host; buffer: None where it lies there.

    output [B, 2 + draft + ...], as Forward.compute gives it.
    """

    def __init__(
        self,
        requests: Sequence[Request],
        output: Tensor,
        draft: int,
        buffer: HostBuffer | None,
        prompts: list[PromptRows],
    ):
        self.requests, self.output, self.draft, self.copied, self.prompts = requests, output, draft, None, prompts
        if buffer is not None:
            self.output, self.copied = buffer.output[: output.numel()].view(output.shape), buffer.copied
            self.output.copy_(output, non_blocking=True)
            self.copied.record()

    def tokens(self) -> list[list[int]]:
        """For each request its next token after each accepted draft token; waits for the copy."""
        if self.copied is not None:
            self.copied.synchronize()
        output = self.output[:, : 2 + self.draft].tolist()
        return [tokens[: accepted + 1] for *tokens, accepted in output]

    def logprobs(self, i: int, tokens: list[int]) -> list[TokenLogprob]:
        """Of the first tokens of request i, which wants them; after `tokens`."""
        drafts = self.draft * any(r.guide is not None for r in self.requests)  # columns of them
        scores = self.output[i, 2 + self.draft : self.output.shape[1] - drafts].view(1 + self.draft, -1)
        return read_scores(scores[: len(tokens)], tokens, self.requests[i].num_logprobs)

    def drafts(self, i: int) -> list[int]:
        """The next draft tokens of request i; after `tokens`. Without a grammar the host need not know them."""
        guided = self.draft and self.requests[i].guide is not None
        return self.output[i, -self.draft :].tolist() if guided else []


class Forward:
    """caches: one per layer, then one for the MTP layer if it drafts; their pages have page_size tokens.

    Shapes: B lanes, n = 1 + draft rows per lane, P token ids per lane, T rows of the pass.
    """

    def __init__(
        self,
        model: Ling,
        caches: list[KVCache],
        page_size: int,
        lanes: int,
        draft: int,
        record_routing: bool = False,
        adapters: Adapters | None = None,
    ):
        c, self.device = model.config, model.word_embeddings.weight.device
        self.model, self.page_size, self.draft, self.adapters = model, page_size, draft, adapters
        layers = len(model.layers)
        self.caches, self.mtp_cache = caches[:layers], caches[layers] if len(caches) > layers else None
        # [M, cells + 1, topk]: the experts of the token of each cell of the cache; the last is for rows of no sequence.
        self.routing: Tensor | None = None
        if record_routing:
            moe, cells = layers - c.first_k_dense_replace, caches[0].k.shape[0] * page_size
            dtype = torch.uint8 if c.num_experts <= 256 else torch.int16
            self.routing = torch.zeros(moe, cells + 1, c.num_experts_per_tok, dtype=dtype, device=self.device)
        self.padding_lane = lanes  # an extra lane of length 0 pads a graph's batch

        def per_lane(*shape: int, dtype: torch.dtype) -> Tensor:
            return torch.zeros(lanes + 1, *shape, dtype=dtype, device=self.device)

        self.token_ids = per_lane(c.max_positions + 2 * (1 + draft), dtype=torch.int32)  # drafts may exceed the longest
        self.lengths = per_lane(dtype=torch.int64)  # token ids without drafts
        self.block_tables = per_lane(-(-c.max_positions // page_size), dtype=torch.int32)
        self.seeds = per_lane(dtype=torch.int64)
        self.adapter_numbers = per_lane(dtype=torch.int32) - 1  # -1: none
        self.sampling = SamplingTensors.of([Sampling()] * (lanes + 1), c.vocab_size, self.device)
        self.edits: Edits | None = None  # until a request needs them
        self.masks: Masks | None = None
        self.no_chunks = torch.zeros(1, dtype=torch.int32, device=self.device)  # cu_seqlens of no sequence
        # qk_norm_attention_decode finds the cells of decode rows itself, and writes nothing for a lane of length 0.
        self.needs_slots = not c.use_qk_norm or model.layers[0].attention.pinned
        on_gpu = self.device.type == "cuda"
        graphs = on_gpu and c.use_qk_norm
        self.graphs = CudaGraphs(self.compute, self.padding_lane, lanes, self.device) if graphs else None
        # A pass is launched before the last one's tokens are read, so that two passes use buffers, in turn.
        columns = 2 + 2 * draft + (1 + draft) * (1 + 2 * min(MOST, c.vocab_size))
        self.buffers = [HostBuffer(lanes, columns) if on_gpu else None for _ in range(2)]

    def fill_lane(self, request: Request) -> None:
        """Copy an admitted request's tokens and sampling parameters to its lane."""
        lane, tokens = request.lane, np.array(request.tokens, np.int32)
        self.token_ids[lane, : len(tokens)] = self.to_device(tokens)
        self.lengths[lane] = len(tokens)
        self.seeds[lane] = request.seed
        if self.adapters is not None:
            self.adapter_numbers[lane] = number_of(request)
        parameters = SamplingTensors.of([request.sampling], self.model.config.vocab_size)
        for of_lanes, of_request in zip(self.sampling, parameters, strict=True):
            of_lanes[lane] = of_request.item()
        if request.edits and self.edits is None:
            self.edits = Edits(len(self.lengths), self.device)
        if self.edits is not None:
            self.edits.fill(request)
        if request.guide is not None:
            if self.masks is None:
                self.masks = Masks(len(self.lengths), 1 + self.draft, self.model.config.vocab_size, self.device)
            # No draft tokens that the host does not know: its masks are for those of the request's last pass.
            self.token_ids[lane, len(tokens) : len(tokens) + self.draft] = -1
        if self.masks is not None:
            self.masks.fill(request)

    @torch.inference_mode()
    def __call__(self, decoding: Sequence[Request], chunks: Sequence[Chunk]) -> PendingTokens | None:
        """Launch a pass; None if nothing is decoded. Does not synchronise with the device."""
        self.update_block_tables([*decoding, *(chunk.request for chunk in chunks)])
        lanes, guided, prompts = [r.lane for r in decoding], [r for r in decoding if r.guide is not None], []
        mode = SamplingMode.of(
            (r.sampling for r in decoding), scored=any(r.num_logprobs is not None for r in decoding),
            edited=any(r.edits for r in decoding), guided=bool(guided),
            adapted=any(r.adapter for r in [*decoding, *(chunk.request for chunk in chunks)]),
        )  # fmt: skip
        if self.graphs is not None and not chunks:
            if guided:
                self.masks.write(guided)
            output = self.graphs(lanes, mode)
        else:
            width = max((len(r.pages) for r in decoding), default=0)
            inputs = self.to_device(np.array(lanes, np.int64))
            output = self.compute(inputs, mode, width, chunks, prompts, guided)
        if not decoding and not prompts:
            return None
        self.buffers.append(self.buffers.pop(0))
        return PendingTokens(decoding, output, self.draft, self.buffers[-1], prompts)

    def update_block_tables(self, requests: Sequence[Request]) -> None:
        """Copy the numbers of newly allocated pages."""
        new = [(r.lane, i, r.pages[i]) for r in requests for i in range(r.pages_on_device, len(r.pages))]
        if new:
            lane, i, page = self.to_device(np.array(new).T.copy())
            self.block_tables[lane, i] = page.int()
        for r in requests:
            r.pages_on_device = len(r.pages)

    def compute(
        self,
        lanes: Tensor,
        mode: SamplingMode,
        width: int | None = None,
        chunks: Sequence[Chunk] = (),
        prompts: list[PromptRows] | None = None,
        guided: Sequence[Request] = (),
    ) -> Tensor:
        """lanes [B] int64 -> [B, 2 + draft] int64: the token after each row, and the number of accepted draft tokens.

        With mode.scored a row's score (logprobs.score) is behind them, for each row; with mode.guided the next draft
        tokens are behind all. width: columns of the block tables that these lanes use; None: all. prompts: a list for
        the scores of chunks whose requests want them. guided: requests whose masks are not in their lanes yet.
        """
        n, B, m = 1 + self.draft, len(lanes), self.model
        if mode.adapted:
            m = self.adapters.model
            self.adapters.rows.set(self.adapters_of_rows(lanes, n, chunks))
        width = self.block_tables.shape[1] if width is None else width
        x, positions, lengths, block_table = self.decode_rows(lanes, width)
        positions = positions.view(B, n)
        layout = self.decode_layout(positions, lengths, block_table, alone=not chunks)
        if chunks:
            layout, inputs = self.with_chunks(layout, chunks)
            x = torch.cat([x, self.embedded(self.token_ids.view(-1)[inputs])])
        recorded = layout if self.routing is None else self.recorded(layout, bool(chunks))
        h, _ = m.backbone(None, recorded, self.caches, norm=self.mtp_cache is not None, x=x)
        if guided:
            self.masks.write(guided)
        output = self.next_tokens(h[: B * n], lanes, positions, mode) if B else positions.new_empty(0, n + 1)
        if prompts is not None and any(c.request.needs_prompt_rows for c in chunks):
            prompts += self.prompt_rows(h[B * n :], self.token_ids.view(-1)[inputs + 1].long(), chunks)
        if self.mtp_cache is not None:
            (mtp,), tokens = m.mtp[:1], output[:, :n].flatten()
            if chunks:
                tokens = torch.cat([tokens, self.token_ids.view(-1)[inputs + 1]])
            x, _ = mtp(self.embedded(tokens), h, layout, cache=self.mtp_cache)
            if B:
                last_accepted = torch.arange(B, device=self.device) * n + output[:, n]
                if mode.adapted:
                    self.adapters.rows.set(self.adapter_numbers[lanes])
                self.mtp_drafts(mtp, lanes, x[last_accepted], block_table)
        if mode.guided:
            columns = self.lengths[lanes, None] + torch.arange(self.draft, device=self.device)
            output = torch.cat([output, self.token_ids[lanes[:, None], columns].long()], 1)
        return output

    def adapters_of_rows(self, lanes: Tensor, n: int, chunks: Sequence[Chunk]) -> Tensor:
        """[T] int32: the numbers of the adapters of n rows of each lane, then of the chunks' rows; -1: none."""
        numbers = self.adapter_numbers[lanes].repeat_interleave(n)
        if not chunks:
            return numbers
        of_chunks = np.repeat(np.array([number_of(c.request) for c in chunks], np.int32), [c.rows for c in chunks])
        return torch.cat([numbers, self.to_device(of_chunks)])

    def decode_rows(self, lanes: Tensor, width: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """What `decode_inputs` gives for the lanes."""
        state = self.token_ids, self.lengths, self.block_tables, self.model.word_embeddings.weight
        return decode_inputs(lanes, *state, 1 + self.draft, width)

    def next_tokens(self, h: Tensor, lanes: Tensor, positions: Tensor, mode: SamplingMode) -> Tensor:
        """Write the token after each row into its lane; positions [B, n] -> as `compute`.

        h [B n, H], normed where the MTP layer reads it too. -1 marks NaN logits; Engine.accept turns it into an error.
        """
        logits, rows = self.model.logits(h, norm=self.mtp_cache is None), positions.flatten()
        edited = self.edits(logits, lanes, rows, self.token_ids) if mode.edited else logits
        edited = self.masks(edited, lanes) if mode.guided else edited
        tokens = sample(edited, self.sampling, mode[:3], lanes, rows, self.token_ids, self.seeds).view(positions.shape)
        lookup = self.draft > 0 and self.mtp_cache is None
        output = accept_tokens(tokens, lanes, positions, self.token_ids, self.lengths, lookup)
        if not mode.scored:
            return output
        return torch.cat([output, score(logits, tokens.flatten()).view(len(lanes), -1)], 1)

    def prompt_rows(self, h: Tensor, next_tokens: Tensor, chunks: Sequence[Chunk]) -> Iterator[PromptRows]:
        """h [T, H] of the chunks' rows, normed where the MTP layer reads it too; next_tokens [T]."""
        first = 0
        for request, start, rows in chunks:
            wanted = min(rows, len(request.prompt) - 1 - start)  # a preempted request prefills its new tokens too
            unwanted = max(0, request.prompt_logprobs_start - 1 - start)
            for i in range(unwanted, wanted if request.needs_prompt_rows else 0, SCORED_ROWS):
                part = slice(first + i, first + min(i + SCORED_ROWS, wanted))
                logits = self.model.logits(h[part], norm=self.mtp_cache is None)
                yield PromptRows(request, start + i, score(logits, next_tokens[part]))
            first += rows

    def embedded(self, tokens: Tensor) -> Tensor:
        """tokens [T], of which a negative one counts as 0 -> [T, H]."""
        return self.model.word_embeddings(tokens.clamp(min=0))

    def decode_layout(
        self, positions: Tensor, lengths: Tensor, block_table: Tensor, alone: bool = True
    ) -> BatchLayout:  # fmt: skip
        """The attention layout of rows at positions [B, n], with which the lanes have lengths [B]; alone: the pass has
        no other rows."""
        m, slots = self.model, None
        if self.needs_slots:
            slots = self.decode_slots(block_table, positions).view_as(positions)
            slots = slots.masked_fill(lengths[:, None] == 0, -1).flatten()  # a graph's padding lanes write nothing
        layout = BatchLayout(
            m.cos, m.sin, positions.flatten(), self.no_chunks, slots, positions.numel(), block_table, lengths
        )  # fmt: skip
        return layout.with_cells(self.caches[0]) if alone and slots is None else layout

    def recorded(self, layout: BatchLayout, with_chunks: bool) -> BatchLayout:
        """The layout with the cells where the rows' experts are written."""
        cells = layout.slots
        if not with_chunks:  # a graph's padding lanes have length 0 and no cells
            positions = layout.positions.view(len(layout.lengths), -1)
            cells = self.decode_slots(layout.block_table, positions).view_as(positions)
            cells = cells.masked_fill(layout.lengths[:, None] == 0, self.routing.shape[1] - 1).flatten()
        return layout._replace(record=self.routing, record_cells=cells)

    def routing_of(self, request: Request) -> Tensor | None:
        """[n, M, topk]: the experts of the request's tokens that are in the cache; None without a record."""
        if self.routing is None:
            return None
        cells = self.to_device(self.slots(request, np.arange(min(request.computed, len(request.tokens)))))
        return self.routing[:, cells].transpose(0, 1).contiguous()

    def decode_slots(self, block_table: Tensor, positions: Tensor) -> Tensor:
        """Cache slots [B n] of decode rows."""
        page, offset = block_table.gather(1, positions // self.page_size), positions % self.page_size
        return (page * self.page_size + offset).flatten()

    def with_chunks(self, layout: BatchLayout, chunks: Sequence[Chunk]) -> tuple[BatchLayout, Tensor]:
        """The layout with the rows of chunks appended, and the indices of these rows' tokens in token_ids."""
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
        return layout, self.to_device(np.concatenate(chunk_inputs))

    def slots(self, request: Request, positions: np.ndarray) -> np.ndarray:
        """Cache slots of a request's positions."""
        return np.array(request.pages)[positions // self.page_size] * self.page_size + positions % self.page_size

    def mtp_drafts(self, mtp: torch.nn.Module, lanes: Tensor, x: Tensor, block_table: Tensor) -> None:
        """Write the next draft tokens behind each sequence.

        The first comes from x [B, H], the MTP layer's output at the position before the last token, each further one
        from another pass of the MTP layer. Its input at a position contains the embedding of the next token, so its
        cache is one position behind the model's. Rows of rejected drafts are overwritten. The row at the end of a
        shared page may belong to another sequence: then a draft token is worse, but no output changes.
        """
        lengths = self.lengths[lanes]
        for i in range(self.draft):
            token = sample(self.model.logits(x))
            self.token_ids[lanes, lengths + i] = token.int()
            if i + 1 < self.draft:
                positions = (lengths - 1 + i).clamp(min=0)
                attended = torch.where(lengths > 0, positions + 1, 0).int()
                layout = self.decode_layout(positions[:, None], attended, block_table)
                x, _ = mtp(self.embedded(token), x, layout, cache=self.mtp_cache)

    def to_device(self, x: np.ndarray) -> Tensor:
        return torch.from_numpy(x).to(self.device, non_blocking=True)


def number_of(request: Request) -> int:
    return -1 if request.adapter is None else request.adapter.number
