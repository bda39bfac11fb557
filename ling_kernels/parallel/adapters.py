"""Adapters (nn/lora.py) of a model of one or several processes: their keys in peft's format, files, merged weights."""

import json
import shutil
import zlib
from collections.abc import Callable, Collection
from pathlib import Path

import torch
from torch import Tensor

from ..errors import InputError
from ..files import read_json
from ..model import LingConfig
from ..model.weight_files import WeightReader, save_tensors
from ..nn.lora import ON, adapted, adapters, drawn, lora_
from .boxes import Box, Range
from .checkpoints import ADAPTER
from .official import Official, Parameter, official_keys, whole_on_meta
from .parts import Piece, held, pieces, read_pieces_
from .shares import Shares

PREFIX = "base_model.model."  # of peft's keys, before the key of the module
BASE = "base.json"  # beside an adapter: the fingerprints of the files of the model that it is for
SAMPLED = 1 << 20  # bytes at the beginning and at the end of a file of weights that tell it from others


def adapted_weights(config: LingConfig, on: Collection[str] = ON) -> dict[str, Parameter]:
    """The weights of a whole model that can have adapters, by the adapters' names."""
    whole, official = whole_on_meta(config), official_keys(config)
    names = {id(p): name for name, p in whole.named_parameters()}
    return {name: official[names[id(weight)]] for name, (_, weight) in adapted(whole, on).items()}


def adapter_keys(config: LingConfig, rank: int, on: Collection[str]) -> dict[str, Parameter]:
    """The adapters' parameters of a whole model, by name. As peft's adapters are of the published modules, the A of
    gate and up, which is one here, has two keys."""
    found = {}
    for name, weight in adapted_weights(config, on).items():
        *E, N, K = weight.shape
        boxes = dict(a=lambda box, K=K: ((0, rank), (0, K)), b=lambda box: (box[-2], (0, rank)))
        for which, box_of in boxes.items():
            parts = [
                Official(key_of(k.key.removesuffix(".weight"), which.upper()), (*k.box[:-2], *box_of(k.box)), 2)
                for k in weight.keys
            ]
            found[f"{name}.{which}"] = Parameter(torch.Size([*E, *((rank, K) if which == "a" else (N, rank))]), parts)
    return found


def key_of(module: str, which: str) -> str:
    """peft's key of the A or the B of a published module."""
    return f"{PREFIX}{module}.lora_{which}.weight"


def adapt_(shares: Shares, rank: int, alpha: float, on: Collection[str], seed: int) -> str:
    """Give this process's part of the model its part of the adapters; returns a line about them. Make the optimizer
    afterwards. Raises InputError as `lora_`."""
    keys, model = adapter_keys(shares.config, rank, on), shares.model
    with shares.ranks.agreed():  # a stage of a pipeline may have no such layer
        lora_(model, rank, alpha, on, seed)
    names = {id(p): name for name, p in model.named_parameters()}
    shares.add_adapters_(keys, {name: names.get(id(weight), "") for name, (_, weight) in adapted(model, on).items()})
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name in keys and name.endswith(".a"):
                p.copy_(shares.part_of(name).take(drawn(name, keys[name].shape, seed)))
    trained, total = sum(p.shape.numel() for p in keys.values()), shares.config.num_parameters(mtp=True)
    return (f"lora       {trained:,} parameters to train beside {total:,} ({trained / total:.2%}): rank {rank}, alpha"
            f" {alpha:g}, on {', '.join(on)}")  # fmt: skip


def read_adapters_(shares: Shares, folder: Path) -> None:
    """Read this process's part of the adapters of a checkpoint. Raises InputError for others."""
    wanted = pieces(shares, ((name, t) for name, t in held(shares.model) if name in shares.adapters))
    with WeightReader(folder, ADAPTER) as reader:
        read_pieces_(reader, [*wanted])


def merging(shares: Shares) -> Callable[[str, Tensor, Box], Tensor]:
    """A function of an official key, its weight or what this process has of it, and the box that this is, that adds the
    adapter's product to it in fp32; a weight without adapter stays as it is."""
    factors: dict[str, dict[str, list[Piece]]] = {}
    for piece in pieces(shares, ((name, t) for name, t in held(shares.model) if name in shares.adapters)):
        module, _, which = piece.official.key.removeprefix(PREFIX).rpartition(".lora_")
        factors.setdefault(f"{module}.weight", {}).setdefault(which[0], []).append(piece)
    scale = next((adapter.scale for adapter in adapters(shares.model).values()), 0.0)

    def merged(key: str, weight: Tensor, box: Box) -> Tensor:
        if key not in factors:
            return weight
        a, b = (cut(factors[key][which], dim, box[dim]) for which, dim in (("A", 1), ("B", 0)))
        return weight.float() + (scale * (b @ a)).to(weight.device)

    return merged


def cut(found: list[Piece], dim: int, wanted: Range) -> Tensor:
    """The rows or columns of a factor that belong to a part of its weight: in one of the pieces here."""
    start, stop = wanted
    piece = next(piece for piece in found if piece.box[dim][0] <= start and stop <= piece.box[dim][1])
    return piece.tensor.narrow(dim, start - piece.box[dim][0], stop - start)


def write_adapter(
    checkpoint: Path, out: Path, base: str, rank: int, alpha: float, base_files: dict[str, list[int]]
) -> None:
    """Write the adapters of a checkpoint as peft reads them, fp32, in place of a folder `out` that is there. base: the
    model that they are for; base_files: their fingerprints. Raises InputError where it cannot be written."""
    partial = out.with_name(f".{out.name}.partial")
    with WeightReader(checkpoint, ADAPTER) as reader:
        tensors = {key: reader.wide(key) for key in sorted(reader.files, key=lambda key: str(reader.files[key]))}
    modules = {key.removeprefix(PREFIX).rpartition(".lora_")[0].rpartition(".")[2] for key in tensors}
    about = dict(
        peft_type="LORA", task_type="CAUSAL_LM", base_model_name_or_path=base, r=rank, lora_alpha=alpha,
        target_modules=sorted(modules), lora_dropout=0.0, bias="none", fan_in_fan_out=False, inference_mode=True,
    )  # fmt: skip
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        save_tensors(tensors, partial / f"{ADAPTER}.safetensors")
        (partial / "adapter_config.json").write_text(json.dumps(about, indent=2) + "\n")
        (partial / BASE).write_text(json.dumps(base_files) + "\n")
        shutil.rmtree(out, ignore_errors=True)
        partial.rename(out)
    except OSError as error:
        raise InputError(f"cannot write {out}: {error.strerror or error}") from None


def check_base(adapter: Path, model: Path) -> None:
    """Raise InputError for the weights in the folder `model` that are not those that the adapter was trained over, as
    far as its folder says which these are."""
    if (adapter / BASE).is_file() and read_json(adapter / BASE) != fingerprints(model):
        raise InputError(f"the adapter {adapter} is for other weights than those in {model}: see its {BASE}")


def fingerprints(model: Path) -> dict[str, list[int]]:
    """What tells the weights in a folder from others: by file, its size and the checksum of a sample of it."""
    return {path.name: fingerprint(path) for path in sorted(model.glob("*.safetensors"))}


def fingerprint(path: Path) -> list[int]:
    try:
        size = path.stat().st_size
        with open(path, "rb") as file:
            total = zlib.crc32(file.read(SAMPLED))
            file.seek(max(size - SAMPLED, 0))
            return [size, zlib.crc32(file.read(SAMPLED), total)]
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from None
