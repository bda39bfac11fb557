"""An engine whose model is divided over n processes, each with a GPU of its own, by parallel/decode.py.

    engine = DividedEngine(folder, 4, dict(device="cuda", dtype=torch.bfloat16), draft=2)

Rank 0 is this process: it has the queues, the pages and the sampling parameters, as any engine. Before a pass it tells
the others which lanes and chunks the pass has, and which pages are new. All then run the same pass over the same lanes,
each with its heads, and sample the same tokens from the same logits: so the others need no tokens from rank 0.

When a rank ends or fails, no pass can succeed any more: all requests get a LostRank, and the engine stays dead. Passes
run eagerly, without CUDA graphs.
"""

import copy
import tempfile
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..errors import InputError, LostRank, integer
from ..model import Ling, load_model
from ..model.checkpoint import resolve_model
from ..nn.batch_invariant import batch_invariant_
from ..ops.attention_decode import KVCache
from ..parallel.decode import RankShare, abort_group, form_group, join_, leave_group, part_config, refuse_group
from .adapters import Adapters
from .divided_pages import LeadCopies
from .engine import Engine
from .forward import Chunk, Forward, PendingTokens
from .grammar import Guide
from .pages.copies import Copies
from .pages.levels import PageLevels, Spill
from .request import Request
from .workers import Workers


class GivenMasks(Guide):
    """The masks of a request with a grammar, in the place of its Guide on other ranks."""

    def __init__(self, mask: Tensor | None):
        self.mask = mask  # type: ignore[assignment]

    def wait(self) -> Tensor:
        return self.mask


class Pass(NamedTuple):
    """What a pass computes, as ranks tell it each other."""

    lanes: list[int]  # that are decoded
    chunks: list[tuple[int, int, int, bool]]  # lane, start, rows, whether scores of the rows are wanted
    pages: list[tuple[int, list[int]]]  # lane, its new pages
    masks: list[tuple[int, np.ndarray]]  # lane, the masks of its rows; tensors would be sent as open files


class DividedForward(Forward):
    """A rank's part of every pass."""

    def __init__(self, *arguments):
        super().__init__(*arguments)
        self.graphs = None

    def decode_rows(self, lanes: Tensor, width: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        columns, *others = super().decode_rows(lanes, width)
        return self.model.word_embeddings.rows(columns), *others  # type: ignore[return-value]


class LeadForward(DividedForward):
    """Rank 0's part, which tells the others before."""

    def __init__(
        self, workers: Workers, model, caches: list[KVCache], page_size: int, lanes: int, draft: int,
        record_routing: bool, adapters: Adapters | None,
    ):  # fmt: skip
        super().__init__(model, caches, page_size, lanes, draft, record_routing, adapters)
        self.workers = workers
        folders = None if adapters is None else adapters.folders
        pages, dtype = caches[0].k.shape[0], caches[0].k.dtype
        workers.send("serve", (folders, len(caches), pages, page_size, dtype, (lanes, draft, record_routing)))
        workers.receive("serving")

    def fill_lane(self, request: Request) -> None:
        self.workers.send("fill", stand_in(request))
        super().fill_lane(request)

    def __call__(self, decoding: Sequence[Request], chunks: Sequence[Chunk]) -> PendingTokens | None:
        requests = [*decoding, *(c.request for c in chunks)]
        self.workers.send("pass", Pass(
            [r.lane for r in decoding],
            [(c.request.lane, c.start, c.rows, c.request.needs_prompt_rows) for c in chunks],
            [(r.lane, r.pages[r.pages_on_device :]) for r in {*requests} if r.pages_on_device < len(r.pages)],
            [(r.lane, r.guide.wait().numpy()) for r in decoding if r.guide is not None],
        ))  # fmt: skip
        try:
            return super().__call__(decoding, chunks)
        except Exception as error:
            raise self.workers.failed(error) from error
        except BaseException as error:  # Ctrl-C: the others have begun the pass, and wait in it for this rank
            self.workers.failed(error)
            raise


class FollowForward(DividedForward):
    """Another rank's part."""

    def __init__(self, *arguments):
        super().__init__(*arguments)
        self.requests: dict[int, Request] = {}  # of each lane

    def fill(self, request: Request) -> None:
        self.requests[request.lane] = request
        self.fill_lane(request)

    def run(self, given: Pass) -> None:
        for lane, pages in given.pages:
            self.requests[lane].pages += pages
        for lane, mask in given.masks:
            self.requests[lane].guide = GivenMasks(torch.from_numpy(mask))
        chunks = []
        for lane, start, rows, scored in given.chunks:
            self.requests[lane].num_prompt_logprobs = 0 if scored else None
            chunks.append(Chunk(self.requests[lane], start, rows))
        self([self.requests[lane] for lane in given.lanes], chunks)


def stand_in(request: Request) -> Request:
    """What other ranks need of a request."""
    copied = copy.copy(request)
    copied.pages, copied.page_hashes, copied.logprobs, copied.prompt_logprobs = [], [], [], []
    copied.pages_on_device, copied.guide = 0, None if request.guide is None else GivenMasks(None)
    return copied


class DividedEngine(Engine):
    """Rank 0 of `ranks` processes on this machine, of which it starts the others.

    folder: a checkpoint. load: keyword arguments of `load_model`, with device and dtype; on GPUs rank r takes the GPU r
    of those that torch sees. progress: `load_model`'s, of this rank's part. options: Engine's; cache_tokens counts
    tokens, each of whose heads are on one rank. Raises InputError where the ranks cannot share the model, and LostRank
    for a rank that ends meanwhile.
    """

    def __init__(
        self, folder: str | Path, ranks: int, load: dict[str, Any],
        progress: Callable[[int, int], None] | None = None, **options,
    ):  # fmt: skip
        config, directory = resolve_model(folder)
        if directory is None:
            raise InputError(f"{folder} is a preset, which has no weights; give a checkpoint directory")
        n = integer("ranks", ranks, 2)
        part_config(config, n)
        refuse_group()
        device = torch.device(load["device"])
        if device.type == "cuda":
            if n > torch.cuda.device_count():
                raise InputError(f"a model over {n} ranks: torch sees {torch.cuda.device_count()} GPUs")
            device = torch.device("cuda", 0)
        self.workers = Workers(n)
        try:
            with tempfile.TemporaryDirectory(prefix="ling-") as meeting:
                file, threads = Path(meeting, "store"), max(1, torch.get_num_threads() // n)
                pin = bool(options.get("batch_invariant"))
                self.workers.send("load", (n, file, threads, directory, load, pin))
                self.workers.receive("started")  # before this rank waits for them in the group
                model, self.share = load_part(n, 0, file, directory, load | dict(device=device, progress=progress), pin)
                self.workers.receive("loaded")
            super().__init__(model, **options)
        except BaseException:
            self.end()
            raise
        self.workers.on_loss = self.on_loss
        if self.workers.lost is not None:
            self.on_loss(self.workers.lost)

    def pin(self, model: Ling) -> None:
        """`load_part` has done so, before the parts were joined."""

    def make_adapters(self, folders: Mapping[str, str | Path]) -> Adapters:
        return Adapters(self.model, folders, self.share)

    def make_forward(self, *arguments) -> Forward:
        return LeadForward(self.workers, *arguments)

    def make_levels(self, spill: Spill, copies: Copies, identity: Callable[[], bytes]) -> PageLevels:
        of_all = LeadCopies(self.workers, copies)
        return super().make_levels(spill, of_all, partial(of_all.identity, identity))

    def on_loss(self, error: LostRank) -> None:
        self.record.fail(error)
        if self.device.type == "cuda":
            abort_group()

    def accept(self, request: Request, tokens: list[int], drafts: list[int]) -> bool:
        self.workers.check()  # on a GPU a pass that was broken off gives any tokens
        return super().accept(request, tokens, drafts)

    def new_weights(self, model=None) -> int:
        raise InputError("an engine over several processes cannot take new weights: make another one")

    def close(self) -> None:
        try:
            super().close()
        finally:
            self.end()

    def end(self) -> None:
        self.workers.close()
        leave_group()


def load_part(
    n: int, rank: int, file: Path, folder: Path, load: dict[str, Any], pin: bool
) -> tuple[Ling, RankShare]:  # fmt: skip
    """This rank's part of a checkpoint, pinned or not, in a group of the ranks, and which part it is."""
    if load["device"].type == "cuda":
        torch.cuda.set_device(load["device"])
    group = form_group(n, rank, file, load["device"])
    share = RankShare(n, rank)
    model = load_model(folder, **load, share=share)
    if pin:
        batch_invariant_(model)
    join_(model, group)
    return model, share
