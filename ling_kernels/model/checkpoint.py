"""Checkpoints in the official format: config.json, *.safetensors with official keys, bf16 or block-FP8 weights.

Each official tensor is a view of one of our parameters (gate and up projections are halves of gate_up, an expert is a
slice of [E, N, K]), so loading, saving and comparing all use `named_views`. Loading is streamed: memory holds the model
and one tensor, besides the pages of a shard that the system maps.
"""

import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from ..errors import InputError, warn
from ..files import atomic_write, user_path
from ..nn.fp8 import Fp8Linear, fits, to_fp8
from ..nn.fp8_inference import SCALES, quantize_for_inference_
from ..nn.lora import adapters
from ..op import E4M3
from ..ops.quantize import quantize_weight
from .config import PRESETS, LingConfig
from .transformer import Ling
from .weight_files import SHARD_BYTES, WIDE, WIDE_NAMES, WeightReader, dequantized, stored_dtype, write_weights


def named_views(model: Ling) -> Iterator[tuple[str, Tensor]]:
    """Yield (official key, view) of every weight, its FP8 scales, and the expert biases; adapters are left out."""
    layers = [(f"model.layers.{i}", layer) for i, layer in enumerate(model.layers)]
    layers += [(f"model.layers.{len(model.layers) + k}", mtp) for k, mtp in enumerate(model.mtp)]
    yield "model.word_embeddings.weight", model.word_embeddings.weight
    for prefix, module in layers:
        for name, p in [*module.named_parameters(), *module.named_buffers()]:
            if not name.endswith("counts") and "adapter." not in name:
                yield from official_views(f"{prefix}.{name.removeprefix('layer.')}", p)
    yield "model.norm.weight", model.norm.weight
    for name, p in [*model.lm_head.named_parameters(), *model.lm_head.named_buffers()]:
        yield f"lm_head.{name}", p


def official_views(name: str, p: Tensor) -> Iterator[tuple[str, Tensor]]:
    """Yield the official keys and views of one of our parameters."""
    name = re.sub(r"attention\.(query|key)_layernorm$", r"attention.\1_layernorm.weight", name)
    name = name.replace("mlp.router.", "mlp.gate.")
    if match := re.fullmatch(rf"(.*\.experts)\.(gate_up|down)({SCALES})?", name):
        for e in range(len(p)):
            yield from official_views(f"{match[1]}.{e}.{match[2]}.weight{match[3] or ''}", p[e])
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


class Share(Protocol):
    """The part of a model that one of several processes loads; parallel/decode.py has it."""

    def model(self, config: LingConfig) -> Ling:
        """A model with the sizes of this part."""
        ...

    def divide(self, whole: Mapping[str, Tensor], here: Mapping[str, Tensor]) -> None:
        """Find out which part of each tensor this is. Views by key of the whole model and of `model`'s, without memory.
        Raises InputError where it would cut a block of FP8."""
        ...

    def read(self, reader: WeightReader, key: str) -> tuple[Tensor, Tensor | None]:
        """`reader.read(key)` of this part alone."""
        ...


def load_model(
    folder: str | Path,
    dtype: torch.dtype = torch.bfloat16,
    device: str | torch.device = "cpu",
    fp8: bool = False,
    fp8_head: bool = False,
    share: Share | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Ling:
    """Load a checkpoint directory as a model in eval mode, with weights in dtype and expert biases in fp32.

    fp8=False dequantises block-FP8 weights. fp8=True, for inference, holds linear layers, MLPs and experts whose sizes
    are multiples of 128 in FP8 only, and quantises other checkpoints while reading; fp8_head includes lm_head.
    share: load a part of the model, and read no other. progress: called with the bytes of weights that are loaded, and
    of all, as the model holds them, after each.
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
    model = whole = on_meta(Ling, config, dtype, fp8, fp8_head)
    read = WeightReader.read
    if share is not None:
        model, read = on_meta(share.model, config, dtype, fp8, fp8_head), share.read
        share.divide(dict(named_views(whole)), dict(named_views(model)))
    used, loaded = set[str](), 0
    with torch.no_grad(), WeightReader(folder) as reader:
        check_shapes(((key, view.shape) for key, view in named_views(whole) if not key.endswith(SCALES)), reader)
        reader.refuse_two_checkpoints()
        model = model.to_empty(device=device)
        model.reset_buffers()
        views = dict(named_views(model))
        expected = [key for key in views if not key.endswith(SCALES)]
        total = sum(view.nbytes for view in views.values())
        for key in sorted(expected, key=lambda k: str(reader.files[k])):  # shard by shard
            view, (tensor, scale) = views[key], read(reader, key)
            used.update((key, key + SCALES) if scale is not None else (key,))
            if view.dtype == E4M3:
                q, scale = (tensor, scale) if scale is not None else quantize_weight(tensor.to(view.device, dtype))
                view.view(torch.uint8).copy_(q.view(torch.uint8))
                views[key + SCALES].copy_(scale)
            else:
                view.copy_(tensor if scale is None else dequantized(tensor, scale))
            loaded += sum(views[name].nbytes for name in (key, key + SCALES) if name in views)
            if progress is not None:
                progress(loaded, total)
        check_unused(folder, reader, used)
    return model.eval()


def on_meta(
    make: Callable[[LingConfig], Ling], config: LingConfig, dtype: torch.dtype, fp8: bool, fp8_head: bool
) -> Ling:
    """The model that `make` gives for a configuration, as `load_model` fills it, without memory."""
    with torch.device("meta"):
        model = make(config).to(dtype)
    if fp8:
        to_fp8(model)
        if fp8_head and fits(model.lm_head.weight):
            model.lm_head = Fp8Linear.of(model.lm_head)
        quantize_for_inference_(model)
    return model


def check_shapes(shapes: Iterable[tuple[str, Sequence[int]]], reader: WeightReader) -> None:
    """Raise InputError where the files lack a key, or hold it in another shape: before memory is allocated, since a
    wrong config.json may ask for any amount. shapes: (key, shape); no more are taken than the files have keys."""
    expected = {}
    for key, shape in shapes:
        if key not in reader.files:
            raise InputError(f"{reader.folder}: the checkpoint has no {key}")
        expected[key] = list(shape)
    for key in sorted(expected, key=lambda key: str(reader.files[key])):  # a file is opened once
        if (shape := reader.shape(key)) != expected[key]:
            raise InputError(f"{reader.files[key]}: {key} is {shape}, by config.json it should be {expected[key]}")


def check_unused(folder: Path, reader: WeightReader, used: set[str]) -> None:
    """Warn about tensors that are not used. Raise InputError if one changes what a used tensor means.

    These are the other tensors of a module whose weight is used (a bias, a scale), and scales of a module around it.
    """
    in_shards = {key: path for path in sorted({*reader.files.values()}) for key in reader.keys(path)}
    files = in_shards | reader.files  # an index need not name all
    unused = [key for key in files if key not in used]
    modules = {key.rpartition(".")[0] for key in used}
    parents = {module[:end] for module in modules for end, letter in enumerate(module) if letter == "."}
    for key in unused:
        module, _, name = key.rpartition(".")
        if module in modules or ("scale" in name and module in parents):
            raise InputError(f"{files[key]}: {key} is not used, and the weights beside it would be wrong without it")
    if unused:
        warn(f"{folder}: {len(unused)} tensors are not used, the first is {unused[0]}")


def save_model(
    model: Ling, folder: str | Path, dtype: torch.dtype = torch.bfloat16, max_shard_bytes: int = SHARD_BYTES
) -> None:
    """Write config.json and the weights under official keys, in dtype; expert biases in fp32, FP8 weights unchanged.

    Every file is written atomically: shards, then the index, then config.json. Weight files of an earlier checkpoint in
    the folder (model.safetensors, model-00001-of-00002.safetensors) are removed, others are kept. Raises InputError if
    the folder cannot be written, and for a model with adapters.
    """
    if adapters(model):
        raise InputError("the model has adapters: nn.merge_adapters_ adds them to its weights")
    folder, views = Path(folder), dict(named_views(model))
    types = {key: stored_dtype(key, view.dtype, dtype) for key, view in views.items()}

    def on_cpu(keys: list[str]) -> dict[str, Tensor]:
        return {k: views[k].detach().to("cpu", types[k]).contiguous() for k in keys}

    try:
        folder.mkdir(parents=True, exist_ok=True)
        sizes = {key: view.numel() * types[key].itemsize for key, view in views.items()}
        write_weights(folder, sizes, on_cpu, max_shard_bytes)
        with atomic_write(folder / "config.json", durable=True) as path:
            model.config.to_json(path, fp8=any(key.endswith(SCALES) for key in views), dtype=dtype)
    except OSError as error:
        raise InputError(f"cannot write the checkpoint to {folder}: {error}") from None
