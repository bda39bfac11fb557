"""Checkpoints that every process writes its own part of: no process ever holds more.

The files are those of a published model, `model-00002-of-00008.safetensors` and an index, and as many of the
optimizer's, `optimizer-...`. A process writes the parameters whose optimizer state it keeps, and the moments of these.
An official key is whole in one file: where several processes hold parts of it (rows of an embedding), one of them
collects these. A moment of which a process has a part is saved under a name that says which, NAME.KEY[0:64] for rows,
NAME.KEY[:,0:64] for columns, so that it loads wherever a process holds other rows.
"""

import math
import re
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from ..errors import InputError
from ..model.weight_files import (
    SHARD_BYTES,
    WeightReader,
    file_names,
    save_tensors,
    shards_of,
    stored_dtype,
    write_index,
)
from ..ops.adamw_8bit import BLOCK
from .boxes import Box, Part, overlap, replaced, shape_of, size, whole_box, within
from .parts import Piece, held, pieces
from .ranks import Ranks
from .shares import Shares

MODEL, OPTIMIZER, MERGE = "model", "optimizer", "merge"  # stems of files
ADAPTER = "adapter_model"  # peft's


@dataclass
class OwnPart:
    """What a process writes of a checkpoint."""

    weights: dict[str, Tensor] = field(default_factory=dict)  # by official key
    pieces: list[Piece] = field(default_factory=list)  # of keys of which other processes hold the rest
    optimizer: dict[str, Tensor] = field(default_factory=dict)
    keys: list[str] = field(default_factory=list)  # of all weights that all processes write, sorted
    stem: str = MODEL  # of the weights' files

    def tensors(self) -> Iterator[Tensor]:
        yield from self.weights.values()
        yield from (piece.tensor for piece in self.pieces)
        yield from self.optimizer.values()

    def bytes(self) -> int:
        return sum(t.numel() * t.itemsize for t in self.tensors())

    def on_host(
        self, dtype: torch.dtype | None = None, change: Callable[[str, Tensor, Box], Tensor] | None = None
    ) -> "OwnPart":
        """Copies on the host, which later steps do not change. dtype: of the weights; None: their own. change: of a
        key, its tensor or a part of it, and the box that this is, makes the one to write."""

        def copy(key: str, t: Tensor, box: Box) -> Tensor:
            t = change(key, t, box) if change else t
            kind = None if dtype is None else stored_dtype(key, t.dtype, dtype)
            return t.to("cpu", kind, copy=True).contiguous()

        return OwnPart(
            {key: copy(key, t, whole_box(t.shape)) for key, t in self.weights.items()},
            [piece._replace(tensor=copy(piece.official.key, piece.tensor, piece.box)) for piece in self.pieces],
            {key: t.to("cpu", copy=True).contiguous() for key, t in self.optimizer.items()},
            self.keys,
            self.stem,
        )


def own_part(shares: Shares, moments: dict[str, Tensor], base: bool = False) -> OwnPart:
    """The tensors themselves that this process writes: of a model with adapters these alone, as no others change; base:
    the weights beside them. moments: the optimizer's state, named NAME.KEY."""
    of_adapters, owned = bool(shares.adapters) and not base, shares.owned()
    found = own_pieces(shares, of_adapters)
    if of_adapters:  # a file does not take one tensor under the keys of gate and up
        found = [piece._replace(tensor=piece.tensor.clone()) for piece in found]
    part = part_of_pieces(shares, found, ADAPTER if of_adapters else MODEL)
    for key, t in moments.items():
        name = key.rpartition(".")[0]
        if name in owned:
            part.optimizer |= named_parts(key, t.detach(), shares.state_part_of(name), shares.official[name].shape)
    return part


def own_pieces(shares: Shares, of_adapters: bool = False) -> list[Piece]:
    """The tensors themselves of the official keys, or of adapters, that this process writes, or its parts of them."""
    owned = shares.owned()
    mine = {name: t for name, t in held(shares.model) if name in owned}
    names = [name for name in shares.official if name in mine and (name in shares.adapters) == of_adapters]
    return [*pieces(shares, ((name, mine[name]) for name in names))]


def part_of_pieces(shares: Shares, found: Iterable[Piece], stem: str) -> OwnPart:
    """What this process writes of weights, or of other tensors of the same keys and shapes, in files of this stem."""
    of_adapters, found = stem == ADAPTER, [*found]
    named = ((name, p) for name, p in shares.official.items() if (name in shares.adapters) == of_adapters)
    return OwnPart(
        {piece.official.key: piece.tensor for piece in found if piece.is_whole},
        [piece for piece in found if not piece.is_whole],
        keys=sorted(official.key for _, p in named for official in p.keys), stem=stem,
    )  # fmt: skip


def named_parts(key: str, t: Tensor, part: Part, shape: torch.Size) -> dict[str, Tensor]:
    """The optimizer's tensor of a part of a parameter, by names that say which rows or columns of the whole one it is.

    t: a scalar, equal for all parts; with the parameter's shape; or a vector with a number for every, or every 256,
    elements. shape: of the whole parameter.
    """
    if not part.ranges:
        return {key: t}
    if not t.ndim:
        return {key: t} if part.ranges[0][0] == 0 else {}
    local = [stop - start for start, stop in part.boxes(shape)[-1][1]]
    local[part.dim] = sum(stop - start for start, stop in part.ranges)
    if list(t.shape) != local:
        part = flattened(key, part, shape, math.prod(local), len(t))
    found, start = {}, 0
    for a, b in part.ranges:
        found[f"{key}[{':,' * part.dim}{a}:{b}]"] = t.narrow(part.dim, start, b - a)
        start += b - a
    return found


def flattened(key: str, part: Part, shape: torch.Size, elements: int, numbers: int) -> Part:
    """The part of a vector that has so many numbers for so many elements. Raises InputError where a number is of
    elements of several parts."""
    unit = 1 if elements == numbers else BLOCK
    flat = part.flattened(shape, unit) if elements == numbers * unit else None
    if flat is None:
        raise InputError(f"the optimizer's {key} cannot be divided: a scale is of several processes' weights")
    return flat


def parsed(name: str) -> tuple[str, int | None, tuple[int, int]]:
    """NAME.KEY and, of a part, its dimension and range there."""
    match = re.fullmatch(r"(.+?)(?:\[((?::,)*)(\d+):(\d+)\])?", name)
    assert match
    key, columns, start, stop = match.groups()
    return (key, None, (0, 0)) if start is None else (key, len(columns) // 2, (int(start), int(stop)))


class Saved(NamedTuple):
    """A part of one of the optimizer's tensors in a file."""

    name: str
    box: Box  # of the whole tensor


def read_optimizer(folder: Path, shares: Shares) -> Iterator[tuple[str, str, Tensor]]:
    """(parameter, key, tensor) of the optimizer's state that this process keeps; no more is read."""
    owned = {name for name, _ in shares.model.named_parameters() if shares.steps(name)}
    with WeightReader(folder, OPTIMIZER) as reader:
        found = saved_moments(reader, owned)
        if owned and reader.files and not found:
            raise InputError(f"{folder}: the optimizer's state is of other parameters than the model's")
        for key, saved in found.items():
            name, _, kind = key.rpartition(".")
            yield name, kind, moment(reader, key, saved, shares)


def saved_moments(reader: WeightReader, parameters: Collection[str]) -> dict[str, list[Saved]]:
    """The parts in the files of each of the optimizer's tensors NAME.KEY of these parameters."""
    found: dict[str, list[Saved]] = {}
    for name in sorted(reader.files, key=lambda name: str(reader.files[name])):
        key, dim, bounds = parsed(name)
        if key.rpartition(".")[0] in parameters:
            shape = reader.shape(name)
            box = whole_box(shape) if dim is None else replaced(shape, dim, bounds)
            found.setdefault(key, []).append(Saved(name, box))
    return found


def moment(reader: WeightReader, key: str, saved: list[Saved], shares: Shares) -> Tensor:
    """This process's part of the optimizer's tensor NAME.KEY."""
    name = key.rpartition(".")[0]
    part, shape = shares.state_part_of(name), shares.official[name].shape
    whole = shape_of(s.box for s in saved)
    if not is_state_of(shape, key, whole):
        raise InputError(f"{reader.folder}: the optimizer's {key} is {list(whole)}, the parameter {list(shape)}")
    if part.ranges and whole and whole != shape:
        part = flattened(key, part, shape, shape.numel(), whole[0] if len(whole) == 1 else 0)
    boxes = part.boxes(whole) if whole else [((), ())]
    t, filled = None, 0
    for file_key, box in saved:
        for mine, here in boxes:
            if (both := overlap(mine, box)) is not None:
                values = reader.part(file_key, within(both, box))
                t = values.new_empty(shape_of(here for _, here in boxes)) if t is None else t
                t[within(both, mine, here)] = values
                filled += size(both)
    if t is None or filled != t.numel():
        raise InputError(f"{reader.folder}: the checkpoint has {filled} of the numbers of the optimizer's {key}")
    return t


def is_state_of(shape: torch.Size, key: str, whole: tuple[int, ...]) -> bool:
    """Whether the optimizer's tensor NAME.KEY of a parameter can have the shape `whole`: kernels trust it."""
    if key.endswith(".step"):
        return whole == ()
    return whole == tuple(shape) or whole in {(shape.numel(),), (-(-shape.numel() // BLOCK),)}


def collect_(part: OwnPart, ranks: Ranks) -> None:
    """Bring the pieces of each key together in `weights` of one process that holds one, in turn, in place. Every
    process calls it, with tensors on the host."""
    offered = ranks.exchange([(p.official.key, p.box, p.official.shape) for p in part.pieces])
    if not any(offered):
        return
    found: dict[str, list[tuple[int, Box, tuple[int, ...]]]] = {}
    for rank, theirs in enumerate(offered):
        for key, box, shape in theirs:
            found.setdefault(key, []).append((rank, box, shape))
    mine = {(piece.official.key, piece.box): piece.tensor.cpu().contiguous() for piece in part.pieces}
    for number, (key, boxes) in enumerate(sorted(found.items())):
        holders = sorted({rank for rank, _, _ in boxes})
        writer, shape = holders[number % len(holders)], boxes[0][2]
        if sum(size(box) for _, box, _ in boxes) != math.prod(shape):
            raise InputError(f"the processes do not hold all of {key}")
        if writer == ranks.rank:
            dtype = next(t.dtype for (of, _), t in mine.items() if of == key)
            part.weights[key] = whole = torch.empty(shape, dtype=dtype)
        for rank, box, _ in boxes:
            if rank == ranks.rank != writer:
                dist.send(mine[key, box], writer, group=ranks.talk)
            elif writer == ranks.rank:
                if rank != writer:
                    mine[key, box] = torch.empty([stop - start for start, stop in box], dtype=dtype)
                    dist.recv(mine[key, box], rank, group=ranks.talk)
                whole[within(box, whole_box(shape))] = mine.pop((key, box))
    part.pieces = []


def write_files(folder: Path, part: OwnPart, ranks: Ranks, optimizer: bool = True) -> list[str]:
    """Write this process's files into a folder that is there, rank 0 also the indices; returns their names. Every
    process calls it. Raises InputError on all of them where one cannot write."""
    tensors = {part.stem: part.weights, OPTIMIZER: part.optimizer}
    shards = {part.stem: shards_of(sizes(part.weights), SHARD_BYTES)}
    if optimizer:
        shards[OPTIMIZER] = shards_of(sizes(part.optimizer), SHARD_BYTES if ranks.size > 1 else None)
        if ranks.first and not shards[OPTIMIZER]:  # before the first step
            shards[OPTIMIZER].append([])
    numbers = ranks.exchange({stem: len(found) for stem, found in shards.items()})
    written: dict[str, dict[str, list[str]]] = {stem: {} for stem in shards}  # keys of each file
    with failing_together(ranks):
        for stem, found in shards.items():
            names = file_names(stem, sum(n[stem] for n in numbers))
            first = sum(n[stem] for n in numbers[: ranks.rank])
            for name, keys in zip(names[first:], found):  # noqa: B905 (the names after them are of other ranks)
                save_tensors({key: tensors[stem][key].cpu().contiguous() for key in keys}, folder / name)
                written[stem][name] = keys
    names = [name for files in written.values() for name in files]
    everyone = ranks.exchange(written)
    with failing_together(ranks):
        for stem in shards if ranks.first else ():
            whole = [(key, name) for theirs in everyone for name, keys in theirs[stem].items() for key in keys]
            times = Counter(key for key, _ in whole)
            if stem == part.stem and times != Counter(part.keys):
                wrong = min(key for key in {*times, *part.keys} if times[key] != 1)
                raise InputError(f"{times[wrong]} processes write {wrong}: it must be one")
            # vLLM and SGLang read every .safetensors file of a folder without an index, also the optimizer's.
            if sum(n[stem] for n in numbers) > 1 or (stem == MODEL and optimizer):
                names.append(write_index(folder, stem, dict(whole)))
    return names


def sizes(tensors: dict[str, Tensor]) -> dict[str, int]:
    return {key: t.numel() * t.itemsize for key, t in tensors.items()}


@contextmanager
def failing_together(ranks: Ranks) -> Iterator[None]:
    """An error of writing on one process becomes an InputError of all, with the reason."""
    with ranks.agreed():
        try:
            yield
        except (OSError, MemoryError) as error:
            raise InputError(getattr(error, "strerror", None) or str(error) or type(error).__name__) from None
