"""Edits of a request's logits before its next token is sampled, in this order:

bias b_t of a token, while it holds: l_t -> l_t + b_t; -inf for the end tokens until there are enough new tokens
penalties of the c_t times that a token occurs among the new tokens: l_t -> l_t - frequency c_t - presence [c_t > 0]
a grammar's mask (grammar.py): l_t -> -inf for tokens that may not come

A repetition penalty (ops/sample.py) comes after them. Every row of a draft has the counts and the mask of the tokens
before it, so that drafts change no output. A pass none of whose requests wants an edit has none of it.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from .grammar import mask_bytes
from .request import MOST_BIASES, Request

FOREVER = 1 << 62


class Edits:
    """What to edit, in tensors of every lane, as ops/sample.py has its parameters; a lane of zeros edits nothing.

    They are made when a request first needs them: before, `edited` passes do not exist.
    """

    def __init__(self, lanes: int, device: torch.device):
        self.device, self.edited = device, set()  # lanes that are not all zeros

        def per_lane(*shape: int, dtype: torch.dtype) -> Tensor:
            return torch.zeros(lanes, *shape, dtype=dtype, device=device)

        # An entry adds `bias` to the logit of `token` in rows at positions below `until`.
        self.token = per_lane(MOST_BIASES, dtype=torch.int64)
        self.bias = per_lane(MOST_BIASES, dtype=torch.float32)
        self.until = per_lane(MOST_BIASES, dtype=torch.int64)
        self.prompt = per_lane(dtype=torch.int64)  # tokens of it
        self.penalties = per_lane(2, dtype=torch.float32)  # presence, frequency

    def fill(self, request: Request) -> None:
        """Write a request's edits into its lane."""
        lane = request.lane
        if not request.edits and lane not in self.edited:
            return
        (self.edited.add if request.edits else self.edited.discard)(lane)
        entries = request.biases()
        entries += [(0, 0.0, 0)] * (MOST_BIASES - len(entries))
        token, bias, until = zip(*entries, strict=True)
        sampling = request.sampling
        penalties = [sampling.presence_penalty, sampling.frequency_penalty]
        for of_lanes, of_request in (
            (self.token, token), (self.bias, bias), (self.until, [min(u, FOREVER) for u in until]),
            (self.prompt, len(request.prompt)), (self.penalties, penalties),
        ):  # fmt: skip
            of_lanes[lane] = torch.tensor(of_request, dtype=of_lanes.dtype).to(self.device, non_blocking=True)

    def __call__(self, logits: Tensor, lanes: Tensor, positions: Tensor, token_ids: Tensor) -> Tensor:
        """logits [R, V], lanes [B] of R / B rows each, positions [R], token_ids [L, P] -> edited logits, fp32."""
        rows = lanes.repeat_interleave(len(logits) // len(lanes))
        holds = positions[:, None] < self.until[rows]
        logits = logits.float().scatter_add(1, self.token[rows], torch.where(holds, self.bias[rows], 0))
        index = torch.arange(token_ids.shape[1], device=logits.device)
        new = (index >= self.prompt[rows, None]) & (index <= positions[:, None])
        ids = token_ids[rows].long().clamp(min=0)
        counts = torch.zeros_like(logits).scatter_add(1, torch.where(new, ids, 0), new.float())
        presence, frequency = self.penalties[rows].unsqueeze(-1).unbind(1)
        return logits - frequency * counts - presence * (counts > 0)


class Masks:
    """The tokens that the grammars of requests allow, for every lane and row; a lane without a grammar allows all."""

    def __init__(self, lanes: int, rows: int, vocabulary: int, device: torch.device):
        self.guided: set[int] = set()  # lanes with a grammar
        self.allowed = torch.full((lanes, rows, mask_bytes(vocabulary)), 255, dtype=torch.uint8, device=device)

    def fill(self, request: Request) -> None:
        """Open a lane for a request with or without a grammar."""
        lane = request.lane
        if request.guide is not None:
            self.guided.add(lane)
        elif lane in self.guided:
            self.guided.remove(lane)
            self.allowed[lane] = 255

    def write(self, requests: Sequence[Request]) -> None:
        """Wait for the masks of requests with grammars, and copy them to their lanes."""
        for request in requests:
            self.allowed[request.lane].copy_(request.guide.wait(), non_blocking=True)

    def __call__(self, logits: Tensor, lanes: Tensor) -> Tensor:
        """logits [R, V], lanes [B] of R / B rows each -> logits with -inf for tokens that are not allowed."""
        R, V = logits.shape
        shifts = torch.arange(8, dtype=torch.uint8, device=logits.device)
        bits = self.allowed[lanes].view(R, -1, 1) >> shifts & 1
        return logits.masked_fill(bits.view(R, -1)[:, :V] == 0, -float("inf"))
