"""Reading and writing the .safetensors files of a checkpoint folder, one tensor at a time."""

import json
import re
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import InputError
from ..files import atomic_write
from ..nn.fp8_inference import SCALES
from ..op import E4M3
from ..ops.quantize import BLOCK, dequantize

WIDE = (torch.bfloat16, torch.float16, torch.float32, torch.float64)  # types of weights without a scale
WIDE_NAMES = [str(dtype).removeprefix("torch.") for dtype in WIDE]
WEIGHT_FILES = r"model(-\d{5,}-of-\d{5,})?\.safetensors|model\.safetensors\.index\.json"  # names that we write
SHARD_BYTES = 10 << 30


class WeightReader:
    """The tensors of a checkpoint folder, with one file open at a time. Errors are InputErrors that name the file.

    files: the file of every key that the index, or the only file, names.
    """

    def __init__(self, folder: Path, stem: str = "model"):
        self.folder, self.single, self.index = folder, folder / f"{stem}.safetensors", folder / index_name(stem)
        self.path: Path | None = None
        self.file: Any = None
        self.files = self._files()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.path = self.file = None

    def _files(self) -> dict[str, Path]:
        index, single = self.index, self.single
        if not index.is_file():
            if single.is_file():
                return dict.fromkeys(self.keys(single), single)
            why = ""
            if any(self.folder.glob("adapter_model*.safetensors")):
                why = ": it holds adapters alone, and the folder model of their run has them merged"
            raise InputError(f"{self.folder} has neither {single.name} nor {index.name}{why}")
        try:
            return {k: self.folder / v for k, v in json.loads(index.read_text())["weight_map"].items()}
        except (OSError, ValueError, KeyError, AttributeError, TypeError, RecursionError) as error:
            raise InputError(f"{index} is damaged: {error!r}") from None

    def refuse_two_checkpoints(self) -> None:
        """Raise InputError for an index beside a single file that it does not name: one of them is out of date."""
        if self.single.is_file() and self.single not in self.files.values():
            names = f"{self.single.name} and {self.index.name}"
            raise InputError(f"{self.folder} has {names} of other files: remove the one that is out of date")

    def open(self, path: Path):
        from safetensors import SafetensorError, safe_open

        if path != self.path:
            self.path = self.file = None
            try:
                self.file = safe_open(path, "pt")
            except (OSError, RuntimeError, SafetensorError) as error:  # RuntimeError: torch cannot map the file
                raise InputError(f"cannot read {path}: {error}") from None
            self.path = path
        return self.file

    def keys(self, path: Path) -> list[str]:
        return list(self.open(path).keys())

    def shape(self, key: str) -> list[int]:
        return self._get(key, lambda file: file.get_slice(key).get_shape())

    def read(self, key: str) -> tuple[Tensor, Tensor | None]:
        """A tensor, and for a weight in block-FP8 its scales [ceil(N/128), ceil(K/128)] fp32."""
        tensor = self._get(key, lambda file: file.get_tensor(key))
        self._expect_type(key, tensor)
        return tensor, self._scale(key, tensor.shape) if tensor.dtype == E4M3 else None

    def read_ranges(self, key: str, dim: int, ranges: Sequence[tuple[int, int]]) -> tuple[Tensor, Tensor | None]:
        """`read` of these ranges of a dimension, one after the other; the rest is not read, but for block-FP8 whose
        blocks they cut: that is given in fp32 without scales."""
        before = (slice(None),) * dim
        parts = [self.part(key, (*before, slice(*r))) for r in ranges]
        self._expect_type(key, parts[0])
        if parts[0].dtype != E4M3:
            return torch.cat(parts, dim), None
        if any(bound % BLOCK for r in ranges for bound in r):
            wide = self.wide(key)
            return torch.cat([wide[(*before, slice(*r))] for r in ranges], dim), None
        scale = self._scale(key, self.shape(key))
        scales = [scale[(*before, slice(a // BLOCK, b // BLOCK))] for a, b in ranges]
        return torch.cat([p.view(torch.uint8) for p in parts], dim).view(E4M3), torch.cat(scales, dim)

    def wide(self, key: str, box: Sequence[tuple[int, int]] = ()) -> Tensor:
        """A tensor without scales: block-FP8 dequantised to fp32. box: from and to in each dimension; the rest is not
        read, but for block-FP8."""
        slices = tuple(slice(*bounds) for bounds in box)
        if box:
            tensor = self.part(key, slices)
            self._expect_type(key, tensor)
            if tensor.dtype != E4M3:
                return tensor
        tensor, scale = self.read(key)
        return tensor if scale is None else dequantized(tensor, scale)[slices]

    def part(self, key: str, slices: tuple[slice, ...]) -> Tensor:
        """A box of a tensor of any type; without slices a scalar."""
        return self._get(key, lambda file: file.get_slice(key)[slices] if slices else file.get_tensor(key))

    def _expect_type(self, key: str, tensor: Tensor) -> None:
        if tensor.dtype not in WIDE and (tensor.dtype != E4M3 or tensor.ndim != 2):
            kind = f"{tensor.dtype}{list(tensor.shape)}".removeprefix("torch.")
            raise InputError(f"{self.files[key]}: {key} is {kind}; supported are {', '.join(WIDE_NAMES)}, and matrices"
                             " of float8_e4m3fn with a scale per 128x128 block")  # fmt: skip

    def _scale(self, key: str, shape: Sequence[int]) -> Tensor:
        scale_key = key + SCALES
        if scale_key not in self.files:
            raise InputError(f"{self.files[key]}: {key} is FP8 and the checkpoint has no {scale_key}")
        scale = self._get(scale_key, lambda file: file.get_tensor(scale_key))
        N, K = shape
        if scale.shape != (-(-N // BLOCK), -(-K // BLOCK)):
            raise InputError(f"{self.files[scale_key]}: {scale_key} is {list(scale.shape)} for {key} {list(shape)}")
        if not scale.is_floating_point() or not bool(scale.float().isfinite().all()):
            raise InputError(f"{self.files[scale_key]}: {scale_key} is {scale.dtype}, it must hold finite floats")
        return scale.float()

    def _get(self, key: str, of: Callable):
        from safetensors import SafetensorError

        path = self.files[key]
        try:
            return of(self.open(path))
        except (SafetensorError, AttributeError, KeyError, RuntimeError, TypeError, ValueError) as error:
            if isinstance(error, InputError):
                raise
            raise InputError(f"{path}: {key} cannot be read: {error!r}") from None  # e.g. a type that torch lacks


def dequantized(q: Tensor, scale: Tensor) -> Tensor:
    """q [N, K] of any size -> [N, K] fp32."""
    N, K = q.shape
    padded = torch.zeros(scale.shape[0] * 128, scale.shape[1] * 128)
    padded[:N, :K] = q.float()
    return dequantize(padded, scale)[:N, :K]


def write_weights(
    folder: Path, sizes: dict[str, int], tensors: Callable[[list[str]], dict[str, Tensor]], shard_bytes: int,
    stem: str = "model",
) -> None:  # fmt: skip
    """Write the weight files of a checkpoint, each atomically, and remove those of an earlier one in the folder. stem:
    of their names.

    sizes: the bytes of every key, in the files' order. tensors: called with the keys of one file at a time, at most
    shard_bytes unless a tensor is larger; returns contiguous tensors on the CPU, by key, and may add others such as
    scales. Raises OSError.
    """
    shards = shards_of(sizes, shard_bytes) or [[]]
    names = file_names(stem, len(shards))
    weight_map = {}
    for name, shard in zip(names, shards, strict=True):
        content = tensors(shard)
        weight_map |= dict.fromkeys(content, name)
        with atomic_write(folder / name, durable=True) as path:
            save_tensors(content, path)
        del content  # before the next file's tensors are made
    # torch's QuantizedHuggingFaceStorageReader looks for scales in an index alone, also of one file.
    if len(shards) > 1 or any(key.endswith(SCALES) for key in weight_map):
        names.append(write_index(folder, stem, weight_map))
    if stem == "model":
        remove_weights(folder, names)


def remove_weights(folder: Path, but: Collection[str]) -> None:
    """Remove the weight files in a folder but those with these names."""
    for path in [*folder.iterdir()]:
        if path.name not in but and re.fullmatch(WEIGHT_FILES, path.name):
            path.unlink(missing_ok=True)


def shards_of(sizes: dict[str, int], shard_bytes: int | None) -> list[list[str]]:
    """Keys in the files' order, divided so that each file has at most shard_bytes, unless a tensor is larger; None:
    one file."""
    shards: list[list[str]] = []
    size = 0
    for key, bytes_ in sizes.items():
        if not shards or (shard_bytes is not None and size + bytes_ > shard_bytes):
            shards.append([])
            size = 0
        shards[-1].append(key)
        size += bytes_
    return shards


def file_names(stem: str, number: int) -> list[str]:
    """Names of so many .safetensors files of one checkpoint."""
    if number == 1:
        return [f"{stem}.safetensors"]
    return [f"{stem}-{i:05d}-of-{number:05d}.safetensors" for i in range(1, number + 1)]


def index_name(stem: str) -> str:
    return f"{stem}.safetensors.index.json"


def write_index(folder: Path, stem: str, weight_map: dict[str, str]) -> str:
    """Write which file holds which key, atomically; returns the index's name. Raises OSError."""
    name = index_name(stem)
    with atomic_write(folder / name, durable=True) as path:
        path.write_text(json.dumps({"metadata": {"format": "pt"}, "weight_map": weight_map}, indent=2))
    return name


def save_tensors(tensors: dict[str, Tensor], path: Path) -> None:
    """Write one .safetensors file of contiguous tensors on the CPU. Raises OSError."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    try:
        save_file(tensors, path, metadata={"format": "pt"})
    except SafetensorError as error:  # a full disk, among others
        raise OSError(str(error)) from None
    path.chmod(0o644)  # safetensors creates files with mode 0600


def stored_dtype(key: str, weight: torch.dtype, dtype: torch.dtype) -> torch.dtype:
    """The type of a tensor in a checkpoint whose weights are dtype."""
    if key.endswith(("expert_bias", SCALES)):
        return torch.float32
    return E4M3 if weight == E4M3 else dtype
