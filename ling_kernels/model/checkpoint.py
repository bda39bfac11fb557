"""Checkpoints in the official format: config.json, *.safetensors with official keys, bf16 or block-FP8 weights.

Each official tensor is a view of one of our parameters (gate and up projections are halves of gate_up, an expert is a
slice of [E, N, K]), so loading, saving and comparing all use `named_views`. Loading is streamed: memory holds the model
and one tensor, besides the pages of a shard that the system maps.
"""

import json
import os
import re
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import InputError
from ..files import atomic_write, user_path
from ..nn.fp8 import Fp8Linear, fits, to_fp8
from ..nn.fp8_inference import SCALES, quantize_for_inference_
from ..op import E4M3
from ..ops.quantize import dequantize, quantize_weight
from .config import PRESETS, LingConfig
from .transformer import Ling

WIDE = (torch.bfloat16, torch.float16, torch.float32, torch.float64)  # types of weights without a scale
WIDE_NAMES = [str(dtype).removeprefix("torch.") for dtype in WIDE]
INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
WEIGHT_FILES = r"model(-\d{5,}-of-\d{5,})?\.safetensors|model\.safetensors\.index\.json"  # names that save_model uses


def named_views(model: Ling) -> Iterator[tuple[str, Tensor]]:
    """Yield (official key, view) of every weight, its FP8 scales, and the expert biases."""
    layers = [(f"model.layers.{i}", layer) for i, layer in enumerate(model.layers)]
    layers += [(f"model.layers.{len(model.layers) + k}", mtp) for k, mtp in enumerate(model.mtp)]
    yield "model.word_embeddings.weight", model.word_embeddings.weight
    for prefix, module in layers:
        for name, p in [*module.named_parameters(), *module.named_buffers()]:
            if not name.endswith("counts"):
                yield from _official_views(f"{prefix}.{name.removeprefix('layer.')}", p)
    yield "model.norm.weight", model.norm.weight
    for name, p in [*model.lm_head.named_parameters(), *model.lm_head.named_buffers()]:
        yield f"lm_head.{name}", p


def _official_views(name: str, p: Tensor) -> Iterator[tuple[str, Tensor]]:
    """Yield the official keys and views of one of our parameters."""
    name = re.sub(r"attention\.(query|key)_layernorm$", r"attention.\1_layernorm.weight", name)
    name = name.replace("mlp.router.", "mlp.gate.")
    if match := re.fullmatch(rf"(.*\.experts)\.(gate_up|down)({SCALES})?", name):
        for e in range(len(p)):
            yield from _official_views(f"{match[1]}.{e}.{match[2]}.weight{match[3] or ''}", p[e])
    elif ".gate_up.weight" in name:
        for half, view in zip(("gate_proj", "up_proj"), p.chunk(2), strict=True):
            yield name.replace("gate_up", half), view
    else:
        yield name.replace(".down.weight", ".down_proj.weight"), p


def resolve_model(name: str | Path) -> tuple[LingConfig, Path | None]:
    """(configuration, directory) of a checkpoint directory; (configuration, None) of a preset's name."""
    if not isinstance(name, str | os.PathLike):
        raise InputError(f"a model is a preset or a path of a directory, not {name!r}")
    if str(name) in PRESETS:
        return LingConfig.preset(str(name)), None
    folder = user_path(name)
    if not folder.is_dir():
        raise InputError(f"unknown model {name!r}: neither a preset ({', '.join(PRESETS)}) nor a directory")
    if not (folder / "config.json").is_file():
        raise InputError(f"{folder} is not a checkpoint: it has no config.json")
    return LingConfig.from_json(folder / "config.json"), folder


def load_model(
    folder: str | Path,
    dtype: torch.dtype = torch.bfloat16,
    device: str | torch.device = "cpu",
    fp8: bool = False,
    fp8_head: bool = False,
) -> Ling:
    """Load a checkpoint directory as a model in eval mode, with weights in dtype and expert biases in fp32.

    fp8=False dequantises block-FP8 weights. fp8=True, for inference, holds linear layers, MLPs and experts whose sizes
    are multiples of 128 in FP8 only, and quantises other checkpoints while reading; fp8_head includes lm_head.
    Raises InputError with file and key for tensors that are missing, damaged, of the wrong shape or of a type that is
    not supported, and for tensors that are not used although they belong to a weight, such as a scale or a bias.
    """
    config, directory = resolve_model(folder)
    if directory is None:
        raise InputError(f"{folder} is a preset, which has no weights; give a checkpoint directory")
    if dtype not in WIDE:
        raise InputError(f"dtype is {dtype!r}; it must be torch.{' or torch.'.join(WIDE_NAMES)}")
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, TypeError) as error:  # which of them depends on how torch was built
        raise InputError(f"torch has no device {device!r}: {error}") from None
    folder = directory
    with torch.device("meta"):
        model = Ling(config)
    model = model.to(dtype)
    if fp8:
        to_fp8(model)
        if fp8_head and fits(model.lm_head.weight):
            model.lm_head = Fp8Linear.of(model.lm_head)
        quantize_for_inference_(model)
    used = set[str]()
    with torch.no_grad(), _Shards(folder) as shards:
        files = _files(folder, shards)
        _check_shapes(folder, model, files, shards)
        if (single := folder / SINGLE).is_file() and single not in files.values():
            raise InputError(f"{folder} has {SINGLE} and {INDEX} of other files: remove the one that is out of date")
        model = model.to_empty(device=device)
        model.reset_buffers()
        views = dict(named_views(model))
        expected = [key for key in views if not key.endswith(SCALES)]
        for key in sorted(expected, key=lambda k: str(files[k])):  # shard by shard
            view, tensor = views[key], shards.read(files[key], key)
            if tensor.dtype not in WIDE and (tensor.dtype != E4M3 or tensor.ndim != 2):
                kind = f"{tensor.dtype}{list(tensor.shape)}".removeprefix("torch.")
                raise InputError(f"{files[key]}: {key} is {kind}; supported are {', '.join(WIDE_NAMES)}, and matrices"
                                 " of float8_e4m3fn with a scale per 128x128 block")  # fmt: skip
            scale = _scale(shards, files, key, tensor) if tensor.dtype == E4M3 else None
            used.update((key, key + SCALES) if scale is not None else (key,))
            if view.dtype == E4M3:
                q, scale = (tensor, scale) if scale is not None else quantize_weight(tensor.to(view.device, dtype))
                view.view(torch.uint8).copy_(q.view(torch.uint8))
                views[key + SCALES].copy_(scale)
            else:
                view.copy_(tensor if scale is None else _dequantized(tensor, scale))
        in_shards = {key: path for path in sorted({*files.values()}) for key in shards.keys(path)}
    _check_unused(folder, in_shards | files, used)  # an index need not name all
    return model.eval()


def _check_shapes(folder: Path, model: Ling, files: dict[str, Path], shards: "_Shards") -> None:
    """Raise InputError where the files lack a weight of a model on the meta device, or hold it in another shape: before
    memory is allocated, since a wrong config.json may ask for any amount.
    """
    for key, view in named_views(model):
        if key.endswith(SCALES):
            continue
        if key not in files:
            raise InputError(f"{folder}: the checkpoint has no {key}")
        shape = shards.shape(files[key], key)
        if shape != list(view.shape):
            raise InputError(f"{files[key]}: {key} is {shape}, by config.json it should be {list(view.shape)}")


def _check_unused(folder: Path, files: dict[str, Path], used: set[str]) -> None:
    """Warn about tensors that are not used. Raise InputError if one changes what a used tensor means.

    These are the other tensors of a module whose weight is used (a bias, a scale), and scales of a module around it.
    """
    unused = [key for key in files if key not in used]
    modules = {key.rpartition(".")[0] for key in used}
    parents = {module[:end] for module in modules for end, letter in enumerate(module) if letter == "."}
    for key in unused:
        module, _, name = key.rpartition(".")
        if module in modules or ("scale" in name and module in parents):
            raise InputError(f"{files[key]}: {key} is not used, and the weights beside it would be wrong without it")
    if unused:
        warnings.warn(f"{folder}: {len(unused)} tensors are not used, the first is {unused[0]}", stacklevel=3)


def _scale(shards: "_Shards", files: dict[str, Path], key: str, q: Tensor) -> Tensor:
    """Read the scales of the block-FP8 weight q [N, K]: [ceil(N/128), ceil(K/128)] fp32."""
    scale_key = key + SCALES
    if scale_key not in files:
        raise InputError(f"{files[key]}: {key} is FP8 and the checkpoint has no {scale_key}")
    scale = shards.read(files[scale_key], scale_key)
    N, K = q.shape
    if scale.shape != (-(-N // 128), -(-K // 128)):
        raise InputError(f"{files[scale_key]}: {scale_key} is {list(scale.shape)} for {key} {list(q.shape)}")
    if not scale.is_floating_point() or not bool(scale.float().isfinite().all()):
        raise InputError(f"{files[scale_key]}: {scale_key} is {scale.dtype}, it must hold finite floats")
    return scale.float()


def _dequantized(q: Tensor, scale: Tensor) -> Tensor:
    """q [N, K] of any size -> [N, K] fp32."""
    N, K = q.shape
    padded = torch.zeros(scale.shape[0] * 128, scale.shape[1] * 128)
    padded[:N, :K] = q.float()
    return dequantize(padded, scale)[:N, :K]


def _files(folder: Path, shards: "_Shards") -> dict[str, Path]:
    """Map every key of a checkpoint to its file."""
    index, single = folder / INDEX, folder / SINGLE
    if not index.is_file():
        if single.is_file():
            return dict.fromkeys(shards.keys(single), single)
        raise InputError(f"{folder} has neither {SINGLE} nor {INDEX}")
    try:
        return {k: folder / v for k, v in json.loads(index.read_text())["weight_map"].items()}
    except (OSError, ValueError, KeyError, AttributeError, TypeError, RecursionError) as error:
        raise InputError(f"{index} is damaged: {error!r}") from None


class _Shards:
    """Read tensors of several files, with one file open at a time; errors name the file."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.path: Path | None = None
        self.file: Any = None

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.path = self.file = None

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

    def shape(self, path: Path, key: str) -> list[int]:
        return self.get(path, key, lambda file: file.get_slice(key).get_shape())

    def read(self, path: Path, key: str) -> Tensor:
        return self.get(path, key, lambda file: file.get_tensor(key))

    def get(self, path: Path, key: str, of: Callable):
        from safetensors import SafetensorError

        try:
            return of(self.open(path))
        except (SafetensorError, AttributeError, KeyError, RuntimeError, TypeError, ValueError) as error:
            if isinstance(error, InputError):
                raise
            raise InputError(f"{path}: {key} cannot be read: {error!r}") from None  # e.g. a type that torch lacks


def save_model(
    model: Ling, folder: str | Path, dtype: torch.dtype = torch.bfloat16, max_shard_bytes: int = 10 << 30
) -> None:
    """Write config.json and the weights under official keys, in dtype; expert biases in fp32, FP8 weights unchanged.

    Every file is written atomically: shards, then the index, then config.json. Weight files of an earlier checkpoint in
    the folder (model.safetensors, model-00001-of-00002.safetensors) are removed, others are kept. Raises InputError if
    the folder cannot be written.
    """
    from safetensors.torch import save_file

    folder = Path(folder)
    shards, size = [{}], 0
    for key, view in named_views(model):
        bytes_ = view.numel() * stored_dtype(key, view, dtype).itemsize
        if shards[-1] and size + bytes_ > max_shard_bytes:
            shards.append({})
            size = 0
        shards[-1][key] = view
        size += bytes_
    names = [SINGLE] if len(shards) == 1 else [f"model-{i:05d}-of-{len(shards):05d}.safetensors"
                                               for i in range(1, len(shards) + 1)]  # fmt: skip
    weight_map = {key: name for name, shard in zip(names, shards, strict=True) for key in shard}
    index = json.dumps({"metadata": {"format": "pt"}, "weight_map": weight_map}, indent=2)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, shard in zip(names, shards, strict=True):
            tensors = {k: v.detach().to("cpu", stored_dtype(k, v, dtype)).contiguous() for k, v in shard.items()}
            with atomic_write(folder / name, durable=True) as path:
                save_file(tensors, path, metadata={"format": "pt"})
                path.chmod(0o644)  # safetensors creates files with mode 0600
        if len(shards) > 1:
            with atomic_write(folder / INDEX, durable=True) as path:
                path.write_text(index)
        current = {*names, INDEX} if len(shards) > 1 else {*names}
        for path in [*folder.iterdir()]:
            if path.name not in current and re.fullmatch(WEIGHT_FILES, path.name):
                path.unlink(missing_ok=True)
        with atomic_write(folder / "config.json", durable=True) as path:
            model.config.to_json(path, fp8=any(key.endswith(SCALES) for key in weight_map), dtype=dtype)
    except OSError as error:
        raise InputError(f"cannot write the checkpoint to {folder}: {error}") from None


def stored_dtype(key: str, view: Tensor, dtype: torch.dtype) -> torch.dtype:
    """The type of a tensor in a checkpoint whose weights are dtype."""
    if key.endswith(("expert_bias", SCALES)):
        return torch.float32
    return E4M3 if view.dtype == E4M3 else dtype
